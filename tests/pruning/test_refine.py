"""Refinements from disk to disk: after a pruner, or of a model that is sparse already."""

import json
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import refusals
import torch
from safetensors.torch import load_file, save_file

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.safetensors_file import TensorPlace
from sparsekit.errors import DataError, UsageError
from sparsekit.files import sha256_file
from sparsekit.inspection.verify import verify
from sparsekit.model.architecture import Target
from sparsekit.pipeline.selection import WeightPatterns
from sparsekit.provenance.entry import Report
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.dry_run import plan
from sparsekit.pruning.method_chain import MethodChain
from sparsekit.pruning.prune import prune
from sparsekit.solvers.input_stats import InputStats, Stats
from sparsekit.weights.patterns import Pattern

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DSNOT = {
    "cycles": "50",
    "threshold": "0.1",
    "units": "relative",
    "power": "1.0",
    "same_sign": "yes",
    "modules": "all",
}
PUBLISHED = {**DSNOT, "units": "sequence", "same_sign": "no", "modules": "attention"}


@pytest.fixture
def run(row_file, tmp_path):
    """Prunes a folder with the token rows of conftest.py; gives the report.

    DSnoT goes over all weights unless told otherwise; by default it leaves the MLP's alone.
    """

    def pruned(source: Path, name: str = "out", progress=None, **options) -> Report:
        options.setdefault("calibration", str(row_file))
        told = {"progress": progress} if progress else {}
        if "dsnot" in (options.get("method"), options.get("refine")) and "preset" not in options:
            options["option"] = {"modules": "all", **options.get("option", {})}
        return prune(PruneConfig(**options), str(source), tmp_path / name, **told)

    return pruned


@pytest.fixture
def sparse(family, row_file, tmp_path_factory):
    """Gives the tiny llama pruned by Wanda; the folder is the test's own."""

    def made(**options) -> Path:
        options.setdefault("calibration", str(row_file))
        out = tmp_path_factory.mktemp("sparse") / "sparse"
        return prune(PruneConfig(**options), str(family("llama")), out).out

    return made


class Recorder:
    """Keeps the notes; stops as Ctrl-C does after so many blocks."""

    def __init__(self, stop_after: int = 0) -> None:
        self.titles: list[str] = []
        self.notes: list[str] = []
        self.left = stop_after

    def begin(self, title: str, total: int) -> None:
        self.titles.append(title)

    def step(self, label: str) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)

    def end(self) -> None:
        pass


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def weight_hashes(folder: Path) -> dict[str, str]:
    return {file.name: sha256_file(file) for file in sorted(folder.glob("*.safetensors"))}


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "sparsekit.json").read_text())["history"]


def linears(name: str) -> bool:
    return name.split(".")[-2] in PROJECTIONS


def swapped(before: torch.Tensor, after: torch.Tensor) -> int:
    return int(((before == 0) & (after != 0)).sum())


def edit(folder: Path, change) -> Path:
    """Change the tensors of a folder; its history stays."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


# After a pruner


@pytest.mark.parametrize("initial", ["magnitude", "sparsegpt"])
def test_refining_a_method_is_the_refiner_that_begins_with_it(run, family, initial):
    one = run(family("llama"), "one", method="dsnot", initial=initial)
    two = run(family("llama"), "two", method=initial, refine="dsnot")
    alone = run(family("llama"), "alone", method=initial)
    assert weight_hashes(one.out) == weight_hashes(two.out) != weight_hashes(alone.out)
    assert one.entry.settings == two.entry.settings
    assert one.entry.settings.method == f"dsnot from {initial}"


def test_refiner_begins_with_its_own_choice_when_none_is_named(run, family):
    own, wanda = (
        run(family("llama"), name, method="dsnot", **given)
        for name, given in (("own", {}), ("wanda", {"initial": "wanda"}))
    )
    magnitude = run(family("llama"), "magnitude", method="dsnot", initial="magnitude")
    assert weight_hashes(own.out) == weight_hashes(wanda.out) != weight_hashes(magnitude.out)


def test_refinement_reads_calibration_rows_whatever_the_mask_comes_from():
    for options in ({"method": "magnitude"}, {"dense": "."}):
        rows = PruneConfig(refine="dsnot", **options).rows
        assert rows is not None
        assert rows.source == "builtin"


def test_refinement_without_a_method_goes_over_wanda(run, family):
    report = run(family("llama"), refine="dsnot")
    assert report.entry.settings.method == "dsnot from wanda"


@pytest.mark.parametrize("name", ["llama_sharded", "gpt2", "opt", "phi3"])
@pytest.mark.parametrize("text", ["2:4", "50%", "37.5%/tensor"])
def test_every_family_is_refined_to_exactly_the_pattern(run, family, name, text):
    report = run(family(name), method="dsnot", pattern=text)
    share = 0.375 if "tensor" in text else 0.5
    assert report.entry.totals.zeros == share * report.entry.totals.size > 0
    assert verify(str(report.out))["pattern"] == [text]
    assert sum(row["numbers"]["swaps"] for row in report.entry.to_json()["weights"]) > 0


def test_history_tells_both_methods_and_their_options(run, family):
    options = {"damping": "0.5", "cycles": "7", "units": "token"}
    report = run(family("llama"), method="sparsegpt", refine="dsnot", option=options)
    (entry,) = history(report.out)
    assert entry == report.entry.to_json()
    recipe = entry["settings"]
    assert recipe["method"] == "dsnot from sparsegpt"
    assert recipe["options"] == {**DSNOT, "cycles": "7", "units": "token"}
    assert recipe["initial_options"] == {"damping": "0.5", "block": "128"}
    assert recipe["mask"] is None
    assert all(row["numbers"].keys() == {"damping", "swaps"} for row in entry["weights"])
    assert {row["numbers"]["damping"] for row in entry["weights"]} == {0.5}


def test_preset_and_options_are_recorded_as_values(run, family):
    options = {"modules": "all"}
    report = run(family("llama"), method="dsnot", preset="published", option=options)
    assert report.entry.settings.options == {**PUBLISHED, "modules": "all"}


def test_attention_only_leaves_the_other_weights_to_the_initial_method(run, family):
    """Nothing is carried from block to block, so that both see the same inputs."""
    plain = run(family("llama"), "plain", method="sparsegpt", propagate=False)
    refined = run(
        family("llama"),
        "refined",
        method="sparsegpt",
        refine="dsnot",
        option={"modules": "attention"},
        propagate=False,
    )
    dense, before, after = map(tensors_in, (family("llama"), plain.out, refined.out))
    for name in filter(linears, dense):
        if "self_attn" in name:
            assert torch.equal(after[name], torch.where(after[name] != 0, dense[name], 0.0)), name
            assert not torch.equal(after[name], before[name])
        else:
            assert torch.equal(after[name], before[name]), name
    numbers = {row["name"]: row["numbers"] for row in refined.entry.to_json()["weights"]}
    assert all(("swaps" in numbers[name]) == ("self_attn" in name) for name in numbers)


def test_reconstruction_comes_after_the_refinement_and_keeps_its_mask(run, family):
    options = {"method": "dsnot", "propagate": False}
    plain = run(family("llama_tied"), "plain", **options)
    solved = run(family("llama_tied"), "solved", reconstruct="cg", **options)
    before, after = tensors_in(plain.out), tensors_in(solved.out)
    for name in filter(linears, before):
        assert torch.equal(before[name] != 0, after[name] != 0), name
    for old, new in zip(
        plain.entry.to_json()["weights"], solved.entry.to_json()["weights"], strict=True
    ):
        assert new["error"] < 0.9 * old["error"], new["name"]


@pytest.mark.parametrize(("text", "count"), [("2:4", 1), ("50%", 0)])
def test_caution_is_told_for_n_of_m_only(run, family, text, count):
    seen = Recorder()
    run(family("llama"), method="dsnot", pattern=text, progress=seen)
    assert [note for note in seen.notes if f"known to make {text} models worse" in note] == (
        seen.notes
    )
    assert len(seen.notes) == count
    assert seen.titles == [f"dsnot from wanda {text}"]


# A model that is sparse already


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "50%", "37%"])
def test_sparse_model_is_refined_with_all_counts_kept(run, family, sparse, text):
    given = sparse(pattern=text)
    report = run(given, refine="dsnot", dense=str(family("llama")))
    dense, before, after = map(tensors_in, (family("llama"), given, report.out))
    assert list(dense) == list(after)
    total = 0
    for name in dense:
        if not linears(name):
            assert torch.equal(after[name], dense[name]), name
            continue
        length = int(text[2]) if ":" in text else dense[name].shape[1]
        kept = [(w[name] != 0).unflatten(-1, (-1, length)).sum(-1) for w in (before, after)]
        assert torch.equal(*kept), name
        assert torch.equal(after[name], torch.where(after[name] != 0, dense[name], 0.0)), name
        total += swapped(before[name], after[name])
    assert total > 0


def test_swaps_are_those_of_each_weight(run, family, sparse):
    given = sparse(pattern="50%")
    report = run(given, refine="dsnot", dense=str(family("llama")))
    before, after = map(tensors_in, (given, report.out))
    for row in report.entry.to_json()["weights"]:
        found = swapped(before[row["name"]], after[row["name"]])
        assert row["numbers"]["swaps"] == found, row["name"]


def test_transposed_weights_of_a_sparse_model_are_refined_along_their_inputs(run, family):
    given = run(family("gpt2"), "sparse").out
    direct = run(family("gpt2"), "direct", method="dsnot", propagate=False)
    refined = run(given, "refined", refine="dsnot", dense=str(family("gpt2")), propagate=False)
    names = [
        name for name in tensors_in(given) if ".h.0." in f".{name}" and name.endswith("weight")
    ]
    one, two, before = map(tensors_in, (direct.out, refined.out, given))
    assert sum(swapped(before[name], one[name]) for name in names) > 0
    assert all(torch.equal(one[name], two[name]) for name in names)


def test_refined_sparse_model_equals_the_run_that_makes_its_mask_on_the_way(run, family, sparse):
    """Without propagation all blocks are the same bytes, with it only the first one.

    The first block has the inputs of the dense model in any case. The given mask of a later one
    was made from what Wanda left of the blocks before it, the mask that is made on the way from
    what DSnoT left.
    """
    dense = str(family("llama"))
    apart = run(sparse(propagate=False), "apart", refine="dsnot", dense=dense, propagate=False)
    direct = run(family("llama"), "direct", method="dsnot", initial="wanda", propagate=False)
    assert weight_hashes(apart.out) == weight_hashes(direct.out)
    apart = run(sparse(), "apart-through", refine="dsnot", dense=dense)
    direct = run(family("llama"), "direct-through", method="dsnot", initial="wanda")
    one, two = tensors_in(apart.out), tensors_in(direct.out)
    same = {name: torch.equal(one[name], two[name]) for name in filter(linears, one)}
    assert all(equal for name, equal in same.items() if ".0." in name)
    assert not all(equal for name, equal in same.items() if ".1." in name)


def test_method_may_name_the_refiner_of_a_sparse_model(run, family, sparse):
    given, dense = sparse(), str(family("llama"))
    one = run(given, "one", refine="dsnot", dense=dense)
    two = run(given, "two", method="dsnot", dense=dense)
    assert weight_hashes(one.out) == weight_hashes(two.out)
    assert one.entry.settings == two.entry.settings


def test_what_is_not_refined_stays_as_the_sparse_model_has_it(run, family, sparse):
    given = sparse(method="sparsegpt")
    report = run(given, method="dsnot", option={"modules": "attention"}, dense=str(family("llama")))
    dense, before, after = map(tensors_in, (family("llama"), given, report.out))
    for name in filter(linears, dense):
        if "self_attn" in name:
            assert torch.equal(after[name], torch.where(after[name] != 0, dense[name], 0.0)), name
        else:
            assert torch.equal(after[name], before[name]), name
            assert not torch.equal(before[name], torch.where(before[name] != 0, dense[name], 0.0))


def test_no_cycle_gives_the_sparse_model_back(run, family, sparse):
    given = sparse()
    report = run(given, refine="dsnot", option={"cycles": "0"}, dense=str(family("llama")))
    assert weight_hashes(report.out) == weight_hashes(given)


def test_pattern_is_the_last_one_of_the_history_unless_another_is_named(run, family, sparse):
    twice = run(sparse(pattern="50%"), "twice", pattern="1:4").out
    dense = str(family("llama"))
    report = run(twice, "own", refine="dsnot", dense=dense)
    assert report.entry.settings.pattern == "1:4"
    assert verify(str(report.out), "1:4")["pattern"] == "1:4"
    report = run(twice, "named", refine="dsnot", dense=dense, pattern="2:8")
    assert report.entry.settings.pattern == "2:8"


def test_history_names_the_given_mask_by_its_fingerprint(run, family, sparse):
    given, dense = sparse(), family("llama")
    report = run(given, refine="dsnot", dense=str(dense), option={"power": "0.5"})
    entry = history(report.out)[-1]
    assert entry == report.entry.to_json()
    recipe = entry["settings"]
    assert recipe["method"] == "dsnot from the given mask"
    assert recipe["mask"] == Checkpoint.open(given).scan() != Checkpoint.open(dense).scan()
    assert recipe["options"] == {**DSNOT, "power": "0.5"}
    assert "initial_options" not in recipe
    assert entry["source"] == {"path": str(dense), "fingerprint": Checkpoint.open(dense).scan()}


def test_report_tells_how_the_given_mask_was_made(run, family, sparse):
    given = sparse(method="ria", pattern="4:8")
    report = run(given, refine="dsnot", dense=str(family("llama")))
    mask = history(report.out)[-1]["mask"]
    assert mask.keys() == {"path", "fingerprint", "history"}
    assert mask["path"] == str(given)
    assert mask["fingerprint"] == Checkpoint.open(given).scan()
    (made,) = mask["history"]
    (known,) = history(given)
    assert made == {key: value for key, value in known.items() if key != "weights"}
    assert made["settings"]["method"] == "ria"


def test_no_mask_is_told_where_none_was_given(run, family):
    assert run(family("llama"), method="dsnot").entry.mask is None


def test_every_ancestor_of_a_sparse_model_is_its_dense_one(run, family, sparse):
    """Pruned twice, a model comes from the first dense one, and from what the first run left."""
    once = sparse(pattern="50%")
    twice = run(once, "twice", pattern="1:4").out
    outputs = [
        run(twice, name, refine="dsnot", dense=str(dense)).out
        for name, dense in (("first", family("llama")), ("second", once))
    ]
    dense, after, other = map(tensors_in, (once, outputs[1], outputs[0]))
    names = list(filter(linears, dense))
    for name in names:
        assert torch.equal(after[name], torch.where(after[name] != 0, dense[name], 0.0)), name
    assert any(not torch.equal(after[name], other[name]) for name in names)


def test_refusal_of_another_dense_model_names_all_ancestors(refused, run, family, copy_of, sparse):
    once = sparse(pattern="50%")
    twice = run(once, "twice", pattern="1:4").out
    other = edit(copy_of("llama"), lambda tensors: tensors["model.norm.weight"].add_(1))
    expected = refusals.refused("other-dense-model", "/llama", once)
    refused(expected, twice, refine="dsnot", dense=str(other))


@pytest.mark.parametrize("named", [True, False], ids=["with dense", "without dense"])
def test_note_says_how_to_refine_the_mask_of_a_model_that_is_pruned_already(
    run, family, sparse, named
):
    given, seen = sparse(), Recorder()
    options = {"refine": "dsnot", "dense": str(family("llama"))} if named else {"method": "dsnot"}
    run(given, progress=seen, **options)
    notes = [note for note in seen.notes if str(given) in note and "--dense" in note]
    assert len(notes) == (not named)


def test_output_of_a_refinement_can_be_refined_again(run, family, sparse):
    dense = str(family("llama"))
    once = run(sparse(), "once", refine="dsnot", option={"cycles": "1"}, dense=dense).out
    again = run(once, "again", refine="dsnot", option={"cycles": "1"}, dense=dense)
    before, after = tensors_in(once), tensors_in(again.out)
    assert sum(swapped(before[name], after[name]) for name in filter(linears, before)) > 0
    assert again.entry.settings.mask == Checkpoint.open(once).scan()


def test_sparse_model_without_a_history_needs_a_pattern_and_is_taken_with_a_note(
    run, family, sparse
):
    given, dense = sparse(), str(family("llama"))
    known = run(given, "known", refine="dsnot", dense=dense)
    (given / "sparsekit.json").unlink()
    seen = Recorder()
    unknown = run(given, "unknown", refine="dsnot", dense=dense, pattern="2:4", progress=seen)
    assert weight_hashes(unknown.out) == weight_hashes(known.out)
    (note,) = [note for note in seen.notes if "made from" in note]
    assert note == f"{given} does not say which model it was made from"


def test_weights_that_the_sparse_model_has_dense_are_skipped_again(run, family, sparse):
    given, dense = sparse(skip=["o_proj"]), family("llama")
    report = run(given, refine="dsnot", dense=str(dense), skip=["o_proj"])
    assert report.entry.totals.weights == 12
    whole, after = tensors_in(dense), tensors_in(report.out)
    same = [name for name in filter(linears, whole) if torch.equal(whole[name], after[name])]
    assert same == [f"model.layers.{i}.self_attn.o_proj.weight" for i in (0, 1)]


def test_sparse_model_may_lie_in_other_files_and_another_type(run, family, sparse, tmp_path):
    given, dense = sparse(), str(family("llama"))
    known = run(given, "known", refine="dsnot", dense=dense)
    other = shutil.copytree(given, tmp_path / "other", ignore=shutil.ignore_patterns("*.json"))
    shutil.copy(given / "config.json", other)
    tensors = {k: v.float() for k, v in load_file(other / "model.safetensors").items()}
    (other / "model.safetensors").unlink()
    half = len(tensors) // 2
    for part, names in enumerate((list(tensors)[:half], list(tensors)[half:])):
        file = f"model-{part + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, other / file, {"format": "pt"})
    places = {
        name: f"model-{1 + (i >= half):05}-of-00002.safetensors" for i, name in enumerate(tensors)
    }
    (other / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    report = run(other, "refined", refine="dsnot", dense=dense, pattern="2:4")
    assert weight_hashes(report.out) == weight_hashes(known.out)


# Going on after an interruption


@pytest.mark.parametrize("with_dense", [True, False], ids=["dense", "initial"])
def test_interrupted_refinement_goes_on_to_the_same_bytes(run, family, sparse, with_dense):
    source, options = family("llama"), {"method": "dsnot"}
    if with_dense:
        source, options = sparse(), {"refine": "dsnot", "dense": str(family("llama"))}
    whole = run(source, "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(source, progress=Recorder(stop_after=1), **options)
    seen = Recorder()
    report = run(source, progress=seen, **options)
    assert report.entry.resumed_blocks == 1
    assert any("going on after 1 finished blocks" in note for note in seen.notes)
    assert weight_hashes(report.out) == weight_hashes(whole.out)
    ours, theirs = (
        [{k: v for k, v in row.items() if k != "seconds"} for row in r.entry.to_json()["weights"]]
        for r in (report, whole)
    )
    assert ours == theirs


@pytest.mark.parametrize("change", ["mask", "options", "patterns", "refinement"])
def test_interrupted_refinement_does_not_go_on_with_another(run, family, sparse, change):
    given, dense = sparse(), str(family("llama"))
    options = {"refine": "dsnot", "dense": dense}
    with pytest.raises(KeyboardInterrupt):
        run(given, progress=Recorder(stop_after=1), **options)
    if change == "mask":
        given = sparse(method="magnitude", calibration=None)
    elif change == "options":
        options["option"] = {"cycles": "3"}
    elif change == "patterns":
        told = json.loads((given / "sparsekit.json").read_text())
        told["history"][-1]["weights"][-1]["pattern"] = "3:4"
        (given / "sparsekit.json").write_text(json.dumps(told))
    else:
        given, options = family("llama"), {"method": "dsnot"}
    with refusals.refused("other-recipe", "out.partial", kind=UsageError):
        run(given, **options)


# What is refused, before anything is written


@pytest.fixture
def refused(row_file, tmp_path):
    """Checks that a run is refused as expected, and that nothing is left of it."""

    def check(expected: AbstractContextManager, model: Path, **options) -> None:
        out = tmp_path / "refused"
        options.setdefault("calibration", str(row_file))
        with expected:
            prune(PruneConfig(**options), str(model), out)
        assert not out.exists()
        assert not out.with_name("refused.partial").exists()

    return check


@pytest.mark.parametrize("name", ["llama_deep", "opt"], ids=["shape", "family"])
def test_plan_refuses_another_dense_model_too(family, sparse, tmp_path, name):
    """Only headers are read for that."""
    given = sparse()
    config = PruneConfig(refine="dsnot", dense=str(family(name)))
    with refusals.refused("other-shape", ".weight", given, kind=DataError):
        plan(config, str(given), tmp_path / "planned")


def test_dry_run_refuses_a_dense_model_of_another_shape(cli, family, sparse, tmp_path):
    flags = ("--refine", "dsnot", "--dense", family("llama_deep"), "--dry-run")
    found = cli("prune", sparse(), "-o", tmp_path / "planned", *flags)
    assert found.code == 2
    assert "has the shape (32, 32)" in found.stderr


def test_dense_model_of_another_shape_is_refused(refused, family, sparse):
    named = "layers.0.self_attn.q_proj.weight", "(32, 32)", "sparse", "(64, 64)", "--dense"
    expected = refusals.refused("other-shape", *named, kind=DataError)
    refused(expected, sparse(), refine="dsnot", dense=str(family("llama_deep")))


def test_dense_model_of_another_family_is_refused(refused, family, sparse):
    named = "model.decoder.layers.0.", "is missing", "sparse"
    expected = refusals.refused("other-shape", *named, kind=DataError)
    refused(expected, sparse(), refine="dsnot", dense=str(family("opt")))


@pytest.mark.parametrize("what", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_dense_model_with_other_weights_is_refused(refused, family, copy_of, sparse, what):
    """Of the same shape, and different in one number: a fine-tuned copy, say."""

    def change(tensors):
        tensors[what].view(-1)[3] += 1

    other = edit(copy_of("llama"), change)
    expected = refusals.refused("other-dense-model", other, "/llama")
    refused(expected, sparse(), refine="dsnot", dense=str(other))


def test_sparse_model_without_a_history_and_a_pattern_is_refused(refused, family, sparse):
    given = sparse()
    (given / "sparsekit.json").unlink()
    expected = refusals.refused("no-history", given, "--pattern", kind=UsageError)
    refused(expected, given, refine="dsnot", dense=str(family("llama")))


def test_sparse_model_without_the_pattern_is_refused_by_name(refused, family, sparse):
    named = "sparse: model.layers.0.", "row 0", "2 zeros", "1:4", "--pattern", "--skip"
    expected = refusals.refused("not-this-pattern", *named, kind=DataError)
    given, dense = sparse(pattern="2:4"), str(family("llama"))
    refused(expected, given, refine="dsnot", dense=dense, pattern="1:4")


def test_sparse_model_that_has_a_weight_dense_is_refused_by_name(refused, family, sparse):
    named = "sparse: model.layers.0.self_attn.o_proj.weight: row 0", "2:4", "--skip"
    expected = refusals.refused("not-this-pattern", *named, kind=DataError)
    given = sparse(skip=["o_proj"])
    refused(expected, given, refine="dsnot", dense=str(family("llama")))


def test_dense_and_sparse_exchanged_are_refused(refused, family, sparse):
    named = "llama: model.layers.0.", "row 0", "0 zeros", "2:4", "--pattern"
    expected = refusals.refused("not-this-pattern", *named, kind=DataError)
    options = {"refine": "dsnot", "dense": str(sparse()), "pattern": "2:4"}
    refused(expected, family("llama"), **options)


def test_sparse_model_without_the_pattern_is_wrong_input(cli, family, sparse, row_file, tmp_path):
    """Exit code 2: 1 is for an output of ours that fails its check."""
    flags = ("--refine", "dsnot", "--dense", family("llama"), "--pattern", "1:4")
    found = cli("prune", sparse(), "-o", tmp_path / "out", "--calibration", row_file, *flags)
    assert found.code == 2
    assert "1:4 asks for 3" in found.stderr
    assert not (tmp_path / "out.partial").exists()


def test_sparse_model_that_is_not_finite_is_refused_by_name(refused, family, sparse):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[3] = float("nan")

    expected = refusals.refused("not-finite", "model.layers.1.mlp.up_proj.weight")
    given = edit(sparse(), change)
    refused(expected, given, refine="dsnot", dense=str(family("llama")))


@pytest.mark.parametrize("which", ["sparse", "dense"])
def test_output_may_not_replace_what_is_read(run, family, sparse, row_file, which):
    """Not even where both are outputs of sparsekit, which `--overwrite` may replace."""
    dense = run(family("llama"), "dense", method="magnitude", pattern="0%", calibration=None).out
    given = run(dense, "sparse").out
    out = given if which == "sparse" else dense
    before = weight_hashes(out)
    config = PruneConfig(refine="dsnot", dense=str(dense), calibration=str(row_file))
    with refusals.refused("output-is-source", kind=UsageError):
        prune(config, str(given), out, overwrite=True)
    assert weight_hashes(out) == before


SPARSE = {"refine": "dsnot", "dense": "."}


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        ({"dense": "."}, "missing-option", ("--dense", "--refine dsnot")),
        ({"dense": ".", "method": "wanda"}, "missing-option", ("--dense",)),
        ({**SPARSE, "method": "wanda"}, "conflicting-options", ("--dense", "wanda")),
        (
            {"dense": ".", "method": "dsnot", "initial": "ria"},
            "conflicting-options",
            ("--dense", "ria"),
        ),
        ({"initial": "ria"}, "no-effect", ("--initial", "--method", "dsnot")),
        ({"initial": "ria", "method": "wanda"}, "no-effect", ("--initial",)),
        ({"initial": "ria", "refine": "dsnot"}, "no-effect", ("--initial",)),
        ({"initial": "riaa", "method": "dsnot"}, "not-a-choice", ("--initial 'riaa'", "alps")),
        ({"initial": "dsnot", "method": "dsnot"}, "not-a-choice", ("--initial 'dsnot'",)),
        ({"refine": "dsnott"}, "not-a-choice", ("--refine 'dsnott'", "dsnot")),
        ({"refine": "wanda"}, "not-a-choice", ("--refine 'wanda'",)),
        ({"method": "dsnott"}, "no-method", ("'dsnott'", "'dsnot'")),
        (
            {"method": "dsnot", "option": {"cyles": "1"}},
            "no-option",
            ("dsnot", "wanda", "'cyles'", "'cycles'"),
        ),
        (
            {"method": "alps", "refine": "dsnot", "option": {"dampin": "1"}},
            "no-option",
            ("dsnot", "alps", "'dampin'", "'damping'"),
        ),
        (
            {"method": "dsnot", "option": {"damping": "1"}},
            "no-option",
            ("dsnot", "wanda", "'damping'"),
        ),
        ({**SPARSE, "option": {"cyles": "1"}}, "no-option", ("dsnot", "'cyles'", "'cycles'")),
        ({**SPARSE, "option": {"damping": "1"}}, "no-option", ("dsnot", "'damping'")),
        ({"option": {"cycles": "1"}}, "no-option", ("wanda", "'cycles'")),
        (
            {"method": "alps", "refine": "dsnot", "option": {"damping": "x"}},
            "not-a-number",
            ("damping of alps", "'x'"),
        ),
        (
            {"method": "dsnot", "option": {"cycles": "x"}},
            "not-a-number",
            ("cycles of dsnot", "'x'"),
        ),
        (
            {"method": "dsnot", "preset": "publishd"},
            "no-preset",
            ("dsnot", "'publishd'", "'published'"),
        ),
        ({**SPARSE, "preset": "paper"}, "no-preset", ("dsnot", "'paper'", "published")),
        ({"preset": "published"}, "no-effect", ("--preset",)),
        ({"preset": "published", "method": "wanda"}, "no-effect", ("--preset",)),
    ],
)
def test_wrong_combinations_are_refused_whatever_the_models_are(
    refused, tmp_path, options, code, named
):
    refused(refusals.refused(code, *named, kind=UsageError), tmp_path, **options)


# The plan and the command line


def test_plan_of_a_refinement_makes_the_counts_that_are_then_written(run, family, sparse, tmp_path):
    given, dense = sparse(pattern="1:4"), family("llama")
    config = PruneConfig(refine="dsnot", dense=str(dense), samples=2)
    found = plan(config, str(given), tmp_path / "planned")
    assert not (tmp_path / "planned").exists()
    report = run(given, refine="dsnot", dense=str(dense))
    assert (found["method"], found["pattern"]) == ("dsnot from the given mask", "1:4")
    assert found["zeros"] == report.entry.totals.zeros
    assert found["size"] == report.entry.totals.size


def test_command_line_refines_a_sparse_model(cli, run, family, sparse, row_file, tmp_path):
    given, dense = sparse(), family("llama")
    flags = ("--refine", "dsnot", "--dense", dense, "--preset", "published", "-O", "cycles=9")
    found = cli("prune", given, "-o", tmp_path / "typed", "--calibration", row_file, *flags)
    assert found.code == 0
    assert found.stdout == f"{tmp_path / 'typed'}\n"
    options = {"preset": "published", "option": {"cycles": "9"}}
    report = run(given, refine="dsnot", dense=str(dense), **options)
    assert weight_hashes(tmp_path / "typed") == weight_hashes(report.out)
    assert history(tmp_path / "typed")[-1]["settings"]["options"] == {**PUBLISHED, "cycles": "9"}


def test_command_line_begins_a_refiner_with_another_method(cli, run, family, row_file, tmp_path):
    flags = ("--method", "dsnot", "--initial", "ria", "-O", "dsnot.power=0", "-O", "modules=all")
    found = cli(
        "prune", family("llama"), "-o", tmp_path / "typed", "--calibration", row_file, *flags
    )
    assert found.code == 0
    recipe = history(tmp_path / "typed")[0]["settings"]
    assert recipe["method"] == "dsnot from ria"
    assert recipe["options"] == {**DSNOT, "power": "0.0"}


# Options of two methods


@pytest.mark.parametrize(
    ("method", "initial", "name", "value"),
    [("armor", "sparsegpt", "block", "8"), ("dsnot", "ria", "power", "0.5")],
)
def test_option_of_both_methods_must_name_its_own(method, initial, name, value):
    with refusals.refused("ambiguous-option", f"'{name}'", kind=UsageError) as error:
        PruneConfig(method=method, initial=initial, option={name: value})
    assert error.value.hint == f"write {method}.{name} or {initial}.{name}"
    for one, kind in ((method, "refiners"), (initial, "pruners")):
        named = PruneConfig(method=method, initial=initial, option={f"{one}.{name}": value})
        other = {"refiners": "pruners", "pruners": "refiners"}[kind]
        assert named.options_of(kind) == {name: value}
        assert named.options_of(other) == {}


def test_option_of_a_method_that_does_not_run_is_refused():
    with refusals.refused("no-option", "'alps'", "dsnot", "wanda", kind=UsageError):
        PruneConfig(method="dsnot", option={"alps.damping": "0.5"})


@pytest.mark.parametrize("key", ["dsnot.cycles", ".cycles"])
def test_option_given_twice_or_without_a_method_is_refused(key):
    options = {"cycles": "7", key: "9"} if key[0] == "d" else {key: "9"}
    code, named = ("given-twice", "'cycles'") if key[0] == "d" else ("no-option", "''")
    with refusals.refused(code, named, kind=UsageError):
        PruneConfig(method="dsnot", option=options)


def test_option_of_one_method_alone_reaches_it(run, family):
    options = {"option": {"sparsegpt.damping": "0.05", "cycles": "7"}}
    recipe = run(
        family("llama"), method="dsnot", initial="sparsegpt", **options
    ).entry.settings.to_json()
    assert recipe["initial_options"]["damping"] == "0.05"
    assert recipe["options"]["cycles"] == "7"


# What differs from weight to weight


def test_mask_made_with_owl_is_refined_block_by_block(run, family, sparse, tmp_path):
    given = sparse(pattern="60%", allocate="owl")
    rows = history(given)[-1]["weights"]
    assert len({row["pattern"] for row in rows}) == 2
    options = {"refine": "dsnot", "dense": str(family("llama"))}
    planned = plan(PruneConfig(**options), str(given), tmp_path / "planned")
    report = run(given, **options)
    assert planned["zeros"] == report.entry.totals.zeros == sum(r["zeros"] for r in rows)
    found = {row["name"]: row for row in report.entry.to_json()["weights"]}
    assert {row["name"]: (row["pattern"], row["zeros"]) for row in rows} == {
        name: (row["pattern"], row["zeros"]) for name, row in found.items()
    }
    before, after = tensors_in(given), tensors_in(report.out)
    assert sum(swapped(before[name], after[name]) for name in found) > 0
    assert verify(str(report.out))["weights"] == len(rows)


def test_weights_of_unlike_treatment_are_not_solved_as_one():
    """Attention and MLP of one block may read the same inputs (parallel blocks)."""
    names = ("attn.q.weight", "attn.k.weight", "mlp.up.weight")
    targets = [
        Target(name, name.removesuffix(".weight"), transposed=False, shape=(4, 8)) for name in names
    ]
    sums = dict.fromkeys(names, InputStats(8, Stats.MOMENTS))
    one = WeightPatterns(base=Pattern.parse("50%"))
    two = WeightPatterns(base=Pattern.parse("50%"), own={names[0]: Pattern.parse("60%")})

    places = {
        name: TensorPlace("file", dtype, (4, 8), 0, 0)
        for name, dtype in zip(names, (torch.float32, torch.bfloat16, torch.bfloat16), strict=True)
    }

    def sizes(patterns, **options):
        chain = MethodChain.build(PruneConfig(method="dsnot", initial="sparsegpt", **options), None)
        return [len(group) for group in chain.groups(targets, sums, patterns, places)]

    assert sizes(one) == [2, 1]
    assert sizes(one, option={"modules": "all"}) == [3]
    assert sizes(two, option={"modules": "all"}) == [1, 2]
    assert sizes(one, compensate="lowrank") == [1, 1, 1]
    assert sizes(one, option={"modules": "all"}, then="int8") == [1, 2]  # types of scales
