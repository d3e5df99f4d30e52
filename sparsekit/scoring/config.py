"""Options of eval."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsekit.errors import UsageError
from sparsekit.pipeline.options import DEVICES, DTYPES, one_of
from sparsekit.text.sources import check_source

BATCH_SIZE = 8


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


def eval_config(
    *,
    text: str | None = None,
    length: int | None = None,
    tasks: str | Sequence[str] = "",
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
) -> EvalConfig:
    """The checked configuration that the words of `eval` spell.

    Raises:
        UsageError: A word is not one that can be used, or has no effect.
        DataError: The text cannot be used.
    """
    names = tasks.split(",") if isinstance(tasks, str) else tasks
    config = EvalConfig(
        text=text,
        length=length,
        tasks=[name.strip() for name in names if name.strip()],
        include_path=None if include_path is None else Path(include_path),
        limit=limit,
        batch_size=batch_size,
        seed=seed,
        device=device,
        dtype=dtype,
    )
    config.check()
    return config
