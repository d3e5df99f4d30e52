"""What quantizing costs SmolLM2-135M at 2:4, and that no zero is revived, on every grid.

Slow: `pytest -m slow tests/test_real_quantize.py -s` (a quarter of an hour on two quiet cores).
Rows and windows are the developers' (../shared): 32 x 512 tokens of C4, every window of WikiText-2.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared" / "parity" / "smollm2"
ROWS = SHARED / "calibration_c4_32x512.safetensors"
WINDOWS = SHARED / "eval_wikitext2_16x1024.safetensors"
GRIDS = ("int8", "int4-g64", "w8a8", "fp8")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ROWS.is_file(), reason="the developers' data (../shared) is not here"),
]
# Stock transformers' own weights against the source's zeros and pattern, in a process of its own.
LOADS = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from sparsekit.errors import PatternError
from sparsekit.models.checkpoint import Checkpoint
from sparsekit.tensors.patterns import Pattern
out, source, pattern = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(out)
model(torch.arange(4)[None])
before, revived, broken, count = Checkpoint.open(Path(source)), 0, 0, 0
for name in Checkpoint.open(Path(out)).coded:
    weight = model.get_parameter(name).detach()
    revived += int((weight[before.read([name])[name] == 0] != 0).sum())
    try:
        Pattern.parse(pattern).check(weight, name)
    except PatternError:
        broken += 1
    count += 1
print(json.dumps([count, revived, broken]))
"""


def run(*command: object) -> dict | list:
    """The JSON of a command, run with the user's cache and all cores."""
    environment = {k: v for k, v in os.environ.items() if k != "SPARSEKIT_CACHE"}
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def sparsekit(*arguments: object) -> dict:
    return run("-m", "sparsekit", *arguments, "--json", "-q")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Gives the folder of the model pruned by SparseGPT, and of that on a grid."""
    root = tmp_path_factory.mktemp("quantized")

    def folder(pattern: str, method: str | None = None, grid: str | None = None) -> Path:
        first = root / pattern.replace(":", "-").replace("%", "")
        if not first.exists():
            options = ("--method", "sparsegpt", "--pattern", pattern, "--calibration", ROWS)
            sparsekit("prune", "demo", "-o", first, *options)
        if method is None:
            return first
        out = first.with_name(f"{first.name}-{method}-{grid}")
        if not out.exists():
            options = ("--method", method, "--grid", grid, "--calibration", ROWS)
            told = sparsekit("quantize", first, "-o", out, *options)
            print(out.name, {k: told[k] for k in ("seconds", "totals", "peak_memory_bytes")})
        return out

    return folder


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "50%"])
def test_stock_transformers_finds_no_revived_zero(made, pattern, grid, method):
    count, revived, broken = run("-c", LOADS, made(pattern, method, grid), made(pattern), pattern)
    assert (count, revived, broken) == (210, 0, 0)


def test_gptq_is_better_than_rounding_at_four_bits(made):
    names = [("rtn", "int8"), ("gptq", "int8"), ("rtn", "int4-g64"), ("gptq", "int4-g64")]
    folders = [made("2:4"), *(made("2:4", *name) for name in names)]
    told = sparsekit("eval", *folders, "--text", WINDOWS)["models"]
    found = [row["perplexity"]["perplexity"] for row in told]
    print(dict(zip(["before", *(" ".join(name) for name in names)], found, strict=True)))
    assert found[4] < found[3]
    assert found[2] < 1.02 * found[0]
