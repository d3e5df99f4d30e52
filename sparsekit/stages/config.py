"""What `prune` is asked to do, checked without torch so that a wrong word answers at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sparsekit import methods
from sparsekit.errors import UsageError
from sparsekit.models.calibration import Calibration
from sparsekit.models.texts import check_source
from sparsekit.tensors.patterns import Pattern

BATCH_SIZE = 8
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """The options of `prune`; the command's flags have the same names and defaults."""

    method: str = "wanda"
    pattern: str = "2:4"
    options: Mapping[str, str] = field(default_factory=dict)
    """Options of the method, as text."""
    calibration: Calibration | None = None
    """None: the default rows for a method that needs them, none for one that does not."""
    skip: Sequence[str] = ()
    """Globs of weights to leave dense, matched against the name or any run of its parts."""
    reconstruct: Literal["none", "cg"] = "none"
    """`cg` solves for the weights on the mask that the method chose."""
    propagate: bool | None = None
    """Whether inputs come from the pruned blocks before; None: as the method's source does."""
    device: str = "auto"
    dtype: str = "auto"

    def check(self) -> None:
        """Refuse what is wrong whatever the model is.

        Raises:
            UsageError: An unknown method, option, pattern, device or dtype.
            DataError: The calibration source cannot be used.
        """
        methods.check("pruners", self.method, self.options)
        Pattern.parse(self.pattern)
        if self.calibration:
            self.calibration.check()
        one_of("--reconstruct", self.reconstruct, ("none", "cg"))
        one_of("--device", self.device, DEVICES)
        one_of("--dtype", self.dtype, DTYPES)

    @property
    def rows(self) -> Calibration | None:
        """The calibration that this run reads."""
        needed = (
            self.reconstruct != "none" or not methods.describe("pruners", self.method).data_free
        )
        return self.calibration or (Calibration() if needed else None)


def one_of(flag: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse a value that is not among the choices of a flag."""
    if value not in choices:
        raise UsageError(f"{flag} {value!r} is not known", f"one of: {', '.join(choices)}")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The options of `eval`; the command's flags have the same names and defaults."""

    text: str | None = None
    """Where the windows for perplexity come from; None: `builtin` when no task is named."""
    length: int | None = None
    tasks: Sequence[str] = ()
    include_path: Path | None = None
    limit: int | None = None
    """At most this many windows, and samples of each task."""
    batch_size: int | None = None
    """Samples of a task in one forward pass; None: `BATCH_SIZE`."""
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"

    def check(self) -> None:
        """Refuse what is wrong whatever the model is.

        Raises:
            UsageError: An unknown device or dtype, or a number out of range.
            DataError: The text cannot be used.
        """
        if self.text is not None:
            check_source(self.text)
        if self.include_path is not None and not self.include_path.is_dir():
            raise UsageError(f"--include-path {self.include_path} is not a folder")
        for name in ("include_path", "batch_size"):
            if getattr(self, name) is not None and not self.tasks:
                raise UsageError(f"--{name.replace('_', '-')} has no effect without --tasks")
        if self.length is not None and self.windows_of is None:
            raise UsageError("--length has no effect on tasks", "name a text: --text builtin")
        if self.seed < 0:
            raise UsageError(f"--seed must not be negative, not {self.seed}")
        for name in ("limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        one_of("--device", self.device, DEVICES)
        one_of("--dtype", self.dtype, DTYPES)

    @property
    def windows_of(self) -> str | None:
        """The text that perplexity is measured on."""
        return self.text or (None if self.tasks else "builtin")
