"""Progress as a bar on a terminal and as lines in a log."""

import io
import re
import time
from itertools import pairwise

import pytest
from rich.console import Console

from sparsekit.cli.console import Terminal
from sparsekit.cli.progress import _Lines


def test_bar_names_the_step_what_is_left_and_the_memory():
    shown = io.StringIO()
    terminal = Terminal()
    terminal.stderr = Console(file=shown, force_terminal=True, width=120)
    with terminal.working() as progress:
        progress.begin("wanda 2:4", 6)
        for block in range(3):
            progress.step(f"model.layers.{block}")
            time.sleep(0.3)  # three times the interval at which the bar is drawn
        progress.note("something to know")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue())
    assert re.search(r"wanda 2:4 .* 3/6 0:00:0\d +\d+ MB peak +model\.layers\.2", text)
    assert "note: something to know\n" in text


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def lines(clock, seconds, steps, before=0):
    """The lines of a piece of work whose steps take these seconds each."""
    shown = io.StringIO()
    progress = _Lines(Console(file=shown, width=120), clock)
    progress.begin("wanda 2:4", steps, before)
    for step in range(before, steps):
        clock.now += seconds
        progress.step(f"block {step}")
    progress.end()
    return shown.getvalue().splitlines()


def test_quick_work_has_a_line_every_thirty_seconds(clock):
    found = lines(clock, 1.0, 100)
    assert [re.search(r" (\d+)/100", line)[1] for line in found] == ["30", "60", "90", "100"]


def test_slow_work_has_a_line_every_tenth(clock):
    found = lines(clock, 60.0, 100)
    assert [re.search(r" (\d+)/100", line)[1] for line in found] == [
        *(str(10 * tenth) for tenth in range(1, 11))
    ]


@pytest.mark.parametrize(("seconds", "steps"), [(0.3, 1000), (7.0, 13), (31.0, 3)])
def test_no_line_comes_twice_and_none_too_soon(clock, seconds, steps):
    found = lines(clock, seconds, steps)
    assert len(set(found)) == len(found)
    spent = [int(re.search(r" (\d+) s,", line)[1]) for line in found]
    assert all(later - earlier >= 29 for earlier, later in pairwise(spent[:-1]))
    assert f" {steps}/{steps} " in found[-1]


def test_time_left_goes_by_what_this_run_has_done(clock):
    """Of 1000 steps 800 were done before; 100 more in 1000 s leave as many."""
    found = lines(clock, 10.0, 1000, before=800)
    assert "900/1000 block 899, 1000 s, 1000 s left" in found[0]
