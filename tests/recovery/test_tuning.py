"""What is chosen and refused before the first step of training."""

import json
import math
import re
import shutil
import time

import pytest
import torch
from listeners import Notes
from refusals import refused
from verbs import replace

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.errors import CheckFailedError, StorageError, UsageError
from sparsekit.inspection.verify import verify
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.prune import prune
from sparsekit.recovery import deadline
from sparsekit.recovery import export as trainwrite
from sparsekit.recovery import inputs as automethod
from sparsekit.recovery import tuning as trainplan
from sparsekit.recovery.config import RecoverConfig
from sparsekit.recovery.deadline import CLOSING, PLANNED, steps_within
from sparsekit.recovery.distributed import Processes
from sparsekit.recovery.log import LOG
from sparsekit.recovery.loop import Training, TrainingPlan
from sparsekit.recovery.methods.cast import Continuous
from sparsekit.recovery.recover import recover
from sparsekit.recovery.speed import bench_recover
from sparsekit.recovery.tuning import decay_budget

SHORT = RecoverConfig(method="fixed", tokens=384, batch=2, length=16, lr=1e-3)


def test_time_is_kept_for_evaluations_saved_states_and_writing():
    """By counting: of 1000 s that are planned, after what the end takes."""
    whole = CLOSING + 1000 / PLANNED
    assert steps_within(SHORT, whole, 2.0, 0.0, 0.0) == 500
    evaluated = replace(SHORT, eval_every=10)  # ten steps and one evaluation take 50 s
    assert steps_within(evaluated, whole + 30, 2.0, 30.0, 0.0) == 200
    rarely = replace(SHORT, eval_every=10**9)  # but there is one at the end
    assert steps_within(rarely, whole + 30, 2.0, 30.0, 0.0) == 499
    saved = replace(SHORT, save_every=4)  # four steps and a state take 16 s
    assert steps_within(saved, whole + 2 * 8, 2.0, 0.0, 8.0) == 250
    # Without a number a state of 200 s follows each 600 s.
    assert steps_within(SHORT, whole + 400, 2.0, 0.0, 200.0) == 375
    assert steps_within(SHORT, 1.0, 2.0, 0.0, 0.0) < 1


def test_perplexity_before_training_begins_the_log(pruned, tmp_path):
    notes = Notes()
    config = replace(SHORT, eval_every=6)
    found = recover(config, str(pruned), tmp_path / "out", progress=notes)
    log = [json.loads(line) for line in (found.out / LOG).read_text().splitlines()]
    assert log[0]["step"] == 0
    assert log[0]["perplexity"] == found.entry.plan.perplexity
    assert any(f"{log[0]['perplexity']:.2f}" in note for note in notes.told)
    measured = [row["evaluated_on"] for row in log if "perplexity" in row]
    assert measured == ["8 x 16 tokens of builtin"] * 3
    assert [row["step"] for row in log if "perplexity" in row] == [0, 6, 12]


def test_the_bar_tells_loss_parts_flips_and_sparsity(pruned, tmp_path):
    notes = Notes()
    recover(replace(SHORT, method="ast"), str(pruned), tmp_path / "out", progress=notes)
    label = notes.labels[-1]
    assert all(word in label for word in ("loss", "KL", "CE", "flips", "% of |W| kept", "tokens/s"))


def test_room_for_saved_states_is_looked_at_first(pruned, tmp_path, monkeypatch):
    size = sum(file.stat().st_size for file in pruned.glob("*.safetensors"))
    usage = shutil.disk_usage(tmp_path)._replace(free=(64 << 20) + 3 * size)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with refused("not-enough-disk", kind=StorageError):
        recover(SHORT, str(pruned), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_sizes_off_the_mask_are_those_of_all_weights(family, tmp_path, monkeypatch):
    seen, real = [], trainplan.Student.off_mask

    def spy(student):
        every = torch.cat([w.weight[~w.mask].abs() for w in student.sparse.values()]).double()
        seen.append((real(student), every))
        return seen[-1][0]

    monkeypatch.setattr(trainplan.Student, "off_mask", spy)
    options = {"method": "cast", "option": {"decay": "1e-2"}, "tokens": 9600, "lr": 4e-3}
    recover(replace(SHORT, **options), str(family("llama")), tmp_path / "out")
    (((mean, high), every),) = seen
    assert mean == pytest.approx(every.mean().item(), rel=1e-6)
    assert every.quantile(0.9) < high < every.max()


def test_auto_is_told_and_recorded_as_the_method_that_ran(pruned, tmp_path):
    notes = Notes()
    found = recover(replace(SHORT, method="auto"), str(pruned), tmp_path / "a", progress=notes)
    assert any("--method auto is ast" in note for note in notes.told)
    assert found.entry.settings.method == "ast"
    named = recover(replace(SHORT, method="ast"), str(pruned), tmp_path / "b")
    tensors = [Checkpoint.open(o.out).read(Checkpoint.open(o.out).places) for o in (found, named)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


@pytest.mark.parametrize(("tokens", "steps"), [(128, 4), (160, 5), (192, 8), (384, 8)])
def test_a_short_run_takes_fewer_measuring_steps_and_says_why(pruned, tmp_path, tokens, steps):
    """Runs of fewer than six steps measure no more steps than they train."""
    notes = Notes()
    recover(
        replace(SHORT, method="ast", tokens=tokens), str(pruned), tmp_path / "out", progress=notes
    )
    (note,) = (note for note in notes.told if "change nothing" in note)
    assert f"{steps} steps" in note
    assert "decay" in note
    assert sum("s a step" in label for label in notes.labels) == steps


def test_a_method_without_a_decay_takes_no_measuring_steps(pruned, tmp_path):
    notes = Notes()
    recover(SHORT, str(pruned), tmp_path / "out", progress=notes)
    assert not any("change nothing" in note for note in notes.told)


def test_option_of_a_method_that_auto_may_not_take_is_refused():
    with refused("conflicting-options", "'decay'", "--method auto", kind=UsageError):
        replace(SHORT, method="auto", option={"decay": "1"})


@pytest.mark.slow
def test_auto_with_a_time_goes_on_where_it_was_interrupted(pruned, tmp_path):
    class Stops(Notes):
        def step(self, label):
            super().step(label)
            if sum("tokens/s" in one for one in self.labels) == 4:
                raise KeyboardInterrupt

    config = replace(SHORT, method="auto", tokens=None, max_time="9s", save_every=2, eval_every=3)
    with pytest.raises(KeyboardInterrupt):
        recover(config, str(pruned), tmp_path / "out", progress=Stops())
    notes = Notes()
    found = recover(config, str(pruned), tmp_path / "out", progress=notes)
    assert any("going on after" in note for note in notes.told)
    log = [json.loads(line) for line in (found.out / LOG).read_text().splitlines()]
    assert [row["step"] for row in log] == list(range(found.entry.plan.steps + 1))


def test_bench_needs_no_room_for_states(pruned, tmp_path, monkeypatch):
    size = sum(file.stat().st_size for file in pruned.glob("*.safetensors"))
    usage = shutil.disk_usage(tmp_path)._replace(free=(64 << 20) + 3 * size)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert bench_recover(SHORT, str(pruned), steps=1)["method"] == "fixed"


def test_bench_counts_the_tokens_that_were_computed_and_tells_what_memory_holds(pruned):
    config = replace(SHORT, tokens=1024, batch=1, length=512)  # the maximum is 256
    found = bench_recover(config, str(pruned), steps=1)
    assert found["batch"] == [1, 256]
    work = found["tokens_per_second"] * found["flop_per_token"] / 1e9
    assert found["share_of_the_possible"] == pytest.approx(work / found["matrix_gflops"])
    held, at_rest = found["bytes"], found["bytes"].pop("masks at rest")
    assert sum(held.values()) == found["peak_bytes"]
    assert held["gradients"] == held["weights"] == held["teacher"]
    assert held["moments"] == 2 * held["weights"]
    assert held["masks"] == 18432 == 8 * at_rest  # entries of the sparse weights


def test_bench_counts_linear_layers_that_stay_dense_too(pruned, family, tmp_path):
    config = PruneConfig(method="magnitude", skip=("down_proj",))
    partly = prune(config, str(family("llama")), tmp_path / "partly").out
    found = [bench_recover(SHORT, str(path), steps=1) for path in (pruned, partly)]
    assert found[0]["active_parameters"] == found[1]["active_parameters"]


@pytest.mark.parametrize("tokens", [33, 64])
def test_no_row_comes_twice_where_the_text_has_more(pruned, tmp_path, tokens):
    """A last step that the tokens fill in part takes the rows that follow."""
    (tmp_path / "text.txt").write_text("abcdefgh " * 40)
    config = replace(SHORT, data=str(tmp_path / "text.txt"), tokens=tokens)
    source = Checkpoint.open(pruned)
    processes, device = Processes(), torch.device("cpu")
    assert config.steps() == 2
    read = automethod.tokens_to_read(config, source, device, processes)
    assert len(config.corpus(read).rows(source, None)) == 4


def test_with_a_time_whole_steps_of_text_are_read_and_more_for_more_time(pruned):
    source, processes = Checkpoint.open(pruned), Processes()
    config = replace(SHORT, tokens=None, max_time="0.000001s")
    reads = [
        automethod.tokens_to_read(
            replace(config, max_time=f"{t:.9f}s"), source, torch.device("cpu"), processes
        )
        for t in (1e-9, 60.0, 120.0)
    ]
    assert reads[0] == 32  # one step, so that the time is named, not the text
    assert reads[2] == pytest.approx(2 * reads[1], abs=32)
    config = replace(config, max_time="60s", mixed_precision="bf16")
    more = automethod.tokens_to_read(config, source, torch.device("cpu"), processes)
    assert more == pytest.approx(2 * reads[1], abs=32)


def test_a_model_that_is_its_own_teacher_tells_no_size_of_gradients(family, tmp_path):
    """CAST computes with all entries, so that a dense model gives the teacher's own logits."""
    config = replace(SHORT, method="cast", pattern="2:4", kl_weight=1.0)
    with refused("no-gradient", "--kl-weight 1", "-O decay", kind=UsageError):
        recover(config, str(family("llama")), tmp_path / "out")
    with refused("decay-too-weak", kind=UsageError):  # the next check
        recover(replace(config, option={"decay": "1e-9"}), str(family("llama")), tmp_path / "out")


@pytest.mark.parametrize(
    ("schedule", "strengths"),
    [
        ("constant", (0.094, 0.032, 0.138)),
        ("cosine", (0.038, 0.008, 0.074)),
        ("linear", (0.034, 0.007, 0.067)),
    ],
)
def test_the_decay_budget_matches_known_values(schedule, strengths):
    """7,500 steps at 2e-5, with decays of 1, 0.1 and 10 times the gradients.

    The known values are for cosine and linear rates that fall from the end of the warm-up on; ours
    fall from the first step.
    """
    near = 0.01 if schedule == "constant" else 0.07
    for times, wanted in zip((1, 0.1, 10), strengths, strict=True):
        plan = TrainingPlan(
            steps=7500, rate=2e-5, share=1.0, decay=times * 4e-7, masked_gradient=4e-7
        )
        assert decay_budget(schedule, plan) == pytest.approx(wanted, rel=near, abs=7e-4)


def test_a_decay_that_lets_a_sparse_model_fill_up_is_refused_before_a_step(pruned, tmp_path):
    """What is off its mask begins at zero, and is moved by gradients until the pull is stronger."""
    config, notes = replace(SHORT, method="cast", option={"decay": "1e-9"}), Notes()
    with refused("decay-too-weak", "back by", "-O decay", kind=UsageError):
        recover(config, str(pruned), tmp_path / "out", progress=notes)
    assert any(note.startswith("decay budget: ") for note in notes.told)
    assert not list(tmp_path.iterdir())


class Slows(Notes):
    """Takes its time for each step that is told, once the plan stands."""

    def step(self, label):
        super().step(label)
        if "tokens/s" in label:
            time.sleep(0.25)


@pytest.mark.slow
def test_a_run_that_becomes_slower_ends_in_time_with_fewer_steps(pruned, tmp_path):
    config = replace(SHORT, tokens=None, max_time="20s")
    notes, begun = Slows(), time.perf_counter()
    found = recover(config, str(pruned), tmp_path / "out", progress=notes)
    assert time.perf_counter() - begun < 20
    (planned,) = (note for note in notes.told if "fit into the remaining time" in note)
    first = int(planned.split()[0])
    steps = found.entry.plan.steps
    assert 11 < steps < first
    assert any(f": {steps} instead of" in note for note in notes.told)
    assert found.entry.tokens == 32 * steps
    log = [json.loads(line) for line in (found.out / LOG).read_text().splitlines()]
    assert len(log) == steps
    assert log[-1]["rate"] < 0.1 * SHORT.lr  # the schedule ran to its end


@pytest.mark.slow
def test_the_ramp_of_cast_ends_with_the_steps_that_there_is_time_for(pruned, tmp_path, monkeypatch):
    """The last step's share of the pull is (n - 1) / n of the steps that were taken."""
    config = replace(SHORT, method="cast", option={"decay": "1e-2"}, tokens=None, max_time="20s")
    monkeypatch.setattr(trainwrite, "MOST_MOVED", -1.0)  # however little that is
    with refused("decay-unfinished", "--max-time", kind=CheckFailedError):
        recover(config, str(pruned), tmp_path / "moved", progress=Slows())
    monkeypatch.setattr(trainwrite, "MOST_MOVED", math.inf)
    shares, mix = [], Continuous.mix

    def mixed(self, mean, weight, mask, done):
        shares.append(done)
        return mix(self, mean, weight, mask, done)

    monkeypatch.setattr(Continuous, "mix", mixed)
    notes = Slows()
    found = recover(config, str(pruned), tmp_path / "out", progress=notes)
    assert verify(str(found.out))["pattern"] == ["2:4"]
    steps = found.entry.plan.steps
    assert any(f": {steps} instead of" in note for note in notes.told)
    assert any(re.match(r"decay budget: \S+ instead of", note) for note in notes.told)
    assert shares[-1] == (steps - 1) / steps


@pytest.mark.slow
def test_measuring_leaves_time_for_steps(pruned, tmp_path, monkeypatch):
    """Steps take 2 s here: eight of them that only measure would leave none of 20 s."""
    real = Training.gradients

    def slow(self, step):
        time.sleep(2.0)
        return real(self, step)

    monkeypatch.setattr(Training, "gradients", slow)
    monkeypatch.setattr(trainplan, "saving_seconds", lambda _: 0.0)
    config = replace(SHORT, method="ast", tokens=None, max_time="20s")
    begun = time.perf_counter()
    found = recover(config, str(pruned), tmp_path / "out")
    assert time.perf_counter() - begun < 20
    assert found.entry.plan.steps >= 3


@pytest.mark.slow
def test_fewer_steps_survive_an_interruption(pruned, tmp_path):
    class Stops(Slows):
        def note(self, text):
            super().note(text)
            if "instead of" in text:
                raise KeyboardInterrupt

    config = replace(SHORT, tokens=None, max_time="20s")
    notes = Stops()
    with pytest.raises(KeyboardInterrupt):
        recover(config, str(pruned), tmp_path / "out", progress=notes)
    steps = int(re.search(r": (\d+) instead of", notes.told[-1])[1])
    again = Notes()
    found = recover(config, str(pruned), tmp_path / "out", progress=again)
    assert found.entry.plan.steps == steps
    assert any("going on after 10 steps" in note for note in again.told)


class Ticks:
    """A clock that moves when it is told to."""

    now = 0.0

    def perf_counter(self):
        return self.now


def watched(monkeypatch, limit, *, saving=0.0, config=SHORT):
    clock = Ticks()
    monkeypatch.setattr(deadline, "time", clock)
    return deadline.Deadline(config, limit, saving), clock


def walk(watch, clock, steps, planned, seconds):
    """Takes steps of so many seconds; what the deadline says after each."""
    found = []
    for done in steps:
        clock.now += seconds
        found.append(watch.steps(done, planned))
    return found


def test_a_deadline_asks_for_one_more_step_at_least(monkeypatch):
    """Steps of two seconds, watched for ten of them; the end takes 5 seconds."""
    watch, clock = watched(monkeypatch, 40.0)
    assert walk(watch, clock, range(1, 10), 100, 2.0) == [100] * 9
    assert walk(watch, clock, [10], 100, 2.0) == [10 + 7]  # at 20 seconds, of 35
    assert walk(watch, clock, range(11, 17), 17, 2.0) == [17] * 6
    watch, clock = watched(monkeypatch, 20.0)
    assert walk(watch, clock, range(1, 11), 100, 2.0) == [100] * 9 + [11]
    watch, clock = watched(monkeypatch, None)
    assert set(walk(watch, clock, range(1, 99), 100, 2.0)) == {100}


@pytest.mark.parametrize(
    ("step", "saving", "evaluation", "every"),
    [(1, 8, 0, None), (1, 8, 10, 100), (4, 8, 10, 50), (12, 8, 60, 50), (4, 8, 2, 1)],
)
def test_what_comes_between_the_steps_takes_none_of_those_that_were_planned(
    monkeypatch, step, saving, evaluation, every
):
    """A run of half an hour that keeps its pace, with states every ten minutes."""
    config = replace(SHORT, tokens=None, max_time="1800s", eval_every=every)
    planned = trainplan.steps_within(config, 1800.0, step, evaluation, saving)
    watch, clock = watched(monkeypatch, 1800.0, saving=saving, config=config)
    saved, done = 0.0, 0
    while done < planned:
        clock.now, done = clock.now + step, done + 1
        if every and done % every == 0:
            clock.now += evaluation
            watch.evaluated(evaluation)
        if clock.now - saved > 600:
            clock.now += saving
            watch.saved(saving)
            saved = clock.now
        assert watch.steps(done, planned) == planned
    assert clock.now + evaluation + 2 * saving + 5 < 1800


def test_a_slower_run_leaves_time_for_its_last_evaluation(monkeypatch):
    """Steps become twice as slow half-way."""
    config = replace(SHORT, tokens=None, max_time="600s", eval_every=50)
    planned = trainplan.steps_within(config, 600.0, 1.0, 30.0, 2.0)
    watch, clock = watched(monkeypatch, 600.0, saving=2.0, config=config)
    done, steps = 0, planned
    while done < steps:
        clock.now, done = clock.now + (1.0 if done < planned // 2 else 2.0), done + 1
        if done % 50 == 0 or done == steps:
            clock.now += 30.0
            watch.evaluated(30.0)
        steps = watch.steps(done, steps)
    assert planned // 2 < done < planned
    assert 570 < clock.now + 2 * 2.0 + 5.0 <= 602
