"""ARMOR's published solver: W ≈ A S B by Adam and one re-solved group of each block at a time.

An oracle for `sparsekit.solvers.armor_als`, which fits the same factors. One iteration is an Adam
step on A, B and the values of S together; then in every block of S one group of M inputs, drawn
with probability ∝ the L1 norm of its gradient, gets its best support and values.

Source: Liu et al. 2025, ARMOR, section 3 and algorithm 1; LawrenceRLiu/ARMOR@3977e54.
Differs: gradients are written out, and the group's system is taken from the gradient instead of a
residual that is computed anew; both only save time.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from sparsekit.weights.block_diagonal import times_left, times_right

# Added to a group's matrix, and to the square of its column of A.
RIDGE, FLOOR = 1e-9, 1e-8
TINY = torch.finfo(torch.float32).tiny


class BlockAdam:
    """The factors of one weight while they are trained.

    Args:
        weight: W `[out, in]` float32.
        core: The first S `[out, in]`.
        mask: Its support `[out, in]`, N of every M inputs.
        importance: h `[in]` float32, positive; in any unit, since the loss is a share of that
            of S = 0 (published: twice the mean square of the inputs).
        block: Side of the blocks, which divides both sides of W.
        keep: N of N:M.
        group: M, which divides `block`.
        rate: Step size of Adam.
        seed: Of the groups that are drawn.
    """

    def __init__(
        self,
        weight: Tensor,
        core: Tensor,
        mask: Tensor,
        importance: Tensor,
        *,
        block: int,
        keep: int,
        group: int,
        rate: float,
        seed: int = 0,
    ) -> None:
        rows, columns = weight.shape
        device = weight.device
        identity = torch.eye(block, device=device)
        self.left = identity.repeat(rows // block, 1, 1)  # A [J, b, b]
        self.right = identity.repeat(columns // block, 1, 1)  # B [K, b, b]
        self.values = core.clone()  # X [out, in]; what is off the mask stays and has no effect
        self.mask = mask.clone()
        self.block, self.group, self.keep = block, group, keep
        self._weight = weight
        self._importance = importance
        self._total = (weight.square() * importance).sum().clamp_min(TINY)
        self._optimizer = torch.optim.Adam([self.left, self.right, self.values], lr=rate)
        self._generator = torch.Generator(device).manual_seed(seed)
        self._supports = torch.tensor(list(combinations(range(group), keep)), device=device)

    @property
    def core(self) -> Tensor:
        """S, `[out, in]`."""
        return self.values * self.mask

    def loss(self) -> float:
        """The loss, 1 for S = 0."""
        error = times_left(self.left, times_right(self.core, self.right)) - self._weight
        return float((error.square() * self._importance).sum() / self._total)

    def step(self) -> None:
        """One iteration."""
        core = self.core
        reached, error, inner = self._errors(core)
        scale = 2 / self._total
        b = self.block
        self.left.grad = scale * (error.unflatten(0, (-1, b)) @ reached.unflatten(0, (-1, b)).mT)
        parts = (t.unflatten(1, (-1, b)).transpose(0, 1) for t in (core, inner))
        self.right.grad = scale * (next(parts).mT @ next(parts))
        self.values.grad = scale * times_right(inner, self.right.mT) * self.mask
        self._optimizer.step()
        self._solve_groups()

    def _errors(self, core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """S B, the weighted error E = (A S B − W) D, and Aᵀ E; all `[out, in]`."""
        reached = times_right(core, self.right)
        error = (times_left(self.left, reached) - self._weight).mul_(self._importance)
        return reached, error, times_left(self.left.mT, error)

    def _solve_groups(self) -> None:
        """The best support and values of one group of every block."""
        b, group = self.block, self.group
        slope = times_right(self._errors(self.core)[2], self.right.mT)
        slope = slope.unflatten(1, (-1, group))  # [out, in/M, M]
        row, place = self._draw(slope)  # [J, K] each: the row in the matrix, the group in the row
        block_row, block_column = row // b, place // (b // group)
        inputs = place[..., None] * group + torch.arange(group, device=row.device)  # [J, K, M]
        side = self.right[block_column[..., None], inputs % b]  # the group's rows of B [J, K, M, b]
        weights = self._importance.view(-1, b)[block_column][..., None, :]
        gram = (side * weights) @ side.mT  # [J, K, M, M]
        size = self.left.square().sum(1)[block_row, row % b][..., None]  # ‖column of A‖² [J, K, 1]
        old = self.values[row[..., None], inputs] * self.mask[row[..., None], inputs]
        # The gradient with the group's own part taken out.
        pull = slope[row, place] - size * (old[..., None, :] @ gram)[..., 0, :]
        s = self._supports
        inverse = _inverse(gram[..., s[:, :, None], s[:, None, :]])  # [J, K, supports, N, N]
        wanted = pull[..., s][..., None]  # [J, K, supports, N, 1]
        solved = inverse @ wanted
        best = (wanted * solved).sum((-2, -1)).argmax(-1)  # [J, K]
        chosen = solved[..., 0].gather(2, best[..., None, None].expand(*best.shape, 1, self.keep))
        at = inputs.gather(-1, s[best])  # [J, K, N]
        self.mask[row[..., None], inputs] = False
        self.mask[row[..., None], at] = True
        self.values[row[..., None], at] = -chosen[:, :, 0] / (size + FLOOR)

    def _draw(self, slope: Tensor) -> tuple[Tensor, Tensor]:
        """For each block one group: its row in the matrix and its number in the row, `[J, K]`."""
        b, groups = self.block, self.block // self.group
        norms = slope.abs().sum(-1).unflatten(1, (-1, groups)).unflatten(0, (-1, b))
        norms = norms.transpose(1, 2).flatten(2)  # [J, K, b * groups]
        drawn = torch.multinomial(norms.flatten(0, 1) + RIDGE, 1, generator=self._generator)
        drawn = drawn.view(norms.shape[:2])
        rows = torch.arange(len(norms), device=slope.device)[:, None] * b + drawn // groups
        columns = torch.arange(norms.shape[1], device=slope.device) * groups + drawn % groups
        return rows, columns


def _inverse(matrices: Tensor) -> Tensor:
    """Inverses of small symmetric matrices, `[..., N, N]`; those of 2 x 2 are written out."""
    n = matrices.shape[-1]
    matrices = matrices + RIDGE * torch.eye(n, device=matrices.device)
    if n != 2:
        return torch.linalg.inv_ex(matrices)[0]
    a, b, d = matrices[..., 0, 0], matrices[..., 0, 1], matrices[..., 1, 1]
    flipped = torch.stack([torch.stack([d, -b], -1), torch.stack([-b, a], -1)], -2)
    return flipped / (a * d - b * b).clamp_min(TINY)[..., None, None]
