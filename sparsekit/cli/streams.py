"""The standard streams of the process: a reader that goes away does not end the work."""

import os
import sys
from typing import Any, TextIO

# What a shell shows for a program that SIGPIPE ends, as 130 is for SIGINT.
READER_GONE = 141


class Guarded:
    """A stream that fails silently: what cannot be written is dropped, with all that follows.

    Args:
        stream: The stream, on a file descriptor of its own.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None
        """Why something was dropped."""

    def write(self, text: str) -> int:
        """Write a text, or drop it."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        """Write what is held back, or drop it."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _drop(self, error: OSError) -> None:
        """Let what is held back, and all that follows, go nowhere."""
        self.error = self.error or error
        # Else the interpreter writes what is held back once more when it ends, and complains.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def guard() -> Guarded:
    """Guard stdout and stderr, and open what the process was started without.

    Returns:
        What stdout is from now on.
    """
    # A file that is opened later must not get the number of a stream that is closed.
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(handle, True)
    os.close(handle)
    sys.stdin = sys.stdin or os.fdopen(0, "r", closefd=False)
    stdout = Guarded(sys.stdout or os.fdopen(1, "w", closefd=False))
    stderr = Guarded(sys.stderr or os.fdopen(2, "w", closefd=False))
    sys.stdout, sys.stderr = stdout, stderr  # type: ignore[assignment]  (they have what is used)
    return stdout


def exit_code(stdout: Guarded, code: Any) -> Any:
    """What a process ends with that would end with `code`, had all been written to stdout.

    A failure of the work goes before one of the stream.
    """
    stdout.flush()
    if code or stdout.error is None:
        return code
    if isinstance(stdout.error, BrokenPipeError):
        return READER_GONE
    print(
        f"error: cannot write to stdout: {stdout.error.strerror}; all else was done",
        file=sys.stderr,
    )
    return 1
