"""Checkpoints in the format of compressed-tensors: their `quantization_config` and tensors.

Stock loaders read this format. Nothing that a configuration names is ever executed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparsekit.checkpoint.folder import part_name
from sparsekit.checkpoint.safetensors_file import TensorPlace, read_tensor
from sparsekit.checkpoint.stored_form import StoredForm
from sparsekit.errors import DataError, UsageError
from sparsekit.weights.core_format import CoreFormat
from sparsekit.weights.grids import Grid
from sparsekit.weights.quantized import (
    PACKED_WEIGHT,
    WEIGHT_SCALE,
    WEIGHT_SHAPE,
    format_of,
    parts_of,
)

METHOD = "compressed-tensors"


def quantization_config(grid: Grid, ignore: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of a model whose linear layers are on a grid.

    It passes the validation of compressed-tensors, and never has a `sparsity_config`: vLLM refuses
    models with one.

    Args:
        grid: The grid of the weights.
        ignore: Names of the linear layers that are not on it.
    """
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
    )

    kind = "float" if grid.floating else "int"
    weights = QuantizationArgs(
        num_bits=grid.bits,
        type=kind,
        symmetric=True,
        strategy="group" if grid.group else "channel",
        group_size=grid.group or None,
    )
    inputs = None
    if grid.activations:
        inputs = QuantizationArgs(
            num_bits=8, type=kind, symmetric=True, strategy="token", dynamic=True, observer=None
        )
    form = format_of(grid)
    scheme = QuantizationScheme(
        targets=["Linear"], weights=weights, input_activations=inputs, format=form
    )
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=form,
        quantization_status="compressed",
        ignore=sorted(ignore),
    )
    return config.model_dump(mode="json", exclude_none=True)


def grid_of(config: Any) -> Grid | None:
    """The grid in a `quantization_config`; None if it is not one that sparsekit writes.

    Args:
        config: The value of that key in config.json.
    """
    if not isinstance(config, Mapping) or config.get("quant_method") != METHOD:
        return None
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        return None  # a format that was dropped, which convert takes
    if config.get("kv_cache_scheme") or config.get("transform_config"):
        return None  # such as rotations of the inputs while the model runs
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        return None
    scheme = next(iter(groups.values()))
    if not isinstance(scheme, Mapping) or scheme.get("output_activations"):
        return None
    weights, inputs = scheme.get("weights"), scheme.get("input_activations")
    if not isinstance(weights, Mapping) or weights.get("actorder"):
        return None
    grouped = weights.get("strategy") == "group"
    if grouped != bool(weights.get("group_size")):
        return None
    grid = Grid(
        bits=weights.get("num_bits", 0),
        group=weights.get("group_size") or 0,
        floating=weights.get("type") == "float",
        activations=inputs is not None,
    )
    kind = "float" if grid.floating else "int"
    plain = weights.get("type", "int") == kind and weights.get("symmetric", True)
    plain &= grouped or weights.get("strategy") == "channel"
    if isinstance(inputs, Mapping):
        wanted = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token"}
        plain &= inputs.get("dynamic") is True
        plain &= all(inputs.get(key) == value for key, value in wanted.items())
    if not plain or config.get("format") != format_of(grid):
        return None
    try:
        return grid if Grid.parse(str(grid)) == grid else None
    except UsageError:
        return None


def decoded_places(
    path: Path, places: Mapping[str, TensorPlace], grid: Grid
) -> tuple[dict[str, TensorPlace], dict[str, StoredForm]]:
    """The places of decoded tensors, and the stored form of each weight on the grid.

    Raises:
        DataError: A weight lacks a part.
    """
    left, quantized = dict(places), {}
    for name in [name for name in places if name.endswith(f".{WEIGHT_SCALE}")]:
        weight = name.removesuffix(WEIGHT_SCALE) + "weight"
        names = {part: part_name(weight, part) for part in parts_of(grid)}
        if missing := [full for full in names.values() if full not in places]:
            raise DataError(
                f"{path} lacks {missing[0]}",
                "copy or download it again",
                code="incomplete-checkpoint",
            )
        parts = {part: left.pop(full) for part, full in names.items()}
        quantized[weight] = StoredForm(weight, CoreFormat(grid=grid), parts)
        codes = parts.get(PACKED_WEIGHT) or parts["weight"]
        shape = _shape_in(path, parts[WEIGHT_SHAPE]) if WEIGHT_SHAPE in parts else codes.shape
        left[weight] = replace(codes, dtype=places[name].dtype, shape=shape)
    return left, quantized


def _shape_in(path: Path, place: TensorPlace) -> tuple[int, ...]:
    """The shape in a tensor of two integers; empty if it is not such a tensor."""
    if place.dtype not in (torch.int64, torch.int32) or place.shape != (2,):
        return ()
    return tuple(read_tensor(path, place).tolist())
