"""CAST on one layer: the entries off the mask vanish, and the decay does it.

The task: one layer of 32 inputs
and 16 outputs, 64 random inputs and targets, 600 steps.
"""

import pytest
import torch
from torch import nn

from sparsekit.recovery.config import rate_at
from sparsekit.recovery.methods.cast import Continuous
from sparsekit.recovery.optimizer import MaskedAdam, Settings
from sparsekit.recovery.sparse_weight import SparseWeight
from sparsekit.weights.patterns import Pattern

INPUTS, OUTPUTS, STEPS = 32, 16, 600


def trained(seed: int, decay: float, schedule: str = "flat") -> dict[str, float]:
    """What is left off the mask after the run, and what its removal changes."""
    generator = torch.Generator().manual_seed(seed)
    values = (torch.rand(OUTPUTS, INPUTS, generator=generator) * 2 - 1) / INPUTS**0.5
    x = torch.randn(64, INPUTS, generator=generator)
    y = torch.randn(64, OUTPUTS, generator=generator)
    rule = Continuous(decay)
    weight = SparseWeight.of(nn.Parameter(values), Pattern(keep=2, group=4), rule=rule, spans=2)
    adam = MaskedAdam({"w": weight}, {}, rule, Settings())
    shares = {}
    for step in range(STEPS):
        if step % 10 == 0:
            adam.refresh()
        (x @ weight.parameter.T - y).square().mean().backward()
        adam.step(4e-3 * rate_at(schedule, step, STEPS), step / STEPS)
        sizes = weight.weight.abs()
        shares[step] = (sizes[weight.mask].sum() / sizes.sum()).item()
    adam.refresh()
    sizes = weight.weight.abs()
    dense = x @ weight.parameter.T
    return {
        "ratio": (sizes[~weight.mask].mean() / sizes[weight.mask].mean()).item(),
        "largest": sizes[~weight.mask].max().item(),
        "changed": ((x @ weight.values.T - dense).norm() / dense.norm()).item(),
        "early": shares[STEPS * 8 // 10],
        "kept": (sizes[weight.mask].sum() / sizes.sum()).item(),
    }


@pytest.mark.parametrize("seed", range(3))
def test_entries_off_the_mask_vanish_and_their_removal_changes_nothing(seed):
    found = trained(seed, 1e-2)
    assert found["ratio"] < 0.01
    assert found["largest"] < 1e-3
    assert found["changed"] < 0.005
    assert found["kept"] > 0.99
    assert found["kept"] > found["early"]


def test_without_decay_the_same_run_leaves_them():
    """A reference run gave a ratio of 0.37 and a change of 52 %."""
    found = trained(0, 0.0)
    assert found["ratio"] > 0.2
    assert found["changed"] > 0.2
    assert found["largest"] > 0.1
    assert found["kept"] < 0.9


def test_a_cosine_that_ends_above_zero_leaves_more():
    left = {name: trained(0, 1e-2, name)["largest"] for name in ("flat", "cosine")}
    assert left["cosine"] > 3 * left["flat"]
