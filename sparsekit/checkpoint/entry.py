"""The history of a checkpoint, `sparsekit.json`: an entry for each stage that made it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, ValidationError

from sparsekit.checkpoint.entry_parts import (
    Calibration,
    ConvertSettings,
    CountedTotals,
    Finished,
    PackedTotals,
    PackedWeight,
    Part,
    Plan,
    PrunedWeight,
    PruneSettings,
    QuantizedTotals,
    QuantizedWeight,
    QuantizeSettings,
    RecoverSettings,
    Settings,
    Skipped,
    Source,
    SparseTotals,
    Totals,
    TrainedWeight,
    UnpackedTotals,
    Weight,
)
from sparsekit.errors import DataError
from sparsekit.files import read_json

# Raised with every change after which another version would misread the file.
FORMAT = 1


class Stage(Part):
    """Fields that every stage records."""

    stage: str
    model: str
    """The name of the model, as it was given."""
    words: dict[str, JsonValue]
    """The options that were given, as they were written."""
    source: Source
    settings: Settings
    versions: dict[str, str]
    totals: Totals
    weights: tuple[Weight, ...] = ()
    """Left out in the history of a mask."""
    skipped: tuple[Skipped, ...] | None = None
    resumed_blocks: int = 0
    """Blocks that an interrupted run had finished."""
    seconds: float
    peak_memory_bytes: int | None


class PruneEntry(Stage):
    """Entry of `prune`."""

    stage: Literal["prune"]
    settings: PruneSettings
    mask: Mask | None
    calibration: Calibration | None
    totals: SparseTotals
    weights: tuple[PrunedWeight, ...] = ()


class RecoverEntry(Stage):
    """Entry of `recover`."""

    stage: Literal["recover"]
    settings: RecoverSettings
    teacher: Source | None
    text: str
    evaluated_on: str | None
    plan: Plan
    tokens: int
    processes: int
    finished: Finished
    kept_mass: float | None
    """Share of the teacher's probability in the loss."""
    totals: SparseTotals
    weights: tuple[TrainedWeight, ...] = ()


class QuantizeEntry(Stage):
    """Entry of `quantize`."""

    stage: Literal["quantize"]
    settings: QuantizeSettings
    calibration: Calibration | None
    totals: QuantizedTotals
    weights: tuple[QuantizedWeight, ...] = ()


class PackEntry(Stage):
    """Entry of `pack`."""

    stage: Literal["pack"]
    totals: PackedTotals
    weights: tuple[PackedWeight, ...] = ()


class UnpackEntry(Stage):
    """Entry of `unpack`."""

    stage: Literal["unpack"]
    totals: UnpackedTotals


class ConvertEntry(Stage):
    """Entry of `convert`."""

    stage: Literal["convert"]
    settings: ConvertSettings
    quantized: bool
    """Whether other weights are on a grid still."""
    totals: CountedTotals


Entry = Annotated[
    PruneEntry | RecoverEntry | QuantizeEntry | PackEntry | UnpackEntry | ConvertEntry,
    Field(discriminator="stage"),
]


class Mask(Part):
    """The sparse model whose mask a stage was given, and how that was made."""

    path: str
    fingerprint: str
    history: tuple[Entry, ...]


class History(Part):
    """The contents of `sparsekit.json`."""

    format: Literal[1] = FORMAT
    fingerprint: str | None = None
    """Of the checkpoint's weights."""
    history: tuple[Entry, ...] = ()
    """Oldest first."""

    @classmethod
    def read(cls, file: Path) -> History:
        """The history in a file.

        Raises:
            DataError: The file is not JSON, has another format, or is not as sparsekit writes it.
        """
        content = read_json(file)
        version = content.get("format") if isinstance(content, Mapping) else None
        if version != FORMAT:
            other = "it has no format" if version is None else f"it has format {version!r}"
            raise _refused(file, f"{other}, this version reads {FORMAT}")
        try:
            return cls.model_validate_json(file.read_bytes(), strict=True)
        except ValidationError as error:
            raise _refused(file, reason(error)) from error

    def to_json(self) -> dict[str, Any]:
        """The contents of the file."""
        return {"format": FORMAT} | super().to_json()


def reason(error: ValidationError) -> str:
    """The place and the message of the first part of a file that is not as sparsekit writes it."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"


def _refused(file: Path, why: str) -> DataError:
    return DataError(
        f"{file} is not a history that this version of sparsekit reads: {why}",
        "make the checkpoint again, or delete the file if its history is not needed",
        code="invalid-history",
    )
