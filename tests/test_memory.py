"""The peak of this process alone, and free memory in a container."""

import subprocess
import sys

import psutil
import pytest

from sparsekit import memory

NAMES = {
    "0::": ("", "memory.max", "memory.current", ""),
    "5:memory:": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}


@pytest.fixture(params=NAMES, ids=["version 2", "version 1"])
def group(request, tmp_path, monkeypatch):
    """Writes the files of one control group; this process is in `/outer/inner`."""
    root, limit, usage, prefix = NAMES[request.param]
    groups = tmp_path / "cgroup"
    groups.write_text(f"7:cpu,cpuacct:/other\n{request.param}/outer/inner\n")
    monkeypatch.setattr(memory, "GROUPS", groups)
    monkeypatch.setattr(memory, "GROUP_ROOT", tmp_path / "fs")

    def write(name: str, allowed: str, used: int, files: int = 0) -> None:
        folder = tmp_path / "fs" / root / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit).write_text(f"{allowed}\n")
        (folder / usage).write_text(f"{used}\n")
        stat = f"cache 77\n{prefix}active_file {files}\n{prefix}inactive_file {2 * files}\n"
        (folder / "memory.stat").write_text(stat)

    return write


def test_without_a_limit_it_is_the_memory_of_the_machine(group, monkeypatch):
    free = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert memory.available_memory() == free.available > 0
    group("outer", "max", 1000)
    assert memory.available_memory() == free.available


@pytest.mark.parametrize(("used", "left"), [(1000, 9000), (10000, 0), (11000, 0)])
def test_limit_of_a_container_counts(group, used, left):
    group("", "10000", used)  # a container sees its own group as the root
    assert memory.available_memory() == left


def test_tightest_of_the_groups_above_counts(group):
    group("", "90000", 0)
    group("outer", "5000", 1000)
    group("outer/inner", "8000", 1000)
    assert memory.available_memory() == 4000


def test_cached_files_are_given_back_and_do_not_count(group):
    group("outer/inner", "10000", 9900, files=3000)
    assert memory.available_memory() == 100 + 3 * 3000


def test_peak_is_not_that_of_the_parent_process():
    taken = bytearray(300 << 20)  # in this process, which starts the other
    code = "from sparsekit.memory import peak_memory; print(peak_memory())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1 << 20 < int(found.stdout) < len(taken)
    assert memory.peak_memory() > len(taken)
