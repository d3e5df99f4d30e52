"""What quantizing costs SmolLM2-135M at 2:4, and that no zero is revived, on every grid.

On a real model: `pytest -m real tests/quality/test_real_quantize.py -s` (half an hour on two quiet
cores). Rows and windows are the developers' (../shared): 32 x 512 tokens of C4, every window of
WikiText-2. Zeros that come back do not depend on how many rows there were, so that only what is
scored has all.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SHARED = Path(__file__).parents[3] / "shared" / "parity" / "smollm2"
ROWS = SHARED / "calibration_c4_32x512.safetensors"
WINDOWS = SHARED / "eval_wikitext2_16x1024.safetensors"
GRIDS = ("int8", "int4-g64", "w8a8", "fp8")
METHODS = ("rtn", "gptq", "awq")
SCORED = [(method, grid) for grid in ("int8", "int4-g64") for method in METHODS]
FEW = ("--samples", "8", "--length", "256")
# Its own environment, as its versions of torch and compressed-tensors are not ours.
VLLM = os.environ.get("SPARSEKIT_VLLM")

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not ROWS.is_file(), reason="the developers' data (../shared) is not here"),
]
# Stock transformers' own weights against the source's zeros and pattern, in a process of its own.
LOADS = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from sparsekit.errors import PatternError
from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.weights.patterns import Pattern
out, source, pattern = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(out)
model(torch.arange(4)[None])
before, revived, broken, count = Checkpoint.open(Path(source)), 0, 0, 0
for name in Checkpoint.open(Path(out)).quantized:
    weight = model.get_parameter(name).detach()
    revived += int((weight[before.read([name])[name] == 0] != 0).sum())
    try:
        Pattern.parse(pattern).check(weight, name)
    except PatternError:
        broken += 1
    count += 1
print(json.dumps([count, revived, broken]))
"""
# Sixteen tokens after a prompt that vLLM finds most probable, in bfloat16, and how far each is from
# the most probable one of transformers, in nats.
PROMPT = "The capital of France is"
COMPARES = f"""
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
prompt = AutoTokenizer.from_pretrained(sys.argv[1])({PROMPT!r}).input_ids
tokens = json.loads(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="bfloat16")
with torch.no_grad():
    log = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
log = log.log_softmax(-1)
found = log.gather(1, torch.tensor(tokens)[:, None])[:, 0]
print(json.dumps((log.max(-1).values - found).tolist()))
"""
SERVES = f"""
import json, sys
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    model = LLM(sys.argv[1], dtype="bfloat16", enforce_eager=True, max_model_len=256)
    wanted = SamplingParams(temperature=0, max_tokens=16, min_tokens=16)
    [found] = model.generate({PROMPT!r}, wanted)
    print("TOKENS", json.dumps(list(found.outputs[0].token_ids)), flush=True)
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
        scored = pattern == "2:4"
        if not first.exists():
            rows = ("--calibration", ROWS) if scored else FEW
            options = ("--method", "sparsegpt", "--pattern", pattern)
            sparsekit("prune", "demo", "-o", first, *options, *rows)
        if method is None:
            return first
        out = first.with_name(f"{first.name}-{method}-{grid}")
        if not out.exists():
            rows = ("--calibration", ROWS) if scored and (method, grid) in SCORED else FEW
            rows = () if method == "rtn" else rows
            options = ("--method", method, "--grid", grid)
            told = sparsekit("quantize", first, "-o", out, *options, *rows)
            print(out.name, {k: told[k] for k in ("seconds", "totals", "peak_memory_bytes")})
        return out

    return folder


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "50%"])
def test_stock_transformers_finds_no_revived_zero(made, pattern, grid, method):
    count, revived, broken = run("-c", LOADS, made(pattern, method, grid), made(pattern), pattern)
    assert (count, revived, broken) == (210, 0, 0)


def test_what_is_lost_at_eight_and_at_four_bits(made, tmp_path):
    """In one table: rounding, GPTQ and AWQ after SparseGPT, and both in one pass."""
    together = tmp_path / "together"
    options = ("--method", "sparsegpt", "--then", "int4-g64", "--calibration", ROWS)
    sparsekit("prune", "demo", "-o", together, *options)
    folders = [made("2:4"), *(made("2:4", *name) for name in SCORED), together]
    told = sparsekit("eval", *folders, "--text", WINDOWS)["models"]
    names = ["before", *(" ".join(name) for name in SCORED), "one pass int4-g64"]
    found = {n: row["perplexity"]["value"] for n, row in zip(names, told, strict=True)}
    print(found)
    assert found["gptq int4-g64"] < found["rtn int4-g64"]
    assert found["awq int4-g64"] < found["rtn int4-g64"]
    assert all(found[f"{method} int8"] < 1.02 * found["before"] for method in METHODS)


def test_packed_models_give_the_same_tokens_and_are_as_small_as_theory(made, tmp_path):
    """2:4 in bf16: 9 bits of 16. On int4-g64: 2 bits of codes, 1 of places, 1/4 of scales."""
    for folder, bits in ((made("2:4"), 9.0), (made("2:4", "gptq", "int4-g64"), 3.25)):
        packed, plain = tmp_path / f"{folder.name}-packed", tmp_path / f"{folder.name}-plain"
        told = sparsekit("pack", folder, "-o", packed)
        assert abs(told["totals"]["bits_per_weight"] - bits) < 1e-9
        sparsekit("unpack", packed, "-o", plain)
        for file in folder.glob("*.safetensors"):
            assert _tensors(file) == _tensors(plain / file.name)
        speeds = sparsekit("bench", "infer", folder, packed, "--prompt", 64, "--new", 16)
        print({m["model"]: {k: v for k, v in m.items() if k != "tokens"} for m in speeds["models"]})
        assert speeds["same_tokens"]


@pytest.mark.skipif(VLLM is None, reason="SPARSEKIT_VLLM names no Python that has vLLM")
@pytest.mark.parametrize("grid", ["int4-g64", "w8a8"])
def test_vllm_loads_it_and_finds_the_same_tokens_probable(made, grid, tmp_path):
    """Each in a process of its own; its kernels round otherwise. What is packed it refuses."""
    folder = made("2:4", "gptq", grid)
    found = vllm(folder)
    told = re.search(r"^TOKENS (.*)$", found.stdout, re.MULTILINE)
    assert told is not None, found.stderr
    behind = run("-c", COMPARES, folder, told[1])
    print(grid, told[1], behind, flush=True)
    assert len(behind) == 16
    assert max(behind) < 1.0  # tokens picked at random are 7 to 14 behind
    sparsekit("pack", folder, "-o", tmp_path / "packed")
    refused = vllm(tmp_path / "packed")
    assert refused.returncode != 0
    assert "quantization method: sparsekit" in refused.stdout + refused.stderr


def vllm(folder: Path) -> subprocess.CompletedProcess:
    """What vLLM generates, the tokens among its own lines on stdout."""
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    words = [str(VLLM), "-c", SERVES, str(folder)]
    return subprocess.run(
        words, capture_output=True, text=True, check=False, env=environment, timeout=300
    )


def _tensors(file: Path) -> dict[str, bytes]:
    """The bytes of each tensor in a file."""
    return {name: t.view(torch.uint8).numpy().tobytes() for name, t in load_file(file).items()}
