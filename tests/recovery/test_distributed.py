"""Two processes train what one trains."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from refusals import refused
from torch import nn

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.errors import NumericalError, UsageError
from sparsekit.recovery.config import RecoverConfig
from sparsekit.recovery.distributed import Processes
from sparsekit.recovery.log import LOG, PROGRESS
from sparsekit.recovery.methods.fixed import Held
from sparsekit.recovery.optimizer import MaskedAdam, Settings
from sparsekit.recovery.prepare import prepare_recover
from sparsekit.recovery.recover import recover
from sparsekit.recovery.saved_state import POINTER
from sparsekit.recovery.sparse_weight import SparseWeight
from sparsekit.weights.patterns import Pattern

# This starts processes as torchrun does, on CPUs too; with --cpu accelerate would want MPI.
LAUNCH = (
    *("-m", "accelerate.commands.launch", "--num_machines", "1", "--num_processes", "2"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
)
SEVERAL = str(Path(__file__).parents[1] / "several.py")
WHOLE = ("--multi_gpu",)
SHARDED = ("--use_fsdp", "--fsdp_version", "2")
# One step takes 64 tokens.
STEP = {"batch": 2, "length": 16, "accumulate": 2, "lr": 1e-3}
# AST takes 20 steps, and CAST settles in 40.
RUNS = {
    "fixed": {"method": "fixed", "tokens": 640},
    "ast": {"method": "ast", "tokens": 1280},
    "activation": {"method": "ast", "metric": "activation", "tokens": 1280},
    "bf16": {"method": "ast", "mixed_precision": "bf16", "tokens": 640},
    "slorb": {"method": "ast", "slorb": 16, "tokens": 640},
    "cast": {"method": "cast", "option": {"decay": "1e-2"}, "tokens": 2560},
}


# What the log of two processes may differ in from that of one.
LIMITS = {"loss": 1e-4, "norm": 1e-3, "flips": 0, "sparsity": 1e-5, "perplexity": 1e-3}


def launched(way, *arguments, program=("-m", "sparsekit", "recover"), stop_after=None):
    """The command in two processes; with `stop_after` killed once the log has so many steps."""
    command = [sys.executable, *LAUNCH, *way, *program, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    if stop_after is not None:
        log = Path(f"{arguments[2]}.partial") / PROGRESS
        while process.poll() is None and not (log.is_file() and lines(log) >= stop_after):
            time.sleep(0.01)
        for one in (*psutil.Process(process.pid).children(recursive=True), process):
            one.kill()
    stdout, stderr = process.communicate(timeout=180)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def lines(file):
    return file.read_bytes().count(b"\n")


def logged(folder):
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("way", [WHOLE, SHARDED], ids=["multi_gpu", "fsdp"])
def test_two_processes_have_the_loss_curve_and_the_masks_of_one(pruned, tmp_path, way):
    """Each process computes half of the batches; sums are the same, evaluations change nothing."""
    # Branches need whole weights: with shards they are refused.
    runs = {name: run for name, run in RUNS.items() if way == WHOLE or name != "slorb"}
    commands = []
    for name, run in runs.items():
        words = {**run, **STEP}
        options = words.pop("option", {})
        commands.append(
            [
                *("recover", pruned, "-o", tmp_path / "two" / name),
                *("--eval-every", 10, "--save-every", 7),
                *(word for key, value in options.items() for word in ("-O", f"{key}={value}")),
                *(w for k, value in words.items() for w in (f"--{k.replace('_', '-')}", value)),
            ]
        )
    told = json.dumps([[str(word) for word in command] for command in commands])
    done = launched(way, told, program=(SEVERAL,))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "two" / name) for name in runs]
    for name, run in runs.items():
        config = RecoverConfig(**run, **STEP, eval_every=10)
        one = recover(config, str(pruned), tmp_path / "one" / name).out
        assert_alike(one, tmp_path / "two" / name)


def assert_alike(one, two):
    """The output of one process, and that of two."""
    for mine, theirs in zip(logged(one), logged(two), strict=True):
        assert theirs.keys() == mine.keys()
        for name in LIMITS.keys() & mine.keys():
            assert theirs[name] == pytest.approx(mine[name], rel=LIMITS[name]), name
    both = [Checkpoint.open(path) for path in (one, two)]
    for name in both[0].places:
        first, second = (checkpoint.read([name])[name].float() for checkpoint in both)
        assert ((first == 0) == (second == 0)).all(), name
        assert (first - second).abs().max() < 1e-2, name
    entries = [checkpoint.provenance().history[-1] for checkpoint in both]
    assert [entry.processes for entry in entries] == [1, 2]
    moved = [entry.finished.moved or 0.0 for entry in entries]
    assert moved[1] == pytest.approx(moved[0], rel=0.01)
    flipped = [[row.flipped for row in entry.weights] for entry in entries]
    assert flipped[0] == flipped[1]
    assert not [file.name for file in two.iterdir() if file.name.startswith(".")]


@pytest.mark.slow
def test_two_processes_keep_the_rows_that_each_computes(pruned, row_file, tmp_path, monkeypatch):
    """Of five rows, for almost five epochs; which of them computed a row changes nothing."""
    steps = {"tokens": 384, "batch": 1, "length": 16, "accumulate": 2, "lr": 1e-3}
    config = RecoverConfig(data=str(row_file), teacher_top=8, **steps)
    flags = [word for key, value in steps.items() for word in (f"--{key}", value)]
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "cache-one"))
    recover(config, str(pruned), tmp_path / "one")
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "cache-two"))
    done = launched(
        *(WHOLE, pruned, "-o", tmp_path / "two", "--data", row_file, "--teacher-top", 8, *flags)
    )
    assert done.returncode == 0, done.stderr
    kept = [
        {file.name: file.read_bytes() for file in (tmp_path / name).glob("teachers/*/*")}
        for name in ("cache-one", "cache-two")
    ]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 5
    for mine, theirs in zip(logged(tmp_path / "one"), logged(tmp_path / "two"), strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-4)
        assert theirs["kept_mass"] == pytest.approx(mine["kept_mass"], rel=1e-6)


@pytest.mark.slow
def test_an_interrupted_run_of_two_goes_on_to_the_same_bytes(pruned, tmp_path):
    """R1 where each process holds, and saves, a part: all die at once in the middle."""
    arguments = ("--method", "ast", "--tokens", 6400, "--batch", 2, "--length", 16)
    arguments += ("--accumulate", 2, "--lr", 1e-3, "--save-every", 4)
    whole = launched(SHARDED, pruned, "-o", tmp_path / "whole", *arguments)
    assert whole.returncode == 0, whole.stderr
    again = (SHARDED, pruned, "-o", tmp_path / "again", *arguments)
    killed = launched(*again, stop_after=9)
    assert killed.returncode != 0
    assert not (tmp_path / "again").exists()
    state = json.loads((tmp_path / "again.partial" / POINTER).read_text())
    assert state["processes"] == 2  # what the training itself knows
    done = launched(*again)
    assert done.returncode == 0, done.stderr
    assert "going on after" in done.stderr
    both = [Checkpoint.open(tmp_path / name).fingerprint for name in ("whole", "again")]
    assert both[0] == both[1]


def test_branches_with_shards_are_refused(pruned, tmp_path):
    config = RecoverConfig(method="ast", slorb=16, tokens=640, **STEP)
    sharded = Processes(rank=0, size=2, shards=True)
    with refused("needs-whole-weights", "--slorb", kind=UsageError):
        prepare_recover(config, str(pruned), tmp_path / "out", processes=sharded)


@pytest.mark.slow
def test_shards_that_would_cut_groups_of_inputs_are_refused(family, row_file, tmp_path):
    done = launched(
        *(SHARDED, family("gpt2"), "-o", tmp_path / "out", "--tokens", 96, "--batch", 1),
        *("--length", 16, "--accumulate", 2, "--data", row_file),
    )
    assert done.returncode != 0
    assert "[needs-whole-weights]" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_batches_that_cannot_be_shared_are_refused_by_all_processes(pruned, tmp_path):
    done = launched(
        *(WHOLE, pruned, "-o", tmp_path / "out", "--tokens", 1280, "--batch", 2, "--length", 16)
    )
    assert done.returncode != 0
    assert "[accumulate-does-not-divide]" in done.stderr
    assert "--accumulate 1" in done.stderr
    assert not (tmp_path / "out").exists()


def compare_masks(rank, folder):
    """One of two processes: the same masks pass, and one of the same sums does not."""
    meet = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    values = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    weight = SparseWeight.of(nn.Parameter(values), Pattern.parse("2:4"), rule=Held())
    adam, processes = (
        MaskedAdam({"w": weight}, {}, Held(), Settings()),
        Processes(rank=rank, size=2),
    )
    processes.require_same(adam.fingerprint(), "masks")
    weight.mask = weight.mask.roll(rank, 0)
    with refused("processes-differ", "process 1", "masks", "process 0", kind=NumericalError):
        processes.require_same(adam.fingerprint(), "masks")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_whose_masks_differ_are_refused(tmp_path, monkeypatch):
    """Masks are compared, not their sums, which are equal for all masks of a pattern."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # the processes import this file
    torch.multiprocessing.spawn(compare_masks, (tmp_path,), nprocs=2)


def test_each_process_has_every_second_part():
    assert [list(Processes(rank=r, size=2).parts(4)) for r in (0, 1)] == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("name", "version", "told"), [("FSDP", "1", "FSDP 1"), ("DEEPSPEED", "2", "DEEPSPEED")]
)
def test_ways_that_would_cut_weights_and_masks_apart_are_refused(monkeypatch, name, version, told):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("FSDP_VERSION", version)
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with refused("launcher-shards", told, kind=UsageError):
        Processes.current("cpu")


def test_half_precision_of_the_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with refused("launcher-precision", "bf16", "--mixed_precision no", kind=UsageError):
        Processes.current("cpu")
