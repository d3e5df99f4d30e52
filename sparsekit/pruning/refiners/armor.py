"""ARMOR: an N:M core between two block-diagonal factors.

Source: Liu et al. 2025, "ARMOR: High-Performance Semi-Structured Pruning via Adaptive Matrix
Factorization", section 3; LawrenceRLiu/ARMOR@3977e54.
Differs: the solver alternates exact minimisation over A, over B and over the groups of the core
(`solvers/armor_als.py`), instead of Adam steps with one group of each block at a time. Biases are
unchanged. The loss is the published one, weighted by the diagonal of the Gram matrix.
Cost: up to 10 sweeps of least squares over all blocks per weight, or as many as `--budget` allows;
holds the squared norm of each input and working copies of one weight. A and B add up to a quarter
to the numbers of a weight.
Result: perplexity 30.7 in 713 s, 34.3 in 239 s (SmolLM2-135M at 2:4, dense 22.9).
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

# Added to all norms.
EPSILON = 1e-5
# With `block=0`: the largest block, and the share of a weight's numbers that A and B may add.
LARGEST_BLOCK, MOST_ADDED = 128, 0.25
# Supports per group above which there is a warning, and above which the pattern is refused.
MANY_SUPPORTS, MOST_SUPPORTS = 100, 1000


@dataclass(frozen=True, kw_only=True)
class Armor(Refiner):
    """A S B with A and B block-diagonal, starting from the pruner's weight."""

    needs: ClassVar[Stats] = Stats.NORMS
    initial: ClassVar[str] = "nowag"
    unlimited: ClassVar[dict[str, Any]] = {"sweeps": 10000, "tolerance": 0.0}
    propagate: ClassVar[bool] = False
    block: int = 0
    """Largest block size; 0: up to 128, adding at most a quarter of the weight's numbers."""
    sweeps: int = 10
    """Maximum number of sweeps; each updates A, B and the core once."""
    tolerance: float = 0.005
    """Stop when a sweep lowers the loss by less than this share."""

    def mismatch(self, pattern: Pattern, rows: int, columns: int) -> str:
        """See `Refiner.mismatch`."""
        if pattern.scope != "group":
            return f"armor needs an N:M pattern such as 2:4, not {pattern}"
        if self.block % pattern.group:
            group = pattern.group
            return (
                f"armor: block={self.block} must be a multiple of {group}, the group of {pattern}"
            )
        if (count := comb(pattern.group, pattern.keep)) > MOST_SUPPORTS:
            return f"armor tries all supports of a group, and {pattern} has {count:,}"
        if not self.block_size(rows, columns, pattern):
            return f"no multiple of {pattern.group} divides both sides of {rows} x {columns}"
        return ""

    def warnings(self, pattern: Pattern, pruner: Pruner | None) -> list[str]:
        """See `Refiner.warnings`."""
        count = comb(pattern.group, pattern.keep)
        if count <= MANY_SUPPORTS:
            return []
        times = count // 6
        return [
            f"{pattern} has {count} supports per group: a sweep takes {times} times as long as 2:4"
        ]

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
        fit, progress = self._fit(normal, core, metric, block, pattern, should_continue)
        # A fitted value may be 0; the mask has the exact count in any case.
        mask = pattern.mask(fit.core.abs())
        factors = Form(
            core=Values(keep_on(mask, fit.core) + 0.0, mask),  # no -0.0
            left=fit.left * rows.view(-1, block, 1),
            right=fit.right * columns.view(-1, 1, block),
        )
        numbers = {
            **start.numbers,
            **progress,
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
        """Fit the factors by coordinate descent; also returns numbers for the report."""
        fit = BlockFit(weight, core, metric, block=block, keep=pattern.keep, group=pattern.group)
        first = loss = fit.loss()
        done = 0
        loss_drop: float | None = None
        while done < self.sweeps and should_continue(loss_drop):
            done += 1
            before, loss = loss, fit.sweep()
            loss_drop = before - loss
            if loss_drop <= self.tolerance * before:
                break
        if done:
            fit.fit_left()
            fit.fit_right()
        return fit, {"sweeps": done, "first_loss": first}

    def block_size(self, rows: int, columns: int, pattern: Pattern) -> int:
        """The largest block that divides both sides and holds whole groups; 0 if there is none.

        By default A and B add at most a quarter of the weight's numbers, if any block is that
        small.
        """
        common = gcd(rows, columns)
        sizes = range(pattern.group, min(common, self.block or LARGEST_BLOCK) + 1, pattern.group)
        fitting = [size for size in sizes if common % size == 0]
        room = MOST_ADDED * rows * columns / (rows + columns)
        within = [size for size in fitting if self.block or size <= room]
        return max(within or fitting[:1], default=0)
