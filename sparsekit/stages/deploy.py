"""Where a checkpoint runs, whether it is smaller and faster there, and why: facts, no promises.

What is said of other programs was read in their sources and release notes in November 2026, or
tried; the versions are those that were looked at.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, Literal

import torch

from sparsekit.models.blocks import BlockStream
from sparsekit.models.checkpoint import Checkpoint
from sparsekit.models.reference import resolve
from sparsekit.progress import SILENT, Progress
from sparsekit.stages.inspect import inspect

Answer = Literal["yes", "no", "part", "unknown"]
# Sides of a weight that torch's sparse kernels need a multiple of, for 16-bit numbers.
SEMI_STRUCTURED = 64


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What becomes of a checkpoint in one program."""

    name: str
    version: str
    """The installed one, or the one that was looked at."""
    loads: Answer
    smaller: Answer
    """In memory or on disk, than the dense model in its own type."""
    faster: Answer
    """Than the same model without zeros and quantization."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class Form:
    """What matters of a checkpoint."""

    kind: Literal["plain", "quantized", "packed", "factored"]
    pattern: str
    """The strictest pattern that all weights share; `unstructured` or `dense`."""
    grid: str | None
    fits_kernels: bool
    """Whether every weight has a shape that torch's 2:4 kernels take."""
    transposed: bool
    """Whether weights lie in layers that are no nn.Linear."""


@dataclass(frozen=True, kw_only=True)
class DeployReport:
    """The outcome of `deploy`."""

    model: str
    form: Form
    runtimes: Sequence[Runtime]

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON."""
        rows = [asdict(runtime) for runtime in self.runtimes]
        return {"model": self.model, "form": asdict(self.form), "runtimes": rows}


def deploy(model: str, progress: Progress = SILENT) -> DeployReport:
    """What a checkpoint is worth in each runtime.

    Args:
        model: A folder, hub id or `demo`.
        progress: Told of each block, as it is looked for patterns.

    Raises:
        DataError: The folder is no readable checkpoint.
    """
    form = _form(model, progress)
    rules = (_transformers, _vllm, _torch, _llama_cpp, _openvino, _tensorrt, _sparsekit)
    return DeployReport(model=model, form=form, runtimes=[rule(form) for rule in rules])


def _form(model: str, progress: Progress) -> Form:
    source = Checkpoint.open(resolve(model, progress))
    targets = BlockStream(source, device="cpu", dtype=torch.float32).targets()
    kind: Literal["plain", "quantized", "packed", "factored"] = "plain"
    if source.factored:
        sides = any(name.endswith((".left", ".up")) for name in source.factors)
        kind = "factored" if sides else "packed"
    elif source.grid is not None:
        kind = "quantized"
    return Form(
        kind=kind,
        pattern=inspect(model, progress).total["pattern"],
        grid=str(source.grid) if source.grid else None,
        fits_kernels=all(side % SEMI_STRUCTURED == 0 for t in targets for side in t.shape),
        transposed=any(target.transposed for target in targets),
    )


def _ours_only(name: str, seen: str, form: Form) -> Runtime:
    """A program that reads no packed and no factored weights."""
    way = "sparsekit unpack" if form.kind == "packed" else "prune with --format dense"
    reason = f"it knows no {form.kind} weights; {way} gives a plain checkpoint"
    return Runtime(name=name, version=seen, loads="no", smaller="no", faster="no", reason=reason)


def _transformers(form: Form) -> Runtime:
    told = {"name": "transformers", "version": version("transformers"), "loads": "yes"}
    if form.kind == "packed":
        reason = "after import sparsekit; each layer unpacks its weight whenever it is called"
        return Runtime(**told, smaller="yes", faster="no", reason=reason)
    if form.kind == "factored":
        return _ours_only("transformers", version("transformers"), form)
    if form.kind == "quantized":
        reason = "smaller on disk; the first forward pass expands the weights in memory"
        return Runtime(**told, smaller="part", faster="no", reason=reason)
    reason = "zeros are numbers like others to it"
    return Runtime(**told, smaller="no", faster="no", reason=reason)


def _vllm(form: Form) -> Runtime:
    seen = "0.32"
    if form.kind in ("packed", "factored"):
        return _ours_only("vLLM", seen, form)
    told = {"name": "vLLM", "version": seen, "loads": "yes"}
    if form.kind == "quantized":
        reason = "it has kernels for this grid; the zeros add nothing, its 2:4 kernels are gone"
        return Runtime(**told, smaller="yes", faster="yes", reason=reason)
    reason = "its 2:4 kernels were removed in March 2026 (#36799)"
    return Runtime(**told, smaller="no", faster="no", reason=reason)


def _torch(form: Form) -> Runtime:
    name, seen = "torch semi-structured (CUDA)", version("torch")
    if form.kind in ("packed", "factored"):
        return _ours_only(name, seen, form)
    told = {"name": name, "version": seen}
    if form.kind == "quantized":
        reason = "takes plain weights: quantize with --format dense, or not at all"
        return Runtime(**told, loads="no", smaller="no", faster="no", reason=reason)
    if form.pattern not in ("2:4", "1:4"):
        reason = f"takes 2:4 only, the weights are {form.pattern}"
        return Runtime(**told, loads="no", smaller="no", faster="no", reason=reason)
    if not form.fits_kernels:
        reason = f"some weight has a side that is no multiple of {SEMI_STRUCTURED}"
        return Runtime(**told, loads="part", smaller="part", faster="part", reason=reason)
    reason = (
        "torch.sparse.to_sparse_semi_structured, layer by layer and in process, 16-bit, on GPUs "
        "since Ampere; faster for large batches, not for one token at a time: measure it"
    )
    return Runtime(**told, loads="yes", smaller="yes", faster="part", reason=reason)


def _llama_cpp(form: Form) -> Runtime:
    name, seen = "llama.cpp", "2026-11"
    if form.kind in ("packed", "factored"):
        return _ours_only(name, seen, form)
    told = {"name": name, "version": seen, "smaller": "no", "faster": "no"}
    if form.kind == "quantized":
        reason = "its converter wants plain weights: quantize --format dense, then Q4_0 or Q8_0"
        return Runtime(**told, loads="no", reason=reason)
    reason = "GGUF has no sparse form (#3594); Q4_0 and Q8_0 keep zeros, K-quants need not"
    return Runtime(**told, loads="yes", reason=reason)


def _openvino(form: Form) -> Runtime:
    name, seen = "OpenVINO (CPU)", "2026.4"
    if form.kind in ("packed", "factored"):
        return _ours_only(name, seen, form)
    told = {"name": name, "version": seen, "smaller": "no"}
    if form.kind == "quantized":
        reason = "not tried: take the plain model there, and quantize it there"
        return Runtime(**told, loads="unknown", faster="unknown", reason=reason)
    reason = (
        "faster with 8-bit weights and far more than half of them zero, on Xeons with AMX "
        "(CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE)"
    )
    return Runtime(**told, loads="yes", faster="part", reason=reason)


def _tensorrt(form: Form) -> Runtime:
    name, seen = "TensorRT core (by ONNX)", "2026-09"
    if form.kind in ("packed", "factored"):
        return _ours_only(name, seen, form)
    told = {"name": name, "version": seen, "smaller": "no"}
    if form.kind == "quantized":
        reason = "not tried: take the plain model there, and quantize it there"
        return Runtime(**told, loads="unknown", faster="unknown", reason=reason)
    if form.pattern not in ("2:4", "1:4"):
        reason = f"takes 2:4 only, the weights are {form.pattern}"
        return Runtime(**told, loads="yes", faster="no", reason=reason)
    reason = (
        "trtexec --sparsity=enable takes a sparse kernel only where it is faster, mostly with "
        "8-bit inputs; TensorRT-LLM has no such path any more"
    )
    return Runtime(**told, loads="yes", faster="part", reason=reason)


def _sparsekit(form: Form) -> Runtime:
    told = {"name": "sparsekit", "version": version("sparsekit"), "loads": "yes", "faster": "no"}
    if form.kind in ("packed", "factored"):
        reason = "sparsekit.load and eval keep weights packed; a layer unpacks its own when called"
        return Runtime(**told, smaller="yes", reason=reason)
    if form.kind == "quantized":
        return Runtime(**told, smaller="part", reason="eval expands a block at a time")
    if form.pattern == "dense":
        return Runtime(**told, smaller="no", reason="nothing is sparse")
    return Runtime(
        **told, smaller="no", reason="sparsekit pack makes it smaller, on disk and loaded"
    )
