"""One model of a comparison: how it was made, its size and its quality, from its folder."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.entry import ConvertEntry, Entry, RecoverEntry, UnpackEntry
from sparsekit.checkpoint.folder import PROVENANCE
from sparsekit.checkpoint.kind import Kind
from sparsekit.checkpoint.resolve import local_folder
from sparsekit.checkpoint.safetensors_file import TensorPlace
from sparsekit.provenance.history import stage_words, unfolded
from sparsekit.scoring.quality import Measured, Quality, qualities
from sparsekit.scoring.saved_scores import DENSE, is_of, read_scores
from sparsekit.scoring.score_entry import ScoreEntry

# Stages whose pattern is the one that was asked for; the others record the pattern that they found.
PATTERNING = ("prune", "recover")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model."""

    name: str
    """Of its folder; of two with the same name the whole path."""
    path: Path
    n_bytes: int | None
    """Of all safetensors files; None where there are none."""
    method: str
    """The stages in words."""
    pattern: str | None
    bits: float | None
    """Of a prunable weight on disk."""
    seconds: float | None
    """Of all stages together; None without a history, as the next two."""
    tokens: int | None
    """Trained on, likewise."""
    peak_bytes: int | None
    """Of the stage that took most memory."""
    history: Sequence[Entry]
    """With what made a mask that was given before what used it."""
    scores: Sequence[ScoreEntry]
    quality: Mapping[Measured, Quality]
    stored: bool
    """Whether the folder holds the model, not only its scores."""
    stale: int
    """Number of the folder's scores that are of other weights; they are left out."""


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, be it a damaged one."""
    return any((folder / file).is_file() for file in ("config.json", PROVENANCE))


def read_row(folder: Path) -> Row:
    """The model in a folder.

    Where only its scores are, size and history are those of the model that was scored, if it is
    on this machine.

    Raises:
        DataError: A file in the folder is damaged, or it has scores and its weights are not those
            in its history.
    """
    there = read_scores(folder)
    stored = is_checkpoint(folder)
    source = _opened(folder if stored else _scored_model(there))
    weights = None
    if source is not None and stored and there:
        weights = source.scan()  # of the weights that are there, whatever the history says
    scores = [entry for entry in there if not stored or is_of(entry, weights)]
    return _row(
        source,
        name=folder.resolve().name,
        path=folder,
        scores=scores,
        quality=qualities(scores),
        stored=stored,
        stale=len(there) - len(scores),
    )


def baseline_row(name: str, quality: Mapping[Measured, Quality]) -> Row:
    """A model that others were compared with when they were scored.

    Args:
        name: As it was given to `eval`; its size is known if it is on this machine.
        quality: What the scores of the others record of it.

    Raises:
        DataError: A file of the model is damaged.
    """
    return _row(
        _opened(local_folder(name)),
        name=Path(name).name or name,
        path=Path(name),
        scores=(),
        quality=quality,
        stored=False,
        stale=0,
    )


def _opened(folder: Path | None) -> Checkpoint | None:
    return None if folder is None else Checkpoint.open(folder)


def _row(source: Checkpoint | None, *, stored: bool, **known: Any) -> Row:
    """A row with the facts from history and files of its model, if available."""
    history = unfolded(() if source is None else source.provenance().history)
    tokens = [entry.tokens for entry in history if isinstance(entry, RecoverEntry)]
    peaks = [e.peak_memory_bytes for e in history if e.peak_memory_bytes is not None]
    return Row(
        n_bytes=None if source is None else _size(source.path),
        method=" + ".join(map(stage_words, history)) or ("" if stored else DENSE),
        pattern=_pattern(history),
        bits=None if source is None else _bits(source, history),
        seconds=math.fsum(entry.seconds for entry in history) if history else None,
        tokens=sum(tokens) if tokens else None,
        peak_bytes=max(peaks, default=None),
        history=history,
        stored=stored,
        **known,
    )


def _scored_model(scores: Sequence[ScoreEntry]) -> Path | None:
    """The folder of the model that was scored."""
    names = [entry.model for entry in scores if entry.model]
    return local_folder(names[-1]) if names else None


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _pattern(history: Sequence[Entry]) -> str | None:
    """The pattern that was last requested, else the one that was found."""
    for stages in (PATTERNING, ("convert",), ("pack",)):
        patterns = [entry.settings.pattern for entry in history if entry.stage in stages]
        if patterns and patterns[-1]:
            return patterns[-1]
    return None


def _bits(source: Checkpoint, history: Sequence[Entry]) -> float | None:
    """Bits of a prunable weight on disk, as recorded by the last stage that chose its form.

    They are counted if it records none, and also if it records those of factors that are stored
    with their products, since both take space then.
    """
    bits = [
        entry.totals.bits_per_weight
        for entry in history
        if not isinstance(entry, UnpackEntry | ConvertEntry)
    ]
    if bits and bits[-1] is not None and source.kind is not Kind.PRODUCTS:
        return bits[-1]
    changed = {row.name for entry in history for row in entry.weights}
    names = [name for name in changed if name in source.places]
    names = names or [name for name, place in source.places.items() if len(place.shape) == 2]
    size = sum(math.prod(source.places[name].shape) for name in names)
    if not size:
        return None
    places = [place for name in names for place in _places(source, name)]
    return 8 * sum(place.stop - place.start for place in places) / size


def _places(source: Checkpoint, name: str) -> Iterator[TensorPlace]:
    """The places of a weight, or of the parts it is stored as, and of its factors."""
    quantized = source.quantized.get(name)
    yield from quantized.places.values() if quantized else [source.places[name]]
    if name in source.packed:
        yield from source.packed[name].places.values()
