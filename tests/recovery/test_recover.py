"""Recovery from disk to disk: patterns, masks, models and measurements."""

import json
from types import SimpleNamespace

import pytest
import torch
from listeners import Notes, StopsAt
from refusals import refused
from safetensors.torch import load_file
from trainings import CAST, SHORT, damaged, linear, unsettled
from verbs import replace

import sparsekit
from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.errors import (
    CheckFailedError,
    NumericalError,
    UsageError,
)
from sparsekit.inspection.verify import verify
from sparsekit.model.full_model import hidden_states
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.prune import prune
from sparsekit.recovery import export as trainwrite
from sparsekit.recovery import loop as training
from sparsekit.recovery import loss as trainloss
from sparsekit.recovery import recover as stage
from sparsekit.recovery.distributed import Processes
from sparsekit.recovery.log import LOG
from sparsekit.recovery.optimizer import MaskedAdam
from sparsekit.recovery.prepare import prepare_recover
from sparsekit.recovery.recover import recover
from sparsekit.scoring.config import EvalConfig
from sparsekit.scoring.evaluate import evaluate
from sparsekit.weights.packed import unpack_bits
from sparsekit.weights.patterns import Pattern


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
    """To the bit: the removal of what is hidden, and the way to a float32 disk."""
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


def test_the_dense_model_that_was_trained_without_a_teacher_may_teach_later(family, tmp_path):
    first = recover(replace(SHORT, kl_weight=0.0), str(family("llama")), tmp_path / "first").out
    second = recover(SHORT, str(first), tmp_path / "second")
    assert second.entry.teacher.path == str(family("llama"))


def test_cast_without_scales_settles_too(family, tmp_path):
    config = replace(CAST, option={"decay": "1e-2", "spans": "0"})
    found = recover(config, str(family("llama")), tmp_path / "out")
    assert found.entry.finished.moved < 5e-3
    assert verify(str(found.out))["pattern"] == ["2:4"]


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
