"""Safetensors files: the places of their tensors, and their bytes."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsekit.errors import DataError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """The place of a tensor on disk."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte offset in the file
    stop: int


def read_header(file: Path) -> tuple[dict[str, TensorPlace], int]:
    """The tensors of a safetensors file, and the offset of its data.

    Raises:
        DataError: The file is damaged, or has a tensor of an unsupported dtype.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):  # the library's own checks of header and length
            pass
    except (SafetensorError, OSError) as error:
        reason = "the file is empty" if not file.stat().st_size else str(error)
        raise DataError(
            f"{file} is not a whole safetensors file: {reason}",
            "copy or download it again",
            code="damaged-file",
        ) from error
    with file.open("rb") as stream:
        offset = 8 + int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(offset - 8))
    places = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise DataError(
                f"{file}: {name} has the type {entry['dtype']}, which is not supported",
                code="unsupported-dtype",
            )
        start, stop = (offset + at for at in entry["data_offsets"])
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        if stop - start != math.prod(shape) * dtype.itemsize:
            raise DataError(
                f"{file}: {name} has {stop - start} bytes for the shape {shape}",
                code="damaged-file",
            )
        places[name] = TensorPlace(file.name, dtype, shape, start, stop)
    return places, offset


def metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file whose header has been checked."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return header.get("__metadata__", {})


def read_into(handle: int, data: Tensor, start: int, file: Path) -> None:
    """Fill a byte tensor from a file.

    Raises:
        DataError: The file is too short.
    """
    view = memoryview(data.numpy())
    while view:
        count = os.preadv(handle, [view], start)
        if count == 0:
            raise DataError(
                f"{file} ends at byte {start}", "copy or download it again", code="damaged-file"
            )
        view, start = view[count:], start + count


def is_finite(values: Tensor) -> bool:
    """Whether a tensor of any dtype is free of NaN and Inf."""
    if not values.is_floating_point() or not values.numel():
        return True
    if values.dtype.itemsize == 1:
        values = values.to(torch.float16)
    low, high = values.aminmax()  # NaN spreads to both
    return bool(low.isfinite() & high.isfinite())


def read_tensor(folder: Path, place: TensorPlace) -> Tensor:
    """A copy of a tensor of a folder."""
    data = torch.empty(place.stop - place.start, dtype=torch.uint8)
    handle = os.open(folder / place.file, os.O_RDONLY)
    try:
        read_into(handle, data, place.start, folder / place.file)
    finally:
        os.close(handle)
    return data.view(place.dtype).view(place.shape)
