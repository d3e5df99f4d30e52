"""The form of a weight: it is stored losslessly, and products equal those of the dense weight."""

from itertools import product

import pytest
import torch
from oracles import weight_of
from refusals import refused
from safetensors.torch import load, save
from torch import Tensor

from sparsekit.errors import DataError
from sparsekit.weights.core import Core, Packed, Values
from sparsekit.weights.form import Form
from sparsekit.weights.grids import Codes, Grid
from sparsekit.weights.packed import exact_pattern
from sparsekit.weights.patterns import Pattern

ROWS, COLUMNS, BLOCK, RANK = 24, 32, 8, 3
GRIDS = ("int4-g16", "int8", "w8a8", "fp8")
PATTERNS = ("2:4", "4:8", "50%", "50%/tensor")
# Whole and packed cores, of numbers and of codes.
CORES = [
    "whole",
    *PATTERNS,
    *GRIDS,
    *(f"{pattern} {grid}" for pattern in PATTERNS for grid in GRIDS),
]
SIDES = [(), ("left", "right"), ("up", "down"), ("left", "right", "up", "down")]

pytestmark = pytest.mark.usefixtures("one_thread")
every_form = pytest.mark.parametrize(
    ("core", "sides"),
    [*product(CORES, SIDES)],
    ids=lambda v: v if isinstance(v, str) else "+".join(v) or "alone",
)


def core_of(text: str, dtype: torch.dtype) -> Core:
    """A core with the pattern and grid that the words name."""
    words = text.split()
    pattern = next((Pattern.parse(word) for word in words if word in PATTERNS), None)
    grid = next((Grid.parse(word) for word in words if word in GRIDS), None)
    weight = weight_of(ROWS, COLUMNS)
    mask = (pattern or Pattern.parse("2:4")).mask(weight.abs())
    weight = weight.masked_fill(~mask, 0.0)
    whole = Codes.nearest(grid, weight, dtype) if grid else Values(weight.to(dtype))
    if pattern is None:
        return whole
    if grid:  # a small number is rounded to 0: the pattern must count the zeros that there are
        kept = whole.codes.view(torch.int8) != 0
        if pattern.scope != "group":
            share = 1 - kept.sum().item() / kept.numel()
            pattern = exact_pattern(round(share * kept.numel()), kept.numel())
    return Form(core=whole).packed(pattern).core


def form_of(core: str, sides: tuple[str, ...], dtype: torch.dtype = torch.float32) -> Form:
    shapes = {
        "left": (ROWS // BLOCK, BLOCK, BLOCK),
        "right": (COLUMNS // BLOCK, BLOCK, BLOCK),
        "up": (ROWS, RANK),
        "down": (RANK, COLUMNS),
    }
    generator = torch.Generator().manual_seed(5)
    made = {name: torch.randn(shapes[name], generator=generator).to(dtype) for name in sides}
    return Form(core=core_of(core, dtype), **made)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_stored_comes_back_bit_for_bit(core, sides, dtype):
    form = form_of(core, sides, dtype)
    form.check()
    stored = form.stored()
    found = Form.from_stored(load(save(stored)), form.format, form.shape)
    found.check()
    assert found.shape == form.shape == (ROWS, COLUMNS)
    assert found.format == form.format
    assert torch.equal(bits(found.dense()), bits(form.dense()))
    again = found.stored()
    assert again.keys() == stored.keys() >= set(sides)
    assert all(torch.equal(bits(again[name]), bits(part)) for name, part in stored.items())
    n_bytes = sum(part.nbytes for part in stored.values())
    assert form.bits == 8 * n_bytes / (ROWS * COLUMNS)


@every_form
@pytest.mark.parametrize("shape", [(COLUMNS,), (5, COLUMNS), (2, 3, COLUMNS)])
def test_multiplying_is_multiplying_with_the_dense_weight(core, sides, shape):
    form, bias = form_of(core, sides), torch.arange(float(ROWS))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    wanted = x.double() @ form.dense().double().T + bias
    found = form.multiply(x, bias)
    assert found.shape == (*shape[:-1], ROWS)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(form.multiply(x) + bias, found)
    if not sides:  # the bits of nn.Linear
        assert torch.equal(found, torch.nn.functional.linear(x, form.dense(), bias))


@every_form
def test_the_dense_weight_is_the_product_of_the_parts(core, sides):
    form = form_of(core, sides)
    weight = form.core.dense().double()
    if "left" in sides:
        left, right = (torch.block_diag(*side.double()) for side in (form.left, form.right))
        weight = left @ weight @ right
    if "up" in sides:
        weight = weight + form.up.double() @ form.down.double()
    torch.testing.assert_close(form.dense().double(), weight, rtol=1e-5, atol=1e-4)


@every_form
def test_packing_and_unpacking_change_no_bit(core, sides):
    form = form_of(core, sides)
    whole = form.unpacked()
    assert not isinstance(whole.core, Packed)
    assert torch.equal(bits(whole.dense()), bits(form.dense()))
    if form.format.pattern is not None:
        packed = whole.packed(form.format.pattern)
        assert packed.format == form.format
        stored, parts = packed.stored(), form.stored()
        assert all(torch.equal(bits(stored[name]), bits(part)) for name, part in parts.items())


@every_form
def test_parameters_are_the_floating_point_parts(core, sides):
    form = form_of(core, sides)
    found = form.parameters
    assert found.keys() >= set(sides)
    assert all(part.is_floating_point() for part in found.values())
    assert all(found[name] is getattr(form, name) for name in sides)
    if not any(grid in core for grid in GRIDS):
        assert len(found) == 1 + len(sides)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("part", ["left", "right", "up", "down"])
def test_sides_that_do_not_fit_are_refused(core, part):
    form = form_of(core, ("left", "right", "up", "down"))
    parts = form.stored()
    parts[part] = parts[part][:-1]
    with refused("shape-mismatch", kind=DataError):
        Form.from_stored(parts, form.format, form.shape).check()


@pytest.mark.parametrize("core", ["2:4", "4:8", "2:4 int4-g16", "50%", "50%/tensor fp8"])
def test_rounding_to_a_dtype_leaves_no_negative_zero(core):
    form = form_of(core, ("up", "down")).unpacked()
    if isinstance(form.core, Values):
        form.core.values[0, 0] = -1e-30
    rounded = form.rounded(torch.float16)
    for part in rounded.parameters.values():
        assert part.dtype == torch.float32 or isinstance(form.core, Codes)
        assert not ((part == 0) & part.signbit()).any()
