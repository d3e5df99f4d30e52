"""A checkpoint's folder by the names of its files: what can be refused before torch is there."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsekit.errors import DataError
from sparsekit.files import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PROVENANCE = "sparsekit.json"
# Factors of weights, beside their products or instead of them. In the second case the other tensors
# lie in a file that no stock loader looks for: it raises, where it would else draw random weights.
FACTORS = "sparsekit-factors.safetensors"
UNFACTORED = "sparsekit-weights.safetensors"
# Which file has which tensor there, for transformers, and the method by which it knows the form.
PACKED_INDEX = "sparsekit-weights.safetensors.index.json"
PACKED_METHOD = "sparsekit"


def is_packed(told: Any) -> bool:
    """Whether a `quantization_config` is that of a checkpoint whose weights are factors only."""
    return isinstance(told, Mapping) and told.get("quant_method") == PACKED_METHOD


def factor_name(weight: str, part: str) -> str:
    """The name of a part of a weight's factors."""
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
    if (path / UNFACTORED).is_file():
        return {FACTORS: None, UNFACTORED: None}
    if (path / FACTORS).is_file() and not ((path / SINGLE).is_file() or (path / INDEX).is_file()):
        raise DataError(f"{path} lacks {UNFACTORED}", "copy or make the folder again")
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
