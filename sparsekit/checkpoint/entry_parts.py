"""Parts of history entries: rows of weights, sums over them, settings."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue


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
    """Result of a stage for one weight."""

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
    """Result of a method for one weight."""

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
    """The choices of `recover` before its first step."""

    model_config = ConfigDict(extra="allow")

    steps: int
    rate: float
    share: float
    decay: float


class Finished(Part):
    """The measurements of `recover` after its last step."""

    sparsity_measure: float
    moved: float | None = None
    """Relative change of the last hidden states when the mask was applied."""
