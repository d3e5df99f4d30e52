"""What `quantize` is asked to do, checked without torch so that a wrong word answers at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from sparsekit import registry as methods
from sparsekit.errors import UsageError, did_you_mean
from sparsekit.pipeline.options import (
    DEVICES,
    DTYPES,
    MethodOptions,
    named_rows,
    one_of,
    parsed,
    with_rows,
)
from sparsekit.text.calibration import Calibration
from sparsekit.weights.grids import Grid

Storage = Literal["compressed-tensors", "dense"]
STORAGES = get_args(Storage)


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """The options of `quantize`; the command's flags have the same names and defaults."""

    method: str = "gptq"
    grid: str = "int4-g128"
    options: Mapping[str, str] = field(default_factory=dict)
    """Options of the method, as text."""
    calibration: Calibration | None = None
    """None: the default rows for a method that needs them, none for one that does not."""
    skip: Sequence[str] = ()
    """Globs of weights to leave as they are, matched against the name or any run of its parts."""
    format: Storage = "compressed-tensors"
    """Codes and scales, or the numbers that they stand for in the source's type."""
    device: str = "auto"
    dtype: str = "auto"

    def check(self) -> None:
        """Refuse what is wrong whatever the model is.

        Raises:
            UsageError: An unknown method, option, grid, format, device or dtype.
            DataError: The calibration source cannot be used.
        """
        known = methods.names("quantizers")
        if self.method not in known:
            raise UsageError(f"no method {self.method!r}", did_you_mean(self.method, known))
        methods.check("quantizers", self.method, self.options)
        Grid.parse(self.grid)
        if self.calibration:
            self.calibration.check()
        one_of("--format", self.format, STORAGES)
        one_of("--device", self.device, DEVICES)
        one_of("--dtype", self.dtype, DTYPES)

    @property
    def rows(self) -> Calibration | None:
        """The calibration that this run reads."""
        needed = not methods.describe("quantizers", self.method).data_free
        return self.calibration or (Calibration() if needed else None)


def quantize_config(
    *,
    method: str = "gptq",
    grid: str = "int4-g128",
    option: MethodOptions = (),
    calibration: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    skip: Sequence[str] = (),
    format: str = "compressed-tensors",
    device: str = "auto",
    dtype: str = "auto",
) -> QuantizeConfig:
    """The checked configuration that the words of `quantize` spell.

    Raises:
        UsageError: A word is not one that can be used, or has no effect.
        DataError: The calibration source cannot be used.
    """
    config = QuantizeConfig(
        method=method,
        grid=grid,
        options=parsed(option),
        calibration=named_rows(calibration, samples, length, seed),
        skip=skip,
        format=format,  # type: ignore[arg-type]  (check() refuses other words)
        device=device,
        dtype=dtype,
    )
    flags = "--samples, --length and --seed"
    given = not (samples is length is None and seed == 0)
    return with_rows(config, samples, length, seed, flags if given else "", config.method)
