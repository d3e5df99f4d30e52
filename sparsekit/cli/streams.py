"""Standard streams that survive a closed pipe."""

import os
import sys
from typing import Any, TextIO

# Exit code for SIGPIPE, as 130 is for SIGINT.
READER_GONE = 141


class Guarded:
    """A stream that drops all output after the first failure.

    Args:
        stream: The stream, with its own file descriptor.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None
        """First failure."""

    def write(self, text: str) -> int:
        """Write text, or drop it."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        """Flush, or drop the buffer."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _drop(self, error: OSError) -> None:
        """Redirect the stream to the null device."""
        self.error = self.error or error
        # Otherwise the interpreter flushes again on exit and reports the failure.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def guard() -> Guarded:
    """Guard stdout and stderr, and open standard streams that are missing.

    Returns:
        The guarded stdout.
    """
    # A file that is opened later must not get the descriptor of a closed stream.
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(handle, True)
    os.close(handle)
    sys.stdin = sys.stdin or os.fdopen(0, "r", closefd=False)
    stdout = Guarded(sys.stdout or os.fdopen(1, "w", closefd=False))
    stderr = Guarded(sys.stderr or os.fdopen(2, "w", closefd=False))
    sys.stdout, sys.stderr = stdout, stderr  # type: ignore[assignment]  (they have what is used)
    return stdout


def exit_code(stdout: Guarded, code: Any) -> Any:
    """Exit code of the process: `code`, or that of a failure to write to stdout.

    A failure of the work takes precedence.
    """
    stdout.flush()
    if code or stdout.error is None:
        return code
    if isinstance(stdout.error, BrokenPipeError):
        return READER_GONE
    print(
        f"error: cannot write to stdout: {stdout.error.strerror}; the rest was done",
        file=sys.stderr,
    )
    return 1
