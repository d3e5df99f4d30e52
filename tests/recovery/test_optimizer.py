"""The one optimizer: AdamW where no rule acts, masks, scales, state."""

import pytest
import torch
from oracles import best_of_group
from refusals import refused
from torch import nn

from sparsekit.errors import NumericalError
from sparsekit.recovery import optimizer as maskedadam
from sparsekit.recovery.methods.ast import Annealed
from sparsekit.recovery.methods.cast import Continuous
from sparsekit.recovery.methods.fixed import Held
from sparsekit.recovery.optimizer import MaskedAdam, Settings
from sparsekit.recovery.sparse_weight import SparseWeight
from sparsekit.weights.packed import pack_bits, unpack_bits
from sparsekit.weights.patterns import Pattern

TWO_OF_FOUR = Pattern(keep=2, group=4)


class Hiding(Held):
    masks_forward = True
    updates_pruned = True


class Free(Held):
    updates_pruned = True


def parameter(*shape, seed=0):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def optimizer(weight, rule=None, others=None, **settings):
    return MaskedAdam({"w": weight}, others or {}, rule or Held(), Settings(**settings))


def test_the_masked_mean_is_that_of_the_averaged_gradient_off_the_masks():
    """Section 3.8: over three steps that change nothing, with the correction of the average."""
    weight = SparseWeight.of(parameter(4, 8), TWO_OF_FOUR, rule=Free())
    ours, average = optimizer(weight, Free(), clip=0.0), torch.zeros(4, 8)
    for step in range(3):
        gradient = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        weight.parameter.grad = gradient.clone()
        ours.step(0.0, 0.0)
        average = 0.9 * average + 0.1 * gradient
    wanted = average[~weight.mask].square().mean().sqrt() / (1 - 0.9**3)
    assert ours.masked_mean() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("rule", [Held(), Annealed(1e-2, 0.25, coupled=False), Continuous(1e-2)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_what_is_not_sparse_follows_adamw_of_torch(weight_decay, rule):
    """Equal to 1e-7 over ten steps with the same gradients, next to a weight with the rule."""
    ours, theirs = parameter(6, 8), parameter(6, 8)
    reference = torch.optim.AdamW(
        [theirs], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay
    )
    sparse = SparseWeight.of(parameter(4, 8, seed=3), TWO_OF_FOUR, rule=rule)
    settings = Settings(weight_decay=weight_decay, clip=0)
    mine = MaskedAdam({"s": sparse}, {"w": ours}, rule, settings)
    for step in range(10):
        gradient = torch.randn(6, 8, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        sparse.parameter.grad = gradient[:4].clone()
        mine.step(1e-3, 0.5)
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


def test_scales_follow_adamw_of_torch_without_decay():
    """The scales of CAST, whose weights follow another rule."""
    sparse = SparseWeight.of(parameter(4, 8), TWO_OF_FOUR, rule=Continuous(1e-2), spans=2)
    theirs = nn.Parameter(sparse.scale.clone())
    reference = torch.optim.AdamW([theirs], lr=1e-3, betas=(0.9, 0.95), weight_decay=0)
    mine = optimizer(sparse, Continuous(1e-2), weight_decay=0.1, clip=0)
    for step in range(10):
        gradient = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        # By a scale: the sum over its span of the gradient by the product, times the weight.
        theirs.grad = (gradient * sparse.weight).unflatten(1, (2, 4)).sum(-1)
        sparse.parameter.grad = gradient
        mine.step(1e-3, 0.5)
        reference.step()
    torch.testing.assert_close(sparse.scale, theirs.data, rtol=0, atol=1e-6)
    assert not torch.equal(sparse.scale, torch.ones(4, 2))


def test_a_large_weight_is_stepped_piece_by_piece_as_a_whole(monkeypatch):
    """Also where the last piece is smaller."""
    found = []
    for entries in (1 << 18, 5 * 8):
        monkeypatch.setattr(maskedadam, "IN_CACHE", entries)
        weight = SparseWeight.of(parameter(32, 8), TWO_OF_FOUR, rule=Continuous(1e-2))
        other = parameter(13, 8, seed=1)
        mine = optimizer(weight, Continuous(1e-2), {"other": other})
        for step in range(3):
            draw = torch.Generator().manual_seed(step)
            weight.parameter.grad = torch.randn(32, 8, generator=draw)
            other.grad = torch.randn(13, 8, generator=draw)
            mine.step(1e-2, step / 3)
        found.append({name: tensor.clone() for name, tensor in mine.state().items()})
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-6, atol=0)


def test_clipping_is_that_of_torch_over_all_parameters():
    pairs = [(parameter(4, 8, seed=s), parameter(4, 8, seed=s)) for s in (1, 2)]
    reference = torch.optim.AdamW([b for _, b in pairs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0)
    mine = MaskedAdam({}, {str(i): a for i, (a, _) in enumerate(pairs)}, Held(), Settings())
    for a, b in pairs:
        a.grad = 5 * torch.ones(4, 8)
        b.grad = a.grad.clone()
    norm = nn.utils.clip_grad_norm_([b for _, b in pairs], 1.0)
    assert mine.step(1e-2, 0.0) == pytest.approx(norm.item())
    reference.step()
    for a, b in pairs:
        torch.testing.assert_close(a, b)


def test_pruned_entries_stay_exact_zeros_and_do_not_count_for_clipping():
    weight = SparseWeight.of(parameter(4, 8), TWO_OF_FOUR, rule=Held())
    mine = optimizer(weight)
    for _ in range(5):
        weight.parameter.grad = torch.where(weight.mask, 0.01, 100.0)
        assert mine.step(1e-2, 0.0) == pytest.approx(0.04)  # sqrt(16 · 0.01²)
    assert not weight.parameter[~weight.mask].any()
    assert weight.parameter[weight.mask].all()


def test_a_hidden_entry_is_not_in_the_models_weight_and_still_follows_its_gradient():
    """The model sees mask * weight, and its gradient reaches all entries."""
    weight = SparseWeight.of(parameter(4, 8), TWO_OF_FOUR, rule=Hiding())
    assert torch.equal(weight.parameter != 0, weight.mask)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    leaf = (weight.weight * weight.mask).requires_grad_()
    (x @ leaf.T).square().sum().backward()
    (x @ weight.parameter.T).square().sum().backward()
    torch.testing.assert_close(weight.parameter.grad, leaf.grad)
    assert weight.parameter.grad[~weight.mask].all()
    before = weight.weight.clone()
    optimizer(weight, Hiding()).step(1e-2, 0.0)
    assert (weight.weight != before).all()
    assert torch.equal(weight.parameter != 0, weight.mask)


def test_changing_hidden_entries_changes_no_output():
    weight = SparseWeight.of(parameter(4, 8), TWO_OF_FOUR, rule=Hiding())
    before = weight.parameter.clone()
    weight.weight[~weight.mask] *= 0.5
    weight.publish(masks_forward=True)
    assert torch.equal(weight.parameter.abs(), before.abs())


def test_scales_of_1_change_nothing_and_scaled_weights_are_the_index_formula():
    plain = parameter(3, 8)
    weight = SparseWeight.of(plain, TWO_OF_FOUR, rule=Free(), spans=2)
    assert torch.equal(weight.parameter, weight.weight)
    weight.scale.copy_(torch.rand(3, 2, generator=torch.Generator().manual_seed(2)) + 0.5)
    weight.publish(masks_forward=False)
    for row in range(3):
        for column in range(8):
            wanted = weight.weight[row, column] * weight.scale[row, column * 2 // 8]
            assert weight.parameter[row, column] == wanted


def test_gradients_of_weight_and_scale_are_those_of_autograd():
    weight = SparseWeight.of(parameter(3, 8), TWO_OF_FOUR, rule=Free(), spans=2)
    weight.scale.copy_(torch.tensor([[0.5, 2.0]] * 3))
    weight.publish(masks_forward=False)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    (x @ weight.parameter.T).square().sum().backward()
    w, a = weight.weight.clone().requires_grad_(), weight.scale.clone().requires_grad_()
    (x @ (w * a.repeat_interleave(4, 1)).T).square().sum().backward()
    found = optimizer(weight, Free())._gradients()
    torch.testing.assert_close(found["w"], w.grad)
    torch.testing.assert_close(found["w.scale"], a.grad)


def test_mask_of_a_weight_is_that_of_the_scaled_weight():
    """All entries of a group have the same positive factor."""
    weight = SparseWeight.of(parameter(16, 64), TWO_OF_FOUR, rule=Free(), spans=2)
    weight.scale.copy_(torch.rand(16, 2, generator=torch.Generator().manual_seed(2)) + 0.1)
    assert torch.equal(TWO_OF_FOUR.mask(weight.scaled(weight.weight).abs()), weight.mask)


def test_values_are_the_kept_entries_times_their_scale_with_positive_zeros():
    """Zeros stay zero, and the weight is the product with the scale."""
    weight = SparseWeight.of(parameter(4, 8), TWO_OF_FOUR, rule=Free(), spans=2)
    weight.scale.copy_(torch.rand(4, 2, generator=torch.Generator().manual_seed(2)) + 0.5)
    scales = weight.scale.repeat_interleave(4, 1)
    assert torch.equal(weight.values, weight.weight * scales * weight.mask + 0.0)
    assert not (weight.values.signbit() & (weight.values == 0)).any()


def test_a_transposed_parameter_has_its_groups_along_the_inputs():
    plain = parameter(8, 4)  # [in, out]
    weight = SparseWeight.of(plain, TWO_OF_FOUR, rule=Hiding(), transposed=True)
    assert weight.mask.shape == (4, 8)
    assert (weight.mask.unflatten(1, (2, 4)).sum(-1) == 2).all()
    assert torch.equal(plain.data.T != 0, weight.mask)
    plain.grad = torch.ones(8, 4)
    optimizer(weight, Hiding()).step(0.1, 0.0)
    assert torch.equal(plain.data.T, weight.weight * weight.mask)


@pytest.mark.parametrize("transposed", [False, True])
def test_masks_are_the_best_choice_of_every_group_at_the_start_and_anew(transposed):
    """Sizes decide, not signs; a selection forgets the mask before it."""
    plain = parameter(8, 4) if transposed else parameter(4, 8)
    inputs = torch.linspace(0.2, 2.0, 8)
    weight = SparseWeight.of(
        plain, TWO_OF_FOUR, rule=Hiding(), transposed=transposed, inputs=inputs
    )
    start = parameter(*plain.shape).data
    start = start.T if transposed else start
    assert torch.equal(weight.mask, best_of_group(start.abs() * inputs, 2, 4))
    weight.weight.copy_(parameter(4, 8, seed=5).data)
    weight.refresh()
    assert torch.equal(weight.mask, best_of_group(weight.weight.abs() * inputs, 2, 4))


def test_flips_are_counted_as_the_entries_that_changed_sides():
    weight = SparseWeight.of(parameter(4, 8), TWO_OF_FOUR, rule=Hiding())
    old = weight.mask.clone()
    weight.weight.copy_(parameter(4, 8, seed=5).data)
    found = weight.refresh()
    assert found == int((old != weight.mask).sum())
    assert found > 0


def test_16_bit_weights_are_refused_with_the_reason():
    with refused("wrong-dtype", "bfloat16", kind=NumericalError):
        SparseWeight.of(nn.Parameter(torch.randn(4, 8).bfloat16()), TWO_OF_FOUR, rule=Held())


def test_a_gradient_that_is_not_finite_changes_nothing():
    weight = SparseWeight.of(parameter(4, 8), TWO_OF_FOUR, rule=Hiding())
    mine = optimizer(weight, Hiding())
    before = {name: t.clone() for name, t in mine.state().items()}
    weight.parameter.grad = torch.full((4, 8), float("nan"))
    with refused("not-finite", "nan", kind=NumericalError):
        mine.step(1e-2, 0.0)
    assert mine.steps == 0
    for name, tensor in mine.state().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(4, 4, dtype=torch.bool),
        torch.ones(4, 8),
        torch.ones(4, 8, dtype=torch.bool, device="meta"),
    ],
    ids=["shape", "type", "device"],
)
def test_a_mask_that_does_not_fit_is_refused(mask):
    weight = SparseWeight.of(parameter(4, 8), TWO_OF_FOUR, rule=Hiding())
    weight.mask = mask
    with refused("mask-does-not-fit", "w: ", kind=NumericalError):
        optimizer(weight, Hiding())


def test_a_weight_without_a_gradient_is_refused():
    weight = SparseWeight.of(parameter(4, 8), TWO_OF_FOUR, rule=Held())
    with refused("no-gradient", kind=NumericalError):
        optimizer(weight).step(1e-2, 0.0)


def test_entries_off_the_mask_are_the_patterns_share():
    """The share is 1 − N/M of the scope."""
    weight = SparseWeight.of(parameter(16, 64), TWO_OF_FOUR, rule=Held())
    assert int((~weight.mask).sum()) == 16 * 64 // 2


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 8), (7, 9)])
def test_masks_take_bits_in_the_state(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    packed = pack_bits(mask)
    assert packed.nbytes == shape[0] * -(-shape[1] // 8)
    assert torch.equal(unpack_bits(packed, shape[1]).bool(), mask)


def run(steps, mine, weight):
    for step in range(mine.steps, steps):
        generator = torch.Generator().manual_seed(step)
        weight.parameter.grad = torch.randn(4, 8, generator=generator)
        mine.step(3e-1, step / 8)
        if step % 2 == 0:
            mine.refresh()


@pytest.mark.parametrize("spans", [0, 2])
def test_a_saved_state_goes_on_to_the_same_bits(spans):
    """R1 for the optimizer: also masks, which are stored and not selected anew.

    The state is a step further than its mask, so that a selection would give another.
    """
    rule = Free() if spans else Hiding()

    def fresh():
        weight = SparseWeight.of(parameter(4, 8), TWO_OF_FOUR, rule=rule, spans=spans)
        return optimizer(weight, rule), weight

    whole, first = fresh()
    run(8, whole, first)
    half, second = fresh()
    run(6, half, second)
    assert not torch.equal(second.mask, TWO_OF_FOUR.mask(second.weight.abs()))
    saved = {name: t.clone() for name, t in half.state().items()}
    later, third = fresh()
    later.load_state(saved, half.steps)
    assert torch.equal(third.parameter, second.parameter)
    run(8, later, third)
    assert torch.equal(third.parameter, first.parameter)
    for name, tensor in later.state().items():
        assert torch.equal(tensor, whole.state()[name]), name


def test_a_state_that_does_not_fit_is_refused():
    weight = SparseWeight.of(parameter(4, 8), TWO_OF_FOUR, rule=Held())
    mine = optimizer(weight)
    state = mine.state()
    with refused("state-does-not-fit", "w.mean", kind=NumericalError):
        mine.load_state({n: t for n, t in state.items() if n != "w.mean"}, 3)
    with refused("state-does-not-fit", "w.square", kind=NumericalError):
        mine.load_state({**state, "w.square": torch.ones(2, 2)}, 3)


def test_a_weight_without_rows_here_takes_its_step():
    """As in a process that a shard of few rows leaves empty-handed."""
    own, other = parameter(4, 8), parameter(0, 8)
    adam = optimizer(SparseWeight.of(own, TWO_OF_FOUR, rule=Held()), others={"o": other})
    own.grad, other.grad = torch.ones(4, 8), torch.ones(0, 8)
    adam.step(1e-2, 0.0)
    assert other.shape == (0, 8)
