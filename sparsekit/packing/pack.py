"""Packing of a checkpoint's sparse weights as values and places, which take fewer bytes."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.entry import PackEntry
from sparsekit.checkpoint.entry_parts import PackedTotals, PackedWeight, Settings
from sparsekit.checkpoint.folder import FACTORS, PACKED_METHOD, part_name
from sparsekit.checkpoint.layout import Layout
from sparsekit.errors import DataError
from sparsekit.files import read_json
from sparsekit.packing.pack_plan import Plan, digest, prepare, weight_of
from sparsekit.pipeline.loops import rewrite_weights
from sparsekit.pipeline.output import Output
from sparsekit.progress import SILENT, Progress
from sparsekit.provenance.entry import Report
from sparsekit.weights.core import Values
from sparsekit.weights.form import Form, first_off
from sparsekit.weights.grids import Codes
from sparsekit.weights.packed import theory


def pack(
    model: str,
    out: Path,
    *,
    called: str | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Report:
    """Write a copy of a model whose sparse weights are values and places.

    Of weights on a grid the codes are packed; of weights that are stored with factors only
    the factors are kept, whose core is packed already.

    Args:
        model: A folder, hub id or `demo`.
        out: The folder to make; it appears when it is complete.
        called: The name of the model in card and history; None: as given in `model`.
        overwrite: Replace an earlier output of sparsekit.
        progress: Receives each weight.

    Raises:
        UsageError: `out` is in use.
        DataError: The model cannot be read, or would not be smaller; the error gives its size.
        StorageError: The output cannot be written.
    """
    name = called or model
    output = Output("pack", name, out, {}, overwrite=overwrite, progress=progress)
    job = prepare(model, out, overwrite=overwrite, progress=progress)
    source, plans, layout = job.source, job.plans, job.layout
    patterns = sorted({str(plan.pattern) for plan in plans.values()})
    settings = Settings(method="pack", pattern=patterns[0] if len(patterns) == 1 else "mixed")
    with output.writing(source, settings, layout=layout, key={"patterns": job.metadata}) as writer:
        rows = rewrite_weights(
            writer, "pack", job.sizes, lambda name: _packed(source, plans[name]), progress
        )
        weights = [PackedWeight(**row) for row in rows]
        if rough := [row.name for row in weights if row.exact is False]:
            progress.note(
                f"the factors of {len(rough)} weights, the first is {rough[0]}, multiply to other "
                "last bits here than in the model: unpack gives those"
            )
        return output.publish(
            PackEntry,
            config_json=_config_json(source),
            totals=_totals(weights, source, layout),
            weights=weights,
        )


def _config_json(source: Checkpoint) -> dict[str, Any]:
    """The config.json of the output: the weights are packed; its entry on a grid is kept."""
    config = read_json(source.path / "config.json")
    inner = config.get("quantization_config")
    settings = {"quant_method": PACKED_METHOD} | ({"packed": inner} if inner else {})
    return config | {"quantization_config": settings}


def _packed(source: Checkpoint, plan: Plan) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a packed weight, and its row of the history."""
    name, more = plan.target.name, {}
    if plan.factored:
        form, whole = source.form(name, plan.target.shape), source.read([name])[name]
        parts = form.stored()
        product = plan.target.to_disk(form.dense().to(whole.dtype))
        if off := first_off(product, whole):
            raise DataError(
                f"{source.path}: the factors of {name} do not multiply to it at {list(off)}: the "
                "weight was changed after pruning, and would be lost",
                f"delete {FACTORS} in a copy of the folder to keep the weights",
                code="factors-differ",
            )
        zeros = int((form.core.dense() == 0).sum())
        more = {"exact": torch.equal(product, whole), "sha256": digest(parts)}
    elif name in source.quantized:
        form = source.form(name, plan.target.shape)
        assert isinstance(form.core, Codes)
        parts = form.packed(plan.pattern).stored()
        zeros = int((form.core.codes.view(torch.int8) == 0).sum())
        checked = source.quantized[name].read(source.path)
        more = {"grid": str(plan.format.grid), "sha256": digest(checked)}
    else:
        weight = weight_of(source, plan.target)
        parts = Form(core=Values(weight)).packed(plan.pattern).stored()
        zeros = int((weight == 0).sum())
        more = {"sha256": digest(source.read([name]))}
    size = math.prod(plan.target.shape)
    grid = plan.format.grid
    value_bits = grid.bits if grid else 8 * plan.types["values"][0].itemsize
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
    return {part_name(name, part): tensor for part, tensor in parts.items()}, row


def _totals(weights: Sequence[PackedWeight], source: Checkpoint, layout: Layout) -> PackedTotals:
    """Sums over the weights."""
    size = sum(row.size for row in weights)
    return PackedTotals(
        weights=len(weights),
        size=size,
        zeros=sum(row.zeros for row in weights),
        bits_per_weight=sum(row.bits * row.size for row in weights) / size,
        bytes=layout.n_bytes,
        bytes_before=source.n_bytes,
    )
