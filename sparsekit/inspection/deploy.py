"""Where a checkpoint runs, whether it is smaller and faster there, and why: facts, no promises.

What is known of other programs is in the table `runtimes.toml`.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.kind import Kind
from sparsekit.checkpoint.resolve import resolve
from sparsekit.errors import DataError
from sparsekit.inspection.inspect import inspect
from sparsekit.inspection.sparse_kernels import Speed, measure_kernels
from sparsekit.model.block_stream import BlockStream
from sparsekit.model.device import pick_device
from sparsekit.pipeline.options import DEVICES, one_of
from sparsekit.progress import SILENT, Progress
from sparsekit.weights.grids import Grid

Answer = Literal["yes", "no", "part", "unknown"]
# Sides of a weight that torch's sparse kernels need a multiple of, for 16-bit numbers.
SEMI_STRUCTURED = 64
TABLE = Path(__file__).with_name("runtimes.toml")
# The row of a program that has none for a form.
UNREAD = ("", "no no no", "it knows no {kind} weights; sparsekit unpack gives {unpacked}")
# Zeros of 16-bit weights of which a mask would take more than they save.
FEW = 1 / 16
# Inputs that share a scale, of weights that vLLM's kernels take; 0: a row does.
MARLIN_GROUPS = (0, 32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What matters of a checkpoint."""

    kind: Kind
    pattern: str
    """The strictest pattern that all weights share; `unstructured` or `dense`."""
    grid: str | None
    fits_kernels: bool
    """Whether every weight has a shape that torch's 2:4 kernels take."""

    @property
    def two_of_four(self) -> bool:
        """Whether every weight has the pattern that there are kernels for."""
        return self.pattern in ("2:4", "1:4")

    @property
    def stored_as(self) -> str:
        """The kind in a word; products are plain weights."""
        return str(Kind.PLAIN if self.kind is Kind.PRODUCTS else self.kind)

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON."""
        composed = self.kind is Kind.PRODUCTS
        return asdict(self) | {"kind": self.stored_as, "composed": composed}


@dataclass(frozen=True)
class Verdict:
    """What becomes of a checkpoint in one program."""

    loads: Answer
    smaller: Answer
    """In memory or on disk, than the dense model in its own type."""
    faster: Answer
    """Than the same model without zeros and quantization."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class DeployReport:
    """The outcome of `deploy`."""

    model: str
    form: Traits
    runtimes: Sequence[tuple[str, str, Verdict]]
    """Name, version (the installed one, or the one or the month that was looked at), and what
    becomes there."""
    speeds: Sequence[Speed] = ()
    """Of torch's 2:4 kernels on this machine's GPU, where there is one and the form fits."""
    unmeasured: str = ""
    """Why nothing was measured; empty when it was."""

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON."""
        rows = [{"name": n, "version": v, **asdict(verdict)} for n, v, verdict in self.runtimes]
        speeds = [asdict(speed) | {"gain": speed.gain} for speed in self.speeds]
        return {
            "model": self.model,
            "form": self.form.to_json(),
            "runtimes": rows,
            "speeds": speeds,
            "unmeasured": self.unmeasured,
        }


def deploy(model: str, device: str = "auto", progress: Progress = SILENT) -> DeployReport:
    """What a checkpoint is worth in each runtime.

    Args:
        model: A folder, hub id or `demo`.
        device: Where torch's 2:4 kernels are to be measured: `cuda`; `cpu` measures nothing.
        progress: Told of each block, as it is looked for patterns.

    Raises:
        UsageError: CUDA is asked for and absent.
        DataError: The folder is no readable checkpoint.
    """
    one_of("--device", device, DEVICES)
    device = pick_device(device)
    form = _form(model, progress)
    speeds, unmeasured = _measured(model, form, device, progress)
    runtimes = [
        (runtime["name"], _seen(runtime), verdict(runtime, form))
        for runtime in tomllib.loads(TABLE.read_text(encoding="utf-8"))["runtime"]
    ]
    return DeployReport(
        model=model, form=form, runtimes=runtimes, speeds=speeds, unmeasured=unmeasured
    )


def _measured(
    model: str, form: Traits, device: str, progress: Progress
) -> tuple[Sequence[Speed], str]:
    """How fast torch's 2:4 kernels are here, or why that was not measured."""
    if device != "cuda":
        return (), "no CUDA device"
    if form.kind is not Kind.PLAIN or not (form.two_of_four and form.fits_kernels):
        return (), "the kernels do not take this checkpoint"
    try:
        return measure_kernels(Checkpoint.open(resolve(model)), device, progress), ""
    except (DataError, RuntimeError) as error:
        return (), f"the kernels could not be measured: {str(error).splitlines()[0]}"


def _form(model: str, progress: Progress) -> Traits:
    source = Checkpoint.open(resolve(model, progress))
    targets = BlockStream(source, device="cpu", dtype=torch.float32).targets()
    total = inspect(model, progress).total
    grids = (stored.format.grid for stored in source.packed.values())
    grid = next(filter(None, grids), source.grid)
    products = source.kind is Kind.PRODUCTS
    sparse = not products and total["sparsity"] > FEW  # `inspect` counts the factors' cores
    return Traits(
        kind=source.kind,
        pattern=total["pattern"] if sparse else "dense",
        grid=str(grid) if grid else None,
        fits_kernels=all(
            side % SEMI_STRUCTURED == 0 and not t.transposed for t in targets for side in t.shape
        ),
    )


def _seen(runtime: Mapping[str, Any]) -> str:
    """The version that is installed or was looked at, or the month in which that was."""
    if "package" in runtime:
        return version(runtime["package"])
    return runtime.get("version") or f"looked at {runtime['looked_at']}"


def verdict(runtime: Mapping[str, Any], form: Traits) -> Verdict:
    """What becomes of a checkpoint in one program, by the first row that fits."""
    known = traits(form)
    rows = (row for row in (*runtime["rows"], UNREAD) if known.issuperset(row[0].split()))
    _, answers, reason = next(rows)
    grid = Grid.parse(form.grid) if form.grid else None
    words = {
        "kind": form.stored_as,
        "pattern": form.pattern,
        "unpacked": "one in the format of compressed-tensors" if grid else "a plain checkpoint",
        "group": grid and grid.group,
        "bits": grid and grid.bits,
        "side": SEMI_STRUCTURED,
    }
    return Verdict(*answers.split(), reason.format_map(words))


def traits(form: Traits) -> set[str]:
    """The words of the table that hold of a checkpoint."""
    grid = Grid.parse(form.grid) if form.grid else None
    words = {
        "2:4": form.two_of_four,
        "dense": form.pattern == "dense",
        "composed": form.kind is Kind.PRODUCTS,
        "odd-shape": not form.fits_kernels,
        "odd-group": grid is not None and grid.group not in MARLIN_GROUPS,
        "grouped": grid is not None and bool(grid.activations or grid.group),
        "float": grid is not None and grid.floating,
    }
    return {form.stored_as, *(word for word, holds in words.items() if holds)}
