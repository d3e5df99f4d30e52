"""The steps of the block fit against dense formulas, least squares and brute force, in float64.

The loss that a step may reach is known: no step may raise it, each of A and B alone is a
least-squares problem, and for one group all supports can be tried. Formulas here are written for
whole matrices, with A and B put together from their blocks; they share no code with the package.
"""

from itertools import combinations

import pytest
import torch
from oracles import inputs_of, sums_of, weight_of
from torch import Tensor

from sparsekit import registry as methods
from sparsekit.solvers.armor_als import BlockFit
from sparsekit.solvers.input_stats import Stats
from sparsekit.solvers.nowag_scaling import importance, normalise
from sparsekit.weights.block_diagonal import times_left, times_right
from sparsekit.weights.patterns import Pattern

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, COLUMNS = 32, 48
# A loss is a float32 sum of at most 48 * 48 * 32 products in units of its first value.
ROUNDING = 1e-5
PATTERNS = {"2:4": (2, 4), "1:4": (1, 4), "4:8": (4, 8)}

every_metric = pytest.mark.parametrize("kind", ["even", "uneven"])


def metric_of(kind: str, columns: int = COLUMNS, seed: int = 0) -> Tensor:
    """The diagonal of H: that of random inputs, or one over two decades."""
    x = inputs_of(3 * columns, columns, seed)
    if kind == "uneven":
        x = x * torch.logspace(-1, 0, columns)[torch.randperm(columns, generator=seeded(seed))]
    return x.square().mean(0)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fit_of(
    kind: str,
    text: str = "2:4",
    block: int = 8,
    rows: int = ROWS,
    columns: int = COLUMNS,
    seed: int = 0,
) -> BlockFit:
    """A fit that begins with the largest weights of every group."""
    keep, group = PATTERNS[text]
    weight = weight_of(rows, columns, seed)
    core = weight * Pattern.parse(text).mask(weight.abs())
    metric = metric_of(kind, columns, seed)
    return BlockFit(weight, core, metric, block=block, keep=keep, group=group)


def moved(fit: BlockFit, seed: int = 5) -> BlockFit:
    """The fit with A and B away from identities."""
    generator = torch.Generator().manual_seed(seed)
    for side in (fit.left, fit.right):
        side += 0.3 * torch.randn(side.shape, generator=generator)
    return fit


def diagonal_of(blocks: Tensor) -> Tensor:
    """The block-diagonal matrix, float64."""
    return torch.block_diag(*blocks.double())


def dense_loss(fit: BlockFit, weight: Tensor, metric: Tensor) -> float:
    """tr((W − A S B) H (W − A S B)ᵀ) / tr(W H Wᵀ), float64."""
    w, h = weight.double(), metric.double().diag()
    error = w - diagonal_of(fit.left) @ fit.core.double() @ diagonal_of(fit.right)
    return float((error @ h @ error.T).trace() / (w @ h @ w.T).trace())


def root_of(metric: Tensor) -> Tensor:
    """R with R Rᵀ = H, float64."""
    return metric.double().sqrt().diag()


# -------------------------------------------------------------------------------------- the loss


@every_metric
def test_loss_is_the_dense_formula(kind: str) -> None:
    fit = moved(fit_of(kind))
    wanted = dense_loss(fit, weight_of(ROWS, COLUMNS), metric_of(kind))
    assert fit.loss() == pytest.approx(wanted, rel=1e-5)


@every_metric
def test_loss_of_an_empty_core_is_one(kind: str) -> None:
    weight = weight_of(ROWS, COLUMNS)
    fit = BlockFit(weight, torch.zeros_like(weight), metric_of(kind), block=8, keep=2, group=4)
    assert fit.loss() == pytest.approx(1, rel=1e-6)


def test_products_are_those_of_the_block_diagonal_matrices() -> None:
    fit = moved(fit_of("uneven"))
    left, right, core = diagonal_of(fit.left), diagonal_of(fit.right), fit.core.double()
    for found, wanted in [
        (times_left(fit.left, fit.core), left @ core),
        (times_right(fit.core, fit.right), core @ right),
        (fit.product(), left @ core @ right),
    ]:
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)


def test_start_is_nowag() -> None:
    """Identity factors and NoWag's mask: the loss is the weighted share of what it removes."""
    weight, sums = weight_of(ROWS, COLUMNS), sums_of(inputs_of(200, COLUMNS), Stats.NORMS)
    pruned = methods.load("pruners", "nowag", {}).prune(weight, sums, Pattern.parse("2:4"))
    normal, columns, rows = normalise(weight, 1e-5)
    core, h = pruned.weight / columns / rows[:, None], importance(sums.squares)
    fit = BlockFit(normal, core, h, block=8, keep=2, group=4)
    scores = normal.double().square() * h.double()
    wanted = float(scores[~pruned.mask].sum() / scores.sum())
    assert fit.loss() == pytest.approx(wanted, rel=1e-5)
    assert torch.equal(fit.core != 0, pruned.mask)


# --------------------------------------------------------------------------------- what may rise


@every_metric
@pytest.mark.parametrize(
    ("text", "block"),
    [("2:4", 4), ("2:4", 8), ("2:4", 16), ("1:4", 4), ("1:4", 16), ("4:8", 8), ("4:8", 16)],
)
def test_no_single_step_raises_the_loss(kind: str, text: str, block: int) -> None:
    """Six sweeps step by step; the sweep that follows each of them extrapolates as well."""
    fit, weight, metric = fit_of(kind, text, block), weight_of(ROWS, COLUMNS), metric_of(kind)
    keep, group = PATTERNS[text]
    last = first = dense_loss(fit, weight, metric)
    for number in range(6):
        for name in ("fit_left", "fit_right", "fit_core", "sweep"):
            getattr(fit, name)()
            loss = dense_loss(fit, weight, metric)
            assert loss <= last + ROUNDING * first, f"{name} of sweep {number}: {last} to {loss}"
            last = loss
            kept = (fit.core != 0).unflatten(1, (-1, group)).sum(-1)
            assert (kept == keep).all(), name
    assert last < 0.6 * first


@every_metric
def test_sweep_gives_the_loss_that_is_reached(kind: str) -> None:
    fit, weight, metric = fit_of(kind), weight_of(ROWS, COLUMNS), metric_of(kind)
    for _ in range(6):
        assert fit.sweep() == pytest.approx(dense_loss(fit, weight, metric), rel=1e-4)


@every_metric
def test_extrapolation_is_taken_and_helps(kind: str) -> None:
    """The steps alone reach less; the first sweep has nothing to extrapolate."""
    fit, plain, taken = fit_of(kind), fit_of(kind), []
    plain._extrapolate = lambda loss: loss
    for _ in range(6):
        taken.append((fit.sweep(), plain.sweep()))
    assert taken[0][0] == taken[0][1]
    assert taken[-1][0] < 0.99 * taken[-1][1]


@every_metric
def test_extrapolation_leaves_the_support(kind: str) -> None:
    fit = fit_of(kind)
    supports = []
    further = fit._extrapolate

    def watched(loss: float) -> float:
        before = fit.core != 0
        found = further(loss)
        supports.append(torch.equal(before, fit.core != 0))
        return found

    fit._extrapolate = watched
    for _ in range(6):
        fit.sweep()
    assert supports == [True] * 6


@every_metric
def test_next_sweep_does_not_move_where_the_last_one_ended(kind: str) -> None:
    """The step starts from the old factors: an update in place would hide part of it."""
    fit = fit_of(kind)
    fit.sweep()
    ended = [t.clone() for t in fit._before]
    for name in ("fit_left", "fit_right", "fit_core"):
        getattr(fit, name)()
        assert all(torch.equal(*pair) for pair in zip(ended, fit._before, strict=True)), name


def test_what_it_is_given_is_not_changed() -> None:
    weight, metric = weight_of(ROWS, COLUMNS), metric_of("uneven")
    core = weight * Pattern.parse("2:4").mask(weight.abs())
    given = (weight, core, metric)
    before = [tensor.clone() for tensor in given]
    fit = BlockFit(*given, block=8, keep=2, group=4)
    for _ in range(3):
        fit.sweep()
    assert all(torch.equal(*pair) for pair in zip(given, before, strict=True))


def test_same_input_gives_the_same_bits() -> None:
    found = []
    for _ in range(2):
        fit = fit_of("uneven")
        for _ in range(4):
            fit.sweep()
        found.append((fit.left, fit.core, fit.right))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


# ------------------------------------------------------------------------------ exact solutions


@every_metric
@pytest.mark.parametrize("block", [4, 16])
def test_left_step_is_least_squares(kind: str, block: int) -> None:
    """For each block row: A[j] (S B R)[j] nearest to (W R)[j]."""
    fit, weight, root = moved(fit_of(kind, block=block)), weight_of(ROWS, COLUMNS), None
    root = root_of(metric_of(kind))
    reached = fit.core.double() @ diagonal_of(fit.right) @ root
    fit.fit_left()
    for j, found in enumerate(fit.left):
        rows = slice(j * block, (j + 1) * block)
        wanted = torch.linalg.lstsq(reached[rows].T, (weight.double()[rows] @ root).T).solution.T
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-4)


@every_metric
@pytest.mark.parametrize("block", [4, 16])
def test_right_step_is_least_squares(kind: str, block: int) -> None:
    """For each column of a block; the weights of the columns cancel."""
    fit, weight = moved(fit_of(kind, block=block)), weight_of(ROWS, COLUMNS)
    reached = diagonal_of(fit.left) @ fit.core.double()
    fit.fit_right()
    for k, found in enumerate(fit.right):
        columns = slice(k * block, (k + 1) * block)
        wanted = torch.linalg.lstsq(reached[:, columns], weight.double()[:, columns]).solution
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-4)


def best_group(
    left: Tensor,  # the row's column of A, [b] float64
    right: Tensor,  # the group's rows of B R, [M, in] float64
    lack: Tensor,  # what the product lacks without the group, times R
    keep: int,
) -> Tensor:
    """The values `[M]` of a group, from least squares on every support."""
    best, values = torch.inf, torch.zeros(len(right), dtype=torch.float64)
    for support in map(list, combinations(range(len(right)), keep)):
        system = torch.stack([torch.outer(left, right[s]).flatten() for s in support], 1)
        solved = torch.linalg.lstsq(system, lack.flatten()[:, None]).solution[:, 0]
        loss = float((system @ solved - lack.flatten()).square().sum())
        if loss < best:
            best, values = loss, torch.zeros_like(values)
            values[support] = solved
    return values


@every_metric
@pytest.mark.parametrize(("text", "b"), [("2:4", 4), ("1:4", 4), ("4:8", 8), ("2:4", 8)])
def test_core_step_of_one_block_tries_all_supports(kind: str, text: str, b: int) -> None:
    """Each group gets the best support and the values of least squares.

    Rows, and groups in a row, follow one another, each with those before it as they have become.
    """
    keep, group = PATTERNS[text]
    changed = 0
    for seed in range(3):
        fit = moved(fit_of(kind, text, b, b, b, seed), seed)
        weight, root = weight_of(b, b, seed).double(), root_of(metric_of(kind, b, seed))
        left, right = fit.left[0].double(), fit.right[0].double() @ root
        core = fit.core.double().clone()
        before = core != 0
        fit.fit_core()
        for i in range(b):
            for start in range(0, b, group):
                places = slice(start, start + group)
                core[i, places] = 0
                lack = weight @ root - left @ core @ right
                core[i, places] = best_group(left[:, i], right[places], lack, keep)
        torch.testing.assert_close(fit.core.double(), core, rtol=1e-3, atol=1e-3)
        changed += int(((core != 0) & ~before).sum())
    assert changed > 0


@every_metric
def test_more_room_in_the_blocks_reaches_a_lower_loss(kind: str) -> None:
    reached = []
    for block in (4, 8, 16):
        fit = fit_of(kind, block=block)
        reached.append([fit.sweep() for _ in range(6)][-1])
    assert reached[2] < reached[1] < reached[0]


# ------------------------------------------------------------------------------ singular problems


@every_metric
def test_block_may_be_a_single_group(kind: str) -> None:
    fit = fit_of(kind, "4:8", block=8, rows=8, columns=8)
    first = fit.loss()
    assert [fit.sweep() for _ in range(6)][-1] < first
    assert ((fit.core != 0).sum(1) == 4).all()


@every_metric
def test_parallel_rows_of_a_block_are_solved(kind: str) -> None:
    """Inputs 0 and 1 of a block act alike: every support with both is singular."""
    fit, weight, metric = fit_of(kind), weight_of(ROWS, COLUMNS), metric_of(kind)
    fit.fit_core()
    fit.right[0, 1] = 2 * fit.right[0, 0]
    before = dense_loss(fit, weight, metric)
    fit.fit_core()
    assert fit.core.isfinite().all()
    assert dense_loss(fit, weight, metric) <= before + ROUNDING
    assert ((fit.core != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all()


@every_metric
def test_rows_that_are_zero_in_a_block_are_solved(kind: str) -> None:
    fit, weight, metric = fit_of(kind), weight_of(ROWS, COLUMNS), metric_of(kind)
    fit.right[0, 1] = 0
    before = dense_loss(fit, weight, metric)
    fit.fit_core()
    assert fit.core.isfinite().all()
    assert dense_loss(fit, weight, metric) <= before + ROUNDING


@every_metric
def test_whole_group_without_effect_gives_finite_values(kind: str) -> None:
    fit, weight, metric = fit_of(kind), weight_of(ROWS, COLUMNS), metric_of(kind)
    fit.right[0, :4] = 0
    before = dense_loss(fit, weight, metric)
    fit.fit_core()
    assert fit.core.isfinite().all()
    assert dense_loss(fit, weight, metric) <= before + ROUNDING


@every_metric
@pytest.mark.parametrize("what", ["row", "block row", "column", "group", "block column", "all"])
def test_zeros_of_the_weight_do_no_harm(kind: str, what: str) -> None:
    weight, metric = weight_of(ROWS, COLUMNS), metric_of(kind)
    parts = {"row": 3, "block row": slice(8, 16), "all": slice(None)}
    columns = {"column": 5, "group": slice(4, 8), "block column": slice(8, 16)}
    if what in parts:
        weight[parts[what]] = 0
    else:
        weight[:, columns[what]] = 0
    core = weight * Pattern.parse("2:4").mask(weight.abs())
    fit = BlockFit(weight, core, metric, block=8, keep=2, group=4)
    losses = [fit.loss(), *(fit.sweep() for _ in range(4))]
    assert all(t.isfinite().all() for t in (fit.left, fit.right, fit.core))
    assert ((fit.core != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all()
    if what == "all":
        assert losses == [0.0] * 5
        assert not fit.product().any()
    else:
        assert losses[-1] < losses[0]
    product, most = fit.product().abs(), 1e-4 * weight_of(ROWS, COLUMNS).abs().max()
    if what in parts:
        assert product[parts[what]].max() < most
    else:
        assert product[:, columns[what]].max() < most


@every_metric
def test_row_of_zeros_in_the_core_leaves_its_column_of_a_where_it_was(kind: str) -> None:
    """The data does not determine it: it must neither diverge nor disturb the others."""
    fit = moved(fit_of(kind))
    fit.core[3] = 0
    before = fit.left[0, :, 3].clone()
    fit.fit_left()
    assert fit.left.isfinite().all()
    torch.testing.assert_close(fit.left[0, :, 3], before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scales_of_the_weight_and_the_metric_cancel(scale: float) -> None:
    weight, metric = weight_of(ROWS, COLUMNS), metric_of("uneven")
    core = weight * Pattern.parse("2:4").mask(weight.abs())
    losses = []
    for size, factor in ((1.0, 1.0), (scale, 1.0), (1.0, scale)):
        fit = BlockFit(size * weight, size * core, factor * metric, block=8, keep=2, group=4)
        losses.append([fit.sweep() for _ in range(3)][-1])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert losses[2] == pytest.approx(losses[0], rel=2e-2)
