"""A checkpoint's sparse weights as values and places, which take fewer bytes."""

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekit.errors import DataError
from sparsekit.files import read_json
from sparsekit.models.architecture import Target
from sparsekit.models.blocks import BlockStream
from sparsekit.models.checkpoint import Checkpoint
from sparsekit.models.factorfile import factor_parts, factors_of
from sparsekit.models.folder import FACTORS, PACKED_METHOD, factor_name
from sparsekit.models.layout import Layout, factor_types
from sparsekit.models.quantized import Shapes, encode
from sparsekit.models.writer import CheckpointWriter
from sparsekit.progress import SILENT, Progress
from sparsekit.stages import weightwise
from sparsekit.stages.cards import pack_card
from sparsekit.stages.frontmatter import Origin
from sparsekit.stages.opening import open_source, require_room
from sparsekit.stages.report import Report, versions
from sparsekit.tensors.factored import PARTS, first_off, stored_shapes
from sparsekit.tensors.packed import (
    CodeForm,
    exact_pattern,
    pack_grid,
    pack_weight,
    packing,
    theory,
)
from sparsekit.tensors.patterns import Pattern

# N:M patterns that are tried on every weight.
TRIED = tuple(map(Pattern.parse, ("1:4", "2:8", "2:4", "4:8", "8:16", "3:4")))
# Types whose bits are packed as they are.
TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one weight is packed."""

    target: Target
    pattern: Pattern
    types: Shapes
    """Type and shape of each tensor that it becomes, by the last part of its name."""
    dense_bytes: int
    """What it takes unpacked: as numbers, or as codes with their scales."""
    form: CodeForm | None = None
    """What its codes stand for, where it has such."""
    factored: bool = False
    """Whether it has factors beside it, which then stand for it."""

    @property
    def told(self) -> str:
        """What the file of the tensors says of it."""
        return f"{self.pattern} {self.form}" if self.form else str(self.pattern)

    @property
    def n_bytes(self) -> int:
        """What it takes packed."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.types.values())


def pack(model: str, out: Path, *, overwrite: bool = False, progress: Progress = SILENT) -> Report:
    """Write a copy of a model whose sparse weights are values and places.

    Of weights on a grid the codes are packed; of weights with factors beside them the factors are
    kept alone, whose core is packed already.

    Args:
        model: A folder, hub id or `demo`.
        out: The folder to make; it appears when it is complete.
        overwrite: Replace an earlier output of sparsekit.
        progress: Told of each weight.

    Raises:
        UsageError: `out` is in use.
        DataError: The model cannot be read, or would not be smaller; then the size is told.
        StorageError: The output cannot be written.
    """
    started = time.perf_counter()
    source = open_source(model, out, overwrite=overwrite, progress=progress)
    if source.factored:
        raise DataError(f"{source.path} is packed already", "sparsekit unpack makes it plain")
    fingerprint = source.scan(progress)
    plans = _plans(source, progress)
    told = {name: plan.told for name, plan in plans.items()}
    types = {name: plan.types for name, plan in plans.items()}
    layout = Layout.with_factors(source, types, told, alone=True)
    require_room(out, layout)
    recipe = {"stage": "pack", "source": fingerprint, "patterns": told, "versions": versions()}
    with CheckpointWriter(out, source, recipe, layout=layout, overwrite=overwrite) as writer:
        rows = weightwise.rewrite(
            writer, "pack", plans, lambda name: _packed(source, plans[name]), progress
        )
        if rough := [row["name"] for row in rows if row.get("exact") is False]:
            progress.note(
                f"the factors of {len(rough)} weights, the first is {rough[0]}, multiply to other "
                "last bits here than in the model: unpack gives those"
            )
        entry = _entry(source, recipe, rows, layout) | {
            "source": {"path": model, "fingerprint": fingerprint},
            "seconds": round(time.perf_counter() - started, 3),
        }
        writer.commit(entry, pack_card(entry, Origin.of(model, source.path)), _config_json(source))
    return Report(out=out, entry=entry)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 over the bytes of tensors in the order of their names."""
    found = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        found.update(tensor.contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def _config_json(source: Checkpoint) -> dict[str, Any]:
    """What config.json is to say: that the weights are packed, and what it said of a grid."""
    config = read_json(source.path / "config.json")
    inner = config.get("quantization_config")
    told = {"quant_method": PACKED_METHOD} | ({"packed": inner} if inner else {})
    return config | {"quantization_config": told}


def _plans(source: Checkpoint, progress: Progress) -> dict[str, Plan]:
    """How weights are packed, of those that it makes smaller.

    Raises:
        DataError: The model does not become smaller.
    """
    stream = BlockStream(source, device="cpu", dtype=torch.float32)
    targets = stream.targets()
    if outside := sorted(source.coded.keys() - {target.name for target in targets}):
        raise DataError(
            f"{source.path}: {outside[0]} is quantized and no linear weight of a decoder block; "
            "pack takes those only",
            "keep it as it is, or quantize the model anew with sparsekit",
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
    odd = [t.name for t in targets if t.name not in source.coded and not _packable(source, t)]
    if len(odd) == len(targets):
        raise DataError(
            f"{source.path}: {odd[0]} is {source.places[odd[0]].dtype}; numbers of 16 and 32 bits "
            "are packed only"
        )
    size = sum(_bytes(source, target.name) for target in targets)
    masks = sum(math.prod(target.shape) for target in targets) // 8
    raise DataError(
        f"{source.path} is not sparse: packed, its {len(targets)} linear weights would take "
        f"about {(size - saved if found else size + masks) / 1e6:.1f} MB in the place of "
        f"{size / 1e6:.1f}",
        "prune it first",
    )


def _plan(source: Checkpoint, target: Target) -> Plan | None:
    """How a weight is packed; None where it stays as it is."""
    name = target.name
    dense_bytes = _bytes(source, name)
    if name in source.factor_patterns:
        places = {part: source.factors.get(factor_name(name, part)) for part in PARTS}
        there = {part: place for part, place in places.items() if place is not None}
        return Plan(
            target=target,
            pattern=Pattern.parse(source.factor_patterns[name]),
            types={part: (place.dtype, place.shape) for part, place in there.items()},
            dense_bytes=dense_bytes + sum(p.stop - p.start for p in there.values()),
            factored=True,
        )
    if name in source.coded:
        assert source.grid is not None
        codes, grid = source.codes_of(name), source.grid
        form = CodeForm(grid, codes.scale.dtype)
        if digest(encode(grid, codes)) != digest(source.stored(name)):
            raise DataError(
                f"{source.path}: {name} has bits set where its format has none",
                "quantize it again with sparsekit",
            )
        pattern = packing(codes.codes.view(torch.int8), TRIED, grid.bits)
        if pattern is None:  # it has to be packed with the others
            zeros = int((codes.codes.view(torch.int8) == 0).sum())
            pattern = exact_pattern(zeros, math.prod(target.shape))
        shapes = form.shapes(target.shape, pattern)
        types = {part: (torch.uint8, shape) for part, shape in shapes.items()}
        return Plan(target=target, pattern=pattern, types=types, dense_bytes=dense_bytes, form=form)
    if not _packable(source, target):
        return None
    pattern = packing(_weight(source, target), TRIED)
    if pattern is None:
        return None
    types = factor_types(stored_shapes(*target.shape, pattern), source.places[name].dtype)
    return Plan(target=target, pattern=pattern, types=types, dense_bytes=dense_bytes)


def _packed(source: Checkpoint, plan: Plan) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a packed weight, and what the history tells of it."""
    name, more = plan.target.name, {}
    if plan.factored:
        parts = factor_parts(source, name)
        factors, whole = factors_of(source, name, plan.target.shape[1]), source.read([name])[name]
        product = factors.dense().to(whole.dtype)
        product = product.T if plan.target.transposed else product
        if off := first_off(product, whole):
            raise DataError(
                f"{source.path}: the factors of {name} do not multiply to it at {list(off)}: the "
                "weight was changed after pruning, and would be lost",
                f"delete {FACTORS} in a copy of the folder to keep the weights",
            )
        zeros = int((factors.core == 0).sum())
        more = {"exact": torch.equal(product, whole), "sha256": digest(parts)}
    elif plan.form is not None:
        codes = source.codes_of(name)
        parts = pack_grid(codes, plan.pattern, plan.form.grid)
        zeros = int((codes.codes.view(torch.int8) == 0).sum())
        more = {"grid": str(plan.form.grid), "sha256": digest(source.stored(name))}
    else:
        weight = _weight(source, plan.target)
        values, indices = pack_weight(weight, plan.pattern)
        parts = {"values": values.contiguous(), "indices": indices}
        zeros = int((weight == 0).sum())
        more = {"sha256": digest(source.read([name]))}
    size = math.prod(plan.target.shape)
    value_bits = plan.form.grid.bits if plan.form else 8 * plan.types["values"][0].itemsize
    values, places = theory(plan.pattern, value_bits)
    row = {
        "name": name,
        "shape": list(plan.target.shape),
        "pattern": str(plan.pattern),
        "zeros": zeros,
        "size": size,
        "bits": 8 * plan.n_bytes / size,
        "value_bits": values,
        "place_bits": places,
        "share": plan.n_bytes / plan.dense_bytes,
        **more,
    }
    return {factor_name(name, part): tensor for part, tensor in parts.items()}, row


def _entry(
    source: Checkpoint,
    recipe: Mapping[str, Any],
    weights: Sequence[dict[str, Any]],
    layout: Layout,
) -> dict[str, Any]:
    """This run's entry of the history."""
    size = sum(row["size"] for row in weights)
    patterns = sorted({row["pattern"] for row in weights})
    return {
        "stage": "pack",
        "recipe": {"method": "pack", "pattern": patterns[0] if len(patterns) == 1 else "mixed"},
        "versions": recipe["versions"],
        "totals": {
            "weights": len(weights),
            "size": size,
            "zeros": sum(row["zeros"] for row in weights),
            "bits_per_weight": sum(row["bits"] * row["size"] for row in weights) / size,
            "bytes": layout.n_bytes,
            "bytes_before": source.n_bytes,
        },
        "weights": list(weights),
    }


def _packable(source: Checkpoint, target: Target) -> bool:
    """Whether a plain weight has a type whose bits are packed."""
    return source.places[target.name].dtype in TYPES


def _weight(source: Checkpoint, target: Target) -> Tensor:
    """A weight in its type on disk, `[out, in]`."""
    weight = source.read([target.name])[target.name]
    return weight.T.contiguous() if target.transposed else weight


def _bytes(source: Checkpoint, name: str) -> int:
    """What a weight takes in its files, without factors beside it."""
    places = source.coded[name].values() if name in source.coded else [source.places[name]]
    return sum(place.stop - place.start for place in places)
