"""Cross entropy and KL divergence from a teacher, in chunks that never hold all logits.

With n counted positions and τ the temperature, the loss is share · KL + (1 − share) · CE:

    KL = τ²/n Σ_i Σ_x p_t(x|i) (log p_t(x|i) − log p_s(x|i)),   p = softmax(logits / τ)
    CE = −1/n Σ_i log softmax(student logits)(label_i)

If only the k largest probabilities of a teacher are known, all other tokens count as one further
outcome. With r = 1 − Σ p_t and q = 1 − Σ p_s over the k, the term of that position is
Σ p_t (log p_t − log p_s) + r (log r − log q): at most the whole KL, and equal to it when k is the
vocabulary. It is the KL from a teacher that spreads r over the other tokens as the student does,
r p_s(x) / q, in value and in gradient (p_s − p_t for the k, p_s (1 − r / q) for the others), and is
computed as such.

Source: AST (Huang et al., AAAI 2025), section "knowledge distillation"; CAST takes τ = 1.
Differs: both terms leave out positions without a label (AST's code averages KL over all positions).
The gradient with respect to the logits has a closed form and is computed with the values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Bytes of the logits of a chunk, for student and teacher each; on a GPU three or four more such
# tensors exist temporarily.
CHUNK_BYTES = 48 << 20
# Entries of a part of a chunk that fits the CPU cache.
IN_CACHE = 1 << 19
IGNORED = -100
# Lower limit of the teacher's remaining mass, so that its logarithm is finite; the rounding error
# of 1 − Σ p is far larger.
LEAST_REST = 1e-20
Logits = Callable[[Tensor], Tensor]
"""From hidden states `[tokens, hidden]` to logits `[tokens, vocabulary]`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Top:
    """The largest probabilities of a teacher at each position."""

    log_probabilities: Tensor  # [positions, k] float32, at the temperature of the loss
    ids: Tensor  # [positions, k] int32

    @classmethod
    def of(cls, logits: Tensor, count: int, temperature: float) -> Top:
        """The `count` largest of logits `[positions, vocabulary]`; ties are broken arbitrarily."""
        log = torch.log_softmax(logits.float() / temperature, -1)
        values, ids = log.topk(count)
        return cls(log_probabilities=values, ids=ids.to(torch.int32))

    @classmethod
    def joined(cls, parts: Sequence[Top]) -> Top:
        """Concatenate positions."""
        return cls(
            log_probabilities=torch.cat([part.log_probabilities for part in parts]),
            ids=torch.cat([part.ids for part in parts]),
        )

    def part(self, rows: slice) -> Top:
        """The probabilities of some positions."""
        return Top(log_probabilities=self.log_probabilities[rows], ids=self.ids[rows])

    def to(self, device: torch.device) -> Top:
        """Move to a device."""
        return Top(log_probabilities=self.log_probabilities.to(device), ids=self.ids.to(device))

    def mass(self) -> Tensor:
        """Sum of the probabilities at each position, `[positions]` float64."""
        return self.log_probabilities.double().exp().sum(-1)

    def completed(self, student: Tensor) -> Tensor:
        """Log-probabilities of all tokens; unknown ones in proportion to the student's."""
        ids = self.ids.long()
        goal = student.scatter(-1, ids, -math.inf)
        left = (1 - self.mass()).clamp(min=LEAST_REST).log().to(goal.dtype)
        # Not log(1 - Σ p_s), which is rounding error if the rest is small.
        goal += (left - goal.logsumexp(-1))[:, None]
        return goal.scatter_(-1, ids, self.log_probabilities)


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The loss and its parts, each a mean over the counted positions, in nats."""

    total: Tensor
    """Scalar, differentiable by the student's parameters."""
    divergence: Tensor
    """KL; 0 without a teacher."""
    entropy: Tensor
    """CE with the true next tokens."""


def distil(
    hidden: Tensor,  # [tokens, hidden], the student's
    head: Logits,
    head_parameters: Sequence[Tensor],
    labels: Tensor,  # [tokens] int64, IGNORED where there is none
    teacher: Callable[[slice], Tensor | Top] | None,
    *,
    share: float,
    temperature: float = 1.0,
) -> Losses:
    """The loss of a student, chunk by chunk.

    Args:
        hidden: Inputs of the student's head.
        head: The student's head; must be linear, as its output is overwritten by the gradient.
        head_parameters: Parameters of the head, which get gradients too.
        labels: The next tokens.
        teacher: Returns the teacher's logits `[chunk, vocabulary]` of a slice of positions, or its
            largest probabilities; not needed with share 0.
        share: Weight of KL in the loss, 0 to 1.
        temperature: τ, above 0.
    """
    trained = [p for p in head_parameters if p.requires_grad]
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or bool(trained))
    total, divergence, entropy = _Chunked.apply(
        hidden, head, labels, teacher, share, temperature, wanted, *trained
    )
    return Losses(total=total, divergence=divergence, entropy=entropy)


class _Chunked(torch.autograd.Function):
    """Computes gradients with the values, so that no logits are kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Logits,
        labels: Tensor,
        teacher: Callable[[slice], Tensor | Top] | None,
        share: float,
        temperature: float,
        wanted: bool,
        *trained: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = (labels != IGNORED).sum().clamp(min=1)
        parts = torch.zeros(2, dtype=torch.float64, device=hidden.device)
        by_hidden = torch.empty_like(hidden) if wanted else None
        by_head = [torch.zeros_like(p) for p in trained] if wanted else []
        linear = type(head) is torch.nn.Linear and len(trained) == len(list(head.parameters()))
        products = _products(hidden)
        if linear:  # once for all chunks
            weight, *bias = (p.to(products) for p in head.parameters())
        start, step = 0, chunk_positions(_vocabulary(head, hidden), products)
        while start < len(hidden):
            rows = slice(start, min(start + step, len(hidden)))
            if linear:
                part = hidden[rows].to(products)
                logits = torch.nn.functional.linear(part, weight, *bias)
            else:
                with torch.set_grad_enabled(wanted):
                    part = hidden[rows].detach().requires_grad_(wanted)
                    logits = head(part)
            other = teacher(rows) if teacher is not None and share else None
            # The output of a linear head is not needed again: the gradient overwrites it.
            gradient = logits.detach()
            with torch.autocast(
                hidden.device.type, enabled=False
            ):  # which would reduce the precision of KL
                parts += _replace(gradient, other, labels[rows], share, temperature, count)
            if by_hidden is not None and linear:
                by_hidden[rows] = gradient @ weight
                _add_product(by_head[0], gradient.T, part)
                for whole in by_head[1:]:
                    whole += gradient.sum(0)
            elif by_hidden is not None:
                gradients = torch.autograd.grad(logits, [part, *trained], gradient)
                by_hidden[rows] = gradients[0]
                for whole, piece in zip(by_head, gradients[1:], strict=True):
                    whole += piece
            start = rows.stop
        ctx.gradients = by_hidden, by_head
        divergence, entropy = (parts / count).float()
        ctx.mark_non_differentiable(divergence, entropy)
        return share * divergence + (1 - share) * entropy, divergence, entropy

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        by_hidden, by_head = ctx.gradients
        ctx.gradients = None
        scaled = [by_hidden.mul_(outer[0]), *(g.mul_(outer[0]) for g in by_head)]
        return scaled[0], None, None, None, None, None, None, *scaled[1:]


def chunk_positions(vocabulary: int, dtype: torch.dtype = torch.float32) -> int:
    """Number of positions whose logits are held at a time."""
    return max(1, CHUNK_BYTES // (dtype.itemsize * vocabulary))


def _products(hidden: Tensor) -> torch.dtype:
    """The dtype in which linear layers compute."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right`, whose dtype may be narrower."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _vocabulary(head: Logits, hidden: Tensor) -> int:
    """Number of logits per token."""
    size = getattr(head, "out_features", None)
    if size is None:
        with torch.no_grad():
            size = head(hidden[:1].detach()).shape[-1]
    return size


def _replace(
    logits: Tensor,  # [chunk, vocabulary], overwritten by the gradient
    teacher: Tensor | Top | None,
    labels: Tensor,
    share: float,
    temperature: float,
    count: Tensor,  # number of counted positions
) -> Tensor:
    """Overwrite logits by gradients; returns the sums of KL and CE, `[2]` float64."""
    length = len(logits) if logits.is_cuda else max(1, IN_CACHE // logits.shape[1])
    sums = torch.zeros(2, dtype=torch.float64, device=logits.device)
    for start in range(0, len(logits), length):
        rows = slice(start, start + length)
        if isinstance(teacher, Top):
            other = teacher.part(rows)
        else:
            other = None if teacher is None else teacher[rows]
        part, gradient = _values(logits[rows], other, labels[rows], share, temperature)
        sums += part
        logits[rows] = gradient.div_(count)
    return sums


def _values(
    logits: Tensor,  # [positions, vocabulary]
    teacher: Tensor | Top | None,  # same shape, or the largest probabilities
    labels: Tensor,  # [positions]
    share: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Sums of KL and CE, and the gradient of their mix before the division by n."""
    counted = labels != IGNORED
    index = labels.clamp(min=0)[:, None]
    log = torch.log_softmax(logits.float(), -1)
    picked = log.gather(-1, index)[:, 0]
    entropy = -picked[counted].double().sum()
    divergence = torch.zeros_like(entropy)
    if teacher is None:
        gradient = log.exp_()
        gradient.scatter_add_(-1, index, torch.full_like(index, -1, dtype=gradient.dtype))
        gradient *= 1 - share
    else:
        soft = log if temperature == 1 else torch.log_softmax(logits.float() / temperature, -1)
        hard = log.exp() if temperature != 1 and share < 1 else None
        if isinstance(teacher, Top):
            goal = teacher.completed(soft)
        else:
            goal = torch.log_softmax(teacher.float() / temperature, -1)
        wanted = goal.exp()
        rows = torch.linalg.vecdot(wanted, goal.sub_(soft))
        divergence = temperature**2 * rows[counted].double().sum()
        student = soft.exp_()
        if hard is None:  # τ = 1, or only the divergence counts
            gradient = student.sub_(wanted, alpha=share) if share < 1 else student.sub_(wanted)
            gradient *= temperature
        else:
            gradient = hard.mul_(1 - share).add_(student.sub_(wanted), alpha=temperature * share)
        if share < 1:
            gradient.scatter_add_(-1, index, torch.full_like(index, share - 1, dtype=student.dtype))
    gradient.masked_fill_(~counted[:, None], 0)
    return torch.stack([divergence, entropy]), gradient
