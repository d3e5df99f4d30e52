"""Each pruning method against its oracle, and what is known of it for certain."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from oracles import (
    alps_mask,
    best_of_group,
    best_of_rank,
    best_of_rows,
    best_support_loss,
    damped,
    exact_count,
    inputs_of,
    least_squares_on,
    loss,
    nowag_scores,
    ria_scores,
    sparsegpt,
    sparsegpt_hessian,
    sums_of,
    wanda_scores,
    weight_of,
)
from refusals import refused

from sparsekit import registry as methods
from sparsekit.errors import NumericalError
from sparsekit.pruning.methods import Pruned
from sparsekit.solvers.input_stats import Stats
from sparsekit.weights.patterns import Pattern

MASK_ONLY = ["magnitude", "nowag", "ria", "wanda"]
PATTERNS = ["2:4", "1:4", "4:8", "50%", "37%", "50%/tensor"]

every_pattern = pytest.mark.parametrize("text", PATTERNS)


def prune(
    name: str, weight: torch.Tensor, inputs: torch.Tensor, text: str, **options: float
) -> Pruned:
    pruner = methods.load("pruners", name, {key: str(value) for key, value in options.items()})
    return pruner.prune(weight, sums_of(inputs), Pattern.parse(text))


def oracle_mask(scores: torch.Tensor, text: str) -> torch.Tensor:
    """The mask of a whole weight by brute force."""
    pattern = Pattern.parse(text)
    if pattern.scope == "group":
        return best_of_group(scores, pattern.keep, pattern.group)
    rows, columns = scores.shape
    if pattern.scope == "row":
        return best_of_rows(scores, columns - int(pattern.sparsity * columns))
    return best_of_rank(scores, rows * columns - int(pattern.sparsity * rows * columns))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


# ------------------------------------------------------------------- methods that only choose


@every_pattern
@pytest.mark.parametrize(
    ("name", "scores"),
    [
        pytest.param("magnitude", lambda weight, _: weight.abs(), id="magnitude"),
        pytest.param("wanda", wanda_scores, id="wanda"),
        pytest.param("nowag", nowag_scores, id="nowag"),
        pytest.param("ria", ria_scores, id="ria"),
    ],
)
def test_mask_equals_the_oracle(name: str, scores: Callable, text: str) -> None:
    weight, inputs = weight_of(7, 40), inputs_of(90, 40)
    wanted = oracle_mask(scores(weight, inputs), text)
    assert torch.equal(prune(name, weight, inputs, text).mask, wanted)


def test_options_reach_the_scores() -> None:
    weight, inputs = weight_of(7, 40), inputs_of(90, 40)
    for name, scores, option, value in [
        ("ria", ria_scores, "power", 1.5),
        ("nowag", nowag_scores, "epsilon", 5.0),
    ]:
        plain, changed = (
            oracle_mask(scores(weight, inputs, **given), "2:4") for given in ({}, {option: value})
        )
        assert not torch.equal(plain, changed)
        assert torch.equal(prune(name, weight, inputs, "2:4", **{option: value}).mask, changed)


@every_pattern
@pytest.mark.parametrize("name", MASK_ONLY)
def test_survivors_are_bit_identical(name: str, text: str) -> None:
    weight = weight_of(24, 64)
    pruned = prune(name, weight, inputs_of(200, 64), text)
    assert torch.equal(pruned.weight[pruned.mask], weight[pruned.mask])


@every_pattern
@pytest.mark.parametrize("name", MASK_ONLY)
def test_pruning_again_changes_nothing(name: str, text: str) -> None:
    inputs = inputs_of(200, 64)
    once = prune(name, weight_of(24, 64), inputs, text)
    assert torch.equal(prune(name, once.weight, inputs, text).weight, once.weight)


@pytest.mark.parametrize("name", MASK_ONLY)
def test_negated_weight_has_the_same_mask(name: str) -> None:
    weight, inputs = weight_of(24, 64), inputs_of(200, 64)
    masks = [prune(name, sign * weight, inputs, "2:4").mask for sign in (1, -1)]
    assert torch.equal(*masks)


@pytest.mark.parametrize("name", ["wanda", "nowag", "magnitude"])
def test_permuting_groups_of_inputs_permutes_the_mask(name: str) -> None:
    weight, inputs = weight_of(24, 64), inputs_of(200, 64)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    columns = (order[:, None] * 4 + torch.arange(4)).flatten()
    mask = prune(name, weight, inputs, "2:4").mask
    permuted = prune(name, weight[:, columns], inputs[:, columns], "2:4").mask
    assert torch.equal(permuted, mask[:, columns])


# ------------------------------------------------------------------------------------- wanda


@every_pattern
def test_wanda_with_equal_norms_is_magnitude(text: str) -> None:
    weight, inputs = weight_of(24, 64), 3 * torch.eye(64)
    expected = prune("magnitude", weight, inputs, text).mask
    assert torch.equal(prune("wanda", weight, inputs, text).mask, expected)
    unequal = prune("wanda", weight, inputs_of(200, 64), text).mask
    assert not torch.equal(unequal, expected)


@every_pattern
def test_wanda_is_unchanged_when_a_factor_moves_from_weights_to_inputs(text: str) -> None:
    weight, inputs = weight_of(24, 64), inputs_of(200, 64)
    # Powers of two, so that not even the last bit of a score changes.
    factor = 2.0 ** torch.randint(-4, 5, (64,), generator=torch.Generator().manual_seed(0))
    moved = prune("wanda", weight / factor, inputs * factor, text).mask
    assert torch.equal(moved, prune("wanda", weight, inputs, text).mask)
    assert not torch.equal(moved, prune("wanda", weight / factor, inputs, text).mask)


@pytest.mark.parametrize("text", ["2:4", "50%"])
def test_wanda_is_unchanged_when_rows_are_scaled(text: str) -> None:
    weight, inputs = weight_of(24, 64), inputs_of(200, 64)
    factor = 2.0 ** torch.arange(-12, 12)[:, None]
    scaled = prune("wanda", weight * factor, inputs, text).mask
    assert torch.equal(scaled, prune("wanda", weight, inputs, text).mask)


def test_wanda_over_the_tensor_depends_on_the_scale_of_rows() -> None:
    weight, inputs = weight_of(24, 64), inputs_of(200, 64)
    weight[3] *= 1e-3
    assert not prune("wanda", weight, inputs, "50%/tensor").mask[3].any()


def test_wanda_unstructured_mask_follows_a_permutation_of_inputs() -> None:
    weight, inputs = weight_of(24, 64), inputs_of(200, 64)
    columns = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    mask = prune("wanda", weight, inputs, "50%").mask
    permuted = prune("wanda", weight[:, columns], inputs[:, columns], "50%").mask
    assert torch.equal(permuted, mask[:, columns])


def test_wanda_removes_dead_inputs_first() -> None:
    dead = (0, 5, 17, 42)
    mask = prune("wanda", weight_of(24, 64), inputs_of(200, 64, dead=dead), "50%").mask
    assert not mask[:, list(dead)].any()


# ------------------------------------------------------------------------------- nowag and ria


def test_nowag_takes_the_mean_of_the_others_for_dead_inputs() -> None:
    dead = tuple(range(0, 40, 2))
    weight, inputs = weight_of(7, 40), inputs_of(90, 40, dead=dead)
    filled = inputs.clone()
    filled[0, list(dead)] = float(inputs.double().square().sum() / 20) ** 0.5
    wanted = oracle_mask(nowag_scores(weight, filled), "2:4")
    assert torch.equal(prune("nowag", weight, inputs, "2:4").mask, wanted)


def test_nowag_refuses_inputs_that_are_all_zero() -> None:
    with refused("zero-inputs", kind=NumericalError):
        prune("nowag", weight_of(4, 8), torch.zeros(10, 8), "2:4")


def test_only_nowag_observes_the_dense_model() -> None:
    for name in methods.names("pruners"):
        assert methods.load("pruners", name, {}).propagate == (name != "nowag")


# --------------------------------------------------------------------------------- sparsegpt


def sparsegpt_oracle(
    weight: torch.Tensor, inputs: torch.Tensor, text: str, block: int = 128
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Explicit optimal brain surgery; the counts of blocks add up to that of the weight."""
    pattern, rows = Pattern.parse(text), len(weight)

    def choose(scores: torch.Tensor, start: int) -> torch.Tensor:
        stop = start + scores.shape[1]
        if pattern.scope == "group":
            return best_of_group(scores, pattern.keep, pattern.group)
        per = 1 if pattern.scope == "row" else rows
        zeros = int(pattern.sparsity * per * stop) - int(pattern.sparsity * per * start)
        if pattern.scope == "row":
            return best_of_rows(scores, scores.shape[1] - zeros)
        return best_of_rank(scores, scores.numel() - zeros)

    alive = weight * (inputs != 0).any(0)
    hessian = sparsegpt_hessian(inputs, calibration_rows=2)
    return sparsegpt(alive, hessian, choose, pattern.group or block)


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        *[("2:4", 40), ("2:4", 132), ("1:4", 40), ("4:8", 136), ("50%", 40), ("37%", 131)],
        *[("50%/tensor", 131), ("37%/tensor", 40)],
        # Groups that cross the 128th column: a block has 126 columns, and 120.
        *[("3:6", 150), ("5:10", 130)],
    ],
)
def test_sparsegpt_equals_explicit_optimal_brain_surgery(text: str, columns: int) -> None:
    weight, inputs = weight_of(6, columns), inputs_of(400, columns)
    pruned = prune("sparsegpt", weight, inputs, text)
    wanted, mask, _ = sparsegpt_oracle(weight, inputs, text)
    assert exact_count(pruned.mask, Pattern.parse(text))
    assert torch.equal(pruned.mask, mask)
    assert relative(pruned.weight, wanted) < 1e-4
    assert pruned.numbers == {"damping": 0.01}


@pytest.mark.parametrize("text", ["2:4", "50%", "50%/tensor"])
def test_sparsegpt_with_dead_inputs_equals_the_oracle(text: str) -> None:
    weight, inputs = weight_of(6, 40), inputs_of(400, 40, dead=(0, 5, 6, 39))
    pruned = prune("sparsegpt", weight, inputs, text)
    wanted, mask, _ = sparsegpt_oracle(weight, inputs, text)
    assert torch.equal(pruned.mask, mask)
    assert relative(pruned.weight, wanted) < 1e-4
    assert (pruned.weight[:, [0, 5, 6, 39]] == 0).all()


@pytest.mark.parametrize("block", [1, 16, 20, 64, 1000])
def test_sparsegpt_block_decides_only_where_unstructured_masks_are_made(block: int) -> None:
    weight, inputs = weight_of(6, 72), inputs_of(400, 72)
    grouped = prune("sparsegpt", weight, inputs, "2:4", block=block)
    assert torch.equal(grouped.mask, prune("sparsegpt", weight, inputs, "2:4").mask)
    wanted = sparsegpt_oracle(weight, inputs, "50%", block=block)
    unstructured = prune("sparsegpt", weight, inputs, "50%", block=block)
    assert torch.equal(unstructured.mask, wanted[1])
    assert relative(unstructured.weight, wanted[0]) < 1e-4


@pytest.mark.parametrize("text", ["50%/tensor", "50%", "37%"])
def test_sparsegpt_with_independent_inputs_is_magnitude_block_by_block(text: str) -> None:
    weight, pattern = weight_of(6, 200), Pattern.parse(text)
    pruned = prune("sparsegpt", weight, 5 * torch.eye(200), text)
    blocks = []
    for start, stop in [(0, 128), (128, 200)]:
        zeros = pattern.zeros(6, stop) - pattern.zeros(6, start)
        piece = weight[:, start:stop].abs()
        if pattern.scope == "row":
            blocks.append(best_of_rows(piece, stop - start - zeros // 6))
        else:
            blocks.append(best_of_rank(piece, piece.numel() - zeros))
    assert torch.equal(pruned.mask, torch.cat(blocks, dim=1))
    assert torch.equal(pruned.weight, weight * pruned.mask)


def test_sparsegpt_with_independent_inputs_and_groups_is_magnitude() -> None:
    weight = weight_of(6, 200)
    pruned = prune("sparsegpt", weight, 5 * torch.eye(200), "2:4")
    assert torch.equal(pruned.mask, best_of_group(weight.abs(), 2, 4))
    assert torch.equal(pruned.weight, weight * pruned.mask)


@pytest.mark.parametrize("text", ["2:4", "50%", "50%/tensor"])
def test_sparsegpt_loss_is_the_sum_of_what_each_removal_costs(text: str) -> None:
    # The identity ½ tr(D H Dᵀ) = Σ w² / (2 [H⁻¹]₀₀): exact, for any mask.
    weight, inputs = weight_of(6, 131 if "%" in text else 132), inputs_of(400, 132)
    inputs = inputs[:, : weight.shape[1]]
    pruned = prune("sparsegpt", weight, inputs, text)
    _, _, removals = sparsegpt_oracle(weight, inputs, text)
    hessian = sparsegpt_hessian(inputs, calibration_rows=2)
    assert loss(weight, pruned.weight, hessian) / 2 == pytest.approx(removals, rel=1e-4)


def test_sparsegpt_tells_the_damping_that_was_needed() -> None:
    weight, inputs = weight_of(6, 12), torch.ones(8, 12)  # a Gram matrix of rank 1, exactly
    assert prune("sparsegpt", weight, inputs, "2:4", damping=0.0).numbers["damping"] > 0


# -------------------------------------------------------------------------------------- alps


@pytest.mark.parametrize(
    ("text", "seed"),
    # Over the tensor, seed 0 meets scores at the cut that differ by 1e-5, which float32 swaps.
    [("2:4", 0), ("4:8", 0), ("50%", 0), ("50%/tensor", 1)],
)
@pytest.mark.parametrize("iterations", [1, 3, 6, 12, 300])
def test_alps_support_equals_admm_with_explicit_inverses(
    text: str, seed: int, iterations: int
) -> None:
    weight, inputs = weight_of(48, 96, seed), inputs_of(600, 96, seed)
    pruned = prune("alps", weight, inputs, text, iterations=iterations)
    gram = damped(inputs.double().T @ inputs.double(), 0.01)
    mask, steps = alps_mask(weight, gram, Pattern.parse(text).mask, iterations)
    assert torch.equal(pruned.mask, mask)
    assert pruned.numbers == {"admm_steps": steps}


@pytest.mark.parametrize("text", ["2:4", "50%"])
@pytest.mark.parametrize("penalty", [5, 100, 1000])
@pytest.mark.parametrize("iterations", [9, 15, 300])
def test_alps_softens_a_penalty_that_holds_the_support(
    text: str, penalty: float, iterations: int
) -> None:
    weight, inputs = weight_of(12, 96), inputs_of(600, 96)
    pruned = prune("alps", weight, inputs, text, penalty=penalty, iterations=iterations)
    gram = damped(inputs.double().T @ inputs.double(), 0.01)
    mask, steps = alps_mask(weight, gram, Pattern.parse(text).mask, iterations, penalty)
    assert torch.equal(pruned.mask, mask)
    assert pruned.numbers == {"admm_steps": steps}


@every_pattern
def test_alps_weights_are_least_squares_on_the_support(text: str) -> None:
    weight, inputs = weight_of(48, 96), inputs_of(600, 96)
    pruned = prune("alps", weight, inputs, text)
    gram = damped(inputs.double().T @ inputs.double(), 0.01)
    best = loss(weight, least_squares_on(weight, pruned.mask, gram), gram)
    assert best * (1 - 1e-6) <= loss(weight, pruned.weight, gram) <= best * 1.001


@pytest.mark.parametrize("iterations", [1, 2, 3, 10, 40])
@every_pattern
def test_alps_never_leaves_the_pattern(text: str, iterations: int) -> None:
    pruned = prune("alps", weight_of(10, 64), inputs_of(200, 64), text, iterations=iterations)
    assert exact_count(pruned.mask, Pattern.parse(text))
    assert (pruned.weight[~pruned.mask] == 0).all()


@pytest.mark.parametrize("text", ["4:8", "3:8", "5:10"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_alps_is_near_the_best_of_all_supports(text: str, seed: int) -> None:
    # Recorded here: ALPS 1.01 to 1.16 times the optimum, SparseGPT 1.39 to 2.99.
    keep, columns = map(int, text.split(":"))
    weight, inputs = weight_of(16, columns, seed), inputs_of(100, columns, seed)
    gram = damped(inputs.double().T @ inputs.double(), 0.01)
    best = best_support_loss(weight, keep, gram)
    share = {
        name: loss(weight, prune(name, weight, inputs, text).weight, gram) / best
        for name in ("alps", "sparsegpt")
    }
    assert 1 - 1e-6 <= share["alps"] < 1.25
    assert share["sparsegpt"] > 1.25


@every_pattern
def test_alps_leaves_a_weight_that_has_the_pattern_already(text: str) -> None:
    # Its support never changes, so the penalty only falls: the steps must end all the same.
    weight, inputs = weight_of(24, 64), inputs_of(200, 64)
    sparse = prune("wanda", weight, inputs, text)
    pruned = prune("alps", sparse.weight, inputs, text)
    assert torch.equal(pruned.mask, sparse.mask)
    assert relative(pruned.weight, sparse.weight) < 1e-4
    assert pruned.numbers["admm_steps"] <= 33  # the first look at the support after step 30


# --------------------------------------------------------------------------------- comparison


@pytest.mark.parametrize("text", ["2:4", "4:8", "50%", "50%/tensor"])
def test_error_falls_from_magnitude_over_wanda_and_sparsegpt_to_alps(text: str) -> None:
    # No theorem. Recorded here as shares of the output for 2:4: 0.120, 0.051, 0.025, 0.011;
    # the ratio of neighbours is at most 0.71 in all four patterns.
    weight, inputs = weight_of(48, 96), inputs_of(600, 96)
    gram = inputs.double().T @ inputs.double()
    errors = [
        loss(weight, prune(name, weight, inputs, text).weight, gram)
        for name in ("magnitude", "wanda", "sparsegpt", "alps")
    ]
    for worse, better in pairwise(errors):
        assert better < 0.8 * worse


def test_norms_are_enough_for_methods_that_ask_for_norms() -> None:
    weight, inputs = weight_of(24, 64), inputs_of(200, 64)
    for name in ("wanda", "nowag", "ria"):
        pruner = methods.load("pruners", name, {})
        norms = sums_of(inputs, Stats.NORMS)
        from_norms = pruner.prune(weight, norms, Pattern.parse("2:4")).mask
        assert torch.equal(from_norms, prune(name, weight, inputs, "2:4").mask)
