"""Unpacking of checkpoints, and products of factors that were written alone."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekit.checkpoint.checkpoint import AGAIN, Checkpoint
from sparsekit.checkpoint.entry import Entry, UnpackEntry
from sparsekit.checkpoint.entry_parts import Settings, UnpackedTotals
from sparsekit.checkpoint.folder import part_name
from sparsekit.checkpoint.kind import Kind
from sparsekit.checkpoint.layout import SHARD_BYTES, Layout
from sparsekit.errors import CheckFailedError, DamagedError, DataError, FactorsError
from sparsekit.files import read_json
from sparsekit.model.block_stream import BlockStream
from sparsekit.model.form_linear import FormLinear, form_layers
from sparsekit.packing.pack_plan import digest
from sparsekit.pipeline.loops import UNPACKING_BYTES, rewrite_weights
from sparsekit.pipeline.output import Output
from sparsekit.pipeline.source import open_source, require_disk
from sparsekit.progress import SILENT, Progress
from sparsekit.provenance.entry import Report
from sparsekit.weights.core import Values
from sparsekit.weights.form import Form
from sparsekit.weights.quantized import Shapes, quantized_shapes


def unpack(
    model: str, out: Path, *, overwrite: bool = False, progress: Progress = SILENT
) -> Report:
    """Write the tensors that were packed: every plain weight and all codes, byte for byte.

    Factors are multiplied out and stored with their products, whose last bits may differ on
    another machine.

    Args:
        model: The folder of a packed checkpoint, or of one with `--format factored`.
        out: The folder to make; it appears when it is complete.
        overwrite: Replace an earlier output of sparsekit.
        progress: Receives each weight.

    Raises:
        UsageError: `out` is in use.
        DataError: The model is not packed, or cannot be read.
        CheckFailedError: A tensor is not what was packed.
        StorageError: The output cannot be written.
    """
    output = Output("unpack", model, out, {}, overwrite=overwrite, progress=progress)
    job = prepare(model, out, overwrite=overwrite, progress=progress)
    source, layers, layout, sums = job.source, job.layers, job.layout, job.sums
    try:
        source.scan(progress)
    except DamagedError:
        for name, layer in layers.items():  # to name the weight, if it is one of these
            _unpacked(source, layer, sums and sums[name])
        raise
    grids = [str(layer.stored.format.grid) for layer in layers.values() if _on_grid(layer)]
    settings = Settings(method="unpack", **({"grid": grids[0]} if grids else {}))
    with output.writing(source, settings, layout=layout) as writer:
        rewrite_weights(
            writer,
            "unpack",
            job.sizes,
            lambda name: (_unpacked(source, layers[name], sums and sums[name]), None),
            progress,
        )
        return output.publish(
            UnpackEntry,
            history=job.history,
            config_json=job.config,
            totals=UnpackedTotals(
                weights=len(layers),
                products=sum(layer.stored.composed for layer in layers.values()),
                bytes=layout.n_bytes,
                bytes_before=source.n_bytes,
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Unpacking:
    """A checked unpacking."""

    source: Checkpoint
    config: dict[str, Any]
    """Without the packing, as is the history."""
    history: Sequence[Entry]
    sums: Mapping[str, str] | None
    """The checksum of each packed weight; None of factors that `prune` wrote alone."""
    layers: Mapping[str, FormLinear]
    """By the names of their weights."""
    layout: Layout

    @property
    def sizes(self) -> dict[str, int]:
        """Number of entries of each weight."""
        return {name: math.prod(layer.target.shape) for name, layer in self.layers.items()}

    @property
    def room(self) -> int:
        """The memory that the run is expected to take above the libraries, in bytes."""
        return UNPACKING_BYTES * max(self.sizes.values(), default=0)


def prepare(
    model: str, out: Path, *, overwrite: bool = False, progress: Progress = SILENT
) -> Unpacking:
    """Check everything that needs no weights, with the arguments and errors of `unpack`."""
    source = open_source(model, out, overwrite=overwrite, progress=progress)
    source.require("unpack")
    config, history, sums = _origin(source)
    try:
        layers = {layer.target.name: layer for layer in _layers(source)}
    except FactorsError as error:
        raise CheckFailedError(error.message, AGAIN, code=error.code) from error
    if sums is not None and (unknown := sorted(layers.keys() - sums.keys())):
        raise CheckFailedError(
            f"{source.path}: the history has no checksum of {unknown[0]}", AGAIN, code="no-checksum"
        )
    layout = _layout(source, layers)
    require_disk(out, layout)
    return Unpacking(
        source=source, config=config, history=history, sums=sums, layers=layers, layout=layout
    )


def _origin(
    source: Checkpoint,
) -> tuple[dict[str, Any], Sequence[Entry], Mapping[str, str] | None]:
    """The configuration and history without the packing, and the checksum of each packed weight.

    Factors that `prune` wrote alone have no checksums.

    Raises:
        DataError: There is no record of how it was packed.
    """
    config = read_json(source.path / "config.json")
    history = source.provenance().history
    if source.kind is not Kind.PACKED:
        return config, history, None
    if not history or history[-1].stage != "pack":
        raise DataError(
            f"{source.path} has no history of its packing, which holds the checksums",
            AGAIN,
            code="no-history",
        )
    packing = config.pop("quantization_config")
    if packing.get("packed"):
        config["quantization_config"] = packing["packed"]
    sums = {row.name: row.sha256 for row in history[-1].weights}
    return config, history[:-1], sums


def _layers(source: Checkpoint) -> Iterator[FormLinear]:
    """The layers whose weights are packed, without their tensors."""
    stream = BlockStream(source, device="cpu", dtype=torch.float32)
    for index in range(len(stream)):
        yield from form_layers(stream.block(index).module)


def _layout(source: Checkpoint, layers: Mapping[str, FormLinear]) -> Layout:
    """The files to write."""
    tensors: Shapes = {name: (place.dtype, place.shape) for name, place in source.places.items()}
    factors: Shapes = {}
    for name, layer in layers.items():
        own = {full: tensors.pop(full) for full in layer.stored.names}
        stored_as = layer.stored.format
        if stored_as.grid is not None and stored_as.dtype is not None:
            shapes = quantized_shapes(stored_as.grid, layer.target.shape, stored_as.dtype)
            tensors |= {part_name(name, part): found for part, found in shapes.items()}
            continue
        tensors[name] = layer.stored.places["values"].dtype, layer.target.disk_shape
        if layer.stored.composed:
            factors |= own
    layout = Layout.plain(dict(sorted(tensors.items())), SHARD_BYTES)
    if not factors:
        return layout
    formats = {n: layer.stored.format for n, layer in layers.items() if layer.stored.composed}
    return layout.with_packed(factors, formats)


def _unpacked(source: Checkpoint, layer: FormLinear, sha256: str | None) -> dict[str, Tensor]:
    """The tensors that a packed weight was, or that its factors give.

    Raises:
        CheckFailedError: They differ from those that the history records.
    """
    name, target = layer.target.name, layer.target
    try:
        form = source.form(name, target.shape)
        if form.composed:
            whole = Form(core=Values(form.dense().to(layer.stored.places["values"].dtype)))
            factors = form.stored()
        else:
            whole, factors = form.unpacked(), {}
    except DataError as error:
        raise CheckFailedError(error.message, AGAIN, code=error.code) from error
    stored = {part: target.to_disk(t).contiguous() for part, t in whole.stored().items()}
    if sha256 is not None and digest(factors or stored) != sha256:
        raise CheckFailedError(
            f"{source.path}: {name} is not what was packed", AGAIN, code="wrong-checksum"
        )
    return {part_name(name, part): tensor for part, tensor in (stored | factors).items()}


def _on_grid(layer: FormLinear) -> bool:
    """Whether a layer's weight is packed as codes."""
    return layer.stored.format.grid is not None
