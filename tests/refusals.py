"""What a refusal is asserted by: its code and the values it names, never its prose."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from sparsekit.errors import SparsekitError


@contextmanager
def refused(
    code: str, *named: object, kind: type[SparsekitError] = SparsekitError
) -> Iterator[pytest.ExceptionInfo[Any]]:
    """Expects an error with this code that names each of these values.

    Args:
        code: The error's `code`.
        named: What the message or the hint must hold, e.g. the name of a weight or a flag.
        kind: The error's class.
    """
    with pytest.raises(kind) as caught:
        yield caught
    assert caught.value.code == code, f"[{caught.value.code}] {caught.value}"
    for value in named:
        assert str(value) in str(caught.value), f"{value!r} is not in: {caught.value}"


def assert_refused(result: Any, exit_code: int, code: str, *named: object) -> None:
    """A command ended with one line of error that has this code and names each of these values."""
    assert result.code == exit_code, result.stderr
    assert result.stdout == ""
    assert re.fullmatch(rf"[\w: -]*error: [^\n]+ \[{re.escape(code)}\]\n", result.stderr), (
        result.stderr
    )
    for value in named:
        assert str(value) in result.stderr, f"{value!r} is not in: {result.stderr}"
