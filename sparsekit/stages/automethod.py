"""Which method of recovery `auto` stands for.

Masks that move pay when there is much to train on. The tiny model of `tests/test_recovery.py`
(0.34 million parameters) is better with `ast` and `cast` than with `fixed` after 1.2 tokens for
each parameter, which is what the published runs of both had and more. In between that and the
thousandths of a token that half an hour gives a model of 135 million, where the adaptive masks'
authors use thousands of steps and there are a few hundred, is a wide field that nobody measured.
Of the two, `ast` is taken: it can end at any step, while `cast` may fail to settle.
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

# Tokens for each parameter from which on a mask that moves is taken.
MANY = 1.0
# Floating-point operations a second of a CPU core and of a GPU when the time is given: nominal, so
# that all processes and an interrupted run come to the same method.
CORE, GPU = 5e10, 2e13
# So many times that is what a machine may train on at most.
FASTEST = 4.0


def chosen(
    config: RecoverConfig, source: Checkpoint, device: torch.device, ranks: Ranks
) -> tuple[RecoverConfig, str]:
    """A configuration with a method in the place of `auto`, and why it is this one."""
    parameters = _parameters(source)
    share = _tokens(config, parameters, device, ranks) / parameters
    method = "ast" if share >= MANY else "fixed"
    why = f"--method auto is {method}: about {share:.2g} tokens for each parameter"
    return replace(config, method=method), f"{why}; a mask that moves pays from about {MANY:g} on"


def tokens_to_read(
    config: RecoverConfig, source: Checkpoint, device: torch.device, ranks: Ranks
) -> int:
    """How many tokens of the text are needed: those of whole steps, or of a very fast machine."""
    if config.tokens is not None:
        return config.steps() * config.step_tokens
    wanted = FASTEST * _tokens(config, _parameters(source), device, ranks)
    return max(1, math.ceil(wanted / config.step_tokens)) * config.step_tokens


def _parameters(source: Checkpoint) -> int:
    return sum(math.prod(place.shape) for place in source.places.values())


def _tokens(config: RecoverConfig, parameters: int, device: torch.device, ranks: Ranks) -> float:
    """What is trained on, where a time is given at the nominal speed."""
    if config.max_time is None:
        return float(config.tokens or 0)
    speed = CORE * torch.get_num_threads() if device.type == "cpu" else GPU
    return config.max_time * speed * ranks.size / (8 * parameters)
