"""Preparation of a pruning run: all checks and choices that need no weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.layout import Layout, factor_types
from sparsekit.checkpoint.output_folder import refuse_source
from sparsekit.checkpoint.resolve import resolve
from sparsekit.errors import UsageError
from sparsekit.model.architecture import Target
from sparsekit.model.block_stream import BlockStream
from sparsekit.model.device import compute_dtype, pick_device
from sparsekit.pipeline.selection import WeightPatterns, family_notes, select
from sparsekit.pipeline.source import open_source, require_disk
from sparsekit.progress import SILENT, Progress
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.method_chain import MethodChain, require_shapes
from sparsekit.solvers.input_stats import Stats
from sparsekit.weights.patterns import Pattern

if TYPE_CHECKING:
    from sparsekit.text.calibration import Calibration


@dataclass(frozen=True, kw_only=True)
class PruneJob:
    """A checked configuration with everything that the loop over blocks needs."""

    config: PruneConfig
    chain: MethodChain
    patterns: WeightPatterns
    source: Checkpoint
    stream: BlockStream
    targets: list[Target]
    skipped: list[dict[str, str]]
    want: Stats | None
    propagate: bool
    layout: Layout
    calibration: Calibration | None

    @property
    def pattern(self) -> Pattern:
        """The requested pattern, or the one that the given mask was made with."""
        return self.patterns.base

    def notes(self) -> list[str]:
        """Notes for the user before the run."""
        notes = family_notes(self.stream)
        if self.chain.refiner:
            for pattern in dict.fromkeys(map(self.patterns.of, self.targets)):
                notes += self.chain.refiner.warnings(pattern, self.chain.pruner)
            if self.source.pruned():
                notes.append(
                    f"{self.source.path} is already pruned: to refine its mask, pass its dense "
                    "model with --dense"
                )
        elif self._has_pattern():
            notes.append(
                f"{self.source.path} already has the pattern {self.pattern} in all "
                f"{len(self.targets)} weights"
            )
        sides = Counter(self.chain.block_size(t, self.patterns.of(t)) for t in self.targets)
        counts = [f"{side} in {count} weights" for side, count in sorted(sides.items()) if side]
        if counts:
            notes.append(f"block size of the factors: {', '.join(counts)}")
        return notes

    def _has_pattern(self) -> bool:
        """Whether the source's history records exactly the requested pattern for every weight."""
        history = self.source.pruned(converted=True)
        recorded = {row.name: row.pattern for entry in history for row in entry.weights}
        requested = {target.name: str(self.patterns.of(target)) for target in self.targets}
        return self.config.allocate == "none" and all(
            recorded.get(name) == pattern for name, pattern in requested.items()
        )


def prepare_prune(
    config: PruneConfig,
    model: str,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> PruneJob:
    """Check a configuration against a model and an output folder.

    Raises:
        UsageError: The configuration does not fit the model, or `out` is in use.
        DataError: The model cannot be read, or has no blocks that can be streamed.
        StorageError: The disk has no room for the output.
    """
    source = given = open_source(model, out, overwrite=overwrite, progress=progress)
    if config.dense is not None:
        source = Checkpoint.open(resolve(config.dense, progress))
        refuse_source(out, source.path)
    for folder in (source, given):
        folder.require("prune")
    chain = MethodChain.build(config, given if config.dense is not None else None)
    patterns = _patterns(config, given)
    device = pick_device(config.device)
    stream = BlockStream(source, device=device, dtype=compute_dtype(config.dtype, device, source))
    targets, skipped = select(stream, config.skip)
    _refuse_patterns(targets, patterns)
    _refuse_conflicts(config, chain, targets, patterns)
    if chain.grid is not None:
        from sparsekit.quantization.storage import refuse_grid

        refuse_grid(chain.grid, targets, skipped, flag="--then")
    if chain.given is not None:
        require_shapes(chain.given, targets)
    layout = _layout(config, source, targets, chain, patterns)
    require_disk(out, layout)
    calibration = config.rows
    if calibration is not None:
        calibration.require(source)
    return PruneJob(
        config=config,
        chain=chain,
        patterns=patterns,
        source=source,
        stream=stream,
        targets=targets,
        skipped=skipped,
        want=chain.want if calibration else None,
        propagate=chain.propagate if config.propagate is None else config.propagate,
        layout=layout,
        calibration=calibration,
    )


def _patterns(config: PruneConfig, given: Checkpoint) -> WeightPatterns:
    """The requested pattern, or the patterns of the given sparse model."""
    if config.pattern is not None or config.dense is None:
        return WeightPatterns(base=config.pattern or Pattern.parse("2:4"))
    history = given.pruned(converted=True)
    if not history:
        message = f"the history of {given.path} does not record its pattern"
        raise UsageError(message, "pass --pattern", code="no-history")
    base = Pattern.parse(history[-1].settings.pattern)
    by_name = {
        row.name: Pattern.parse(row.pattern)
        for entry in history
        for row in entry.weights
        if row.pattern
    }
    exceptions = {name: pattern for name, pattern in by_name.items() if pattern != base}
    return WeightPatterns(base=base, own=exceptions)


def _refuse_conflicts(
    config: PruneConfig, chain: MethodChain, targets: Sequence[Target], patterns: WeightPatterns
) -> None:
    """Refuse methods that conflict with the pattern or with each other.

    Raises:
        UsageError: Names the conflict.
    """
    if chain.grid is not None and config.format != "dense":
        message, hint = "--then writes codes, not factors", "leave out --format factored"
        raise UsageError(message, hint, code="conflicting-options")
    cause = f"--compensate {config.compensate}" if config.share else config.title
    for target in targets:
        pattern = patterns.of(target)
        if chain.grid is not None and chain.factor_shapes(target, pattern):
            message = f"--then cannot be combined with the factors of {cause}"
            raise UsageError(message, "leave out one", code="conflicting-options")
        if reason := chain.refiner.mismatch(pattern, *target.shape) if chain.refiner else "":
            message, hint = f"{target.name}: {reason}", "--skip leaves a weight dense"
            raise UsageError(message, hint, code="pattern-does-not-fit")
        if config.allocate != "none" and chain.factor_shapes(target, pattern):
            message = f"--allocate cannot be combined with the factors of {cause}"
            raise UsageError(message, "leave out one", code="conflicting-options")
        if config.reconstruct == "cg" and chain.block_size(target, pattern):
            message = f"--reconstruct cg cannot be combined with the factors of {config.title}"
            raise UsageError(message, "leave it out", code="conflicting-options")


def _layout(
    config: PruneConfig,
    source: Checkpoint,
    targets: Sequence[Target],
    chain: MethodChain,
    patterns: WeightPatterns,
) -> Layout:
    """The files of the output: those of the source, and one for factors if there are any."""
    parts = {t.name: chain.factor_shapes(t, patterns.of(t)) for t in targets}
    parts = {
        name: factor_types(shapes, source.places[name].dtype)
        for name, shapes in parts.items()
        if shapes
    }
    if not parts:
        if config.format == "factored":
            message = f"{config.title} makes no factors"
            raise UsageError(message, "leave out --format factored", code="no-effect")
        if chain.grid is not None:
            from sparsekit.quantization.storage import coded_layout

            return coded_layout(source, targets, chain.grid)
        return Layout.of(source)
    from sparsekit.weights.core_format import CoreFormat

    cores = {t.name: CoreFormat(pattern=patterns.of(t)) for t in targets if t.name in parts}
    return Layout.with_factors(source, parts, cores, alone=config.format == "factored")


def _refuse_patterns(targets: Sequence[Target], patterns: WeightPatterns) -> None:
    """Refuse a pattern whose groups do not divide the inputs of its targets.

    Raises:
        UsageError: Names the first such weight, and suggests a way out.
    """
    odd = [target for target in targets if patterns.of(target).mismatch(target.shape[1])]
    if not odd:
        return
    pattern = patterns.of(odd[0])
    common = math.gcd(*(target.shape[1] for target in targets))
    # The same sparsity with the largest smaller group that divides every weight.
    keeps = ((group * pattern.keep / pattern.group, group) for group in range(pattern.group, 1, -1))
    fitting = next((f"{k:.0f}:{m}" for k, m in keeps if k % 1 == 0 and common % m == 0), None)
    ways = [f"--pattern {fitting} fits"] if fitting else []
    if len(odd) < len(targets):
        modules = dict.fromkeys(t.name.removesuffix(".weight").rpartition(".")[2] for t in odd)
        ways.append("leave it dense with " + " ".join(f"--skip {name}" for name in modules))
    raise UsageError(
        f"{odd[0].name}: {pattern.mismatch(odd[0].shape[1])}",
        ", or ".join(ways) or "50% fits every weight",
        code="pattern-does-not-divide",
    )
