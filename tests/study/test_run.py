"""Runs of recipes: each step once, resumable, and never the wrong output."""

import contextlib
import json
import shutil
from collections import namedtuple

import pytest
from refusals import refused
from safetensors.torch import load_file, save_file

from sparsekit.checkpoint.folder import FACTORS
from sparsekit.errors import DamagedError, DataError, StorageError, UsageError
from sparsekit.files import sha256_file
from sparsekit.progress import Progress
from sparsekit.scoring.saved_scores import read_scores
from sparsekit.study import run as stage
from sparsekit.study import state as records
from sparsekit.study.recipe import parse
from sparsekit.study.run import run

TEXT = """
model: {model}
stages:
- prune: {{methods: [wanda, ria], calibration: {rows}}}
- eval: {{text: {rows}, baseline: model}}
- recover: {{method: fixed, tokens: 96, length: 16, lr: 1e-3, data: {rows}}}
- eval: {{text: {rows}, baseline: model}}
- pack
"""


@pytest.fixture
def recipe(family, row_file):
    return parse(TEXT.format(model=family("llama"), rows=row_file))


def weights(out):
    return {
        str(file.relative_to(out)): sha256_file(file) for file in sorted(out.rglob("*.safetensors"))
    }


def states(done):
    return [one.state for one in done]


def test_a_second_run_does_nothing_again(recipe, tmp_path, monkeypatch):
    out = tmp_path / "run"
    first = run(recipe, out)
    assert states(first) == ["made"] * 10
    before = weights(out)
    assert len(before) == 8  # of a packed model two
    for verb in ("prune", "recover", "pack"):
        monkeypatch.setitem(stage.WRITERS, verb, None)
    monkeypatch.setattr(stage, "evaluations", None)
    assert states(run(recipe, out)) == ["kept"] * 10
    assert weights(out) == before
    assert (out / "recipe.yaml").read_text() == recipe.text


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 3, 5, 8, 11])
def test_a_run_that_was_interrupted_goes_on_to_the_same_bytes(recipe, tmp_path, stop):
    class Stops(Progress):
        left = stop

        def begin(self, title, total, done=0):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    whole = tmp_path / "whole"
    run(recipe, whole)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "again", progress=Stops())
    run(recipe, tmp_path / "again")
    assert weights(tmp_path / "again") == weights(whole)
    scores = [
        {path.parent.name: path.read_text() for path in out.rglob("sparsekit-scores.json")}
        for out in (whole, tmp_path / "again")
    ]
    assert len(scores[0]) == 5
    figures = [
        {k: [e["perplexity"]["value"] for e in json.loads(v)["scores"]] for k, v in s.items()}
        for s in scores
    ]
    assert figures[0] == figures[1]


def test_a_kill_between_an_output_and_its_record_costs_nothing(recipe, tmp_path, monkeypatch):
    out, write, calls = tmp_path / "run", records.write_json, []

    def second_dies(path, value):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(records, "write_json", second_dies)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, out)
    assert (out / "wanda").is_dir()
    assert states(run(recipe, out)) == ["kept"] + ["made"] * 9


def test_the_scores_say_how_and_of_what_they_are(recipe, tmp_path, row_file):
    out = tmp_path / "run"
    run(recipe, out)
    for name in ("wanda", "wanda.fixed"):
        (entry,) = read_scores(out / name)
        assert entry.config["text"] == str(row_file)
        assert entry.baseline == recipe.model
        assert entry.difference["log_perplexity"].n == 5
    (dense,) = read_scores(out / "dense")
    assert dense.baseline is None


def test_scores_stay_with_their_model(recipe, tmp_path):
    """What is made of a model that was measured has not been measured."""
    out = tmp_path / "run"
    run(recipe, out)
    assert not read_scores(out / "wanda.fixed.pack")


def test_from_makes_a_stage_and_what_follows_again(recipe, tmp_path):
    out = tmp_path / "run"
    run(recipe, out)
    before = weights(out)
    again = run(recipe, out, start="recover")
    assert states(again) == ["kept"] * 4 + ["made"] * 6  # scores lie with their model
    assert weights(out) == before


def test_what_another_recipe_made_is_not_taken_after_a_kill(recipe, family, row_file, tmp_path):
    """`--from` with other words, killed before the old output was replaced."""

    class Stops(Progress):
        def begin(self, title, total, done=0):
            if "recover" in title:
                raise KeyboardInterrupt

    out = tmp_path / "run"
    run(recipe, out)
    before = weights(out)
    text = TEXT.format(model=family("llama"), rows=row_file).replace("lr: 1e-3", "lr: 2e-3")
    with pytest.raises(KeyboardInterrupt):
        run(parse(text), out, start="recover", progress=Stops())
    left = {name: told for name, told in weights(out).items() if ".partial" not in name}
    assert left == before
    with refused("other-recipe", "lr", "0.002", "0.001", kind=UsageError):
        run(recipe, out)
    with refused("other-recipe", "ria.fixed", kind=UsageError):
        run(parse(text), out)  # the other variant
    shutil.rmtree(out / "ria.fixed")
    shutil.rmtree(out / "ria.fixed.pack")
    shutil.rmtree(out / "wanda.fixed.pack")
    assert states(run(parse(text), out))[4:6] == ["made", "made"]
    whole = tmp_path / "whole"
    run(parse(text), whole)
    assert weights(out) == weights(whole)


def test_other_text_in_the_same_file_is_measured_again(recipe, row_file, family, tmp_path):
    rows = tmp_path / "rows.safetensors"
    shutil.copy(row_file, rows)
    text = TEXT.format(model=family("llama"), rows=row_file)
    small = parse(text.replace(f"eval: {{text: {row_file}", f"eval: {{text: {rows}"))
    run(small, tmp_path / "run")
    save_file({"tokens": load_file(rows)["tokens"].flip(1).contiguous()}, rows)
    assert states(run(small, tmp_path / "run"))[2:4] == ["made", "made"]


def test_each_variant_of_a_measurement_is_made(family, row_file, tmp_path):
    text = f"model: {family('llama')}\nstages:\n- prune: {{calibration: {row_file}}}\n"
    text += f"- eval: {{text: {row_file}, lengths: [8, 16], baseline: model}}\n"
    recipe = parse(text + f"- eval: {{text: {row_file}, baseline: model}}\n  from: model\n")
    assert states(run(recipe, tmp_path / "run")) == ["made"] * 4
    entries = read_scores(tmp_path / "run" / "wanda")
    assert [entry.perplexity.length for entry in entries] == [8, 16]
    dense = read_scores(tmp_path / "run" / "dense")
    assert sorted(entry.perplexity.length for entry in dense) == [8, 16, 24]
    assert states(run(recipe, tmp_path / "run")) == ["kept"] * 4


def test_from_a_measurement_measures_again(recipe, tmp_path):
    small = parse(recipe.text.partition("- recover")[0])
    run(small, tmp_path / "run")
    looked = run(small, tmp_path / "run", start="eval", dry=True)
    assert states(looked) == ["kept"] * 2 + ["to do"] * 2
    assert states(run(small, tmp_path / "run", start="eval")) == ["kept"] * 2 + ["made"] * 2


def test_from_a_step_leaves_its_siblings(recipe, tmp_path):
    run(recipe, tmp_path / "run")
    found = {one.step.name: one.state for one in run(recipe, tmp_path / "run", start="ria.fixed")}
    made = [name for name, state in found.items() if state == "made"]
    assert made == ["ria.fixed", "ria.fixed.pack"]


def test_from_does_not_replace_what_the_run_did_not_make(recipe, pruned, tmp_path):
    out = tmp_path / "run"
    run(recipe, out)
    (out / ".sparsekit-run" / "wanda.json").unlink()
    with refused("not-by-this-run", "wanda", kind=UsageError):
        run(recipe, out, start="prune")


def test_what_was_made_of_another_output_is_made_again(recipe, tmp_path, pruned):
    """A parent that a limit of time made other bytes of."""
    out = tmp_path / "run"
    run(recipe, out)
    shutil.rmtree(out / "ria.fixed")
    shutil.copytree(out / "wanda.fixed", out / "ria.fixed")
    file = out / ".sparsekit-run" / "ria.fixed.json"
    other = json.loads((out / ".sparsekit-run" / "wanda.fixed.json").read_text())
    told = json.loads(file.read_text()) | {"fingerprint": other["fingerprint"]}
    file.write_text(json.dumps(told))
    found = {one.folder.name: one.state for one in run(recipe, out) if one.step.verb != "eval"}
    assert (found["ria.fixed"], found["ria.fixed.pack"]) == ("kept", "made")


def test_another_configuration_of_the_model_is_another_recipe(copy_of, row_file, tmp_path):
    model = copy_of("llama")
    recipe = parse(TEXT.format(model=model, rows=row_file))
    run(recipe, tmp_path / "run")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with refused("other-recipe", "another model", kind=UsageError):
        run(recipe, tmp_path / "run")


@pytest.mark.parametrize("damage", ["{}", "[]", "no"])
def test_a_damaged_record_is_named(recipe, tmp_path, damage):
    run(recipe, tmp_path / "run")
    (tmp_path / "run" / ".sparsekit-run" / "wanda.json").write_text(damage)
    with pytest.raises(DataError, match=r"wanda\.json is (damaged|not valid JSON)"):
        run(recipe, tmp_path / "run")


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        (
            "- recover: {tokens: 96, length: 16}\n- quantize: {grid: int4-g24}\n",
            "groups of 24; grid: int4-g32 fits",
        ),
        ("- eval: {tasks: [no_such_task]}\n", "no_such_task"),
        ("- eval: {baseline: ./nowhere}\n", "nowhere"),
        ("- recover: {tokens: 96, length: 16, pattern: 3:7}\n", "groups of 7"),
    ],
)
def test_what_comes_late_is_refused_first(family, tmp_path, stages, told):
    text = f"model: {family('llama')}\nstages:\n- prune: {{method: magnitude}}\n  name: first\n"
    text += stages.replace("pattern: 3:7}\n", "pattern: 3:7}\n  from: model\n")
    with pytest.raises((UsageError, DataError), match=told):
        run(parse(text), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_from_needs_what_comes_before(recipe, tmp_path):
    with refused("unfinished-step", "--from pack", "wanda.fixed", kind=UsageError):
        run(recipe, tmp_path / "run", start="pack")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_tells_what_is_left_and_writes_nothing(recipe, tmp_path):
    out = tmp_path / "run"
    assert states(run(recipe, out, dry=True)) == ["to do"] * 10
    assert not out.exists()
    run(recipe, out)
    shutil.rmtree(out / "ria.fixed")
    assert states(run(recipe, out, dry=True)) == (
        ["kept"] * 5 + ["to do", "kept", "to do"] + ["kept"] * 2
    )


def test_a_dry_run_plans_each_step_whose_model_is_made_by_now(family, row_file, tmp_path):
    """A half-finished study: its pruning is done."""
    text = f"model: {family('llama')}\nstages:\n- prune: {{calibration: {row_file}}}\n"
    text += f"  name: p\n- recover: {{tokens: 96, length: 16, data: {row_file}}}\n  name: t\n"
    text += f"- quantize: {{grid: int4-g16, calibration: {row_file}}}\n  from: p\n"
    text += "- pack: {}\n  from: p\n- pack: {}\n  from: t\n"
    recipe, out = parse(text), tmp_path / "run"
    ahead = {one.step.name: one for one in run(recipe, out, dry=True)}
    assert [name for name, one in ahead.items() if one.plan] == ["p"]
    run(parse(text.partition("- recover")[0]), out)
    before = sorted(out.rglob("*"))
    plans = {one.step.name: one.plan for one in run(recipe, out, dry=True, timed=True)}
    assert sorted(out.rglob("*")) == before
    ready = ["p.t", "p.int4-g16", "p.pack"]
    assert [name for name, plan in plans.items() if plan] == ready
    for name in ready:
        assert plans[name]["model"] == str(out / "p")
        assert plans[name]["bytes_to_write"] > 0
    assert plans["p.t"]["peak_memory_at_least_bytes"] == ahead["p.t"].memory_ahead > 0
    assert plans["p.int4-g16"]["peak_memory_estimate_bytes"] == ahead["p.int4-g16"].memory_ahead > 0
    assert ahead["p.pack"].memory_ahead is None  # its size depends on what is sparse
    for name in ready[:2]:
        assert plans[name]["seconds_estimate"] > 0


def test_an_output_that_is_gone_is_made_again(recipe, tmp_path):
    out = tmp_path / "run"
    run(recipe, out)
    before = weights(out)
    shutil.rmtree(out / "ria.fixed")
    assert states(run(recipe, out))[4:6] == ["kept", "made"]
    assert weights(out) == before


def test_an_output_that_was_changed_by_hand_is_named(recipe, tmp_path):
    out = tmp_path / "run"
    run(recipe, out)
    shutil.rmtree(out / "wanda")
    shutil.copytree(out / "ria", out / "wanda")  # a whole checkpoint, but another
    with refused("fingerprint-mismatch", "run/wanda", "fingerprint", kind=DataError):
        run(recipe, out)
    file = out / "ria" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    shutil.rmtree(out / "wanda")
    with refused("fingerprint-mismatch", "ria", "--from ria", kind=DataError):
        run(recipe, out)
    assert states(run(recipe, out, start="ria"))[:2] == ["made", "made"]


def test_a_damaged_packed_output_is_named_and_made_again(recipe, tmp_path):
    out = tmp_path / "run"
    run(recipe, out)
    file = out / "ria.fixed.pack" / FACTORS
    whole = file.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-3]):
        file.write_bytes(damaged)
        with pytest.raises(DamagedError, match=r"make it again with --from ria\.fixed\.pack"):
            run(recipe, out)
        run(recipe, out, start="ria.fixed.pack")
        assert file.read_bytes() == whole


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_what_an_output_computes_hangs_on_is_not_changed_unseen(recipe, tmp_path, file):
    out = tmp_path / "run"
    run(recipe, out)
    told = json.loads((out / "wanda" / file).read_text())
    more = {"rms_norm_eps": 0.5} if file == "config.json" else {"add_bos_token": True}
    (out / "wanda" / file).write_text(json.dumps(told | more))
    with refused("fingerprint-mismatch", "run/wanda", kind=DataError) as error:
        run(recipe, out)
    assert "config.json and tokenizer back, or make it again with --from wanda" in error.value.hint
    found = {one.folder.name: one.state for one in run(recipe, out, start="wanda")}
    assert (found["wanda"], found["wanda.fixed"]) == ("made", "made")
    assert set(states(run(recipe, out))) == {"kept"}


def test_a_run_that_was_moved_is_kept(recipe, tmp_path):
    run(recipe, tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert states(run(recipe, tmp_path / "moved")) == ["kept"] * 10


def test_an_output_of_another_recipe_is_not_taken(recipe, family, row_file, tmp_path):
    out = tmp_path / "run"
    run(recipe, out)
    text = TEXT.format(model=family("llama"), rows=row_file)
    other = parse(text.replace("lr: 1e-3", "lr: 2e-3"))
    with refused("other-recipe", "wanda.fixed", "lr", "0.001", kind=UsageError):
        run(other, out)
    changed = parse(text.replace("[wanda, ria]", "[wanda, nowag]"))
    assert states(run(changed, out))[:2] == ["kept", "made"]  # what the two share is kept


def test_other_rows_in_the_same_file_are_another_recipe(family, row_file, tmp_path):
    rows = tmp_path / "rows.safetensors"
    shutil.copy(row_file, rows)
    recipe = parse(TEXT.format(model=family("llama"), rows=rows))
    run(recipe, tmp_path / "run")
    save_file({"tokens": load_file(rows)["tokens"].flip(0)}, rows)
    with refused("other-recipe", "calibration", kind=UsageError):
        run(recipe, tmp_path / "run")


def test_a_folder_that_is_no_run_is_left_alone(recipe, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with refused("not-a-run", "mine", kind=UsageError):
        run(recipe, tmp_path / "mine")
    (tmp_path / "file").write_text("x")
    with refused("not-a-folder", "file", kind=UsageError):
        run(recipe, tmp_path / "file")


def test_a_failing_step_is_named_and_what_was_made_is_kept(recipe, tmp_path, monkeypatch):
    out, recover = tmp_path / "run", stage.WRITERS["recover"]

    def full(config, model, folder, **how):
        if folder.name == "ria.fixed":
            raise StorageError("cannot write: No space left on device", "make room")
        return recover(config, model, folder, **how)

    with monkeypatch.context() as patch:
        patch.setitem(stage.WRITERS, "recover", full)
        with pytest.raises(StorageError, match=r"stages\[2\]\.recover, ria\.fixed: cannot write"):
            run(recipe, out)
    assert states(run(recipe, out)) == ["kept"] * 5 + ["made"] * 5


def test_a_disk_that_fills_up_in_the_middle_of_a_matrix_costs_nothing_finished(
    family, tmp_path, small_disk
):
    class Fill(Progress):
        """Takes all room once the second variant has begun."""

        title = ""

        def begin(self, title: str, total: int, done: int = 0) -> None:
            self.title = title

        def step(self, label: str) -> None:
            if "4:8" in self.title:
                with contextlib.suppress(OSError), (small_disk / "filler").open("wb", 0) as filler:
                    while filler.write(bytes(1 << 16)):
                        pass

    text = f"model: {family('llama_deep')}\nstages:\n- prune: {{method: magnitude, patterns: "
    recipe, out = parse(text + "[2:4, 4:8, 50%]}\n"), small_disk / "run"
    with refused("cannot-write", "stages[0].prune", "No space left", kind=StorageError):
        run(recipe, out, progress=Fill())
    (small_disk / "filler").unlink()
    assert states(run(recipe, out)) == ["kept", "made", "made"]
    run(recipe, tmp_path / "whole")
    assert weights(out) == weights(tmp_path / "whole")


def test_a_disk_without_room_for_all_variants_is_refused_first(family, tmp_path, monkeypatch):
    """One of them would fit."""
    from sparsekit.checkpoint import output_folder as output

    usage, size = namedtuple("usage", "total used free"), 200_000_000
    source = family("llama")
    bytes_each = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    monkeypatch.setattr(output, "SPARE_BYTES", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(size, 0, int(2.5 * bytes_each)))
    text = f"model: {source}\nstages:\n- prune: {{method: magnitude, patterns: [2:4, 4:8, 50%]}}\n"
    with refused("not-enough-disk", "3 steps", "GB free", kind=StorageError):
        run(parse(text), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_pruned_is_refused_before_the_first_step(family, row_file, tmp_path):
    text = f"model: {family('llama')}\nstages:\n"
    recipe = parse(text + "- prune: {method: magnitude, patterns: [2:4, 3:7]}\n")
    with refused("pattern-does-not-divide", "groups of 7", kind=UsageError):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
