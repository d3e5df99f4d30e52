"""The methods that are applied to a weight: pruner, refiner, reconstruction, compensation, grid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from sparsekit import registry as methods
from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.safetensors_file import TensorPlace
from sparsekit.errors import DataError, PatternError
from sparsekit.model.architecture import Target
from sparsekit.pipeline.selection import WeightPatterns
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.methods import Pruned, Pruner, ShouldContinue, no_limit
from sparsekit.solvers.input_stats import FACTORING_BYTES, InputStats, Stats, require_finite
from sparsekit.weights.grids import Grid
from sparsekit.weights.patterns import Pattern

if TYPE_CHECKING:
    from sparsekit.pruning.refiners import Refiner

# Conjugate-gradient steps of --reconstruct cg, and damping of its Gram matrix.
RECONSTRUCT_STEPS = 20
RECONSTRUCT_DAMPING = 0.01


@dataclass(frozen=True, kw_only=True)
class MethodChain:
    """The methods of a run, in the order in which they are applied."""

    pruner: Pruner | None
    given: Checkpoint | None
    """The sparse model whose mask is refined, when no pruner makes one."""
    refiner: Refiner | None
    reconstruct: Literal["none", "cg"]
    rank: Fraction
    """Rank of the low-rank compensation relative to the smaller side of a weight; 0: none."""
    grid: Grid | None = None
    """Grid of the kept weights; None: they are not quantized."""

    @classmethod
    def build(cls, config: PruneConfig, given: Checkpoint | None) -> MethodChain:
        """Load the methods of a checked configuration."""
        pruner = refiner = None
        if config.pruner is not None:
            pruner = methods.load("pruners", config.pruner, config.options_of("pruners"))
        if config.refiner is not None:
            options = config.options_of("refiners")
            unlimited = methods.describe("refiners", config.refiner).unlimited
            defaults = unlimited if config.budget is not None else {}
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
        """The pruner and the refiner, if any."""
        return [step for step in (self.pruner, self.refiner) if step is not None]

    @property
    def want(self) -> Stats:
        """The sums to collect: at least the norms, which the output error needs."""
        want = Stats.NORMS
        for step in self.steps:
            want |= step.needs or Stats.NORMS
        needs_gram = self.reconstruct == "cg" or self.grid is not None
        return want | Stats.GRAM if needs_gram else want

    @property
    def gram_bytes(self) -> int:
        """Working memory of the pruner in bytes per entry of the largest Gram matrix."""
        return self.pruner.gram_bytes if self.pruner else FACTORING_BYTES

    @property
    def propagate(self) -> bool:
        """Whether inputs come from the pruned blocks, by default of the last method."""
        return self.steps[-1].propagate

    def options(self) -> dict[str, dict[str, str]]:
        """The options of each method, as text."""
        options = {}
        for kind, step in zip(("options", "initial_options"), reversed(self.steps), strict=False):
            options[kind] = {key: methods.as_text(value) for key, value in asdict(step).items()}
        return options

    def block_size(self, target: Target, pattern: Pattern) -> int:
        """Side of the blocks of a weight's factors; 0 without factors."""
        if self.refiner is None or not self._refines(target):
            return 0
        return self.refiner.block_size(*target.shape, pattern)

    def factor_shapes(self, target: Target, pattern: Pattern) -> dict[str, tuple[int, ...]]:
        """Shapes of a weight's factors; empty when it stays one matrix."""
        rows, columns = target.shape
        block = self.block_size(target, pattern)
        rank = self._rank_of(rows, columns)
        if not block and not rank:
            return {}
        from sparsekit.weights.packed import factor_shapes

        return factor_shapes(rows, columns, pattern, block=block, rank=rank)

    def groups(
        self,
        targets: Sequence[Target],
        sums: Mapping[str, InputStats],
        patterns: WeightPatterns,
        places: Mapping[str, TensorPlace],
    ) -> list[list[Target]]:
        """Group targets that are solved as one: same inputs, and rows independent of each other."""
        # Factors belong to a single weight.
        alone = bool(self.rank) or not all(step.rowwise for step in self.steps)
        groups: dict[Any, list[Target]] = {}
        for target in targets:
            pattern = patterns.of(target)
            dtype = places[target.name].dtype if self.grid else None  # dtype of the scales
            key: Any = (id(sums.get(target.name)), self._refines(target), pattern, dtype)
            if alone or pattern.scope == "tensor":
                key = target.name
            groups.setdefault(key, []).append(target)
        return list(groups.values())

    def run(
        self,
        targets: Sequence[Target],
        weight: Tensor,  # stacked, [out, in] float32
        sums: InputStats | None,
        pattern: Pattern,
        dtype: torch.dtype,  # on disk
        should_continue: ShouldContinue = no_limit,
    ) -> Pruned:
        """Apply the methods to the weights of a group.

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
    """Refuse a sparse model whose weights have other shapes than the dense model's.

    Raises:
        DataError: A weight is missing or has another shape.
    """
    for target in targets:
        place = given.places.get(target.name)
        shape = target.disk_shape
        if place is None or place.shape != shape:
            problem = "is missing" if place is None else f"has the shape {place.shape}"
            raise DataError(
                f"{target.name} {problem} in {given.path}, the dense model has {shape}",
                "--dense must name the model that the sparse one was made from",
                code="other-shape",
            )


def require_patterns(
    given: Checkpoint, targets: Sequence[Target], patterns: WeightPatterns
) -> None:
    """Refuse a sparse model whose weights do not have their patterns.

    Raises:
        DataError: Names the first weight without it.
    """
    for target in targets:
        weight = given.read([target.name])[target.name]
        try:
            patterns.of(target).check(target.from_disk(weight), target.name)
        except PatternError as error:
            message = f"{given.path}: {error.message}"
            hint = "pass its --pattern, or --skip the dense weights"
            raise DataError(message, hint, code="not-this-pattern") from error


def _reconstruct(weight: Tensor, pruned: Pruned, sums: InputStats) -> Pruned:
    """Replace the kept weights by the least-squares solution on the mask."""
    from sparsekit.solvers.hessian import solve_on_support, unit_gram

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
    """Quantize the kept weights with GPTQ's error feedback.

    If the method chose a mask and left the values unchanged, the feedback also compensates for the
    pruned weights.
    """
    from sparsekit.quantization.methods.gptq import Gptq

    mask_only = torch.equal(pruned.weight, weight.masked_fill(~pruned.mask, 0.0))
    start = weight if mask_only else pruned.weight
    quantized = Gptq().quantize(start, sums, grid, dtype, pruned.mask)
    codes = quantized.codes
    numbers = {**pruned.numbers, **{f"grid_{key}": n for key, n in quantized.numbers.items()}}
    return replace(pruned, weight=codes.dense().float(), codes=codes, numbers=numbers)


def _compensate(weight: Tensor, pruned: Pruned, sums: InputStats, rank: int) -> Pruned:
    """Add a low-rank matrix that compensates for most of the error."""
    from sparsekit.solvers.low_rank import compensate
    from sparsekit.weights.core import Values
    from sparsekit.weights.form import Form

    up, down = compensate(weight - pruned.weight, sums.squares.sqrt(), rank)
    factors = pruned.factors or Form(core=Values(pruned.weight, pruned.mask))
    factors = replace(factors, up=up, down=down)
    numbers = {**pruned.numbers, "rank": rank}
    return replace(pruned, weight=factors.dense(), factors=factors, numbers=numbers)
