"""A checkpoint's folder by the names of its files: what can be refused before torch is there."""

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
# Factors of weights, beside their products or instead of them. In the second case the other tensors
# lie in a file that no stock loader looks for: it raises, where it would else draw random weights.
FACTORS = "sparsekit-factors.safetensors"
OTHER_WEIGHTS = "sparsekit-weights.safetensors"
# Which file has which tensor there, for transformers, and the method by which it knows the form.
PACKED_INDEX = "sparsekit-weights.safetensors.index.json"
PACKED_METHOD = "sparsekit"


def config_of(source: PretrainedConfig) -> dict[str, Any]:
    """A configuration without the place that it was read from."""
    return {key: value for key, value in source.to_dict().items() if key != "_name_or_path"}


def is_packed(told: Any) -> bool:
    """Whether a `quantization_config` is that of a checkpoint whose weights are factors only."""
    return isinstance(told, Mapping) and told.get("quant_method") == PACKED_METHOD


def part_name(weight: str, part: str) -> str:
    """The name of one of the tensors that a weight is stored as."""
    return f"{weight.removesuffix('.weight')}.{part}"


def weight_files(path: Path) -> Mapping[str, Sequence[str] | None]:
    """Weight files of a checkpoint by name, with the tensors to take from each (None: all).

    Raises:
        DataError: The folder is missing, or is no checkpoint with safetensors weights.
    """
    if not path.is_dir():
        raise DataError(f"no such model folder: {path}")
    if not (path / "config.json").is_file():
        raise DataError(f"{path} has no config.json", "is it a Hugging Face checkpoint?")
    if (path / OTHER_WEIGHTS).is_file():
        return {FACTORS: None, OTHER_WEIGHTS: None}
    if (path / FACTORS).is_file() and not ((path / SINGLE).is_file() or (path / INDEX).is_file()):
        raise DataError(f"{path} lacks {OTHER_WEIGHTS}", "copy or make the folder again")
    if (path / INDEX).is_file():
        files = indexed_files(path)
        for file in files:
            if not (path / file).is_file():
                raise DataError(f"{path / INDEX} names {file}, which is missing")
        if (path / SINGLE).is_file():
            refuse_two_forms(path, files)
        return dict(sorted(files.items()))
    if (path / SINGLE).is_file():
        return {SINGLE: None}
    others = sorted(f.name for f in path.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".gguf"))
    if others:
        raise DataError(
            f"{path} has no safetensors weights, only {others[0]}",
            "convert it once: load it with AutoModelForCausalLM.from_pretrained and write it "
            "with save_pretrained",
        )
    raise DataError(
        f"{path} has no safetensors weights ({SINGLE} or {INDEX})",
        "if the model has other weights, load it with AutoModelForCausalLM.from_pretrained and "
        "write it with save_pretrained",
    )


def indexed_files(path: Path) -> dict[str, list[str]]:
    """The weight files that a folder's index names, with the tensors that lie in each.

    Raises:
        DataError: The index is broken, or names a file outside the folder.
    """
    index = read_json(path / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"{path / INDEX} has no weight_map")
    files: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise DataError(f"{path / INDEX} places {name} outside the folder: {file!r}")
        files.setdefault(file, []).append(name)
    return files


def refuse_two_forms(path: Path, indexed: Iterable[str]) -> None:
    """Refuse a folder with all weights in one file and again in those that its index names.

    Raises:
        DataError: The index names other files than the one.
    """
    if set(indexed) != {SINGLE}:
        raise DataError(
            f"{path} has both {SINGLE} and {INDEX} with other files",
            "transformers would load the first: delete the one that is not the model, in a copy if "
            "the folder is the hub's",
        )


def load_config(path: Path) -> PretrainedConfig:
    """The configuration in a model's folder.

    Raises:
        DataError: It cannot be read, needs code of its own, or is unknown to transformers.
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
        raise DataError(f"{path}: model type {kind!r} cannot be loaded: {reason}", hint) from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; none of its own code is run.

    Raises:
        DataError: There is none, it cannot be loaded, or it has no words.
    """
    from transformers import AutoTokenizer

    hint = "copy its files there, or pass token rows: --calibration or --text FILE.safetensors"
    if not any((folder / file).is_file() for file in FILES):
        raise DataError(f"{folder} has no tokenizer", hint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise DataError(f"the tokenizer in {folder} cannot be loaded: {reason}", hint) from error
    # For several architectures transformers 5 builds one without any file, and it has no words:
    # every text would be empty.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise DataError(f"{folder} has no tokenizer: its vocabulary is empty", hint)
    return tokenizer
