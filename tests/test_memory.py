"""The peak of this process alone, and free memory in a container."""

import subprocess
import sys

import psutil
import pytest

from sparsekit import memory


@pytest.fixture
def group(tmp_path, monkeypatch):
    """Sets the limit and the use of this process's container."""
    limit, usage = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(memory, "GROUP_FILES", ((str(limit), str(usage)),))

    def write(allowed: str, used: str) -> None:
        limit.write_text(allowed)
        usage.write_text(used)

    return write


def test_without_a_container_it_is_what_the_machine_has_left(group, monkeypatch):
    free = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert memory.available_memory() == free.available > 0
    group("max\n", "1000\n")
    assert memory.available_memory() == free.available


@pytest.mark.parametrize(("used", "left"), [("1000", 9000), ("10000", 0), ("11000", 0)])
def test_limit_of_a_container_counts(group, used, left):
    group("10000\n", f"{used}\n")
    assert memory.available_memory() == left


def test_peak_is_not_that_of_the_process_that_started_this_one():
    taken = bytearray(300 << 20)  # in this process, which starts the other
    code = "from sparsekit.memory import peak_memory; print(peak_memory())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1 << 20 < int(found.stdout) < len(taken)
    assert memory.peak_memory() > len(taken)
