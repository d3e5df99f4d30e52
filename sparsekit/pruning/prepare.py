"""What a prune run will do: every check and every choice that needs no weights."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.layout import Layout, factor_types
from sparsekit.checkpoint.output_folder import refuse_source
from sparsekit.checkpoint.resolve import resolve
from sparsekit.errors import UsageError
from sparsekit.model.architecture import Target
from sparsekit.model.block_stream import BlockStream
from sparsekit.model.device import compute_dtype, pick_device
from sparsekit.pipeline.forecast import peak_estimate
from sparsekit.pipeline.selection import WeightPatterns, family_notes, select
from sparsekit.pipeline.source import open_source, require_disk
from sparsekit.progress import SILENT, Progress
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.method_chain import MethodChain, require_shapes
from sparsekit.quantization.storage import coded_layout, refuse_grid
from sparsekit.solvers.input_stats import Stats
from sparsekit.text.calibration import Calibration
from sparsekit.weights.core_format import CoreFormat
from sparsekit.weights.patterns import Pattern


@dataclass(frozen=True, kw_only=True)
class PruneJob:
    """A checked configuration with everything that the loop needs."""

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
        """The pattern that was asked for, or that a given mask was last made with."""
        return self.patterns.base

    @property
    def room(self) -> int:
        """The memory that the run is expected to take above the libraries, in bytes."""
        return peak_estimate(self.stream, self.want, self.calibration, self.chain.gram_bytes)

    def notes(self) -> list[str]:
        """What the user should know before the run: what speaks against it, and ARMOR's blocks."""
        found = family_notes(self.stream)
        if self.chain.refiner:
            for pattern in dict.fromkeys(map(self.patterns.of, self.targets)):
                found += self.chain.refiner.warnings(pattern, self.chain.pruner)
            if self.source.pruned():
                found.append(
                    f"{self.source.path} is pruned already: to refine its mask, name its --dense"
                )
        sides = Counter(self.chain.block_size(t, self.patterns.of(t)) for t in self.targets)
        counts = [f"{side} in {count} weights" for side, count in sorted(sides.items()) if side]
        if counts:
            found.append(f"side of the blocks of A and B: {', '.join(counts)}")
        return found


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
    _refuse_what_does_not_go(config, chain, targets, patterns)
    if chain.grid is not None:
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
    """The pattern that was asked for, or those that a sparse model was pruned to."""
    if config.pattern is not None or config.dense is None:
        return WeightPatterns(base=config.pattern or Pattern.parse("2:4"))
    told = given.pruned(converted=True)
    if not told:
        raise UsageError(f"{given.path} has no history that names its pattern", "pass --pattern")
    base = Pattern.parse(told[-1]["recipe"]["pattern"])
    own = {row["name"]: Pattern.parse(row["pattern"]) for e in told for row in e["weights"]}
    return WeightPatterns(base=base, own={name: one for name, one in own.items() if one != base})


def _refuse_what_does_not_go(
    config: PruneConfig, chain: MethodChain, targets: Sequence[Target], patterns: WeightPatterns
) -> None:
    """Refuse methods that cannot have the pattern or each other.

    Raises:
        UsageError: Names what does not go together.
    """
    if chain.grid is not None and config.format != "dense":
        raise UsageError("--then writes codes, not factors", "leave out --format factored")
    for target in targets:
        pattern = patterns.of(target)
        if chain.grid is not None and chain.factor_shapes(target, pattern):
            cause = f"--compensate {config.compensate}" if config.share else config.title
            raise UsageError(f"--then does not go with the factors of {cause}", "leave out one")
        if reason := chain.refiner.mismatch(pattern, *target.shape) if chain.refiner else "":
            raise UsageError(f"{target.name}: {reason}", "--skip leaves a weight dense")
        if config.allocate != "none" and chain.factor_shapes(target, pattern):
            cause = f"--compensate {config.compensate}" if config.share else config.title
            raise UsageError(f"--allocate does not go with the factors of {cause}", "leave out one")
        if config.reconstruct == "cg" and chain.block_size(target, pattern):
            raise UsageError(f"--reconstruct cg has no meaning for {config.title}", "leave it out")


def _layout(
    config: PruneConfig,
    source: Checkpoint,
    targets: Sequence[Target],
    chain: MethodChain,
    patterns: WeightPatterns,
) -> Layout:
    """The files of the output: the source's, and one for the factors of weights that get some."""
    parts = {t.name: chain.factor_shapes(t, patterns.of(t)) for t in targets}
    parts = {
        name: factor_types(shapes, source.places[name].dtype)
        for name, shapes in parts.items()
        if shapes
    }
    if not parts:
        if config.format == "factored":
            raise UsageError(f"{config.title} makes no factors", "leave out --format factored")
        if chain.grid is not None:
            return coded_layout(source, targets, chain.grid)
        return Layout.of(source)
    cores = {t.name: CoreFormat(pattern=patterns.of(t)) for t in targets if t.name in parts}
    return Layout.with_factors(source, parts, cores, alone=config.format == "factored")


def _refuse_patterns(targets: Sequence[Target], patterns: WeightPatterns) -> None:
    """Refuse a pattern whose groups do not divide the inputs of its targets.

    Raises:
        UsageError: Names the first such weight, and the ways out.
    """
    odd = [target for target in targets if patterns.of(target).mismatch(target.shape[1])]
    if not odd:
        return
    pattern = patterns.of(odd[0])
    common = math.gcd(*(target.shape[1] for target in targets))
    # The same share with the largest shorter group that divides every weight.
    keeps = ((group * pattern.keep / pattern.group, group) for group in range(pattern.group, 1, -1))
    fitting = next((f"{k:.0f}:{m}" for k, m in keeps if k % 1 == 0 and common % m == 0), None)
    ways = [f"--pattern {fitting} fits"] if fitting else []
    if len(odd) < len(targets):
        modules = dict.fromkeys(t.name.removesuffix(".weight").rpartition(".")[2] for t in odd)
        ways.append("leave it dense with " + " ".join(f"--skip {name}" for name in modules))
    raise UsageError(
        f"{odd[0].name}: {pattern.mismatch(odd[0].shape[1])}",
        ", or ".join(ways) or "50% fits every weight",
    )
