"""The parts of a model card that come from the history: earlier stages and the hub's tags."""

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from sparsekit.checkpoint.entry import (
    ConvertEntry,
    Entry,
    PackEntry,
    PruneEntry,
    QuantizeEntry,
    RecoverEntry,
    UnpackEntry,
)
from sparsekit.checkpoint.entry_parts import Calibration

CODED = ("quantized", "compressed-tensors")
# In the order of a card.
TAGS = ("pruned", *CODED, "packed")


def stages_before(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """A row for each stage but the last: what it did, the pattern, and the text that it read."""
    return [
        (f"earlier: {entry.stage}", ", ".join(_told(entry))) for entry in unfolded(entries)[:-1]
    ]


def _told(entry: Entry) -> Iterator[str]:
    """A summary of one stage, as far as the history records it."""
    yield stage_words(entry)
    if entry.settings.pattern:
        yield entry.settings.pattern
    if isinstance(entry, PruneEntry | QuantizeEntry) and entry.calibration:
        yield calibration_text(entry.calibration)
    if isinstance(entry, RecoverEntry):
        yield training_text(entry)


def tags(entries: Sequence[Entry]) -> list[str]:
    """The hub's tags for everything that was done to a checkpoint."""
    made: set[str] = set()
    for entry in entries:
        if isinstance(entry, PruneEntry | RecoverEntry):
            made -= set(CODED)  # the numbers are no longer those of a grid
        made |= set(_own_tags(entry))
    if "packed" in made:
        made.discard("compressed-tensors")  # the codes are stored in another form
    return [tag for tag in TAGS if tag in made]


def _own_tags(entry: Entry) -> Sequence[str]:
    """The tags that one stage adds."""
    match entry:
        case PruneEntry():
            return ("pruned", *(CODED if entry.settings.then else ()))
        case RecoverEntry():
            return ("pruned",)
        case QuantizeEntry():
            return CODED[:1] if entry.settings.format == "dense" else CODED
        case PackEntry():
            return ("packed", *(CODED if any(row.grid for row in entry.weights) else ()))
        case UnpackEntry():
            return CODED if entry.settings.grid else ()
        case ConvertEntry():
            return CODED if entry.quantized else ()


def calibration_text(rows: Calibration) -> str:
    """Calibration rows in words."""
    return (
        f"{rows.samples} rows of {rows.length} tokens from "
        f"`{base_name(rows.source)}` (sha256 `{rows.fingerprint[:16]}…`)"
    )


def training_text(entry: RecoverEntry) -> str:
    """The training text of a stage, in words."""
    return (
        f"{entry.tokens} tokens of `{base_name(entry.text)}` (sha256 `{entry.settings.data[:16]}…`)"
    )


def base_name(path: str) -> str:
    """The last part of a path or hub id."""
    return Path(path).name


def unfolded(history: Iterable[Entry]) -> list[Entry]:
    """The entries of a history, each after those that made the mask that it was given."""
    entries: list[Entry] = []
    for entry in history:
        if isinstance(entry, PruneEntry) and entry.mask:
            entries += unfolded(entry.mask.history)
        entries.append(entry)
    return entries


def lineage(history: Iterable[Entry]) -> list[Entry]:
    """The stages that lead to a model, each from the output of the one before.

    A stage that was given a mask continues from the model with that mask, although its words name
    the dense model.
    """
    entries: list[Entry] = []
    for entry in history:
        if isinstance(entry, PruneEntry) and entry.mask:
            entries = lineage(entry.mask.history)
        entries.append(entry)
    return entries


def command(
    entry: Entry, model: str | None = None, out: str = "OUT", *, public: bool = False
) -> str:
    """The command line of a stage, with its words as they were given.

    Args:
        entry: Of the stage.
        model: The model to name; None: the one that was named.
        out: The output to name.
        public: Whether others will read it, who do not have the folders of this machine: absolute
            paths are cut to names.
    """
    words = [entry.stage, model or entry.model, "-o", out]
    for name, value in entry.words.items():
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


def stage_words(entry: Entry) -> str:
    """A stage in words."""
    if isinstance(entry, QuantizeEntry):
        return f"{entry.settings.grid} {entry.settings.method}"
    if isinstance(entry, ConvertEntry):
        return f"convert {entry.settings.form}"
    if not isinstance(entry, PruneEntry):
        return entry.settings.method
    settings = entry.settings
    steps = [settings.method, settings.reconstruct, settings.allocate]
    steps += ["lowrank"] if settings.compensate != "0" else []
    words = " ".join(word for word in steps if word != "none")
    return f"{words} + {settings.then}" if settings.then else words
