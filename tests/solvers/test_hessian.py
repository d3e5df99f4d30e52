"""The Hessian factor and the solver, against explicit inverses and normal equations in float64."""

import pytest
import torch
from oracles import (
    damped,
    inputs_of,
    least_squares_on,
    loss,
    sparsegpt_hessian,
    sums_of,
    weight_of,
)
from refusals import refused

from sparsekit.errors import NumericalError
from sparsekit.solvers.hessian import HessianFactor, factorise, solve_on_support, unit_gram
from sparsekit.solvers.input_stats import InputStats, Stats
from sparsekit.weights.patterns import Pattern

pytestmark = pytest.mark.usefixtures("one_thread")


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


# -------------------------------------------------------------------------------------- factor


def product(factor: HessianFactor) -> torch.Tensor:
    """A diag(c) Aᵀ in float64."""
    compensation = factor.compensation.double()
    return compensation @ factor.pivot.double().diag() @ compensation.T


@pytest.mark.parametrize("columns", [1, 5, 40, 131])
@pytest.mark.parametrize("damping", [0.01, 0.1])
def test_factor_is_unit_upper_and_multiplies_to_the_hessian(columns: int, damping: float) -> None:
    x = inputs_of(300, columns)
    factor = factorise(sums_of(x, calibration_rows=3), damping)
    assert torch.equal(factor.compensation, factor.compensation.triu())
    assert torch.equal(factor.compensation.diagonal(), torch.ones(columns))
    assert (factor.pivot > 0).all()
    assert relative(product(factor), sparsegpt_hessian(x, 3, damping)) < 1e-5
    assert factor.damping == damping
    assert not factor.dead.any()


def test_factor_is_the_inverse_of_the_surgeon_steps_of_the_trailing_matrix() -> None:
    x = inputs_of(200, 24)
    factor = factorise(sums_of(x), 0.01)
    hessian = sparsegpt_hessian(x, 2)
    directions = torch.zeros(24, 24, dtype=torch.float64)
    for i in range(24):
        inverse = torch.linalg.inv(hessian[i:, i:])
        # The published score is W² / U_ii², and U_ii² is this entry.
        assert float(factor.pivot[i]) == pytest.approx(1 / float(inverse[0, 0]), rel=1e-4)
        directions[i, i:] = inverse[0] / inverse[0, 0]
    found = factor.compensation.double() @ directions
    torch.testing.assert_close(found, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-4)


def test_factor_with_dead_inputs_treats_them_as_independent() -> None:
    x = inputs_of(200, 24, dead=(0, 7, 23))
    factor = factorise(sums_of(x), 0.01)
    assert factor.dead.nonzero().flatten().tolist() == [0, 7, 23]
    assert relative(product(factor), sparsegpt_hessian(x, 2)) < 1e-5
    assert torch.equal(factor.compensation[7], torch.eye(24)[7])
    assert torch.equal(factor.compensation[:, 7], torch.eye(24)[7])


def test_factor_of_all_dead_inputs_is_finite() -> None:
    factor = factorise(sums_of(torch.zeros(10, 6)), 0.01)
    assert factor.dead.all()
    # H is the identity and its damping 0.01.
    assert torch.equal(factor.compensation, torch.eye(6))
    torch.testing.assert_close(factor.pivot, torch.full((6,), 1.01))


def test_rank_deficient_gram_raises_and_reports_the_damping() -> None:
    # All inputs equal: the second pivot of the Gram matrix is exactly zero.
    factor = factorise(sums_of(torch.ones(8, 12)), 0.0)
    assert factor.damping == pytest.approx(1e-4)
    assert relative(product(factor), sparsegpt_hessian(torch.ones(8, 12), 2, 1e-4)) < 1e-5


def test_fewer_tokens_than_inputs_work_with_the_default_damping() -> None:
    x = inputs_of(5, 64)
    factor = factorise(sums_of(x), 0.01)
    assert relative(product(factor), sparsegpt_hessian(x, 2, factor.damping)) < 1e-5


def test_hopeless_gram_is_an_error_after_the_last_damping() -> None:
    sums = InputStats(3, Stats.GRAM)
    sums.update(torch.eye(3))
    sums.gram.copy_(torch.tensor([[1.0, 9, 0], [9, 1, 0], [0, 0, 1]]))  # not a Gram matrix
    with refused("not-positive-definite", "3 tokens", kind=NumericalError):
        factorise(sums, 0.01)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("use", [factorise, unit_gram])
def test_inputs_that_are_not_finite_are_refused(value: float, use) -> None:
    x = inputs_of(20, 6)
    x[3, 2] = value
    with refused("not-finite", "--dtype float32", kind=NumericalError):
        use(sums_of(x), 0.01)


def test_factor_and_unit_gram_are_shared_by_damping_and_leave_the_sums_alone() -> None:
    sums = sums_of(inputs_of(60, 12, dead=(3,)))
    gram = sums.gram.clone()
    assert factorise(sums, 0.01) is factorise(sums, 0.01)
    assert factorise(sums, 0.01) is not factorise(sums, 0.02)
    assert unit_gram(sums, 0.01) is unit_gram(sums, 0.01)
    assert unit_gram(sums, 0.01) is not unit_gram(sums, 0.02)
    assert torch.equal(sums.gram, gram)
    before = factorise(sums, 0.01)
    sums.update(inputs_of(5, 12))
    assert factorise(sums, 0.01) is not before


def test_unit_gram_has_a_unit_diagonal_and_scales_back() -> None:
    x = inputs_of(60, 12)
    sums = sums_of(x)
    system = unit_gram(sums, 0.01)
    torch.testing.assert_close(system.gram.diagonal(), torch.ones(12))
    back = system.gram.double() * system.scale[:, None] * system.scale
    assert relative(back, damped(x.double().T @ x.double(), 0.01)) < 1e-5


# ---------------------------------------------------------------------------- solve on support


@pytest.mark.parametrize("text", ["2:4", "1:4", "50%", "37%", "50%/tensor"])
@pytest.mark.parametrize("start", ["dense", "random"])
def test_solution_equals_the_normal_equations(text: str, start: str) -> None:
    x, weight = inputs_of(400, 32), weight_of(9, 32)
    sums = sums_of(x)
    mask = Pattern.parse(text).mask(weight.abs())
    begin = None if start == "dense" else weight_of(9, 32, seed=5)
    solved = solve_on_support(
        weight, mask, unit_gram(sums, 0.01), start=begin, iterations=200, tolerance=1e-6
    )
    wanted = least_squares_on(weight, mask, damped(sums.gram, 0.01))
    assert relative(solved, wanted) < 1e-3
    assert solved.dtype == torch.float32
    assert torch.equal(solved != 0, mask)


@pytest.mark.parametrize("iterations", [0, 1, 2, 3, 10])
def test_every_step_lowers_the_loss_and_none_goes_below_the_optimum(iterations: int) -> None:
    x, weight = inputs_of(400, 32), weight_of(9, 32)
    sums = sums_of(x)
    gram = damped(sums.gram, 0.01)
    mask = Pattern.parse("2:4").mask(weight.abs())

    def after(steps: int) -> torch.Tensor:
        return solve_on_support(
            weight, mask, unit_gram(sums, 0.01), iterations=steps, tolerance=0.0
        )

    found, longer = after(iterations), after(iterations + 1)
    best = least_squares_on(weight, mask, gram)
    for row in range(9):
        begun = loss(weight[row : row + 1], weight[row : row + 1] * mask[row], gram)
        reached = loss(weight[row : row + 1], found[row : row + 1], gram)
        further = loss(weight[row : row + 1], longer[row : row + 1], gram)
        optimum = loss(weight[row : row + 1], best[row : row + 1], gram)
        assert optimum * (1 - 1e-6) <= further <= reached * (1 + 1e-6)
        assert reached <= begun * (1 + 1e-6)


# Three steps, and enough to be done: in between, conjugate gradients magnify the rounding, which
# differs between a product with one row and one with nine.
@pytest.mark.parametrize(("iterations", "tolerance"), [(3, 1e-5), (100, 1e-3)])
def test_rows_are_solved_independently(iterations: int, tolerance: float) -> None:
    sums, weight = sums_of(inputs_of(400, 32)), weight_of(9, 32)
    mask = Pattern.parse("50%/tensor").mask(weight.abs())

    def solve(rows: slice) -> torch.Tensor:
        system = unit_gram(sums, 0.01)
        return solve_on_support(weight[rows], mask[rows], system, iterations=iterations)

    together = solve(slice(None))
    for row in range(9):
        alone = solve(slice(row, row + 1))
        assert relative(together[row : row + 1], alone) < tolerance


def test_full_and_empty_supports() -> None:
    sums, weight = sums_of(inputs_of(400, 32)), weight_of(4, 32)
    mask = torch.zeros(4, 32, dtype=torch.bool)
    mask[:2] = True
    solved = solve_on_support(weight, mask, unit_gram(sums, 0.01))
    torch.testing.assert_close(solved[:2], weight[:2])
    assert torch.equal(solved[2:], torch.zeros(2, 32))


def test_dead_inputs_keep_the_solution_finite() -> None:
    sums, weight = sums_of(inputs_of(400, 32, dead=(0, 9))), weight_of(4, 32)
    mask = Pattern.parse("2:4").mask(weight.abs())
    for damping in (0.0, 0.01):
        solved = solve_on_support(weight, mask, unit_gram(sums, damping))
        assert solved.isfinite().all()
        assert torch.equal(solved * ~mask, torch.zeros(4, 32))


def test_solver_changes_none_of_its_arguments() -> None:
    sums, weight, start = sums_of(inputs_of(90, 32)), weight_of(4, 32), weight_of(4, 32, seed=2)
    mask = Pattern.parse("2:4").mask(weight.abs())
    system = unit_gram(sums, 0.01)
    kept = [t.clone() for t in (weight, mask, start, system.gram, system.scale)]
    solve_on_support(weight, mask, system, start=start)
    for before, after in zip(kept, (weight, mask, start, system.gram, system.scale), strict=True):
        assert torch.equal(before, after)
