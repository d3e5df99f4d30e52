"""The rules of AST and CAST against their formulas."""

import pytest
import torch
from torch import nn

from sparsekit.recovery.methods import Rule
from sparsekit.recovery.methods.ast import Annealed
from sparsekit.recovery.methods.cast import Continuous
from sparsekit.recovery.optimizer import MaskedAdam, Settings
from sparsekit.recovery.sparse_weight import SparseWeight
from sparsekit.weights.patterns import Pattern

SETTINGS = Settings(clip=0)
B1, B2, EPSILON = SETTINGS.beta1, SETTINGS.beta2, SETTINGS.epsilon
TWO_OF_FOUR = Pattern(keep=2, group=4)


def start(rule: Rule, seed: int = 0) -> tuple[MaskedAdam, SparseWeight]:
    plain = nn.Parameter(torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)))
    weight = SparseWeight.of(plain, TWO_OF_FOUR, rule=rule)
    return MaskedAdam({"w": weight}, {}, rule, SETTINGS), weight


def gradient(step: int) -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(100 + step))


@pytest.mark.parametrize("rule", [Annealed(1e-2, 0.25, coupled=False), Continuous(1e-2)])
def test_without_gradients_kept_entries_stay_and_the_others_go_toward_zero(rule):
    """Fails with the sign of the released GPT-2 code."""
    mine, weight = start(rule)
    for step in range(1, 6):
        before = weight.weight.clone()
        weight.parameter.grad = torch.zeros(4, 8)
        mine.step(1e-3, step / 10)
        moved = weight.weight - before
        assert int((moved != 0).sum()) == 16  # half of the entries, in every step
        assert torch.equal(weight.weight[weight.mask], before[weight.mask])
        assert (moved * before.sign() < 0)[~weight.mask].all()


class Released(Annealed):
    """The decay of the released GPT-2 code: `~` of a 1 is -2, of a 0 it is -1."""

    def _decayed(self, moment, weight, mask, done):
        return moment + self.strength(done) * ~mask.int() * weight


def test_the_sign_of_the_released_code_would_be_found():
    """Control of the test above."""
    with pytest.raises(AssertionError):
        test_without_gradients_kept_entries_stay_and_the_others_go_toward_zero(
            Released(1e-2, 0.25, coupled=False)
        )


@pytest.mark.parametrize("rule", [Annealed(1e-2, 0.25, coupled=False), Continuous(1e-2)])
def test_an_entry_at_zero_stays_there_without_a_gradient(rule):
    mine, weight = start(rule)
    weight.weight[~weight.mask] = 0.0
    weight.parameter.grad = torch.zeros(4, 8)
    mine.step(1e-3, 0.5)
    assert not weight.weight[~weight.mask].any()


def test_strength_of_ast_rises_to_its_plateau():
    """λ depends on the share of the optimizer's steps."""
    rule = Annealed(1e-4, 0.25, coupled=False)
    assert rule.strength(0.0) == 0
    assert rule.strength(0.125) == pytest.approx(5e-5)
    assert [rule.strength(done) for done in (0.25, 0.5, 0.99)] == [1e-4] * 3


def test_three_steps_of_ast_are_those_of_the_formulas():
    """The decay enters the second moment, not the stored first moment."""
    rule = Annealed(1e-1, 0.5, coupled=False)
    mine, weight = start(rule)
    w, off = weight.weight.double().clone(), (~weight.mask).double()
    mean = square = torch.zeros(4, 8, dtype=torch.float64)
    for step in range(3):
        g, strength = gradient(step).double(), 1e-1 * min(1.0, step / 4 / 0.5)
        mean = B1 * mean + (1 - B1) * g
        u = mean + strength * off * w
        square = B2 * square + (1 - B2) * u * u
        size = (square / (1 - B2 ** (step + 1))).sqrt() + EPSILON
        w = w - 1e-2 * u / (1 - B1 ** (step + 1)) / size
        weight.parameter.grad = gradient(step)
        mine.step(1e-2, step / 4)
    state = mine.state()
    torch.testing.assert_close(state["w.weight"].double(), w, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(state["w.mean"].double(), mean, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(state["w.square"].double(), square, rtol=1e-6, atol=1e-9)


def test_coupled_decay_is_part_of_the_gradient_of_adamw():
    mine, weight = start(Annealed(1e-1, 0.0, coupled=True))
    w, off = weight.weight.clone(), ~weight.mask
    theirs = nn.Parameter(w)
    reference = torch.optim.AdamW([theirs], lr=1e-2, betas=(B1, B2), eps=EPSILON, weight_decay=0)
    for step in range(3):
        theirs.grad = gradient(step) + 1e-1 * off * theirs.data
        weight.parameter.grad = gradient(step)
        mine.step(1e-2, step / 3)
        reference.step()
    torch.testing.assert_close(weight.weight, theirs.data, rtol=1e-5, atol=1e-7)


def test_first_step_of_cast_does_not_know_the_mask():
    mine, weight = start(Continuous(1e-1))
    other, free = start(Continuous(1e-1))
    free.mask = torch.ones(4, 8, dtype=torch.bool)
    for one, optimizer in ((weight, mine), (free, other)):
        one.parameter.grad = gradient(0)
        optimizer.step(1e-2, 0.0)
    assert torch.equal(weight.weight, free.weight)


@pytest.mark.parametrize("spans", [0, 2])
def test_cast_computes_with_all_entries_whatever_the_mask_is(spans):
    """After everything that writes the parameter: creation, a step at rate 0, a mask selection."""
    plain = nn.Parameter(gradient(1))
    dense = plain.detach().clone()
    weight = SparseWeight.of(plain, TWO_OF_FOUR, rule=Continuous(1e-2), spans=spans)
    mine = MaskedAdam({"w": weight}, {}, Continuous(1e-2), SETTINGS)
    assert torch.equal(plain, dense)
    weight.mask = ~weight.mask
    plain.grad = gradient(0)
    mine.step(0.0, 0.5)
    assert torch.equal(plain, dense)
    assert mine.refresh() == 32
    assert torch.equal(plain, dense)


def test_three_steps_of_cast_are_those_of_the_formulas():
    """a is the share of the steps; the stored first moment is that of the raw gradient."""
    mine, weight = start(Continuous(1e-1))
    w, mask = weight.weight.double().clone(), weight.mask.clone()
    mean = square = torch.zeros(4, 8, dtype=torch.float64)
    for step in range(3):
        a = step / 3
        mean = B1 * mean + (1 - B1) * gradient(step).double()
        mixed = torch.where(mask, mean, (1 - a) * mean + a * 1e-1 * w.sign())
        square = B2 * square + (1 - B2) * mixed**2
        size = (square / (1 - B2 ** (step + 1))).sqrt() + EPSILON
        w = w - 1e-2 * mixed / (1 - B1 ** (step + 1)) / size
        weight.parameter.grad = gradient(step)
        mine.step(1e-2, a)
    state = mine.state()
    torch.testing.assert_close(state["w.weight"].double(), w, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(state["w.mean"].double(), mean, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(state["w.square"].double(), square, rtol=1e-6, atol=1e-9)


def test_the_pull_of_cast_is_whole_at_the_end_and_not_more():
    rule, weight = Continuous(0.3), torch.tensor([[1.0, -2.0, 0.0, 3.0]])
    mask = torch.tensor([[False, False, False, True]])
    found = rule.mix(torch.ones(1, 4), weight, mask, 7.0)
    torch.testing.assert_close(found, torch.tensor([[0.3, -0.3, 0.0, 1.0]]))


def test_second_moment_of_cast_without_gradients_is_that_of_the_pull():
    mine, weight = start(Continuous(1e-2))
    weight.parameter.grad = torch.zeros(4, 8)
    mine.step(1e-3, 0.5)
    square = mine.state()["w.square"]
    assert (square[~weight.mask] > 0).all()
    assert not square[weight.mask].any()


@pytest.mark.parametrize("decay", [1e-6, 1e-4, 1e-2])
def test_a_late_step_of_cast_has_the_size_of_the_rate_whatever_the_strength(decay):
    mine, weight = start(Continuous(decay))
    for step in range(60):
        before = weight.weight.clone()
        weight.parameter.grad = torch.zeros(4, 8)
        mine.step(1e-5, step / 60)
    moved = (weight.weight - before)[~weight.mask].abs() / 1e-5
    assert ((moved > 0.9) & (moved < 1.8)).all()
