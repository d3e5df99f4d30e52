"""Recovery from disk to disk: patterns, resume, refusals."""

import dataclasses
import json
import math
import re
import time
from types import SimpleNamespace

import pytest
import torch
from listeners import Notes, StopsAt
from refusals import refused
from safetensors.torch import load_file, save_file
from verbs import replace

import sparsekit
from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.kind import Kind
from sparsekit.errors import (
    CheckFailedError,
    DataError,
    MemoryShortError,
    NumericalError,
    StorageError,
    UsageError,
)
from sparsekit.inspection.verify import verify
from sparsekit.model.full_model import hidden_states
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.prune import prune
from sparsekit.recovery import export as trainwrite
from sparsekit.recovery import loop as training
from sparsekit.recovery import loss as trainloss
from sparsekit.recovery import memory_needs
from sparsekit.recovery import prepare as recovery
from sparsekit.recovery import recover as stage
from sparsekit.recovery import saved_state as trainstate
from sparsekit.recovery.config import RecoverConfig, rate_at
from sparsekit.recovery.distributed import Processes
from sparsekit.recovery.log import LOG
from sparsekit.recovery.methods.ast import Ast
from sparsekit.recovery.methods.fixed import Fixed
from sparsekit.recovery.optimizer import MaskedAdam
from sparsekit.recovery.prepare import prepare_recover
from sparsekit.recovery.recover import recover
from sparsekit.scoring.config import EvalConfig
from sparsekit.scoring.evaluate import evaluate
from sparsekit.weights.packed import unpack_bits
from sparsekit.weights.patterns import Pattern

# Twelve steps of 2 x 16 tokens.
SHORT = RecoverConfig(method="ast", tokens=384, batch=2, length=16, lr=1e-3)
# Settles within its steps.
CAST = RecoverConfig(
    method="cast", option={"decay": "1e-2"}, tokens=9600, batch=2, length=16, lr=4e-3
)


def unsettled(monkeypatch):
    """Let a model pass whose entries off the mask have not vanished."""
    monkeypatch.setattr(trainwrite, "MOST_MOVED", math.inf)


def linear(checkpoint):
    return {n: p for n, p in checkpoint.places.items() if len(p.shape) == 2 and ".layers." in n}


@pytest.mark.parametrize(
    ("method", "asked", "taken"),
    [
        ("fixed", "auto", "linear"),
        ("ast", "auto", "cosine"),
        ("cast", "auto", "flat"),
        ("fixed", "flat", "flat"),
    ],
)
def test_a_method_has_its_own_schedule(pruned, tmp_path, method, asked, taken):
    config = replace(SHORT, method=method, schedule=asked)
    assert prepare_recover(config, str(pruned), tmp_path / "out").config.schedule == taken


@pytest.mark.parametrize("method", ["fixed", "ast", "cast"])
def test_output_has_exactly_the_pattern_and_every_tensor_was_trained(
    pruned, tmp_path, monkeypatch, method
):
    unsettled(monkeypatch)
    more = {"option": {"decay": "1e-2"}, "lr": 2e-2} if method == "cast" else {}
    found = recover(replace(SHORT, method=method, **more), str(pruned), tmp_path / "out")
    assert verify(str(found.out))["zeros"] == 9216
    before, after = Checkpoint.open(pruned), Checkpoint.open(found.out)
    old, new = before.read(before.places), after.read(after.places)
    for name in old:
        assert not torch.equal(old[name], new[name]), name
        zeros = new[name].numel() // 2 if name in linear(after) else int((old[name] == 0).sum())
        assert int((new[name] == 0).sum()) == zeros, name
    assert found.entry.totals.sparsity == 0.5
    assert after.pruned()[-1].stage == "recover"


def test_mask_of_a_sparse_model_stays_in_fixed_and_may_move_in_ast(pruned, tmp_path):
    masks = []
    for method in ("fixed", "ast"):
        config = replace(SHORT, method=method, lr=1e-2)
        found = recover(config, str(pruned), tmp_path / method)
        flips = sum(row["flipped"] for row in found.entry.to_json()["weights"])
        out = Checkpoint.open(found.out)
        name = "model.layers.0.mlp.up_proj.weight"
        masks.append(out.read([name])[name] != 0)
        assert (flips > 0) == (method == "ast")
    source = Checkpoint.open(pruned).read([name])[name] != 0
    assert torch.equal(masks[0], source)
    assert not torch.equal(masks[1], source)


@pytest.mark.parametrize(
    "chosen",
    [
        {"method": "ast"},
        {"method": "ast", "metric": "activation"},
        {"method": "cast", "option": {"decay": "1e-2"}},
        {"method": "cast", "option": {"decay": "1e-2"}, "metric": "activation"},
    ],
)
def test_a_one_shot_mask_is_not_thrown_away(pruned, tmp_path, monkeypatch, chosen):
    """Selections happen, but with a rate of next to nothing the zeros stay the smallest."""
    monkeypatch.setattr(MaskedAdam, "masked_mean", lambda _: 1e-2)
    found = recover(replace(SHORT, **chosen, lr=1e-12), str(pruned), tmp_path / "out")
    assert sum(row["flipped"] for row in found.entry.to_json()["weights"]) == 0
    source, out = Checkpoint.open(pruned), Checkpoint.open(found.out)
    for name in linear(source):
        assert torch.equal(out.read([name])[name] != 0, source.read([name])[name] != 0)


def test_products_in_16_bits_train_weights_of_32(make_llama, row_file, tmp_path):
    """Much like those in 32, with steps that weights of 16 bits would not feel."""
    make_llama(tmp_path / "dense", dtype=torch.float32)
    words = {"calibration": str(row_file)}
    source = prune(PruneConfig(**words), str(tmp_path / "dense"), tmp_path / "pruned").out
    folders = {}
    for precision in ("no", "bf16"):
        config = replace(SHORT, data=str(row_file), lr=1e-5, mixed_precision=precision)
        folders[precision] = recover(config, str(source), tmp_path / precision).out
    before, *after = (Checkpoint.open(path) for path in (source, *folders.values()))
    for name in linear(before):
        first, whole, half = (c.read([name])[name] for c in (before, *after))
        assert half.dtype == torch.float32
        moved = (half - first)[half != 0]
        assert 0 < moved.abs().max() < first.abs().max() * torch.finfo(torch.bfloat16).eps
        # Signs of what Adam's first steps move by, where the gradient is not next to nothing.
        assert (moved.sign() == (whole - first)[half != 0].sign()).float().mean() > 0.9
    logs = [[json.loads(x) for x in (f / LOG).read_text().splitlines()] for f in folders.values()]
    for whole, half in zip(*logs, strict=True):
        assert half["loss"] != whole["loss"]
        assert half["loss"] == pytest.approx(whole["loss"], rel=2e-3)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2"])
def test_a_teacher_in_16_bits_keeps_its_buffers(family, row_file, tmp_path, name):
    """Rotary frequencies of 8 bits would place far tokens elsewhere."""
    config = replace(SHORT, data=str(row_file), mixed_precision="bf16")
    teachers = []
    for one in (replace(config, mixed_precision="no"), config):
        job = prepare_recover(one, str(family(name)), tmp_path / "out")
        teachers.append(stage.load_teacher(job, Processes()))
    whole, half = teachers
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    buffers = dict(half.named_buffers())
    for key, wanted in whole.named_buffers():
        assert buffers[key].dtype == wanted.dtype, key
        assert torch.equal(buffers[key], wanted), key
    tied = [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in teachers]
    assert tied[0] == tied[1]


def test_in_mixed_precision_both_models_multiply_in_16_bits(pruned, tmp_path, monkeypatch):
    """The teacher holds its weights so; of the student they, and what is measured, stay float32."""
    losses, measure, seen = training.model_losses, trainloss.model_losses, []

    def spy(student, teacher, tokens, **words):
        seen.append(("step", student.dtype, teacher.dtype, words["products"]))
        return losses(student, teacher, tokens, **words)

    def measured(student, teacher, tokens, **words):
        seen.append(("measure", words.get("products", torch.float32)))
        return measure(student, teacher, tokens, **words)

    monkeypatch.setattr(training, "model_losses", spy)
    monkeypatch.setattr(trainloss, "model_losses", measured)
    config = replace(SHORT, mixed_precision="bf16", eval_every=6)
    recover(config, str(pruned), tmp_path / "out")
    assert set(seen) == {
        ("step", torch.float32, torch.bfloat16, torch.bfloat16),
        ("measure", torch.float32),
    }


def test_flips_are_the_difference_of_the_masks(pruned, tmp_path):
    """Of two sparse models on disk, entry by entry, against what the history tells."""
    found = recover(replace(SHORT, lr=1e-2), str(pruned), tmp_path / "out")
    source, out = Checkpoint.open(pruned), Checkpoint.open(found.out)
    for row in found.entry.to_json()["weights"]:
        before, after = (c.read([row["name"]])[row["name"]] != 0 for c in (source, out))
        assert row["flipped"] == int((before ^ after).sum())
    last = json.loads((found.out / LOG).read_text().splitlines()[-1])
    assert last["flipped"] == sum(row["flipped"] for row in found.entry.to_json()["weights"]) > 0


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


def test_masks_that_differ_between_whole_models_stop_the_run(monkeypatch):
    """Whole models are compared; shards differ between processes."""
    monkeypatch.setattr(Processes, "gather", lambda self, value: [value, "another"])
    optimizer = SimpleNamespace(fingerprint=lambda: "one")
    two = SimpleNamespace(processes=Processes(size=2), optimizer=optimizer)
    with refused("processes-differ", "masks", kind=NumericalError):
        stage._require_same_masks(two)
    stage._require_same_masks(
        SimpleNamespace(processes=Processes(size=2, shards=True), optimizer=optimizer)
    )
    stage._require_same_masks(SimpleNamespace(processes=Processes(), optimizer=optimizer))


def test_text_of_the_teachers_own_needs_no_data(pruned, tmp_path):
    found = recover(replace(SHORT, data="self", tokens=64), str(pruned), tmp_path / "out")
    assert found.entry.text == "self"
    assert verify(str(found.out))["zeros"] == 9216


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", ["fixed", "ast"])
@pytest.mark.parametrize(
    "words",
    [
        {"pattern": "50%"},
        {"pattern": "50%/tensor", "method": "sparsegpt"},
        {"pattern": "60%", "allocate": "owl"},
        {"pattern": "1:4", "skip": ["down_proj", "layers.0.self_attn.*"]},
    ],
)
def test_what_pruning_gave_each_weight_stays_as_it_was(family, row_file, tmp_path, method, words):
    """Every pattern, a share of its own for each block, and what was left dense."""
    calibration = str(row_file)
    config = PruneConfig(calibration=calibration, **words)
    sparse = prune(config, str(family("llama")), tmp_path / "sparse").out
    found = recover(replace(SHORT, method=method, lr=1e-2), str(sparse), tmp_path / "out")
    before, after = Checkpoint.open(sparse), Checkpoint.open(found.out)
    verify(str(found.out))
    for name in linear(before):
        counts = [int((c.read([name])[name] == 0).sum()) for c in (before, after)]
        assert counts[0] == counts[1], name
    left = {row["name"] for row in found.entry.to_json()["skipped"]}
    assert left == {n for n in linear(before) if not (before.read([n])[n] == 0).any()}


def test_what_is_dense_in_a_sparse_model_without_history_is_skipped(family, row_file, tmp_path):
    config = PruneConfig(calibration=str(row_file), skip=["down_proj"])
    sparse = prune(config, str(family("llama")), tmp_path / "sparse").out
    (sparse / "sparsekit.json").unlink()
    told = replace(SHORT, method="fixed", teacher=str(family("llama")))
    with refused("not-this-pattern", "2:4", "down_proj", "--skip", kind=UsageError):
        recover(told, str(sparse), tmp_path / "out")
    found = recover(replace(told, skip=["down_proj"]), str(sparse), tmp_path / "out")
    assert {row["reason"] for row in found.entry.to_json()["skipped"]} == {"--skip down_proj"}
    out = Checkpoint.open(found.out)
    for name in linear(out):
        zeros = (out.read([name])[name] == 0).float().mean()
        assert zeros == (0 if "down_proj" in name else 0.5), name


def test_to_skip_what_is_sparse_is_refused(pruned, tmp_path):
    with refused("would-fill-zeros", "--skip q_proj", "2:4", kind=UsageError):
        recover(replace(SHORT, skip=["q_proj"]), str(pruned), tmp_path / "out")
    with refused("no-match", "'q_porj'", kind=UsageError):
        recover(replace(SHORT, skip=["q_porj"]), str(pruned), tmp_path / "out")


def test_recomputing_activations_changes_nothing(family, tmp_path, monkeypatch):
    """The same selections and bytes with activation checkpointing."""
    config, prints, passes = replace(SHORT, lr=1e-2), [], []

    def counted(recomputes):
        def run(self, step):
            if recomputes:
                self.student.train()  # transformers recomputes in this mode only
                self.student.gradient_checkpointing_enable()
            calls, layer = [], self.student.model.layers[0].mlp.up_proj
            hook = layer.register_forward_hook(lambda *_: calls.append(1))
            found = gradients(self, step)
            hook.remove()
            passes.append(len(calls))
            return found

        return run

    gradients = training.Training.gradients
    for number in range(2):
        monkeypatch.setattr(training.Training, "gradients", counted(bool(number)))
        found = recover(config, str(family("llama")), tmp_path / str(number))
        prints.append(Checkpoint.open(found.out).fingerprint)
        assert any(row["flipped"] for row in found.entry.to_json()["weights"])
    assert passes == [1] * (len(passes) // 2) + [2] * (len(passes) // 2)
    assert prints[0] == prints[1]


def test_the_card_names_the_log_and_what_was_left_out(family, pruned, tmp_path):
    cast = recover(CAST, str(family("llama")), tmp_path / "cast")
    fixed = recover(replace(SHORT, method="fixed"), str(pruned), tmp_path / "fixed")
    cards = [(found.out / "README.md").read_text() for found in (cast, fixed)]
    for found, card in zip((cast, fixed), cards, strict=True):
        assert f"`{LOG}`" in card
        assert (found.out / LOG).is_file()
    moved = cast.entry.finished.moved
    assert f"by leaving out what is off the masks | {moved:.2%} |" in cards[0]
    assert f"| decay | {cast.entry.plan.decay:.3g} |" in cards[0]
    assert "spans=" in cards[0]
    # What a method does not do has no row.
    assert "off the masks" not in cards[1]
    assert "| - |" not in cards[1]
    assert "spans" not in cards[1]


@pytest.mark.parametrize("method", ["fixed", "ast"])
def test_by_activation_a_dense_model_begins_with_the_mask_of_wanda(family, tmp_path, method):
    """With a rate of next to nothing nothing flips: the mask is that of |w| times input norm."""
    config = replace(SHORT, method=method, metric="activation", lr=1e-12, tokens=256, save_every=3)
    model = str(family("llama"))
    found = recover(config, model, tmp_path / "out")
    assert sum(row["flipped"] for row in found.entry.to_json()["weights"]) == 0
    source, out = Checkpoint.open(family("llama")), Checkpoint.open(found.out)
    rows = config.corpus(256).rows(source, source).take(0, 16)
    loaded = sparsekit.load(family("llama"), "float32")
    seen = []
    layer = loaded.model.layers[1].mlp.up_proj
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        loaded(input_ids=rows)
    norms = torch.cat(seen).flatten(0, 1).norm(dim=0)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = source.read([name])[name].float()
    mask = out.read([name])[name] != 0
    assert torch.equal(mask, Pattern.parse("2:4").mask(weight.abs() * norms))
    assert not torch.equal(mask, Pattern.parse("2:4").mask(weight.abs()))


def test_cast_makes_a_dense_model_sparse_without_a_jump(family, tmp_path):
    config = replace(CAST, eval_every=50)
    found = recover(config, str(family("llama")), tmp_path / "out")
    assert verify(str(found.out))["pattern"] == ["2:4"]
    assert found.entry.finished.moved < 5e-3
    log = [json.loads(line) for line in (found.out / LOG).read_text().splitlines()]
    shares = [row["sparsity"] for row in log if "perplexity" in row and row["step"]]
    assert shares[-1] > 0.99
    assert shares == sorted(shares)


def test_a_dense_model_is_sparse_from_the_first_step_of_fixed(family, tmp_path):
    found = recover(replace(SHORT, method="fixed"), str(family("llama")), tmp_path / "out")
    assert verify(str(found.out))["pattern"] == ["2:4"]
    dense = Checkpoint.open(family("llama"))
    name = "model.layers.0.mlp.up_proj.weight"
    wanted = Pattern.parse("2:4").mask(dense.read([name])[name].abs())
    assert torch.equal(Checkpoint.open(found.out).read([name])[name] != 0, wanted)


def test_training_lowers_the_divergence_from_the_teacher(pruned, tmp_path):
    config = replace(SHORT, tokens=6400, kl_weight=1.0)
    out = recover(config, str(pruned), tmp_path / "out").out
    log = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    assert len(log) == 200
    first, last = (sum(r["divergence"] for r in part) for part in (log[:20], log[-20:]))
    assert last < 0.9 * first


@pytest.mark.sampled(5)
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma3", "qwen2", "llama_tied", "llama_sharded"])
def test_families_are_trained_and_load_again(family, row_file, tmp_path, name, precision):
    from transformers import AutoModelForCausalLM

    config = PruneConfig(calibration=str(row_file))
    sparse = prune(config, str(family(name)), tmp_path / "sparse").out
    told = replace(SHORT, data=str(row_file), tokens=96, mixed_precision=precision)
    found = recover(told, str(sparse), tmp_path / "out")
    verify(str(found.out))
    _, report = AutoModelForCausalLM.from_pretrained(found.out, output_loading_info=True)
    assert not report["missing_keys"]
    assert Checkpoint.open(found.out).layout == Checkpoint.open(sparse).layout


@pytest.mark.parametrize(
    ("method", "name"),
    [("fixed", "llama_tied"), ("ast", "llama_tied"), ("cast", "llama_tied"), ("cast", "gpt2")],
)
def test_what_is_on_disk_computes_what_the_trained_model_did(
    family, row_file, rows, tmp_path, method, name, monkeypatch
):
    """A10 and C10, to the bit: the removal of what is hidden, and the way to a float32 disk."""
    unsettled(monkeypatch)
    states, finish = [], stage.finish

    def spy(trained, progress):
        states.append(hidden_states(trained.student, rows))
        found = finish(trained, progress)
        states.append(hidden_states(trained.student, rows))
        return found

    monkeypatch.setattr(stage, "finish", spy)
    options = {"decay": "1e-2"} if method == "cast" else {}
    config = replace(SHORT, method=method, option=options, data=str(row_file), lr=4e-2)
    out = recover(config, str(family(name)), tmp_path / "out").out
    before, after = states
    assert torch.equal(before, after) == (method != "cast")
    assert torch.equal(hidden_states(sparsekit.load(out), rows), after)


@pytest.mark.parametrize("method", ["fixed", "ast"])
def test_the_model_that_was_measured_is_the_one_on_disk(family, row_file, tmp_path, method):
    """Applying the mask changes no output, up to rounding to the stored dtype."""
    config = replace(
        SHORT, method=method, data=str(row_file), eval_every=12, eval_text=str(row_file)
    )
    out = recover(config, str(family("llama_tied")), tmp_path / "out").out  # float32 on disk
    last = json.loads((out / LOG).read_text().splitlines()[-1])
    (score,) = evaluate(EvalConfig(text=str(row_file)), [str(out)])
    assert last["perplexity"] == pytest.approx(score.perplexity.value, rel=1e-5)


def test_cast_is_measured_without_what_is_off_its_mask(family, row_file, tmp_path, monkeypatch):
    """Before training the model equals the one that `fixed` starts from, not the dense one."""
    unsettled(monkeypatch)
    told = []
    for method, options in (("fixed", {}), ("cast", {"decay": "1e-2"})):
        config = replace(
            SHORT, method=method, option=options, lr=4e-2, eval_every=12, eval_text=str(row_file)
        )
        found = recover(config, str(family("llama")), tmp_path / method)
        told.append(found.entry.plan.perplexity)
    (dense,) = evaluate(EvalConfig(text=str(row_file)), [str(family("llama"))])
    assert told[1] == pytest.approx(told[0], rel=1e-6)
    assert abs(told[1] - dense.perplexity.value) > 1e-3 * told[1]


@pytest.mark.parametrize(
    ("method", "options"),
    [("fixed", {}), ("ast", {}), ("cast", {"spans": "2"}), ("cast", {"spans": "0"})],
)
def test_measuring_changes_no_bit(family, rows, tmp_path, monkeypatch, method, options):
    """Checked for the trained weight and for the parameter that the model computes with."""
    seen, real = [], trainloss.measure

    def spy(student, sparse, rule, windows):
        def state():
            own = {f"{n}.{k}": v for n, w in sparse.items() for k, v in (("w", w.weight),)}
            return {k: v.clone() for k, v in (student.state_dict() | own).items()}

        before = state()
        found = real(student, sparse, rule, windows)
        after = state()
        seen.append(all(torch.equal(before[name], after[name]) for name in before))
        return found

    unsettled(monkeypatch)
    monkeypatch.setattr(stage, "measure", spy)
    more = {"decay": "1e-2"} if method == "cast" else {}
    config = replace(SHORT, method=method, option=options | more, lr=4e-2, eval_every=4)
    recover(config, str(family("llama")), tmp_path / "out")
    assert seen == [True] * 3


@pytest.mark.slow
def test_evaluating_does_not_change_the_outcome(family, tmp_path):
    """The same for the method with a dense forward pass."""
    short = replace(CAST, tokens=6400)
    prints = []
    for every in (None, 40):
        out = tmp_path / str(every)
        config = replace(short, eval_every=every)
        prints.append(recover(config, str(family("llama")), out).out)
    first, second = (Checkpoint.open(path).fingerprint for path in prints)
    assert first == second


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


def test_both_of_two_tied_tensors_on_disk_stay_equal(copy_of, row_file, tmp_path):
    copy = copy_of("llama_tied")

    def clone(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    damaged(copy, clone)
    out = recover(replace(SHORT, data=str(row_file)), str(copy), tmp_path / "out").out
    verify(str(out))
    made = Checkpoint.open(out)
    both = made.read(["lm_head.weight", "model.embed_tokens.weight"])
    assert torch.equal(*both.values())


def test_a_second_training_has_the_teacher_of_the_first(family, pruned, tmp_path):
    """Also where the history begins with a training whose teacher was named."""
    first = recover(SHORT, str(family("llama")), tmp_path / "first").out
    second = recover(SHORT, str(first), tmp_path / "second")
    assert second.entry.teacher.path == str(family("llama"))


def test_a_length_beyond_the_models_maximum_counts_as_what_is_trained_on(pruned, tmp_path):
    config = replace(SHORT, length=512, tokens=1024, batch=1)  # the maximum is 256
    found = recover(config, str(pruned), tmp_path / "out")
    assert found.entry.plan.steps == 4
    assert found.entry.tokens == 1024


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


def test_selections_come_every_tenth_step_and_at_the_end(pruned, tmp_path):
    """Selections count optimizer steps, whatever the number of batches per step."""
    config = replace(SHORT, tokens=1600, batch=2, accumulate=2, lr=1e-2)
    out = recover(config, str(pruned), tmp_path / "out").out
    log = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    assert {row["step"] for row in log if row["flips"]} == {1, 11, 21, 25}


@pytest.mark.parametrize(
    ("method", "steps"),
    [("fixed", []), ("ast", [1, 11, 12, 12]), ("cast", [0, 10, 12])],
)
def test_masks_are_selected_in_the_loop_and_once_at_the_end(
    family, tmp_path, monkeypatch, method, steps
):
    """A mask is as old as its step: after it with a mask in the forward pass, before it without."""
    unsettled(monkeypatch)
    seen, refresh = [], MaskedAdam.refresh

    def spy(self):
        seen.append(self.steps)
        return refresh(self)

    monkeypatch.setattr(MaskedAdam, "refresh", spy)
    options = {"decay": "1e-2"} if method == "cast" else {}
    config = replace(SHORT, method=method, option=options, lr=4e-2)
    recover(config, str(family("llama")), tmp_path / "out")
    assert seen == steps


@pytest.mark.parametrize("method", ["ast", "cast"])
def test_masks_after_a_selection_are_those_of_the_weights(family, tmp_path, method):
    """Masks come from the saved state: before the selection they were different."""
    config = replace(CAST, method=method, lr=1e-3, schedule="constant", save_every=1)
    agreed = {}
    for step, more in ((10, 10), (11, 1)):
        with pytest.raises(KeyboardInterrupt):
            recover(config, str(family("llama")), tmp_path / "out", progress=StopsAt(more))
        state = load_file(tmp_path / f"out.partial/.sparsekit-state-{step}-0.saved")
        same = []
        for name in [key.removesuffix(".mask") for key in state if key.endswith(".mask")]:
            weight = state[f"{name}.weight"]
            mask = unpack_bits(state[f"{name}.mask"], weight.shape[1]).bool()
            same.append((mask == Pattern.parse("2:4").mask(weight.abs())).flatten())
        agreed[step] = torch.cat(same).float().mean().item()
    assert agreed[10] < 0.96
    assert agreed[11] > 0.995


@pytest.mark.parametrize("accumulate", [1, 3])
def test_decay_sees_the_share_of_the_steps_that_are_done(pruned, tmp_path, monkeypatch, accumulate):
    """In the training loop: 0 at the first step, never 1; steps count, not batches."""
    seen = []
    step = MaskedAdam.step

    def spy(self, rate, done):
        seen.append(done)
        return step(self, rate, done)

    monkeypatch.setattr(MaskedAdam, "step", spy)
    config = replace(SHORT, method="fixed", accumulate=accumulate, tokens=384 * accumulate)
    recover(config, str(pruned), tmp_path / "out")
    assert seen == [n / 12 for n in range(12)]


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


def test_accumulated_batches_are_one_large_batch(family, tmp_path):
    """Same tokens per step, same decay."""
    logs = []
    for batch, accumulate in ((4, 1), (1, 4)):
        out = tmp_path / str(batch)
        config = replace(SHORT, tokens=768, batch=batch, accumulate=accumulate)
        recover(config, str(family("llama")), out)
        logs.append([json.loads(line) for line in (out / LOG).read_text().splitlines()])
    for one, four in zip(*logs, strict=True):
        assert one["loss"] == pytest.approx(four["loss"], rel=1e-5)
        assert one["norm"] == pytest.approx(four["norm"], rel=1e-4)


def test_gradients_of_accumulated_batches_are_those_of_one(family, tmp_path, monkeypatch):
    """Every entry is equal after the first step."""
    found, gradients = [], training.Training.gradients

    def spy(self, step):
        means = gradients(self, step)
        if self.plan.rate and not step:
            found.append({n: p.grad.clone() for n, p in self.student.named_parameters()})
        return means

    monkeypatch.setattr(training.Training, "gradients", spy)
    for batch, accumulate in ((4, 1), (1, 4)):
        config = replace(SHORT, method="fixed", tokens=64, batch=batch, accumulate=accumulate)
        recover(config, str(family("llama")), tmp_path / str(batch))
    one, four = found
    for name, gradient in one.items():
        torch.testing.assert_close(four[name], gradient, rtol=1e-5, atol=1e-7)


def test_teacher_is_the_dense_parent_and_is_not_touched(pruned, family, tmp_path, monkeypatch):
    seen = []
    losses = training.model_losses

    def spy(student, teacher, *args, **options):
        seen.append(teacher)
        return losses(student, teacher, *args, **options)

    monkeypatch.setattr(training, "model_losses", spy)
    found = recover(SHORT, str(pruned), tmp_path / "out")
    assert found.entry.teacher.path == str(family("llama"))
    (teacher,) = set(seen)
    assert not teacher.training
    dense = Checkpoint.open(family("llama"))
    for name, tensor in dense.read(dense.places).items():
        assert torch.equal(teacher.state_dict()[name], tensor.float())


def test_without_divergence_no_teacher_is_needed(copy_of, row_file, tmp_path):
    dense = copy_of("llama")
    config = PruneConfig(calibration=str(row_file))
    sparse = prune(config, str(dense), tmp_path / "sparse").out
    dense.rename(tmp_path / "elsewhere")
    found = recover(replace(SHORT, kl_weight=0.0), str(sparse), tmp_path / "out")
    assert found.entry.plan.share == 0
    assert found.entry.teacher is None


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


def test_the_dense_model_that_was_trained_without_a_teacher_may_teach_later(family, tmp_path):
    first = recover(replace(SHORT, kl_weight=0.0), str(family("llama")), tmp_path / "first").out
    second = recover(SHORT, str(first), tmp_path / "second")
    assert second.entry.teacher.path == str(family("llama"))


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


def test_cast_without_scales_settles_too(family, tmp_path):
    config = replace(CAST, option={"decay": "1e-2", "spans": "0"})
    found = recover(config, str(family("llama")), tmp_path / "out")
    assert found.entry.finished.moved < 5e-3
    assert verify(str(found.out))["pattern"] == ["2:4"]


def test_cast_with_a_weak_decay_is_told_which_one_would_do(family, tmp_path):
    config = replace(CAST, option={"decay": "1e-9"})
    with refused("decay-too-weak", "leave out -O decay", kind=UsageError):
        recover(config, str(family("llama")), tmp_path / "out")


def test_cast_that_has_not_settled_is_not_shipped(pruned, tmp_path):
    with refused("decay-unfinished", "--tokens", kind=CheckFailedError):
        recover(replace(CAST, tokens=128, lr=1e-2), str(pruned), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_cast_that_has_not_quite_settled_is_noted(pruned, tmp_path, monkeypatch):
    unsettled(monkeypatch)
    notes = Notes()
    config = replace(CAST, tokens=384, lr=1e-3)
    found = recover(config, str(pruned), tmp_path / "out", progress=notes)
    assert found.entry.finished.moved > trainwrite.SETTLED
    assert any("the decay has not quite finished" in note for note in notes.told)
    assert verify(str(found.out))["zeros"] == 9216


def test_strength_of_ast_pulls_a_mean_entry_as_much_as_the_gradient(pruned, tmp_path):
    plan = recover(SHORT, str(pruned), tmp_path / "out").entry.to_json()["plan"]
    source = Checkpoint.open(pruned)
    values = torch.cat([source.read([n])[n].float().flatten() for n in linear(source)])
    mean = values[values != 0].abs().mean().item()
    assert plan["decay"] * mean == pytest.approx(plan["masked_gradient"], rel=1e-5)


def test_strength_of_cast_is_the_size_of_the_gradients(family, tmp_path, monkeypatch):
    unsettled(monkeypatch)
    config = replace(CAST, option={}, tokens=3200, lr=1e-2)
    plan = recover(config, str(family("llama")), tmp_path / "out").entry.to_json()["plan"]
    assert plan["decay"] == plan["masked_gradient"] > 0


def damaged(folder, change):
    """A copy's weights, changed, without the history that would tell of it."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})
    (folder / "sparsekit.json").unlink(missing_ok=True)


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


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("form", ["dense", "factored"])
def test_branches_are_kept_as_factors(family, row_file, tmp_path, name, form):
    """SLoRB: the product of the factors is what the training model computed with."""
    config = replace(
        SHORT,
        data=str(row_file),
        tokens=96,
        slorb=16,
        format=form,
        eval_every=3,
        eval_text=str(row_file),
    )
    notes = Notes()
    found = recover(config, str(family(name)), tmp_path / "out", progress=notes)
    assert any("cannot be folded" in note for note in notes.told)
    assert verify(str(found.out))["zeros"] == found.entry.totals.zeros
    assert found.entry.totals.sparsity == 0.5
    assert found.entry.totals.bits_per_weight > 0
    made = Checkpoint.open(found.out)
    assert made.kind is (Kind.FACTORED if form == "factored" else Kind.PRODUCTS)
    last = json.loads((found.out / LOG).read_text().splitlines()[-1])
    (score,) = evaluate(EvalConfig(text=str(row_file)), [str(found.out)])
    assert score.perplexity.value == pytest.approx(last["perplexity"], rel=0.02)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_branches_multiply_in_16_bits_too(family, row_file, tmp_path, name):
    losses = []
    for precision in ("no", "bf16"):
        config = replace(SHORT, data=str(row_file), tokens=96, slorb=16, mixed_precision=precision)
        out = recover(config, str(family(name)), tmp_path / precision).out
        assert verify(str(out))["zeros"] > 0
        losses.append([json.loads(row)["loss"] for row in (out / LOG).read_text().splitlines()])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_branches_go_on_after_an_interruption_to_the_same_bytes(family, tmp_path):
    config = replace(SHORT, slorb=16, save_every=3)
    whole = recover(config, str(family("llama")), tmp_path / "whole").out
    with pytest.raises(KeyboardInterrupt):
        recover(config, str(family("llama")), tmp_path / "again", progress=StopsAt(7))
    again = recover(config, str(family("llama")), tmp_path / "again").out
    assert Checkpoint.open(whole).fingerprint == Checkpoint.open(again).fingerprint


def test_a_branch_beside_a_pruned_weight_makes_up_for_what_it_lost(pruned, tmp_path):
    """Before the first step the sparse model with branches is closer to its parent."""
    logs = []
    for slorb in (None, 8):
        out = tmp_path / str(slorb)
        recover(replace(SHORT, slorb=slorb, kl_weight=1.0), str(pruned), out)
        logs.append(json.loads((out / LOG).read_text().splitlines()[0])["divergence"])
    assert logs[1] < logs[0]


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        ({"slorb": 24}, "slorb-does-not-divide", ("--slorb 24", "32 inputs")),
        ({"slorb": 16, "method": "cast"}, "conflicting-options", ("--slorb", "cast")),
        ({"format": "factored"}, "no-effect", ("--format factored", "--slorb")),
        ({"slorb": 0}, "out-of-range", ("--slorb", "1")),
    ],
)
def test_branches_that_cannot_be_are_refused(pruned, tmp_path, change, code, named):
    with refused(code, *named, kind=UsageError):
        recover(replace(SHORT, **change), str(pruned), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        ({"method": "asst"}, "no-method", ("'asst'", "'ast'")),
        ({"teacher": "dense", "kl_weight": 0.0}, "no-effect", ("--teacher", "--kl-weight 0")),
        ({"schedule": "cosin"}, "not-a-choice", ("--schedule 'cosin'", "'cosine'")),
        ({"dtype": "bfloat16"}, "not-a-choice", ("--dtype bfloat16", "--mixed-precision bf16")),
        ({"mixed_precision": "bf61"}, "not-a-choice", ("--mixed-precision 'bf61'", "no, bf16")),
        ({"tokens": None}, "tokens-or-max-time", ("--tokens", "--max-time")),
        ({"max_time": "9s"}, "tokens-or-max-time", ("--tokens", "--max-time", "not both")),
        (
            {"tokens": None, "max_time": "9s", "data": "self"},
            "missing-option",
            ("--data self", "--tokens"),
        ),
        ({"tokens": 31}, "too-few-tokens", ("--tokens 31", "32")),
        ({"batch": 0}, "out-of-range", ("--batch", "1")),
        ({"lr": -1.0}, "out-of-range", ("--lr", "-1")),
        ({"kl_weight": 1.5}, "out-of-range", ("--kl-weight", "1.5")),
        ({"metric": "activations"}, "not-a-choice", ("--metric 'activations'", "magnitude")),
        ({"temperature": 0.0}, "out-of-range", ("--temperature", "100")),
        ({"option": {"decai": "1"}}, "no-option", ("'decai'", "'decay'")),
        ({"eval_text": "builtin"}, "no-effect", ("--eval-text", "--eval-every")),
    ],
)
def test_wrong_words_are_refused_at_once(change, code, named):
    with refused(code, *named, kind=UsageError):
        replace(SHORT, **change)


@pytest.mark.parametrize(
    ("change", "match"), [({"data": "no.txt"}, "no.txt"), ({"pattern": "2;4"}, "2;4")]
)
def test_wrong_values_are_refused_at_once(change, match):
    with pytest.raises((UsageError, DataError), match=match):
        replace(SHORT, **change)


def test_a_metric_has_no_effect_on_a_mask_that_stays(pruned, tmp_path):
    config = replace(SHORT, method="fixed", metric="activation")
    with refused("no-effect", "--metric activation", pruned, kind=UsageError):
        recover(config, str(pruned), tmp_path / "out")


def test_rates_rise_stay_and_fall():
    steps = 200
    rates = {
        name: [rate_at(name, step, steps) for step in range(steps)]
        for name in ("flat", "cosine", "linear", "constant")
    }
    assert set(rates["constant"]) == {1.0}
    for name in ("flat", "cosine", "linear"):
        assert rates[name][0] == pytest.approx(1 / 8)  # 4 % of the steps rise
        assert rates[name][8] > 0.9
    assert rates["flat"][100] == rates["flat"][179] == 1.0
    assert rates["flat"][-1] == pytest.approx(1 / 20)
    assert rates["cosine"][-1] == pytest.approx(0.1, abs=1e-3)
    assert rates["linear"][100] == 0.5
