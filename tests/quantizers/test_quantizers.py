"""RTN and GPTQ against their formulas, and what every quantizer keeps."""

import oracles
import pytest
import torch

from sparsekit import methods
from sparsekit.pruners.magnitude import Magnitude
from sparsekit.quantizers.gptq import Gptq
from sparsekit.quantizers.rtn import Rtn
from sparsekit.tensors.grids import Codes, Grid
from sparsekit.tensors.patterns import Pattern
from sparsekit.tensors.sums import InputSums, Want

ROWS, OUT, IN = 4, 12, 64
GRIDS = ("int4-g16", "int4", "int8", "w8a8", "fp8")


def inputs(seed: int = 1) -> torch.Tensor:
    """Correlated, as what enters a layer is, `[tokens, in]`."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(IN, IN, generator=generator) / 4 + torch.eye(IN)
    return torch.randn(ROWS * 100, IN, generator=generator) @ mixing


def sums_of(x: torch.Tensor) -> InputSums:
    sums = InputSums(IN, Want.GRAM)
    for row in x.chunk(ROWS):
        sums.update(row, sample=50)
    return sums


def weight_of(pattern: str | None, seed: int = 0) -> torch.Tensor:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed))
    return Magnitude().prune(weight, None, Pattern.parse(pattern)).weight if pattern else weight


@pytest.mark.parametrize("pattern", [None, "2:4", "50%"])
@pytest.mark.parametrize("text", ["int4-g16", "int4-g8", "int4", "int8"])
def test_gptq_is_the_explicit_column_update(pattern, text):
    """The update of Frantar et al. 2023 with an inverse for each column (`oracles.gptq`)."""
    grid, weight, x = Grid.parse(text), weight_of(pattern), inputs()
    hessian = oracles.sparsegpt_hessian(x, ROWS)
    # An exact scale would put the largest number of a group half between two codes.
    codes = Gptq().quantize(weight, sums_of(x), grid, torch.bfloat16).codes
    found = Codes(codes.codes, codes.scale.float()).dense()
    low, high = map(int, grid.range)
    wanted = oracles.gptq(weight, hessian, grid.group or IN, low, high)
    assert torch.allclose(found.double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("pattern", "share"), [(None, 0.6), ("2:4", 0.9)])
def test_gptq_leaves_less_error_than_rounding(pattern, share):
    """Found over these ten draws: 0.50 of the error for a dense weight, 0.84 for a sparse one."""
    grid, ratios = Grid.parse("int4-g16"), []
    for seed in range(10):
        weight, sums = weight_of(pattern, seed), sums_of(inputs(50 + seed))
        ours, theirs = (
            sums.relative_error(weight, m.quantize(weight, sums, grid, torch.float32).codes.dense())
            for m in (Gptq(), Rtn())
        )
        ratios.append(ours / theirs)
    assert sum(ratios) / 10 < share


def test_rtn_takes_the_nearest_number_of_the_grid():
    grid, weight = Grid.parse("int4-g16"), weight_of(None)
    codes = Rtn().quantize(weight, None, grid, torch.float32).codes
    scale = codes.scale.repeat_interleave(16, 1)
    numbers = torch.arange(-8, 8) * scale[..., None]  # [out, in, 16]
    nearest = (numbers - weight[..., None]).abs().amin(-1)
    assert torch.allclose((codes.dense() - weight).abs(), nearest, atol=1e-6)


@pytest.mark.parametrize("name", methods.names("quantizers"))
@pytest.mark.parametrize("text", GRIDS)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "50%"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_zero_is_revived(name, text, pattern, dtype):
    grid, weight = Grid.parse(text), weight_of(pattern)
    weight[3] = 0.0
    weight[4, :16] = 0.0
    before = weight.clone()
    codes = (
        methods.load("quantizers", name, {}).quantize(weight, sums_of(inputs()), grid, dtype).codes
    )
    assert torch.equal(weight, before)
    dense = codes.dense()
    assert dense.dtype == codes.scale.dtype == dtype
    assert not dense[weight == 0].any()
    assert not (dense.signbit() & (dense == 0)).any()
    Pattern.parse(pattern).check(dense, name)


@pytest.mark.parametrize("name", methods.names("quantizers"))
def test_inputs_that_were_zero_for_every_token_do_no_harm(name):
    x = inputs()
    x[:, 5] = 0.0
    weight = weight_of(None)
    method = methods.load("quantizers", name, {})
    codes = method.quantize(weight, sums_of(x), Grid.parse("int8"), torch.float32).codes
    assert torch.allclose(codes.dense()[:, 5], weight[:, 5], atol=codes.scale.max().item())
