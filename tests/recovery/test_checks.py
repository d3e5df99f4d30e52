"""Models, teachers, patterns and texts that do not fit together."""

import json
import re

import pytest
from listeners import Notes
from refusals import refused
from trainings import CAST, SHORT, damaged, unsettled
from verbs import replace

from sparsekit.errors import (
    DataError,
    UsageError,
)
from sparsekit.inspection.verify import verify
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.prune import prune
from sparsekit.recovery.prepare import prepare_recover
from sparsekit.recovery.recover import recover


def test_less_text_than_a_step_is_refused(pruned, row_file, tmp_path):
    config = replace(SHORT, data=str(row_file), batch=8)
    with refused("too-few-rows", "5 rows", "16 tokens", kind=DataError):
        recover(config, str(pruned), tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value"), [("final_logit_softcapping", 30.0), ("logit_scale", 0.5)]
)
def test_a_model_that_changes_its_logits_is_refused(copy_of, tmp_path, key, value):
    copy = copy_of("llama")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {key: value}))
    with refused("changed-logits", key, kind=DataError):
        recover(SHORT, str(copy), tmp_path / "out")


def test_a_model_with_factors_is_refused(family, row_file, tmp_path):
    config = PruneConfig(method="armor", option={"sweeps": "1"}, calibration=str(row_file))
    out = prune(config, str(family("llama")), tmp_path / "armor").out
    with refused("kind-not-taken", "armor", kind=DataError):
        recover(replace(SHORT, pattern="2:4"), str(out), tmp_path / "out")


def test_a_sparse_teacher_is_refused_unless_it_is_named(pruned, copy_of, row_file, tmp_path):
    """A model without a history, and what a run without a teacher makes of it."""
    (pruned_copy := tmp_path / "bare").mkdir()
    for file in pruned.iterdir():
        if file.name != "sparsekit.json":
            (pruned_copy / file.name).write_bytes(file.read_bytes())
    with refused("no-dense-model", "bare", "--teacher", kind=DataError):
        recover(SHORT, str(pruned_copy), tmp_path / "out")
    first = recover(replace(SHORT, kl_weight=0.0), str(pruned_copy), tmp_path / "first").out
    with refused("no-dense-model", "bare", "first", kind=DataError):
        recover(SHORT, str(first), tmp_path / "out")
    config = PruneConfig(method="magnitude", pattern="1:4")
    second = prune(config, str(pruned_copy), tmp_path / "second").out
    with refused("no-dense-model", "bare", "second", kind=DataError):
        recover(SHORT, str(second), tmp_path / "out")
    named = replace(SHORT, teacher=str(pruned_copy))
    assert recover(named, str(second), tmp_path / "out").entry.teacher.path == str(pruned_copy)


def test_cast_refuses_steps_that_cannot_bring_the_entries_to_zero(family, tmp_path):
    config = replace(CAST, lr=1e-5)
    with refused("decay-too-weak", "times the --tokens or --lr", kind=UsageError):
        recover(config, str(family("llama")), tmp_path / "out")
    assert not list(tmp_path.iterdir())  # so that another rate can be tried at once


def test_spans_that_cut_a_group_are_refused(family, tmp_path):
    """Scales need whole groups: 32 inputs in 16 spans are two each."""
    config = replace(CAST, option={"decay": "1e-2", "spans": "16"})
    with refused("spans-do-not-divide", "32 inputs", "16 spans", "4", kind=UsageError):
        recover(config, str(family("llama")), tmp_path / "out")


@pytest.mark.slow
def test_a_budget_below_what_is_safe_is_told(family, tmp_path, monkeypatch):
    """The safe budget is three times the 99th percentile of the entries off the mask."""
    unsettled(monkeypatch)
    told = {}
    for lr in (1e-3, 1e-2):
        notes = Notes()
        recover(
            replace(CAST, lr=lr, tokens=6400),
            str(family("llama")),
            tmp_path / str(lr),
            progress=notes,
        )
        (text,) = (note for note in notes.told if note.startswith("decay budget"))
        distance, _, high = (
            float(x) for x in re.findall(r"(?:move by|size is|of a weight) ([\d.e-]+)", text)
        )
        told[lr] = "3 times" in text
        assert told[lr] == (distance < 3 * high)
    assert told == {1e-3: True, 1e-2: False}


def test_cast_with_a_weak_decay_is_told_which_one_would_do(family, tmp_path):
    config = replace(CAST, option={"decay": "1e-9"})
    with refused("decay-too-weak", "leave out -O decay", kind=UsageError):
        recover(config, str(family("llama")), tmp_path / "out")


def test_a_sparse_model_without_the_pattern_is_refused_and_asks_for_it(copy_of, pruned, tmp_path):
    def fill(tensors):
        for tensor in tensors.values():
            tensor[..., :4] = 1.0

    copy = copy_of(pruned)
    history = (copy / "sparsekit.json").read_bytes()
    damaged(copy, fill)
    (copy / "sparsekit.json").write_bytes(history)  # says 2:4 of weights that are not
    with refused("not-this-pattern", "2:4", "--pattern", kind=UsageError):
        recover(SHORT, str(copy), tmp_path / "out")
    (copy / "sparsekit.json").unlink()
    with refused("not-this-pattern", "2:4", "--pattern", kind=UsageError):
        recover(SHORT, str(copy), tmp_path / "out")
    named = replace(SHORT, pattern="2:4")
    with refused("no-dense-model", "--teacher", kind=DataError):
        recover(named, str(copy), tmp_path / "out")
    recover(replace(named, kl_weight=0.0), str(copy), tmp_path / "out")
    assert verify(str(tmp_path / "out"))["zeros"] == 9216


@pytest.mark.parametrize("written", ["50%", "50.0%", "50%/row"])
def test_the_pattern_of_the_history_may_be_named_in_any_way(family, row_file, tmp_path, written):
    config = PruneConfig(pattern="50%", calibration=str(row_file))
    sparse = prune(config, str(family("llama")), tmp_path / "sparse").out
    notes = prepare_recover(replace(SHORT, pattern=written), str(sparse), tmp_path / "out").notes
    assert not any("was pruned to" in note for note in notes)


def test_another_pattern_than_that_of_the_history_is_told(pruned, tmp_path):
    """It is a wish that can be granted, but seldom one that is meant."""
    notes = Notes()
    recover(replace(SHORT, pattern="1:4"), str(pruned), tmp_path / "out", progress=notes)
    assert any("was pruned to 2:4" in told and "1:4" in told for told in notes.told)
    assert verify(str(tmp_path / "out"))["pattern"] == ["1:4"]


def test_a_teacher_with_another_vocabulary_is_refused(pruned, copy_of, tmp_path):
    copy = copy_of("llama")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    with refused("other-vocabulary", "300", "260", kind=DataError):
        recover(replace(SHORT, teacher=str(copy)), str(pruned), tmp_path / "out")


def test_a_teacher_with_another_tokenizer_is_refused(pruned, copy_of, tmp_path):
    copy = copy_of("llama")
    file = copy / "tokenizer.json"
    found = json.loads(file.read_text())
    vocabulary = found["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(found))
    with refused("other-vocabulary", "tokenizer", copy, kind=DataError):
        recover(replace(SHORT, teacher=str(copy)), str(pruned), tmp_path / "out")


def test_a_teacher_of_another_family_is_refused_without_tokenizers_too(pruned, family, tmp_path):
    """Both have 260 tokens, and only one of them a tokenizer."""
    with refused("other-family", "'gpt2'", "'llama'", kind=DataError):
        recover(replace(SHORT, teacher=str(family("gpt2"))), str(pruned), tmp_path / "out")


def test_a_parent_that_is_no_longer_what_it_was_is_refused(copy_of, row_file, tmp_path):
    dense = copy_of("llama")
    config = PruneConfig(calibration=str(row_file))
    sparse = prune(config, str(dense), tmp_path / "sparse").out

    def change(tensors):
        tensors["model.norm.weight"] += 1

    damaged(dense, change)
    with refused("teacher-changed", dense, sparse, "--teacher", kind=DataError):
        recover(SHORT, str(sparse), tmp_path / "out")
    recover(replace(SHORT, teacher=str(dense)), str(sparse), tmp_path / "out")


def test_a_parent_that_is_gone_is_told_with_the_way_out(copy_of, row_file, tmp_path):
    dense = copy_of("llama")
    config = PruneConfig(calibration=str(row_file))
    sparse = prune(config, str(dense), tmp_path / "sparse").out
    dense.rename(tmp_path / "elsewhere")
    with refused("no-teacher", "--teacher", kind=DataError):
        recover(SHORT, str(sparse), tmp_path / "out")


def test_a_missing_teacher_is_named(pruned, tmp_path):
    with refused("no-teacher", "nowhere", "--teacher", kind=DataError):
        recover(replace(SHORT, teacher="./nowhere"), str(pruned), tmp_path / "out")


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl"])
def test_no_text_at_all_is_refused(pruned, tmp_path, name):
    (tmp_path / name).touch()
    with refused("empty-file", name, kind=DataError):
        recover(replace(SHORT, data=str(tmp_path / name)), str(pruned), tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_text_of_fewer_tokens_than_a_row_is_refused(pruned, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    with refused("text-too-short", "short.txt", "16", kind=DataError):
        recover(replace(SHORT, data=str(tmp_path / "short.txt")), str(pruned), tmp_path / "out")
