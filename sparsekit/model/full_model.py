"""Models with all weights in memory, for work that cannot be done block by block."""

from __future__ import annotations

import inspect
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args

import torch
from torch import Tensor

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.kind import Kind
from sparsekit.checkpoint.resolve import resolve
from sparsekit.errors import DataError, UsageError
from sparsekit.memory import MemoryUse, available_memory
from sparsekit.model.form_linear import expand
from sparsekit.model.skeleton import Skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Whether packed weights and factors stay packed in memory or are expanded to dense weights.
Resident = Literal["packed", "expand"]
RESIDENT = get_args(Resident)


def require_memory(source: Checkpoint, dtype: torch.dtype, use: MemoryUse) -> None:
    """Refuse a model that does not fit into the available memory.

    Args:
        source: The checkpoint.
        dtype: The dtype of its weights in memory.
        use: The work that needs the whole model.

    Raises:
        DataError: It does not fit.
    """
    needed = sum(
        math.prod(p.shape) * (dtype.itemsize if p.dtype.is_floating_point else p.dtype.itemsize)
        for p in source.places.values()
    )
    if needed > (free := available_memory()):
        raise DataError(
            f"{use.purpose} needs {needed / 1e9:.1f} GB of memory for the whole model of "
            f"{source.path}, {free / 1e9:.1f} GB are available",
            use.hint,
            code="not-enough-memory",
        )


def load_whole(source: Checkpoint, dtype: torch.dtype, use: MemoryUse) -> PreTrainedModel:
    """Load the model with transformers on the CPU.

    Args:
        source: The checkpoint.
        dtype: The dtype of its weights in memory.
        use: The work that needs the whole model.

    Raises:
        DataError: It does not fit into the available memory, is quantized in an unsupported
            format, cannot be read, or lacks weights.
        DamagedError: Packed weights or factors are not those that were written.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, GenerationConfig

    source.require("load")  # transformers would import the library that its configuration names
    require_memory(source, dtype, use)
    if source.kind.alone:
        skeleton = Skeleton(source, torch.device("cpu"), dtype)
        source.scan()  # only now: parts that do not fit together have been reported before
        model = skeleton.fill()
        if (source.path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(str(source.path))
        return model
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(source.path),
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{source.path} cannot be loaded: {reason}", code="unsupported-model"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers would fill them with random numbers.
        raise DataError(
            f"{source.path} lacks {len(missing)} weights, the first is {missing[0]}",
            code="incomplete-checkpoint",
        )
    return model.eval()


def own_dtype(source: Checkpoint) -> torch.dtype:
    """The most frequent floating-point dtype of a checkpoint's tensors."""
    wide = [p.dtype for p in source.places.values() if p.dtype.is_floating_point]
    return max(sorted(set(wide), key=str), key=wide.count)


def load(path: str | Path, dtype: str, resident: Resident) -> PreTrainedModel:
    """See `sparsekit.load`."""
    if resident not in RESIDENT:
        raise UsageError(
            f"resident {resident!r} is not known", " or ".join(RESIDENT), code="unknown-choice"
        )
    source = Checkpoint.open(resolve(str(path)))
    if dtype == "auto":
        wanted = own_dtype(source)
    elif dtype in ("float32", "bfloat16", "float16"):
        wanted = getattr(torch, dtype)
    else:
        raise UsageError(
            f"dtype {dtype!r} is not known",
            "float32, bfloat16, float16 or auto",
            code="unknown-choice",
        )
    model = load_whole(source, wanted, MemoryUse("load", hint="sparsekit eval streams it"))
    if resident == "expand":
        expand(model)
        if source.kind is Kind.PACKED:
            del model.config.quantization_config  # its weights are plain now, and saved as such
    elif source.kind.alone:
        model.save_pretrained = partial(_refuse_to_save, source.path)
    return model


def _refuse_to_save(path: Path, *_: Any, **__: Any) -> NoReturn:
    """Refuse to save packed weights, which stock loaders would replace by random numbers.

    Raises:
        DataError: Always.
    """
    raise DataError(
        f"the weights of {path} are loaded packed, which save_pretrained cannot write",
        "sparsekit unpack writes plain ones, and so does a model loaded with resident='expand'",
        code="kind-not-taken",
    )


def new_cache(model: PreTrainedModel) -> dict[str, Any]:
    """An empty key-value cache, by the name of the model's argument for it.

    That name changed between releases of transformers 5.
    """
    from transformers import DynamicCache

    known = inspect.signature(type(model).forward).parameters
    name = "cache" if "cache" in known else "past_key_values"
    return {name: DynamicCache(config=model.config)}


def hidden_states(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """The input of the output layer for tokens `[rows, length]`, `[rows * length, hidden]`."""
    return model.base_model(input_ids=tokens, use_cache=False).last_hidden_state.flatten(0, 1)


@torch.no_grad()
def require_plain_head(model: PreTrainedModel) -> None:
    """Refuse a model whose logits are not just the output layer on the last hidden states.

    Raises:
        DataError: It scales or caps them.
    """
    tokens = torch.arange(4, device=model.device)[None]
    logits = model(input_ids=tokens, use_cache=False).logits[0]
    plain = model.get_output_embeddings()(hidden_states(model, tokens))
    if not torch.allclose(logits, plain, rtol=1e-4, atol=1e-4):
        raise DataError(
            f"{model.config.model_type!r} changes its logits after the output layer (a scale or a "
            "cap), which training does not do yet",
            code="unsupported-model",
        )
