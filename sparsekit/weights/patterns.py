"""Sparsity patterns such as "2:4", "50%" and "50%/tensor": exact masks and checks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from sparsekit.errors import NumericalError, PatternError, UsageError

if TYPE_CHECKING:
    from torch import Tensor


# Patterns that `inspect` looks for in addition to those of the history, and that `pack` tries; the
# strictest first.
SOUGHT = ("1:4", "2:8", "2:4", "4:8", "8:16", "3:4")
# Up to this group length, comparing all pairs of a group beats sorting it (12x at 4).
PAIRWISE_GROUP = 16


@dataclass(frozen=True, slots=True)
class Pattern:
    """A sparsity pattern: `keep` of `group` consecutive inputs, or a share of a row or tensor.

    Every mask has the exact count, by rank instead of a threshold. Of two equal scores the one in
    the lower column (for `tensor`: the lower row, then column) is kept.
    """

    keep: int = 0
    group: int = 0
    sparsity: Fraction = Fraction(0)
    """Share of zeros."""
    scope: Literal["group", "row", "tensor"] = "group"

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Parse a pattern: `2:4` keeps 2 of 4, `50%` removes half of each row, `50%/tensor` of all.

        Raises:
            UsageError: The text is not a pattern.
        """
        text = text.strip()
        if match := re.fullmatch(r"(\d+):(\d+)", text):
            keep, group = int(match[1]), int(match[2])
            if 1 <= keep <= group:
                return cls(keep=keep, group=group, sparsity=1 - Fraction(keep, group))
        if match := re.fullmatch(r"(\d+(?:\.\d+)?)%(/tensor|/row)?", text):
            sparsity = Fraction(match[1]) / 100
            if sparsity < 1:
                scope = "tensor" if match[2] == "/tensor" else "row"
                return cls(sparsity=sparsity, scope=scope)
        raise UsageError(
            f"pattern {text!r} is not understood",
            "write N:M (N of every M inputs kept, e.g. 2:4), 50% (zeros in each row) or 50%/tensor",
            code="unknown-pattern",
        )

    def __str__(self) -> str:
        if self.scope == "group":
            return f"{self.keep}:{self.group}"
        share = self.sparsity * 100  # exact: it was read from a decimal
        percent = f"{(Decimal(share.numerator) / share.denominator).normalize():f}%"
        return percent if self.scope == "row" else f"{percent}/tensor"

    def mismatch(self, columns: int) -> str:
        """Why a weight with this many inputs cannot have the pattern; empty when it can."""
        if self.scope == "group" and columns % self.group:
            return f"{columns} inputs do not divide into groups of {self.group}"
        return ""

    def zeros(self, rows: int, columns: int) -> int:
        """The number of weights that a mask removes from a `[rows, columns]` tensor."""
        if self.scope == "tensor":
            return int(self.sparsity * rows * columns)
        return rows * self._row_zeros(0, columns)

    def mask(
        self,
        scores: Tensor,  # [out, in], any float dtype
        start: int = 0,
    ) -> Tensor:
        """The mask of the highest scores, as bool `[out, in]`, True = keep.

        Args:
            scores: One score for each weight; higher is more worth keeping.
            start: The column of the weight where `scores` begins, for solvers that mask block after
                block of columns; the counts of such blocks add up exactly.

        Raises:
            NumericalError: A score is NaN.
            PatternError: The columns do not divide into groups.
        """
        if scores.isnan().any():
            raise NumericalError(f"scores for the pattern {self} contain NaN", code="not-finite")
        rows, columns = scores.shape
        if self.scope == "group":
            if reason := self.mismatch(columns):
                raise PatternError(reason, code="pattern-does-not-divide")
            return _group_mask(scores, self.keep, self.group)
        if self.scope == "row":
            return _rank_mask(scores, columns - self._row_zeros(start, columns))
        removed = self.zeros(rows, start + columns) - self.zeros(rows, start)
        return _rank_mask(scores.reshape(1, -1), scores.numel() - removed).view_as(scores)

    def check(self, weight: Tensor, name: str) -> None:
        """Refuse a weight `[out, in]` with fewer zeros than the pattern asks for.

        Raises:
            PatternError: Names the first offending row (and group).
        """
        rows, columns = weight.shape
        if reason := self.mismatch(columns):
            raise PatternError(f"{name}: {reason}", code="pattern-does-not-divide")
        zero = weight == 0
        if self.scope == "tensor":
            count, wanted = int(zero.sum()), self.zeros(rows, columns)
            if count < wanted:
                raise self._violation(name, count, wanted)
            return
        length = self.group if self.scope == "group" else columns
        wanted = length - self.keep if self.scope == "group" else self._row_zeros(0, columns)
        counts = zero.unflatten(-1, (-1, length)).sum(-1)  # [out, groups]
        if (counts >= wanted).all():
            return
        row, group = (counts < wanted).nonzero()[0].tolist()
        where = f"row {row}"
        if self.scope == "group":
            where += f", inputs {group * length} to {(group + 1) * length - 1}"
        raise self._violation(f"{name}: {where}", int(counts[row, group]), wanted)

    def _violation(self, where: str, zeros: int, wanted: int) -> PatternError:
        return PatternError(
            f"{where}: {zeros} zeros, {self} asks for {wanted}", code="pattern-violated"
        )

    def _row_zeros(self, start: int, columns: int) -> int:
        """The number of zeros of one row in the columns from `start` on."""
        if self.scope == "group":
            return columns // self.group * (self.group - self.keep)
        return int(self.sparsity * (start + columns)) - int(self.sparsity * start)


def _rank_mask(scores: Tensor, keep: int) -> Tensor:
    """True at the `keep` highest scores of each row; the lower column wins a tie."""
    import torch

    columns = scores.shape[-1]
    if keep in (0, columns):
        return torch.full(scores.shape, keep > 0, dtype=torch.bool, device=scores.device)
    lowest_kept = scores.kthvalue(columns - keep + 1, dim=-1, keepdim=True).values
    above = scores > lowest_kept
    level = scores == lowest_kept
    vacant = keep - above.sum(-1, keepdim=True)
    return above | (level & (level.cumsum(-1, dtype=torch.int32) <= vacant))


def _group_mask(scores: Tensor, keep: int, group: int) -> Tensor:
    """True at the `keep` highest scores of every `group` consecutive columns."""
    import torch

    grouped = scores.unflatten(-1, (-1, group))  # [out, groups, group]
    if group > PAIRWISE_GROUP:
        return _rank_mask(grouped.flatten(0, 1), keep).view_as(scores)
    member = grouped.unbind(-1)
    # The number of members that beat each one: all later ones until a comparison shows otherwise.
    rank = [torch.full_like(m, group - 1 - i, dtype=torch.int8) for i, m in enumerate(member)]
    for low in range(group):
        for high in range(low + 1, group):
            low_stays = (member[low] >= member[high]).view(torch.int8)
            rank[high] += low_stays
            rank[low] -= low_stays
    return torch.stack(rank, dim=-1).flatten(-2) < keep


def strictness(text: str) -> tuple[Fraction, int]:
    """A sort key with the strictest pattern first: most zeros, then the shortest group."""
    pattern = Pattern.parse(text)
    return -pattern.sparsity, pattern.group


def patterns_of(weight: Tensor, sought: Sequence[str]) -> list[str]:
    """The sought patterns that a weight has."""
    present = []
    for text in sought:
        try:
            Pattern.parse(text).check(weight, "")
        except PatternError:
            continue
        present.append(text)
    return present
