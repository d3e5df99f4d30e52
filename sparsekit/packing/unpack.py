"""What a checkpoint was before it was packed; products from factors that were written alone."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekit.checkpoint.checkpoint import AGAIN, Checkpoint
from sparsekit.checkpoint.compressed_tensors import Shapes, encode, part_name, stored_shapes
from sparsekit.checkpoint.factor_file import factor_parts, factors_of, packed_codes, packed_weight
from sparsekit.checkpoint.folder import FACTORS, factor_name, is_packed
from sparsekit.checkpoint.layout import SHARD_BYTES, Layout
from sparsekit.checkpoint.writer import CheckpointWriter
from sparsekit.errors import CheckFailedError, DamagedError, DataError, FactorsError
from sparsekit.files import read_json
from sparsekit.model.block_stream import BlockStream
from sparsekit.model.factored_linear import FactoredLinear
from sparsekit.packing.pack_plan import digest
from sparsekit.pipeline.cost import Cost
from sparsekit.pipeline.loops import UNPACKING_BYTES, rewrite_weights
from sparsekit.pipeline.source import open_source, require_room
from sparsekit.progress import SILENT, Progress
from sparsekit.provenance.entry import Report
from sparsekit.provenance.environment import versions
from sparsekit.provenance.front_matter import Origin
from sparsekit.provenance.model_card import unpack_card


def unpack(
    model: str, out: Path, *, overwrite: bool = False, progress: Progress = SILENT
) -> Report:
    """Write what was packed: the same bytes of every plain weight and of all codes.

    Factors are multiplied out, and lie beside their products; those may have other last bits on
    another machine.

    Args:
        model: The folder of a packed checkpoint, or of one with `--format factored`.
        out: The folder to make; it appears when it is complete.
        overwrite: Replace an earlier output of sparsekit.
        progress: Told of each weight.

    Raises:
        UsageError: `out` is in use.
        DataError: The model is not packed, or cannot be read.
        CheckFailedError: A tensor is not what was packed.
        StorageError: The output cannot be written.
    """
    cost = Cost()
    job = prepare(model, out, overwrite=overwrite, progress=progress)
    source, layers, layout, sums = job.source, job.layers, job.layout, job.sums
    try:
        fingerprint = source.scan(progress)
    except DamagedError:
        for name, layer in layers.items():  # to name the weight, if it is one of these
            _unpacked(source, layer, sums and sums[name])
        raise
    recipe = {"stage": "unpack", "source": fingerprint, "versions": versions()}
    with CheckpointWriter(out, source, recipe, layout=layout, overwrite=overwrite) as writer:
        rewrite_weights(
            writer,
            "unpack",
            job.sizes,
            lambda name: (_unpacked(source, layers[name], sums and sums[name]), None),
            progress,
        )
        grids = [str(layer.form.grid) for layer in layers.values() if layer.form is not None]
        entry = {
            "stage": "unpack",
            "recipe": {"method": "unpack", **({"grid": grids[0]} if grids else {})},
            "versions": recipe["versions"],
            "source": {"path": model, "fingerprint": fingerprint},
            "totals": {
                "weights": len(layers),
                "products": sum(layer.composed for layer in layers.values()),
                "bytes": layout.n_bytes,
                "bytes_before": source.n_bytes,
            },
            **cost.told(),
        }
        writer.commit(
            *(entry, unpack_card(entry, Origin.of(model, source.path), job.history), job.config),
            history=job.history,
        )
    return Report(out=out, entry=entry)


@dataclass(frozen=True, kw_only=True)
class Unpacking:
    """What is to be unpacked, checked."""

    source: Checkpoint
    config: dict[str, Any]
    """Without the packing, as is the history."""
    history: list[dict[str, Any]]
    sums: Mapping[str, str] | None
    """The checksum of each packed weight; None of factors that `prune` wrote alone."""
    layers: Mapping[str, FactoredLinear]
    """By the names of their weights."""
    layout: Layout

    @property
    def sizes(self) -> dict[str, int]:
        """How many numbers each weight has."""
        return {name: one.out_features * one.in_features for name, one in self.layers.items()}

    @property
    def room(self) -> int:
        """The memory that the run is expected to take above the libraries, in bytes."""
        return UNPACKING_BYTES * max(self.sizes.values(), default=0)


def prepare(
    model: str, out: Path, *, overwrite: bool = False, progress: Progress = SILENT
) -> Unpacking:
    """Check everything that needs no weights; arguments and errors as of `unpack`."""
    source = open_source(model, out, overwrite=overwrite, progress=progress)
    config, history, sums = _origin(source)
    try:
        layers = {layer.weight_name: layer for layer in _layers(source)}
    except FactorsError as error:
        raise CheckFailedError(error.message, AGAIN) from error
    if sums is not None and (unknown := sorted(layers.keys() - sums.keys())):
        raise CheckFailedError(f"{source.path}: the history has no checksum of {unknown[0]}", AGAIN)
    layout = _layout(source, layers)
    require_room(out, layout)
    return Unpacking(
        source=source, config=config, history=history, sums=sums, layers=layers, layout=layout
    )


def _origin(
    source: Checkpoint,
) -> tuple[dict[str, Any], list[dict[str, Any]], Mapping[str, str] | None]:
    """The configuration and history without the packing, and the checksum of each packed weight.

    Of factors that `prune` wrote alone there are no checksums.

    Raises:
        DataError: It is no packed checkpoint, or nothing tells how it was packed.
    """
    config = read_json(source.path / "config.json")
    history = source.provenance()["history"]
    told = config.get("quantization_config")
    if not source.factored:
        raise DataError(f"{source.path} is not packed", "name a folder that pack wrote")
    if not is_packed(told):
        return config, history, None
    if not history or history[-1].get("stage") != "pack":
        raise DataError(
            f"{source.path} has no history of its packing, which holds the checksums", AGAIN
        )
    del config["quantization_config"]
    if told.get("packed"):
        config["quantization_config"] = told["packed"]
    rows = history[-1].get("weights")
    if not isinstance(rows, list):
        raise CheckFailedError(f"{source.path}: the history of its packing is damaged", AGAIN)
    rows = [row for row in rows if isinstance(row, dict)]
    sums = {str(row.get("name")): row["sha256"] for row in rows if row.get("sha256")}
    return config, history[:-1], sums


def _layers(source: Checkpoint) -> Iterator[FactoredLinear]:
    """The layers whose weights are packed, without their tensors."""
    stream = BlockStream(source, device="cpu", dtype=torch.float32)
    for index in range(len(stream)):
        for layer in stream.block(index).module.modules():
            if isinstance(layer, FactoredLinear):
                yield layer


def _layout(source: Checkpoint, layers: Mapping[str, FactoredLinear]) -> Layout:
    """The files to write."""
    tensors: Shapes = {name: (place.dtype, place.shape) for name, place in source.places.items()}
    factors: Shapes = {}
    for name, layer in layers.items():
        shape = layer.out_features, layer.in_features
        own = {full: tensors.pop(full) for full in layer.stored_names}
        if layer.form is not None:
            stored = stored_shapes(layer.form.grid, shape, layer.stored)
            tensors |= {part_name(name, part): found for part, found in stored.items()}
            continue
        tensors[name] = layer.stored, shape[::-1] if layer.transposed else shape
        if layer.composed:
            factors |= own
    layout = Layout.plain(dict(sorted(tensors.items())), SHARD_BYTES)
    if not factors:
        return layout
    patterns = {name: str(layer.pattern) for name, layer in layers.items() if layer.composed}
    return layout.with_file(FACTORS, factors, patterns)


def _unpacked(source: Checkpoint, layer: FactoredLinear, sha256: str | None) -> dict[str, Tensor]:
    """The tensors that a packed weight was, or that its factors give.

    Raises:
        CheckFailedError: They are not those that the history tells of.
    """
    name = layer.weight_name
    try:
        if layer.form is not None:
            stored = encode(layer.form.grid, packed_codes(source, name, layer.in_features))
            checked = stored
            tensors = {part_name(name, part): tensor for part, tensor in stored.items()}
        elif layer.composed:
            checked = factor_parts(source, name)
            weight = factors_of(source, name, layer.in_features).dense().to(layer.stored)
            tensors = {name: _turned(layer, weight)}
            tensors |= {factor_name(name, part): tensor for part, tensor in checked.items()}
        else:
            weight = packed_weight(source, name, layer.in_features)
            checked = tensors = {name: _turned(layer, weight)}
    except DataError as error:
        raise CheckFailedError(error.message, AGAIN) from error
    if sha256 is not None and digest(checked) != sha256:
        raise CheckFailedError(f"{source.path}: {name} is not what was packed", AGAIN)
    return tensors


def _turned(layer: FactoredLinear, weight: Tensor) -> Tensor:
    """A weight `[out, in]` as the layer's is stored."""
    return (weight.T if layer.transposed else weight).contiguous()
