"""Loss of a model on rows of tokens, perplexity of the sparse model, and sparsity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsekit.errors import NumericalError
from sparsekit.model.full_model import hidden_states
from sparsekit.recovery.config import RecoverConfig
from sparsekit.recovery.distillation import IGNORED, Losses, Top, distil
from sparsekit.recovery.methods import Rule
from sparsekit.recovery.optimizer import MaskedAdam
from sparsekit.recovery.sparse_weight import SparseWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Largest log-perplexity; exp of slightly more overflows a float.
LARGEST_LOG = 700.0


def products_of(config: RecoverConfig) -> torch.dtype:
    """The dtype in which forward and backward passes compute."""
    return torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32


def model_losses(
    student: PreTrainedModel,
    teacher: PreTrainedModel | Top | None,
    tokens: Tensor,  # [rows, length] int64
    *,
    share: float,
    temperature: float = 1.0,
    products: torch.dtype = torch.float32,
) -> Losses:
    """The loss of a model on rows of tokens, each position with the next token as its label.

    With `products` other than float32, the student runs under autocast, as does a teacher that has
    this dtype.
    """
    mixed = products != torch.float32
    # No autocast cache: each weight is used once, and shards are freed after use.
    with torch.autocast(tokens.device.type, products, enabled=mixed, cache_enabled=False):
        return _losses(student, teacher, tokens, share, temperature)


def _losses(
    student: PreTrainedModel,
    teacher: PreTrainedModel | Top | None,
    tokens: Tensor,
    share: float,
    temperature: float,
) -> Losses:
    """The loss, as in `model_losses`, in the current autocast context."""
    labels = tokens.roll(-1, 1)
    labels[:, -1] = IGNORED
    hidden = hidden_states(student, tokens)
    head = student.get_output_embeddings()
    other = None
    if isinstance(teacher, Top):
        other = teacher.part
    elif teacher is not None and share:
        with torch.no_grad():
            states = hidden_states(teacher, tokens)
        their_head = teacher.get_output_embeddings()

        def other(rows: slice) -> Tensor:
            with torch.no_grad():
                return their_head(states[rows])

    return distil(
        hidden,
        head,
        list(head.parameters()),
        labels.reshape(-1),
        other,
        share=share,
        temperature=temperature,
    )


@torch.no_grad()
def measure(
    student: PreTrainedModel, sparse: Mapping[str, SparseWeight], rule: Rule, rows: Tensor
) -> float:
    """Perplexity of the sparse model on windows `[windows, length]`; training is not disturbed.

    A dense model is measured with the entries off the mask at zero. The result is at most e^700,
    which the log can hold.

    Raises:
        NumericalError: The perplexity is NaN.
    """
    full = {}
    for name, weight in sparse.items():
        if not rule.masks_forward and rule.updates_pruned:
            full[name] = weight.view.clone()
            weight.view.copy_(weight.values)
    try:
        losses = [
            model_losses(student, None, row[None].to(student.device), share=0.0).entropy
            for row in rows
        ]
    finally:
        for name, tensor in full.items():
            sparse[name].view.copy_(tensor)
    mean = torch.stack(losses).double().mean().item()
    if math.isnan(mean):
        message = "the perplexity of the sparse model is NaN"
        raise NumericalError(message, "try a smaller --lr", code="not-finite")
    return math.exp(min(mean, LARGEST_LOG))


def sparsity_measure(optimizer: MaskedAdam) -> float:
    """Σ|m W| / Σ|W|: 1 when all entries off the mask are zero."""
    kept = total = 0.0
    for weight in optimizer.sparse.values():
        sizes = weight.weight.abs()
        total += sizes.sum(dtype=torch.float64).item()
        kept += (sizes * weight.mask).sum(dtype=torch.float64).item()
    kept, total = optimizer.total(kept, total)
    return kept / total if total else 1.0
