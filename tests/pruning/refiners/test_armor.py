"""ARMOR as a refiner: where it starts, what it reaches, which blocks and patterns it takes.

The steps themselves are checked in `tests/solvers/test_armor_als.py`.
"""

import pytest
import torch
from oracles import inputs_of, loss, nowag_scores, sums_of, weight_of
from refusals import refused

from sparsekit import registry as methods
from sparsekit.errors import UsageError
from sparsekit.pruning.methods import Pruned
from sparsekit.pruning.refiners import Refiner
from sparsekit.solvers.input_stats import Stats
from sparsekit.weights.patterns import Pattern

ROWS, COLUMNS = 32, 64


def armor(**options: str | float) -> Refiner:
    return methods.load("refiners", "armor", {key: str(value) for key, value in options.items()})


def start_of(initial: str = "nowag", text: str = "2:4", dead: tuple[int, ...] = ()) -> Pruned:
    pruner = methods.load("pruners", initial, {})
    sums = sums_of(inputs_of(200, COLUMNS, dead=dead), Stats.GRAM)
    return pruner.prune(weight_of(ROWS, COLUMNS), sums, Pattern.parse(text))


def run(
    initial: str = "nowag", text: str = "2:4", dead: tuple[int, ...] = (), **options: str | float
) -> Pruned:
    refiner = armor(**{"block": 8, **options})
    sums = sums_of(inputs_of(200, COLUMNS, dead=dead), refiner.needs)
    weight, start = weight_of(ROWS, COLUMNS), start_of(initial, text, dead)
    return refiner.refine(weight, start, sums, Pattern.parse(text))


def error_of(made: Pruned) -> float:
    """The output error over the calibration inputs, float64."""
    inputs = inputs_of(200, COLUMNS)
    return loss(weight_of(ROWS, COLUMNS), made.weight, inputs.T @ inputs)


# ------------------------------------------------------------------------------- where it starts


@pytest.mark.parametrize("initial", ["nowag", "sparsegpt", "magnitude"])
@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8"])
def test_no_sweep_gives_the_initial_weight_back(initial: str, text: str) -> None:
    start, made = start_of(initial, text), run(initial, text, sweeps=0)
    assert torch.equal(made.mask, start.mask)
    torch.testing.assert_close(made.weight, start.weight, rtol=1e-6, atol=0)
    assert made.numbers["sweeps"] == 0
    assert made.numbers["loss"] == made.numbers["first_loss"]


def test_first_loss_is_that_of_nowag() -> None:
    """The share of W̄² h that NoWag removes, from its formula in float64."""
    start = start_of()
    scores = nowag_scores(weight_of(ROWS, COLUMNS), inputs_of(200, COLUMNS))
    wanted = float(scores[~start.mask].sum() / scores.sum())
    assert run().numbers["first_loss"] == pytest.approx(wanted, rel=1e-4)


def quadratic_loss(weight: torch.Tensor, made: torch.Tensor) -> float:
    """The loss of a weight by its formula, float64: on NoWag's normalised weight."""
    x, weight = inputs_of(200, COLUMNS).double(), weight.double()
    h, columns = x.square().sum(0), weight.norm(dim=0)
    unit, lost = weight / columns, (weight - made.double()) / columns
    rows = unit.norm(dim=1, keepdim=True)
    unit, lost = unit / rows, lost / rows
    return float((lost * h * lost).sum() / (unit * h * unit).sum())


def test_losses_are_those_of_the_first_and_the_last_weight() -> None:
    """On a weight whose rows and columns differ: the norms must end in the right factor."""
    weight = weight_of(ROWS, COLUMNS) * torch.logspace(-1, 1, ROWS)[:, None]
    sums, pattern = sums_of(inputs_of(200, COLUMNS), Stats.GRAM), Pattern.parse("2:4")
    start = methods.load("pruners", "nowag", {}).prune(weight, sums, pattern)
    refiner = armor(block=8)
    made = refiner.refine(weight, start, sums, pattern)
    first, last = (quadratic_loss(weight, w) for w in (start.weight, made.weight))
    assert made.numbers["first_loss"] == pytest.approx(first, rel=1e-3)
    assert made.numbers["loss"] == pytest.approx(last, rel=1e-3)


# ------------------------------------------------------------------------------- what it reaches


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8"])
def test_loss_is_lower_than_where_it_started(text: str) -> None:
    made = run(text=text)
    assert made.numbers["loss"] < 0.95 * made.numbers["first_loss"]


@pytest.mark.parametrize("initial", ["magnitude", "sparsegpt", "alps"])
def test_other_initial_methods_work(initial: str) -> None:
    made = run(initial)
    assert made.numbers["loss"] < 0.95 * made.numbers["first_loss"]
    assert made.numbers["block"] == 8
    assert not torch.equal(made.weight, run().weight)


def test_output_error_is_lower_than_that_of_the_initial_weight() -> None:
    assert error_of(run()) < 0.7 * error_of(start_of())


def test_result_is_the_product_of_its_factors() -> None:
    made = run()
    factors = made.factors
    left, right = (torch.block_diag(*side.double()) for side in (factors.left, factors.right))
    product = left @ factors.core.values.double() @ right
    torch.testing.assert_close(made.weight.double(), product, rtol=0, atol=1e-5)
    assert torch.equal(factors.core.mask, made.mask)
    assert not factors.core.values[~made.mask].any()
    assert not torch.equal(made.weight != 0, made.mask)


def test_same_input_gives_the_same_bits() -> None:
    one, two = run(), run()
    assert one.factors.parameters.keys() == {"weight", "left", "right"}
    for name, part in one.factors.parameters.items():
        assert torch.equal(part, two.factors.parameters[name]), name
    assert torch.equal(one.mask, two.mask)
    assert one.numbers == two.numbers


@pytest.mark.parametrize("dead", [(0, 5), (0, 1, 2, 3), tuple(range(8, 16))])
def test_dead_inputs_give_finite_factors(dead: tuple[int, ...]) -> None:
    made = run(dead=dead)
    for name, part in made.factors.parameters.items():
        assert part.isfinite().all(), name
    assert made.numbers["loss"] < made.numbers["first_loss"]


def test_dead_block_gives_finite_factors() -> None:
    assert run(dead=(0, 1, 2, 3), block=4).weight.isfinite().all()


def test_zeros_of_a_weight_stay_positive_in_its_core() -> None:
    """`verify` takes -0.0 for an offender."""
    weight, refiner = weight_of(ROWS, COLUMNS), armor(block=8)
    weight[8:16], weight[3], weight[:, 8:12] = 0, 0, 0
    sums, pattern = sums_of(inputs_of(200, COLUMNS), Stats.GRAM), Pattern.parse("2:4")
    start = methods.load("pruners", "nowag", {}).prune(weight, sums, pattern)
    core = refiner.refine(weight, start, sums, pattern).factors.core.values
    assert not core[8:16].any()
    negative = ((core == 0) & core.signbit()).any()
    assert not negative


def test_sweeps_end_when_the_loss_falls_by_less_than_the_tolerance() -> None:
    whole = run(sweeps=50, tolerance=0)
    assert whole.numbers["sweeps"] > 10
    early = run(sweeps=50, tolerance=0.05)
    assert 1 < early.numbers["sweeps"] < whole.numbers["sweeps"]
    assert early.numbers["loss"] > whole.numbers["loss"]
    assert run(sweeps=3, tolerance=0).numbers["sweeps"] == 3


def test_it_starts_from_nowag_on_the_inputs_of_the_dense_model() -> None:
    """As the scripts of LawrenceRLiu/ARMOR@3977e54 do."""
    made = armor()
    assert (made.initial, made.propagate, made.needs) == ("nowag", False, Stats.NORMS)


# ------------------------------------------------------------------------------- what it tells


def test_report_tells_block_sweeps_and_losses() -> None:
    numbers = run("sparsegpt").numbers
    told = {"block", "sweeps", "first_loss", "loss"}
    assert numbers.keys() == {*told, "damping"}  # what SparseGPT tells stays
    assert numbers["block"] == 8
    assert 1 <= numbers["sweeps"] <= 10
    assert 0 < numbers["loss"] < numbers["first_loss"] < 1


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        ({"solver": "adam"}, "no-option", "'solver'"),
        ({"block": "-8"}, "out-of-range", "block of armor"),
        ({"sweeps": "1.5"}, "not-a-number", "sweeps of armor"),
    ],
)
def test_option_that_cannot_be_is_refused(options: dict[str, str], code: str, named: str) -> None:
    with refused(code, "armor", named, kind=UsageError):
        armor(**options)


# ------------------------------------------------------------------------------- its blocks


def block_size(rows: int, columns: int, text: str = "2:4", block: int = 0) -> int:
    return armor(block=block).block_size(rows, columns, Pattern.parse(text))


@pytest.mark.parametrize(
    ("rows", "columns", "block"),
    [
        (4096, 4096, 128),
        (4096, 11008, 128),
        (896, 4864, 128),  # Qwen2.5-0.5B: 7 · 128 and 38 · 128
        (1600, 6400, 100),  # GPT-2 XL: 12.5 · 128
        (768, 768, 96),  # OPT-125M: 128 would add a third
        (576, 576, 72),  # SmolLM2-135M
        (192, 576, 32),
        (64, 64, 8),
    ],
)
def test_block_is_the_largest_that_adds_a_quarter_at_most(rows, columns, block) -> None:
    assert block_size(rows, columns) == block
    assert block * (rows + columns) <= 0.25 * rows * columns
    larger = [b for b in range(block + 4, 129, 4) if rows % b == columns % b == 0]
    assert all(b * (rows + columns) > 0.25 * rows * columns for b in larger)


def test_smallest_block_is_taken_where_none_adds_a_quarter_only() -> None:
    """24 x 20: blocks of 4 add 4 · 44 to 480 numbers, more than a quarter."""
    assert block_size(24, 20) == 4
    assert block_size(8, 8, "4:8") == 8


@pytest.mark.parametrize(
    ("asked", "found"), [(64, 64), (63, 48), (128, 96), (200, 192), (8, 8), (4, 4), (1000, 192)]
)
def test_given_block_falls_to_the_largest_divisor(asked: int, found: int) -> None:
    """Of 192 and 576 in whole groups of 4, whatever it adds."""
    assert block_size(192, 576, block=asked) == found


@pytest.mark.parametrize(("text", "block"), [("2:4", 36), ("4:8", 24), ("2:6", 36), ("5:10", 0)])
def test_block_holds_whole_groups(text: str, block: int) -> None:
    """A divisor of 72, at most 40."""
    assert block_size(72, 360, text, block=40) == block


@pytest.mark.parametrize(
    ("options", "text", "rows", "columns", "named"),
    [
        ({}, "50%", 64, 64, ("N:M", "50%")),
        ({}, "50%/tensor", 64, 64, ("N:M", "50%/tensor")),
        ({"block": 6}, "2:4", 64, 64, ("block=6", "multiple of 4", "2:4")),
        ({"block": 4}, "4:8", 64, 64, ("block=4", "multiple of 8", "4:8")),
        ({}, "8:16", 64, 64, ("8:16", "12,870")),
        ({}, "2:4", 63, 64, ("multiple of 4", "63 x 64")),
        ({}, "4:8", 12, 64, ("multiple of 8", "12 x 64")),
    ],
)
def test_what_does_not_fit_is_refused(options, text, rows, columns, named) -> None:
    reason = armor(**options).mismatch(Pattern.parse(text), rows, columns)
    assert all(value in reason for value in named)


@pytest.mark.parametrize("text", ["2:4", "1:4", "3:4", "4:8", "5:10", "1:16", "2:16"])
def test_what_fits_is_not_refused(text: str) -> None:
    assert armor().mismatch(Pattern.parse(text), 320, 640) == ""


def test_many_supports_come_with_a_caution_that_counts_them() -> None:
    (caution,) = armor().warnings(Pattern.parse("5:10"), None)
    assert all(value in caution for value in ("5:10", "252", "42 times"))


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "1:16"])
def test_few_supports_come_without_a_caution(text: str) -> None:
    assert armor().warnings(Pattern.parse(text), None) == []
