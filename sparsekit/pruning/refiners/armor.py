"""ARMOR: an N:M core between two block-diagonal matrices, fitted block by block.

Source: Liu et al. 2025, "ARMOR: High-Performance Semi-Structured Pruning via Adaptive Matrix
Factorization", section 3; LawrenceRLiu/ARMOR@3977e54.
Differs: the solver minimises over A, over B and over the groups of the core in turn (see
`solvers/armor_als.py`), instead of Adam steps with one group of each block at a time. Biases are
kept.

The loss stays the published diagonal one. In the whole Gram matrix of the inputs, its off-diagonal
halved, a sweep takes 1.7 times as long: SmolLM2-135M at 2:4 (32 x 512 tokens of C4, WikiText-2
perplexity) was 37.9, 33.7 and 32.2 after 4, 8 and 12 minutes, against 34.3, 31.1 and 30.7 as it is
here, so that proxy was taken out. With blocks of 64 and six sweeps it is 40.7; 40.8 on the inputs
of the pruned blocks before (`--propagate`); 38.9 from SparseGPT's mask and weights, which take time
of their own, so that with a budget it is as good as from NoWag-P's (33.8 and 34.6 in two runs of 4
minutes, 31.3 in 8); from those of ALPS it is 41.2 after 4 minutes.
"""

from dataclasses import dataclass
from math import comb, gcd
from typing import Any, ClassVar

from torch import Tensor

from sparsekit.pruning.methods import Pruned, Pruner, keep_on
from sparsekit.pruning.refiners import Refiner, ShouldContinue, no_limit
from sparsekit.solvers.armor_als import BlockFit
from sparsekit.solvers.input_stats import InputStats, Stats
from sparsekit.solvers.nowag_scaling import importance, normalise
from sparsekit.weights.core import Values
from sparsekit.weights.form import Form
from sparsekit.weights.patterns import Pattern

# Added to every norm.
EPSILON = 1e-5
# With `block=0`: the largest block, and the share of a weight's numbers that A and B may add.
LARGEST_BLOCK, MOST_ADDED = 128, 0.25
# Supports of a group above which the user is told what they cost, and above which they are refused.
MANY_SUPPORTS, MOST_SUPPORTS = 100, 1000


@dataclass(frozen=True, kw_only=True)
class Armor(Refiner):
    """A S B with A and B block-diagonal, starting as the initial method's weight."""

    needs: ClassVar[Stats] = Stats.NORMS
    initial: ClassVar[str] = "nowag"
    unlimited: ClassVar[dict[str, Any]] = {"sweeps": 10000, "tolerance": 0.0}
    propagate: ClassVar[bool] = False
    block: int = 0
    """Side of the blocks, at most; 0: up to 128 and a quarter more numbers than the weight has."""
    sweeps: int = 10
    """At most this many rounds of one step for each of A, B and the core."""
    tolerance: float = 0.005
    """Stop when a sweep lowers the loss by a smaller share than this."""

    def mismatch(self, pattern: Pattern, rows: int, columns: int) -> str:
        """See `Refiner.mismatch`."""
        if pattern.scope != "group":
            return f"armor needs an N:M pattern, not {pattern}: 2:4 is usual"
        if self.block % pattern.group:
            groups = f"whole groups of {pattern.group}: its multiples do"
            return f"armor: blocks of {self.block} do not hold {groups}"
        if (count := comb(pattern.group, pattern.keep)) > MOST_SUPPORTS:
            return f"armor tries all supports of a group, and {pattern} has {count:,}"
        if not self.block_size(rows, columns, pattern):
            return f"no block of whole groups of {pattern.group} divides {rows} x {columns}"
        return ""

    def warnings(self, pattern: Pattern, pruner: Pruner | None) -> list[str]:
        """See `Refiner.warnings`."""
        count = comb(pattern.group, pattern.keep)
        if count <= MANY_SUPPORTS:
            return []
        return [f"{pattern} has {count} supports a group: a sweep takes {count // 6} times 2:4's"]

    def refine(
        self,
        weight: Tensor,
        start: Pruned,
        sums: InputStats,
        pattern: Pattern,
        should_continue: ShouldContinue = no_limit,
    ) -> Pruned:
        """See `Refiner.refine`; the result has factors."""
        block = self.block_size(*weight.shape, pattern)
        normal, columns, rows = normalise(weight, EPSILON)
        metric = importance(sums.squares)
        core = start.weight / columns / rows[:, None]
        fit, told = self._fit(normal, core, metric, block, pattern, should_continue)
        # A best value may be 0: the mask has the exact count all the same.
        mask = pattern.mask(fit.core.abs())
        factors = Form(
            core=Values(keep_on(mask, fit.core) + 0.0, mask),  # no -0.0
            left=fit.left * rows.view(-1, block, 1),
            right=fit.right * columns.view(-1, 1, block),
        )
        numbers = {
            **start.numbers,
            **told,
            "block": block,
            "loss": fit.loss(),
        }
        return Pruned(weight=factors.dense(), mask=mask, factors=factors, numbers=numbers)

    def _fit(
        self,
        weight: Tensor,
        core: Tensor,
        metric: Tensor,
        block: int,
        pattern: Pattern,
        should_continue: ShouldContinue,
    ) -> tuple[BlockFit, dict[str, float]]:
        """The factors by coordinate descent, and what to tell of it."""
        fit = BlockFit(weight, core, metric, block=block, keep=pattern.keep, group=pattern.group)
        first = loss = fit.loss()
        done = 0
        fall: float | None = None
        while done < self.sweeps and should_continue(fall):
            done += 1
            before, loss = loss, fit.sweep()
            fall = before - loss
            if fall <= self.tolerance * before:
                break
        if done:
            fit.fit_left()
            fit.fit_right()
        return fit, {"sweeps": done, "first_loss": first}

    def block_size(self, rows: int, columns: int, pattern: Pattern) -> int:
        """The largest block that divides both sides and holds whole groups; 0: none does.

        Unless one was asked for, A and B add at most a quarter of the weight's numbers, if the
        smallest such block does.
        """
        common = gcd(rows, columns)
        sizes = range(pattern.group, min(common, self.block or LARGEST_BLOCK) + 1, pattern.group)
        fitting = [size for size in sizes if common % size == 0]
        room = MOST_ADDED * rows * columns / (rows + columns)
        within = [size for size in fitting if self.block or size <= room]
        return max(within or fitting[:1], default=0)
