"""What a checkpoint folder holds, and whether its bytes keep what they promise."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from sparsekit.errors import CheckFailedError, DataError, PatternError, UsageError
from sparsekit.models.blocks import BlockStream
from sparsekit.models.checkpoint import Checkpoint
from sparsekit.models.factored import FactoredLinear
from sparsekit.models.factorfile import factors_of
from sparsekit.models.folder import FACTORS, PROVENANCE
from sparsekit.models.reference import resolve
from sparsekit.progress import SILENT, Progress
from sparsekit.tensors.factored import first_off
from sparsekit.tensors.patterns import Pattern

# Patterns that `inspect` looks for, besides those of the history; the strictest first.
SOUGHT = ("1:4", "2:8", "2:4", "4:8", "8:16", "3:4")


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What is in a checkpoint."""

    model: str
    """As it was asked for."""
    path: Path
    n_bytes: int
    blocks: list[dict[str, Any]]
    """Rows of `name`, `size`, `zeros`, `sparsity`, `pattern`."""
    types: list[dict[str, Any]]
    """The same by kind of weight, over all blocks."""
    total: dict[str, Any]
    history: list[dict[str, Any]]
    fingerprint: str | None

    def to_json(self) -> dict[str, Any]:
        """Everything but the single weights of the history."""
        return {
            "model": self.model,
            "path": str(self.path),
            "bytes": self.n_bytes,
            "fingerprint": self.fingerprint,
            "total": self.total,
            "blocks": self.blocks,
            "types": self.types,
            "history": [{k: v for k, v in e.items() if k != "weights"} for e in self.history],
        }


def inspect(model: str, progress: Progress = SILENT) -> Inspection:
    """Count zeros and look for patterns in the prunable weights of every block.

    Args:
        model: A folder, hub id or `demo`.
        progress: Told of each block.

    Raises:
        DataError: The folder is no readable checkpoint, or what is packed in it is damaged.
    """
    source = Checkpoint.open(resolve(model, progress))
    if source.factored:
        source.scan(progress)  # zeros of a damaged one mean nothing
    stream = BlockStream(source, device="cpu", dtype=torch.float32)
    provenance = source.provenance()
    rows = [row for entry in provenance["history"] for row in entry.get("weights", ())]
    told = {row["pattern"] for row in rows if ":" in row.get("pattern", "")}
    sought = sorted({*SOUGHT, *told}, key=_looseness)
    progress.begin("inspect", len(stream))
    by_block: dict[str, list[dict[str, Any]]] = {}
    by_type: dict[str, list[dict[str, Any]]] = {}
    for block, name, weight in _weights(source, stream, progress):
        zeros = int((weight == 0).sum())
        row = {"size": weight.numel(), "zeros": zeros, "patterns": patterns_of(weight, sought)}
        by_block.setdefault(block, []).append(row)
        kind = name.removesuffix(".weight").partition(f"{block}.")[2] or name
        by_type.setdefault(kind, []).append(row)
    progress.end()
    return Inspection(
        model=model,
        path=source.path,
        n_bytes=source.n_bytes,
        blocks=[_sum(name, rows) for name, rows in by_block.items()],
        types=[_sum(name, rows) for name, rows in by_type.items()],
        total=_sum("total", [row for rows in by_block.values() for row in rows]),
        history=provenance["history"],
        fingerprint=provenance.get("fingerprint"),
    )


def verify(model: str, pattern: str | None = None, progress: Progress = SILENT) -> dict[str, Any]:
    """Re-check every tensor of a checkpoint from its bytes.

    Every weight that the history says was pruned (without a history: every linear weight of a
    block) must have the pattern and no negative zero; nothing may be NaN or Inf; the bytes must
    be those that were recorded; tied weights must be equal.

    Args:
        model: A folder, hub id or `demo`.
        pattern: The pattern; None takes that of the history.
        progress: Told of each block.

    Raises:
        PatternError: The first weight without the pattern.
        CheckFailedError: The first other offender: NaN or Inf, -0.0, other bytes, untied weights,
            factors that are missing or do not multiply to the weight.
        UsageError: There is no pattern to check.
        DataError: The folder is no readable checkpoint.
    """
    given = Pattern.parse(pattern) if pattern else None
    source = _written(resolve(model, progress))
    pruned = source.pruned(converted=True)
    if given is None and not pruned:
        raise UsageError(f"{model} has no history that names a pattern", "pass --pattern 2:4")
    told = _latest(pruned)
    _require_factors(source, told)
    try:
        fingerprint = source.scan(progress)
    except DataError as error:
        raise CheckFailedError(error.message, error.hint) from error
    stream = BlockStream(source, device="cpu", dtype=torch.float32)
    expected = {name: row["pattern"] for name, row in told.items()}
    progress.begin("verify", len(stream))
    checked = zeros = size = 0
    try:
        for name, weight in _told(source, stream, expected, progress):
            wanted = given or Pattern.parse(expected[name])
            wanted.check(weight, name)
            _refuse_negative_zero(weight, name)
            checked += 1
            zeros, size = zeros + int((weight == 0).sum()), size + weight.numel()
    except DataError as error:  # factors that do not fit together
        raise CheckFailedError(error.message, error.hint) from error
    progress.end()
    _check_factors(source, stream)
    _check_tied(source, stream)
    return {
        "model": model,
        "path": str(source.path),
        "pattern": str(given) if given else sorted(set(expected.values())),
        "weights": checked,
        "tensors": len(source.places),
        "zeros": zeros,
        "size": size,
        "fingerprint": fingerprint,
    }


def _written(path: Path) -> Checkpoint:
    """The checkpoint in a folder; one that sparsekit wrote was whole once."""
    try:
        return Checkpoint.open(path)
    except DataError as error:
        if (path / PROVENANCE).is_file():
            raise CheckFailedError(error.message, error.hint) from error
        raise


def _weights(
    source: Checkpoint, stream: BlockStream, progress: Progress
) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Block, name and weight `[out, in]` in the type on disk, of one linear weight at a time.

    Of a weight with factors it is their core.
    """
    for index in range(len(stream)):
        block = stream.block(index)
        for target in block.targets:
            if target.name in source.factor_patterns:
                yield block.name, target.name, factors_of(source, target.name, target.shape[1]).core
            else:
                weight = source.read([target.name])[target.name]
                yield block.name, target.name, weight.T if target.transposed else weight
        for layer in block.module.modules():
            if isinstance(layer, FactoredLinear):
                name = layer.weight_name
                yield block.name, name, factors_of(source, name, layer.in_features).core
        progress.step(block.name)


def _told(
    source: Checkpoint, stream: BlockStream, expected: Collection[str], progress: Progress
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and weight of what the history tells of, or without one of all weights of blocks.

    Raises:
        CheckFailedError: A weight is not there.
    """
    left = set(expected)
    for _, name, weight in _weights(source, stream, progress):
        if name in left or not expected:
            left.discard(name)
            yield name, weight
    for name in sorted(left):  # outside of blocks, as an output head that was converted
        if name not in source.places:
            raise CheckFailedError(f"{name} is in the history of {source.path} but not in it")
        yield name, source.read([name])[name]


def _latest(pruned: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """What the history says last of each weight; a later run drops factors that it did not make."""
    told: dict[str, Mapping[str, Any]] = {}
    for entry in pruned:
        told = {n: row for n, row in told.items() if row.get("bits") is None}
        told |= {row["name"]: row for row in entry["weights"]}
    return told


def _require_factors(source: Checkpoint, told: Mapping[str, Mapping[str, Any]]) -> None:
    """Factors must be there where the history says so."""
    factored = {name for name, row in told.items() if row.get("bits") is not None}
    if missing := sorted(factored - source.factor_patterns.keys()):
        raise CheckFailedError(f"{missing[0]} has no factors in {FACTORS}", "copy the folder again")


def _check_factors(source: Checkpoint, stream: BlockStream) -> None:
    """Factors must multiply to the weights beside them."""
    for target in stream.targets():
        name = target.name
        if name not in source.factor_patterns:
            continue
        weight = source.read([name])[name]
        weight = weight.T if target.transposed else weight
        product = factors_of(source, name, target.shape[1]).dense()
        if off := first_off(product, weight):
            raise CheckFailedError(
                f"{name}: its factors do not multiply to it at {list(off)}",
                "the weights were changed after pruning",
            )


def _looseness(text: str) -> tuple[Fraction, int]:
    """Sorts the strictest pattern first: most zeros, then the shortest group."""
    pattern = Pattern.parse(text)
    return -pattern.sparsity, pattern.group


def patterns_of(weight: torch.Tensor, sought: Sequence[str]) -> list[str]:
    """Which of the sought patterns a weight has."""
    found = []
    for text in sought:
        try:
            Pattern.parse(text).check(weight, "")
        except PatternError:
            continue
        found.append(text)
    return found


def _sum(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    size, zeros = sum(row["size"] for row in rows), sum(row["zeros"] for row in rows)
    shared = [text for text in rows[0]["patterns"] if all(text in r["patterns"] for r in rows)]
    pattern = shared[0] if shared else ("unstructured" if zeros else "dense")
    return {
        "name": name,
        "size": size,
        "zeros": zeros,
        "sparsity": zeros / size if size else 0.0,
        "pattern": pattern,
    }


def _refuse_negative_zero(weight: torch.Tensor, name: str) -> None:
    negative = (weight == 0) & weight.signbit()
    if negative.any():
        row, column = negative.nonzero()[0].tolist()
        raise CheckFailedError(
            f"{name}: row {row}, input {column} is -0.0, which some kernels take for a value"
        )


def _check_tied(source: Checkpoint, stream: BlockStream) -> None:
    """Weights that the configuration ties must be equal where both are on disk."""
    for name, origin in getattr(stream.model, "all_tied_weights_keys", {}).items():
        if name in source.places and origin in source.places:
            both = source.read([name, origin])
            if not torch.equal(both[name], both[origin]):
                raise CheckFailedError(f"{name} is tied to {origin} but differs from it")
