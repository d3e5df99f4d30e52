"""Model cards as the hub reads them, of every stage that writes a checkpoint."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData
from scorings import score, task, windows

from sparsekit.packing.convert import convert, convert_packed
from sparsekit.packing.pack import pack
from sparsekit.packing.unpack import unpack
from sparsekit.provenance.front_matter import Origin, front_matter, read_front_matter
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.prune import prune
from sparsekit.quantization.config import QuantizeConfig
from sparsekit.quantization.quantize import quantize
from sparsekit.recovery.config import RecoverConfig
from sparsekit.recovery.recover import recover
from sparsekit.scoring.saved_scores import add_score

LEGACY = Path(__file__).parents[1] / "data" / "legacy"
LICENSE = {"license": "other", "license_name": "own-terms", "license_link": "LICENSE"}
STOCK = 'AutoModelForCausalLM.from_pretrained(".")'
# Of each output what it is found by, which library loads it, how it is loaded, and of its speed.
CARDS = {
    "prune": (["pruned"], "transformers", STOCK, "No common server runs faster"),
    "then": (
        ["pruned", "quantized", "compressed-tensors"],
        "transformers",
        STOCK,
        "transformers expands the weights in memory and is not faster",
    ),
    "products": (["pruned"], "transformers", STOCK, "take the space and time of dense ones"),
    "factored": (["pruned"], None, 'sparsekit.load(".")', "nothing runs faster because of it"),
    "recover": (["pruned"], "transformers", STOCK, "No common server runs faster"),
    "quantize": (
        ["pruned", "quantized", "compressed-tensors"],
        "transformers",
        STOCK,
        "neither smaller nor faster than other weights on this grid",
    ),
    "rounded": (["pruned", "quantized"], "transformers", STOCK, "neither smaller nor faster"),
    "pack": (
        ["pruned", "quantized", "packed"],
        "transformers",
        'sparsekit.load(".")',
        "saves space and costs time",
    ),
    "unpack": (
        ["pruned", "quantized", "compressed-tensors"],
        "transformers",
        STOCK,
        "transformers expands the weights in memory and is not faster",
    ),
    "unpack_plain": (["pruned"], "transformers", STOCK, "No common server runs faster"),
    "unpack_products": (["pruned"], "transformers", STOCK, "take the space and time of dense ones"),
    "convert": ([], "transformers", STOCK, "No common server runs faster"),
    "convert_packed": (["packed"], "transformers", 'sparsekit.load(".")', "costs time"),
}


def card_of(folder: Path) -> ModelCard:
    """A folder's card, as the hub's own library takes it apart."""
    card = ModelCard.load(folder / "README.md")
    assert isinstance(card.data, ModelCardData)
    return card


@pytest.fixture(scope="module")
def outputs(family, row_file, tmp_path_factory) -> dict[str, Path]:
    """What each stage writes of one model, in a row."""
    root = tmp_path_factory.mktemp("cards")
    rows, dense = str(row_file), str(family("llama"))

    def pruned(name: str, **options) -> Path:
        return prune(PruneConfig(calibration=rows, **options), dense, root / name).out

    def rounded(name: str, **options) -> Path:
        config = QuantizeConfig(calibration=rows, grid="int4-g16", **options)
        return quantize(config, str(root / "recover"), root / name).out

    train = RecoverConfig(data=str(row_file), tokens=48, batch=2, length=24)
    return {
        "prune": pruned("prune"),
        "then": pruned("then", then="int4-g16"),
        "products": pruned("products", compensate="lowrank", rank="10%"),
        "factored": pruned("factored", compensate="lowrank", rank="10%", format="factored"),
        "recover": recover(train, str(root / "prune"), root / "recover").out,
        "quantize": rounded("quantize"),
        "rounded": rounded("rounded", format="dense"),
        "pack": pack(str(root / "quantize"), root / "pack").out,
        "unpack": unpack(str(root / "pack"), root / "unpack").out,
        "unpack_plain": unpack(
            str(pack(str(root / "recover"), root / "small").out), root / "unpack_plain"
        ).out,
        "unpack_products": unpack(str(root / "factored"), root / "unpack_products").out,
        "convert": convert(str(LEGACY / "sparse-24-bitmask"), root / "convert").out,
        "convert_packed": convert_packed(str(LEGACY / "sparse-24-bitmask"), root / "again").out,
    }


@pytest.mark.parametrize("name", CARDS)
def test_card_is_one_that_the_hub_reads_and_says_how_to_load_it(outputs, name):
    found_by, library, loading, speed = CARDS[name]
    card = card_of(outputs[name])
    assert card.data.tags == ["sparsekit", *found_by]
    assert card.data.library_name == library
    assert card.data.base_model is None  # no id on the hub: nobody else has that folder
    assert card.data.license is None
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert loading in code
    compile(code, name, "exec")
    assert speed in " ".join(card.text.split())
    table = [line for line in card.text.splitlines() if line.startswith("|")]
    assert len(table) > 3
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {3}


def test_card_tells_what_is_multiplied_in_where_it_is_not_float32(family, row_file, tmp_path):
    words = {"data": str(row_file), "tokens": 64, "batch": 2, "length": 16, "method": "fixed"}
    for precision in ("no", "bf16"):
        config = RecoverConfig(**words, mixed_precision=precision)
        out = recover(config, str(family("llama")), tmp_path / precision).out
        told = "| multiplied in | bfloat16 |" in (out / "README.md").read_text()
        assert told == (precision == "bf16")


def test_card_tells_what_is_kept_where_it_is_not_the_largest(family, row_file, tmp_path):
    words = {"data": str(row_file), "tokens": 64, "batch": 2, "length": 16, "method": "ast"}
    for metric in ("magnitude", "activation"):
        config = RecoverConfig(**words, metric=metric)
        card = (
            recover(config, str(family("llama")), tmp_path / metric).out / "README.md"
        ).read_text()
        told = "| kept by | \\|w\\| times the norm of its input |" in card
        assert told == (metric == "activation")


def test_card_tells_each_stage_before_with_the_text_that_it_read(outputs, row_file):
    history = json.loads((outputs["pack"] / "sparsekit.json").read_text())["history"]
    rows, text = history[0]["calibration"]["fingerprint"], history[1]["settings"]["data"]
    calibrated = f"5 rows of 24 tokens from `{row_file.name}` (sha256 `{rows[:16]}…`)"
    trained = f"48 tokens of `{row_file.name}` (sha256 `{text[:16]}…`)"
    told = [
        f"| earlier: prune | wanda, 2:4, {calibrated} |",
        f"| earlier: recover | ast, 2:4, {trained} |",
        f"| earlier: quantize | int4-g16 gptq, {calibrated} |",
    ]
    stages = {"prune": 0, "recover": 1, "quantize": 2, "rounded": 2, "pack": 3, "unpack": 3}
    for name, count in stages.items():
        lines = (outputs[name] / "README.md").read_text().splitlines()
        assert [line for line in lines if line.startswith("| earlier: ")] == told[:count], name
    packed = (outputs["convert_packed"] / "README.md").read_text()
    assert "| earlier: convert | convert sparse-24-bitmask, 2:4 |" in packed


def test_card_of_a_refined_mask_tells_what_made_it(family, pruned, row_file, tmp_path):
    rows, dense = str(row_file), str(family("llama"))
    config = PruneConfig(refine="dsnot", dense=dense, calibration=rows)
    made = prune(config, str(pruned), tmp_path / "refined").out
    assert "| earlier: prune | wanda, 2:4, 5 rows of 24" in (made / "README.md").read_text()


def test_numbers_that_are_pruned_or_trained_are_no_longer_those_of_a_grid(outputs, tmp_path):
    made = prune(PruneConfig(method="magnitude"), str(outputs["rounded"]), tmp_path / "again").out
    assert card_of(made).data.tags == ["sparsekit", "pruned"]


def test_code_of_a_card_loads_the_checkpoint(outputs, monkeypatch):
    for name in ("prune", "factored", "pack"):
        monkeypatch.chdir(outputs[name])
        (code,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
        told: dict = {}
        exec(code, told)
        assert told["model"].config.model_type == "llama"


def with_card(folder: Path, told: object, body: str = "# x\n") -> Path:
    """Give a folder a card with this front matter."""
    (folder / "README.md").write_text(f"---\n{json.dumps(told)}\n---\n{body}", encoding="utf-8")
    return folder


def test_license_is_carried_over_with_its_file_through_every_stage(copy_of, row_file, tmp_path):
    source = with_card(copy_of("llama"), LICENSE | {"tags": ["chat"], "base_model": "org/base"})
    (source / "LICENSE").write_text("Terms.\n")
    rows = str(row_file)
    made = prune(PruneConfig(calibration=rows), str(source), tmp_path / "a").out
    made = quantize(QuantizeConfig(method="rtn", grid="int8"), str(made), tmp_path / "b").out
    made = pack(str(made), tmp_path / "c").out
    told = card_of(made).data.to_dict()
    assert {key: told[key] for key in LICENSE} == LICENSE
    assert told["tags"] == ["sparsekit", "pruned", "quantized", "packed"]
    # What the author made his model from is not what this one is made from.
    assert "base_model" not in told
    assert (made / "LICENSE").read_text() == "Terms.\n"


def test_base_model_is_the_hub_id_and_stays_so_for_what_is_made_from_it(
    copy_of, row_file, tmp_path, monkeypatch
):
    monkeypatch.setattr("sparsekit.checkpoint.hub.fetch", lambda *_: copy_of("llama"))
    monkeypatch.chdir(tmp_path)
    config = PruneConfig(calibration=str(row_file))
    first = prune(config, "org/name", tmp_path / "a").out
    assert card_of(first).data.base_model == "org/name"
    assert "# name, pruned to 2:4" in (first / "README.md").read_text()
    second = pack(str(first), tmp_path / "b").out
    assert card_of(second).data.base_model == "org/name"


def test_demo_is_named_by_its_id_and_license_in_all_that_is_made_from_it(
    copy_of, row_file, tmp_path, monkeypatch
):
    monkeypatch.setattr("sparsekit.checkpoint.demo_model.demo_model", lambda *_: copy_of("llama"))
    config = PruneConfig(calibration=str(row_file))
    first = prune(config, "demo", tmp_path / "a").out
    second = pack(str(first), tmp_path / "b").out
    for folder in (first, second):
        told = card_of(folder).data
        assert told.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
        assert told.license == "apache-2.0"


@pytest.mark.parametrize("reference", ["./here", "folder", "/a/b", "here/it"])
def test_folder_has_no_hub_id(tmp_path, monkeypatch, reference):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "it").mkdir(parents=True)
    assert Origin.of(reference, tmp_path).base_model is None


@pytest.mark.parametrize(
    "word",
    ["no", "1.0", "a: b", "[x]", "'", '"', "#x", "- x", "&a *b", "é", "x\n---\ny", "null", "!!int"],
)
def test_words_of_a_card_come_back_as_they_were(tmp_path, word):
    source = with_card(
        tmp_path, {"license": word, "license_link": word, "base_model": [word], "tags": "sparsekit"}
    )
    text = front_matter(Origin.of(str(tmp_path), source), ("pruned",), "transformers")
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    told = card_of(tmp_path).data.to_dict()
    assert told["license"] == told["license_link"] == word
    assert told["base_model"] == [word]
    assert told["tags"] == ["sparsekit", "pruned"]


@pytest.mark.parametrize(
    "text",
    ["", "no card", "---\nlicense: mit", "---\n[x\n---\n", "---\n- mit\n---\n", "---\n\n---\n"],
)
def test_card_without_front_matter_says_nothing(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert read_front_matter(tmp_path / "README.md") == {}
    assert Origin.of("folder", tmp_path).license == {}


@pytest.mark.parametrize("value", [3, None, {"a": 1}, [], [1], "", True, "2024-01-01"])
def test_license_that_is_no_text_is_left_out(tmp_path, value):
    source = with_card(tmp_path, {"license": value})
    kept = {"license": value} if value == "2024-01-01" else {}
    assert Origin.of("folder", source).license == kept


def test_card_with_windows_lines_and_odd_bytes_is_read(tmp_path):
    (tmp_path / "README.md").write_bytes(b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n# caf\xe9\r\n")
    assert Origin.of("folder", tmp_path).license == {"license": "mit"}
    assert read_front_matter(tmp_path / "absent.md") == {}


def test_name_of_a_folder_cannot_break_the_card(copy_of, tmp_path, row_file):
    source = copy_of("llama").rename(tmp_path / "a\n---\nlicense: mit\n# b|c")
    rows = (tmp_path / "r|s.safetensors").write_bytes(row_file.read_bytes())
    assert rows
    config = PruneConfig(calibration=str(tmp_path / "r|s.safetensors"))
    made = prune(config, str(source), tmp_path / "out").out
    card = card_of(made)
    assert card.data.license is None
    assert "# a --- license: mit # b|c, pruned to 2:4" in card.text
    assert r"`r\|s.safetensors`" in card.text


def test_the_card_tells_the_scores_before_and_after(pruned, copy_of):
    folder = copy_of(pruned)
    card = folder / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    first = card.read_text()
    ppl = windows(math.log(50.0), log_stderr=0.02)
    paired = {"log_perplexity": {"value": math.log(50.0 / 20.0), "stderr": 0.01}}
    add_score(folder, score(ppl, difference=paired, baseline="/home/me/dense"))
    text = card.read_text()
    assert "| perplexity, wikitext2, 16 × 1024 tokens | 20.00 (dense) | 50.00 ± 1.00 |" in text
    assert "+0.9163 ± 0.0100 in log perplexity" in text
    add_score(folder, score(ppl, difference=paired, baseline="/home/me/dense"))
    assert card.read_text() == text  # the table takes the place of the last
    tasks = [task("arc_easy", 0.5, 0.03), task("piqa", 0.7, 0.04)]
    own = {f"{t['task']}.acc_norm": {"value": -0.1, "stderr": 0.01} for t in tasks}
    add_score(folder, score(tasks=tasks, difference=own, baseline="org/dense"))
    text = card.read_text()
    assert text.startswith(first.rstrip())
    assert "50.00 ± 1.00" in text
    mean = r"\| mean accuracy, .* \| 0.7000 \(org/dense\) \| 0.6000 ± 0.0250 \| -0.1000 ± 0.0071 \|"
    assert re.search(mean, text)
    assert "| accuracy, piqa |  | 0.7000 ± 0.0400 |" in text
    assert text.count("## Scores") == 1
    assert card_of(folder).data.tags


def test_before_and_after_both_have_their_standard_errors(copy_of, row_file, tmp_path):
    config = PruneConfig(calibration=str(row_file))
    folder = prune(config, str(copy_of("llama")), tmp_path / "a").out
    own = {"value": math.log(20.0), "stderr": 0.03}
    paired = {"value": math.log(50.0 / 20.0), "stderr": 0.01, "baseline": own}
    ppl = windows(math.log(50.0), log_stderr=0.02)
    add_score(folder, score(ppl, difference={"log_perplexity": paired}, baseline="org/dense"))
    text = (folder / "README.md").read_text()
    assert "| 20.00 ± 0.60 (org/dense) | 50.00 ± 1.00 | +0.9163 ± 0.0100 in log" in text
    tasks = [task("arc_easy", 0.5, 0.03), task("piqa", 0.7, 0.04)]
    values = {"arc_easy": (0.6, 0.06), "piqa": (0.8, 0.08)}
    differences = {
        f"{name}.acc_norm": {
            **{"value": -0.1, "stderr": 0.01},
            "baseline": {"value": value, "stderr": stderr},
        }
        for name, (value, stderr) in values.items()
    }
    add_score(folder, score(tasks=tasks, difference=differences, baseline="org/dense"))
    # A mean of two independent figures: √(0.06² + 0.08²) / 2.
    text = (folder / "README.md").read_text()
    assert "| 0.7000 ± 0.0500 (org/dense) | 0.6000 ± 0.0250 | -0.1000 ± 0.0071 |" in text


def test_card_of_a_model_that_was_measured_tells_the_baseline_with_its_error(
    cli, family, pruned, row_file, tmp_path
):
    folder = shutil.copytree(pruned, tmp_path / "m")
    words = ("eval", folder, "--baseline", family("llama"), "--text", row_file, "--save")
    found = cli(*words, "--json", "-q")
    assert found.code == 0, found.stderr
    base = json.loads(found.stdout)["models"][0]["perplexity"]
    told = f"{base['value']:.2f} ± {base['value'] * base['log_stderr']:.2f} ("
    assert told in (folder / "README.md").read_text()


def test_a_card_of_others_is_left_alone(copy_of):
    folder = copy_of("llama")
    (folder / "README.md").write_text("Theirs.\n")
    add_score(folder, score(windows(3.0)))
    assert (folder / "README.md").read_text() == "Theirs.\n"
