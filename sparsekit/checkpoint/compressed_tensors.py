"""Weights on a grid as compressed-tensors stores them, so that stock loaders read them.

Which tensors a weight becomes, and what config.json says of them. Names of formats are looked up in
the table below and nowhere else: nothing that a configuration says is ever run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekit.checkpoint.safetensors_file import TensorPlace
from sparsekit.errors import DataError, UsageError
from sparsekit.files import read_json
from sparsekit.weights.grids import Codes, Grid

METHOD = "compressed-tensors"
PACKED, INTEGERS, FLOATS = "pack-quantized", "int-quantized", "float-quantized"
CODES, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
# Rows of packed codes are words of so many bits.
WORD_BITS = 32
Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def format_of(grid: Grid) -> str:
    """The name of the format that a grid is stored in."""
    if not grid.activations:
        return PACKED
    return FLOATS if grid.floating else INTEGERS


def quantization_config(grid: Grid, ignore: Iterable[str]) -> dict[str, Any]:
    """What config.json says of a model all of whose linear layers but some are on a grid.

    It passes the validation of compressed-tensors, and never has a `sparsity_config`: vLLM refuses
    models with one.

    Args:
        grid: Of the weights.
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


def grid_of(told: Any) -> Grid | None:
    """The grid that a `quantization_config` tells of; None when it is none that we write.

    Args:
        told: What config.json has under that name.
    """
    if not isinstance(told, Mapping) or told.get("quant_method") != METHOD:
        return None
    sparsity = told.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        return None  # a dropped form, which convert takes
    if told.get("kv_cache_scheme") or told.get("transform_config"):
        return None  # such as rotations of the inputs while the model runs
    groups = told.get("config_groups")
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
    if not plain or told.get("format") != format_of(grid):
        return None
    try:
        return grid if Grid.parse(str(grid)) == grid else None
    except UsageError:
        return None


def parts_of(grid: Grid) -> tuple[str, ...]:
    """The last parts of the names of the tensors that a weight is stored as."""
    return (CODES, SCALE, SHAPE) if format_of(grid) == PACKED else ("weight", SCALE)


def stored_shapes(
    grid: Grid,
    shape: tuple[int, int],  # [out, in]
    dtype: torch.dtype,
) -> Shapes:
    """Type and shape of each tensor that a weight becomes, by the last part of its name."""
    rows, columns = shape
    scale = dtype, (rows, grid.scales(columns))
    if format_of(grid) != PACKED:
        codes = torch.float8_e4m3fn if grid.floating else torch.int8
        return {"weight": (codes, shape), SCALE: scale}
    words = math.ceil(columns * grid.bits / WORD_BITS)
    return {CODES: (torch.int32, (rows, words)), SCALE: scale, SHAPE: (torch.int64, (2,))}


def encode(grid: Grid, codes: Codes) -> dict[str, Tensor]:
    """The tensors of a weight, by the last part of the name of each."""
    if format_of(grid) != PACKED:
        return {"weight": codes.codes, SCALE: codes.scale}
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    packed = pack_to_int32(codes.codes, grid.bits)
    return {CODES: packed, SCALE: codes.scale, SHAPE: torch.tensor(codes.codes.shape)}


def decode(grid: Grid, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Codes:
    """What `encode` was given.

    Raises:
        DataError: The tensors are not those of a weight of this shape.
    """
    wanted = stored_shapes(grid, shape, parts[SCALE].dtype)
    for name in {**wanted, **parts}:
        found = (parts[name].dtype, tuple(parts[name].shape)) if name in parts else None
        if found != wanted.get(name):
            raise DataError(f"{name} of a {grid} weight {shape} is {found}, not {wanted.get(name)}")
    if format_of(grid) != PACKED:
        return Codes(parts["weight"], parts[SCALE])
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    codes = unpack_from_int32(parts[CODES], grid.bits, torch.Size(shape))
    return Codes(codes.contiguous(), parts[SCALE])


def part_name(weight: str, part: str) -> str:
    """The name of a tensor that a weight on a grid is stored as."""
    return f"{weight.removesuffix('weight')}{part}"


def quantization(path: Path) -> Any:
    """What the configuration in a folder says of quantization; None when nothing."""
    told = read_json(path / "config.json")
    return told.get("quantization_config") if isinstance(told, dict) else None


def with_weights(
    path: Path, places: Mapping[str, TensorPlace], grid: Grid
) -> tuple[dict[str, TensorPlace], dict[str, dict[str, TensorPlace]]]:
    """Places with weights where their codes and scales are, and those of codes and scales.

    Raises:
        DataError: A weight lacks a part.
    """
    left, coded = dict(places), {}
    for name in [name for name in places if name.endswith(f".{SCALE}")]:
        weight = name.removesuffix(SCALE) + "weight"
        names = {part: part_name(weight, part) for part in parts_of(grid)}
        if missing := [full for full in names.values() if full not in places]:
            raise DataError(f"{path} lacks {missing[0]}", "copy or download it again")
        coded[weight] = {part: left.pop(full) for part, full in names.items()}
        codes = coded[weight].get(CODES) or coded[weight]["weight"]
        shape = codes.shape
        if SHAPE in coded[weight]:
            shape = _shape_in(path, coded[weight][SHAPE])
        left[weight] = replace(codes, dtype=places[name].dtype, shape=shape)
    return left, coded


def _shape_in(path: Path, place: TensorPlace) -> tuple[int, ...]:
    """A shape that a small tensor of integers holds; empty when it is none."""
    if place.dtype not in (torch.int64, torch.int32) or place.shape != (2,):
        return ()
    with (path / place.file).open("rb") as stream:
        stream.seek(place.start)
        data = bytearray(stream.read(place.stop - place.start))
    return tuple(torch.frombuffer(data, dtype=place.dtype).tolist())
