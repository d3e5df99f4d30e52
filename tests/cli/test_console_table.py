"""Tables on a narrow terminal."""

import io

import pytest
from rich.console import Console

from sparsekit.cli.console import Terminal

COLUMNS = ("model", "perplexity", "method", "size, MB", "log difference", "zero-shot", "seconds")
NUMBERS = ("12,345.67", "1,234.5", "+10.0000 ± 0.1234", "0.6000 ± 0.0250", "115")


@pytest.mark.parametrize("width", [40, 60, 200])
def test_no_number_is_broken_and_every_part_names_the_models(width):
    names = [f"a-long-name-of-a-model-{index}" for index in range(6)]
    perplexity, size, *others = NUMBERS
    shown = table(
        width, COLUMNS, [(n, perplexity, "sparsegpt cg owl + int4", size, *others) for n in names]
    )
    for number in NUMBERS:
        assert shown.count(number) == 6
    assert max(map(len, shown.splitlines())) <= width
    assert shown.count("model") >= (2 if width < 100 else 1)
    assert shown.count("title") == 1


def test_names_that_begin_with_a_digit_are_no_numbers():
    lines = table(80, ("model", "pattern"), [("7b", "2:4"), ("7b-pruned", "4:8")]).splitlines()
    assert lines[2].startswith("7b ")


def table(width: int, columns, rows) -> str:
    """What a terminal of a width shows."""
    shown = io.StringIO()
    terminal = Terminal()
    terminal.stderr = Console(file=shown, width=width, highlight=False, soft_wrap=True)
    terminal.table("title", columns, rows)
    return shown.getvalue()
