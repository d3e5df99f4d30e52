"""Conversion of a checkpoint from a form that libraries no longer read to a current one."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.entry import ConvertEntry
from sparsekit.checkpoint.entry_parts import ConvertSettings, CountedTotals, Weight
from sparsekit.checkpoint.foreign import BITMASKS, LEGACY_PARTS, MARLIN, compression, legacy_format
from sparsekit.checkpoint.layout import SHARD_BYTES, Layout
from sparsekit.errors import DataError
from sparsekit.files import read_json
from sparsekit.packing.legacy_formats import (
    bitmask_shape,
    converted_config,
    from_bitmask,
    from_marlin,
    marlin_shape,
)
from sparsekit.packing.pack import pack
from sparsekit.pipeline.loops import UNPACKING_BYTES, rewrite_weights
from sparsekit.pipeline.output import Output
from sparsekit.pipeline.source import open_source, require_disk
from sparsekit.progress import SILENT, Progress
from sparsekit.provenance.entry import Report
from sparsekit.weights.patterns import SOUGHT, patterns_of


def convert(
    model: str, out: Path, *, overwrite: bool = False, progress: Progress = SILENT
) -> Report:
    """Write a plain checkpoint from one in a dropped form.

    Args:
        model: Its folder.
        out: The folder to make; it appears when it is complete.
        overwrite: Replace an earlier output of sparsekit.
        progress: Receives each weight.

    Raises:
        UsageError: `out` is in use.
        DataError: The model is in no such form, or its tensors do not fit together.
        StorageError: The output cannot be written.
    """
    output = Output("convert", model, out, {}, overwrite=overwrite, progress=progress)
    job = prepare(model, out, overwrite=overwrite, progress=progress)
    source, config, form = job.source, job.config, job.form
    settings = ConvertSettings(method="convert", form=form)
    with output.writing(source, settings, layout=job.layout, parts="weights") as writer:
        rows = rewrite_weights(
            writer,
            f"convert {form}",
            job.sizes,
            lambda prefix: _converted(prefix, _weight(source, prefix, form, config), form),
            progress,
        )
        config_json = converted_config(config)
        weights = [_row(row) for row in rows]
        return output.publish(
            ConvertEntry,
            config_json=config_json,
            settings=ConvertSettings(method="convert", form=form, **_shared(rows)),
            quantized="quantization_config" in config_json,
            totals=CountedTotals(
                weights=len(job.weights),
                zeros=sum(row.zeros for row in weights),
                size=sum(row.size for row in weights),
            ),
            weights=weights,
        )


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A checked conversion."""

    source: Checkpoint
    config: Mapping[str, Any]
    form: str
    weights: Mapping[str, Tensor]
    """By the names of their layers, on the meta device."""
    layout: Layout

    @property
    def sizes(self) -> dict[str, int]:
        """Number of entries of each weight, by the name of its layer."""
        return {prefix: weight.numel() for prefix, weight in self.weights.items()}

    @property
    def room(self) -> int:
        """The memory that the run is expected to need on top of the libraries, in bytes."""
        return UNPACKING_BYTES * max(self.sizes.values())


def prepare(
    model: str, out: Path, *, overwrite: bool = False, progress: Progress = SILENT
) -> Conversion:
    """Check everything that needs no weights, with the arguments and errors of `convert`."""
    source = open_source(model, out, overwrite=overwrite, progress=progress)
    source.require("convert")
    config = read_json(source.path / "config.json")
    form = legacy_format(config)
    assert form is not None
    prefixes = _prefixes(source, form)
    weights = {p: _weight(source, p, form, config, shape_only=True) for p in prefixes}
    layout = Layout.plain(_tensors(source, form, weights), SHARD_BYTES)
    require_disk(out, layout)
    return Conversion(source=source, config=config, form=form, weights=weights, layout=layout)


def convert_packed(
    model: str, out: Path, *, overwrite: bool = False, progress: Progress = SILENT
) -> Report:
    """Write a packed checkpoint from one in a dropped format; arguments as in `convert`.

    The plain one is kept in a hidden folder next to `out` while it is packed, and takes room there.

    Returns:
        The report of `pack`; the history of the output has both.
    """
    open_source(model, out, overwrite=overwrite, progress=progress)  # before anything is written
    plain = out.with_name(f".{out.name}.plain")
    convert(model, plain, overwrite=True, progress=progress)
    try:
        report = pack(str(plain), out, called=model, overwrite=overwrite, progress=progress)
    except DataError:
        shutil.rmtree(plain)
        raise
    shutil.rmtree(plain)
    return report


def _converted(prefix: str, weight: Tensor, form: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A weight under its name, and the notes on it."""
    numbers = weight.float()  # 8-bit ones do not compare
    row = {
        "name": f"{prefix}.weight",
        "shape": list(weight.shape),
        "patterns": patterns_of(numbers, SOUGHT if form == "sparse-bitmask" else ("2:4",)),
        "zeros": int((numbers == 0).sum()),
        "size": weight.numel(),
    }
    return {row["name"]: weight}, row


def _shared(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The strictest pattern of all weights, as a recipe has it; empty where they share none."""
    first, *others = (row["patterns"] for row in rows)
    shared = [text for text in first if all(text in found for found in others)]
    return {"pattern": shared[0]} if shared else {}


def _row(noted: Mapping[str, Any]) -> Weight:
    """A row of the history: a weight with the strictest of its patterns, if it has one."""
    row = {key: value for key, value in noted.items() if key != "patterns"}
    return Weight(**row, **({"pattern": noted["patterns"][0]} if noted["patterns"] else {}))


def _prefixes(source: Checkpoint, form: str) -> list[str]:
    """The names of the layers whose weights are in the form.

    Raises:
        DataError: There are none, or one lacks a part.
    """
    mark = f".{LEGACY_PARTS[form][0]}"
    prefixes = [name.removesuffix(mark) for name in source.places if name.endswith(mark)]
    for prefix in prefixes:
        for part in LEGACY_PARTS[form]:
            if f"{prefix}.{part}" not in source.places:
                raise DataError(
                    f"{source.path} lacks {prefix}.{part}",
                    "copy the folder again",
                    code="incomplete-checkpoint",
                )
    if not prefixes:
        raise DataError(
            f"{source.path} names the form {form}, but none of its weights has it",
            code="no-weights",
        )
    return prefixes


def _tensors(
    source: Checkpoint, form: str, weights: Mapping[str, Tensor]
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of everything in the output, in name order."""
    parts = {f"{prefix}.{part}" for prefix in weights for part in LEGACY_PARTS[form]}
    left = {n: (p.dtype, p.shape) for n, p in source.places.items() if n not in parts}
    converted = {f"{p}.weight": (w.dtype, tuple(w.shape)) for p, w in weights.items()}
    return dict(sorted((left | converted).items()))


def _weight(
    source: Checkpoint,
    prefix: str,
    form: str,
    config: Mapping[str, Any],
    *,
    shape_only: bool = False,
) -> Tensor:
    """The weight of a layer; on the meta device where only type and shape are asked for.

    Raises:
        DataError: Its parts do not fit together.
    """
    names = {part: f"{prefix}.{part}" for part in LEGACY_PARTS[form]}
    places = {part: source.places[name] for part, name in names.items()}
    try:
        if shape_only and form == MARLIN:
            shape = marlin_shape(places["meta"].shape)
            return torch.empty(shape, dtype=torch.float16, device="meta")
        if shape_only:
            shape = bitmask_shape(
                source.read([names["shape"]])[names["shape"]], places["bitmask"].shape
            )
            return torch.empty(shape, dtype=places["compressed"].dtype, device="meta")
        read = source.read(names.values())
        parts = {part: read[name] for part, name in names.items()}
        if form in BITMASKS:
            return from_bitmask(parts, halves=form == "sparse-24-bitmask")
        scheme = next(iter(compression(config)["config_groups"].values()))["weights"]
        grouped = scheme.get("strategy", "group") == "group"
        return from_marlin(parts, scheme["num_bits"], scheme.get("group_size") if grouped else None)
    except DataError as error:
        raise DataError(
            f"{source.path}: {prefix}: {error.message}", error.hint, code=error.code
        ) from error
    except (KeyError, StopIteration, TypeError, AttributeError) as error:
        raise DataError(
            f"{source.path}: config.json does not say how {form} was made", code="incomplete-config"
        ) from error
