"""Which method of recovery `auto` stands for, and how much text a run may need.

`ast` was at least as good as `fixed` wherever both were measured: on SmolLM2-135M at 2:4 from Wanda
(there within the spread of seeds), SparseGPT and ALPS after 39 thousand tokens and from ALPS after
half an hour (`tests/test_recovery_quality.py`), and on the tiny model of `tests/test_recovery.py`
after 1.2 tokens for each parameter. `cast` may be better still, but may fail to settle, which `ast`
cannot.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from sparsekit.stages.trainconfig import RecoverConfig

if TYPE_CHECKING:
    from sparsekit.models.checkpoint import Checkpoint
    from sparsekit.stages.ranks import Ranks

# What `auto` stands for.
BEST = "ast"
# Floating-point operations a second of a CPU core and of a GPU when the time is given: nominal, so
# that all processes and an interrupted run come to the same tokens.
CORE, GPU = 5e10, 2e13
# So many times that is what a machine may train on at most, and the same in mixed precision.
FASTEST, MIXED = 4.0, 8.0


def chosen(config: RecoverConfig) -> tuple[RecoverConfig, str]:
    """A configuration with a method in the place of `auto`, and what to tell of it."""
    return replace(config, method=BEST), f"--method auto is {BEST}"


def tokens_to_read(
    config: RecoverConfig, source: Checkpoint, device: torch.device, ranks: Ranks
) -> int:
    """How many tokens of the text are needed: those of whole steps, or of a very fast machine."""
    if config.tokens is not None:
        return config.steps() * config.step_tokens
    fastest = FASTEST if config.mixed_precision == "no" else MIXED
    wanted = fastest * _tokens(config, _parameters(source), device, ranks)
    return max(1, math.ceil(wanted / config.step_tokens)) * config.step_tokens


def _parameters(source: Checkpoint) -> int:
    return sum(math.prod(place.shape) for place in source.places.values())


def _tokens(config: RecoverConfig, parameters: int, device: torch.device, ranks: Ranks) -> float:
    """What is trained on, where a time is given at the nominal speed."""
    if config.max_time is None:
        return float(config.tokens or 0)
    speed = CORE * torch.get_num_threads() if device.type == "cpu" else GPU
    return config.max_time * speed * ranks.size / (8 * parameters)
