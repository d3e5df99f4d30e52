"""Packing: lossless for every pattern, dtype and size, in as many bytes as theory says."""

import pytest
import torch

from sparsekit.weights.core_format import CoreFormat
from sparsekit.weights.grids import Codes, Grid
from sparsekit.weights.packed import (
    exact_pattern,
    pack_weight,
    packed_bytes,
    packing,
    unpack,
)
from sparsekit.weights.packed_codes import pack_grid, unpack_grid
from sparsekit.weights.patterns import Pattern

TYPES = (torch.float32, torch.bfloat16, torch.float16)
TRIED = [Pattern.parse(text) for text in ("1:4", "2:8", "2:4", "4:8", "8:16", "3:4")]


def sparse(pattern: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return weight.masked_fill(~Pattern.parse(pattern).mask(weight.abs()), 0.0).to(dtype)


def bits(weight: torch.Tensor) -> torch.Tensor:
    return weight.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("pattern", "shape"),
    [
        *[(text, (5, 48)) for text in ("1:4", "2:8", "2:4", "4:8", "8:16", "3:4", "5:16")],
        *[(text, shape) for text in ("50%", "70%/tensor") for shape in ((7, 33), (1, 13))],
        ("10%", (7, 33)),
    ],
)
def test_every_bit_comes_back(pattern, shape, dtype):
    weight = sparse(pattern, shape, dtype)
    found = packing(weight, TRIED)
    if pattern == "10%":  # so few zeros hardly pay a mask
        found = exact_pattern(int((weight == 0).sum()), weight.numel())
    assert found is not None
    values, indices = pack_weight(weight, found)
    assert values.dtype == dtype
    assert values.nbytes + indices.nbytes == packed_bytes(shape, 8 * dtype.itemsize, found)
    assert torch.equal(bits(unpack(values, indices, found, shape[1])), bits(weight))


@pytest.mark.parametrize(
    ("pattern", "dtype", "share"),
    [
        ("2:4", torch.bfloat16, 9 / 16),  # 2 of 4 values of 16 bits, and 2 places of 2 bits
        ("2:4", torch.float32, 17 / 32),
        ("1:4", torch.bfloat16, (4 + 0.5) / 16),
        ("4:8", torch.bfloat16, (8 + 1.5) / 16),
        ("50%/tensor", torch.bfloat16, (8 + 1) / 16),
    ],
)
def test_bytes_are_those_of_theory(pattern, dtype, share):
    weight = sparse(pattern, (64, 256), dtype)
    found = packing(weight, TRIED)
    assert found is not None
    values, indices = pack_weight(weight, found)
    assert (values.nbytes + indices.nbytes) / weight.nbytes == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize("grid", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("shape", [(7, 33), (1, 13)])
@pytest.mark.parametrize("odd", [0, 1])
def test_every_bit_of_codes_comes_back_too(shape, grid, odd):
    """For even and odd counts of values, as there are two 4-bit ones per byte."""
    on, dtype = Grid.parse(grid), torch.bfloat16
    weight = sparse("50%/tensor", shape, torch.float32)
    if int((weight != 0).sum()) % 2 != odd:
        weight[tuple(weight.nonzero()[0])] = 0.0
    codes = Codes.nearest(on, weight, dtype)
    stored = codes.codes.view(torch.int8)
    if on.floating:
        stored[tuple((stored == 0).nonzero()[0])] = -128  # -0.0, which is a value
    else:  # the lowest code, and one with all bits set
        stored[tuple(stored.nonzero()[0])] = int(on.range[0])
        stored[tuple(stored.nonzero()[-1])] = -1
    pattern = exact_pattern(int((stored == 0).sum()), stored.numel())
    parts = pack_grid(codes, pattern)
    values = int((stored != 0).sum())
    assert values % 2 == (odd + on.floating) % 2
    assert parts["values"].nbytes == -(-values * on.bits // 8)
    stored_as = CoreFormat(pattern=pattern, grid=on, dtype=dtype)
    assert CoreFormat.parse(str(stored_as)) == stored_as
    assert {name: tuple(part.shape) for name, part in parts.items()} == stored_as.shapes(shape)
    found = unpack_grid(parts, shape, pattern, on, dtype)
    assert found.codes.dtype == codes.codes.dtype
    assert torch.equal(found.codes.view(torch.int8), stored)
    assert torch.equal(bits(found.scale), bits(codes.scale))


def test_a_negative_zero_is_a_value():
    weight = sparse("2:4", (4, 8), torch.bfloat16)
    at = tuple((weight == 0).nonzero()[3])
    weight[at] = -0.0
    found = packing(weight, TRIED)
    assert str(found) == "3:4"  # one group has three values now
    assert torch.equal(bits(unpack(*pack_weight(weight, found), found, 8)), bits(weight))


def test_more_zeros_than_the_pattern_asks_for_come_back_too():
    weight = sparse("2:4", (8, 16), torch.bfloat16)
    weight[2] = 0.0
    weight[3, :6] = 0.0
    found = packing(weight, TRIED)
    assert str(found) == "2:4"
    assert torch.equal(bits(unpack(*pack_weight(weight, found), found, 16)), bits(weight))


def test_what_packing_does_not_serve_is_left():
    assert packing(torch.ones(4, 8), TRIED) is None


@pytest.mark.parametrize(("columns", "pattern"), [(8, "1:4"), (7, "%/tensor")])
def test_nothing_but_zeros_comes_back_too(columns, pattern):
    weight = torch.zeros(4, columns)
    found = packing(weight, TRIED)
    assert str(found).endswith(pattern)
    assert Pattern.parse(str(found)) == found
    assert torch.equal(unpack(*pack_weight(weight, found), found, columns), weight)


@pytest.mark.parametrize(("zeros", "size"), [(1, 3), (7, 49152 * 576), (10**7 + 1, 10**8 - 3)])
def test_the_share_of_zeros_counts_them(zeros, size):
    found = exact_pattern(zeros, size)
    assert found.zeros(1, size) == zeros
    assert Pattern.parse(str(found)) == found
