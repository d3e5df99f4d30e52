"""Every error that sparsekit raises on purpose, each with its exit code."""

import difflib
from collections.abc import Iterable


class SparsekitError(Exception):
    """A failure that is explained to the user in one line.

    Args:
        message: What went wrong, where, and why.
        hint: What to do next; empty when there is nothing to add.
        code: A short name of the kind of failure, such as `no-method`, which does not change when
            the words of the message do.
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
    """An input (checkpoint, text, token rows) is missing, broken or unsuited."""

    exit_code = 2


class FactorsError(DataError):
    """Factors or packed weights on disk are missing, or do not fit together."""


class PatternError(SparsekitError):
    """A weight does not have the sparsity pattern that it should have."""


class CheckFailedError(SparsekitError):
    """A check that was asked for found an offender."""


class DamagedError(CheckFailedError, DataError):
    """Files that only sparsekit writes are no longer what was written."""

    exit_code = 1


class NumericalError(SparsekitError):
    """A computation gave NaN or Inf, or a matrix could not be factorised."""


class MemoryShortError(SparsekitError):
    """There is not enough memory for the work as it was asked for."""


class StorageError(SparsekitError):
    """The output could not be written."""


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """The closest known words as a hint.

    Args:
        word: What was given.
        known: What could have been meant.
        otherwise: The hint when no word is close; empty: the list of all known ones.
    """
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(repr(name) for name in close)}?"
    return otherwise or f"known: {', '.join(known[:40])}"
