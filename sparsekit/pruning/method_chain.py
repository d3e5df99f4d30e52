"""What is done to one weight: a first mask, its refinement, least squares on the mask."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from sparsekit import registry as methods
from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.safetensors_file import TensorPlace
from sparsekit.errors import DataError, PatternError
from sparsekit.model.architecture import Target
from sparsekit.pipeline.selection import WeightPatterns
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.methods import Pruned, Pruner
from sparsekit.pruning.refiners import Refiner, ShouldContinue, no_limit
from sparsekit.quantization.methods.gptq import Gptq
from sparsekit.solvers.hessian import FACTORING_BYTES, require_finite, solve_on_support, unit_gram
from sparsekit.solvers.input_stats import InputStats, Stats
from sparsekit.solvers.low_rank import compensate
from sparsekit.weights.core import Values
from sparsekit.weights.form import Form
from sparsekit.weights.grids import Grid
from sparsekit.weights.packed import factor_shapes
from sparsekit.weights.patterns import Pattern

# Conjugate-gradient steps of --reconstruct cg, and the damping of its Gram matrix.
RECONSTRUCT_STEPS = 20
RECONSTRUCT_DAMPING = 0.01


@dataclass(frozen=True, kw_only=True)
class MethodChain:
    """The methods of a run, in the order in which they are applied."""

    pruner: Pruner | None
    given: Checkpoint | None
    """Where the first mask comes from when no pruner makes it."""
    refiner: Refiner | None
    reconstruct: Literal["none", "cg"]
    rank: Fraction
    """Of the low-rank compensation, as a share of the smaller side of a weight; 0: none."""
    grid: Grid | None = None
    """What the kept weights are put on; None: they stay as they are."""

    @classmethod
    def build(cls, config: PruneConfig, given: Checkpoint | None) -> MethodChain:
        """The methods that a checked configuration names."""
        pruner = refiner = None
        if config.pruner is not None:
            pruner = methods.load("pruners", config.pruner, config.options_of("pruners"))
        if config.refiner is not None:
            options = config.options_of("refiners")
            told = methods.describe("refiners", config.refiner)
            defaults = told.unlimited if config.budget is not None else {}
            refiner = methods.load("refiners", config.refiner, options, config.preset, defaults)
        return cls(
            pruner=pruner,
            given=given,
            refiner=refiner,
            reconstruct=config.reconstruct,
            rank=config.share,
            grid=config.then,
        )

    @property
    def steps(self) -> list[Pruner | Refiner]:
        """The pruner and the refiner, as far as there are such."""
        return [step for step in (self.pruner, self.refiner) if step is not None]

    @property
    def want(self) -> Stats:
        """The sums that the run reads; the norms at least, to measure the output error."""
        want = Stats.NORMS
        for step in self.steps:
            want |= step.needs or Stats.NORMS
        whole = self.reconstruct == "cg" or self.grid is not None
        return want | Stats.GRAM if whole else want

    @property
    def gram_bytes(self) -> int:
        """The memory that is made of the largest Gram matrix, in bytes for each entry."""
        return self.pruner.gram_bytes if self.pruner else FACTORING_BYTES

    @property
    def propagate(self) -> bool:
        """Whether inputs come from the pruned blocks before, as the last method wants it."""
        return self.steps[-1].propagate

    def options(self) -> dict[str, dict[str, str]]:
        """The options of each method, as text."""
        told = {}
        for kind, step in zip(("options", "initial_options"), reversed(self.steps), strict=False):
            told[kind] = {key: methods.as_text(value) for key, value in asdict(step).items()}
        return told

    def block_size(self, target: Target, pattern: Pattern) -> int:
        """Side of the blocks of a weight's factors; 0 without such blocks."""
        if self.refiner is None or not self._refines(target):
            return 0
        return self.refiner.block_size(*target.shape, pattern)

    def factor_shapes(self, target: Target, pattern: Pattern) -> dict[str, tuple[int, ...]]:
        """The shapes of the factors that a weight gets; empty when it stays one matrix."""
        rows, columns = target.shape
        block = self.block_size(target, pattern)
        rank = self._rank_of(rows, columns)
        if not block and not rank:
            return {}
        return factor_shapes(rows, columns, pattern, block=block, rank=rank)

    def groups(
        self,
        targets: Sequence[Target],
        sums: Mapping[str, InputStats],
        patterns: WeightPatterns,
        places: Mapping[str, TensorPlace],
    ) -> list[list[Target]]:
        """Targets that are solved as one: those with the same inputs, if no row needs another."""
        # Factors are those of one weight.
        alone = bool(self.rank) or not all(step.rowwise for step in self.steps)
        groups: dict[Any, list[Target]] = {}
        for target in targets:
            pattern = patterns.of(target)
            dtype = places[target.name].dtype if self.grid else None  # of the scales
            key: Any = (id(sums.get(target.name)), self._refines(target), pattern, dtype)
            if alone or pattern.scope == "tensor":
                key = target.name
            groups.setdefault(key, []).append(target)
        return list(groups.values())

    def run(
        self,
        targets: Sequence[Target],
        weight: Tensor,  # theirs, stacked, [out, in] float32
        sums: InputStats | None,
        pattern: Pattern,
        dtype: torch.dtype,  # that they have on disk
        should_continue: ShouldContinue = no_limit,
    ) -> Pruned:
        """What becomes of the weights of a group.

        Raises:
            NumericalError: The sums or the solution are not finite.
        """
        if sums:
            require_finite(sums.squares)
        refines = self.refiner is not None and self._refines(targets[0])
        if self.grid is not None and self.pruner and not refines and self.reconstruct == "none":
            joint = self.pruner.prune_on_grid(weight, sums, pattern, self.grid, dtype)
            if joint is not None:
                return joint
        if self.pruner is not None:
            pruned = self.pruner.prune(weight, sums, pattern)
        else:
            pruned = self._given(targets, weight.device)
        if self.refiner is not None and self._refines(targets[0]):
            assert sums is not None
            pruned = self.refiner.refine(weight, pruned, sums, pattern, should_continue)
        if self.reconstruct == "cg":
            assert sums is not None
            pruned = _reconstruct(weight, pruned, sums)
        if self.rank:
            assert sums is not None
            pruned = _compensate(weight, pruned, sums, self._rank_of(*weight.shape))
        if self.grid is not None:
            pruned = _put_on_grid(weight, pruned, sums, self.grid, dtype)
        return pruned

    def _rank_of(self, rows: int, columns: int) -> int:
        return math.ceil(self.rank * min(rows, columns))

    def _refines(self, target: Target) -> bool:
        return self.refiner is not None and self.refiner.applies_to(target.name)

    def _given(self, targets: Sequence[Target], device: torch.device) -> Pruned:
        assert self.given is not None
        tensors = self.given.read([target.name for target in targets])
        parts = [t.from_disk(tensors[t.name]) for t in targets]
        weight = torch.cat(parts).to(device, torch.float32)
        return Pruned(weight=weight, mask=weight != 0)


def require_shapes(given: Checkpoint, targets: Sequence[Target]) -> None:
    """Refuse a sparse model whose weights do not have the shapes of the dense one's.

    Raises:
        DataError: A weight is missing or has another shape.
    """
    for target in targets:
        place = given.places.get(target.name)
        shape = target.disk_shape
        if place is None or place.shape != shape:
            found = "is missing" if place is None else f"has the shape {place.shape}"
            raise DataError(
                f"{target.name} {found} in {given.path}, the dense model has {shape}",
                "--dense names the model that the sparse one was made from",
            )


def require_patterns(
    given: Checkpoint, targets: Sequence[Target], patterns: WeightPatterns
) -> None:
    """Refuse a sparse model that does not have the patterns.

    Raises:
        DataError: Names the first weight without it.
    """
    for target in targets:
        weight = given.read([target.name])[target.name]
        try:
            patterns.of(target).check(target.from_disk(weight), target.name)
        except PatternError as error:
            raise DataError(
                f"{given.path}: {error.message}", "pass its --pattern, or --skip what is dense"
            ) from error


def _reconstruct(weight: Tensor, pruned: Pruned, sums: InputStats) -> Pruned:
    """The same mask with the weights that least squares gives on it."""
    solved = solve_on_support(
        weight,
        pruned.mask,
        unit_gram(sums, RECONSTRUCT_DAMPING),
        start=pruned.weight,
        iterations=RECONSTRUCT_STEPS,
    )
    return replace(pruned, weight=solved)


def _put_on_grid(
    weight: Tensor, pruned: Pruned, sums: InputStats | None, grid: Grid, dtype: torch.dtype
) -> Pruned:
    """The same mask with kept weights on a grid, which make up for what rounding loses.

    Where the method has chosen a mask and no other values, they make up for what pruning lost too.
    """
    only_chosen = torch.equal(pruned.weight, weight.masked_fill(~pruned.mask, 0.0))
    start = weight if only_chosen else pruned.weight
    found = Gptq().quantize(start, sums, grid, dtype, pruned.mask)
    numbers = {**pruned.numbers, **{f"grid_{key}": n for key, n in found.numbers.items()}}
    return replace(pruned, weight=found.codes.dense().float(), codes=found.codes, numbers=numbers)


def _compensate(weight: Tensor, pruned: Pruned, sums: InputStats, rank: int) -> Pruned:
    """The same with a low-rank matrix beside it that makes up for most of what is lost."""
    up, down = compensate(weight - pruned.weight, sums.squares.sqrt(), rank)
    factors = pruned.factors or Form(core=Values(pruned.weight, pruned.mask))
    factors = replace(factors, up=up, down=down)
    numbers = {**pruned.numbers, "rank": rank}
    return replace(pruned, weight=factors.dense(), factors=factors, numbers=numbers)
