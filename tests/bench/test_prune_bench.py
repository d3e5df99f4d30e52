"""The benches: a ratio of measured times, and a checkpoint of random weights."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch

from sparsekit.bench import prune as bench
from sparsekit.bench.prune import bench_prune, generate
from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.folder import INDEX
from sparsekit.errors import DataError, UsageError
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.prune import prune


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
    with pytest.raises(DataError, match=r"the plain forward needs .* GB.*--no-floor"):
        bench_prune(config, str(family("llama")), repeat=1)


def test_repeat_below_one_is_refused(family):
    with pytest.raises(UsageError, match="--repeat must be at least 1, not 0"):
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


def test_memory_of_a_fresh_process_does_not_grow_with_the_depth(tmp_path, row_file):
    folder = generate(tmp_path / "random", blocks=32, hidden=512, vocabulary=300)
    each = Checkpoint.open(folder).n_bytes // 32  # 6 MB
    resident = watched(folder, row_file, tmp_path / "out", "wanda")["resident"]
    assert len(resident) == 32
    # The first blocks warm up libraries, and what is given back comes in waves of a few blocks:
    # between the halves of what follows, 14 blocks, the size of four may be left over.
    assert median(resident[18:]) - median(resident[4:18]) < 4 * each


# ALPS takes long, and most memory: one block shows it.
@pytest.mark.parametrize(
    ("method", "blocks"), [("magnitude", 3), ("wanda", 3), ("sparsegpt", 3), ("alps", 1)]
)
def test_memory_estimate_of_the_plan_holds(tmp_path, row_file, method, blocks):
    folder = generate(tmp_path / "random", blocks=blocks, hidden=768, vocabulary=300)
    found = watched(folder, row_file, tmp_path / "out", method)
    # An estimate that is too low is of no use; one that is four times too high neither.
    assert found["estimate"] / 4 < found["peak"] < found["estimate"]


@pytest.mark.parametrize("shard", [1 << 29, 100_000])
def test_generated_checkpoint_loads_and_can_be_pruned(tmp_path, monkeypatch, rows, shard):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(bench, "SHARD_BYTES", shard)
    folder = generate(tmp_path / "random", blocks=3, hidden=64, vocabulary=300)
    index = json.loads((folder / INDEX).read_text())
    assert (len(set(index["weight_map"].values())) > 1) == (shard == 100_000)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert len(model.model.layers) == 3
    with torch.no_grad():
        assert model(input_ids=rows).logits.isfinite().all()
    weight = model.model.layers[2].mlp.down_proj.weight
    assert weight.float().std().item() == pytest.approx(weight.shape[1] ** -0.5, rel=0.05)
    made = prune(PruneConfig(method="magnitude"), str(folder), tmp_path / "out")
    assert made.entry["totals"]["weights"] == 21


def test_generated_weights_depend_on_the_seed_alone(tmp_path):
    def fingerprint(name: str, seed: int) -> str:
        return Checkpoint.open(
            generate(tmp_path / name, blocks=1, hidden=64, vocabulary=64, seed=seed)
        ).scan()

    first = fingerprint("a", 1)
    assert fingerprint("b", 1) == first
    assert fingerprint("c", 2) != first


@pytest.mark.parametrize(("blocks", "hidden"), [(0, 64), (1, 0), (1, 100), (1, -64)])
def test_sizes_that_do_not_fit_are_refused(tmp_path, blocks, hidden):
    with pytest.raises(UsageError, match="--blocks must be at least 1 and --hidden a multiple"):
        generate(tmp_path / "random", blocks=blocks, hidden=hidden)
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_not_generated_over(tmp_path):
    with pytest.raises(UsageError, match="exists"):
        generate(tmp_path, blocks=1, hidden=64)
