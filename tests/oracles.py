"""Slow, obviously right versions of what sparsekit computes, and small problems to run them on.

The oracles are written from the published formulas, in plain loops or explicit inverses and in
float64, and share no code with the package.
"""

from collections.abc import Callable
from fractions import Fraction
from itertools import combinations

import torch
from torch import Tensor

from sparsekit.solvers.input_stats import InputStats, Stats
from sparsekit.weights.patterns import Pattern

# ---------------------------------------------------------------------------------- problems


def weight_of(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A normal random weight `[rows, columns]` with unequal columns."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(columns, generator=generator) + 0.5
    return torch.randn(rows, columns, generator=generator) * scale


def inputs_of(tokens: int, columns: int, seed: int = 0, dead: tuple[int, ...] = ()) -> Tensor:
    """Correlated inputs `[tokens, columns]` of unequal size; the columns `dead` are zero."""
    generator = torch.Generator().manual_seed(1000 + seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    shared = torch.randn(tokens, 1, generator=generator)
    x = torch.randn(tokens, columns, generator=generator) @ mix + 0.5 * shared
    x = x * torch.logspace(-0.5, 0.5, columns)[torch.randperm(columns, generator=generator)]
    x[:, list(dead)] = 0
    return x


def sums_of(inputs: Tensor, want: Stats = Stats.GRAM, calibration_rows: int = 2) -> InputStats:
    """The sums over inputs that are fed as this many calibration rows."""
    sums = InputStats(inputs.shape[1], want)
    for row in inputs.chunk(calibration_rows):
        sums.update(row)
    return sums


def damped(gram: Tensor, damping: float) -> Tensor:
    """A Gram matrix plus a share of its mean diagonal, float64."""
    gram = gram.double()
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def loss(dense: Tensor, pruned: Tensor, gram: Tensor) -> float:
    """tr((W−Ŵ) G (W−Ŵ)ᵀ) in float64."""
    change = dense.double() - pruned.double()
    return float(((change @ gram.double()) * change).sum())


# ------------------------------------------------------------------------------------- masks


def best_of_group(scores: Tensor, keep: int, group: int) -> Tensor:
    """The N:M mask with the largest sum of kept scores, by trying all choices of every group.

    `combinations` counts upwards and `max` takes the first of equals, so of equal scores the one
    in the lower column stays. Sums are fractions: rounding makes no ties.
    """
    rows, columns = scores.shape
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for row in range(rows):
        for start in range(0, columns, group):
            exact = [Fraction(float(s)) for s in scores[row, start : start + group]]
            choices = combinations(range(group), keep)
            best = max(choices, key=lambda choice, exact=exact: sum(exact[i] for i in choice))
            for i in best:
                mask[row, start + i] = True
    return mask


def best_of_rank(scores: Tensor, keep: int) -> Tensor:
    """True at the `keep` highest of all scores; of equal ones at the lower row, then column."""
    flat = scores.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: (-flat[i], i))
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order[:keep]] = True
    return mask.view_as(scores)


def best_of_rows(scores: Tensor, keep: int) -> Tensor:
    """True at the `keep` highest scores of each row."""
    return torch.stack([best_of_rank(row, keep) for row in scores])


class PublishedThreshold(Pattern):
    """Unstructured pruning as published, for parity with recorded runs only.

    Everything up to the score of rank ⌊n r⌋ (counted from zero) goes, so one weight more than
    asked for; the comparison group is all of what is masked at once.
    """

    __slots__ = ()

    def mask(self, scores: Tensor, start: int = 0) -> Tensor:
        """See `Pattern.mask`."""
        assert self.scope == "tensor"
        ordered = scores.flatten().sort().values
        return scores > ordered[int(scores.numel() * float(self.sparsity))]


def exact_count(mask: Tensor, pattern: Pattern) -> bool:
    """Whether a mask keeps exactly as many as the pattern says, wherever it says so."""
    rows, columns = mask.shape
    if pattern.scope == "group":
        return all(
            int(mask[row, start : start + pattern.group].sum()) == pattern.keep
            for row in range(rows)
            for start in range(0, columns, pattern.group)
        )
    if pattern.scope == "row":
        zeros = columns * pattern.sparsity.numerator // pattern.sparsity.denominator
        return all(int((~row).sum()) == zeros for row in mask)
    zeros = rows * columns * pattern.sparsity.numerator // pattern.sparsity.denominator
    return int((~mask).sum()) == zeros


# ------------------------------------------------------------------------------------ scores


def wanda_scores(weight: Tensor, inputs: Tensor) -> Tensor:
    """|W_ij| ‖X_j‖₂."""
    scores = torch.zeros(weight.shape, dtype=torch.float64)
    for i, j in _places(weight):
        norm = sum(float(x) ** 2 for x in inputs[:, j]) ** 0.5
        scores[i, j] = abs(float(weight[i, j])) * norm
    return scores


def nowag_scores(weight: Tensor, inputs: Tensor, epsilon: float = 1e-5) -> Tensor:
    """W̄_ij² Σ x_j², with columns and then rows of W̄ divided by their norm + epsilon."""
    rows, columns = weight.shape
    normal = weight.double().clone()
    for j in range(columns):
        normal[:, j] /= sum(float(w) ** 2 for w in normal[:, j]) ** 0.5 + epsilon
    for i in range(rows):
        normal[i] /= sum(float(w) ** 2 for w in normal[i]) ** 0.5 + epsilon
    scores = torch.zeros(weight.shape, dtype=torch.float64)
    for i, j in _places(weight):
        scores[i, j] = normal[i, j] ** 2 * sum(float(x) ** 2 for x in inputs[:, j])
    return scores


def ria_scores(weight: Tensor, inputs: Tensor, power: float = 0.5) -> Tensor:
    """(|W_ij| / column sum + |W_ij| / row sum) · (root of the mean squared input)^power."""
    scores = torch.zeros(weight.shape, dtype=torch.float64)
    for i, j in _places(weight):
        size = abs(float(weight[i, j]))
        column = sum(abs(float(w)) for w in weight[:, j])
        row = sum(abs(float(w)) for w in weight[i])
        mean_square = sum(float(x) ** 2 for x in inputs[:, j]) / len(inputs)
        scores[i, j] = (size / column + size / row) * (mean_square**0.5) ** power
    return scores


def _places(weight: Tensor) -> list[tuple[int, int]]:
    rows, columns = weight.shape
    return [(i, j) for i in range(rows) for j in range(columns)]


# ---------------------------------------------------------------------------------- solutions


def sparsegpt_hessian(inputs: Tensor, calibration_rows: int, damping: float = 0.01) -> Tensor:
    """H = 2/n Σ x xᵀ, dead inputs set to 1 on the diagonal, then damped; float64."""
    x = inputs.double()
    hessian = 2 / calibration_rows * x.T @ x
    for j in range(len(hessian)):
        if hessian[j, j] == 0:
            hessian[j, j] = 1
    return damped(hessian, damping)


def sparsegpt(
    weight: Tensor,  # [out, in], dead inputs already zero
    hessian: Tensor,  # [in, in] float64, damped
    choose: Callable[[Tensor, int], Tensor],  # scores [out, block], first column -> mask
    block: int,
) -> tuple[Tensor, Tensor, float]:
    """Optimal-brain-surgeon column by column, inverting the trailing matrix for every column.

    Returns:
        The pruned weight (float64), its mask, and the loss that the removals add up to,
        Σ w² / (2 [H⁻¹]₀₀) with the inverse of the columns from the removed one on.
    """
    w = weight.double().clone()
    rows, columns = w.shape
    mask = torch.ones(rows, columns, dtype=torch.bool)
    inverse = [torch.linalg.inv(hessian[i:, i:]) for i in range(columns)]
    total = 0.0
    for i in range(columns):
        if i % block == 0:
            stop = min(i + block, columns)
            variance = torch.stack([inverse[j][0, 0] for j in range(i, stop)])
            mask[:, i:stop] = choose(w[:, i:stop] ** 2 / variance, i)
        for row in range(rows):
            if not mask[row, i]:
                total += float(w[row, i] ** 2 / (2 * inverse[i][0, 0]))
                w[row, i:] -= w[row, i] / inverse[i][0, 0] * inverse[i][0]
                w[row, i] = 0
    return w, mask, total


def gptq(
    weight: Tensor,  # [out, in]
    hessian: Tensor,  # [in, in] float64, damped
    group: int,
    low: int,
    high: int,
    choose: Callable[[Tensor], Tensor] | None = None,  # scores [out, columns] -> mask
    unit: int = 1,  # columns whose mask is chosen together
) -> Tensor:
    """Column by column to the nearest code, inverting the trailing matrix for every column.

    A group's scale, a bfloat16, spans the largest number that it holds when its first column is
    reached; what was 0 is rounded to 0, or what is not chosen when its unit is reached (of a scale:
    when the group is). The result is codes times scales, float64.
    """
    w = weight.double().clone()
    kept = weight != 0
    scale = torch.ones(len(w), dtype=torch.float64)
    for i in range(w.shape[1]):
        for length in (group, unit) if group >= unit else (unit,):
            if choose is not None and i % length == 0:
                rest = range(i, i + length)
                variance = [torch.linalg.inv(hessian[j:, j:])[0, 0] for j in rest]
                kept[:, i : i + length] = choose(w[:, i : i + length] ** 2 / torch.stack(variance))
        if i % group == 0:
            held = w[:, i : i + group] * kept[:, i : i + group]
            scale = (held.abs().amax(1) / ((high - low) / 2)).bfloat16().double()
            scale[scale == 0] = 1
        inverse = torch.linalg.inv(hessian[i:, i:])
        rounded = (w[:, i] / scale).round().clamp(low, high) * scale * kept[:, i]
        w[:, i:] -= torch.outer((w[:, i] - rounded) / inverse[0, 0], inverse[0])
        w[:, i] = rounded
    return w


def least_squares_on(weight: Tensor, mask: Tensor, gram: Tensor) -> Tensor:
    """Row by row the normal equations G_SS ŵ_S = G_S: w on the support S, float64."""
    gram = gram.double()
    solved = torch.zeros(weight.shape, dtype=torch.float64)
    for row in range(len(weight)):
        support = mask[row].nonzero().flatten()
        if len(support):
            right = gram[support] @ weight[row].double()
            solved[row, support] = torch.linalg.solve(gram[support][:, support], right)
    return solved


def best_support_loss(weight: Tensor, keep: int, gram: Tensor) -> float:
    """The least possible loss when every row keeps `keep` weights, by trying all supports."""
    columns = weight.shape[1]
    total = 0.0
    for row in weight:
        losses = []
        for support in combinations(range(columns), keep):
            mask = torch.zeros(1, columns, dtype=torch.bool)
            mask[0, list(support)] = True
            losses.append(loss(row[None], least_squares_on(row[None], mask, gram), gram))
        total += min(losses)
    return total


def alps_mask(
    weight: Tensor,
    gram: Tensor,
    project: Callable[[Tensor], Tensor],
    steps: int = 300,
    penalty: float = 0.1,
) -> tuple[Tensor, int]:
    """The support of the sparse copy after ADMM, and the number of steps that were made.

    The schedule is the published one (mazumder-lab/ALPS@bbdad62, `alps.py`), with an explicit
    inverse in each step. `gram` is damped; `project` gives the mask for absolute values.
    """
    scale = gram.double().diagonal().sqrt()
    unit = gram.double() / scale[:, None] / scale[None]
    eye = torch.eye(len(unit), dtype=torch.float64)
    w = weight.double() * scale
    first = before = project(w.abs())
    sparse, dual = w * first, torch.zeros_like(w)
    kept, started = int(first.sum()), False
    for step in range(1, steps + 1):
        dense = (w @ unit + penalty * sparse - dual) @ torch.linalg.inv(unit + penalty * eye)
        mask = project((dense + dual / penalty).abs())
        sparse = (dense + dual / penalty) * mask
        dual = dual + penalty * (dense - sparse)
        if step % 3:
            continue
        changed = int((mask != before).sum())  # a swap counts twice
        before = mask
        if changed / kept > 0.1:
            started, penalty = True, penalty * 1.3
        elif changed / kept > 0.005:
            started, penalty = True, penalty * 1.2
        elif changed and started:
            penalty *= 1.1
        elif changed:
            penalty, sparse, dual = penalty / 5, w * first, torch.zeros_like(w)
        elif started:
            break
        else:
            penalty /= 5
        if step > 30 and changed / kept < 3e-4:
            break
    return mask, step
