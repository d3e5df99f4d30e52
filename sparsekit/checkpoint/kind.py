"""The kinds of checkpoints, and a table of which verb takes which kind."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from sparsekit.checkpoint.folder import is_packed
from sparsekit.checkpoint.foreign import LEGACY_PARTS, legacy_format, named_format
from sparsekit.errors import DataError


class Kind(StrEnum):
    """How the linear weights of a checkpoint are stored."""

    PLAIN = "plain"
    PRODUCTS = "products"
    """Plain weights that are products of factors, which are stored next to them."""
    FACTORED = "factored"
    """Factors instead of weights."""
    QUANTIZED = "quantized"
    """Codes and scales in the format of compressed-tensors."""
    PACKED = "packed"
    """Kept values or codes with their places, written by `sparsekit pack`."""
    LEGACY = "legacy"
    """A format that every library has dropped."""
    FOREIGN = "foreign"
    """Any other quantization."""

    @property
    def alone(self) -> bool:
        """Whether factors or packed cores are stored instead of the weights."""
        return self in (Kind.FACTORED, Kind.PACKED)


# The error message for a checkpoint that a verb does not take.
MESSAGES = {
    Kind.PLAIN: "{model} is plain, which {verb} does not take",
    Kind.PRODUCTS: (
        "{model} stores factors next to its weights, which are not sparse themselves: "
        "{verb} does not take it"
    ),
    Kind.FACTORED: "{model} holds factors only, which {verb} does not take",
    Kind.QUANTIZED: "{model} is quantized{detail}, which {verb} does not take",
    Kind.PACKED: "{model} is packed, which {verb} does not take",
    Kind.LEGACY: "{model} is quantized{detail} in a way that sparsekit does not read",
    Kind.FOREIGN: "{model} is quantized{detail} in a way that sparsekit does not read",
}
UNPACK = "sparsekit unpack makes it plain"
UNREAD = {
    Kind.LEGACY: "sparsekit convert makes a plain one of its folder",
    Kind.FOREIGN: "take the model it was quantized from",
}
PACKED_ONLY = "name a folder that pack wrote, or one with --format factored"
LOADS = f"sparsekit convert takes {', '.join(LEGACY_PARTS)}; transformers loads the others"


def _takes(refused: Mapping[Kind, str], unread: Mapping[Kind, str] = UNREAD) -> dict[Kind, str]:
    """A row of the table: the hints for the kinds that a verb does not take."""
    return dict.fromkeys(Kind, "") | dict(unread) | dict(refused)


READERS = _takes({})
# For each verb and kind: empty if the verb takes it, else the hint of the error. `load` is the row
# of everything that only reads a model.
TAKES: Mapping[str, Mapping[Kind, str]] = {
    "prune": _takes(
        {
            Kind.FACTORED: "name the model it comes from",
            Kind.QUANTIZED: "prune the model it comes from",
            Kind.PACKED: UNPACK,
        }
    ),
    "recover": _takes(
        {
            Kind.PRODUCTS: "train the model it comes from",
            Kind.FACTORED: "train the model it comes from",
            Kind.QUANTIZED: "train the model it comes from",
            Kind.PACKED: UNPACK,
        }
    ),
    "recover --teacher": _takes({Kind.FACTORED: "name the dense model", Kind.PACKED: UNPACK}),
    "quantize": _takes(
        {
            Kind.PRODUCTS: "prune without armor and --compensate",
            Kind.FACTORED: "prune without armor and --compensate",
            Kind.QUANTIZED: "quantize the model that it comes from",
            Kind.PACKED: UNPACK,
        }
    ),
    "pack": _takes({Kind.FACTORED: UNPACK, Kind.PACKED: UNPACK}),
    "unpack": _takes(dict.fromkeys((Kind.PLAIN, Kind.PRODUCTS, Kind.QUANTIZED), PACKED_ONLY)),
    "convert": _takes(
        {
            Kind.PLAIN: LOADS,
            Kind.PRODUCTS: LOADS,
            Kind.FACTORED: UNPACK,
            Kind.QUANTIZED: LOADS,
            Kind.PACKED: UNPACK,
            Kind.FOREIGN: LOADS,
        },
        unread={},
    ),
    "eval": READERS,
    "load": READERS,
}


def refusal(verb: str, kind: Kind, model: object, detail: str = "") -> DataError | None:
    """The error of a verb for a checkpoint that it does not take; None when it takes it.

    Args:
        verb: A row of `TAKES`.
        kind: The checkpoint's kind.
        model: Its name in the message.
        detail: How it is quantized, e.g. ` to int4-g128`.
    """
    hint = TAKES[verb][kind]
    if not hint:
        return None
    message = MESSAGES[kind].format(model=model, verb=verb, detail=detail)
    return DataError(message, hint, code="kind-not-taken")


def kind_of(config: Mapping[str, Any], *, on_grid: bool, factors: bool, alone: bool) -> Kind:
    """The kind of a checkpoint.

    Args:
        config: Its config.json.
        on_grid: Whether it names a grid that sparsekit reads.
        factors: Whether some weights have factors.
        alone: Whether the factors are stored instead of the weights.
    """
    if legacy_format(config):
        return Kind.LEGACY
    settings = config.get("quantization_config") or config.get("compression_config")
    if alone and is_packed(settings):
        return Kind.PACKED
    if settings and not on_grid:
        return Kind.FOREIGN
    if alone:
        return Kind.FACTORED
    if on_grid:
        return Kind.QUANTIZED
    return Kind.PRODUCTS if factors else Kind.PLAIN


def unsupported_format(name: object, config: Mapping[str, Any]) -> DataError:
    """The error for a checkpoint whose format sparsekit does not read.

    Args:
        name: Its folder or hub id.
        config: Its config.json.
    """
    kind = Kind.LEGACY if legacy_format(config) else Kind.FOREIGN
    error = refusal("load", kind, name, named_format(config))
    assert error is not None
    return error
