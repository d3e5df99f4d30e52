"""Two processes train what one trains."""

import json
import os
import subprocess
import sys

import pytest

from sparsekit.errors import UsageError
from sparsekit.models.checkpoint import Checkpoint
from sparsekit.stages.ranks import Ranks
from sparsekit.stages.recover import LOG, recover
from sparsekit.stages.trainconfig import RecoverConfig

# This starts processes as torchrun does, on CPUs too; with --cpu accelerate would want MPI.
LAUNCH = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes", "2"),
)


def launched(*arguments):
    command = [sys.executable, *LAUNCH, "-m", "sparsekit", "recover", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=180, env=environment
    )


def logged(folder):
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


@pytest.mark.parametrize("method", ["fixed", "ast"])
def test_two_processes_have_the_loss_curve_and_the_masks_of_one(pruned, tmp_path, method):
    """D3, and the same sums: half the batches each, a step for all."""
    config = RecoverConfig(
        method=method, tokens=1280, batch=2, length=16, accumulate=2, lr=1e-3, eval_every=10
    )
    one = recover(config, str(pruned), tmp_path / "one").out
    done = launched(
        *(pruned, "-o", tmp_path / "two", "--method", method, "--tokens", 1280, "--batch", 2),
        *("--length", 16, "--accumulate", 2, "--lr", 1e-3, "--eval-every", 10),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "two")
    for mine, theirs in zip(logged(one), logged(tmp_path / "two"), strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-5)
        assert theirs["flips"] == mine["flips"]
    both = [Checkpoint.open(path) for path in (one, tmp_path / "two")]
    for name in both[0].places:
        first, second = (checkpoint.read([name])[name].float() for checkpoint in both)
        assert ((first == 0) == (second == 0)).all(), name
        assert (first - second).abs().max() < 1e-2, name
    assert both[1].provenance()["history"][-1]["processes"] == 2


def test_batches_that_cannot_be_shared_are_refused_by_all_processes(pruned, tmp_path):
    done = launched(pruned, "-o", tmp_path / "out", "--tokens", 1280, "--batch", 2, "--length", 16)
    assert done.returncode != 0
    assert "--accumulate 1 cannot be shared by 2 processes" in done.stderr
    assert not (tmp_path / "out").exists()


def test_each_process_has_every_second_part():
    assert [list(Ranks(rank=r, size=2).parts(4)) for r in (0, 1)] == [[0, 2], [1, 3]]


def test_sharding_that_would_cut_weights_and_masks_apart_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="use FSDP: the weights and their masks"):
        Ranks.current("cpu")
