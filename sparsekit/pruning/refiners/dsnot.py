"""DSnoT: swap kept for removed weights, row by row, until the expected output error is gone.

Source: Zhang et al. 2024, "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs",
algorithm 1; zyxxmu/DSnoT@4c029df, `lib/prune.py`.
Differs: candidates lie in lists of one sign each, and a row stops when a list is used up; the
published pointers go on into the weights of the other kind, which on small layers changes the
count of a row. A weight without a signed contribution is never swapped (published: it stands for
column 0). For N:M, of equal scores the lower column is removed (published: an unstable sort).
A mask of a method without one score for each weight is refined by Wanda's. What survives has its
dense value: an update of the initial method is lost, as in the source.

Of what was tried at 60 %, the defaults do least harm to SmolLM2-135M (32 x 512 tokens of C4,
WikiText-2 perplexity, Wanda before DSnoT over it): 142.6 becomes 143.0 on attention and 145.1 on
all weights. On attention 50 % goes from 52.8 to 52.9, 70 % from 1312 to 1643 (2093 as published)
and 2:4 from 193.8 to 194.2; on all weights 50 % goes to 52.6 and 2:4 to 197.3. A threshold relative
to the first error of each row means the same in every layer; one in units of the output means
another share of the error in each, and the published one also grows with the length of the rows.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sparsekit.pruning.methods import Pruned, Pruner, keep_on
from sparsekit.pruning.refiners import Refiner, ShouldContinue, no_limit
from sparsekit.solvers.input_stats import InputStats, Stats
from sparsekit.weights.patterns import Pattern


@dataclass(frozen=True, kw_only=True)
class Dsnot(Refiner):
    """Grow what the output misses most for its variance, remove what scores least."""

    needs: ClassVar[Stats] = Stats.MOMENTS
    initial: ClassVar[str] = "wanda"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "published": {"units": "sequence", "same_sign": False}
    }
    rowwise: ClassVar[bool] = True
    cycles: int = 50
    """At most this many swaps in each row."""
    threshold: float = 0.1
    """A row is done when its expected error is not above this, in the given units."""
    units: Literal["relative", "token", "sequence"] = "relative"
    """Of the threshold: share of the row's first error, mean output, sum over a row of tokens."""
    power: float = 1.0
    """Of the input variance that the gain of a grown weight is divided by."""
    same_sign: bool = True
    """Whether a row stops before its expected error changes sign (N:M: always)."""
    modules: Literal["all", "attention"] = "attention"
    """Which weights are refined; the others keep the initial mask."""

    def applies_to(self, name: str) -> bool:
        """See `Refiner.applies_to`."""
        return self.modules == "all" or "attn" in name or "attention" in name

    def warnings(self, pattern: Pattern, pruner: Pruner | None) -> list[str]:
        """See `Refiner.warnings`."""
        found = []
        if pattern.scope == "group":
            known = f"DSnoT is known to make {pattern} models worse"
            found.append(f"{known}: compare with the initial method")
        if pruner is not None and pruner.updates:
            method = type(pruner).__name__.lower()
            found.append(f"where DSnoT refines, the values that {method} gave the weights are lost")
        return found

    def refine(
        self,
        weight: Tensor,
        start: Pruned,
        sums: InputStats,
        pattern: Pattern,
        should_continue: ShouldContinue = no_limit,
    ) -> Pruned:
        """See `Refiner.refine`; the surviving weights are those of the dense weight."""
        rows = _Rows(self, weight, start, sums)
        for _ in range(self.cycles):
            if not rows.active.any():
                break
            rows.swap(pattern.group)
        return Pruned(
            weight=keep_on(rows.mask, weight),
            mask=rows.mask,
            numbers={**start.numbers, "swaps": (rows.mask & ~start.mask).sum(1)},
        )


class _Rows:
    """All rows of one weight while they are refined in step."""

    def __init__(self, method: Dsnot, weight: Tensor, start: Pruned, sums: InputStats) -> None:
        self.mask = start.mask.clone()
        self.given = weight * (sums.totals / sums.tokens)  # [out, in]: share of the mean output
        self.missing = keep_on(~self.mask, self.given).sum(1, keepdim=True)  # [out, 1]
        self.first = self.missing.sign()
        self.keeps_sign = method.same_sign
        self.enough = (
            method.threshold
            * {
                "relative": self.missing.abs(),
                "token": torch.ones_like(self.missing),
                "sequence": torch.full_like(self.missing, sums.rows / sums.tokens),
            }[method.units]
        )
        self.active = torch.ones_like(self.missing, dtype=torch.bool)  # [out, 1]
        tiny = torch.finfo(torch.float32).tiny  # a constant input has no variance
        gain = self.given.abs() / (sums.variance**method.power).clamp_min(tiny)
        wanda = weight.abs() * sums.squares.sqrt()
        positive, negative = self.given > 0, self.given < 0
        count = method.cycles
        self.grow = [_Queue(gain, ~self.mask & sign, count) for sign in (positive, negative)]
        self.drop = [_Queue(-wanda, self.mask & sign, count) for sign in (positive, negative)]
        scores = wanda if start.scores is None else start.scores
        self.scores = scores.masked_fill(~self.mask, torch.inf)  # of what a group may still lose

    def swap(self, group: int) -> None:
        """One weight grows and one is removed in each active row; with `group`, in one group."""
        lacks, exceeds = self.missing > 0, self.missing < 0
        grown, can_grow = _head(self.grow, lacks)
        if group:
            removed, can_drop = self._weakest(grown // group * group, group)
        else:
            removed, can_drop = _head(self.drop, exceeds)
        after = self.missing + self.given.gather(1, removed) - self.given.gather(1, grown)
        self.active &= can_grow & can_drop & (self.missing.abs() > self.enough)
        if group or self.keeps_sign:
            self.active &= after.sign() == self.first
        self.mask.scatter_(1, grown, self.active | self.mask.gather(1, grown))
        self.mask.scatter_(1, removed, ~self.active & self.mask.gather(1, removed))
        self.missing = torch.where(self.active, after, self.missing)
        _advance(self.grow, lacks, self.active)
        if group:
            spent = self.scores.gather(1, removed).masked_fill(self.active, torch.inf)
            self.scores.scatter_(1, removed, spent)
        else:
            _advance(self.drop, exceeds, self.active)

    def _weakest(self, start: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """The first kept column with the lowest score in the group that begins at `start`."""
        columns = start + torch.arange(group, device=start.device)  # [out, group]
        lowest, place = self.scores.gather(1, columns).min(1, keepdim=True)
        return columns.gather(1, place), lowest.isfinite()


class _Queue:
    """For each row the columns with the highest score among the eligible, and how many are used."""

    def __init__(self, score: Tensor, eligible: Tensor, count: int) -> None:
        count = min(count, score.shape[1])
        self.columns = score.masked_fill(~eligible, -torch.inf).topk(count, dim=1).indices
        self.length = eligible.sum(1, keepdim=True).clamp_max(count)
        self.used = torch.zeros_like(self.length)


def _head(queues: list[_Queue], first: Tensor) -> tuple[Tensor, Tensor]:
    """The next column of the first queue where `first` holds, else of the second; and if any."""
    heads = [q.columns.gather(1, q.used.clamp_max(q.columns.shape[1] - 1)) for q in queues]
    left = [q.used < q.length for q in queues]
    return torch.where(first, *heads), torch.where(first, *left)


def _advance(queues: list[_Queue], first: Tensor, taken: Tensor) -> None:
    """Use up the heads that `_head` gave where they were taken."""
    queues[0].used += first & taken
    queues[1].used += ~first & taken
