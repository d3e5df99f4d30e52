"""Check a checkpoint against its history."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.entry import Entry
from sparsekit.checkpoint.entry_parts import Weight
from sparsekit.checkpoint.folder import FACTORS, PROVENANCE
from sparsekit.checkpoint.resolve import resolve
from sparsekit.errors import CheckFailedError, DataError, UsageError
from sparsekit.inspection.inspect import _weights
from sparsekit.model.block_stream import BlockStream
from sparsekit.progress import SILENT, Progress
from sparsekit.weights.form import first_off
from sparsekit.weights.patterns import Pattern


def verify(model: str, pattern: str | None = None, progress: Progress = SILENT) -> dict[str, Any]:
    """Check every tensor of a checkpoint from its bytes.

    Every weight that was pruned according to the history (without a history: every linear weight
    of a block) must have the pattern and no negative zero. No tensor may hold NaN or Inf, the bytes
    must be the recorded ones, and tied weights must be equal.

    Args:
        model: A folder, hub id or `demo`.
        pattern: The pattern; None: that of the history.
        progress: Reports each block.

    Raises:
        PatternError: A weight does not have the pattern.
        CheckFailedError: A tensor holds NaN, Inf or -0.0, the bytes changed, tied weights differ,
            or factors are missing or do not multiply to the weight.
        UsageError: There is no pattern to check.
        DataError: The folder is not a readable checkpoint.
    """
    given = Pattern.parse(pattern) if pattern else None
    source = _written(resolve(model, progress))
    pruned = source.pruned(converted=True)
    if given is None and not pruned:
        message = f"{model} has no history that names a pattern"
        raise UsageError(message, "pass --pattern 2:4", code="no-history")
    recorded = _latest(pruned)
    _require_factors(source, recorded)
    try:
        fingerprint = source.scan(progress)
    except DataError as error:
        raise CheckFailedError(error.message, error.hint, code=error.code) from error
    stream = BlockStream(source, device="cpu", dtype=torch.float32)
    expected = {name: row.pattern for name, row in recorded.items()}
    progress.begin("verify", len(stream))
    checked = zeros = size = 0
    try:
        for name, weight in _checked(source, stream, expected, progress):
            wanted = given or Pattern.parse(expected[name])
            wanted.check(weight, name)
            _refuse_negative_zero(weight, name)
            checked += 1
            zeros, size = zeros + int((weight == 0).sum()), size + weight.numel()
    except DataError as error:  # factors that do not fit together
        raise CheckFailedError(error.message, error.hint, code=error.code) from error
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
    """The checkpoint in a folder; a damaged one that sparsekit wrote fails the check."""
    try:
        return Checkpoint.open(path)
    except DataError as error:
        if (path / PROVENANCE).is_file():
            raise CheckFailedError(error.message, error.hint, code=error.code) from error
        raise


def _checked(
    source: Checkpoint, stream: BlockStream, expected: Collection[str], progress: Progress
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and weight of each weight in the history; without a history, of all weights of blocks.

    Raises:
        CheckFailedError: A weight is missing.
    """
    left = set(expected)
    for _, name, weight in _weights(source, stream, progress):
        if name in left or not expected:
            left.discard(name)
            yield name, weight
    for name in sorted(left):  # outside of blocks, e.g. a converted output head
        if name not in source.places:
            message = f"{name} is in the history of {source.path} but not in it"
            raise CheckFailedError(message, code="incomplete-checkpoint")
        yield name, source.read([name])[name]


def _latest(pruned: Sequence[Entry]) -> dict[str, Weight]:
    """Latest record of each weight; a later run drops factors that it did not make."""
    latest: dict[str, Weight] = {}
    for entry in pruned:
        latest = {n: row for n, row in latest.items() if row.bits is None}
        latest |= {row.name: row for row in entry.weights}
    return latest


def _require_factors(source: Checkpoint, recorded: Mapping[str, Weight]) -> None:
    """Check that the weights recorded with factors have them."""
    factored = {name for name, row in recorded.items() if row.bits is not None}
    if missing := sorted(factored - source.packed.keys()):
        message = f"{missing[0]} has no factors in {FACTORS}"
        raise CheckFailedError(message, "copy the folder again", code="incomplete-checkpoint")


def _check_factors(source: Checkpoint, stream: BlockStream) -> None:
    """Check that factors multiply to the weights stored with them."""
    for target in stream.targets():
        name = target.name
        if name not in source.packed:
            continue
        weight = source.read([name])[name]
        product = source.form(name, target.shape).dense().float()
        if off := first_off(product, target.from_disk(weight)):
            raise CheckFailedError(
                f"{name}: its factors do not multiply to it at {list(off)}",
                "the weights were changed after pruning",
                code="factors-differ",
            )


def _refuse_negative_zero(weight: torch.Tensor, name: str) -> None:
    negative = (weight == 0) & weight.signbit()
    if negative.any():
        row, column = negative.nonzero()[0].tolist()
        raise CheckFailedError(
            f"{name}: row {row}, input {column} is -0.0, which some kernels take for a value",
            code="negative-zero",
        )


def _check_tied(source: Checkpoint, stream: BlockStream) -> None:
    """Check that tied weights are equal if both are on disk."""
    for name, origin in getattr(stream.model, "all_tied_weights_keys", {}).items():
        if name in source.places and origin in source.places:
            both = source.read([name, origin])
            if not torch.equal(both[name], both[origin]):
                message = f"{name} is tied to {origin} but differs from it"
                raise CheckFailedError(message, code="tied-weights-differ")
