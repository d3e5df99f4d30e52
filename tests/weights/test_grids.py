"""Grids: parsing, scales, rounding, and agreement with compressed-tensors."""

import pytest
import torch
from refusals import refused

from sparsekit.errors import NumericalError, UsageError
from sparsekit.weights.grids import Codes, Grid


def drawn(rows: int = 6, columns: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "text", ["int4-g128", "int4-g64", "int4", "int8", "int8-g32", "w8a8", "fp8"]
)
def test_str_of_a_grid_is_the_text_it_was_parsed_from(text):
    assert str(Grid.parse(text)) == text


@pytest.mark.parametrize("text", ["int4-g0", "int3", "int4-64", "", "w4a4", "int4-g-1", "nf4"])
def test_other_texts_are_refused(text):
    with refused("unknown-grid", text, "int4-g128, int8, w8a8, fp8", kind=UsageError):
        Grid.parse(text)


def test_a_group_that_does_not_divide_is_a_mismatch():
    assert Grid.parse("int4-g64").mismatch(96) == "96 inputs do not divide into groups of 64"
    assert not Grid.parse("int4-g32").mismatch(96)
    assert not Grid.parse("int8").mismatch(97)


@pytest.mark.parametrize("text", ["int4", "int8", "w8a8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_number_of_a_row_is_rounded_by_half_a_step_at_most(text, dtype):
    grid, weight = Grid.parse(text), drawn()
    scale = grid.scale(weight, dtype)
    assert torch.equal(scale, scale.to(dtype).float())
    codes = grid.round(weight, scale[:, None])
    largest = weight.abs().argmax(1, keepdim=True)
    low, high = grid.range
    assert codes.amin() >= low
    assert codes.amax() <= high
    # Half a step, and what the scale's own rounding adds to the top.
    allowed = scale * (
        0.5 + high * torch.finfo(dtype).eps
    ) + 2**-4 * grid.floating * weight.abs().amax(1)
    off = (codes * scale[:, None] - weight).abs().gather(1, largest)[:, 0]
    assert (off <= allowed).all()


@pytest.mark.parametrize("text", ["int4", "int8", "fp8"])
def test_zeros_and_rows_of_zeros_stay_and_none_is_negative(text):
    grid, weight = Grid.parse(text), drawn()
    weight[:, ::2] = 0.0
    weight[2] = 0.0
    weight[3] *= 1e-3
    weight[3, 1] = 1.0  # so that the rest of the row rounds to 0, from both sides
    scale = grid.scale(weight, torch.bfloat16)
    codes = grid.round(weight, scale[:, None])
    assert not codes[weight == 0].any()
    assert not codes.signbit()[codes == 0].any()
    assert scale[2] == 1


def test_a_scale_below_the_smallest_number_of_its_type_is_lifted_to_it():
    weight = torch.full((1, 4), 1e-7)
    assert Grid.parse("int4").scale(weight, torch.float16).item() == torch.finfo(torch.float16).tiny


def test_a_scale_beyond_its_type_is_refused():
    weight = torch.full((1, 4), 1e9)
    with refused("not-finite", "scale", "torch.float16", kind=NumericalError):
        Grid.parse("int8").scale(weight, torch.float16)


@pytest.mark.parametrize("text", ["int4-g16", "int8", "fp8"])
def test_the_dense_weight_is_that_of_compressed_tensors(text):
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    grid, weight = Grid.parse(text), drawn()
    group = grid.group or weight.shape[1]
    parts = weight.unflatten(1, (-1, group))
    scale = grid.scale(parts.flatten(0, 1), torch.bfloat16).view(parts.shape[:2])
    codes = Codes.of(grid, grid.round(parts, scale[..., None]).flatten(1), scale, torch.bfloat16)
    args = QuantizationArgs(
        num_bits=grid.bits,
        type="float" if grid.floating else "int",
        strategy="group" if grid.group else "channel",
        group_size=grid.group or None,
    )
    wanted = dequantize(x_q=codes.codes, scale=codes.scale, zero_point=None, args=args)
    assert torch.equal(codes.dense(), wanted)
