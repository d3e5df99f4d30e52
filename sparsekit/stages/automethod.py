"""Which method of recovery `auto` stands for.

Masks that move pay when there is much to train on. The tiny model of `tests/test_recovery.py`
(0.34 million parameters) is even with all three methods after 0.6 tokens for each parameter, and
better with `ast` and `cast` after 1.2. What lies between a few thousandths, where SmolLM2-135M was
measured and `fixed` wins, and these is not known; the published runs of `ast` and `cast` had 1 and
more.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from sparsekit.stages.trainconfig import RecoverConfig

if TYPE_CHECKING:
    import torch

    from sparsekit.models.checkpoint import Checkpoint

# Tokens for each parameter from which on a mask that moves is taken.
MANY = 1.0
# Share of the machine's rate of products that training reaches, when the time is given.
REACHED = 0.7


def chosen(
    config: RecoverConfig, source: Checkpoint, device: torch.device
) -> tuple[RecoverConfig, str]:
    """A configuration with a method in the place of `auto`, and why it is this one.

    Where a time is given, the tokens are estimated from the speed of products of matrices.
    """
    parameters = sum(math.prod(place.shape) for place in source.places.values())
    tokens = config.tokens or _tokens_within(config, source, parameters, device)
    share = tokens / parameters
    moving = "cast" if config.slorb is None else "ast"
    method = moving if share >= MANY else "fixed"
    why = f"--method auto is {method}: {share:.2g} tokens for each parameter"
    return replace(config, method=method), f"{why}; a mask that moves pays from about {MANY:g} on"


def _tokens_within(
    config: RecoverConfig, source: Checkpoint, parameters: int, device: torch.device
) -> float:
    """About how many tokens are trained on in the time of a configuration."""
    from sparsekit.stages.trainspeed import matrix_rate

    largest = max((p.shape for p in source.places.values() if len(p.shape) == 2), key=math.prod)
    rate = matrix_rate([largest], config.batch * config.length, device)
    return (config.max_time or 0.0) * REACHED * rate / (8 * parameters)
