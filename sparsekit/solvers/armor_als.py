"""Fit W ≈ A S B, A and B block-diagonal and S N:M sparse, by block coordinate descent.

Blocks are square, [b, b]: A has J = out/b of them, B has K = in/b, so that S falls into J x K
blocks and block (j, k) of the product is A[j] S[j, k] B[k]. The loss is a quadratic form H in the
inputs with a diagonal H,

    tr((W − A S B) H (W − A S B)ᵀ) / tr(W H Wᵀ),

so that all J x K blocks are independent once A and B are given. A step for A or B has a closed
form; a step for S goes through its groups. No step lets the loss rise.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from sparsekit.weights.block_diagonal import (
    column_blocks,
    row_blocks,
    times_left,
    times_right,
)

# Proximal term, as a share of the mean diagonal of a normal matrix: it keeps a block at its last
# value in directions that the data does not determine.
PROXIMAL = 1e-6
SMALLEST = 1e-30  # lower bound of that mean
# Share of the mean of all groups at or below which a group's matrix counts as zero.
DEAD = 1e-12
# Ridge for the few unknowns of a group, whose matrix is inverted in float64.
GROUP_RIDGE = 1e-9
# The extrapolation length is multiplied by the first factor if it lowered the loss, else by the
# second.
LONGER, SHORTER = 1.3, 0.5


class BlockFit:
    """The factors of one weight while they are fitted.

    Args:
        weight: W `[out, in]` float32.
        core: The first S `[out, in]`, zero off the mask; A and B begin as identities.
        metric: The diagonal of H, `[in]` float32, positive.
        block: b, which divides both sides.
        keep: N of N:M.
        group: M, which divides b.
    """

    def __init__(
        self,
        weight: Tensor,
        core: Tensor,
        metric: Tensor,
        *,
        block: int,
        keep: int,
        group: int,
    ) -> None:
        rows, columns = weight.shape
        self.block, self.group = block, group
        self.core = core.clone()
        identity = torch.eye(block, device=weight.device)
        self.left = identity.repeat(rows // block, 1, 1)  # A [J, b, b]
        self.right = identity.repeat(columns // block, 1, 1)  # B [K, b, b]
        self._weight = weight
        self._metric = metric
        self._weighted = weight * metric
        self._total = (self._weighted * weight).sum().clamp_min(torch.finfo(torch.float32).tiny)
        supports = list(combinations(range(group), keep))
        self._supports = torch.tensor(supports, device=weight.device)  # [supports, N]
        self._before: tuple[Tensor, Tensor, Tensor] | None = None
        self._reach = 1.0  # extrapolation length, as a multiple of the last sweep's step

    def product(self) -> Tensor:
        """A S B, `[out, in]`."""
        return times_left(self.left, times_right(self.core, self.right))

    def loss(self) -> float:
        """The relative loss: 1 for S = 0."""
        error = self._weight - self.product()
        return float((error * error * self._metric).sum() / self._total)

    def sweep(self) -> float:
        """Update A, B and S in turn, extrapolate their step, and return the loss."""
        self.fit_left()
        self.fit_right()
        self.fit_core()
        return self._extrapolate(self.loss())

    def _extrapolate(self, loss: float) -> float:
        """Repeat the step since the last sweep, or a part of it, if that lowers the loss.

        The steps of coordinate descent are small where the factors can compensate for each other;
        this roughly halves the number of sweeps.
        """
        here = self.left, self.right, self.core
        before, self._before = self._before, tuple(part.clone() for part in here)
        if before is None:
            return loss
        step = [now - then for now, then in zip(here, before, strict=True)]
        step[2] *= (here[2] != 0) & (before[2] != 0)
        for _ in range(2):
            self.left, self.right, self.core = (
                now + self._reach * change for now, change in zip(here, step, strict=True)
            )
            if (further := self.loss()) < loss:
                self._reach *= LONGER
                return further
            self._reach *= SHORTER
        self.left, self.right, self.core = here
        return loss

    def fit_left(self) -> None:
        """Solve for A: with P = S B, A[j] (P H Pᵀ)[j] = (W H Pᵀ)[j] for each block row j."""
        reached = times_right(self.core, self.right)
        pulled = row_blocks(reached * self._metric, self.block).mT  # H Pᵀ [J, in, b]
        normal = row_blocks(reached, self.block) @ pulled
        wanted = row_blocks(self._weight, self.block) @ pulled
        self.left = _solve(normal, wanted.mT, self.left.mT).mT.contiguous()

    def fit_right(self) -> None:
        """Solve for B: with Q = A S, (Qᵀ Q)[k] B[k] = (Qᵀ W)[k] for each block column k.

        The weights of the columns cancel: each column of B is its own least-squares problem.
        """
        reached = column_blocks(times_left(self.left, self.core), self.block)  # Q [K, out, b]
        normal = reached.mT @ reached
        wanted = reached.mT @ column_blocks(self._weight, self.block)
        # Contiguous, as when it is read from disk, so that products have the same bits.
        self.right = _solve(normal, wanted, self.right).contiguous()

    def fit_core(self) -> None:
        """Solve for support and values of every group of M inputs, one group of a block at a time.

        With U = Aᵀ A of a block row and V = B H Bᵀ, the loss as a function of S is
        tr(Sᵀ U S V) − 2 tr(Sᵀ Aᵀ W H Bᵀ) + constant. The J x K blocks are solved together; within
        a block row after row, and within a row group after group, each after all changes before it.
        """
        b = self.block
        curve = self.left.mT @ self.left  # U [J, b, b]
        diagonal = curve.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(torch.float32).tiny)
        curve = curve / diagonal[:, :, None]  # each row's problem in units of its own U[i, i]
        inner = (self.right * column_blocks(self._metric, b)) @ self.right.mT  # V [K, b, b]
        image = row_blocks(times_right(self.core, inner), b)  # S V [J, b, in]
        pull = times_right(times_left(self.left.mT, self._weighted), self.right.mT)
        pull = row_blocks(pull, b) / diagonal[:, :, None]
        core = row_blocks(self.core, b)
        solve = _GroupSolver(inner, self._supports, self.group)
        for i in range(b):
            slope = (curve[:, i : i + 1] @ image)[:, 0] - pull[:, i]  # half the gradient [J, in]
            change = solve.row(core[:, i], slope)
            core[:, i] += change
            image[:, i] += times_right(change, inner)


class _GroupSolver:
    """The best values of groups, for each support and in all blocks at once.

    Args:
        metric: The diagonal blocks of V, `[K, b, b]`.
        supports: All supports of a group, `[supports, N]`.
        group: M.
    """

    def __init__(self, metric: Tensor, supports: Tensor, group: int) -> None:
        self.side, self.group = metric.shape[1], group
        # For each group the part of V that couples it with itself and earlier inputs: [K, stop, M].
        self.columns = [
            metric[:, :stop, stop - group : stop].contiguous()
            for stop in range(group, self.side + 1, group)
        ]
        self.maps = self._maps(metric, supports)

    def row(
        self,
        row: Tensor,  # one row of S for each block row, [J, in]
        slope: Tensor,  # half its gradient, [J, in]
    ) -> Tensor:
        """The change in one pass over the groups, `[J, in]`; the K blocks are independent."""
        slope, old = (column_blocks(t, self.side).contiguous() for t in (slope, row))  # [K, J, b]
        change = -old  # of later groups: without their own part
        for n, columns in enumerate(self.columns):
            stop = (n + 1) * self.group
            part = slice(stop - self.group, stop)
            # The gradient of the group after the changes before it, without its own part.
            free = torch.baddbmm(slope[..., part], change[..., :stop], columns, beta=-1, alpha=-1)
            change[..., part] += _choose(free, self.maps[n])
        return change.transpose(0, 1).flatten(1)

    def _maps(self, metric: Tensor, supports: Tensor) -> Tensor:
        """For each group and support the map from the free pull to the best values.

        Returns:
            `[groups of a block, K, M, supports * M]` float32.
        """
        group, (count, keep), device = self.group, supports.shape, metric.device
        starts = torch.arange(0, self.side, group, device=device)
        place = starts[:, None, None] + supports  # [groups, supports, N]
        parts = metric.double()[:, place[..., :, None], place[..., None, :]]
        size = parts.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]  # [K, groups, s, 1, 1]
        dead = size <= DEAD * size.mean()  # inputs without effect: their values become 0
        size = size.masked_fill(dead, 1.0)
        ridge = GROUP_RIDGE * torch.eye(keep, device=device, dtype=torch.float64)
        inverse, _ = torch.linalg.inv_ex(parts / size + ridge)
        inverse = inverse.masked_fill(dead, 0.0) / size
        maps = torch.zeros(*parts.shape[:3], group, group, device=device)
        index = torch.arange(count, device=device)[:, None, None]
        into = index, supports[:, :, None], supports[:, None, :]
        maps[:, :, into[0], into[1], into[2]] = inverse.float()
        return maps.permute(1, 0, 3, 2, 4).flatten(3).contiguous()


def _choose(
    free: Tensor,  # [K, J, M]
    maps: Tensor,  # [K, M, supports * M]
) -> Tensor:
    """The values of the support that lowers the loss most, `[K, J, M]`."""
    values = (free @ maps).unflatten(-1, (-1, free.shape[-1]))  # [K, J, supports, M]
    gain = (values @ free[..., None])[..., 0]
    best = gain.argmax(-1)[..., None, None].expand(*free.shape[:2], 1, free.shape[-1])
    return values.gather(2, best)[:, :, 0]


def _solve(normal: Tensor, wanted: Tensor, last: Tensor) -> Tensor:
    """Solve `normal` X = `wanted`, batched; X stays at `last` where `normal` is singular."""
    size = normal.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(SMALLEST)
    hold = (PROXIMAL * size)[..., None, None]
    system = normal + hold * torch.eye(normal.shape[-1], device=normal.device)
    return torch.linalg.solve(system, wanted + hold * last)
