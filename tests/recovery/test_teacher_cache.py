"""The teacher's largest probabilities on disk: each row once, and never another bit of training."""

import hashlib
import json
import math
from statistics import fmean

import pytest
import torch
from listeners import Notes, StopsAt
from refusals import refused
from safetensors.torch import load_file
from verbs import replace

import sparsekit
from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.errors import DataError, NumericalError, StorageError, UsageError
from sparsekit.progress import SILENT
from sparsekit.recovery import memory_needs, student
from sparsekit.recovery import teacher_cache as teacher
from sparsekit.recovery.config import RecoverConfig
from sparsekit.recovery.distributed import Processes
from sparsekit.recovery.log import LOG
from sparsekit.recovery.prepare import prepare_recover
from sparsekit.recovery.recover import recover
from sparsekit.recovery.student import top_teacher

TOP = 8


@pytest.fixture
def config(row_file):
    """Twelve steps of two of the five rows of 16 tokens: almost five epochs."""
    return RecoverConfig(
        method="fixed",
        data=str(row_file),
        tokens=384,
        batch=2,
        length=16,
        lr=1e-3,
        teacher_top=TOP,
    )


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Gives a fresh cache of the given name, used from then on."""

    def fresh(name):
        monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / name))
        return tmp_path / name

    fresh("cache")
    return fresh


@pytest.fixture
def passes(monkeypatch):
    """Grows by the shape of the tokens of each pass through the teacher."""
    seen, plain = [], teacher.hidden_states

    def spy(model, tokens):
        seen.append(tuple(tokens.shape))
        return plain(model, tokens)

    monkeypatch.setattr(teacher, "hidden_states", spy)
    return seen


@pytest.fixture
def no_model(monkeypatch):
    """From its call on no whole model can be loaded."""

    def forbid():
        def loaded(*_, **__):
            raise AssertionError("the teacher was loaded")

        monkeypatch.setattr(student, "load_whole", loaded)

    return forbid


def name_of(row):
    """Of the file of a row, by its first 16 tokens."""
    return hashlib.sha256(row[:16].to(torch.int64).numpy().tobytes()).hexdigest() + ".safetensors"


def files(root):
    return {file.name: file for file in root.glob("teachers/*/*")}


def logged(folder):
    rows = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_each_row_passes_through_the_teacher_once_and_alone(config, pruned, rows, tmp_path, passes):
    recover(config, str(pruned), tmp_path / "out")
    assert passes == [(1, 16)] * 5
    assert files(tmp_path / "cache").keys() == {name_of(row) for row in rows[:5]}


def test_numbers_on_disk_are_those_of_the_teacher(config, pruned, family, rows, tmp_path):
    recover(config, str(pruned), tmp_path / "out")
    model = sparsekit.load(family("llama"), "float32")
    for row in rows[:5]:
        file = files(tmp_path / "cache")[name_of(row)]
        with torch.no_grad():
            logits = model(input_ids=row[None, :16]).logits[0]
        values, ids = torch.log_softmax(logits, -1).topk(TOP)
        found = load_file(file)
        torch.testing.assert_close(found["log_probabilities"], values, rtol=1e-5, atol=1e-5)
        assert torch.equal(found["ids"].long(), ids)
        assert found["ids"].dtype == torch.int32


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"method": "ast"},
        {"lr": 2e-3, "kl_weight": 0.5},
        {"batch": 1, "accumulate": 2},
        {"slorb": 16},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_run_on_the_same_rows_needs_no_teacher(
    config, pruned, tmp_path, passes, no_model, change
):
    recover(config, str(pruned), tmp_path / "first")
    passes.clear()
    no_model()
    notes = Notes()
    recover(replace(config, **change), str(pruned), tmp_path / "second", progress=notes)
    assert passes == []
    assert any("all 5 rows are in" in n and "is not needed" in n for n in notes.told)


@pytest.mark.parametrize("change", [{"teacher_top": 4}, {"temperature": 2.0}, {"length": 8}])
def test_what_changes_the_numbers_has_files_of_its_own(config, pruned, tmp_path, passes, change):
    recover(config, str(pruned), tmp_path / "first")
    recover(replace(config, **change), str(pruned), tmp_path / "second")
    # Rows of 24 tokens make one piece of 16, or three of 8.
    assert len(passes) == 5 + (15 if "length" in change else 5)


@pytest.mark.parametrize("there", [0, 2, 5])
def test_rows_from_disk_and_rows_just_computed_train_the_same(
    config, pruned, tmp_path, cache, there
):
    cold = recover(config, str(pruned), tmp_path / "cold").out
    for file in sorted(files(tmp_path / "cache").values())[there:]:
        file.unlink()
    warm = recover(config, str(pruned), tmp_path / "warm").out
    assert Checkpoint.open(cold).fingerprint == Checkpoint.open(warm).fingerprint
    assert logged(cold) == logged(warm)


def test_a_file_does_not_depend_on_the_batch_that_its_row_was_first_in(
    config, pruned, tmp_path, cache
):
    data = []
    for batch in (1, 4):
        root = cache(f"cache-{batch}")
        recover(replace(config, batch=batch), str(pruned), tmp_path / str(batch))
        data.append({name: file.read_bytes() for name, file in files(root).items()})
    assert len(data[0]) == 5
    assert data[0] == data[1]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("stop", [1, 7])
@pytest.mark.parametrize("method", ["fixed", "ast"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    config, pruned, tmp_path, cache, method, stop
):
    config = replace(config, method=method, save_every=3)
    whole = recover(config, str(pruned), tmp_path / "whole").out
    cache("another")
    with pytest.raises(KeyboardInterrupt):
        recover(config, str(pruned), tmp_path / "again", progress=StopsAt(stop))
    again = recover(config, str(pruned), tmp_path / "again").out
    assert Checkpoint.open(whole).fingerprint == Checkpoint.open(again).fingerprint
    assert logged(whole) == logged(again)


def test_all_of_the_vocabulary_is_the_loss_without_the_option(config, pruned, tmp_path):
    logs = [
        logged(recover(replace(config, teacher_top=top), str(pruned), tmp_path / str(top)).out)
        for top in (None, 260)
    ]
    for whole, mine in zip(*logs, strict=True):
        assert mine["divergence"] == pytest.approx(whole["divergence"], rel=1e-4)
        assert mine["norm"] == pytest.approx(whole["norm"], rel=1e-3)
        assert mine["kept_mass"] == pytest.approx(1, abs=1e-6)


def test_kept_mass_is_told_in_log_history_and_card(config, pruned, family, rows, tmp_path):
    found = recover(config, str(pruned), tmp_path / "out")
    kept = [row["kept_mass"] for row in logged(found.out)]
    assert len(kept) == 12
    assert found.entry.kept_mass == fmean(kept)
    assert found.entry.settings.teacher_top == TOP
    card = (found.out / "README.md").read_text()
    assert (
        f"| of the teacher | {TOP} largest probabilities, {fmean(kept):.2%} of its mass |" in card
    )
    # The first five positions are each row once, and the last token has no label.
    order = replace(config, batch=5)
    once = logged(recover(order, str(pruned), tmp_path / "once").out)[0]["kept_mass"]
    with torch.no_grad():
        logits = sparsekit.load(family("llama"), "float32")(input_ids=rows[:, :15]).logits
    wanted = torch.softmax(logits, -1).topk(TOP).values.sum(-1).mean().item()
    assert once == pytest.approx(wanted, rel=1e-5)


def test_without_the_option_nothing_is_kept(config, pruned, tmp_path):
    found = recover(replace(config, teacher_top=None), str(pruned), tmp_path / "out")
    assert found.entry.kept_mass is None
    assert "kept_mass" not in logged(found.out)[0]
    assert not files(tmp_path / "cache")


def test_a_file_that_is_too_short_is_refused_before_the_first_step(config, pruned, rows, tmp_path):
    recover(config, str(pruned), tmp_path / "first")
    file = files(tmp_path / "cache")[name_of(rows[3])]
    file.write_bytes(file.read_bytes()[:100])
    with refused("damaged-file", name_of(rows[3]), kind=DataError):
        recover(config, str(pruned), tmp_path / "second")
    assert not (tmp_path / "second.partial").exists()


def test_a_file_with_another_bit_is_refused_and_once_deleted_computed_again(
    config, pruned, rows, tmp_path
):
    first = recover(config, str(pruned), tmp_path / "first").out
    file = files(tmp_path / "cache")[name_of(rows[3])]
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with refused("damaged-file", name_of(rows[3]), kind=DataError):
        recover(config, str(pruned), tmp_path / "second")
    file.unlink()
    second = recover(config, str(pruned), tmp_path / "second").out
    assert file.read_bytes() == whole
    assert Checkpoint.open(first).fingerprint == Checkpoint.open(second).fingerprint


def test_a_disk_without_room_is_told_before_the_first_step(config, pruned, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "SPARE_BYTES", 1 << 50)
    with refused("disk-full", "5 rows", "GB", "--teacher-top", kind=StorageError):
        recover(config, str(pruned), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_it_takes_is_told_before_the_first_step(config, pruned, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "SPARE_BYTES", 10**9 - 16 * TOP * 8)
    notes = Notes()
    recover(config, str(pruned), tmp_path / "first", progress=notes)
    (told,) = [note for note in notes.told if "largest" in note]
    assert told.startswith(f"the teacher's {TOP} largest probabilities of each token: 5.00 GB in ")
    files(tmp_path / "cache")[name_of(rows[3])].unlink()
    notes = Notes()
    recover(config, str(pruned), tmp_path / "second", progress=notes)
    assert any("4 of 5 rows" in note for note in notes.told)


def test_memory_for_the_teacher_is_asked_for_only_where_it_is_needed(
    config, pruned, family, rows, tmp_path, monkeypatch
):
    recover(config, str(pruned), tmp_path / "first")
    model = sum(4 * math.prod(p.shape) for p in Checkpoint.open(pruned).places.values())
    monkeypatch.setattr(memory_needs, "available_memory", lambda: 4 * model + model // 2)
    monkeypatch.setattr(memory_needs, "pass_bytes", lambda *_: 0)
    recover(config, str(pruned), tmp_path / "second")
    files(tmp_path / "cache")[name_of(rows[3])].unlink()
    with refused("not-enough-memory", "and the teacher", kind=DataError):
        recover(config, str(pruned), tmp_path / "third")


def test_speed_is_measured_as_if_no_row_were_there_unless_all_are(config, pruned, tmp_path, passes):
    recover(replace(config, tokens=32), str(pruned), tmp_path / "two-rows")
    job = prepare_recover(config, str(pruned), tmp_path / "out")
    rows = config.corpus(None).rows(job.source, job.teacher)
    found = top_teacher(job, rows, Processes(), SILENT)
    passes.clear()
    slow = found.measured()
    for _ in range(2):
        slow.probabilities(rows.numbers(0, 2), rows.take(0, 2))
    assert len(passes) == 4
    found.probabilities(rows.numbers(0, 5), rows.take(0, 5))
    assert len(passes) == 7
    found.measured().probabilities(rows.numbers(0, 5), rows.take(0, 5))
    assert len(passes) == 7
    assert slow.load() is found.load()


@pytest.mark.slow
def test_a_run_with_a_time_limit_keeps_the_rows_too(config, pruned, tmp_path, passes):
    config = replace(config, tokens=None, max_time="20s")
    notes = Notes()
    found = recover(config, str(pruned), tmp_path / "out", progress=notes)
    assert found.entry.plan.steps > 12
    assert math.isfinite(found.entry.kept_mass)
    assert len(files(tmp_path / "cache")) == 5
    assert any("all 5 rows are in" in note for note in notes.told)


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        ({"teacher_top": 0}, "out-of-range", ("--teacher-top", "1", "0")),
        ({"kl_weight": 0.0}, "no-effect", ("--teacher-top", "--kl-weight 0")),
        ({"teacher_top": 261}, "out-of-range", ("--teacher-top 261", "260")),
    ],
)
def test_what_cannot_be_kept_is_refused(config, pruned, tmp_path, change, code, named):
    with refused(code, *named, kind=UsageError):
        recover(replace(config, **change), str(pruned), tmp_path / "out")


def test_shards_are_refused(config, pruned, tmp_path):
    with refused("needs-whole-weights", "--teacher-top", kind=UsageError):
        prepare_recover(
            config, str(pruned), tmp_path / "out", processes=Processes(size=2, shards=True)
        )
    prepare_recover(
        replace(config, teacher_top=None),
        str(pruned),
        tmp_path / "out",
        processes=Processes(shards=True),
    )


@pytest.mark.parametrize("top", [None, 4])
def test_an_interrupted_run_with_another_number_is_refused(config, pruned, tmp_path, top):
    with pytest.raises(KeyboardInterrupt):
        recover(config, str(pruned), tmp_path / "out", progress=StopsAt(3))
    with refused("other-recipe", "teacher_top", kind=UsageError):
        recover(replace(config, teacher_top=top), str(pruned), tmp_path / "out")


def test_a_longer_part_of_the_text_uses_the_rows_of_a_shorter_one(pruned, family, tmp_path, passes):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"number {n} comes before number {n + 1}. " for n in range(200)))
    config = RecoverConfig(
        method="fixed", data=str(text), length=16, batch=1, tokens=64, teacher_top=TOP
    )
    recover(config, str(pruned), tmp_path / "first")
    assert len(passes) == 4
    recover(replace(config, tokens=96), str(pruned), tmp_path / "second")
    assert len(passes) == 6


def test_a_teacher_that_is_not_finite_leaves_nothing_behind(config, pruned, tmp_path, monkeypatch):
    real = teacher.hidden_states
    monkeypatch.setattr(teacher, "hidden_states", lambda *args: real(*args) * math.nan)
    with refused("not-finite", "row", "--teacher", kind=NumericalError):
        recover(config, str(pruned), tmp_path / "out")
    assert not files(tmp_path / "cache")
