"""The history of a checkpoint, `sparsekit.json`: an entry for each stage that made it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from sparsekit.errors import DataError
from sparsekit.files import read_json

# Raised with every change after which another version would misread the file.
FORMAT = 1


class Part(BaseModel):
    """A part of a history."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def to_json(self) -> dict[str, Any]:
        """The part as it is written: what was recorded, without defaults."""
        return self.model_dump(mode="json", exclude_unset=True)


class Source(Part):
    """A model that a stage read."""

    path: str
    fingerprint: str


class Calibration(Part):
    """The calibration rows of a stage."""

    source: str
    samples: int
    length: int
    seed: int
    fingerprint: str
    notes: tuple[str, ...] = ()


class Skipped(Part):
    """A weight that a stage left as it was."""

    name: str
    reason: str


class Weight(Part):
    """What became of one weight."""

    name: str
    shape: tuple[int, int]
    zeros: int
    size: int
    pattern: str | None = None
    error: float | None = None
    """Relative output error on sampled calibration tokens; None without calibration."""
    bits: float | None = None
    """Bits on disk per entry; None of a plain weight."""


class SolvedWeight(Weight):
    """What became of a weight that a method solved for."""

    seconds: float
    """Of weights that were solved as one, the share by size."""
    numbers: dict[str, int | float] = {}
    """Numbers that only this method reports."""


class PrunedWeight(SolvedWeight):
    """A row of `prune`."""

    pattern: str


class TrainedWeight(Weight):
    """A row of `recover`."""

    pattern: str
    flipped: int
    """Entries that training pruned or brought back."""


class QuantizedWeight(SolvedWeight):
    """A row of `quantize`."""

    grid: str
    zeros_before: int
    bits: float


class PackedWeight(Weight):
    """A row of `pack`."""

    pattern: str
    bits: float
    value_bits: float
    place_bits: float
    share: float
    """Of the bytes that it takes unpacked."""
    grid: str | None = None
    exact: bool | None = None
    """Whether factors multiply to the same bits here; None without factors."""
    sha256: str
    """Of the bytes that were packed."""


class Totals(Part):
    """Sums over the weights of a stage."""

    weights: int


class CountedTotals(Totals):
    """Sums of a stage that counts zeros."""

    zeros: int
    size: int


class SparseTotals(CountedTotals):
    """Sums of `prune` and `recover`."""

    sparsity: float
    mean_error: float | None
    bits_per_weight: float | None
    """Of weights with factors."""


class QuantizedTotals(CountedTotals):
    """Sums of `quantize`."""

    zeros_before: int
    mean_error: float | None
    bits_per_weight: float


class PackedTotals(CountedTotals):
    """Sums of `pack`."""

    bits_per_weight: float
    bytes: int
    bytes_before: int


class UnpackedTotals(Totals):
    """Sums of `unpack`."""

    products: int
    """Weights that were multiplied out of factors."""
    bytes: int
    bytes_before: int


class Settings(Part):
    """Everything that decided the output's bytes and is not recorded next to it.

    Options that are only recorded need no field.
    """

    model_config = ConfigDict(extra="allow")

    method: str
    pattern: str | None = None
    grid: str | None = None
    format: str = "dense"
    """How the weights are stored."""


class PruneSettings(Settings):
    """Settings of `prune`."""

    pattern: str
    options: dict[str, str] = {}
    initial_options: dict[str, str] = {}
    """Those of the method that chose the mask before a refiner."""
    reconstruct: str
    allocate: str
    compensate: str
    budget: float | None
    then: str | None
    device: str
    dtype: str


class RecoverSettings(Settings):
    """Settings of `recover`."""

    pattern: str
    options: dict[str, JsonValue]
    data: str
    """The fingerprint of the training rows."""
    metric: str
    schedule: str
    teacher_top: int | None
    slorb: int | None
    mixed_precision: str


class QuantizeSettings(Settings):
    """Settings of `quantize`."""

    grid: str
    options: dict[str, str]
    device: str
    dtype: str


class ConvertSettings(Settings):
    """Settings of `convert`."""

    form: str
    """The format of the source."""


class Plan(Part):
    """What `recover` chose before its first step."""

    model_config = ConfigDict(extra="allow")

    steps: int
    rate: float
    share: float
    decay: float


class Finished(Part):
    """What `recover` measured after its last step."""

    sparsity_measure: float
    moved: float | None = None
    """Relative change of the last hidden states when the mask was applied."""


class Stage(Part):
    """What every stage records."""

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
    """What `prune` did."""

    stage: Literal["prune"]
    settings: PruneSettings
    mask: Mask | None
    calibration: Calibration | None
    totals: SparseTotals
    weights: tuple[PrunedWeight, ...] = ()


class RecoverEntry(Stage):
    """What `recover` did."""

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
    """What `quantize` did."""

    stage: Literal["quantize"]
    settings: QuantizeSettings
    calibration: Calibration | None
    totals: QuantizedTotals
    weights: tuple[QuantizedWeight, ...] = ()


class PackEntry(Stage):
    """What `pack` did."""

    stage: Literal["pack"]
    totals: PackedTotals
    weights: tuple[PackedWeight, ...] = ()


class UnpackEntry(Stage):
    """What `unpack` did."""

    stage: Literal["unpack"]
    totals: UnpackedTotals


class ConvertEntry(Stage):
    """What `convert` did."""

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
        found = read_json(file)
        version = found.get("format") if isinstance(found, Mapping) else None
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
