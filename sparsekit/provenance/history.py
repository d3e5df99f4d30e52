"""The parts of a model card that come from the history: earlier stages and the hub's tags."""

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

CODED = ("quantized", "compressed-tensors")
# In the order of a card.
TAGS = ("pruned", *CODED, "packed")
# What rows are called by.
ROWS = ("samples", "length", "source", "fingerprint")


def stages_before(entries: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """A row for each stage but the last: what it did, the pattern, and the text that it read."""
    return [
        (f"earlier: {entry.get('stage')}", ", ".join(_told(entry)))
        for entry in unfolded(entries)[:-1]
    ]


def _told(entry: Mapping[str, Any]) -> Iterator[str]:
    """A summary of one stage, as far as the history records it."""
    recipe, rows = entry.get("recipe", {}), entry.get("calibration")
    yield stage_words(entry)
    if recipe.get("pattern"):
        yield str(recipe["pattern"])
    if isinstance(rows, Mapping) and all(key in rows for key in ROWS):
        yield calibration_text(rows)
    if entry.get("tokens") and entry.get("text") and recipe.get("data"):
        yield training_text(entry)


def tags(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The hub's tags for everything that was done to a checkpoint."""
    made: set[str] = set()
    for entry in entries:
        if entry.get("stage") in ("prune", "recover"):
            made -= set(CODED)  # the numbers are no longer those of a grid
        made |= set(_own_tags(entry))
    if "packed" in made:
        made.discard("compressed-tensors")  # the codes are stored in another form
    return [tag for tag in TAGS if tag in made]


def _own_tags(entry: Mapping[str, Any]) -> Sequence[str]:
    """The tags that one stage adds."""
    stage, recipe = entry.get("stage"), entry.get("recipe", {})
    if stage in ("prune", "recover"):
        return ("pruned", *(CODED if recipe.get("then") else ()))
    if stage == "quantize":
        return CODED[:1] if recipe.get("format") == "dense" else CODED
    if stage == "pack":
        coded = any("grid" in row for row in entry.get("weights", ()))
        return ("packed", *(CODED if coded else ()))
    is_coded = recipe.get("grid") if stage == "unpack" else entry.get("quantized")
    return CODED if is_coded else ()


def calibration_text(told: Mapping[str, Any]) -> str:
    """Calibration rows in words."""
    return (
        f"{told['samples']} rows of {told['length']} tokens from "
        f"`{base_name(told['source'])}` (sha256 `{told['fingerprint'][:16]}…`)"
    )


def training_text(entry: Mapping[str, Any]) -> str:
    """The training text of a stage, in words."""
    return (
        f"{entry['tokens']} tokens of `{base_name(entry['text'])}` "
        f"(sha256 `{entry['recipe']['data'][:16]}…`)"
    )


def base_name(path: str) -> str:
    """The last part of a path or hub id."""
    return Path(path).name


def unfolded(history: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The entries of a history, each after those that made the mask that it was given."""
    entries: list[Mapping[str, Any]] = []
    for entry in history:
        entries += unfolded((entry.get("mask") or {}).get("history", ()))
        entries.append(entry)
    return entries


def lineage(history: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The stages that lead to a model, each from the output of the one before.

    A stage that was given a mask goes on from the model with that mask, and its words name the
    dense one.
    """
    entries: list[Mapping[str, Any]] = []
    for entry in history:
        if mask := entry.get("mask"):
            entries = lineage(mask["history"])
        entries.append(entry)
    return entries


def command(
    entry: Mapping[str, Any], model: str | None = None, out: str = "OUT", *, public: bool = False
) -> str:
    """The command line of a stage, with its words as they were given.

    Args:
        entry: Of the stage.
        model: The model to name; None: the one that was named.
        out: The output to name.
        public: Whether others will read it, who do not have the folders of this machine: absolute
            paths are cut to names.
    """
    words = [entry["stage"], model or entry["model"], "-o", out]
    for name, value in entry["words"].items():
        words += _flags(f"--{name.replace('_', '-')}", value)
    if public:
        words = [PurePath(word).name if word.startswith(("/", "~")) else word for word in words]
    return shlex.join(["sparsekit", *words])


def _flags(flag: str, value: Any) -> list[str]:
    """An option as it is written on the command line."""
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag.removeprefix('--')}"]
    if isinstance(value, Mapping):
        value = [f"{key}={one}" for key, one in value.items()]
    values = value if isinstance(value, list) else [value]
    return [word for one in values for word in (flag, str(one))]


def stage_words(entry: Mapping[str, Any]) -> str:
    """A stage in words."""
    recipe, stage = entry.get("recipe", {}), str(entry.get("stage", ""))
    if stage == "quantize":
        return f"{recipe.get('grid')} {recipe.get('method')}"
    if stage == "convert":
        return f"convert {recipe.get('form')}"
    if stage != "prune":
        return str(recipe.get("method") or stage)
    told = [recipe.get(key) for key in ("method", "reconstruct", "allocate")]
    told += ["lowrank"] if recipe.get("compensate") not in (None, "0") else []
    words = " ".join(str(word) for word in told if word not in (None, "none"))
    return f"{words} + {recipe['then']}" if recipe.get("then") else words
