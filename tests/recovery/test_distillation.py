"""The chunked loss equals the written-out one, in value and gradient (K1-K3)."""

import copy
import math

import pytest
import torch
from torch import nn

from sparsekit.recovery import distillation
from sparsekit.recovery.distillation import IGNORED, Top, distil

TOKENS, HIDDEN, WORDS = 23, 8, 50


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks, the last one short: 4 tokens each, gone over by 3 at a time."""
    monkeypatch.setattr(distillation, "CHUNK_BYTES", 4 * 4 * WORDS)
    monkeypatch.setattr(distillation, "IN_CACHE", 3 * WORDS)


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(3)
    head = nn.Linear(HIDDEN, WORDS)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    teacher = torch.randn(TOKENS, WORDS, generator=generator)
    labels = torch.randint(WORDS, (TOKENS,), generator=generator)
    labels[[2, 9, 22]] = IGNORED
    return head, hidden, teacher, labels


def written_out(head, hidden, teacher, labels, share, temperature):
    """The formulas of the loss, on all logits at once."""
    kept = labels != IGNORED
    logits, goal = head(hidden)[kept], teacher[kept]
    entropy = nn.functional.cross_entropy(logits, labels[kept])
    ours = torch.log_softmax(logits / temperature, -1)
    theirs = torch.log_softmax(goal / temperature, -1)
    divergence = temperature**2 * (theirs.exp() * (theirs - ours)).sum(-1).mean()
    return share * divergence + (1 - share) * entropy, divergence, entropy


def ours(head, hidden, teacher, labels, share, temperature):
    found = distil(
        hidden,
        head,
        list(head.parameters()),
        labels,
        lambda rows: teacher[rows],
        share=share,
        temperature=temperature,
    )
    return found.total, found.divergence, found.entropy


def gradients(loss, head, hidden, *rest):
    head.zero_grad()
    leaf = hidden.clone().requires_grad_()
    loss(head, leaf, *rest)[0].backward()
    return [leaf.grad, *(p.grad.clone() for p in head.parameters())]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_values_and_gradients_are_those_of_the_formulas(case, share, temperature):
    head, hidden, teacher, labels = case
    found = ours(head, hidden, teacher, labels, share, temperature)
    wanted = written_out(head, hidden, teacher, labels, share, temperature)
    if share == 0:  # the teacher is not asked, so that there is no KL to tell
        found, wanted = (found[0], found[2]), (wanted[0], wanted[2])
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted), rtol=1e-5, atol=1e-6)
    both = [
        gradients(f, head, hidden, teacher, labels, share, temperature) for f in (ours, written_out)
    ]
    for mine, theirs in zip(*both, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_in_autocast_products_are_rounded_and_gradients_are_not_narrowed(case):
    """Values and gradients near those of float32, also of a head that is not linear."""
    head, hidden, teacher, labels = case
    for head in (case[0], nn.Sequential(case[0])):
        wanted = [t.detach() for t in ours(head, hidden, teacher, labels, 0.4, 1.0)]
        slopes = gradients(ours, head, hidden, teacher, labels, 0.4, 1.0)
        with torch.autocast("cpu", torch.bfloat16):
            found = [t.detach() for t in ours(head, hidden, teacher, labels, 0.4, 1.0)]
            rounded = gradients(ours, head, hidden, teacher, labels, 0.4, 1.0)
        assert found[0] != wanted[0]
        torch.testing.assert_close(torch.stack(found), torch.stack(wanted), rtol=0.01, atol=0.01)
        for mine, theirs in zip(rounded, slopes, strict=True):
            assert mine.dtype == torch.float32
            # bfloat16 has 8 bits: what is small beside the rest has fewer of its own.
            assert (mine - theirs).norm() < 0.02 * theirs.norm()


def test_in_autocast_the_divergence_is_that_of_the_rounded_logits(case):
    """Summed in float32: KL is the small rest of terms that cancel."""
    head, hidden, _, labels = case
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(hidden)
        near = logits.float() + 0.5 * torch.linspace(-1, 1, WORDS)
        found = ours(head, hidden, near, labels, 1.0, 1.0)[1]
    kept = labels != IGNORED
    student, teacher = (torch.log_softmax(t.double()[kept], -1) for t in (logits, near))
    wanted = (teacher.exp() * (teacher - student)).sum(-1).mean()
    assert 0 < wanted < 0.1
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_a_share_of_0_is_exactly_the_entropy_and_1_exactly_the_divergence(case):
    head, hidden, teacher, labels = case
    total, _, entropy = ours(head, hidden, teacher, labels, 0.0, 1.0)
    assert total == entropy
    total, divergence, _ = ours(head, hidden, teacher, labels, 1.0, 1.0)
    assert total == divergence


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_student_that_equals_its_teacher_has_no_divergence_and_no_gradient(case, temperature):
    head, hidden, _, labels = case
    teacher = torch.cat([head(part) for part in hidden.split(4)]).detach()
    assert ours(head, hidden, teacher, labels, 1.0, temperature)[1] == 0
    for gradient in gradients(ours, head, hidden, teacher, labels, 1.0, temperature):
        assert not gradient.any()


class Shifting(nn.Module):
    """A head that adds the last hidden state to all logits of its position."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, hidden):
        return self.head(hidden[:, :-1]) + hidden[:, -1:]


def test_divergence_is_positive_and_a_constant_for_a_position_changes_nothing(case):
    head, hidden, teacher, labels = case
    found = ours(head, hidden, teacher, labels, 1.0, 1.0)[1]
    shift = torch.linspace(-3, 3, TOKENS)[:, None]
    assert found > 0
    shifted = ours(head, hidden, teacher + shift, labels, 1.0, 1.0)[1]
    torch.testing.assert_close(shifted, found)
    shifted = ours(Shifting(head), torch.cat([hidden, shift], 1), teacher, labels, 1.0, 1.0)[1]
    torch.testing.assert_close(shifted, found)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_divergence_is_never_negative(case, temperature):
    head, hidden, _, labels = case
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        teacher = 3 * torch.randn(len(hidden), len(head.weight), generator=draw)
        assert ours(head, hidden, teacher, labels, 1.0, temperature)[1] > 0


def test_positions_without_a_label_count_in_neither_term(case):
    head, hidden, teacher, labels = case
    ignored = labels == IGNORED
    found = ours(head, hidden, teacher, labels, 0.5, 1.0)
    others = torch.where(ignored[:, None], 9 * torch.ones_like(hidden), hidden)
    goal = torch.where(ignored[:, None], -teacher, teacher)
    assert ours(head, others, goal, labels, 0.5, 1.0) == found
    assert not gradients(ours, head, hidden, teacher, labels, 0.5, 1.0)[0][ignored].any()


def test_a_position_that_loses_its_label_leaves_both_terms(case):
    """The loss is that of the other positions, and differs from before."""
    head, hidden, teacher, labels = case
    before = ours(head, hidden, teacher, labels, 0.5, 2.0)
    changed = labels.clone()
    changed[5:8] = IGNORED
    found = ours(head, hidden, teacher, changed, 0.5, 2.0)
    rest = torch.arange(TOKENS).ne(torch.arange(5, 8)[:, None]).all(0)
    alone = ours(head, hidden[rest], teacher[rest], labels[rest], 0.5, 2.0)
    torch.testing.assert_close(torch.stack(found), torch.stack(alone))
    assert all(abs(one - other) > 1e-3 for one, other in zip(found, before, strict=True))


def test_no_chunk_holds_more_logits_than_it_may(case):
    head, hidden, teacher, labels = case
    sizes, own = [], []
    head.register_forward_pre_hook(lambda _, inputs: own.append(len(inputs[0])))
    distil(
        hidden,
        head,
        [],
        labels,
        lambda rows: sizes.append(rows.stop - rows.start) or teacher[rows],
        share=1.0,
    )
    assert sum(sizes) == sum(own) == TOKENS
    assert max(sizes) == max(own) == 4


def test_without_a_label_at_all_the_loss_is_zero(case):
    head, hidden, teacher, labels = case
    nothing = torch.full_like(labels, IGNORED)
    assert [v.item() for v in ours(head, hidden, teacher, nothing, 0.5, 1.0)] == [0, 0, 0]
    assert math.isfinite(ours(head, hidden, teacher, nothing, 0.0, 1.0)[0].item())


def coarse(head, hidden, teacher, labels, share, temperature, count):
    """The divergence over the largest probabilities and all else as one outcome, in float64."""
    kept = labels != IGNORED
    logits = head.double()(hidden.double())[kept]
    ours = torch.log_softmax(logits / temperature, -1).exp()
    theirs, ids = torch.softmax(teacher.double()[kept] / temperature, -1).topk(count)
    same = ours.gather(-1, ids)
    rows = (theirs * (theirs / same).log()).sum(-1)
    if count < teacher.shape[-1]:
        left, missed = 1 - theirs.sum(-1), 1 - same.sum(-1)
        rows = rows + left * (left / missed).log()
    divergence = temperature**2 * rows.mean()
    entropy = nn.functional.cross_entropy(logits, labels[kept])
    return share * divergence + (1 - share) * entropy, divergence, entropy


def largest(head, hidden, teacher, labels, share, temperature, count):
    """The loss with the largest probabilities in the place of the teacher's logits."""
    top = Top.of(teacher, count, temperature)
    found = distil(
        hidden,
        head,
        list(head.parameters()),
        labels,
        top.part,
        share=share,
        temperature=temperature,
    )
    return found.total, found.divergence, found.entropy


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("share", [0.4, 1.0])
@pytest.mark.parametrize("count", [1, 7, WORDS - 1, WORDS])
def test_with_the_largest_only_all_others_are_one_outcome(case, count, share, temperature):
    """Values and the closed gradient, against autograd in float64."""
    head, hidden, teacher, labels = case
    arguments = teacher, labels, share, temperature, count
    found = torch.stack(largest(head, hidden, *arguments))
    mine = gradients(largest, head, hidden, *arguments)
    wanted = torch.stack(coarse(copy.deepcopy(head), hidden, *arguments))
    theirs = gradients(coarse, copy.deepcopy(head), hidden, *arguments)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_more_are_looked_at_the_closer_from_below_to_the_whole(case, temperature):
    head, hidden, teacher, labels = case
    whole = ours(head, hidden, teacher, labels, 1.0, temperature)[1].item()
    found = [
        largest(head, hidden, teacher, labels, 1.0, temperature, count)[1].item()
        for count in (1, 2, 5, 20, 40, WORDS)
    ]
    assert found == sorted(found)
    assert 0 < found[0] < found[2] < whole
    assert found[-1] == pytest.approx(whole, rel=1e-5)


def test_all_of_the_vocabulary_gives_the_gradients_of_the_whole(case):
    head, hidden, teacher, labels = case
    mine = gradients(largest, head, hidden, teacher, labels, 0.7, 1.0, WORDS)
    for one, other in zip(
        mine, gradients(ours, head, hidden, teacher, labels, 0.7, 1.0), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sure", ["teacher", "student"])
def test_a_rest_that_rounds_to_nothing_gives_finite_numbers(case, sure):
    """One of the two is so sure that 1 - Σ p is 0 in float32, where a logarithm would be none."""
    head, hidden, teacher, labels = case
    peak = torch.zeros(WORDS)
    peak[3] = 200.0
    if sure == "teacher":
        teacher = teacher + peak
        assert not (1 - Top.of(teacher, 2, 1.0).mass()).any()
    else:
        teacher = teacher + 0.01 * peak
        with torch.no_grad():
            head.bias += peak
    total, divergence, _ = largest(head, hidden, teacher, labels, 0.5, 1.0, 2)
    assert math.isfinite(total.item())
    assert divergence > 0
    for gradient in gradients(largest, head, hidden, teacher, labels, 0.5, 1.0, 2):
        assert gradient.isfinite().all()
        assert gradient.any()


def test_mass_is_what_the_largest_sum_up_to(case):
    teacher = case[2]
    wanted = torch.softmax(teacher.double() / 2, -1).sort(descending=True).values[:, :5].sum(-1)
    top = Top.of(teacher, 5, 2.0)
    torch.testing.assert_close(top.mass(), wanted, rtol=1e-6, atol=0)
    assert torch.equal(top.ids[:, 0].long(), teacher.argmax(-1))
    assert (top.log_probabilities.dtype, top.ids.dtype) == (torch.float32, torch.int32)
