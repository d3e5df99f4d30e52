"""The errors that sparsekit raises, each with its exit code."""

import difflib
from collections.abc import Iterable


class SparsekitError(Exception):
    """A failure that is explained in one line.

    Args:
        message: What went wrong, where, and why.
        hint: What to do next; empty when there is nothing to add.
        code: A short name of the kind of failure, e.g. `no-method`, which stays the same when the
            wording of the message changes.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "", *, code: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class UsageError(SparsekitError):
    """The command or its options cannot be carried out as given."""

    exit_code = 2


class DataError(SparsekitError):
    """An input (checkpoint, text, token rows) is missing, damaged or unsuitable."""

    exit_code = 2


class FactorsError(DataError):
    """Factors or packed weights on disk are missing, or do not fit together."""


class PatternError(SparsekitError):
    """A weight does not have its sparsity pattern."""


class CheckFailedError(SparsekitError):
    """A requested check failed."""


class DamagedError(CheckFailedError, DataError):
    """Files that sparsekit wrote have changed since."""

    exit_code = 1


class NumericalError(SparsekitError):
    """A computation resulted in NaN or Inf, or a matrix could not be factorised."""


class MemoryShortError(SparsekitError):
    """There is not enough memory for the requested work."""


class StorageError(SparsekitError):
    """The output could not be written."""


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """A hint with the known words closest to an unknown one.

    Args:
        word: The unknown word.
        known: The known words.
        otherwise: The hint if no word is close; empty: a list of the known ones.
    """
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(repr(name) for name in close)}?"
    return otherwise or f"known: {', '.join(known[:40])}"
