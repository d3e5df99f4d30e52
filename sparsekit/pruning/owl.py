"""OWL: blocks with more outliers among their Wanda scores keep more weights.

Source: Yin et al. 2024, "Outlier Weighed Layerwise Sparsity (OWL)", section 3; luuyin/OWL.
Differs: the mean over blocks is weighted by their sizes, so that it equals the requested share
(published: the plain mean). N:M blocks are rounded together, by largest remainder, so that their
mean is as close to the target as one step of one block allows (published: each by itself).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import torch

from sparsekit.pipeline.selection import WeightPatterns
from sparsekit.progress import Progress
from sparsekit.pruning.prepare import PruneJob
from sparsekit.solvers.input_stats import Stats
from sparsekit.text.rows import TokenRows
from sparsekit.weights.patterns import Pattern

# An outlier's score as a multiple of the mean score of its block, and the largest deviation of a
# block's share; both as published (M, lambda).
OUTLIER, SPREAD = 5.0, 0.08
# Denominator that shares of zeros are rounded to.
STEP = 10_000


def allocate(job: PruneJob, rows: TokenRows, progress: Progress) -> WeightPatterns:
    """One pattern per block, from one pass of the dense model."""
    wanted = {target.name for target in job.targets}
    outliers, sizes, names = [], [], []
    job.stream.feed(rows.tokens)
    progress.begin("allocate", len(job.stream))
    for block in job.stream:
        block.load()
        chosen = [target for target in block.targets if target.name in wanted]
        last = block.index == len(job.stream) - 1
        if chosen:
            sums = block.observe(chosen, Stats.NORMS, advance=not last)
            scores = torch.cat(
                [(block.weight(t).abs() * sums[t.name].squares.sqrt()).flatten() for t in chosen]
            )
            outliers.append(float((scores > OUTLIER * scores.mean()).double().mean()))
            sizes.append(scores.numel())
            names.append([target.name for target in chosen])
        elif not last:
            block.advance()
        progress.step(block.name)
    progress.end()
    kept = keep_shares(outliers, sizes, 1 - float(job.pattern.sparsity))
    patterns = patterns_of(kept, sizes, job.pattern)
    zeros = [float(pattern.sparsity) for pattern in patterns]
    mean = sum(share * size for share, size in zip(zeros, sizes, strict=True)) / sum(sizes)
    progress.note(
        f"blocks get from {min(zeros):.2%} to {max(zeros):.2%} zeros, "
        f"{mean:.2%} of all weights ({float(job.pattern.sparsity):.2%} requested)"
    )
    pairs = zip(names, patterns, strict=True)
    own = {name: pattern for block, pattern in pairs for name in block}
    return WeightPatterns(base=job.pattern, own=own)


def keep_shares(outliers: Sequence[float], sizes: Sequence[int], keep: float) -> list[float]:
    """The share of entries that each block keeps; their mean by size is `keep`, unless clipped.

    Args:
        outliers: Share of outliers in each block.
        sizes: Number of entries of each block.
        keep: Share to keep over all blocks.
    """
    low, high = min(outliers), max(outliers)
    span = high - low or 1.0
    scaled = [(share - low) / span * 2 * SPREAD for share in outliers]
    mean = sum(s * n for s, n in zip(scaled, sizes, strict=True)) / sum(sizes)
    return [min(1.0, max(0.0, keep + share - mean)) for share in scaled]


def patterns_of(kept: Sequence[float], sizes: Sequence[int], pattern: Pattern) -> list[Pattern]:
    """Patterns of the same kind that keep these shares as closely as possible."""
    if pattern.scope != "group":
        zeros = [Fraction(round((1 - share) * STEP), STEP) for share in kept]
        return [replace(pattern, sparsity=min(share, 1 - Fraction(1, STEP))) for share in zeros]
    group = pattern.group
    counts = [max(1, math.floor(share * group)) for share in kept]
    # Entries lost by rounding down go to the blocks that lost the largest share.
    goal = sum(share * n for share, n in zip(kept, sizes, strict=True))
    order = sorted(range(len(kept)), key=lambda i: counts[i] - kept[i] * group)
    for index in order:
        have = sum(count / group * n for count, n in zip(counts, sizes, strict=True))
        if counts[index] < group and have + sizes[index] / group / 2 <= goal:
            counts[index] += 1
    return [replace(pattern, keep=count, sparsity=1 - Fraction(count, group)) for count in counts]
