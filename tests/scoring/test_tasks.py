"""Zero-shot scores: against plain torch, against lm-eval's own entry, and their failures."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from listeners import Notes
from refusals import refused

from sparsekit.errors import DataError, UsageError
from sparsekit.scoring.config import EvalConfig
from sparsekit.scoring.evaluate import evaluate
from sparsekit.scoring.harness import load_tasks
from sparsekit.scoring.standard_error import paired_difference
from sparsekit.scoring.tasks import Metric, TaskScore, compare_tasks, score_tasks

REPO = Path(__file__).resolve().parents[2]
SHARED_TASKS = REPO.parent / "shared" / "data" / "tasks"


def scored(path: Path, names: list[str], include_path: Path, seed: int = 0, **options):
    """The scores on tasks that are loaded for this call."""
    return score_tasks(path, load_tasks(names, include_path, seed), seed=seed, **options)


WORDS = ["ant", "a bee", "some long cat", "dog", "an eel", "one very long, tired fox", "gnu", "hen"]
DOCS = [
    {
        "question": f"Number {i}: which one is it?",
        "choices": [WORDS[(i * 3 + j * 5) % 8] for j in range(3)],
        "label": i % 3,
    }
    for i in range(12)
]

CHOICE = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_target: label
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata:
  version: 2.5
"""
ROLLING = """\
task: rolling
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
metadata:
  version: 1
"""
FILTERED = "acc, aggregation: median"
SHUFFLE = """\
import random

import datasets


def load(data_files, **_):
    print("a task that talks")
    data = datasets.load_dataset("json", data_files=data_files)
    order = list(range(len(data["test"])))
    random.shuffle(order)
    data["test"] = data["test"].select(order)
    return data
"""


@pytest.fixture(autouse=True)
def _datasets_cache(tmp_path, monkeypatch):
    """Keep what the json loader writes out of the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A random Llama of two layers with a tokenizer of bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("models") / "llama"
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>"]
    vocab = {letter: i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
        bos_token_id=256,
        eos_token_id=257,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory) -> Path:
    """Task files whose data lie beside them, but for two that have none."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    tiny = CHOICE.format(name="tiny", data=data)
    (folder / "tiny.yaml").write_text(tiny + "tag: tiny_tag\n")
    (folder / "other.yaml").write_text(CHOICE.format(name="other", data=data) + "tag: tiny_tag\n")
    (folder / "group.yaml").write_text("group: tiny_group\ntask: [other]\n")
    (folder / "shuffling.py").write_text(SHUFFLE)
    (folder / "shuffled.yaml").write_text(
        tiny.replace("task: tiny", "task: shuffled") + "custom_dataset: !function shuffling.load\n"
    )
    (folder / "filtered.yaml").write_text(
        tiny.replace("task: tiny", "task: filtered").replace("acc, aggregation: mean", FILTERED)
        + "filter_list:\n  - {name: first, filter: [{function: take_first}]}\n"
    )
    (folder / "rolling.yaml").write_text(ROLLING.format(data=data))
    absent = CHOICE.format(name="no_file", data=folder / "absent.jsonl")
    (folder / "no_file.yaml").write_text(absent)
    (folder / "no_hub.yaml").write_text(
        f"task: no_hub\ndataset_path: nobody/nothing\n{tiny[tiny.index('output_type') :]}"
    )
    return folder


@pytest.fixture(scope="module")
def tiny(checkpoint, tasks_dir, tmp_path_factory) -> TaskScore:
    """The score of the checkpoint on the twelve questions."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        [score] = scored(checkpoint, ["tiny"], include_path=tasks_dir)
    return score


def log_likelihoods(path: Path, doc: dict) -> list[float]:
    """The summed log-probability of each choice after the question, one forward pass each."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompt = tokenizer(f"Q: {doc['question']}\nA:")["input_ids"]
    sums = []
    for choice in doc["choices"]:
        answer = tokenizer(f" {choice}")["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0].double()
        log_probs = logits.log_softmax(-1)
        sums.append(sum(float(log_probs[len(prompt) + i - 1, t]) for i, t in enumerate(answer)))
    return sums


def argmax(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def test_score_says_what_was_measured(tiny):
    assert (tiny.task, tiny.version, tiny.n, tiny.n_shot) == ("tiny", "2.5", 12, 0)
    assert set(tiny.metrics) == set(tiny.samples) == {"acc", "acc_norm"}
    assert tiny.metrics["acc"].higher_is_better is True
    assert len(set(tiny.sample_hashes)) == 12


def test_per_sample_scores_equal_the_likelihoods_of_plain_torch(tiny, checkpoint):
    acc, acc_norm = [], []
    for doc in DOCS:
        sums = log_likelihoods(checkpoint, doc)
        per_letter = [s / len(choice) for s, choice in zip(sums, doc["choices"], strict=True)]
        acc.append(float(argmax(sums) == doc["label"]))
        acc_norm.append(float(argmax(per_letter) == doc["label"]))
    assert 0 < sum(acc) < 12  # else a constant would pass
    assert acc != acc_norm
    assert tiny.samples["acc"] == tuple(acc)
    assert tiny.samples["acc_norm"] == tuple(acc_norm)
    assert tiny.metrics["acc"].value == pytest.approx(sum(acc) / 12)
    assert tiny.metrics["acc_norm"].value == pytest.approx(sum(acc_norm) / 12)


def test_stderr_is_that_of_a_mean_of_zeros_and_ones(tiny):
    for metric in tiny.metrics.values():
        p = metric.value
        assert metric.stderr == pytest.approx(math.sqrt(p * (1 - p) / 11))
        assert metric.stderr > 0


def test_results_equal_those_of_simple_evaluate(checkpoint, tasks_dir, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    want = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(checkpoint), "dtype": "float32"},
        tasks=["shuffled", "rolling"],
        task_manager=TaskManager(include_path=tasks_dir, include_defaults=False),
        batch_size=8,
        device="cpu",
        limit=7,
        bootstrap_iters=10,
        random_seed=3,
        numpy_random_seed=3,
        torch_random_seed=3,
        fewshot_random_seed=3,
    )
    got = scored(checkpoint, ["shuffled", "rolling"], include_path=tasks_dir, limit=7, seed=3)
    shuffled, rolling = got
    results = want["results"]
    hashes = [sample["doc_hash"] for sample in want["samples"]["shuffled"]]
    assert list(shuffled.sample_hashes) == hashes
    for name in ("acc", "acc_norm"):
        assert shuffled.metrics[name].value == results["shuffled"][f"{name},none"]
        stderr = results["shuffled"][f"{name}_stderr,none"]
        assert shuffled.metrics[name].stderr == pytest.approx(stderr)
    perplexity = results["rolling"]["word_perplexity,none"]
    assert rolling.metrics["word_perplexity"].value == pytest.approx(perplexity)


def test_a_metric_that_is_no_mean_has_neither_samples_nor_stderr(checkpoint, tasks_dir):
    [full] = scored(checkpoint, ["rolling"], include_path=tasks_dir)
    metric = full.metrics["word_perplexity"]
    assert (metric.stderr, metric.higher_is_better, full.samples) == (None, False, {})
    [half] = scored(checkpoint, ["rolling"], include_path=tasks_dir, dtype="bfloat16")
    other = half.metrics["word_perplexity"].value
    assert other != metric.value  # the dtype reaches the model
    assert math.log(other) == pytest.approx(math.log(metric.value), rel=0.05)


def test_a_named_filter_is_part_of_the_metrics_name(tiny, checkpoint, tasks_dir):
    [score] = scored(checkpoint, ["filtered"], include_path=tasks_dir)
    assert set(score.metrics) == {"acc,first", "acc_norm,first"}
    assert score.n == 12
    # `acc` is a median here: its samples are numbers, but the metric is not their mean.
    assert dict(score.samples) == {"acc_norm,first": tiny.samples["acc_norm"]}
    assert score.metrics["acc,first"].stderr is None
    assert score.metrics["acc_norm,first"] == tiny.metrics["acc_norm"]


def test_limit_keeps_the_first_samples(tiny, checkpoint, tasks_dir):
    [score] = scored(checkpoint, ["tiny"], include_path=tasks_dir, limit=5)
    assert score.n == 5
    assert score.sample_hashes == tiny.sample_hashes[:5]
    assert score.samples["acc"] == tiny.samples["acc"][:5]


def test_one_sample_has_no_stderr(checkpoint, tasks_dir):
    [score] = scored(checkpoint, ["tiny"], include_path=tasks_dir, limit=1)
    assert score.metrics["acc"].stderr is None


def test_same_inputs_give_the_same_score(tiny, checkpoint, tasks_dir):
    assert scored(checkpoint, ["tiny"], include_path=tasks_dir) == [tiny]


def test_seed_decides_what_a_task_draws_and_the_callers_generators_stay(checkpoint, tasks_dir):
    random.seed(11)
    torch.manual_seed(11)
    before = random.getstate(), torch.get_rng_state()

    def order(seed: int) -> tuple[str, ...]:
        [score] = scored(checkpoint, ["shuffled"], include_path=tasks_dir, limit=8, seed=seed)
        return score.sample_hashes

    first = order(1)
    assert order(1) == first
    assert order(2) != first
    pair = ["tiny", "shuffled"]
    scores = scored(checkpoint, pair, include_path=tasks_dir, limit=8, seed=1)
    assert scores[1].sample_hashes == first  # also after another task
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.slow
def test_groups_and_tags_stand_for_their_tasks_each_once(checkpoint, tasks_dir):
    scores = scored(checkpoint, ["tiny_group", "tiny_tag"], include_path=tasks_dir, limit=2)
    assert sorted(score.task for score in scores) == ["other", "tiny"]
    assert scores[0].task == "other"


@pytest.mark.slow
def test_unknown_task_is_refused_with_close_names(tasks_dir):
    with refused("no-such-task", "'arc_esay'", "'arc_easy'", kind=UsageError) as caught:
        load_tasks(["tiny", "arc_esay", "tiny_gruop"], tasks_dir)
    assert "'tiny_group'" in caught.value.hint
    assert "'tiny'" not in caught.value.message


def test_tasks_that_are_loaded_once_score_every_model_alike(tiny, checkpoint, tasks_dir):
    tasks = load_tasks(["tiny", "shuffled"], tasks_dir, seed=1)
    first = score_tasks(checkpoint, tasks, seed=1)
    assert score_tasks(checkpoint, tasks, seed=1) == first
    assert first == scored(checkpoint, ["tiny", "shuffled"], tasks_dir, seed=1)
    assert first[0] == tiny


def test_wrong_options_are_usage_errors(checkpoint, tasks_dir, tmp_path):
    with refused("not-a-folder", "absent", kind=UsageError):
        load_tasks(["tiny"], tmp_path / "absent")
    with refused("no-task", kind=UsageError):
        load_tasks([], None)
    with refused("out-of-range", 0, kind=UsageError):
        scored(checkpoint, ["tiny"], include_path=tasks_dir, limit=0)
    with refused("not-a-choice", "'float31'", kind=UsageError):
        scored(checkpoint, ["tiny"], include_path=tasks_dir, dtype="float31")
    with refused("no-such-device", "'cuda:x'", kind=UsageError):
        scored(checkpoint, ["tiny"], include_path=tasks_dir, device="cuda:x")


def test_missing_tokenizer_is_named(checkpoint, tasks_dir, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    with refused("no-tokenizer", "--text", kind=DataError):
        scored(bare, ["tiny"], include_path=tasks_dir)


def test_model_larger_than_the_memory_is_refused_before_anything_is_measured(
    checkpoint, tasks_dir, monkeypatch
):
    monkeypatch.setattr("sparsekit.model.full_model.available_memory", lambda: 1000)
    config = EvalConfig(text="builtin", tasks=["tiny"], include_path=tasks_dir)
    measured = []
    monkeypatch.setattr(
        "sparsekit.scoring.perplexity.perplexity", lambda *_, **__: measured.append(1)
    )
    with refused("not-enough-memory", "lm-eval tasks", "--dtype", kind=DataError):
        evaluate(config, [str(checkpoint)])
    assert measured == []
    with refused("not-enough-memory", "lm-eval tasks", kind=DataError):
        scored(checkpoint, ["tiny"], tasks_dir)


def test_a_tokenizer_made_up_from_nothing_is_refused(tasks_dir, tmp_path):
    """For this architecture transformers returns an empty tokenizer where only its settings are."""
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with refused("no-tokenizer", "vocabulary", kind=DataError):
        scored(tmp_path, ["tiny"], include_path=tasks_dir)


def test_missing_weight_is_refused(checkpoint, tasks_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with refused("incomplete-checkpoint", "layers.1.mlp.up_proj", kind=DataError):
        scored(broken, ["tiny"], include_path=tasks_dir)


def test_missing_data_file_names_the_task(checkpoint, tasks_dir):
    with refused("no-task-data", "'no_file'", "absent.jsonl", "--include-path", kind=DataError):
        scored(checkpoint, ["no_file"], include_path=tasks_dir)


SCRIPT = """\
import json, sys
from pathlib import Path
from sparsekit.errors import DataError
from sparsekit.scoring.config import EvalConfig
from sparsekit.scoring.evaluate import evaluate
from sparsekit.scoring.harness import load_tasks
from sparsekit.scoring.tasks import score_tasks

checkpoint, tasks, out = map(Path, sys.argv[1:])
[score] = score_tasks(checkpoint, load_tasks(["shuffled"], tasks))
try:
    load_tasks(["no_hub"], tasks)
except DataError as error:
    out.write_text(json.dumps({"score": score.to_json(), "error": str(error)}))
"""


@pytest.mark.slow
def test_stdout_stays_clean_and_an_unreachable_hub_is_explained(checkpoint, tasks_dir, tmp_path):
    out = tmp_path / "out.json"
    # Offline mode only saves the retries, 23 s; the error is of the same type without it.
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(checkpoint), str(tasks_dir), str(out)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ
        | {
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(tmp_path / "cache"),
            "PYTHONPATH": str(REPO),
        },
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "a task that talks" in done.stderr
    assert "INFO" not in done.stderr
    assert "git" not in done.stderr
    result = json.loads(out.read_text())
    assert result["score"]["n"] == 12
    assert "'no_hub'" in result["error"]
    assert "--include-path" in result["error"]


def test_json_form_leaves_out_the_samples(tiny):
    form = json.loads(json.dumps(tiny.to_json()))
    assert set(form) == {"task", "version", "n", "n_shot", "metrics", "samples_sha256"}
    assert set(form["metrics"]["acc"]) == {"value", "stderr", "higher_is_better"}
    other = replace(tiny, sample_hashes=tiny.sample_hashes[::-1])
    assert other.to_json()["samples_sha256"] != form["samples_sha256"]


def test_paired_difference_by_hand():
    # differences 1, 0, -1, 1: mean 1/4, squared deviations 9/16 + 1/16 + 25/16 + 9/16 = 11/4
    pair = paired_difference([1, 1, 0, 1], [0, 1, 1, 0])
    assert pair.value == 0.25
    assert pair.stderr == pytest.approx(math.sqrt(11 / 4 / 3 / 4))
    assert pair.n == 4


def test_paired_difference_of_one_sample_has_no_stderr():
    pair = paired_difference([1.0], [0.25])
    assert (pair.value, pair.n) == (0.75, 1)
    assert math.isnan(pair.stderr)


@pytest.mark.parametrize(("ours", "theirs"), [([1.0, 0.0], [1.0]), ([], [])])
def test_samples_that_do_not_pair_are_refused(ours, theirs):
    with pytest.raises(DataError):
        paired_difference(ours, theirs)


def score(samples: tuple[float, ...], hashes: str) -> TaskScore:
    metric = Metric(value=sum(samples) / len(samples), stderr=None, higher_is_better=True)
    return TaskScore(
        task="t",
        version="1",
        n=len(samples),
        n_shot=0,
        metrics={"acc": metric, "perplexity": metric},
        samples={"acc": samples},
        sample_hashes=tuple(hashes),
    )


def test_compare_pairs_each_metric_that_has_samples():
    differences = compare_tasks(score((0, 0, 1), "abc"), score((1, 0, 1), "abc"))
    assert set(differences) == {"acc"}
    assert differences["acc"].value == pytest.approx(-1 / 3)
    assert differences["acc"].stderr == pytest.approx(1 / 3)


def test_compare_refuses_other_samples_and_other_versions():
    ours = score((0, 1), "ab")
    with refused("other-samples", kind=DataError):
        compare_tasks(ours, score((0, 1), "ba"))
    with refused("other-samples", "`version`", kind=DataError):
        compare_tasks(ours, replace(ours, version="2"))


@pytest.mark.skipif(
    not SHARED_TASKS.is_dir(), reason=f"needs the shared evaluation data at {SHARED_TASKS}"
)
def test_shared_arc_easy_runs_without_network(checkpoint):
    [score] = scored(checkpoint, ["arc_easy_local"], include_path=SHARED_TASKS, limit=8)
    assert (score.task, score.version, score.n) == ("arc_easy_local", "1.0", 8)
    assert len(score.samples["acc"]) == len(score.samples["acc_norm"]) == 8
    assert set(score.samples["acc"]) <= {0.0, 1.0}


def test_a_length_without_a_text_is_noted_and_the_tasks_are_scored(checkpoint, tasks_dir):
    notes = Notes()
    config = EvalConfig(length=32, tasks=["tiny"], include_path=tasks_dir)
    (score,) = evaluate(config, [str(checkpoint)], None, notes)
    assert (score.perplexity, len(score.tasks)) == (None, 1)
    assert any("--length" in note for note in notes.told)
