"""Memory of training: what does not fit is refused first, or explained."""

import math

import pytest
import torch
from refusals import refused
from trainings import SHORT, linear
from verbs import replace

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.errors import (
    DataError,
    MemoryShortError,
)
from sparsekit.recovery import loss as trainloss
from sparsekit.recovery import memory_needs
from sparsekit.recovery import prepare as recovery
from sparsekit.recovery import recover as stage
from sparsekit.recovery.methods.ast import Ast
from sparsekit.recovery.methods.fixed import Fixed
from sparsekit.recovery.optimizer import MaskedAdam
from sparsekit.recovery.prepare import prepare_recover
from sparsekit.recovery.recover import recover


@pytest.mark.parametrize(
    ("batch", "length", "hint"),
    [
        (2, 16, "--batch 1 --accumulate 2 takes half of it for the same steps"),
        (3, 16, "--batch 1 --accumulate 2 takes 1/3 of it"),
        (1, 32, "--length 16 --accumulate 2 takes half of it"),
        (1, 3, "where there is more memory: no pass is smaller"),
    ],
)
def test_a_pass_that_does_not_fit_says_what_to_halve(
    pruned, tmp_path, monkeypatch, batch, length, hint
):
    def full(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] can't allocate memory")

    monkeypatch.setattr(trainloss, "distil", full)
    config = replace(SHORT, batch=batch, length=length)
    with refused("out-of-memory", f"{batch} rows", length, hint, kind=MemoryShortError):
        recover(config, str(pruned), tmp_path / "out")


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (MaskedAdam, "step"),
        (MaskedAdam, "refresh"),
        (stage, "measure"),
        (stage, "finish"),
        (stage.Student, "optimizer"),
    ],
)
def test_too_little_memory_elsewhere_is_told_too(pruned, tmp_path, monkeypatch, where, name):
    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(where, name, full)
    config = replace(SHORT, eval_every=4)
    with refused("out-of-memory", "outside the training passes", kind=MemoryShortError):
        recover(config, str(pruned), tmp_path / "out")


def test_processes_of_one_machine_share_its_memory(pruned, monkeypatch):
    source = Checkpoint.open(pruned)
    needed = 4 * 4 * sum(math.prod(place.shape) for place in source.places.values())
    monkeypatch.setattr(memory_needs, "available_memory", lambda: 2 * needed)
    job = SHORT, source, None, Fixed(), torch.device("cpu")
    memory_needs.require_memory(*job)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with refused("not-enough-memory", "weights, gradients and two moments", kind=DataError):
        memory_needs.require_memory(*job)
    memory_needs.require_memory(*job, shards=True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "9")
    with refused("not-enough-memory", "for weights in float32", kind=DataError):
        memory_needs.require_memory(*job, shards=True)


def test_a_model_that_cannot_be_trained_in_memory_is_refused_first(pruned, tmp_path, monkeypatch):
    monkeypatch.setattr(memory_needs, "available_memory", lambda: 100_000)
    with refused("not-enough-memory", "0.0 GB", "teacher", "--kl-weight 0", kind=DataError):
        recover(SHORT, str(pruned), tmp_path / "out")


def test_what_is_held_in_16_bits_is_counted(pruned, tmp_path, monkeypatch):
    """Half a teacher, but not one whose probabilities are kept for other runs too; and copies."""
    half = replace(SHORT, mixed_precision="bf16")
    source = Checkpoint.open(pruned)
    size = sum(math.prod(place.shape) for place in source.places.values())
    for config, alone, taught in (
        (SHORT, 20, 24),
        (half, 22, 24),
        (replace(half, teacher_top=8), 22, 26),
    ):
        assert memory_needs.training_bytes(config, source, None, Ast()) == alone * size
        assert memory_needs.training_bytes(config, source, source, Ast()) == taught * size
    monkeypatch.setattr(memory_needs, "available_memory", lambda: 100_000)
    with refused("not-enough-memory", "float32, and the teacher in bfloat16", kind=DataError):
        recover(half, str(pruned), tmp_path / "out")


@pytest.mark.parametrize(("ratio", "told"), [(0.2, False), (8.0, True)])
def test_a_machine_without_16_bit_units_is_told(pruned, tmp_path, monkeypatch, ratio, told):
    seconds = {torch.float32: 1.0, torch.bfloat16: ratio}
    monkeypatch.setattr(recovery, "product_seconds", seconds.__getitem__)
    config = replace(SHORT, mixed_precision="bf16")
    notes = prepare_recover(config, str(pruned), tmp_path / "out").notes
    assert any("take 8.0 times as long as in float32" in note for note in notes) == told


@pytest.mark.parametrize(
    ("left", "hint"),
    [
        (1.5, "--batch 1 --accumulate 6 at most"),
        (0.5, "--batch 1 --length 8 --accumulate 12 at most"),
    ],
)
def test_a_batch_that_cannot_fit_is_refused_first_with_one_that_may(
    pruned, tmp_path, monkeypatch, left, hint
):
    """What is left beside the weights is told in rows; two thirds of what is expected are sure."""
    source, dense = Checkpoint.open(pruned), Checkpoint.open(pruned)
    held = memory_needs.training_bytes(SHORT, source, dense, Ast())
    row = 4 * 16 * sum(sum(place.shape) for place in linear(source).values())
    monkeypatch.setattr(memory_needs, "available_memory", lambda: int(held + left * row))
    config = replace(SHORT, batch=3, accumulate=2)
    with refused("not-enough-memory", "3 rows of 16 tokens", hint, kind=DataError):
        recover(config, str(pruned), tmp_path / "out")
    monkeypatch.setattr(memory_needs, "available_memory", lambda: int(held + 2.1 * row))
    prepare_recover(config, str(pruned), tmp_path / "out")
