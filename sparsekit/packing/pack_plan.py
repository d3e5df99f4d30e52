"""How the weights of a model are packed, found from their bits before anything is written."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.layout import Layout, factor_types
from sparsekit.errors import DataError
from sparsekit.model.architecture import Target
from sparsekit.model.block_stream import BlockStream
from sparsekit.pipeline.loops import PACKING_BYTES
from sparsekit.pipeline.source import open_source, require_disk
from sparsekit.progress import SILENT, Progress
from sparsekit.weights.core_format import CoreFormat
from sparsekit.weights.grids import Codes
from sparsekit.weights.packed import exact_pattern, packing
from sparsekit.weights.patterns import SOUGHT, Pattern
from sparsekit.weights.quantized import Shapes

# N:M patterns that are tried on every weight.
TRIED = tuple(map(Pattern.parse, SOUGHT))
# Types whose bits are packed as they are.
TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one weight is packed."""

    target: Target
    format: CoreFormat
    """Of its packed core."""
    types: Shapes
    """Type and shape of each tensor that it becomes, by the last part of its name."""
    dense_bytes: int
    """Its size when unpacked: as numbers, or as codes with their scales."""
    factored: bool = False
    """Whether it is stored with factors, which then replace it."""

    @property
    def pattern(self) -> Pattern:
        """The pattern by which its core is packed."""
        assert self.format.pattern is not None
        return self.format.pattern

    @property
    def n_bytes(self) -> int:
        """Its size when packed."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.types.values())


@dataclass(frozen=True, kw_only=True)
class PackJob:
    """A checked model with all that packing needs."""

    source: Checkpoint
    fingerprint: str
    plans: Mapping[str, Plan]
    """How each weight that packing makes smaller is packed."""
    layout: Layout

    @property
    def sizes(self) -> dict[str, int]:
        """Number of entries of each packed weight."""
        return {name: math.prod(plan.target.shape) for name, plan in self.plans.items()}

    @property
    def room(self) -> int:
        """The memory that the run is expected to take above the libraries, in bytes."""
        return PACKING_BYTES * max(self.sizes.values())

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of the tensor file: the format of each packed weight."""
        return {name: str(plan.format) for name, plan in self.plans.items()}


def prepare(
    model: str, out: Path, *, overwrite: bool = False, progress: Progress = SILENT
) -> PackJob:
    """Look at every weight of a model, and check the output folder, with the arguments of `pack`.

    Raises:
        UsageError: `out` is in use.
        DataError: The model cannot be read, or would not be smaller; the error gives its size.
        StorageError: The disk has no room for the output.
    """
    source = open_source(model, out, overwrite=overwrite, progress=progress)
    source.require("pack")
    fingerprint = source.scan(progress)
    plans = _plans(source, progress)
    types = {name: plan.types for name, plan in plans.items()}
    formats = {name: plan.format for name, plan in plans.items()}
    layout = Layout.with_factors(source, types, formats, alone=True)
    require_disk(out, layout)
    return PackJob(source=source, fingerprint=fingerprint, plans=plans, layout=layout)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 over the bytes of tensors in the order of their names."""
    sha256 = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        sha256.update(tensor.contiguous().view(torch.uint8).numpy())
    return sha256.hexdigest()


def _plans(source: Checkpoint, progress: Progress) -> dict[str, Plan]:
    """How weights are packed, of those that it makes smaller.

    Raises:
        DataError: The model does not become smaller.
    """
    stream = BlockStream(source, device="cpu", dtype=torch.float32)
    targets = stream.targets()
    if outside := sorted(source.quantized.keys() - {target.name for target in targets}):
        raise DataError(
            f"{source.path}: {outside[0]} is quantized and is not a linear weight of a decoder "
            "block; pack takes only those",
            "keep it as it is, or quantize the model again with sparsekit",
            code="not-in-a-block",
        )
    found: dict[str, Plan] = {}
    progress.begin("look for patterns", len(targets))
    for target in targets:
        if plan := _plan(source, target):
            found[target.name] = plan
        progress.step(target.name)
    progress.end()
    saved = sum(plan.dense_bytes - plan.n_bytes for plan in found.values())
    if saved > 0:
        return found
    odd = [t.name for t in targets if t.name not in source.quantized and not _packable(source, t)]
    if len(odd) == len(targets):
        raise DataError(
            f"{source.path}: {odd[0]} is {source.places[odd[0]].dtype}; only numbers of 16 and "
            "32 bits are packed",
            code="unsupported-dtype",
        )
    size = sum(_bytes(source, target.name) for target in targets)
    masks = sum(math.prod(target.shape) for target in targets) // 8
    raise DataError(
        f"{source.path} is not sparse: packed, its {len(targets)} linear weights would take "
        f"about {(size - saved if found else size + masks) / 1e6:.1f} MB instead of "
        f"{size / 1e6:.1f}",
        "prune it first",
        code="not-sparse",
    )


def _plan(source: Checkpoint, target: Target) -> Plan | None:
    """How a weight is packed; None where it stays as it is."""
    name = target.name
    dense_bytes = _bytes(source, name)
    if name in source.packed:
        stored = source.packed[name]
        return Plan(
            target=target,
            format=stored.format,
            types={part: (place.dtype, place.shape) for part, place in stored.places.items()},
            dense_bytes=dense_bytes + stored.n_bytes,
            factored=True,
        )
    if name in source.quantized:
        form = source.form(name, target.shape)
        assert isinstance(form.core, Codes)
        codes = form.core
        if digest(form.stored()) != digest(source.quantized[name].read(source.path)):
            raise DataError(
                f"{source.path}: {name} has bits set that its format does not use",
                "quantize it again with sparsekit",
                code="damaged-file",
            )
        pattern = packing(codes.codes.view(torch.int8), TRIED, codes.grid.bits)
        if pattern is None:  # it has to be packed with the others
            zeros = int((codes.codes.view(torch.int8) == 0).sum())
            pattern = exact_pattern(zeros, math.prod(target.shape))
        packed_as = CoreFormat(pattern=pattern, grid=codes.grid, dtype=codes.scale.dtype)
        shapes = packed_as.shapes(target.shape)
        types = {part: (torch.uint8, shape) for part, shape in shapes.items()}
        return Plan(target=target, format=packed_as, types=types, dense_bytes=dense_bytes)
    if not _packable(source, target):
        return None
    pattern = packing(weight_of(source, target), TRIED)
    if pattern is None:
        return None
    packed_as = CoreFormat(pattern=pattern)
    types = factor_types(packed_as.shapes(target.shape), source.places[name].dtype)
    return Plan(target=target, format=packed_as, types=types, dense_bytes=dense_bytes)


def _packable(source: Checkpoint, target: Target) -> bool:
    """Whether a plain weight has a type whose bits are packed."""
    return source.places[target.name].dtype in TYPES


def weight_of(source: Checkpoint, target: Target) -> Tensor:
    """A weight in its type on disk, `[out, in]`."""
    return target.from_disk(source.read([target.name])[target.name]).contiguous()


def _bytes(source: Checkpoint, name: str) -> int:
    """The size of a weight in its files, without its factors."""
    if name in source.quantized:
        return source.quantized[name].n_bytes
    return source.places[name].stop - source.places[name].start
