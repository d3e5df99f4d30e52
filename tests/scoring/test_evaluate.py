"""Perplexity against the ordinary model, and the paired difference to a baseline."""

import json
import math
import statistics
from pathlib import Path

import psutil
import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.errors import DataError, NumericalError, UsageError
from sparsekit.progress import Progress
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.prune import prune
from sparsekit.scoring import evaluate as module
from sparsekit.scoring import perplexity as scoring
from sparsekit.scoring.config import EvalConfig
from sparsekit.scoring.evaluate import Score, evaluate
from sparsekit.text.calibration import evaluation_rows
from sparsekit.text.rows import fingerprint


def scores(config: EvalConfig, *models, baseline=None, **options) -> list[Score]:
    names = [str(model) for model in models]
    return evaluate(config, names, str(baseline) if baseline else None, **options)


@torch.no_grad()
def ordinary_losses(folder, rows) -> list[float]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return [model(input_ids=row[None], labels=row[None]).loss.item() for row in rows]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt"])
def test_perplexity_is_that_of_the_ordinary_model(family, rows, row_file, name):
    (score,) = scores(EvalConfig(text=str(row_file)), family(name))
    found = score.perplexity
    assert found is not None
    expected = ordinary_losses(family(name), rows)
    assert found.losses == pytest.approx(expected, rel=1e-5)
    value = found.to_json()
    assert value["log_perplexity"] == pytest.approx(statistics.mean(expected), rel=1e-5)
    assert value["value"] == pytest.approx(math.exp(statistics.mean(expected)), rel=1e-4)
    spread = statistics.stdev(expected) / math.sqrt(len(expected))
    assert value["log_stderr"] == pytest.approx(spread, rel=1e-3)
    assert (value["windows"], value["length"]) == tuple(rows.shape)
    assert value["fingerprint"] == fingerprint(rows)
    assert score.tasks == []
    assert score.difference == {}


def test_more_windows_than_fit_into_memory_are_measured_in_several_passes(
    family, row_file, monkeypatch
):
    config = EvalConfig(text=str(row_file))
    (whole,) = scores(config, family("gemma3"))
    each = 24 * 32 * 4  # bytes of the hidden states of one window
    share = 2.5 * each / psutil.virtual_memory().total
    passes = []
    feed = scoring.BlockStream.feed
    monkeypatch.setattr(
        scoring.BlockStream, "feed", lambda self, rows: passes.append(len(rows)) or feed(self, rows)
    )
    monkeypatch.setattr(scoring, "HIDDEN_SHARE", share)
    (parts,) = scores(config, family("gemma3"))
    assert len(passes) > 1
    assert sum(passes) == 5
    assert parts.perplexity.losses == whole.perplexity.losses


def test_limit_takes_evenly_spaced_windows(family, row_file):
    (whole,) = scores(EvalConfig(text=str(row_file)), family("llama"))
    (two,) = scores(EvalConfig(text=str(row_file), limit=2), family("llama"))
    assert two.perplexity.losses == (whole.perplexity.losses[0], whole.perplexity.losses[2])


def test_baseline_comes_first_and_differences_are_paired(family, pruned, row_file, tmp_path):
    config = EvalConfig(text=str(row_file))
    made = prune(PruneConfig(method="magnitude"), str(family("llama")), tmp_path / "other").out
    base, one, two = scores(config, pruned, made, baseline=family("llama"))
    assert [s.model for s in (base, one, two)] == [str(family("llama")), str(pruned), str(made)]
    assert base.difference == {}
    for score in (one, two):
        pairs = zip(score.perplexity.losses, base.perplexity.losses, strict=True)
        differences = [a - b for a, b in pairs]
        found = score.difference["log_perplexity"]
        assert found["value"] == pytest.approx(statistics.mean(differences))
        assert found["stderr"] == pytest.approx(statistics.stdev(differences) / math.sqrt(5))
        assert found["n"] == 5
        own = base.perplexity.to_json()
        assert found["baseline"] == {
            "value": own["log_perplexity"],
            "stderr": own["log_stderr"],
        }
    assert one.difference != two.difference


class Recorder(Progress):
    """Keeps the titles of what was begun."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    def begin(self, title: str, total: int) -> None:
        self.begun.append(title)


def test_model_differs_from_itself_by_exactly_nothing(family, row_file):
    _, score = scores(EvalConfig(text=str(row_file)), family("llama"), baseline=family("llama"))
    found = score.difference["log_perplexity"]
    assert (found["value"], found["stderr"], found["n"]) == (0.0, 0.0, 5)


def test_models_whose_tokenizers_cut_another_text_are_not_compared(copy_of, family):
    other = copy_of("llama")
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(tokenizer))
    config = EvalConfig(length=32, limit=2)
    seen = Recorder()
    with refused("other-windows", other, family("llama"), "builtin", kind=DataError):
        evaluate(config, [str(other)], str(family("llama")), seen)
    assert seen.begun == []  # nothing had been measured


def test_windows_of_other_lengths_are_refused_before_anything_is_measured(copy_of, family):
    short = copy_of("llama")
    file = short / "config.json"
    shape = json.loads(file.read_text())
    file.write_text(json.dumps({**shape, "max_position_embeddings": 16}))
    seen = Recorder()
    with refused("other-windows", 16, 32, "--length 16", kind=DataError):
        evaluate(EvalConfig(length=32, limit=2), [str(short)], str(family("llama")), seen)
    assert seen.begun == []


def test_second_model_is_checked_before_the_first_is_measured(copy_of, family, row_file):
    broken = copy_of("llama")
    with (broken / "model.safetensors").open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\xff\x7f")  # NaN in bfloat16
    seen = Recorder()
    with refused("not-finite", str(broken), kind=DataError):
        evaluate(EvalConfig(text=str(row_file)), [str(family("llama")), str(broken)], None, seen)
    assert seen.begun == []


def test_model_that_cannot_be_streamed_is_refused_before_another_is_measured(family, row_file):
    seen = Recorder()
    with refused("unsupported-model", "mixtral", kind=DataError):
        evaluate(
            EvalConfig(text=str(row_file)),
            [str(family("llama")), str(family("mixtral"))],
            None,
            seen,
        )
    assert seen.begun == []


def test_missing_tokenizer_or_data_is_seen_before_perplexity_is_measured(
    copy_of, family, row_file, tmp_path
):
    (tmp_path / "lost.yaml").write_text(
        "task: lost\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: no.jsonl\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: q\ndoc_to_target: 0\n"
        "doc_to_choice: [a, b]\n"
    )
    config = EvalConfig(text=str(row_file), tasks=["lost"], include_path=tmp_path)
    seen = Recorder()
    with refused("no-task-data", "lost", kind=DataError):
        evaluate(config, [str(family("llama"))], None, seen)
    assert seen.begun == []


def test_builtin_windows_do_not_overlap_and_are_capped_at_the_models_length(family):
    notes = []

    class Listen(module.Progress):
        def begin(self, title, total): ...
        def step(self, label): ...
        def end(self): ...
        def note(self, text):
            notes.append(text)

    (score,) = scores(EvalConfig(limit=2), family("llama"), progress=Listen())
    assert score.perplexity.length == 256
    assert notes == ["llama: length capped at 256: the model's maximum"]
    rows = evaluation_rows("builtin", Checkpoint.open(family("llama")), length=256, limit=2)
    assert list(score.perplexity.losses) == pytest.approx(
        ordinary_losses(family("llama"), rows.tokens), rel=1e-5
    )


def test_weight_that_is_not_finite_is_named_before_it_is_measured(copy_of, row_file):
    folder = copy_of("llama_tied")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with refused("not-finite", "model.norm.weight", kind=DataError):
        scores(EvalConfig(text=str(row_file)), folder)


def scaled(folder: Path, name: str, factor: float) -> Path:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] *= factor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_perplexity_beyond_every_number_is_told_by_its_logarithm(copy_of, row_file):
    """A broken model is what one measures: exp(710) is no float, its logarithm still compares."""
    folder = scaled(copy_of("llama_tied"), "model.norm.weight", 1e6)
    (score,) = scores(EvalConfig(text=str(row_file)), folder)
    assert 1000 < score.perplexity.log < math.inf
    value = score.to_json()["perplexity"]
    assert value["log_perplexity"] == score.perplexity.log
    assert json.loads(json.dumps(value, allow_nan=False)) == value


def test_loss_that_is_not_a_number_is_an_error(copy_of, row_file):
    """As JSON it would be no JSON, and in a table it would look like a measurement."""
    folder = scaled(copy_of("llama_tied"), "model.layers.0.mlp.up_proj.weight", 1e30)
    folder = scaled(folder, "model.layers.0.mlp.gate_proj.weight", 1e30)
    with refused("not-finite", folder.name, kind=NumericalError):
        scores(EvalConfig(text=str(row_file)), folder)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"text": "self"}, UsageError, "text of the model itself"),
        ({"text": "nowhere.txt"}, DataError, r"nowhere\.txt"),
        ({"limit": 0}, UsageError, "--limit"),
        ({"length": 1}, UsageError, "length"),
        ({"dtype": "int8"}, UsageError, "--dtype .*int8"),
        ({"device": "cuda"}, UsageError, "CUDA"),
    ],
)
def test_wrong_option_is_refused(family, options, error, match):
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(error, match=match):
        scores(EvalConfig(**options), family("llama"))


def test_bfloat16_changes_the_numbers_a_little(family, row_file):
    (full,) = scores(EvalConfig(text=str(row_file)), family("llama"))
    (half,) = scores(EvalConfig(text=str(row_file), dtype="bfloat16"), family("llama"))
    assert full.perplexity.losses != half.perplexity.losses
    assert half.perplexity.log == pytest.approx(full.perplexity.log, rel=0.05)
