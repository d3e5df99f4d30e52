"""RTN and GPTQ against their formulas, and what every quantizer keeps."""

import oracles
import pytest
import torch
from refusals import refused

from sparsekit import registry as methods
from sparsekit.errors import NumericalError
from sparsekit.pruning.methods.magnitude import Magnitude
from sparsekit.pruning.methods.sparsegpt import Sparsegpt
from sparsekit.quantization.methods.awq import Awq
from sparsekit.quantization.methods.gptq import Gptq
from sparsekit.quantization.methods.rtn import Rtn
from sparsekit.solvers.input_stats import InputStats, Stats
from sparsekit.weights.grids import Codes, Grid
from sparsekit.weights.patterns import Pattern

ROWS, OUT, IN = 4, 12, 64
GRIDS = ("int4-g16", "int4", "int8", "w8a8", "fp8")


def inputs(seed: int = 1) -> torch.Tensor:
    """Correlated, as what enters a layer is, `[tokens, in]`."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(IN, IN, generator=generator) / 4 + torch.eye(IN)
    return torch.randn(ROWS * 100, IN, generator=generator) @ mixing


def sums_of(x: torch.Tensor) -> InputStats:
    sums = InputStats(IN, Stats.GRAM)
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
    weight[:, IN // 2 :] *= 0.02  # so that zeros there have the most to make up for
    hessian = oracles.sparsegpt_hessian(x, ROWS)
    # An exact scale would put the largest number of a group half between two codes.
    codes = Gptq().quantize(weight, sums_of(x), grid, torch.bfloat16).codes
    found = Codes(codes.codes, codes.scale.float(), grid).dense()
    low, high = map(int, grid.range)
    wanted = oracles.gptq(weight, hessian, grid.group or IN, low, high)
    assert torch.allclose(found.double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("pattern", "unit"), [("2:4", 4), ("50%", 16), ("50%", 8)])
@pytest.mark.parametrize("text", ["int4-g16", "int4-g8"])
def test_one_pass_of_sparsegpt_removes_and_rounds_as_the_explicit_update(pattern, unit, text):
    """Frantar and Alistarh 2023, section 3.5, with masks for less and for more than a group."""
    grid, weight, x = Grid.parse(text), weight_of(None), inputs()
    hessian, wanted = oracles.sparsegpt_hessian(x, ROWS), Pattern.parse(pattern)
    found = Sparsegpt(block=unit).prune_on_grid(weight, sums_of(x), wanted, grid, torch.bfloat16)
    assert found is not None
    assert found.codes is not None
    codes = Codes(found.codes.codes, found.codes.scale.float(), grid)
    rule = {"choose": lambda scores: wanted.mask(scores.float()), "unit": unit}
    explicit = oracles.gptq(weight, hessian, grid.group, *map(int, grid.range), **rule)
    assert torch.allclose(codes.dense().double(), explicit, rtol=0, atol=1e-5)
    assert torch.equal(found.weight, found.codes.dense().float())
    wanted.check(found.weight, "weight")
    assert not found.weight[~found.mask].any()


def test_gptq_makes_up_for_what_is_off_a_mask():
    grid, weight, sums = Grid.parse("int4-g16"), weight_of(None), sums_of(inputs())
    mask = Pattern.parse("2:4").mask(weight.abs())
    found = Gptq().quantize(weight, sums, grid, torch.float32, mask).codes.dense()
    assert not found[~mask].any()
    alone = Gptq().quantize(weight * mask, sums, grid, torch.float32).codes.dense()
    errors = [sums.relative_error(weight, one) for one in (found, alone)]
    assert errors[0] < 0.9 * errors[1]


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


@pytest.mark.parametrize("text", ["int4", "int8", "fp8"])
def test_columns_that_overflow_are_told_and_never_become_codes(text):
    """A second half of the inputs that is about a 10^4th of the first has to make up for it."""
    x = inputs()
    x[:, IN // 2 :] = (x[:, : IN // 2] + x[:, IN // 2 :] / 4) / 10**4
    weight = weight_of(None).clamp(-1, 1) * 3e38
    with refused("not-finite", "damping", "rtn", kind=NumericalError):
        Gptq(damping=1e-10).quantize(weight, sums_of(x), Grid.parse(text), torch.float32)


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


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_the_scale_of_awq_is_the_best_of_its_grid(pattern):
    """By trying every ratio of Lin et al. 2024 with loops, on the outputs themselves."""
    grid, weights, x = Grid.parse("int4-g16"), [weight_of(pattern, s) for s in (0, 7)], inputs()
    weights[1] *= 20.0  # which makes it no more important
    x = x * torch.linspace(0.05, 3.0, IN)  # some inputs carry much more than others
    sums = sums_of(x)
    # An exact scale would put the largest number of a group half between two codes.
    found = Awq(ratios=10).input_scale(weights, sums, grid, torch.bfloat16)
    assert found is not None
    scale, told = found
    losses = []
    for step in range(10):
        candidate = (x.square().mean(0).sqrt() ** (step / 10)).clamp(min=1e-4)
        candidate = candidate / (candidate.max() * candidate.min()).sqrt()
        total = 0.0
        for weight in weights:
            rounded = torch.zeros(OUT, IN)
            for row in range(OUT):
                for first in range(0, IN, 16):
                    part = weight[row, first : first + 16] * candidate[first : first + 16]
                    span = (part.abs().max() / 7.5).bfloat16().float() if part.any() else 1.0
                    near = (part / span).round().clamp(-8, 7) * span
                    rounded[row, first : first + 16] = near.bfloat16()
            lost, given = (rounded / candidate - weight, weight)
            total += float(
                (x @ lost.T).double().square().sum() / (x @ given.T).double().square().sum()
            )
        losses.append(total)
    best = min(range(10), key=losses.__getitem__)
    assert 0 < best < 9
    assert told["ratio"] == best / 10
    wanted = (x.square().mean(0).sqrt() ** told["ratio"]).clamp(min=1e-4)
    assert torch.allclose(scale, wanted / (wanted.max() * wanted.min()).sqrt(), rtol=1e-4)


def test_awq_wants_no_scale_where_none_helps():
    weight, x = torch.zeros(OUT, IN), inputs()
    assert Awq().input_scale([weight], sums_of(x), Grid.parse("int8"), torch.float32) is None
