"""The files of a checkpoint's folder: what can be checked without importing torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekit.errors import DataError
from sparsekit.files import read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PROVENANCE = "sparsekit.json"
# Factors of weights, next to their products or instead of them. If instead, the other tensors are
# in a file that no stock loader looks for, so that it raises instead of drawing random weights.
FACTORS = "sparsekit-factors.safetensors"
OTHER_WEIGHTS = "sparsekit-weights.safetensors"
# The index of such a checkpoint for transformers, and its `quant_method`.
PACKED_INDEX = "sparsekit-weights.safetensors.index.json"
PACKED_METHOD = "sparsekit"


def config_of(source: PretrainedConfig) -> dict[str, Any]:
    """A configuration without the path it was read from."""
    return {key: value for key, value in source.to_dict().items() if key != "_name_or_path"}


def is_packed(config: Any) -> bool:
    """Whether a `quantization_config` is that of a packed checkpoint."""
    return isinstance(config, Mapping) and config.get("quant_method") == PACKED_METHOD


def part_name(weight: str, part: str) -> str:
    """The name of one of the tensors that a weight is stored as."""
    return f"{weight.removesuffix('.weight')}.{part}"


def weight_files(path: Path) -> Mapping[str, Sequence[str] | None]:
    """Weight files of a checkpoint by name, with the tensors to take from each (None: all).

    Raises:
        DataError: The folder is missing, or is not a checkpoint with safetensors weights.
    """
    if not path.is_dir():
        raise DataError(f"no such model folder: {path}", code="no-such-model")
    if not (path / "config.json").is_file():
        raise DataError(
            f"{path} has no config.json", "is it a Hugging Face checkpoint?", code="no-config"
        )
    if (path / OTHER_WEIGHTS).is_file():
        return {FACTORS: None, OTHER_WEIGHTS: None}
    if (path / FACTORS).is_file() and not ((path / SINGLE).is_file() or (path / INDEX).is_file()):
        raise DataError(
            f"{path} lacks {OTHER_WEIGHTS}",
            "copy or make the folder again",
            code="incomplete-checkpoint",
        )
    if (path / INDEX).is_file():
        files = indexed_files(path)
        for file in files:
            if not (path / file).is_file():
                raise DataError(
                    f"{path / INDEX} names {file}, which is missing", code="incomplete-checkpoint"
                )
        if (path / SINGLE).is_file():
            refuse_two_forms(path, files)
        return dict(sorted(files.items()))
    if (path / SINGLE).is_file():
        return {SINGLE: None}
    raise _no_safetensors(path)


def _no_safetensors(path: Path) -> DataError:
    """The error for a folder without safetensors weights."""
    others = sorted(f.name for f in path.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".gguf"))
    if others:
        return DataError(
            f"{path} has no safetensors weights, only {others[0]}",
            "convert it once: load it with AutoModelForCausalLM.from_pretrained and write it "
            "with save_pretrained",
            code="no-safetensors",
        )
    return DataError(
        f"{path} has no safetensors weights ({SINGLE} or {INDEX})",
        "if the model has other weights, load it with AutoModelForCausalLM.from_pretrained and "
        "write it with save_pretrained",
        code="no-safetensors",
    )


def indexed_files(path: Path) -> dict[str, list[str]]:
    """The weight files that a folder's index names, with the tensors in each.

    Raises:
        DataError: The index is broken, or names a file outside the folder.
    """
    index = read_json(path / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"{path / INDEX} has no weight_map", code="invalid-index")
    files: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise DataError(
                f"{path / INDEX} places {name} outside the folder: {file!r}", code="invalid-index"
            )
        files.setdefault(file, []).append(name)
    return files


def refuse_two_forms(path: Path, indexed: Iterable[str]) -> None:
    """Refuse a folder with all weights in one file and again in the files of an index.

    Raises:
        DataError: The index names other files than that one.
    """
    if set(indexed) != {SINGLE}:
        raise DataError(
            f"{path} has both {SINGLE} and {INDEX} with other files",
            "transformers would load the first: delete the one that is not the model, in a copy if "
            "the folder is the hub's",
            code="ambiguous-weights",
        )


def load_config(path: Path) -> PretrainedConfig:
    """The configuration in a model's folder.

    Raises:
        DataError: It cannot be read, needs remote code, or is unknown to transformers.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    raw = read_json(path / "config.json")
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    broken = (ValueError, KeyError, OSError, TypeError, ArithmeticError, StrictDataclassError)
    try:
        return transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    except broken as error:
        if isinstance(raw, dict) and "auto_map" in raw:
            reason, hint = "it needs remote code, which sparsekit does not run", ""
        elif kind and kind not in transformers.models.auto.configuration_auto.CONFIG_MAPPING:
            reason = f"transformers {transformers.__version__} does not know it"
            hint = "a newer one may: pip install -U transformers"
        else:
            reason, hint = " ".join(str(error).split()), ""
        raise DataError(
            f"{path}: model type {kind!r} cannot be loaded: {reason}",
            hint,
            code="unsupported-model",
        ) from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint, without remote code.

    Raises:
        DataError: There is none, it cannot be loaded, or its vocabulary is empty.
    """
    from transformers import AutoTokenizer

    hint = "copy its files there, or pass token rows: --calibration or --text FILE.safetensors"
    if not any((folder / file).is_file() for file in FILES):
        raise DataError(f"{folder} has no tokenizer", hint, code="no-tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise DataError(
            f"the tokenizer in {folder} cannot be loaded: {reason}", hint, code="invalid-tokenizer"
        ) from error
    # For several architectures transformers 5 builds one without any file and with an empty
    # vocabulary: every text would be empty.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise DataError(
            f"{folder} has no tokenizer: its vocabulary is empty", hint, code="no-tokenizer"
        )
    return tokenizer


def quantization(path: Path) -> Any:
    """The `quantization_config` in a folder's config.json; None if there is none."""
    config = read_json(path / "config.json")
    return config.get("quantization_config") if isinstance(config, dict) else None
