"""Statistics of inputs, against float64 products of the whole input."""

import pytest
import torch
from oracles import inputs_of, sums_of, weight_of

from sparsekit.solvers.input_stats import PANEL, InputStats, Stats

pytestmark = pytest.mark.usefixtures("one_thread")

# Narrower than one panel, exactly one, and two with a short last one.
WIDTHS = [1, 7, PANEL, 2 * PANEL + 44]


def close(found: torch.Tensor, wanted: torch.Tensor, share: float = 1e-5) -> bool:
    """Whether two tensors agree to this share of the largest entry."""
    return float((found.double() - wanted.double()).abs().max()) <= share * float(
        wanted.abs().max()
    )


@pytest.mark.parametrize("columns", WIDTHS)
def test_gram_is_symmetric_and_equals_the_product(columns: int) -> None:
    x = inputs_of(60, columns)
    gram = sums_of(x, calibration_rows=3).gram
    assert torch.equal(gram, gram.T)
    assert close(gram, x.double().T @ x.double())


@pytest.mark.parametrize("columns", WIDTHS)
def test_squares_are_the_diagonal_whatever_was_wanted(columns: int) -> None:
    x = inputs_of(60, columns)
    gram, norms = sums_of(x, Stats.GRAM), sums_of(x, Stats.NORMS)
    direct = x.double().square().sum(0)
    assert torch.equal(gram.squares, gram.gram.diagonal())
    torch.testing.assert_close(norms.squares.double(), direct, rtol=1e-6, atol=0)
    torch.testing.assert_close(gram.squares, norms.squares, rtol=1e-5, atol=0)
    assert gram.squares.dtype == norms.squares.dtype == torch.float32


@pytest.mark.parametrize("want", [Stats.NORMS, Stats.GRAM])
def test_halves_of_a_row_sum_to_the_whole(want) -> None:
    x = inputs_of(64, 48)
    whole, halves = sums_of(x, want, 1), sums_of(x, want, 2)
    assert (whole.rows, halves.rows) == (1, 2)
    assert whole.tokens == halves.tokens == 64
    torch.testing.assert_close(halves.squares, whole.squares, rtol=1e-5, atol=0)
    if want == Stats.GRAM:
        assert close(halves.gram, whole.gram)


@pytest.mark.parametrize("want", [Stats.NORMS, Stats.GRAM])
def test_half_precision_inputs_are_summed_in_float32(want) -> None:
    x = (inputs_of(64, 16) * 100).half()
    expected = x.double().square().sum(0)
    assert float(expected.max()) > torch.finfo(torch.float16).max
    torch.testing.assert_close(
        sums_of(x, want).squares.double(), expected, rtol=1e-5, atol=0, check_dtype=False
    )


def test_norms_do_not_lose_small_rows_after_a_large_one() -> None:
    sums = InputStats(1, Stats.NORMS)
    sums.update(torch.tensor([[4096.0]]))  # 2^24, where float32 counts in steps of 2
    for _ in range(100):
        sums.update(torch.tensor([[1.0]]))
    assert float(sums.squares) == 2.0**24 + 100


def test_gram_can_be_read_between_updates() -> None:
    x = inputs_of(90, 2 * PANEL + 44)
    read, unread = InputStats(x.shape[1], Stats.GRAM), InputStats(x.shape[1], Stats.GRAM)
    for row in x.chunk(3):
        read.update(row)
        _ = read.gram
        unread.update(row)
    assert torch.equal(read.gram, unread.gram)


def test_gram_of_norms_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Stats\.GRAM"):
        _ = sums_of(inputs_of(8, 4), Stats.NORMS).gram


def test_update_does_not_change_the_inputs() -> None:
    x = inputs_of(8, 4)
    before = x.clone()
    InputStats(4, Stats.GRAM).update(x, sample=4)
    assert torch.equal(x, before)


def test_derived_is_computed_once_and_again_after_an_update() -> None:
    sums, calls = sums_of(inputs_of(8, 4)), []

    def compute() -> int:
        calls.append(len(calls))
        return len(calls)

    assert [sums.derived("a", compute), sums.derived("a", compute)] == [1, 1]
    assert sums.derived("b", compute) == 2
    sums.update(inputs_of(3, 4))
    assert sums.derived("a", compute) == 3


@pytest.mark.parametrize("want", [Stats.NORMS, Stats.GRAM])
def test_relative_error_equals_the_formula_over_the_sampled_tokens(want) -> None:
    x, dense = inputs_of(40, 16), weight_of(6, 16)
    pruned = dense * (dense.abs() > 0.5)
    sums = InputStats(16, want)
    sums.update(x[:20], sample=5)  # every fourth token
    sums.update(x[20:], sample=20)  # all of them
    seen = torch.cat([x[:20:4], x[20:]]).double()
    wanted = (seen @ (dense - pruned).double().T).square().sum()
    wanted = float(wanted / (seen @ dense.double().T).square().sum())
    assert sums.relative_error(dense, pruned) == pytest.approx(wanted, rel=1e-5)
    assert sums.relative_error(dense.bfloat16(), dense.bfloat16()) == 0
    assert sums.relative_error(dense, torch.zeros_like(dense)) == pytest.approx(1)


def test_relative_error_without_a_sample_or_an_output() -> None:
    assert sums_of(inputs_of(8, 4)).relative_error(weight_of(2, 4), weight_of(2, 4)) is None
    sums = InputStats(4, Stats.NORMS)
    sums.update(inputs_of(8, 4), sample=4)
    assert sums.relative_error(torch.zeros(2, 4), torch.zeros(2, 4)) == 0
