"""Models side by side: rows, columns that never mix what does not compare, the best of them."""

import csv
import io
import json
import math
import random
import re
import shutil

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file
from scorings import (
    checkpoint,
    packed_entry,
    pruned_entry,
    quantized_entry,
    recovered_entry,
    run_directory,
    score,
    scored,
    task,
    windows,
)

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.folder import PROVENANCE
from sparsekit.errors import DataError
from sparsekit.packing.pack import pack
from sparsekit.packing.unpack import unpack
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.prune import prune
from sparsekit.reporting.compare import compare, pareto
from sparsekit.reporting.table import captions, columns, summary, to_csv, to_markdown
from sparsekit.scoring.saved_scores import SCORES, add_score, read_scores


def texts(comparison) -> dict[str, list[str]]:
    """The cells for people by the titles of their columns."""
    return {column.title: column.texts for column in columns(comparison)}


def dominated(point, others) -> bool:
    """Whether another is nowhere higher and somewhere lower, by the definition."""
    return any(all(a <= b for a, b in zip(o, point, strict=True)) and o != point for o in others)


# Rows


def test_row_tells_how_a_model_was_made_and_what_that_took(tmp_path):
    stages = (pruned_entry("sparsegpt"), recovered_entry("ast", 4096), quantized_entry())
    [row] = compare([checkpoint(tmp_path / "m", *stages)]).rows
    assert row.method == "sparsegpt + ast + int4-g64 gptq"
    assert (row.name, row.pattern, row.tokens) == ("m", "2:4", 4096)
    assert row.seconds == 115  # 10 + 100 + 5
    assert row.peak_bytes == 900_000_000
    assert row.bits == 4.25
    assert row.n_bytes == (tmp_path / "m/model.safetensors").stat().st_size


def test_words_of_a_pruning_name_all_that_it_did(tmp_path):
    entry = pruned_entry()
    entry["settings"] |= {"reconstruct": "cg", "allocate": "owl", "compensate": "1/20"}
    entry["settings"] |= {"then": "int8"}
    [row] = compare([checkpoint(tmp_path / "m", entry)]).rows
    assert row.method == "wanda cg owl lowrank + int8"


def test_what_made_a_given_mask_counts_too(tmp_path):
    mask = {"path": "m", "fingerprint": "e" * 64}
    mask["history"] = [{**pruned_entry("ria"), "seconds": 7.0}]
    entry = pruned_entry("dsnot from the given mask", mask=mask)
    [row] = compare([checkpoint(tmp_path / "m", entry)]).rows
    assert (row.method, row.seconds) == ("ria + dsnot from the given mask", 17)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 32), (torch.bfloat16, 16)])
def test_bits_are_those_of_the_type_where_the_history_tells_none(tmp_path, dtype, bits):
    [row] = compare([checkpoint(tmp_path / "m", pruned_entry(), dtype=dtype)]).rows
    assert row.bits == bits


def test_last_stage_that_chose_the_form_tells_the_bits(tmp_path):
    stages = pruned_entry(), quantized_entry(), packed_entry()
    [row] = compare([checkpoint(tmp_path / "m", *stages)]).rows
    assert (row.bits, row.pattern) == (3.25, "2:4")


def test_bits_of_factors_beside_their_products_count_both(family, row_file, tmp_path):
    """As the sizes of the files tell: the dense model takes 16 bits of each weight."""
    rows, dense = str(row_file), family("llama")

    def made(form: str):
        config = PruneConfig(compensate="lowrank", format=form, calibration=rows)
        return prune(config, str(dense), tmp_path / form).out

    beside, alone = made("dense"), made("factored")
    packed = pack(str(beside), tmp_path / "packed").out
    unpacked = unpack(str(alone), tmp_path / "unpacked").out
    found = [row.bits for row in compare([beside, unpacked, alone, packed]).rows]
    assert found[0] == found[1] == 16 + found[2]
    assert found[2] == found[3] == prune_entry(beside)["totals"]["bits_per_weight"]
    stored = Checkpoint.open(beside).packed.values()
    size = sum(row["size"] for row in prune_entry(beside)["weights"])
    assert found[2] == 8 * sum(one.n_bytes for one in stored) / size


def prune_entry(folder) -> dict:
    """The first entry of a folder's history."""
    return json.loads((folder / PROVENANCE).read_text())["history"][0]


def test_real_checkpoint_is_a_row(pruned):
    [row] = compare([pruned]).rows
    assert (row.name, row.method, row.pattern, row.bits) == ("llama-2of4", "wanda", "2:4", 16)
    assert row.peak_bytes > 1e6


def test_run_directory_stands_for_its_models_the_dense_one_first(tmp_path):
    root = run_directory(tmp_path / "run")
    checkpoint(root / "x.partial", pruned_entry())
    checkpoint(root / ".hidden", pruned_entry())
    (root / "logs").mkdir()
    rows = compare([root]).rows
    assert [row.name for row in rows] == ["dense", "wanda", "wanda.ast", "wanda.ast.int4"]
    assert [row.stored for row in rows] == [False, True, True, True]
    assert (rows[0].method, rows[0].n_bytes, rows[0].seconds) == ("dense", None, None)


def test_model_that_is_only_scored_has_the_size_of_the_one_that_was(tmp_path):
    source = checkpoint(tmp_path / "source", dtype=torch.bfloat16)
    scored(tmp_path / "run/dense", score(windows(3.0), model=str(source)))
    [row] = compare([tmp_path / "run"]).rows
    assert (row.method, row.bits) == ("dense", 16)
    assert row.n_bytes == (source / "model.safetensors").stat().st_size


def test_folder_that_is_named_twice_is_one_row_and_equal_names_become_paths(tmp_path):
    first = checkpoint(tmp_path / "a/m", pruned_entry())
    second = checkpoint(tmp_path / "b/m", pruned_entry())
    rows = compare([first, tmp_path / "a", second]).rows
    assert [row.name for row in rows] == [str(first), str(second)]


def test_model_without_scores_is_a_row_with_empty_cells_and_a_note(tmp_path):
    checkpoint(tmp_path / "run/bare", pruned_entry())
    scored(checkpoint(tmp_path / "run/good", pruned_entry()), score(windows(3.0)))
    found = compare([tmp_path / "run"])
    assert texts(found)["perplexity"] == ["", "20.09"]  # exp(3)
    assert any(note.startswith("bare has no scores") for note in found.notes)


def test_seconds_of_a_run_that_went_on_are_told_as_those_of_its_last_part(tmp_path):
    entry = pruned_entry() | {"resumed_blocks": 3}
    folders = [
        checkpoint(tmp_path / "whole", pruned_entry()),
        checkpoint(tmp_path / "again", entry),
    ]
    told = [note for note in compare(folders).notes if "interruption" in note]
    assert told == [
        "again: prune resumed after an interruption; the seconds are those of the last part"
    ]


def test_folder_without_checkpoints_is_named(tmp_path):
    (tmp_path / "empty/inner").mkdir(parents=True)
    with refused("no-checkpoint", "empty", kind=DataError):
        compare([tmp_path / "empty"])
    with refused("no-such-model", "nowhere", kind=DataError):
        compare([tmp_path / "nowhere"])


# Scores


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"format": 1}',
        '{"format": 2, "scores": []}',
        '{"format": 1, "scores": [3]}',
        json.dumps({"format": 1, "scores": [{**score(), "perplexity": {"text": "x"}}]}),
        json.dumps({"format": 1, "scores": [{**score(), "tasks": [{"task": "piqa"}]}]}),
        json.dumps({"format": 1, "scores": [{**score(), "difference": {"x": 1}}]}),
        json.dumps({"format": 1, "scores": [score(difference={"x": {"value": 1, "baseline": 2}})]}),
        json.dumps({"format": 1, "scores": [score(windows(math.nan))]}),
    ],
)
def test_damaged_scores_name_their_file(tmp_path, text):
    folder = checkpoint(tmp_path / "m", pruned_entry())
    (folder / SCORES).write_text(text)
    with pytest.raises(DataError, match=re.escape(str(folder / SCORES))):
        compare([folder])


def test_score_takes_the_place_of_the_same_measurement_only(tmp_path):
    add_score(tmp_path / "m", score(windows(3.0)))
    add_score(tmp_path / "m", score(windows(4.0), length=512))
    add_score(tmp_path / "m", score(windows(5.0), baseline="demo"))
    add_score(tmp_path / "m", score(windows(6.0)))
    logs = [entry.perplexity.log_perplexity for entry in read_scores(tmp_path / "m")]
    assert logs == [4.0, 5.0, 6.0]


def weighed(folder, value: float | None = None):
    """A folder whose history has the fingerprint of its weights, which become others before."""
    if value is not None:
        file = folder / "model.safetensors"
        save_file({k: torch.full_like(v, value) for k, v in load_file(file).items()}, file)
    told = json.loads((folder / PROVENANCE).read_text()) | {"fingerprint": None}
    (folder / PROVENANCE).write_text(json.dumps(told))
    found = Checkpoint.open(folder).scan()
    (folder / PROVENANCE).write_text(json.dumps(told | {"fingerprint": found}))
    return folder


def test_scores_of_other_weights_are_left_out_and_told(tmp_path):
    folder = weighed(checkpoint(tmp_path / "m", pruned_entry()))
    add_score(folder, score(windows(3.0)))
    assert [len(row.quality) for row in compare([folder]).rows] == [1]
    found = compare([weighed(folder, value=2.0)])
    assert [len(row.quality) for row in found.rows] == [0]
    assert any("1 scores in" in note and "other weights" in note for note in found.notes)


def test_scores_beside_weights_that_were_swapped_are_not_shown(tmp_path):
    folder = weighed(checkpoint(tmp_path / "m", pruned_entry()))
    add_score(folder, score(windows(3.0)))
    other = weighed(checkpoint(tmp_path / "other", pruned_entry()), value=2.0)
    shutil.copy(other / "model.safetensors", folder)
    with refused("fingerprint-mismatch", str(folder), kind=DataError):
        compare([folder])
    (folder / PROVENANCE).unlink()  # as the error says for what was changed on purpose
    [row] = compare([folder]).rows
    assert (len(row.quality), row.stale) == (0, 1)


# Columns


@pytest.mark.parametrize(
    "change", [{"fingerprint": "e" * 64}, {"text": "c4"}, {"length": 512}, {"windows": 8}]
)
def test_different_windows_never_share_a_column(tmp_path, change):
    scored(checkpoint(tmp_path / "a", pruned_entry()), score(windows(1.0)))
    scored(checkpoint(tmp_path / "b", pruned_entry()), score(windows(2.0, **change)))
    scored(checkpoint(tmp_path / "c", pruned_entry()), score(windows(3.0)))
    found = compare([tmp_path])
    cells = {title: c for title, c in texts(found).items() if title.startswith("perplexity")}
    assert list(cells.values()) == [["2.72", "", "20.09"], ["", "7.39", ""]]  # exp(1), (3), (2)
    assert len(cells) == 2  # two headings that differ
    assert all("wikitext2, 16 × 1024" in title for title in list(cells)[:1])
    [note] = [note for note in found.notes if "not comparable" in note]
    for title in cells:
        assert title.removeprefix("perplexity (").removesuffix(")") in note
    with_best = [row for row in csv.DictReader(io.StringIO(to_csv(found)))]
    names = [name for name in with_best[0] if name.startswith("perplexity")]
    assert [[bool(row[name]) for row in with_best] for name in names] == [
        [True, False, True],
        [False, True, False],
    ]


@pytest.mark.parametrize(
    "change", [{"version": "2.0"}, {"n_shot": 5}, {"n": 50}, {"samples_sha256": "e" * 64}]
)
def test_different_samples_of_a_task_never_share_a_column(tmp_path, change):
    for name, told in (("a", {}), ("b", change)):
        entry = score(tasks=[task("piqa", 0.5, 0.1, **told)])
        scored(checkpoint(tmp_path / name, pruned_entry()), entry)
    found = compare([tmp_path])
    cells = [c for title, c in texts(found).items() if title.startswith("zero-shot")]
    assert cells == [["0.5000 ± 0.1000", ""], ["", "0.5000 ± 0.1000"]]
    assert any("zero-shot" in note and "not comparable" in note for note in found.notes)


def test_means_over_different_tasks_never_share_a_column(tmp_path):
    one, two = task("piqa", 0.5, 0.1), task("arc_easy", 0.7, 0.1)
    scored(checkpoint(tmp_path / "a", pruned_entry()), score(tasks=[one]))
    scored(checkpoint(tmp_path / "b", pruned_entry()), score(tasks=[one, two]))
    scored(checkpoint(tmp_path / "c", pruned_entry()), score(tasks=[two, one]))
    cells = [c for title, c in texts(compare([tmp_path])).items() if title.startswith("zero-shot")]
    mean = "0.6000 ± 0.0707"  # sqrt(0.1² + 0.1²) / 2
    assert cells == [["0.5000 ± 0.1000", "", ""], ["", mean, mean]]


def test_differences_to_two_baselines_stand_in_two_columns(tmp_path):
    paired = {"log_perplexity": {"value": 0.5, "stderr": 0.01, "n": 16}}
    for name, baseline in (("a", "demo"), ("b", "org/other")):
        entry = score(windows(3.0), difference=paired, baseline=baseline)
        scored(checkpoint(tmp_path / name, pruned_entry()), entry)
    found = texts(compare([tmp_path]))
    assert found["log difference to demo"] == ["+0.5000 ± 0.0100", ""]
    assert found["log difference to other"] == ["", "+0.5000 ± 0.0100"]
    assert found["perplexity"] == ["20.09", "20.09"]  # one column: the windows are the same


def test_mean_and_difference_have_the_errors_of_independent_tasks(tmp_path):
    difference = {
        "a.acc_norm": {"value": -0.1, "stderr": 0.06, "n": 100},
        "b.acc_norm": {"value": -0.3, "stderr": 0.08, "n": 100},
    }
    tasks = [task("a", 0.5, 0.03), task("b", 0.7, 0.04)]
    entry = score(tasks=tasks, difference=difference, baseline="demo")
    found = texts(compare([scored(checkpoint(tmp_path / "m", pruned_entry()), entry)]))
    assert found["zero-shot"] == ["0.6000 ± 0.0250"]  # sqrt(0.03² + 0.04²) / 2
    assert found["zero-shot difference to demo"] == ["-0.2000 ± 0.0500"]


def test_normalised_accuracy_goes_before_the_plain_one(tmp_path):
    metrics = {
        "acc": {"value": 0.9, "stderr": 0.1},
        "acc_norm": {"value": 0.5, "stderr": None},
    }
    entry = score(tasks=[task("a", 0, 0, metrics=metrics), task("f", 0, 0, metrics={})])
    found = compare([scored(checkpoint(tmp_path / "m", pruned_entry()), entry)])
    assert texts(found)["zero-shot"] == ["0.5000"]
    assert any("f has no accuracy" in note for note in found.notes)


def test_perplexity_in_different_types_is_noted(tmp_path):
    scored(checkpoint(tmp_path / "a", pruned_entry()), score(windows(3.0)))
    scored(checkpoint(tmp_path / "b", pruned_entry()), score(windows(3.0, dtype="bfloat16")))
    assert any("bfloat16 and float32" in note for note in compare([tmp_path]).notes)


# The best


def test_best_points_are_those_of_the_definition():
    generator = random.Random(3)
    for _ in range(300):
        points = [
            None
            if generator.random() < 0.1
            else (generator.randrange(6), generator.randrange(6) / 2)
            for _ in range(generator.randrange(1, 12))
        ]
        there = [point for point in points if point is not None]
        assert pareto(points) == [
            point is not None and not dominated(point, there) for point in points
        ]


def test_best_rows_are_marked_among_those_with_the_same_windows(tmp_path):
    # Name, weights' rows, log perplexity, windows.
    models = [
        ("a", 8, 3.0, "a" * 64),
        ("b", 4, 4.0, "a" * 64),
        ("c", 8, 3.5, "a" * 64),  # as large as a, and worse
        ("d", 2, 9.0, "a" * 64),
        ("e", 8, 3.0, "a" * 64),  # as a
        ("f", 8, 99.0, "f" * 64),  # alone on its windows
    ]
    for name, rows, log, print_ in models:
        folder = checkpoint(tmp_path / name, pruned_entry(), rows=rows)
        scored(folder, score(windows(log, fingerprint=print_)))
    found = compare([tmp_path])
    first, second = (c for title, c in texts(found).items() if title.startswith("best"))
    assert first == ["*", "*", "", "*", "*", ""]
    assert second == ["", "", "", "", "", "*"]
    told = [model["perplexity"][0]["best"] for model in found.to_json()["models"]]
    assert told == [True, True, False, True, True, True]


# Forms


def test_csv_has_every_figure_in_full_precision(tmp_path):
    log = math.pi
    entry = score(
        windows(log),
        [task("piqa", 1 / 3, 1 / 7)],
        {"piqa.acc_norm": {"value": -1 / 9, "stderr": 1 / 11, "n": 100}},
        "demo",
    )
    name = 'a "b", c\nd'
    folder = scored(checkpoint(tmp_path / name, pruned_entry(), recovered_entry()), entry)
    [row] = csv.DictReader(io.StringIO(to_csv(compare([folder]))))
    assert (row["model"], row["method"], row["pattern"]) == (name, "wanda + ast", "2:4")
    assert float(row["log_perplexity"]) == log
    assert float(row["perplexity"]) == math.exp(log)
    assert float(row["zero_shot"]) == 1 / 3
    assert float(row["zero_shot_stderr"]) == 1 / 7
    assert float(row["zero_shot_difference to demo"]) == -1 / 9
    assert float(row["zero_shot_difference_stderr to demo"]) == 1 / 11
    assert int(row["bytes"]) == (folder / "model.safetensors").stat().st_size
    assert (int(row["tokens"]), float(row["seconds"])) == (4096, 110)


def test_markdown_shows_the_cells_as_they_are(tmp_path):
    for name in ("a|b", "<script>*x*", "plain"):
        folder = checkpoint(tmp_path / name, pruned_entry())
        scored(folder, score(windows(3.0, text="w|2")))
    found = compare([tmp_path])
    lines = [line for line in to_markdown(found).splitlines() if line.startswith("|")]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    plain = [[re.sub(r"\\(.)", r"\1", cell.strip()) for cell in row] for row in rows]
    made = columns(found)
    assert plain[0] == [column.title for column in made]
    assert plain[2:] == [list(cells) for cells in zip(*(c.texts for c in made), strict=True)]
    assert "<script>*" in [row[0][:9] for row in plain]
    assert r"- perplexity: w\|2" in to_markdown(found)


def test_captions_say_what_one_column_is_of(tmp_path):
    found = captions(compare([run_directory(tmp_path / "run")]))
    assert found[0] == "perplexity: wikitext2, 16 × 1024 tokens"
    assert "arc_easy v1.0 (acc_norm, 0-shot, 100 samples)" in found[1]


# The baseline


def differing(value: float, baseline: float) -> dict:
    """A paired difference of log perplexity, with the baseline's own value."""
    own = {"value": baseline, "stderr": 0.1}
    return {"log_perplexity": {"value": value, "stderr": 0.1, "baseline": own}}


def test_baseline_is_a_row_of_its_own(tmp_path):
    base = checkpoint(tmp_path / "models/base", dtype=torch.bfloat16)
    for name in ("a", "b"):
        entry = score(windows(3.0), difference=differing(1.0, 2.0), baseline=str(base))
        scored(checkpoint(tmp_path / "run" / name, pruned_entry()), entry)
    found = compare([tmp_path / "run"])
    cells = texts(found)
    assert cells["model"] == ["base", "a", "b"]
    assert cells["perplexity"] == ["7.39", "20.09", "20.09"]  # exp(2), exp(3)
    assert cells["times base"] == ["", "2.72", "2.72"]  # exp(1)
    assert cells["bits per weight"] == ["16.00", "32.00", "32.00"]
    assert [row.stored for row in found.rows] == [False, True, True]
    assert not [note for note in found.notes if note.startswith("base")]
    assert [column.title for column in columns(found)][:2] == ["model", "perplexity"]
    assert [model["name"] for model in found.to_json()["models"]] == ["base", "a", "b"]


def test_baseline_that_is_a_row_already_is_no_second_one(tmp_path):
    base = checkpoint(tmp_path / "base")
    entry = score(windows(3.0), difference=differing(1.0, 2.0), baseline=str(base))
    scored(checkpoint(tmp_path / "a", pruned_entry()), entry)
    found = compare([tmp_path / "a", base])
    assert texts(found)["perplexity"] == ["20.09", "7.39"]
    assert not [note for note in found.notes if "no scores" in note]
    scored(tmp_path / "run/dense", score(windows(2.0), model=str(base)))
    assert texts(compare([tmp_path / "a", tmp_path / "run"]))["model"] == ["a", "dense"]


def test_summary_names_the_best_and_the_smallest(tmp_path):
    for name, log, rows in (("good", 3.0, 8), ("small", 4.0, 2), ("neither", 5.0, 4)):
        entry = score(windows(log), difference=differing(log - 2, 2.0), baseline="org/base")
        scored(checkpoint(tmp_path / name, pruned_entry(), rows=rows), entry)
    text = summary(compare([tmp_path]))
    assert text.startswith("Best: good, perplexity 20.09, 2.72 times base; smallest: small, ")
    assert "perplexity 54.60, 7.39 times base; on wikitext2" in text
    [only] = (row.path for row in compare([tmp_path / "small"]).rows if row.stored)
    assert "it is also the smallest" in summary(compare([only]))
    assert summary(compare([checkpoint(tmp_path / "bare", pruned_entry())])) == ""
