"""Patterns: parsing, and exact masks against brute force."""

from fractions import Fraction

import pytest
import torch
from oracles import (
    PublishedThreshold,
    best_of_group,
    best_of_rank,
    best_of_rows,
    exact_count,
    weight_of,
)
from refusals import refused

from sparsekit.errors import NumericalError, PatternError, UsageError
from sparsekit.weights.patterns import PAIRWISE_GROUP, Pattern


def random_scores(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return weight_of(rows, columns, seed).abs()


def tied_scores(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Scores with only three levels, so that nearly every choice meets a tie."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 3, (rows, columns), generator=generator).float()


# ------------------------------------------------------------------------------------- parse


@pytest.mark.parametrize(
    ("text", "keep", "group", "sparsity"),
    [
        ("2:4", 2, 4, Fraction(1, 2)),
        ("1:4", 1, 4, Fraction(3, 4)),
        ("4:8", 4, 8, Fraction(1, 2)),
        ("3:6", 3, 6, Fraction(1, 2)),
        ("16:32", 16, 32, Fraction(1, 2)),
        ("4:4", 4, 4, Fraction(0)),
        (" 2:4 ", 2, 4, Fraction(1, 2)),
    ],
)
def test_text_with_a_colon_is_kept_of_group(
    text: str, keep: int, group: int, sparsity: Fraction
) -> None:
    pattern = Pattern.parse(text)
    assert (pattern.keep, pattern.group, pattern.scope) == (keep, group, "group")
    assert pattern.sparsity == sparsity


@pytest.mark.parametrize(
    ("text", "sparsity", "scope"),
    [
        ("50%", Fraction(1, 2), "row"),
        ("50%/row", Fraction(1, 2), "row"),
        ("62.5%", Fraction(5, 8), "row"),
        ("0%", Fraction(0), "row"),
        ("99.99%", Fraction(9999, 10000), "row"),
        ("50%/tensor", Fraction(1, 2), "tensor"),
        ("33.3%/tensor", Fraction(333, 1000), "tensor"),
    ],
)
def test_text_with_a_percentage_is_the_exact_share_of_zeros(
    text: str, sparsity: Fraction, scope: str
) -> None:
    pattern = Pattern.parse(text)
    assert (pattern.sparsity, pattern.scope) == (sparsity, scope)


@pytest.mark.parametrize("text", ["2:4", "3:6", "50%", "62.5%", "33.3%/tensor", "0%"])
def test_pattern_as_text_is_parsed_back_to_itself(text: str) -> None:
    pattern = Pattern.parse(text)
    assert str(pattern) == text
    assert Pattern.parse(str(pattern)) == pattern


@pytest.mark.parametrize(
    "text",
    [
        *("", "2", "0:4", "5:4", "2:0", "0:0", "-2:4", "2:4:8", "2/4", "2:4%", "2:4\n50%"),
        *("0.5", "50", "100%", "150%", "-5%", "50%/column", "50 %", "%", "50%/", "1e1%", ".5%"),
    ],
)
def test_text_that_is_not_a_pattern_is_refused_with_the_ways_to_write_one(text: str) -> None:
    ways = ("N:M", "2:4", "50%", "50%/tensor")
    with refused("unknown-pattern", repr(text.strip()), *ways, kind=UsageError):
        Pattern.parse(text)


# ------------------------------------------------------------------------- exact counts, ranks


@pytest.mark.parametrize("make", [random_scores, tied_scores])
@pytest.mark.parametrize(
    ("keep", "group"),
    [(1, 2), (1, 4), (2, 4), (3, 4), (4, 4), (2, 5), (3, 6), (1, 7), (4, 8), (7, 8), (5, 10)],
)
def test_group_mask_equals_trying_all_choices(make, keep: int, group: int) -> None:
    scores = make(3, 3 * group, seed=keep)
    expected = best_of_group(scores, keep, group)
    assert torch.equal(Pattern.parse(f"{keep}:{group}").mask(scores), expected)


@pytest.mark.parametrize("make", [random_scores, tied_scores])
@pytest.mark.parametrize(("keep", "group"), [(8, 16), (15, 16), (2, 17), (16, 17), (16, 32)])
def test_group_mask_equals_sorting_each_group(make, keep: int, group: int) -> None:
    scores = make(5, 3 * group, seed=keep)
    expected = best_of_rows(scores.view(-1, group), keep).view_as(scores)
    assert torch.equal(Pattern.parse(f"{keep}:{group}").mask(scores), expected)


@pytest.mark.parametrize("make", [random_scores, tied_scores])
@pytest.mark.parametrize(("keep", "group"), [(2, 4), (4, 8), (3, 6), (1, 16)])
def test_comparing_pairs_gives_the_same_mask_as_ranking(
    make, keep: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = make(7, 5 * group)
    pattern = Pattern.parse(f"{keep}:{group}")
    assert group <= PAIRWISE_GROUP
    by_pairs = pattern.mask(scores)
    monkeypatch.setattr("sparsekit.weights.patterns.PAIRWISE_GROUP", 0)
    assert torch.equal(pattern.mask(scores), by_pairs)


@pytest.mark.parametrize("make", [random_scores, tied_scores])
@pytest.mark.parametrize("percent", ["0", "1", "29", "37", "50", "57", "99.9"])
@pytest.mark.parametrize("columns", [1, 7, 64, 100])
def test_row_mask_equals_sorting_each_row(make, percent: str, columns: int) -> None:
    scores = make(4, columns)
    # ⌊share · columns⌋ in integers: floats give 28 for 29 % of 100.
    zeros = columns * int(Fraction(percent) * 10) // 1000
    pattern = Pattern.parse(f"{percent}%")
    assert pattern.zeros(4, columns) == 4 * zeros
    assert torch.equal(pattern.mask(scores), best_of_rows(scores, columns - zeros))


@pytest.mark.parametrize("make", [random_scores, tied_scores])
@pytest.mark.parametrize("percent", ["0", "29", "50", "66.7", "99.9"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (5, 20)])
def test_tensor_mask_equals_sorting_the_tensor(make, percent: str, rows: int, columns: int) -> None:
    scores = make(rows, columns)
    zeros = rows * columns * int(Fraction(percent) * 10) // 1000
    pattern = Pattern.parse(f"{percent}%/tensor")
    assert pattern.zeros(rows, columns) == zeros
    assert torch.equal(pattern.mask(scores), best_of_rank(scores, rows * columns - zeros))


@pytest.mark.parametrize(
    ("percent", "columns", "zeros"),
    # Products whose float value lies just below the integer: 0.29 · 100 = 28.999999999999996.
    [("29", 100, 29), ("57", 100, 57), ("58", 100, 58), ("70", 10, 7), ("14.3", 1000, 143)],
)
def test_percentage_is_not_rounded_down_by_floating_point(
    percent: str, columns: int, zeros: int
) -> None:
    assert Pattern.parse(f"{percent}%").zeros(1, columns) == zeros
    assert int((~Pattern.parse(f"{percent}%").mask(torch.rand(1, columns))).sum()) == zeros


@pytest.mark.parametrize("text", ["2:4", "1:4", "16:32", "50%", "37%", "50%/tensor"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_scores_keep_the_lower_column(text: str, value: float) -> None:
    pattern = Pattern.parse(text)
    mask = pattern.mask(torch.full((4, 64), value))
    assert exact_count(mask, pattern)
    if pattern.scope == "tensor":
        assert mask[:2].all()
        assert not mask[2:].any()
        return
    length = pattern.group or 64
    kept_first = mask.unflatten(-1, (-1, length)).int().diff(dim=-1) <= 0  # never back to True
    assert kept_first.all()


@pytest.mark.parametrize("text", ["2:4", "8:32", "50%", "50%/tensor"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_scores_of_any_dtype_give_the_mask_of_their_values(text: str, dtype: torch.dtype) -> None:
    scores = random_scores(6, 64).to(dtype)
    pattern = Pattern.parse(text)
    assert torch.equal(pattern.mask(scores), pattern.mask(scores.double()))
    assert exact_count(pattern.mask(scores), pattern)


@pytest.mark.parametrize("text", ["1:4", "8:32", "75%", "75%/tensor"])
def test_infinite_scores_stay(text: str) -> None:
    scores = random_scores(4, 64)
    scores[:, ::32] = float("inf")
    mask = Pattern.parse(text).mask(scores)
    assert mask[:, ::32].all()
    assert exact_count(mask, Pattern.parse(text))


@pytest.mark.parametrize("text", ["2:4", "50%", "50%/tensor"])
def test_mask_does_not_change_the_scores(text: str) -> None:
    scores = random_scores(4, 16)
    before = scores.clone()
    Pattern.parse(text).mask(scores)
    assert torch.equal(scores, before)


# ---------------------------------------------------------------------- blocks, refusals, check


@pytest.mark.parametrize("text", ["50%", "37%", "62.5%", "33.3%/tensor", "50%/tensor", "2:4"])
@pytest.mark.parametrize("block", [4, 12, 128])
def test_masks_of_column_blocks_add_up_to_the_count_of_the_whole(text: str, block: int) -> None:
    pattern, scores = Pattern.parse(text), random_scores(3, 100)
    pieces = [
        pattern.mask(scores[:, start : start + block], start) for start in range(0, 100, block)
    ]
    assert exact_count(torch.cat(pieces, dim=1), pattern)


@pytest.mark.parametrize("text", ["2:4", "8:32", "50%", "50%/tensor"])
def test_nan_scores_are_refused(text: str) -> None:
    scores = random_scores(4, 64)
    scores[2, 5] = float("nan")
    with refused("not-finite", text, "NaN", kind=NumericalError):
        Pattern.parse(text).mask(scores)


def test_columns_that_do_not_divide_are_refused() -> None:
    pattern = Pattern.parse("2:4")
    assert pattern.mismatch(10) == "10 inputs do not divide into groups of 4"
    assert pattern.mismatch(12) == ""
    assert Pattern.parse("50%").mismatch(10) == ""
    with refused("pattern-does-not-divide", "10 inputs", "groups of 4", kind=PatternError):
        pattern.mask(torch.rand(2, 10))
    with refused("pattern-does-not-divide", "q: 10 inputs", "groups of 4", kind=PatternError):
        pattern.check(torch.zeros(2, 10), "q")


@pytest.mark.parametrize("text", ["2:4", "1:4", "8:32", "50%", "37%", "50%/tensor", "29%/tensor"])
def test_check_accepts_a_masked_weight_and_refuses_one_more_survivor(text: str) -> None:
    pattern, weight = Pattern.parse(text), weight_of(6, 96)
    masked = weight * pattern.mask(weight.abs())
    pattern.check(masked, "w")
    masked[masked == 0] = -0.0  # also a zero
    pattern.check(masked, "w")
    row, column = (masked == 0).nonzero()[-1].tolist()
    masked[row, column] = 1e-30
    with refused("pattern-violated", "w: ", kind=PatternError):
        pattern.check(masked, "w")


def test_check_names_the_first_offending_group() -> None:
    weight = torch.tensor([[1.0, 0, 0, 1] * 3] * 4)
    weight[2, 5] = weight[2, 6] = weight[3, 1] = 1.0
    named = ("up: row 2, inputs 4 to 7: 0 zeros", "2:4", " 2")
    with refused("pattern-violated", *named, kind=PatternError):
        Pattern.parse("2:4").check(weight, "up")


def test_check_names_the_first_offending_row() -> None:
    weight = torch.tensor([[1.0, 0, 0, 1] * 3] * 4)
    weight[2, 5] = weight[3, 1] = 1.0
    with refused("pattern-violated", "up: row 2: 5 zeros", "50%", " 6", kind=PatternError):
        Pattern.parse("50%").check(weight, "up")


def test_check_of_a_tensor_counts_all_rows_together() -> None:
    weight = torch.tensor([[1.0] * 4, [0.0] * 4])
    Pattern.parse("50%/tensor").check(weight, "up")
    weight[1, 0] = 1.0
    with refused("pattern-violated", "up: 3 zeros", "50%/tensor", " 4", kind=PatternError):
        Pattern.parse("50%/tensor").check(weight, "up")


def test_published_threshold_removes_one_weight_more() -> None:
    scores = random_scores(4, 32)
    exact = Pattern.parse("50%/tensor").mask(scores)
    published = PublishedThreshold.parse("50%/tensor").mask(scores)
    extra = exact & ~published
    assert not (published & ~exact).any()
    assert int(extra.sum()) == 1
    assert scores[extra] == scores[exact].min()


@pytest.mark.parametrize(
    "text", ["50%", "37.5%/tensor", "99.999999999999%", "0%", "2:4", "100:300"]
)
def test_str_of_a_pattern_is_the_text_it_was_parsed_from(text):
    assert str(Pattern.parse(text)) == text
