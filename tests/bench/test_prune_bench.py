"""The bench of pruning: a ratio of measured times, and memory that does not grow with the depth."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch
from random_llama import random_llama
from refusals import refused

from sparsekit.bench import prune as bench
from sparsekit.bench.prune import bench_prune
from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.errors import DataError, UsageError
from sparsekit.pruning.config import PruneConfig


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_bench_gives_positive_times_and_their_ratio(family, row_file, tmp_path, method):
    config = PruneConfig(method=method, calibration=str(row_file))
    found = bench_prune(config, str(family("llama")), repeat=3, scratch=tmp_path)
    assert len(found["prune_seconds"]) == len(found["floor_seconds"]) == 3
    for seconds in found["prune_seconds"] + found["floor_seconds"]:
        assert 0 < seconds < math.inf
    pairs = zip(found["prune_seconds"], found["floor_seconds"], strict=True)
    assert found["ratio"] == pytest.approx(sorted(ours / plain for ours, plain in pairs)[1])
    assert 0 < found["solve_seconds"] < min(found["prune_seconds"])
    assert found["rows"] == [5, 24]
    assert found["blocks"] == 2
    assert found["threads"] == torch.get_num_threads()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert list(tmp_path.iterdir()) == []  # the output is deleted


def test_bench_without_the_floor_runs_no_forward_of_the_whole_model(family, row_file, monkeypatch):
    monkeypatch.setattr(bench, "_forward_seconds", None)  # a call would fail
    config = PruneConfig(calibration=str(row_file))
    found = bench_prune(config, str(family("llama")), repeat=1, floor=False)
    assert found["floor_seconds"] == []
    assert found["ratio"] is None


def test_floor_runs_on_the_rows_that_pruning_reads(family, row_file):
    config = PruneConfig(calibration=str(row_file), samples=2, length=10)
    assert bench_prune(config, str(family("llama")), repeat=1)["rows"] == [2, 10]


def test_floor_is_refused_where_the_whole_model_does_not_fit(family, row_file, monkeypatch):
    monkeypatch.setattr("sparsekit.model.full_model.available_memory", lambda: 1000)
    monkeypatch.setattr(bench, "prune", None)  # a call would fail in another way
    config = PruneConfig(calibration=str(row_file))
    with refused("not-enough-memory", "--no-floor", kind=DataError):
        bench_prune(config, str(family("llama")), repeat=1)


def test_repeat_below_one_is_refused(family):
    with refused("out-of-range", "--repeat", 0, kind=UsageError):
        bench_prune(PruneConfig(), str(family("llama")), repeat=0)


# Prunes argv[1] on the rows argv[2] into argv[3] by argv[4]; prints as JSON the resident bytes
# after each block, and the peak above the start with its estimate.
WATCHED = """
import json, pathlib, sys
import psutil, torch
from sparsekit.text.calibration import Calibration
from sparsekit.progress import Progress
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.dry_run import plan
from sparsekit.pruning.prune import prune
from sparsekit.memory import peak_memory

resident = []


class Watch(Progress):
    def step(self, label):
        resident.append(psutil.Process().memory_info().rss)


config = PruneConfig(method=sys.argv[4], calibration=sys.argv[2])
out = pathlib.Path(sys.argv[3])
estimate = plan(config, sys.argv[1], out)["peak_memory_estimate_bytes"]
before = psutil.Process().memory_info().rss
prune(config, sys.argv[1], out, progress=Watch())
peak = peak_memory() - before
print(json.dumps({"resident": resident, "peak": peak, "estimate": estimate}))
"""


def watched(folder: Path, row_file: Path, out: Path, method: str) -> dict:
    """What a fresh process that prunes takes, with one thread."""
    command = [sys.executable, "-c", WATCHED, folder, row_file, out, method]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(found.stdout)


@pytest.mark.slow
def test_memory_of_a_fresh_process_does_not_grow_with_the_depth(tmp_path, row_file):
    folder = random_llama(tmp_path / "random", blocks=32, hidden=512, vocabulary=300)
    each = Checkpoint.open(folder).n_bytes // 32  # 6 MB
    resident = watched(folder, row_file, tmp_path / "out", "wanda")["resident"]
    assert len(resident) == 32
    # The first blocks warm up libraries, and what is given back comes in waves of a few blocks:
    # between the halves of what follows, 14 blocks, the size of four may be left over.
    assert median(resident[18:]) - median(resident[4:18]) < 4 * each


# ALPS takes long, and most memory: one block shows it.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "blocks"), [("magnitude", 3), ("wanda", 3), ("sparsegpt", 3), ("alps", 1)]
)
def test_memory_estimate_of_the_plan_holds(tmp_path, row_file, method, blocks):
    folder = random_llama(tmp_path / "random", blocks=blocks, hidden=768, vocabulary=300)
    found = watched(folder, row_file, tmp_path / "out", method)
    # An estimate that is too low is of no use; one that is four times too high neither.
    assert found["estimate"] / 4 < found["peak"] < found["estimate"]
