"""Every verb writes the tensors that it wrote before: their sha256, for tiny models.

Floating-point results depend on the processor and on torch, so that the table is kept by a probe
of both. To record it on another machine, or after an intended change of outputs, run
`SPARSEKIT_RECORD=1 pytest tests/test_bytes.py` and say in the changelog what changed.
"""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

TABLE = Path(__file__).parent / "data" / "bytes.json"
MODELS = ("llama", "gpt2", "qwen2", "gemma3")
PRUNERS = ("magnitude", "wanda", "ria", "nowag", "sparsegpt", "alps", "dsnot", "armor")
RECOVERERS = ("fixed", "ast", "cast")
QUANTIZERS = ("rtn", "gptq", "awq")


def digest(folder: Path) -> str:
    """The sha256 over name, type, shape and bytes of all tensors of a folder, in name order."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stream:
            for name in stream.keys():  # noqa: SIM118  (it is not a mapping)
                tensors[name] = stream.get_tensor(name)
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        whole.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def probe() -> str:
    """What decides floating-point results here: torch, and how it adds, multiplies and draws."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(96, 96, generator=generator) for _ in range(2))
    found = [a, a @ b, (a @ b).exp(), torch.linalg.cholesky(a @ a.T + 96 * torch.eye(96))]
    found += [(a.bfloat16() @ b.bfloat16()).float(), torch.softmax(a @ b, -1), (a * b).sum(-1)]
    whole = hashlib.sha256(torch.__version__.encode())
    for tensor in found:
        whole.update(tensor.numpy().tobytes())
    return whole.hexdigest()[:16]


@pytest.fixture(scope="module")
def table():
    """The recorded digests of this machine; what a test adds is kept when it records."""
    everything = json.loads(TABLE.read_text()) if TABLE.is_file() else {}
    recording = bool(os.environ.get("SPARSEKIT_RECORD"))
    here = {} if recording else everything.get(probe())
    if here is None:
        pytest.skip(f"no digests are recorded for a machine like this one ({probe()})")
    yield here
    if recording:
        everything[probe()] = here
        TABLE.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n")


@pytest.fixture
def same(table, cli):
    """Runs a command that writes a folder, and compares its tensors with the table."""

    def check(case: str, out: Path, *words: object) -> Path:
        ran = cli(*words)
        assert ran.code == 0, ran.stderr
        found = digest(out)
        if os.environ.get("SPARSEKIT_RECORD"):
            table[case] = found
        assert table.get(case) == found, case
        return out

    return check


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", PRUNERS)
def test_prune_writes_the_same_tensors(same, family, row_file, tmp_path, model, method):
    out = tmp_path / "out"
    rows = () if method == "magnitude" else ("--calibration", row_file)
    rounds = ("-O", "block=8") if method == "armor" else ()
    words = ("prune", family(model), "-o", out, "--method", method, *rows, *rounds)
    same(f"prune {method} {model}", out, *words)


@pytest.mark.parametrize("model", MODELS)
def test_the_rest_writes_the_same_tensors(same, cli, family, row_file, tmp_path, model):
    rows = ("--calibration", row_file)
    pruned = tmp_path / "pruned"
    assert cli("prune", family(model), "-o", pruned, "--method", "wanda", *rows).code == 0
    train = (
        "--data",
        row_file,
        "--tokens",
        "768",
        "--batch",
        "2",
        "--length",
        "16",
        "--lr",
        "1e-3",
    )
    for method in RECOVERERS:
        out = tmp_path / method
        words = ("recover", pruned, "-o", out, "--method", method, *train)
        decay = ("-O", "decay=40") if method == "cast" else ()  # ends in these few steps
        same(f"recover {method} {model}", out, *words, *decay)
    if model != "gpt2":  # its layers are no nn.Linear, which compressed-tensors takes only
        for method in QUANTIZERS:
            out = tmp_path / method
            read = () if method == "rtn" else rows
            words = ("quantize", pruned, "-o", out, "--method", method, "--grid", "int4-g16")
            same(f"quantize {method} {model}", out, *words, *read)
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    same(f"pack {model}", packed, "pack", pruned, "-o", packed)
    same(f"unpack {model}", plain, "unpack", packed, "-o", plain)
    assert digest(plain) == digest(pruned)


def test_a_recipe_writes_the_same_tensors(same, family, row_file, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        f"model: {family('llama')}\n"
        "stages:\n"
        f"- prune: {{method: sparsegpt, pattern: 2:4, calibration: {row_file}}}\n"
        f"- recover: {{method: ast, data: {row_file}, tokens: 192, batch: 2, length: 16}}\n"
        f"- quantize: {{grid: int8, method: gptq, calibration: {row_file}}}\n"
    )
    run = tmp_path / "run"
    out = run / "sparsegpt.ast.int8"
    same("recipe", out, "run", tmp_path / "recipe.yaml", "-o", run)
