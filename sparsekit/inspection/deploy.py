"""Runtimes that load a checkpoint, and whether it is smaller and faster there.

The table `runtimes.toml` describes the runtimes.
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
# torch's sparse kernels need both sides of a 16-bit weight to be multiples of this.
SEMI_STRUCTURED = 64
TABLE = Path(__file__).with_name("runtimes.toml")
# For forms that a runtime has no row for.
UNREAD = ("", "no no no", "it does not support {kind} weights; sparsekit unpack writes {unpacked}")
# Share of zeros in 16-bit weights below which a bit mask takes more space than it saves.
FEW = 1 / 16
# Inputs per scale that vLLM's kernels support; 0: one scale per row.
MARLIN_GROUPS = (0, 32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class Traits:
    """Properties of a checkpoint that runtimes depend on."""

    kind: Kind
    pattern: str
    """Strictest pattern of all weights, `unstructured` or `dense`."""
    grid: str | None
    fits_kernels: bool
    """Whether torch's 2:4 kernels support the shape of every weight."""

    @property
    def two_of_four(self) -> bool:
        """Whether every weight has the pattern of the 2:4 kernels."""
        return self.pattern in ("2:4", "1:4")

    @property
    def stored_as(self) -> str:
        """The kind; products are stored as plain weights."""
        return str(Kind.PLAIN if self.kind is Kind.PRODUCTS else self.kind)

    def to_json(self) -> dict[str, Any]:
        """The properties as JSON."""
        composed = self.kind is Kind.PRODUCTS
        return asdict(self) | {"kind": self.stored_as, "composed": composed}


@dataclass(frozen=True)
class Verdict:
    """Support for a checkpoint in one runtime."""

    loads: Answer
    smaller: Answer
    """In memory or on disk, compared with the dense model in its own type."""
    faster: Answer
    """Compared with the same model without zeros and quantization."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class DeployReport:
    """Result of `deploy`."""

    model: str
    form: Traits
    runtimes: Sequence[tuple[str, str, Verdict]]
    """Name, version (installed, or last examined) and support."""
    speeds: Sequence[Speed] = ()
    """Of torch's 2:4 kernels, if this machine has a GPU and the form fits."""
    unmeasured: str = ""
    """Reason why nothing was measured; empty if it was."""

    def to_json(self) -> dict[str, Any]:
        """The result as JSON."""
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
    """Report how each runtime supports a checkpoint.

    Args:
        model: A folder, hub id or `demo`.
        device: `cuda` measures torch's 2:4 kernels; `cpu` measures nothing.
        progress: Reports each block.

    Raises:
        UsageError: CUDA is requested and not available.
        DataError: The folder is not a readable checkpoint.
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
    """Speed of torch's 2:4 kernels here, or the reason why it was not measured."""
    if device != "cuda":
        return (), "no CUDA device"
    if form.kind is not Kind.PLAIN or not (form.two_of_four and form.fits_kernels):
        return (), "the kernels do not support this checkpoint"
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
    """Installed version, or the version or month that was examined."""
    if "package" in runtime:
        return version(runtime["package"])
    return runtime.get("version") or f"looked at {runtime['looked_at']}"


def verdict(runtime: Mapping[str, Any], form: Traits) -> Verdict:
    """Support for a checkpoint in one runtime, from the first row that matches."""
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
    """Words of the table that describe a checkpoint."""
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
    return {form.stored_as, *(word for word, applies in words.items() if applies)}
