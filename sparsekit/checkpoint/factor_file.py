"""Weights that a checkpoint keeps as factors or packed, read and checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.folder import FACTORS, factor_name
from sparsekit.errors import DataError, FactorsError
from sparsekit.weights.factored import PARTS, Factored
from sparsekit.weights.grids import Codes
from sparsekit.weights.packed import mask_of, unpack
from sparsekit.weights.packed_codes import SCALE, unpack_grid
from sparsekit.weights.patterns import Pattern


def packed_weight(source: Checkpoint, name: str, columns: int) -> Tensor:
    """A packed weight `[out, in]` that has no other factors, bit for bit in its type on disk.

    Args:
        source: The checkpoint.
        name: Of the weight.
        columns: Its inputs.

    Raises:
        FactorsError: A part is missing, or the parts do not fit together.
    """
    parts, pattern = factor_parts(source, name), Pattern.parse(source.factor_patterns[name])
    with _named(source, name):
        mask_of(parts["values"], parts["indices"], pattern, columns)
    return unpack(parts["values"], parts["indices"], pattern, columns)


def packed_codes(source: Checkpoint, name: str, columns: int) -> Codes:
    """The codes of a weight that is packed as such; arguments and errors as of `packed_weight`."""
    parts, pattern = factor_parts(source, name), Pattern.parse(source.factor_patterns[name])
    with _named(source, name):
        return unpack_grid(parts, pattern, columns, source.factor_codes[name])


def factors_of(source: Checkpoint, name: str, columns: int) -> Factored:
    """The factors of a weight in float32; arguments and errors as of `packed_weight`."""
    if name in source.factor_codes:
        core = packed_codes(source, name, columns).dense().float()
        return Factored(core=core, mask=core != 0)
    stored = factor_parts(source, name)
    with _named(source, name):
        return Factored.of(stored, Pattern.parse(source.factor_patterns[name]), columns)


def factor_parts(source: Checkpoint, name: str) -> dict[str, Tensor]:
    """The tensors that a weight with factors is stored as, by the last part of their names.

    Raises:
        FactorsError: One that has to be there is missing.
    """
    parts = {part: factor_name(name, part) for part in (*PARTS, SCALE)}
    needed = (*PARTS[:2], SCALE) if name in source.factor_codes else PARTS[:2]
    for part in needed:
        if parts[part] not in source.factors:
            raise FactorsError(f"{source.path / FACTORS} lacks {parts[part]}")
    read = source.read(full for full in parts.values() if full in source.factors)
    return {part: read[full] for part, full in parts.items() if full in read}


@contextmanager
def _named(source: Checkpoint, name: str) -> Iterator[None]:
    """Say of what does not fit together where it is."""
    try:
        yield
    except DataError as error:
        raise FactorsError(f"{source.path}: {name}: {error.message}", error.hint) from error
