"""What pruning and training may cost: the project's limits, measured by its own bench.

On a real model: `pytest -m real tests/quality/test_cost.py -s` (about 20 minutes on two quiet
cores, 10 GB of disk). The limits are the project's; the rows for the times come from the
developers' parity data.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from random_llama import random_llama

ROWS = Path(__file__).parents[3] / "shared/parity/smollm2/calibration_c4_32x512.safetensors"

pytestmark = pytest.mark.real


def bench(*arguments: object) -> dict:
    """A bench in a process of its own, since a peak is that of a process."""
    command = [sys.executable, "-m", "sparsekit", "bench", *map(str, arguments), "--json", "-q"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not ROWS.is_file(), reason="the parity data (../shared) is not here")
@pytest.mark.parametrize(("method", "limit"), [("wanda", 2.1), ("sparsegpt", 2.8)])
def test_pruning_takes_at_most_so_many_forwards(method, limit, monkeypatch):
    monkeypatch.delenv("SPARSEKIT_CACHE", raising=False)
    found = bench("prune", "demo", "--method", method, "--calibration", ROWS)
    print(found)
    assert found["ratio"] <= limit


def test_training_reaches_three_quarters_of_the_matrix_rate(monkeypatch):
    """With long batches; not where products are so fast that what lies between them weighs more."""
    monkeypatch.delenv("SPARSEKIT_CACHE", raising=False)
    found = bench("recover", "demo", "--batch", 8, "--length", 256)
    print(found)
    if found["matrix_gflops"] > 200:
        pytest.skip(f"{found['share_of_the_possible']:.2f}, as the README tells of fast machines")
    assert found["share_of_the_possible"] >= 0.75


def test_peak_memory_is_below_a_gigabyte_whatever_the_depth(tmp_path):
    peaks = []
    for blocks in (132, 264):
        model = tmp_path / f"random-{blocks}"
        rows = random_llama(model, blocks=blocks, hidden=1024) / "rows.safetensors"
        found = bench(
            *("prune", model, "--calibration", rows, "--no-floor", "--repeat", 1),
            *("--scratch", tmp_path),
        )
        print(found)
        assert found["model_bytes"] > blocks / 132 * 3e9
        peaks.append(found["peak_bytes_above_start"])
    assert peaks[0] < 1e9
    assert peaks[1] == pytest.approx(peaks[0], rel=0.1)


def test_armor_takes_less_than_a_gigabyte_too(tmp_path):
    """One sweep on each weight of 3 GB: the memory does not depend on how many there are."""
    model = tmp_path / "random"
    random_llama(model, blocks=132, hidden=1024)
    found = bench(
        *("prune", model, "--method", "armor", "--option", "sweeps=1"),
        *("--calibration", model / "rows.safetensors", "--no-floor", "--repeat", 1),
        *("--scratch", tmp_path),
    )
    print(found)
    assert found["peak_bytes_above_start"] < 1e9
