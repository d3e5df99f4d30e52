"""Packing of N:M cores: the bytes are as promised and nothing is lost.

Bits are unpacked here one by one, in plain loops, by what `pack` says of their order.
"""

import math

import pytest
import torch
from oracles import weight_of
from refusals import refused
from safetensors.torch import load, save
from torch import Tensor

from sparsekit.errors import DataError
from sparsekit.weights.core import Values
from sparsekit.weights.core_format import CoreFormat
from sparsekit.weights.form import Form
from sparsekit.weights.packed import factor_shapes, mask_of, pack, unpack
from sparsekit.weights.patterns import Pattern

pytestmark = pytest.mark.usefixtures("one_thread")

PATTERNS = [
    "2:4", "1:4", "3:4", "4:8", "5:10", "2:2", "1:16", "16:16", "1:1", "3:5", "7:32", "1:2",
]  # fmt: skip

every_pattern = pytest.mark.parametrize("text", PATTERNS)


def core_of(text: str, rows: int = 6, groups: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A random core and its mask."""
    pattern = Pattern.parse(text)
    weight = weight_of(rows, groups * pattern.group, seed)
    mask = pattern.mask(weight.abs())
    return weight.masked_fill(~mask, 0.0), mask


def form_of(text: str, rows: int, columns: int, block: int, seed: int = 0) -> Form:
    core, mask = core_of(text, rows, columns // Pattern.parse(text).group, seed)
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.eye(block) + 0.3 * torch.randn(n // block, block, block, generator=generator)
        for n in (rows, columns)
    )
    return Form(core=Values(core, mask), left=left, right=right)


def read(stored: dict[str, Tensor], pattern: Pattern, columns: int) -> Form:
    """The form that the tensors on disk make, once it is checked."""
    shape = len(stored["indices"]), columns
    form = Form.from_stored(stored, CoreFormat(pattern=pattern), shape)
    form.check()
    return form


def unpacked(*packed) -> tuple[Tensor, Tensor]:
    """Core and mask of a result of `pack`."""
    return unpack(*packed), mask_of(*packed)


def places_of(row: Tensor, count: int, width: int) -> list[int]:
    """The numbers that a row of bytes holds, each in this many bits, the first in the lowest."""
    bits = [(byte >> at) & 1 for byte in row.tolist() for at in range(8)]
    return [sum(bits[i * width + at] << at for at in range(width)) for i in range(count)]


# ----------------------------------------------------------------------------------- packed cores


@every_pattern
def test_core_and_mask_come_back_bit_for_bit(text: str) -> None:
    core, mask = core_of(text)
    pattern = Pattern.parse(text)
    values, indices = pack(core, mask, pattern)
    found = unpacked(values, indices, pattern, core.shape[1])
    assert torch.equal(found[0], core)
    assert torch.equal(found[1], mask)
    assert not (found[0].signbit() & (found[0] == 0)).any()


@every_pattern
def test_values_and_places_are_where_pack_says(text: str) -> None:
    core, mask = core_of(text)
    pattern = Pattern.parse(text)
    values, indices = pack(core, mask, pattern)
    width = max(1, math.ceil(math.log2(pattern.group)))
    for row in range(len(core)):
        kept = [i for i in range(core.shape[1]) if mask[row, i]]
        assert values[row].tolist() == core[row, kept].tolist()
        assert places_of(indices[row], len(kept), width) == [i % pattern.group for i in kept]


@pytest.mark.parametrize(
    ("text", "bits"),
    [("2:4", 4), ("1:4", 2), ("3:4", 6), ("4:8", 12), ("5:10", 20), ("2:2", 2), ("1:16", 4),
     ("16:16", 64)],
)  # fmt: skip
def test_bytes_are_those_promised(text: str, bits: int) -> None:
    """Eight groups a row: a whole number of bytes, whatever the pattern."""
    core, mask = core_of(text, groups=8)
    values, indices = pack(core, mask, Pattern.parse(text))
    assert indices.dtype == torch.uint8
    assert indices.shape == (6, bits)
    assert values.shape == (6, 8 * Pattern.parse(text).keep)


def test_row_that_does_not_fill_its_last_byte_is_padded_with_zeros() -> None:
    core, mask = core_of("2:4", groups=5)
    _, indices = pack(core, mask, Pattern.parse("2:4"))
    assert indices.shape == (6, 3)
    assert (indices[:, 2] < 16).all()


def test_smallest_core_is_written_out() -> None:
    """Places 1 and 3, 0 and 2: bits 01 11 00 10, the first lowest: 0b10001101."""
    core = torch.tensor([[0.0, 5, 0, 7, 2, 0, -3, 0]])
    values, indices = pack(core, core != 0, Pattern.parse("2:4"))
    assert values.tolist() == [[5, 7, 2, -3]]
    assert indices.tolist() == [[0b10001101]]


@every_pattern
def test_value_of_zero_inside_the_mask_keeps_its_place(text: str) -> None:
    core, mask = core_of(text)
    pattern = Pattern.parse(text)
    core[1] = 0
    first = mask.nonzero()[0]
    core[first[0], first[1]] = 0
    found, where = unpacked(*pack(core, mask, pattern), pattern, core.shape[1])
    assert torch.equal(where, mask)
    assert torch.equal(found, core)


@pytest.mark.parametrize("text", ["2:4", "1:4", "3:4", "5:10", "16:16"])
def test_places_that_do_not_rise_are_refused(text: str) -> None:
    """All bits zero: every place is the first, which is valid for a single kept value only."""
    core, mask = core_of(text)
    pattern = Pattern.parse(text)
    values, indices = pack(core, mask, pattern)
    if pattern.keep == 1:
        found = mask_of(values, torch.zeros_like(indices), pattern, core.shape[1])
        assert found.nonzero()[:, 1].remainder(pattern.group).eq(0).all()
        return
    with refused("invalid-places", text, kind=DataError):
        mask_of(values, torch.zeros_like(indices), pattern, core.shape[1])
    swapped = indices.clone()
    swapped[3, 0] = 0b00000001 if pattern.group == 4 else 0b00010010
    with refused("invalid-places", kind=DataError):
        mask_of(values, swapped, pattern, core.shape[1])


@pytest.mark.parametrize("text", ["5:10", "3:5"])
def test_places_beyond_their_group_are_refused(text: str) -> None:
    """Their bits can hold larger numbers than there are places in the group."""
    core, mask = core_of(text)
    pattern = Pattern.parse(text)
    values, indices = pack(core, mask, pattern)
    with refused("invalid-places", kind=DataError):
        mask_of(values, torch.full_like(indices, 255), pattern, core.shape[1])
    # The last place alone, as if the group were one longer.
    wide = Pattern.parse(f"{pattern.keep}:{pattern.group + 1}")
    last = torch.zeros(1, wide.group)
    last[0, -pattern.keep :] = 1
    values, indices = pack(last, last != 0, wide)
    assert mask_of(values, indices, wide, wide.group)[0, -1]
    with refused("invalid-places", kind=DataError):
        mask_of(values, indices, pattern, pattern.group)


@pytest.mark.parametrize("what", ["columns", "values", "bytes", "rows", "pattern"])
def test_shapes_that_do_not_fit_are_refused(what: str) -> None:
    core, mask = core_of("2:4", groups=6)
    pattern, columns = Pattern.parse("2:4"), core.shape[1]
    values, indices = pack(core, mask, pattern)
    if what == "columns":
        columns += 4
    elif what == "values":
        values = values[:, :-1]
    elif what == "bytes":
        indices = indices[:, :-1]
    elif what == "rows":
        indices = indices[:-1]
    else:
        pattern = Pattern.parse("3:4")
    with refused("shape-mismatch", f"{pattern} weight", f" x {columns} ", kind=DataError):
        mask_of(values, indices, pattern, columns)


# --------------------------------------------------------------------------------------- products


def test_product_is_that_of_the_block_diagonal_matrices() -> None:
    made = form_of("2:4", 24, 32, 8)
    left, right = (torch.block_diag(*side.double()) for side in (made.left, made.right))
    wanted = left @ made.core.values.double() @ right
    torch.testing.assert_close(made.dense().double(), wanted, rtol=0, atol=1e-5)


def test_factor_that_is_none_is_an_identity() -> None:
    made = form_of("2:4", 24, 32, 8)
    core, left, right = made.core.values, made.left, made.right
    assert torch.equal(Form(core=made.core).dense(), core)
    one = Form(core=made.core, left=left).dense()
    torch.testing.assert_close(one, torch.block_diag(*left) @ core)
    one = Form(core=made.core, right=right).dense()
    torch.testing.assert_close(one, core @ torch.block_diag(*right))


def test_block_of_one_scales_rows_and_columns() -> None:
    core, mask = core_of("2:4", 3, 2)
    rows, columns = torch.rand(3) + 1, torch.rand(8) + 1
    sides = {"left": rows.view(3, 1, 1), "right": columns.view(8, 1, 1)}
    made = Form(core=Values(core, mask), **sides)
    torch.testing.assert_close(made.dense(), rows[:, None] * core * columns)


def test_rounding_is_that_of_the_type_and_leaves_the_mask() -> None:
    made = form_of("2:4", 24, 32, 8)
    found = made.rounded(torch.bfloat16)
    for name, exact in made.parameters.items():
        rounded = found.parameters[name]
        assert rounded.dtype == torch.float32
        assert torch.equal(rounded, exact.bfloat16().float())
        assert not torch.equal(rounded, exact)
    assert torch.equal(found.core.mask, made.core.mask)
    assert Form(core=made.core).rounded(torch.bfloat16).left is None


# ------------------------------------------------------------------------------- what is stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("text", "rows", "columns", "block"),
    [("2:4", 24, 32, 8), ("1:4", 8, 12, 4), ("4:8", 16, 48, 16), ("5:10", 20, 30, 10),
     ("3:5", 15, 25, 5), ("1:2", 6, 2, 2)],
)  # fmt: skip
def test_stored_factors_give_the_same_product(dtype, text, rows, columns, block) -> None:
    pattern = Pattern.parse(text)
    made = form_of(text, rows, columns, block).rounded(dtype)
    stored = made.packed(pattern).to(dtype).stored()
    assert stored.keys() == {"values", "indices", "left", "right"}
    found = read(load(save(stored)), pattern, columns)
    assert torch.equal(found.core.dense().float(), made.core.values)
    assert torch.equal(found.core.mask(), made.core.mask)
    assert torch.equal(found.dense(), made.dense())
    assert {name: part.dtype for name, part in stored.items()} == {
        "values": dtype, "indices": torch.uint8, "left": dtype, "right": dtype,
    }  # fmt: skip
    shapes = {name: tuple(part.shape) for name, part in stored.items()}
    assert shapes == factor_shapes(rows, columns, pattern, block=block)


def test_sides_that_are_none_are_not_stored() -> None:
    core, mask = core_of("2:4")
    pattern = Pattern.parse("2:4")
    stored = Form(core=Values(core, mask)).packed(pattern).stored()
    assert stored.keys() == {"values", "indices"}
    found = read(stored, pattern, core.shape[1])
    assert found.left is None
    assert found.right is None
    assert torch.equal(found.dense(), core)


def test_published_size_of_a_core() -> None:
    """2:4 in bfloat16: half of 16 bits and one of the mask, 9 bits a weight."""
    shapes = factor_shapes(256, 512, Pattern.parse("2:4"), block=128)
    core = 16 * math.prod(shapes["values"]) + 8 * math.prod(shapes["indices"])
    assert core == 9 * 256 * 512
    assert math.prod(shapes["left"]) + math.prod(shapes["right"]) == 128 * (256 + 512)


@pytest.mark.parametrize(
    ("rows", "columns", "block", "bits"),
    [
        (4096, 4096, 128, 10.0),  # attention of LLaMA-2-7B: 9 + 16 * 128 * 2 / 4096
        (11008, 4096, 128, 9.686),  # its MLP: 9 + 16 * 128 * (1 / 4096 + 1 / 11008)
        (576, 576, 32, 10.778),  # attention of SmolLM2-135M
        (1536, 576, 32, 10.222),  # its MLP
    ],
)
def test_bits_of_a_weight_with_its_blocks(rows, columns, block, bits) -> None:
    """2:4 in bfloat16, 9 bits, and 16 for each number of A and B (by hand)."""
    shapes = factor_shapes(rows, columns, Pattern.parse("2:4"), block=block)
    found = 8 * math.prod(shapes.pop("indices")) + 16 * sum(map(math.prod, shapes.values()))
    assert found / (rows * columns) == pytest.approx(bits, abs=5e-4)


@pytest.mark.parametrize("how", ["flat", "other blocks"])
@pytest.mark.parametrize(
    "part",
    ["values", "indices", "left", "right"],
)
def test_factors_that_do_not_fit_together_are_refused(part: str, how: str) -> None:
    made, pattern = form_of("2:4", 16, 32, 8), Pattern.parse("2:4")
    stored = made.packed(pattern).stored()
    stored[part] = stored[part].flatten() if how == "flat" else stored[part].unflatten(0, (-1, 2))
    with refused("shape-mismatch", kind=DataError):
        read(stored, pattern, 32)


# ------------------------------------------------------------- other patterns, and low-rank parts


@pytest.mark.parametrize("text", ["50%", "37%", "50%/tensor", "0%"])
@pytest.mark.parametrize("columns", [16, 13])
def test_core_of_an_unstructured_pattern_comes_back_bit_for_bit(text: str, columns: int) -> None:
    """One bit for each weight, lowest first, and the kept values row by row."""
    weight, pattern = weight_of(7, columns), Pattern.parse(text)
    mask = pattern.mask(weight.abs())
    core = weight.masked_fill(~mask, 0.0)
    first = mask.nonzero()[0]
    core[first[0], first[1]] = 0
    values, indices = pack(core, mask, pattern)
    assert values.tolist() == [float(core[i, j]) for i, j in mask.nonzero().tolist()]
    assert [places_of(row, columns, 1) for row in indices] == mask.int().tolist()
    shapes = {"values": tuple(values.shape), "indices": tuple(indices.shape)}
    assert shapes == factor_shapes(7, columns, pattern)
    found, where = unpacked(values, indices, pattern, columns)
    assert torch.equal(found, core)
    assert torch.equal(where, mask)


def test_mask_with_another_number_of_values_is_refused() -> None:
    weight, pattern = weight_of(7, 16), Pattern.parse("50%")
    mask = pattern.mask(weight.abs())
    values, indices = pack(weight, mask, pattern)
    indices[3, 1] ^= 1
    with refused("invalid-places", "50%", "56 values", kind=DataError):
        mask_of(values, indices, pattern, 16)


def test_low_rank_part_is_added_and_stored() -> None:
    core, mask = core_of("2:4", 6, 4)
    pattern = Pattern.parse("2:4")
    up, down = weight_of(6, 2, seed=1), weight_of(2, 16, seed=2)
    made = Form(core=Values(core, mask), up=up, down=down)
    torch.testing.assert_close(made.dense(), core + up @ down)
    stored = made.packed(pattern).stored()
    shapes = {name: tuple(part.shape) for name, part in stored.items()}
    assert shapes == factor_shapes(6, 16, pattern, rank=2)
    assert torch.equal(read(stored, pattern, 16).dense(), made.dense())
