"""Where a checkpoint runs, whether it is smaller and faster there, and why: facts, no promises.

What is said of other programs was read in their sources and release notes in November 2026, or
tried; the versions are those that were looked at.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
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
# Zeros of 16-bit weights of which a mask would take more than they save.
FEW = 1 / 16
# Inputs that share a scale, of weights that vLLM's kernels take; 0: a row does.
MARLIN_GROUPS = (0, 32, 64, 128)
NOT_TRIED = "not tried: take the plain model there, and quantize it there"


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
    rules: list[tuple[str, str, Callable[[Traits], Verdict], Sequence[Kind]]] = [
        ("transformers", version("transformers"), _transformers, (Kind.PACKED,)),
        ("vLLM", "0.32", _vllm, ()),
        ("torch semi-structured (CUDA)", version("torch"), _torch, ()),
        ("llama.cpp", "looked at 2026-11", _llama_cpp, ()),
        ("OpenVINO (CPU)", "2026.4", _openvino, ()),
        ("TensorRT core (by ONNX)", "looked at 2026-09", _tensorrt, ()),
        ("sparsekit", version("sparsekit"), _sparsekit, (Kind.PACKED, Kind.FACTORED)),
    ]
    found = []
    for name, seen, rule, reads in rules:
        known = form.kind in (Kind.PLAIN, Kind.PRODUCTS, Kind.QUANTIZED, *reads)
        found.append((name, seen, rule(form) if known else _unread(form)))
    return DeployReport(
        model=model, form=form, runtimes=found, speeds=speeds, unmeasured=unmeasured
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


def _unread(form: Traits) -> Verdict:
    """Of a program that does not read the form."""
    left = "one in the format of compressed-tensors" if form.grid else "a plain checkpoint"
    reason = f"it knows no {form.kind} weights; sparsekit unpack gives {left}"
    return Verdict("no", "no", "no", reason)


def _transformers(form: Traits) -> Verdict:
    if form.kind is Kind.PACKED:
        reason = "after import sparsekit; each layer unpacks its weight whenever it is called"
        return Verdict("yes", "yes", "no", reason)
    if form.kind is Kind.QUANTIZED:
        reason = "smaller on disk; the first forward pass expands the weights in memory"
        return Verdict("yes", "part", "no", reason)
    return Verdict("yes", "no", "no", "zeros are numbers like others to it")


def _vllm(form: Traits) -> Verdict:
    if form.kind is Kind.QUANTIZED and form.grid:
        grid = Grid.parse(form.grid)
        if grid.group not in MARLIN_GROUPS:
            reason = (
                f"its Marlin kernels take groups of 32, 64 and 128 and whole rows, not of "
                f"{grid.group}: whether another kernel does depends on the device"
            )
            return Verdict("part", "part", "part", reason)
        device = " (of CPUs, on those with AMX)" if grid.floating else ""
        reason = f"it has kernels for this grid{device}; the zeros add nothing, 2:4 ones are gone"
        return Verdict("yes", "yes", "yes", reason)
    return Verdict("yes", "no", "no", "its 2:4 kernels were removed in March 2026 (#36799)")


def _torch(form: Traits) -> Verdict:
    if form.kind is Kind.QUANTIZED:
        reason = "takes plain weights: quantize with --format dense, or not at all"
        return Verdict("no", "no", "no", reason)
    if not form.two_of_four:
        return Verdict("no", "no", "no", f"takes 2:4 only, the weights are {form.pattern}")
    if not form.fits_kernels:
        reason = (
            f"some weight has a side that is no multiple of {SEMI_STRUCTURED}, or is no nn.Linear's"
        )
        return Verdict("part", "part", "part", reason)
    reason = (
        "torch.sparse.to_sparse_semi_structured, layer by layer and in process, 16-bit, on GPUs "
        "since Ampere; faster for large batches, not for one token at a time: measure it"
    )
    return Verdict("yes", "yes", "part", reason)


def _llama_cpp(form: Traits) -> Verdict:
    if form.kind is Kind.QUANTIZED and form.grid:
        grid = Grid.parse(form.grid)
        if grid.activations or grid.group:
            reason = (
                "its converter makes plain numbers of the codes (#17069) and writes types of its "
                "own: Q4_0 and Q8_0 keep zeros"
            )
            return Verdict("yes", "no", "no", reason)
        reason = (
            f"its converter takes packed codes with groups only: quantize to int{grid.bits}-g32, "
            "or with --format dense"
        )
        return Verdict("no", "no", "no", reason)
    reason = "GGUF has no sparse form (#3594); Q4_0 and Q8_0 keep zeros, K-quants need not"
    return Verdict("yes", "no", "no", reason)


def _openvino(form: Traits) -> Verdict:
    if form.kind is Kind.QUANTIZED:
        return Verdict("unknown", "no", "unknown", NOT_TRIED)
    reason = (
        "faster only with 8-bit weights of its own and far more than half of them zero, on Xeons "
        "with AMX (CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE)"
    )
    return Verdict("yes", "no", "no", reason)


def _tensorrt(form: Traits) -> Verdict:
    if form.kind is Kind.QUANTIZED:
        return Verdict("unknown", "no", "unknown", NOT_TRIED)
    if not form.two_of_four:
        return Verdict("yes", "no", "no", f"takes 2:4 only, the weights are {form.pattern}")
    reason = (
        "trtexec --sparsity=enable takes a sparse kernel only where it is faster, mostly with "
        "8-bit inputs; TensorRT-LLM has no such path any more"
    )
    return Verdict("yes", "no", "part", reason)


def _sparsekit(form: Traits) -> Verdict:
    if form.kind.alone:
        reason = "sparsekit.load and eval keep weights packed; a layer unpacks its own when called"
        return Verdict("yes", "yes", "no", reason)
    if form.kind is Kind.QUANTIZED:
        return Verdict("yes", "part", "no", "eval expands a block at a time")
    if form.kind is Kind.PRODUCTS:
        reason = (
            "its weights are products; sparsekit pack keeps the factors alone, which are sparse"
        )
        return Verdict("yes", "no", "no", reason)
    if form.pattern == "dense":
        return Verdict("yes", "no", "no", "nothing is sparse")
    return Verdict("yes", "no", "no", "sparsekit pack makes it smaller, on disk and loaded")
