"""DSnoT: swap kept and pruned weights in each row.

Source: Zhang et al. 2024, "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs",
algorithm 1; zyxxmu/DSnoT@4c029df, `lib/prune.py`.
Differs: candidates are in one list per sign, and a row stops when a list is exhausted; published
pointers run on into the weights of the other sign, which on small layers changes the count of a
row. A weight whose expected contribution is 0 is never swapped (published: it stands for column 0).
For N:M, of equal scores the lower column is removed (published: an unstable sort). If the pruner
has no score per weight, Wanda's is used. Kept weights have their dense values: updates of the
pruner are lost, as in the source. By default the threshold is relative to the first error of each
row, so that it means the same in every layer, and only attention is refined; `--preset published`
uses the sum over a calibration row, which grows with its length.
Cost: the mean and variance of each input, in float32, and up to 50 swaps per row, all rows at once.
Result: perplexity 194.2 from Wanda's 193.8 (SmolLM2-135M at 2:4, dense 22.9).
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
    """Grow the weight with the largest gain relative to its variance, remove the lowest score."""

    needs: ClassVar[Stats] = Stats.MOMENTS
    initial: ClassVar[str] = "wanda"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "published": {"units": "sequence", "same_sign": False}
    }
    rowwise: ClassVar[bool] = True
    cycles: int = 50
    """Maximum number of swaps per row."""
    threshold: float = 0.1
    """Stop a row when its expected error is at most this, in `units`."""
    units: Literal["relative", "token", "sequence"] = "relative"
    """Units of the threshold: share of the row's first error, mean output per token, or sum over a
    calibration row (sequence)."""
    power: float = 1.0
    """Exponent of the input variance by which the gain is divided."""
    same_sign: bool = True
    """Stop a row before its expected error changes sign (always for N:M)."""
    modules: Literal["all", "attention"] = "attention"
    """Weights to refine; others keep the initial mask."""

    def applies_to(self, name: str) -> bool:
        """See `Refiner.applies_to`."""
        return self.modules == "all" or "attn" in name or "attention" in name

    def warnings(self, pattern: Pattern, pruner: Pruner | None) -> list[str]:
        """See `Refiner.warnings`."""
        notes = []
        if pattern.scope == "group":
            known = f"DSnoT is known to make {pattern} models worse"
            notes.append(f"{known}: compare with the initial method")
        if pruner is not None and pruner.updates:
            method = type(pruner).__name__.lower()
            notes.append(f"where DSnoT refines, the updates of {method} to kept weights are lost")
        return notes

    def refine(
        self,
        weight: Tensor,
        start: Pruned,
        sums: InputStats,
        pattern: Pattern,
        should_continue: ShouldContinue = no_limit,
    ) -> Pruned:
        """See `Refiner.refine`; kept weights have their dense values."""
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
    """All rows of one weight, refined in parallel."""

    def __init__(self, method: Dsnot, weight: Tensor, start: Pruned, sums: InputStats) -> None:
        self.mask = start.mask.clone()
        self.contribution = weight * (
            sums.totals / sums.tokens
        )  # [out, in]: contribution to the mean output
        self.missing = keep_on(~self.mask, self.contribution).sum(1, keepdim=True)  # [out, 1]
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
        gain = self.contribution.abs() / (sums.variance**method.power).clamp_min(tiny)
        wanda = weight.abs() * sums.squares.sqrt()
        positive, negative = self.contribution > 0, self.contribution < 0
        count = method.cycles
        self.grow = [_Queue(gain, ~self.mask & sign, count) for sign in (positive, negative)]
        self.drop = [_Queue(-wanda, self.mask & sign, count) for sign in (positive, negative)]
        scores = wanda if start.scores is None else start.scores
        self.scores = scores.masked_fill(
            ~self.mask, torch.inf
        )  # of weights that a group may still lose

    def swap(self, group: int) -> None:
        """Grow one weight and remove one in each active row; with `group`, in the same group."""
        lacks, exceeds = self.missing > 0, self.missing < 0
        grown, can_grow = _head(self.grow, lacks)
        if group:
            removed, can_drop = self._weakest(grown // group * group, group)
        else:
            removed, can_drop = _head(self.drop, exceeds)
        after = (
            self.missing + self.contribution.gather(1, removed) - self.contribution.gather(1, grown)
        )
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
        """The first kept column with the lowest score in the group that starts at `start`."""
        columns = start + torch.arange(group, device=start.device)  # [out, group]
        lowest, place = self.scores.gather(1, columns).min(1, keepdim=True)
        return columns.gather(1, place), lowest.isfinite()


class _Queue:
    """The eligible columns of each row in descending order of score, and how many are used."""

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
    """Remove the heads that were taken."""
    queues[0].used += first & taken
    queues[1].used += ~first & taken
