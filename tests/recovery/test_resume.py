"""Training that is interrupted: what is saved, resumed, refused and left behind."""

import dataclasses
import json
import math
import time

import pytest
from listeners import Notes, StopsAt
from refusals import refused
from safetensors.torch import save_file
from trainings import SHORT, damaged, unsettled
from verbs import replace

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.errors import (
    NumericalError,
    StorageError,
    UsageError,
)
from sparsekit.recovery import loop as training
from sparsekit.recovery import recover as stage
from sparsekit.recovery import saved_state as trainstate
from sparsekit.recovery.log import LOG
from sparsekit.recovery.optimizer import MaskedAdam
from sparsekit.recovery.recover import recover


def test_masks_are_compared_at_each_saved_state_and_before_the_output(
    pruned, tmp_path, monkeypatch
):
    """Training makes the comparison of `test_processes_whose_masks_differ_are_refused`."""
    calls, saves = [], []
    save = stage.save_state
    monkeypatch.setattr(stage, "_require_same_masks", calls.append)
    monkeypatch.setattr(stage, "save_state", lambda *a: saves.append(len(calls)) or save(*a))
    recover(replace(SHORT, save_every=4), str(pruned), tmp_path / "out")
    assert saves == [1, 2, 3]
    assert len(calls) == 4


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("method", "precision"), [("fixed", "no"), ("ast", "no"), ("ast", "bf16"), ("cast", "no")]
)
@pytest.mark.parametrize("stop", [1, 7])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    family, tmp_path, method, precision, stop, monkeypatch
):
    unsettled(monkeypatch)  # as twelve steps leave it
    config = replace(SHORT, method=method, mixed_precision=precision, save_every=3, option={})
    if method == "cast":
        config = replace(config, option={"decay": "1e-3"}, lr=0.1)
    model = str(family("llama"))
    whole = recover(config, model, tmp_path / "whole").out
    with pytest.raises(KeyboardInterrupt):
        recover(config, model, tmp_path / "again", progress=StopsAt(stop))
    notes = Notes()
    again = recover(config, model, tmp_path / "again", progress=notes).out
    assert any("going on after 6 steps" in note for note in notes.told) == (stop == 7)
    assert Checkpoint.open(whole).fingerprint == Checkpoint.open(again).fingerprint
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in (path / LOG).read_text().splitlines()
        ]
        for path in (whole, again)
    ]
    assert logs[0] == logs[1]


def test_without_a_number_a_state_is_saved_after_some_time(pruned, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "SAVE_SECONDS", 0.0)  # ten minutes have gone by
    with pytest.raises(KeyboardInterrupt):
        recover(SHORT, str(pruned), tmp_path / "out", progress=StopsAt(4))
    notes = Notes()
    recover(SHORT, str(pruned), tmp_path / "out", progress=notes)
    assert any("going on after 4 steps" in note for note in notes.told)


def dies_and_goes_on_after_4_steps(pruned, tmp_path):
    """A run whose second save is killed, and the same command again, to the whole run's bytes."""
    config, notes = replace(SHORT, save_every=4), Notes()
    with pytest.raises(KeyboardInterrupt):
        recover(config, str(pruned), tmp_path / "again")
    again = recover(config, str(pruned), tmp_path / "again", progress=notes).out
    assert any("going on after 4 steps" in note for note in notes.told)
    whole = recover(config, str(pruned), tmp_path / "whole").out
    assert Checkpoint.open(whole).fingerprint == Checkpoint.open(again).fingerprint


def test_a_kill_during_a_save_leaves_the_state_before(pruned, tmp_path, monkeypatch):
    told, calls = trainstate.write_json, []

    def second_fails(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        told(*arguments)

    monkeypatch.setattr(trainstate, "write_json", second_fails)
    dies_and_goes_on_after_4_steps(pruned, tmp_path)


def test_a_kill_while_a_state_is_written_leaves_the_one_before(pruned, tmp_path, monkeypatch):
    save, calls = trainstate.save_file, []

    def second_is_cut(tensors, file, *more):
        calls.append(file)
        if len(calls) == 2:
            file.write_bytes(b"x" * 100)
            raise KeyboardInterrupt
        save(tensors, file, *more)

    monkeypatch.setattr(trainstate, "save_file", second_is_cut)
    dies_and_goes_on_after_4_steps(pruned, tmp_path)


def test_a_kill_while_the_output_is_published_costs_no_training(pruned, tmp_path, monkeypatch):
    def killed(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage.CheckpointWriter, "_publish", killed)
        with pytest.raises(KeyboardInterrupt):
            recover(SHORT, str(pruned), tmp_path / "out")
    notes = Notes()
    out = recover(SHORT, str(pruned), tmp_path / "out", progress=notes).out
    assert any("going on after 12 steps" in note for note in notes.told)
    assert not [file.name for file in out.iterdir() if file.name.startswith(".")]


def test_a_full_disk_during_a_save_is_told_and_keeps_the_state_before(
    pruned, tmp_path, monkeypatch
):
    sync, calls = trainstate.fsync_path, []

    def full(path):
        calls.append(path)
        if len(calls) > 2:  # file and folder of the first state
            raise OSError(28, "No space left on device")
        sync(path)

    config, notes = replace(SHORT, save_every=4), Notes()
    with monkeypatch.context() as patch:
        patch.setattr(trainstate, "fsync_path", full)
        with refused("cannot-write", "No space left", kind=StorageError):
            recover(config, str(pruned), tmp_path / "out")
    began = time.perf_counter()
    entry = recover(config, str(pruned), tmp_path / "out", progress=notes).entry.to_json()
    lasted = time.perf_counter() - began
    assert any("going on after 4 steps" in note for note in notes.told)
    rows = (tmp_path / "out" / LOG).read_text().splitlines()[:4]
    earlier = sum(json.loads(row)["seconds"] for row in rows)
    assert earlier < entry["seconds"] < earlier + lasted


def test_a_full_cache_is_told_as_such_and_a_full_disk_between_saves_too(
    pruned, tmp_path, monkeypatch
):
    def full(*_):
        raise StorageError("cannot write the cache", "point SPARSEKIT_CACHE to a larger disk")

    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "step", full)
        with pytest.raises(StorageError, match="SPARSEKIT_CACHE"):
            recover(SHORT, str(pruned), tmp_path / "out")
    path = type(tmp_path)
    opened = path.open

    def open_(self, mode="r", *rest, **named):
        if mode == "ab":
            raise OSError(28, "No space left on device")
        return opened(self, mode, *rest, **named)

    monkeypatch.setattr(path, "open", open_)
    with refused("cannot-write", "sparsekit-log", "No space left", kind=StorageError):
        recover(SHORT, str(pruned), tmp_path / "out")


def test_a_run_that_goes_on_tells_how_many_steps_are_left(pruned, tmp_path):
    class Begins(Notes):
        begun: tuple[int, int] | None = None

        def begin(self, title, total, done=0):
            if title.startswith("recover"):
                self.begun = total, done

    config = replace(SHORT, save_every=4)
    with pytest.raises(KeyboardInterrupt):
        recover(config, str(pruned), tmp_path / "out", progress=StopsAt(6))
    heard = Begins()
    recover(config, str(pruned), tmp_path / "out", progress=heard)
    assert heard.begun == (12, 4)
    assert sum("tokens/s" in label for label in heard.labels) == 8


def test_a_full_disk_at_the_first_save_leaves_nothing(pruned, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainstate, "fsync_path", full)
    with refused("cannot-write", "No space left", kind=StorageError):
        recover(replace(SHORT, save_every=4), str(pruned), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 800},
        {"lr": 2e-3},
        {"schedule": "constant"},
        {"seed": 1},
        {"batch": 4},
        {"length": 8},
        {"method": "fixed"},
        {"option": {"decay": "1e-3"}},
        {"temperature": 2.0},
        {"kl_weight": 0.1},
        {"accumulate": 2, "batch": 1},
        {"pattern": "1:4"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_interrupted_run_with_other_settings_is_refused(pruned, tmp_path, change):
    with pytest.raises(KeyboardInterrupt):
        recover(SHORT, str(pruned), tmp_path / "out", progress=StopsAt(3))
    with refused("other-recipe", next(iter(change)), kind=UsageError):
        recover(replace(SHORT, **change), str(pruned), tmp_path / "out")


def test_an_interrupted_run_with_other_text_in_the_same_file_is_refused(pruned, rows, tmp_path):
    file = tmp_path / "rows.safetensors"
    save_file({"tokens": rows}, file)
    config = replace(SHORT, data=str(file))
    with pytest.raises(KeyboardInterrupt):
        recover(config, str(pruned), tmp_path / "out", progress=StopsAt(3))
    save_file({"tokens": rows.flip(1)}, file)
    with refused("other-recipe", "data", kind=UsageError):
        recover(config, str(pruned), tmp_path / "out")


def test_an_interrupted_run_with_another_teacher_is_refused(pruned, copy_of, tmp_path):
    """Even if the teacher has the same folder."""
    teacher = copy_of("llama")
    config = replace(SHORT, teacher=str(teacher))
    with pytest.raises(KeyboardInterrupt):
        recover(config, str(pruned), tmp_path / "out", progress=StopsAt(3))

    def change(tensors):
        tensors["model.norm.weight"] += 1

    damaged(teacher, change)
    with refused("other-recipe", "teacher", kind=UsageError):
        recover(config, str(pruned), tmp_path / "out")


def test_a_failure_after_the_last_step_says_where_the_state_is(pruned, tmp_path, monkeypatch):
    def fails(*_):
        raise NumericalError("a weight does not fit into float16")

    monkeypatch.setattr(stage, "write_tensors", fails)
    with pytest.raises(NumericalError, match=r"the last saved state is in .*out\.partial"):
        recover(SHORT, str(pruned), tmp_path / "out")
    monkeypatch.undo()
    notes = Notes()
    recover(SHORT, str(pruned), tmp_path / "out", progress=notes)
    assert any("going on after 12 steps" in note for note in notes.told)


def test_a_failed_run_leaves_nothing_that_would_refuse_another_try(pruned, tmp_path, monkeypatch):
    losses = training.model_losses

    def broken(*args, **options):
        found = losses(*args, **options)
        return dataclasses.replace(found, total=found.total * math.nan)

    config = replace(SHORT, method="fixed")
    with monkeypatch.context() as patch:
        patch.setattr(training, "model_losses", broken)
        with refused("not-finite", "step 1: ", "nan", "--lr", kind=NumericalError):
            recover(config, str(pruned), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    recover(replace(config, lr=1e-4), str(pruned), tmp_path / "out")


def test_a_gradient_that_is_not_finite_is_named_by_its_step(pruned, tmp_path, monkeypatch):
    norm, calls = MaskedAdam._norm, []

    def broken(self, gradients):
        calls.append(1)
        return math.nan if len(calls) == 6 else norm(self, gradients)

    monkeypatch.setattr(MaskedAdam, "_norm", broken)
    with refused("not-finite", "step 6", "nan", kind=NumericalError):
        recover(replace(SHORT, method="fixed"), str(pruned), tmp_path / "out")
    notes = Notes()
    recover(replace(SHORT, method="fixed"), str(pruned), tmp_path / "out", progress=notes)
    assert any("going on after 5 steps" in note for note in notes.told)


def test_a_loss_that_is_not_finite_before_training_is_not_put_down_to_the_rate(
    pruned, tmp_path, monkeypatch
):
    losses = training.model_losses

    def broken(*args, **options):
        found = losses(*args, **options)
        return dataclasses.replace(found, total=found.total * math.nan)

    monkeypatch.setattr(training, "model_losses", broken)
    with refused("not-finite", "before training", "nan", "MODEL", kind=NumericalError):
        recover(SHORT, str(pruned), tmp_path / "out")


@pytest.mark.slow
def test_max_time_plans_the_steps_from_the_measured_speed(pruned, tmp_path):
    config = replace(SHORT, tokens=None, max_time="20s")
    found = recover(config, str(pruned), tmp_path / "out")
    assert found.entry.plan.steps > 50
    assert found.entry.seconds < 20


def test_a_time_that_is_too_short_for_a_step_is_refused(pruned, tmp_path, monkeypatch):
    steps, step = [], training.Training.step

    def slow(self):
        steps.append(1)
        time.sleep(0.6)
        return step(self)

    monkeypatch.setattr(training.Training, "step", slow)
    with refused("no-time", "--max-time", kind=UsageError):
        recover(replace(SHORT, tokens=None, max_time="0.5s"), str(pruned), tmp_path / "out")
    assert steps == [1]  # it is known after the first


@pytest.mark.parametrize("save_every", [2, None])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(
    pruned, tmp_path, monkeypatch, save_every
):
    """No weight was changed by the step: what the five before it made is kept."""
    losses, calls = training.model_losses, []

    def broken(*args, **options):
        calls.append(1)
        found = losses(*args, **options)
        return (
            dataclasses.replace(found, total=found.total * math.nan) if len(calls) == 6 else found
        )

    monkeypatch.setattr(training, "model_losses", broken)
    config = replace(SHORT, method="fixed", save_every=save_every)
    with refused("not-finite", "step 6", "nan", "-o", kind=NumericalError):
        recover(config, str(pruned), tmp_path / "out")
    monkeypatch.setattr(training, "model_losses", losses)
    notes = Notes()
    found = recover(config, str(pruned), tmp_path / "out", progress=notes)
    assert any("going on after 5 steps" in note for note in notes.told)
    whole = recover(config, str(pruned), tmp_path / "whole")
    files = [(one.out / "model.safetensors").read_bytes() for one in (found, whole)]
    assert files[0] == files[1]
