"""The loss of a whole model on rows of tokens, and what is measured of a sparse one."""

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


# A log of a perplexity; exp of a little more is no float.
LARGEST_LOG = 700.0


def products_of(config: RecoverConfig) -> torch.dtype:
    """The type in which the passes of a training multiply."""
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

    In the place of float32 the student may multiply in another type; so does a teacher that has it.
    """
    mixed = products != torch.float32
    # Nothing is kept of the types' change: a weight is used once, and shards come and go.
    with torch.autocast(tokens.device.type, products, enabled=mixed, cache_enabled=False):
        return _losses(student, teacher, tokens, share, temperature)


def _losses(
    student: PreTrainedModel,
    teacher: PreTrainedModel | Top | None,
    tokens: Tensor,
    share: float,
    temperature: float,
) -> Losses:
    """See `model_losses`."""
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

    A model that computes with all entries is measured with those off the mask at zero. The result
    is e^700 at most, so that the log can hold it.

    Raises:
        NumericalError: It is NaN.
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
        raise NumericalError("the perplexity of the sparse model is no number", "a smaller --lr")
    return math.exp(min(mean, LARGEST_LOG))


def sparsity_measure(optimizer: MaskedAdam) -> float:
    """Σ|m W| / Σ|W|: 1 when nothing is left off the mask."""
    kept = total = 0.0
    for weight in optimizer.sparse.values():
        sizes = weight.weight.abs()
        total += sizes.sum(dtype=torch.float64).item()
        kept += (sizes * weight.mask).sum(dtype=torch.float64).item()
    kept, total = optimizer.total(kept, total)
    return kept / total if total else 1.0
