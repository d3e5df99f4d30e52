"""What a dry run says of time and memory against the run itself, on SmolLM2-135M and at 1.1B.

On a real model: `pytest -m real tests/quality/test_real_forecast.py -s` (half an hour on two quiet
cores). The bar is the project's: within 30 %.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from random_llama import random_llama

WITHIN = 0.3
RUNS = {
    "wanda": ["prune", "--method", "wanda"],
    "sparsegpt": ["prune", "--method", "sparsegpt"],
    "owl": ["prune", "--method", "wanda", "--pattern", "50%", "--allocate", "owl"],
    "gptq": ["quantize", "--grid", "int4-g64"],
}
ROWS = ["--samples", "32", "--length", "512"]

pytestmark = pytest.mark.real


def told(*words: object) -> tuple[dict, float]:
    """The JSON of a command, run with the user's cache and all cores; and its seconds."""
    environment = {k: v for k, v in os.environ.items() if k != "SPARSEKIT_CACHE"}
    command = [sys.executable, "-m", "sparsekit", *map(str, words), "--json", "-q"]
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), time.perf_counter() - begun


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """1.1 billion random numbers in 22 blocks, with token rows beside them."""
    return random_llama(tmp_path_factory.mktemp("large") / "model", blocks=22, hidden=2048)


def libraries() -> int:
    """The memory of a process that has imported what a run does, in bytes."""
    code = (
        "import psutil, transformers.models.llama.modeling_llama\n"
        "import sparsekit.pruning.prune, sparsekit.recovery.recover\n"
        "print(psutil.Process().memory_info().rss)"
    )
    return int(subprocess.check_output([sys.executable, "-c", code], text=True))


def compared(out: Path, verb: str, model: object, *flags: object) -> dict[str, float]:
    """What the plan expected, over what was: seconds and peak memory."""
    command = (verb, model, "-o", out, *flags)
    plan, spent = told(*command, "--dry-run", "--time")
    entry, _ = told(*command)
    room = plan.get("peak_memory_estimate_bytes") or (
        plan["peak_memory_at_least_bytes"] + plan["activation_bytes_estimate"]
    )
    found = {
        "time": plan["seconds_estimate"] / entry["seconds"],
        "memory": (libraries() + room) / entry["peak_memory_bytes"],
    }
    print(*command[:1], Path(str(model)).name, *flags, {k: round(v, 3) for k, v in found.items()})
    print(f"  planned in {spent:.0f} s, run in {entry['seconds']:.0f} s", flush=True)
    return found


@pytest.mark.parametrize("run", RUNS)
def test_expectations_of_smollm2_hold(tmp_path, run):
    verb, *flags = RUNS[run]
    found = compared(tmp_path / "out", verb, "demo", *flags, *ROWS)
    assert all(1 - WITHIN < ratio < 1 + WITHIN for ratio in found.values()), found


def test_expectations_of_training_hold(tmp_path):
    told("prune", "demo", "-o", tmp_path / "pruned", "--method", "wanda", *ROWS)
    found = compared(tmp_path / "out", "recover", tmp_path / "pruned", "--tokens", 20480)
    assert all(1 - WITHIN < ratio < 1 + WITHIN for ratio in found.values()), found


@pytest.mark.parametrize("run", ["wanda", "sparsegpt"])
def test_expectations_of_a_model_of_a_billion_hold(large, tmp_path, run):
    verb, *flags = RUNS[run]
    rows = ("--calibration", large / "rows.safetensors")
    found = compared(tmp_path / "out", verb, large, *flags, *rows)
    assert all(1 - WITHIN < ratio < 1 + WITHIN for ratio in found.values()), found
