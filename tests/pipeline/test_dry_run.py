"""Plans of quantize, recover and pack: what is then done, the room it takes, the same refusals."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from refusals import refused
from verbs import replace

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.errors import DataError, StorageError, UsageError
from sparsekit.packing.convert import convert
from sparsekit.packing.dry_run import plan_convert, plan_pack, plan_unpack
from sparsekit.packing.pack import pack
from sparsekit.packing.unpack import unpack
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.prune import prune
from sparsekit.quantization.config import QuantizeConfig
from sparsekit.quantization.dry_run import plan_quantize
from sparsekit.quantization.quantize import quantize
from sparsekit.recovery.config import RecoverConfig
from sparsekit.recovery.dry_run import plan_recover
from sparsekit.recovery.recover import recover

LEGACY = Path(__file__).parents[1] / "data" / "legacy"


@pytest.fixture
def quantized(row_file) -> QuantizeConfig:
    return QuantizeConfig(grid="int4-g16", calibration=str(row_file))


@pytest.fixture
def trained(row_file) -> RecoverConfig:
    return RecoverConfig(data=str(row_file), tokens=100, batch=2, length=24)


def test_plan_of_quantize_tells_the_bytes_that_are_then_written(quantized, pruned, tmp_path):
    found = plan_quantize(quantized, str(pruned), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert (found["method"], found["grid"], found["weights"]) == ("gptq", "int4-g16", 14)
    assert found["blocks"] == 2
    entry = quantize(quantized, str(pruned), tmp_path / "out").entry.to_json()
    assert found["size"] == entry["totals"]["size"]
    assert found["skipped"] == entry["skipped"]
    assert found["bytes_to_write"] == weights_of(tmp_path / "out")


def test_plan_of_recover_tells_the_steps_and_bytes_that_are_then_written(
    trained, family, pruned, tmp_path
):
    found = plan_recover(trained, str(pruned), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert found["teacher"] == str(family("llama"))
    report = recover(trained, str(pruned), tmp_path / "out")
    assert found["method"] == report.entry.settings.method == "ast"
    assert found["steps"] == report.entry.plan.steps == 3
    assert found["steps"] * found["step_tokens"] == report.entry.tokens
    assert found["zeros"] == report.entry.totals.zeros
    assert found["bytes_to_write"] == weights_of(tmp_path / "out")
    numbers = Checkpoint.open(pruned).n_bytes // 2  # bfloat16
    # Weights, gradients, two moments and what ast remembers; and the teacher.
    assert 24 * numbers * 0.95 < found["peak_memory_at_least_bytes"] <= 24 * numbers


def test_plan_of_recover_without_a_teacher_or_a_number_of_tokens(trained, pruned, tmp_path):
    with_teacher = plan_recover(trained, str(pruned), tmp_path / "out")
    config = replace(trained, kl_weight=0.0, tokens=None, max_time="60s")
    found = plan_recover(config, str(pruned), tmp_path / "out")
    assert (found["teacher"], found["steps"], found["max_time"]) == (None, None, 60.0)
    least = "peak_memory_at_least_bytes"
    assert 5 * (with_teacher[least] - found[least]) == found[least]


def test_plan_of_pack_tells_the_bytes_that_are_then_written(pruned, tmp_path):
    found = plan_pack(str(pruned), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert found["patterns"] == {"2:4": 14}
    totals = pack(str(pruned), tmp_path / "out").entry.to_json()["totals"]
    assert found["bytes_to_write"] == totals["bytes"] == weights_of(tmp_path / "out")
    assert found["bytes_before"] == totals["bytes_before"]
    assert (found["weights"], found["size"]) == (totals["weights"], totals["size"])


def test_plans_of_unpack_and_convert_tell_the_bytes_that_are_then_written(pruned, tmp_path):
    packed = pack(str(pruned), tmp_path / "packed").out
    out = tmp_path / "out"
    found = plan_unpack(str(packed), out)
    assert not out.exists()
    assert found["patterns"] == {"2:4": 14}
    assert found["bytes_before"] == weights_of(packed)
    totals = unpack(str(packed), out).entry.to_json()["totals"]
    assert found["bytes_to_write"] == totals["bytes"] == weights_of(out)
    assert found["weights"] == totals["weights"]
    old, new = str(LEGACY / "sparse-24-bitmask"), tmp_path / "new"
    found = plan_convert(old, new)
    assert not new.exists()
    totals = convert(old, new).entry.to_json()["totals"]
    assert found["bytes_to_write"] == weights_of(new)
    assert (found["weights"], found["size"]) == (totals["weights"], totals["size"])
    with refused("kind-not-taken", "plain", "unpack", kind=DataError):
        plan_unpack(str(pruned), tmp_path / "other")
    with refused("kind-not-taken", "plain", "convert", kind=DataError):
        plan_convert(str(pruned), tmp_path / "other")


def test_dry_runs_of_unpack_and_convert_write_nothing(cli, pruned, tmp_path):
    packed, out = tmp_path / "packed", tmp_path / "out"
    pack(str(pruned), packed)
    for command, words in (
        (("unpack", packed), ("14 of 2:4", "instead of", "peak memory")),
        (("convert", LEGACY / "marlin-24-int4"), ("convert marlin-24", "to write", "peak memory")),
        (("convert", LEGACY / "marlin-24-int4", "--format", "packed"), ("plain form",)),
    ):
        found = cli(*command, "-o", out, "--dry-run")
        assert (found.code, found.stdout) == (0, ""), found.stderr
        assert all(word in found.stderr for word in ("nothing was written", *words)), found.stderr
        assert not out.exists()


def weights_of(folder: Path) -> int:
    """Bytes of the weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_plans_refuse_what_the_runs_refuse(quantized, trained, family, pruned, tmp_path):
    out, dense = tmp_path / "out", str(family("llama"))
    with refused("grid-does-not-divide", "48", kind=UsageError):
        plan_quantize(QuantizeConfig(method="rtn", grid="int4-g48"), dense, out)
    with refused("not-sparse", dense, kind=DataError):
        plan_pack(dense, out)
    with refused("would-fill-zeros", "o_proj", kind=UsageError):
        plan_recover(replace(trained, skip=["o_proj"]), str(pruned), out)
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for plan in (
        lambda: plan_quantize(quantized, dense, out),
        lambda: plan_recover(trained, str(pruned), out),
        lambda: plan_pack(str(pruned), out),
    ):
        with refused("output-exists", "/out", kind=UsageError):
            plan()
    assert [file.name for file in out.iterdir()] == ["thesis.txt"]


def test_plans_see_a_full_disk(quantized, trained, pruned, tmp_path, monkeypatch):
    class Full:
        free = 10

    monkeypatch.setattr("shutil.disk_usage", lambda _: Full)
    for plan in (
        lambda: plan_quantize(quantized, str(pruned), tmp_path / "out"),
        lambda: plan_recover(trained, str(pruned), tmp_path / "out"),
        lambda: plan_pack(str(pruned), tmp_path / "out"),
    ):
        with pytest.raises(StorageError):
            plan()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            ["quantize", "--grid", "int4-g16", "--calibration"],
            ["gptq, int4-g16", "14 in 2 blocks", "float32 on cpu", "peak memory", "lm_head"],
        ),
        (
            ["recover", "--tokens", "96", "--batch", "2", "--length", "24", "--data"],
            ["ast, 2:4", "teacher", "2, of 48 tokens", "for a batch", "saved states", "float32 on"],
        ),
        (
            ["recover", "--tokens", "1K", "--length", "24", "--mixed-precision", "bf16", "--data"],
            ["float32, products in bfloat16, on cpu"],
        ),
        (["pack"], ["14 of 2:4", "instead of", "peak memory"]),
    ],
    ids=["quantize", "recover", "mixed", "pack"],
)
def test_dry_run_shows_the_plan_and_writes_nothing(cli, pruned, row_file, tmp_path, command, words):
    verb, *flags = command
    arguments = [verb, pruned, "-o", tmp_path / "out", *flags, *([row_file] if flags else [])]
    found = cli(*arguments, "--dry-run")
    assert (found.code, found.stdout) == (0, ""), found.stderr
    for word in ("nothing was written", "to write", *words):
        assert word in found.stderr
    told = cli(*arguments, "--dry-run", "--json", "-q")
    assert told.stderr == ""
    assert json.loads(told.stdout)["weights"] == 14
    assert list(tmp_path.iterdir()) == []
    assert cli(*arguments, "--dry-run", "-q").stdout == ""


WATCHED = """
import json, pathlib, sys
import psutil, torch
from sparsekit.memory import peak_memory
from sparsekit.text.calibration import Calibration
from sparsekit.packing.dry_run import plan_pack
from sparsekit.packing.pack import pack
from sparsekit.quantization.dry_run import plan_quantize
from sparsekit.quantization.quantize import quantize
from sparsekit.quantization.config import QuantizeConfig

what, folder, rows, out = sys.argv[1], sys.argv[2], sys.argv[3], pathlib.Path(sys.argv[4])
if what == "pack":
    estimate = plan_pack(folder, out)
else:
    config = QuantizeConfig(method=what, grid="int4-g64", calibration=rows)
    estimate = plan_quantize(config, folder, out)
before = psutil.Process().memory_info().rss
if what == "pack":
    pack(folder, out)
else:
    quantize(config, folder, out)
print(json.dumps([peak_memory() - before, estimate["peak_memory_estimate_bytes"]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["gptq", "awq", "pack"])
def test_peak_is_not_above_what_the_plan_says(what, make_llama, row_file, tmp_path):
    """On weights that are large beside what libraries take when they are first used."""
    shape = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 1}
    make_llama(tmp_path / "dense", **shape, num_attention_heads=6)
    model = tmp_path / "dense"
    if what == "pack":
        model = prune(PruneConfig(method="magnitude"), str(model), tmp_path / "sparse").out
    command = [sys.executable, "-c", WATCHED, what, model, row_file, tmp_path / "out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    peak, estimate = json.loads(found.stdout)
    assert peak < 1.2 * estimate + 50e6, (peak, estimate)
    assert estimate < 4 * peak + 50e6, (peak, estimate)


def test_recovery_without_disk_space_names_the_memory_before_weights_are_read(
    cli, pruned, row_file, tmp_path, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(
        "sparsekit.recovery.prepare.sparse_targets", lambda *_: pytest.fail("weights were read")
    )
    words = ("--data", row_file, "--tokens", 48, "--batch", 2, "--length", 24)
    found = cli("recover", pruned, "-o", tmp_path / "out", *words, "--dry-run")
    assert found.code == 1
    assert re.search(r"\d GB free.* \d+\.\d+ GB of memory", found.stderr), found.stderr
