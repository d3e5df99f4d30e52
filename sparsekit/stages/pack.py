"""A checkpoint's sparse weights as values and places, which take fewer bytes, and back."""

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekit.errors import CheckFailedError, DataError
from sparsekit.files import read_json
from sparsekit.models.blocks import BlockStream
from sparsekit.models.checkpoint import Checkpoint
from sparsekit.models.folder import PACKED_METHOD, factor_name
from sparsekit.models.layout import Layout
from sparsekit.models.reference import title
from sparsekit.models.writer import CheckpointWriter
from sparsekit.progress import SILENT, Progress
from sparsekit.stages import weightwise
from sparsekit.stages.cards import pack_card
from sparsekit.stages.opening import open_source, require_room
from sparsekit.stages.report import Report, versions
from sparsekit.tensors.factored import stored_shapes
from sparsekit.tensors.packed import pack_weight, packed_bytes, packing
from sparsekit.tensors.patterns import Pattern

# N:M patterns that are tried on every weight.
TRIED = tuple(map(Pattern.parse, ("1:4", "2:8", "2:4", "4:8", "8:16", "3:4")))
# Types whose bits are packed as they are.
TYPES = (torch.float32, torch.bfloat16, torch.float16)
# What to do about a damaged one.
AGAIN = "copy the folder again"
# Bytes of one weight file of what is unpacked.
SHARD_BYTES = 5 << 30


def pack(model: str, out: Path, *, overwrite: bool = False, progress: Progress = SILENT) -> Report:
    """Write a copy of a model whose sparse weights are values and places.

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
    _refuse_other_forms(source)
    fingerprint = source.scan(progress)
    names = [target.name for target in _plain_targets(source)]
    patterns = _patterns(source, names, progress)
    shapes = {n: stored_shapes(*source.places[n].shape, p) for n, p in patterns.items()}
    told = {name: str(pattern) for name, pattern in patterns.items()}
    layout = Layout.with_factors(source, shapes, told, alone=True)
    require_room(out, layout)
    recipe = {"stage": "pack", "source": fingerprint, "patterns": told, "versions": versions()}
    with CheckpointWriter(out, source, recipe, layout=layout, overwrite=overwrite) as writer:
        rows = weightwise.rewrite(
            writer, "pack", patterns, lambda name: _packed(source, name, patterns[name]), progress
        )
        entry = _pack_entry(source, recipe, rows, layout) | {
            "source": {"path": model, "fingerprint": fingerprint},
            "seconds": round(time.perf_counter() - started, 3),
        }
        config = read_json(source.path / "config.json")
        config |= {"quantization_config": {"quant_method": PACKED_METHOD}}
        writer.commit(entry, pack_card(entry, title(model)), config)
    return Report(out=out, entry=entry)


def unpack(
    model: str, out: Path, *, overwrite: bool = False, progress: Progress = SILENT
) -> Report:
    """Write a plain checkpoint from a packed one, with the same bytes of every tensor.

    Args:
        model: The folder of a packed checkpoint.
        out: The folder to make; it appears when it is complete.
        overwrite: Replace an earlier output of sparsekit.
        progress: Told of each weight.

    Raises:
        UsageError: `out` is in use.
        DataError: The model is not packed, or cannot be read.
        CheckFailedError: A tensor is not what was packed.
        StorageError: The output cannot be written.
    """
    started = time.perf_counter()
    source = open_source(model, out, overwrite=overwrite, progress=progress)
    packed = _packed_entry(source)
    rows = {row["name"]: row for row in packed["weights"]}
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, place in source.places.items():
        if name not in source.factors:
            tensors[name] = place.dtype, place.shape
    for name, row in rows.items():
        values = source.factors.get(factor_name(name, "values"))
        if values is None:
            raise CheckFailedError(f"{source.path} lacks the values of {name}", AGAIN)
        tensors[name] = values.dtype, tuple(row["shape"])
    layout = Layout.plain(dict(sorted(tensors.items())), SHARD_BYTES)
    require_room(out, layout)
    fingerprint = source.scan(progress)
    recipe = {"stage": "unpack", "source": fingerprint, "versions": versions()}
    with CheckpointWriter(out, source, recipe, layout=layout, overwrite=overwrite) as writer:
        weightwise.rewrite(
            writer,
            "unpack",
            rows,
            lambda name: ({name: _unpacked(source, rows[name])}, None),
            progress,
        )
        entry = {
            "stage": "unpack",
            "recipe": {"method": "unpack"},
            "versions": recipe["versions"],
            "source": {"path": model, "fingerprint": fingerprint},
            "bytes": layout.n_bytes,
            "seconds": round(time.perf_counter() - started, 3),
        }
        before = source.provenance()["history"][:-1]
        config = read_json(source.path / "config.json")
        config.pop("quantization_config", None)
        card = pack_card(packed | {"stage": "unpack"}, title(model))
        writer.commit(entry, card, config, history=before)
    return Report(out=out, entry=entry)


def _refuse_other_forms(source: Checkpoint) -> None:
    """Refuse what is not one plain matrix for each weight.

    Raises:
        DataError: It holds factors or codes.
    """
    if source.factors:
        raise DataError(
            f"{source.path} has factors already", "prune with --format factored writes them alone"
        )
    if source.grid is not None:
        raise DataError(
            f"{source.path} is quantized to {source.grid}; only plain weights are packed yet",
            "quantize --format dense keeps them plain",
        )


def _plain_targets(source: Checkpoint) -> list[Any]:
    """The linear weights of the blocks that can be packed: those that are not stored transposed."""
    stream = BlockStream(source, device="cpu", dtype=torch.float32)
    return [
        t for t in stream.targets() if not t.transposed and source.places[t.name].dtype in TYPES
    ]


def _patterns(source: Checkpoint, names: Sequence[str], progress: Progress) -> dict[str, Pattern]:
    """The patterns by which weights are packed, of those that it makes smaller.

    Raises:
        DataError: There are none.
    """
    found: dict[str, Pattern] = {}
    progress.begin("look for patterns", len(names))
    for name in names:
        if pattern := packing(source.read([name])[name], TRIED):
            found[name] = pattern
        progress.step(name)
    progress.end()
    if not found:
        size = sum(_bytes(source, name) for name in names)
        masks = sum(math.prod(source.places[name].shape) for name in names) // 8
        raise DataError(
            f"{source.path} is not sparse: packed, its {len(names)} linear weights would take "
            f"about {(size + masks) / 1e6:.1f} MB in the place of {size / 1e6:.1f}",
            "prune it first",
        )
    return found


def _packed(
    source: Checkpoint, name: str, pattern: Pattern
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a packed weight, and what the history tells of it."""
    weight = source.read([name])[name]
    values, indices = pack_weight(weight, pattern)
    parts = {"values": values.contiguous(), "indices": indices}
    tensors = {factor_name(name, part): tensor for part, tensor in parts.items()}
    return tensors, _row(name, weight, pattern)


def _row(name: str, weight: Tensor, pattern: Pattern) -> dict[str, Any]:
    """What the history tells of a packed weight."""
    n_bytes = packed_bytes(tuple(weight.shape), weight.dtype, pattern)
    return {
        "name": name,
        "shape": list(weight.shape),
        "pattern": str(pattern),
        "zeros": int((weight == 0).sum()),
        "size": weight.numel(),
        "bits": 8 * n_bytes / weight.numel(),
        "share": n_bytes / weight.nbytes,
        "sha256": _digest(weight),
    }


def _digest(weight: Tensor) -> str:
    """The sha256 of a tensor's bytes."""
    return hashlib.sha256(weight.contiguous().view(torch.uint8).numpy()).hexdigest()


def _pack_entry(
    source: Checkpoint,
    recipe: Mapping[str, Any],
    weights: list[dict[str, Any]],
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
        "weights": weights,
    }


def _packed_entry(source: Checkpoint) -> Mapping[str, Any]:
    """The entry of the history that tells how a checkpoint was packed.

    Raises:
        DataError: The last thing done to it was something else.
    """
    history = source.provenance()["history"]
    if not history or history[-1].get("stage") != "pack" or not source.factored:
        raise DataError(f"{source.path} was not written by pack", "name the folder that pack wrote")
    return history[-1]


def _unpacked(source: Checkpoint, row: Mapping[str, Any]) -> Tensor:
    """A packed weight.

    Raises:
        CheckFailedError: It is not the one that the history tells of.
    """
    try:
        weight = source.packed_weight(row["name"], row["shape"][1])
    except DataError as error:
        raise CheckFailedError(error.message, AGAIN) from error
    if _digest(weight) != row["sha256"]:
        raise CheckFailedError(f"{source.path}: {row['name']} is not what was packed", AGAIN)
    return weight


def _bytes(source: Checkpoint, name: str) -> int:
    return source.places[name].stop - source.places[name].start
