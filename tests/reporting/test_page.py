"""The report's page: whole in itself, safe whatever names are in it, and the same each time.

That a browser shows it is tried in Chromium, where there is one.
"""

import base64
import json
import re
import shlex
import shutil
import subprocess
from datetime import date
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer
from matplotlib.image import imread
from refusals import refused
from scorings import (
    UP,
    checkpoint,
    pruned_entry,
    recovered_entry,
    run_directory,
    score,
    scored,
    task,
    training_log,
    windows,
)

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.cli.app import app
from sparsekit.errors import DataError, UsageError
from sparsekit.packing.convert import convert, convert_packed
from sparsekit.packing.pack import pack
from sparsekit.packing.unpack import unpack
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.prune import prune
from sparsekit.reporting.commands import commands
from sparsekit.reporting.compare import compare
from sparsekit.reporting.curves import errors_by_block, sparsity_by_block, trainings
from sparsekit.reporting.drawing import COLOURS, GREY, bars, styles
from sparsekit.reporting.figures import QUICKEST
from sparsekit.reporting.page import CSS, page, report
from sparsekit.reporting.table import BEST
from sparsekit.scoring.saved_scores import read_scores
from sparsekit.scoring.standard_error import Figure

LEGACY = Path(__file__).parents[1] / "data" / "legacy" / "sparse-24-bitmask"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
EVIL = "<script>alert(1)<"
QUOTED = "\"><img src=x onerror='alert(2)'>"
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--v=0"),
)
SVG = "data:image/svg+xml;base64,"
# Elements that a page without scripts, forms and loads has.
ELEMENTS = {
    *("html", "head", "meta", "title", "style", "body", "main", "footer", "section"),
    *("h1", "h2", "h3", "p", "ul", "li", "div", "table", "thead", "tbody", "tr", "th", "td"),
    *("figure", "figcaption", "img", "pre", "details", "summary"),
}


class Elements(HTMLParser):
    """All elements of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    @property
    def pictures(self) -> dict[str, str]:
        """The SVG files in the page by what they show."""
        images = [attributes for tag, attributes in self.found if tag == "img"]
        return {
            a["alt"]: base64.b64decode(a["src"].removeprefix(SVG), validate=True).decode()
            for a in images
        }


@pytest.fixture
def run(tmp_path) -> Path:
    return run_directory(tmp_path / "run")


@pytest.fixture
def hostile(tmp_path) -> Path:
    """A run whose names, texts and tasks all try to be HTML."""
    root = tmp_path / "hostile"
    for name in (EVIL, QUOTED.replace("/", "")):
        entry = pruned_entry(f"wanda{QUOTED}", calibration=None)
        trained = {**recovered_entry(), "text": f"{EVIL}/script>"}
        folder = checkpoint(root / name, entry, trained)
        training_log(folder)
        told = score(
            windows(3.0, text=QUOTED),
            [task(f"</text></svg>{EVIL}/script>$x$", 0.5, 0.1)],
            {"log_perplexity": {"value": 1.0, "stderr": 0.1}},
            QUOTED,
        )
        scored(folder, told)
    return root


# What is on it


def test_page_has_the_table_and_every_picture(run):
    found = Elements(page(compare([run])))
    headings = ("Quality against size and cost", "By block", "Training", "Zero-shot accuracy")
    for heading in (*headings, "Made with"):
        assert heading in found.text
    assert list(found.pictures) == [
        "Perplexity (wikitext2, 16 × 1024 tokens) against size",
        "Perplexity (wikitext2, 16 × 1024 tokens) against cost",
        "Output error of pruning",
        "Output error of quantization",
        "KL from the teacher on builtin",
        "Cross entropy on builtin",
        "Accuracy by task",
    ]
    for text in ("wanda + ast + int4-g64 gptq", "148.41", "0.5000 ± 0.0250", "-0.2000 ± 0.0141"):
        assert text in found.text  # exp(5); 0.4 and 0.6 with 0.03 and 0.04; 0.02 twice


def test_the_best_by_size_and_the_best_by_time_are_ringed(tmp_path):
    """By size b, the smallest, and d; by time b and a, as d was not made here and c is no match."""
    for name, log, seconds, rows in (("a", 4.0, 10, 8), ("b", 3.0, 100, 2), ("c", 5.0, 50, 4)):
        made = checkpoint(tmp_path / name, pruned_entry(seconds=seconds), rows=rows)
        scored(made, score(windows(log)))
    scored(checkpoint(tmp_path / "d"), score(windows(2.0)))
    found = compare([tmp_path])
    (on,) = found.windows
    assert found.best(on) == [False, True, False, True]
    assert found.best_by_time(on) == [True, True, False, False]
    shown = Elements(page(found))
    size, cost = list(shown.pictures.values())[:2]
    for picture, meaning in ((size, BEST), (cost, QUICKEST)):
        assert f"Ringed: {meaning}." in shown.text
        assert rings(picture) == 2
        assert dashed(picture) == 1


def rings(picture: str) -> int:
    """How many grey markers are not filled."""
    uses = re.findall(r'<use [^>]*style="([^"]*)"', picture)
    return sum("fill-opacity: 0" in style and f"stroke: {GREY}" in style for style in uses)


def dashed(picture: str) -> int:
    """How many grey dashed lines of 1 point are in a picture, not counting those of its legend."""
    return len(re.findall(rf"stroke-dasharray: 3\.7,1\.6; [^\"]*stroke: {GREY}", picture))


def test_baseline_is_a_row_and_a_dashed_line(tmp_path):
    difference = {
        "log_perplexity": {"value": 1.0, "stderr": 0.1, "baseline": {"value": 2.0, "stderr": 0.1}}
    }
    for name, log in (("a", 3.0), ("b", 3.5)):
        made = score(windows(log), difference=difference, baseline="org/base")
        scored(checkpoint(tmp_path / name, pruned_entry()), made)
    shown = Elements(page(compare([tmp_path])))
    assert "base" in re.findall(r'<th scope="row">(.*?)</th>', page(compare([tmp_path])))
    for picture in shown.pictures.values():
        if "perplexity" in picture:
            assert ">base<" in picture
            assert dashed(picture) == 1
    assert "base has no" not in shown.text
    assert "Best: a, perplexity 20.09, 2.72 times base" in shown.text  # exp(3), exp(1)


def test_pictures_that_show_nothing_are_left_out(tmp_path):
    """All shares of zeros are equal; the log has fewer than ten steps."""
    folder = training_log(checkpoint(tmp_path / "m", pruned_entry(), recovered_entry()))
    log = folder / "sparsekit-training.jsonl"
    assert "KL from the teacher on builtin" in Elements(page(compare([folder]))).pictures
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:10]))
    assert list(Elements(page(compare([folder]))).pictures) == ["Output error of pruning"]


def test_training_that_was_measured_often_is_drawn(tmp_path):
    entry = recovered_entry()
    entry["weights"][0]["zeros"] = 8
    folder = training_log(checkpoint(tmp_path / "m", pruned_entry(), entry))
    log = folder / "sparsekit-training.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    for row in rows:
        row |= {"perplexity": 90.0 - row["step"], "evaluated_on": "some text", "flips": 3}
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = list(Elements(page(compare([folder]))).pictures)
    assert drawn[1] == "Sparsity"
    assert drawn[-2:] == ["Perplexity during training (some text)", "Mask changes"]


def test_numbers_of_the_history_have_six_digits(tmp_path):
    entry = pruned_entry(seconds=0.1 + 0.2)
    text = page(compare([checkpoint(tmp_path / "m", entry)]))
    assert not re.search(r"\d\.\d{8}", Elements(text).text)


def test_best_rows_stand_out(run):
    text = page(compare([run]))
    marked = re.findall(r'<tr class="best"><th scope="row">(.*?)</th>', text)
    assert marked == ["wanda.ast", "wanda.ast.int4"]  # the dense one has no size


def test_different_windows_have_pictures_of_their_own_and_a_note(tmp_path):
    for name, change in (("a", {}), ("b", {"length": 512})):
        scored(checkpoint(tmp_path / name, pruned_entry()), score(windows(3.0, **change)))
    found = Elements(page(compare([tmp_path])))
    assert "columns are not comparable" in found.text
    assert "perplexity (wikitext2, 16 × 512 tokens)" in found.text
    assert sum("against size" in title for title in found.pictures) == 2


def test_model_without_anything_still_makes_a_page(tmp_path):
    found = Elements(page(compare([checkpoint(tmp_path / "bare")])))
    assert "bare has no scores" in found.text
    assert "bare has no history" in found.text


def test_perplexity_that_no_float_holds_is_told_and_not_drawn(tmp_path):
    scored(checkpoint(tmp_path / "m", pruned_entry()), score(windows(709.0, log_perplexity=1e4)))
    found = Elements(page(compare([tmp_path])))
    assert "inf" in found.text
    assert not any("against size" in title for title in found.pictures)


# What its pictures are drawn from


def test_errors_are_means_over_a_block_and_zeros_are_shares_of_it(tmp_path):
    entry = pruned_entry()
    second = {**entry["weights"][0], "name": UP.format(0).replace("up", "down"), "error": 0.3}
    entry["weights"].append({**second, "zeros": 32, "size": 96})
    rows = compare([checkpoint(tmp_path / "m", entry)]).rows
    [errors] = errors_by_block(rows)["prune"]
    assert (errors.across, errors.up) == ([0, 1], pytest.approx([0.2, 0.2]))
    [zeros] = sparsity_by_block(rows)
    assert zeros.up == [48 / 128, 16 / 32]


def test_log_gives_losses_perplexities_and_flips(run):
    [log] = trainings(compare([run]).rows)
    assert log.losses("divergence").up == pytest.approx([1 / step for step in range(1, 13)])
    assert log.perplexities("8 x 1024 of wikitext2").up == [90.0, 60.0]
    assert log.perplexities("another text") is None
    assert log.mask_changes().across == [3072, 6144, 9216, 12288]


@pytest.mark.parametrize("line", ["{", '{"tokens": 3}', '{"step": 1, "tokens": 3}', "3"])
def test_damaged_log_is_named(run, line):
    file = run / "wanda.ast/sparsekit-training.jsonl"
    file.write_text(line + "\n")
    with refused("damaged-file", file, kind=DataError):
        page(compare([run]))


def test_bars_are_as_long_as_the_values_with_whiskers_of_the_error():
    def shapes(figure: Figure) -> tuple[float, float, list[float]]:
        """The lengths of two bars, and those of the whiskers."""
        values = {"piqa": {0: Figure(value=0.8, stderr=None), 1: figure}}
        svg = bars(values, styles(["a", "b"]), "accuracy")
        paths = re.findall(r'<path d="([^"]*)"[^>]*style="(.*?)"', svg)
        spans = [
            (max(xs) - min(xs), style)
            for shape, style in paths
            if (xs := [float(x) for x in re.findall(r"[ML] (\S+) ", shape)])
        ]
        [first] = [span for span, style in spans if "fill: #0072b2" in style]
        [second] = [span for span, style in spans if "fill: #d55e00" in style]
        grey = f"stroke: {GREY}; stroke-width: 1.5"
        return first, second, [span for span, style in spans if span and grey in style]

    first, second, whiskers = shapes(Figure(value=0.4, stderr=None))
    assert second == pytest.approx(first / 2, rel=1e-3)
    assert whiskers == []
    first, _, [whisker] = shapes(Figure(value=0.4, stderr=0.05))
    assert whisker == pytest.approx(first * 0.1 / 0.8, rel=1e-3)  # one error to each side


def test_styles_of_many_models_all_differ():
    drawn = styles([str(number) for number in range(42)])
    assert len({(s.colour, s.marker) for s in drawn}) == 42
    assert len({(s.colour, s.dash) for s in drawn[:24]}) == 24


def contrast(one: str, other: str) -> float:
    """The contrast of two colours, by the formulas of WCAG 2.2 ("relative luminance")."""

    def luminance(colour: str) -> float:
        digits = colour.lstrip("#") if len(colour) == 7 else "".join(c + c for c in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_the_standard():
    assert contrast("#000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#777777", "#fff") == pytest.approx(4.48, abs=0.005)  # WebAIM's checker


@pytest.mark.parametrize("which", [0, 1], ids=["light", "dark"])
def test_colours_stand_out_from_the_page(which):
    """What WCAG 2.2 asks of level AA: 3 for graphics (1.4.11), 4.5 for text (1.4.3)."""
    schemes = [dict(re.findall(r"--(\w+): (#\w+)", s)) for s in CSS.split("@media")[:2]]
    assert schemes[0] != schemes[1]
    colours = schemes[which]
    for drawn in (*COLOURS, GREY):
        assert contrast(drawn, colours["paper"]) >= 3, drawn
    for behind in (colours["paper"], colours["soft"]):
        assert contrast(colours["best"], behind) >= 3
        assert min(contrast(colours[text], behind) for text in ("ink", "faint")) >= 4.5


# What it needs


@pytest.mark.parametrize("which", ["run", "hostile"])
def test_page_loads_and_runs_nothing(which, request):
    text = page(compare([request.getfixturevalue(which)]))
    found = Elements(text).found
    assert {tag for tag, _ in found} <= ELEMENTS
    for tag, attributes in found:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert (attributes.get("src") or SVG).startswith(SVG)
        assert (attributes.get("href") or "#").startswith("#")
        for address in re.findall(r"url\(([^)]*)\)", str(attributes)):
            assert address.strip("'\"").startswith("#")
    for picture in Elements(text).pictures.values():
        assert {a.get("href", "#")[0] for _, a in Elements(picture).found} == {"#"}
        assert "<script" not in picture
    [style] = re.findall(r"<style>(.*?)</style>", text, flags=re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style
    policies = [a["content"] for tag, a in found if a.get("http-equiv")]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_names_are_shown_and_never_parsed(hostile):
    text = page(compare([hostile]))
    found = Elements(text)
    assert EVIL in found.text
    assert QUOTED in found.text
    assert f"{EVIL}/script>$x$" in Elements(found.pictures["Accuracy by task"]).text
    assert EVIL not in text
    assert "<img src=x" not in text


def test_text_and_axes_of_pictures_have_no_colour_of_one_theme(run):
    """Black is matplotlib's own, which a dark page would hide."""
    for picture in Elements(page(compare([run]))).pictures.values():
        assert f"fill: {GREY}" in picture
        assert "#000000" not in picture
        assert "#ffffff" not in picture


@pytest.mark.slow
def test_page_of_the_same_models_and_day_has_the_same_bytes(run):
    day = date(2026, 2, 3)
    text = page(compare([run]), day)
    assert text == page(compare([run]), day)
    assert "2026-02-03" in text
    assert date.today().isoformat() in page(compare([run]))


# The file


def test_earlier_page_is_replaced_and_nothing_else_is(run, tmp_path):
    out = tmp_path / "new/report.html"
    report([run], out)
    before = out.read_bytes()
    scored(run / "wanda", score(windows(4.5)))
    report([run], out)
    assert out.read_bytes() != before
    for other in (tmp_path / "notes.html", tmp_path / "new"):
        if other.suffix:
            other.write_text("<!doctype html><p>mine")
        with refused("not-a-file" if other.is_dir() else "not-a-report", other, kind=UsageError):
            report([run], other)
    assert (tmp_path / "notes.html").read_text() == "<!doctype html><p>mine"


# How to make the models again


def test_commands_make_the_same_bytes_again(cli, pruned, tmp_path, monkeypatch):
    [row] = compare([pruned]).rows
    [line] = commands(row)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)
    assert words[0] == "sparsekit"
    found = cli(*words[1:])
    assert found.code == 0, found.stderr
    again = Checkpoint.open(tmp_path / words[words.index("-o") + 1])
    assert again.fingerprint == Checkpoint.open(pruned).fingerprint


@pytest.fixture
def rewritten(family, pruned, row_file, tmp_path):
    """Gives the folder of a tiny model that went through stages that write another form."""

    def folder(*stages: str) -> Path:
        made = pruned
        for index, stage in enumerate(stages):
            out = tmp_path / "made" / f"{index}-{stage}"
            out.parent.mkdir(exist_ok=True)
            if stage in ("products", "factored"):
                form = "dense" if stage == "products" else stage
                rows = str(row_file)
                config = PruneConfig(compensate="lowrank", format=form, calibration=rows)
                made = prune(config, str(family("llama")), out).out
            elif stage == "convert":
                made = convert(str(LEGACY), out).out
            elif stage == "convert_packed":
                made = convert_packed(str(LEGACY), out).out
            else:
                made = {"pack": pack, "unpack": unpack}[stage](str(made), out).out
        return made

    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stages", "verbs"),
    [
        (["pack"], "prune pack"),
        (["pack", "unpack"], "prune pack unpack"),
        (["pack", "unpack", "pack"], "prune pack unpack pack"),
        (["pack", "unpack", "pack", "unpack"], "prune pack unpack pack unpack"),
        (["factored", "unpack"], "prune unpack"),
        (["factored", "unpack", "pack", "unpack"], "prune unpack pack unpack"),
        (["products", "pack", "unpack"], "prune pack unpack"),
        (["convert"], "convert"),
        (["convert", "pack", "unpack"], "convert pack unpack"),
        (["convert_packed"], "convert pack"),
        (["convert_packed", "unpack"], "convert pack unpack"),
    ],
    ids=str,
)
def test_commands_of_other_forms_make_the_same_bytes_again(
    cli, rewritten, tmp_path, monkeypatch, stages, verbs
):
    """`unpack` takes the packing out of the history; without it, it would have nothing to do."""
    made = rewritten(*stages)
    lines = [shlex.split(line) for line in commands(compare([made]).rows[0])]
    assert [words[1] for words in lines] == verbs.split()
    (tmp_path / "again").mkdir()
    monkeypatch.chdir(tmp_path / "again")
    for words in lines:
        found = cli(*words[1:])
        assert found.code == 0, found.stderr
    assert Checkpoint.open(Path(made.name)).fingerprint == Checkpoint.open(made).fingerprint


@pytest.mark.parametrize("told", [True, False], ids=["made by us", "made by others"])
def test_commands_of_a_given_mask_make_the_same_bytes_again(
    cli, family, pruned, row_file, tmp_path, monkeypatch, told
):
    given, dense = shutil.copytree(pruned, tmp_path / "given"), str(family("llama"))
    if not told:
        (given / "sparsekit.json").unlink()
    rows = str(row_file)
    config = PruneConfig(refine="dsnot", dense=dense, pattern="2:4", calibration=rows)
    made = prune(config, str(given), tmp_path / "refined").out
    lines = [shlex.split(line) for line in commands(compare([made]).rows[0])]
    assert len(lines) == 1 + told
    sparse = "refined-1" if told else str(given)
    assert lines[-1][:3] == ["sparsekit", "prune", sparse]
    assert lines[-1][lines[-1].index("--dense") + 1] == dense
    (tmp_path / "again").mkdir()
    monkeypatch.chdir(tmp_path / "again")
    for words in lines:
        found = cli(*words[1:])
        assert found.code == 0, found.stderr
    assert Checkpoint.open(Path("refined")).fingerprint == Checkpoint.open(made).fingerprint


def test_commands_of_a_given_mask_name_the_dense_model_as_it_was_given(tmp_path):
    mask = {"path": "sparse", "fingerprint": "e" * 64, "history": []}
    words = {"model": "sparse", "words": {"refine": "dsnot", "dense": "parent"}}
    first, entry = recovered_entry(), pruned_entry("dsnot", mask=mask, **words)
    [row] = compare([checkpoint(tmp_path / "m", first, entry)]).rows
    assert commands(row) == ["sparsekit prune sparse -o m --refine dsnot --dense parent"]


def test_commands_that_score_keep_the_scores_where_they_were(
    cli, family, pruned, row_file, tmp_path, monkeypatch
):
    made = shutil.copytree(pruned, tmp_path / "made")
    words = ("eval", made, "--baseline", family("llama"), "--text", row_file, "--save")
    assert cli(*words).code == 0
    (tmp_path / "again").mkdir()
    monkeypatch.chdir(tmp_path / "again")
    for line in commands(compare([made]).rows[-1]):  # the first is the baseline
        assert cli(*shlex.split(line)[1:]).code == 0
    [score], [again] = (read_scores(folder) for folder in (made, Path("made")))
    assert again.perplexity == score.perplexity
    assert again.difference == score.difference


def test_command_that_scores_a_model_of_others_keeps_nothing_beside_it(run):
    [line] = commands(next(row for row in compare([run]).rows if row.name == "dense"))
    assert line.startswith("sparsekit eval ")
    assert "--save" not in line


def test_commands_are_a_chain_that_the_command_line_takes(run):
    group = typer.main.get_command(app)
    for row in compare([run]).rows:
        made = [shlex.split(line) for line in commands(row)]
        assert len(made) == len(row.history) + 1  # and its score
        model = None
        for words in made:
            context = group.commands[words[1]].make_context(words[1], words[2:])
            named = context.params.get("model") or context.params["models"][0]
            assert model is None or named == model
            if words[1] != "eval":
                model = str(context.params["out"])
        assert model in (None, row.name)


def test_commands_have_the_words_as_they_were_given(tmp_path):
    words = {
        "method": "dsnot",
        "initial": "alps",
        "option": {"alps.damping": "0.05"},
        "compensate": "lowrank",
        "rank": f"7.{'123456789' * 6}%",
        "skip": ["down_proj", "layers.0"],
        "propagate": False,
        "seed": 3,
    }
    [row] = compare([checkpoint(tmp_path / "my model", pruned_entry(words=words))]).rows
    [line] = commands(row)
    assert line == (
        "sparsekit prune demo -o 'my model' --method dsnot --initial alps "
        f"--option alps.damping=0.05 --compensate lowrank --rank {words['rank']} "
        "--skip down_proj --skip layers.0 --no-propagate --seed 3"
    )


# In a browser


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
@pytest.mark.parametrize("which", ["run", "hostile"])
def test_chromium_shows_the_page_and_has_nothing_to_complain_of(which, request, tmp_path):
    out = tmp_path / "report.html"
    report([request.getfixturevalue(which)], out)
    shown = chromium(out, tmp_path / "profile")
    assert "Quality against size and cost" in shown.stdout
    assert shown.stdout.count("<figure>") == out.read_text().count("<figure>") > 5
    assert "CONSOLE" not in shown.stderr
    # The browser's own parser finds no element that the page does not have.
    assert "<script" not in shown.stdout
    assert "<img src=" not in shown.stdout
    assert shown.stdout.count("<img ") == out.read_text().count("<img ")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_chromium_would_tell_of_a_load(run, tmp_path):
    text = page(compare([run])).replace("<main>", '<main><img src="http://127.0.0.1:9/x.png">')
    (tmp_path / "bad.html").write_text(text)
    assert "CONSOLE" in chromium(tmp_path / "bad.html", tmp_path / "profile").stderr


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
@pytest.mark.parametrize("which", ["run", "hostile"])
def test_a_phone_shows_the_page_without_scrolling_sideways(which, request, tmp_path):
    """390 px wide; with something wider in the page it would be told."""
    text = page(compare([request.getfixturevalue(which)]))
    wide = text.replace("<main>", '<main><div style="width: 500px">')
    assert width_on_a_phone(text, tmp_path) <= 390
    assert width_on_a_phone(wide, tmp_path) > 390


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_screenshots_of_both_themes(run, tmp_path):
    """To look at: `pytest tests/reporting/test_page.py -k screenshots --basetemp shots`."""
    out = tmp_path / "report.html"
    report([run], out)
    for theme, (number, background) in {"light": (1, 0xFF), "dark": (0, 0x16)}.items():
        shot = tmp_path / f"{theme}.png"
        flags = (f"--screenshot={shot}", "--window-size=1280,5000", "--hide-scrollbars")
        chromium(
            out, tmp_path / "profile", *flags, f"--blink-settings=preferredColorScheme={number}"
        )
        pixels = imread(shot)
        assert pixels.shape[:2] == (5000, 1280)
        assert pixels[2, 2, :3] * 255 == pytest.approx([background] * 3, abs=1)
        assert len({tuple(pixel) for pixel in pixels[::7, ::7, :3].reshape(-1, 3)}) > 20


def width_on_a_phone(text: str, folder: Path) -> int:
    """How wide a page is in a window of 390 px, which no browser itself makes as narrow."""
    file = folder / "phone.html"
    file.write_text(
        f'<iframe id="phone" width="390" height="800" srcdoc="{escape(text)}"></iframe>'
        "<output></output><script>onload = () => { document.querySelector('output').textContent ="
        " phone.contentDocument.documentElement.scrollWidth }</script>"
    )
    found = re.search(r"<output>(\d+)</output>", chromium(file, folder / "profile").stdout)
    assert found is not None
    return int(found[1])


def chromium(file: Path, profile: Path, *more: str) -> subprocess.CompletedProcess:
    """What the browser makes of a page: its elements on stdout, messages on stderr."""
    flags = (*FLAGS, f"--user-data-dir={profile}", *(more or ("--dump-dom",)))
    words = [CHROMIUM, *flags, file.as_uri()]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
