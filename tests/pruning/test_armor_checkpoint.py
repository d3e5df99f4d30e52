"""ARMOR from disk to disk, in both forms: products with their factors beside them, or factors only.

A product is put together here from the file of factors, with whole matrices in float64; the bits on
disk are those that `Form.dense` gives in the type on disk.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from refusals import refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import sparsekit
from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.errors import CheckFailedError, DataError, UsageError
from sparsekit.files import sha256_file
from sparsekit.inspection.inspect import inspect
from sparsekit.inspection.verify import verify
from sparsekit.model.form_linear import FormLinear
from sparsekit.progress import Progress
from sparsekit.provenance.entry import Report
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.dry_run import plan
from sparsekit.pruning.prune import prune
from sparsekit.scoring.config import EvalConfig
from sparsekit.scoring.evaluate import evaluate
from sparsekit.weights.core_format import CoreFormat
from sparsekit.weights.form import Form
from sparsekit.weights.patterns import Pattern

FACTORS, OTHERS = "sparsekit-factors.safetensors", "sparsekit-weights.safetensors"
OPTIONS = {"block": "8", "sweeps": "4"}
FORMS = ["dense", "factored"]
# Linear weights of a block, and a bias of one of them.
FAMILIES = {
    "llama": (7, None),  # bfloat16
    "llama_tied": (7, None),
    "gpt2": (4, "transformer.h.1.mlp.c_fc.bias"),  # transposed, several shards
    "qwen2": (7, "model.layers.1.self_attn.q_proj.bias"),  # bfloat16
    "opt": (6, "model.decoder.layers.1.fc1.bias"),  # float16
    "phi3": (4, None),
}
WIDE = ["llama_tied", "gpt2", "phi3"]  # float32 on disk: products are not rounded

every_form = pytest.mark.parametrize("form", FORMS)
every_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="module")
def run(row_file, tmp_path_factory) -> Callable[..., Report]:
    """Prunes a folder with ARMOR on the token rows of conftest.py; gives the report."""

    def pruned(source: Path, out: Path | None = None, progress=None, **options) -> Report:
        out = out or tmp_path_factory.mktemp("armor") / "out"
        told = {"progress": progress} if progress else {}
        options = {"method": "armor", "option": OPTIONS, **options}
        config = PruneConfig(calibration=str(row_file), **options)
        return prune(config, str(source), out, **told)

    return pruned


@pytest.fixture(scope="module")
def made(run, family) -> Callable[[str, str], Report]:
    """Gives the report on a family in one of the forms; nobody may write there."""
    reports: dict[tuple[str, str], Report] = {}

    def report(name: str, form: str = "dense") -> Report:
        if (name, form) not in reports:
            reports[name, form] = run(family(name), format=form)
        return reports[name, form]

    return report


@pytest.fixture
def damaged(made, tmp_path) -> Callable[[str], Path]:
    """Gives a private copy of the tiny llama in one of the forms."""
    return lambda form: shutil.copytree(made("llama", form).out, tmp_path / f"damaged-{form}")


class Stop(Progress):
    """Ctrl-C after the first block."""

    def step(self, label: str) -> None:
        raise KeyboardInterrupt


@dataclass(frozen=True)
class Stored:
    """The factors of one weight on disk."""

    pattern: Pattern
    parts: dict[str, Tensor]

    @property
    def form(self) -> Form:
        rows, columns = (len(self.parts[s]) * self.parts[s].shape[1] for s in ("left", "right"))
        form = Form.from_stored(self.parts, CoreFormat(pattern=self.pattern), (rows, columns))
        form.check()
        return form

    @property
    def product(self) -> Tensor:
        """A S B, float64."""
        left, right = (torch.block_diag(*self.parts[s].double()) for s in ("left", "right"))
        return left @ self.form.core.dense().double() @ right


def factors_in(folder: Path) -> dict[str, Stored]:
    """What the file of factors holds, by the names of the weights."""
    tensors = load_file(folder / FACTORS)
    found = {}
    for name, pattern in metadata_of(folder / FACTORS).items():
        base = name.removesuffix(".weight")
        parts = {part: tensors.pop(f"{base}.{part}") for part in ("values", "indices")}
        parts |= {part: tensors.pop(f"{base}.{part}") for part in ("left", "right")}
        found[name] = Stored(Pattern.parse(pattern), parts)
    assert not tensors
    return found


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def weights_in(folder: Path) -> dict[str, Tensor]:
    """The tensors of a plain checkpoint, without the factors beside it."""
    files = [file for file in sorted(folder.glob("*.safetensors")) if file.name != FACTORS]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def along_inputs(name: str, weight: Tensor) -> Tensor:
    """`[out, in]`, also of GPT-2."""
    return weight.T if name.startswith("transformer.h.") else weight


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: sha256_file(file) for file in sorted(folder.glob("*.safetensors"))}


def stock(folder: Path, dtype: torch.dtype | str = torch.float32) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module, rows: Tensor) -> Tensor:
    return model(input_ids=rows).logits


def edit(file: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a file in place; its header stays."""
    tensors, metadata = load_file(file), metadata_of(file)
    change(tensors)
    save_file(tensors, file, metadata)


def refit(folder: Path) -> None:
    """Let `sparsekit.json` have the fingerprint of what is there."""
    file = folder / "sparsekit.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps({**told, "fingerprint": None}))
    told["fingerprint"] = Checkpoint.open(folder).scan()
    file.write_text(json.dumps(told))


# --------------------------------------------------------------------------------- the dense form


@every_family
def test_dense_form_is_a_plain_checkpoint_of_the_products(family, made, name):
    out, (per_block, _) = made(name).out, FAMILIES[name]
    before, after, factors = weights_in(family(name)), weights_in(out), factors_in(out)
    assert len(factors) == 2 * per_block
    assert after.keys() == before.keys()
    loaded = stock(out, "auto").state_dict()
    for weight, tensor in after.items():
        full = next(n for n in (weight, f"transformer.{weight}", f"model.{weight}") if n in loaded)
        assert torch.equal(loaded[full], tensor), weight
        if weight not in factors:
            assert torch.equal(tensor, before[weight]), weight
            continue
        stored = factors[weight]
        wanted = stored.form.dense().to(tensor.dtype)
        assert torch.equal(along_inputs(weight, tensor), wanted), weight
        assert {part.dtype for part in stored.parts.values()} == {tensor.dtype, torch.uint8}
        torch.testing.assert_close(
            along_inputs(weight, tensor).double(),
            stored.product,
            rtol=torch.finfo(tensor.dtype).eps,
            atol=1e-5 * float(stored.product.abs().max()),
        )
        assert (tensor != 0).float().mean() > 0.9, weight


@every_family
def test_dense_form_is_nearer_to_the_source_than_its_start(run, family, made, name):
    start = run(family(name), method="nowag", option={}).entry.to_json()["weights"]
    for before, after in zip(start, made(name).entry.to_json()["weights"], strict=True):
        assert before["name"] == after["name"]
        assert after["error"] < before["error"], after["name"]
        assert after["numbers"]["loss"] < after["numbers"]["first_loss"]


@pytest.mark.parametrize("name", ["gpt2", "llama_sharded"])
def test_shards_of_a_source_stay_and_factors_lie_beside_them(run, family, name):
    out = run(family(name)).out
    shards = {file.name for file in family(name).glob("*.safetensors")}
    assert len(shards) > 1
    assert {file.name for file in out.glob("*.safetensors")} == {*shards, FACTORS}
    index = "model.safetensors.index.json"
    assert (out / index).read_bytes() == (family(name) / index).read_bytes()
    out = run(family(name), format="factored").out
    assert {file.name for file in out.glob("*.safetensors")} == {FACTORS, OTHERS}
    assert not (out / index).exists()


# ------------------------------------------------------------------------------ the factored form


@every_family
def test_both_forms_have_the_same_factors(made, name):
    dense, factored = (made(name, form).out for form in FORMS)
    assert sha256_file(dense / FACTORS) == sha256_file(factored / FACTORS)
    rows = [
        [row.model_copy(update={"seconds": 0.0}) for row in made(name, form).entry.weights]
        for form in FORMS
    ]  # fmt: skip
    assert rows[0] == rows[1]


@every_family
def test_factored_form_keeps_every_other_tensor_and_no_pruned_weight(family, made, name):
    out = made(name, "factored").out
    before, others, factors = weights_in(family(name)), load_file(out / OTHERS), factors_in(out)
    assert others.keys() == before.keys() - factors.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in others.items())
    assert not factors.keys() & load_file(out / FACTORS).keys()
    assert {file.name for file in out.glob("*.safetensors")} == {FACTORS, OTHERS}


@every_family
def test_factored_form_is_smaller(made, name):
    """Than the dense form with its factors; a core of 2:4 takes 9 bits for 16, 17 for 32."""
    dense, factored = (made(name, form).out for form in FORMS)
    sizes = [sum(f.stat().st_size for f in p.glob("*.safetensors")) for p in (dense, factored)]
    saved = sum(
        tensor.nbytes for name, tensor in weights_in(dense).items() if name in factors_in(dense)
    )
    assert sizes[1] < sizes[0] - 0.9 * saved
    assert Checkpoint.open(factored).n_bytes == sizes[1]
    assert Checkpoint.open(dense).n_bytes == sizes[0]


@every_family
def test_factored_form_gives_the_logits_of_the_products(made, rows, name):
    """Of the dense form with its products put in again as they were before the cast to disk."""
    model = stock(made(name).out)
    for weight, stored in factors_in(made(name).out).items():
        full = next(n for n in (weight, f"transformer.{weight}") if n in model.state_dict())
        model.get_parameter(full).data = along_inputs(weight, stored.product.float())
    found = sparsekit.load(made(name, "factored").out, "float32")
    assert not found.training
    wanted = logits(model, rows)
    assert wanted.abs().max() > 0.5
    torch.testing.assert_close(logits(found, rows), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", WIDE)
def test_both_forms_give_the_same_logits(made, rows, name):
    one, two = (sparsekit.load(made(name, form).out) for form in FORMS)
    torch.testing.assert_close(logits(one, rows), logits(two, rows), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", WIDE)
def test_both_forms_have_the_same_perplexity(made, row_file, name):
    config = EvalConfig(text=str(row_file), dtype="float32")
    one, two = evaluate(config, [str(made(name, form).out) for form in FORMS])
    assert one.perplexity.log == pytest.approx(two.perplexity.log, rel=1e-6)
    assert one.perplexity.losses == pytest.approx(two.perplexity.losses, rel=1e-5)


def test_factored_form_is_measured_against_its_source(family, made, row_file):
    config = EvalConfig(text=str(row_file))
    source, score = evaluate(config, [str(made("llama", "factored").out)], str(family("llama")))
    apart = score.perplexity.log - source.perplexity.log
    assert apart != 0  # a model of random weights may get better or worse
    assert score.difference["log_perplexity"]["value"] == pytest.approx(apart, rel=1e-6)


@pytest.mark.parametrize("name", [name for name, (_, bias) in FAMILIES.items() if bias])
def test_factored_form_has_the_biases(family, made, rows, tmp_path, name):
    """A changed bias changes its logits, and as much as those of the dense form."""
    bias, changed = FAMILIES[name][1], []
    for form in FORMS:
        folder = shutil.copytree(made(name, form).out, tmp_path / form)
        before = logits(sparsekit.load(folder, "float32"), rows)
        file = next(f for f in folder.glob("*.safetensors") if name_in(f, bias))
        edit(file, lambda tensors, file=file: tensors[name_in(file, bias)].add_(0.5))
        (folder / "sparsekit.json").unlink()
        changed.append(logits(sparsekit.load(folder, "float32"), rows) - before)
    assert changed[1].abs().max() > 0.05
    tolerance = 1e-4 if name in WIDE else 0.05 * float(changed[0].abs().max())
    torch.testing.assert_close(changed[1], changed[0], rtol=0, atol=tolerance)


def name_in(file: Path, name: str) -> str | None:
    """The name under which a file has a tensor, if it has it; bare models lack their prefix."""
    with safe_open(file, "pt") as opened:
        return next((k for k in opened.keys() if name in (k, f"transformer.{k}")), None)  # noqa: SIM118


@every_family
def test_stock_transformers_finds_no_weights_in_the_factored_form(made, name):
    """It must not draw random ones."""
    from transformers import AutoModelForCausalLM

    with pytest.raises(OSError, match=r"no file named|not found|does not appear"):
        AutoModelForCausalLM.from_pretrained(made(name, "factored").out)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama", torch.bfloat16), ("llama_tied", torch.float32), ("opt", torch.float16)],
)
@every_form
def test_loaded_model_has_the_type_on_disk_unless_another_is_named(made, name, dtype, form):
    out = made(name, form).out
    assert sparsekit.load(out).get_input_embeddings().weight.dtype == dtype
    model = sparsekit.load(str(out), "float32")
    wide = {p.dtype for p in model.parameters() if p.is_floating_point()}
    assert wide == {torch.float32}


def test_loaded_factored_model_generates(made):
    tokens = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 8, "do_sample": False}
    models = [sparsekit.load(made("llama_tied", form).out) for form in FORMS]
    one, two = (model.generate(tokens, **options) for model in models)
    assert one.shape[1] > 3
    assert torch.equal(one, two)


@every_form
def test_loaded_model_has_the_generation_settings_of_its_source(run, copy_of, tmp_path, form):
    """A chat model's second end-of-turn token stands in `generation_config.json` only."""
    source = copy_of("llama_tied")
    file = source / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [257, 5]}))
    out = run(source, tmp_path / "out", format=form).out
    found = sparsekit.load(out).generation_config.eos_token_id
    assert found == [257, 5]


def test_weight_that_is_skipped_stays_a_matrix(run, family, rows, tmp_path):
    dense = run(family("llama_tied"), tmp_path / "d", skip=["mlp"]).out
    out = run(family("llama_tied"), tmp_path / "f", skip=["mlp"], format="factored").out
    assert len(factors_in(out)) == 8
    assert "model.layers.0.mlp.up_proj.weight" in load_file(out / OTHERS)
    assert verify(str(out))["weights"] == 8
    both = [logits(sparsekit.load(folder), rows) for folder in (dense, out)]
    torch.testing.assert_close(*both, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------ inspect and verify


@every_form
@every_family
def test_verify_passes_and_inspect_shows_the_pattern_of_the_cores(made, name, form):
    report = made(name, form)
    found = verify(str(report.out))
    assert found["pattern"] == ["2:4"]
    assert found["weights"] == 2 * FAMILIES[name][0] == report.entry.totals.weights
    assert 2 * found["zeros"] == found["size"] == report.entry.totals.size
    assert report.entry.totals.sparsity == 0.5
    seen = inspect(str(report.out))
    assert (seen.total["pattern"], seen.total["sparsity"]) == ("2:4", 0.5)
    assert [row["pattern"] for row in seen.blocks] == ["2:4"] * 2
    assert len(seen.types) == FAMILIES[name][0]
    assert seen.fingerprint == found["fingerprint"]


@pytest.mark.parametrize("text", ["1:4", "4:8", "3:4"])
@every_form
def test_other_patterns_are_found_too(run, family, text, form):
    out = run(family("llama"), pattern=text, format=form).out
    assert verify(str(out))["pattern"] == [text]
    assert inspect(str(out)).total["pattern"] == text
    assert {stored.pattern for stored in factors_in(out).values()} == {Pattern.parse(text)}


@pytest.mark.parametrize(
    ("form", "match"), [("dense", f"no factors in {FACTORS}"), ("factored", f"lacks {FACTORS}")]
)
def test_missing_factors_are_an_offender(damaged, form, match):
    folder = damaged(form)
    (folder / FACTORS).unlink()
    with refused("incomplete-checkpoint", match, kind=CheckFailedError):
        verify(str(folder))


@pytest.mark.parametrize(
    "form",
    ["dense", "factored"],
)
def test_missing_factors_are_exit_code_1(cli, damaged, form):
    folder = damaged(form)
    (folder / FACTORS).unlink()
    assert cli("verify", folder).code == 1


def test_missing_factors_are_an_offender_whatever_the_fingerprint(cli, damaged):
    folder = damaged("dense")
    (folder / FACTORS).unlink()
    refit(folder)
    found = cli("verify", folder)
    assert found.code == 1
    assert "model.layers.0" in found.stderr


@every_form
@pytest.mark.parametrize("file", [FACTORS, "other"])
def test_truncated_file_is_an_offender(cli, damaged, form, file):
    folder = damaged(form)
    other = {"dense": "model.safetensors", "factored": OTHERS}[form]
    path = folder / (FACTORS if file == FACTORS else other)
    path.write_bytes(path.read_bytes()[:-8])
    with refused("damaged-file", path.name, kind=CheckFailedError):
        verify(str(folder))
    assert cli("verify", folder).code == 1


@every_form
@pytest.mark.parametrize("part", ["values", "indices", "left", "right"])
def test_changed_factor_is_an_offender(cli, damaged, form, part):
    folder = damaged(form)
    name = f"model.layers.1.mlp.up_proj.{part}"
    edit(folder / FACTORS, lambda tensors: tensors[name].view(-1)[:1].add_(1))
    with refused("fingerprint-mismatch", kind=CheckFailedError):
        verify(str(folder))
    assert cli("verify", folder).code == 1


@pytest.mark.parametrize("part", ["values", "left", "right", "weight"])
def test_factors_that_do_not_multiply_to_the_weight_are_an_offender(cli, damaged, part):
    """Whatever the fingerprint says: the weight was changed, or a factor."""
    folder = damaged("dense")
    base = "model.layers.1.mlp.up_proj"
    file = folder / ("model.safetensors" if part == "weight" else FACTORS)
    edit(file, lambda tensors: tensors[f"{base}.{part}"].view(-1)[:1].add_(0.25))
    refit(folder)
    with refused("factors-differ", f"{base}.weight", kind=CheckFailedError):
        verify(str(folder))
    assert cli("verify", folder).code == 1


def test_core_with_another_support_is_an_offender(damaged):
    """Values at other places of the first group that does not begin with the places 0 and 1."""
    folder, base = damaged("dense"), "model.layers.1.mlp.up_proj"

    def change(tensors: dict[str, Tensor]) -> None:
        bits = tensors[f"{base}.indices"].view(-1)
        at = int((bits & 15 != 0b0100).nonzero()[0])
        bits[at] = (int(bits[at]) & 240) | 0b0100

    edit(folder / FACTORS, change)
    refit(folder)
    with refused("factors-differ", f"{base}.weight", kind=CheckFailedError):
        verify(str(folder))


@every_form
def test_places_that_do_not_rise_are_an_offender(damaged, form):
    folder = damaged(form)
    edit(folder / FACTORS, lambda tensors: tensors["model.layers.1.mlp.up_proj.indices"].fill_(0))
    refit(folder)
    with pytest.raises(CheckFailedError):
        verify(str(folder))


@every_form
def test_sides_of_another_shape_are_an_offender(damaged, form):
    folder, name = damaged(form), "model.layers.1.mlp.up_proj.left"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].reshape(-1, 4, 4)

    edit(folder / FACTORS, change)
    with pytest.raises((CheckFailedError, DataError)):
        verify(str(folder))


@every_form
def test_untouched_output_of_a_weight_with_zero_rows_passes(run, copy_of, tmp_path, form):
    source = copy_of("llama_tied")

    def change(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if "_proj" in name:
                tensors[name][8:16] = 0
                tensors[name][:, 4:8] = 0

    edit(source / "model.safetensors", change)
    out = run(source, tmp_path / "out", option=OPTIONS, format=form).out
    assert verify(str(out))["weights"] == 14


def test_dense_form_that_is_pruned_again_by_another_method_passes(run, made, tmp_path):
    out = run(made("llama").out, tmp_path / "again", method="wanda", option={}).out
    assert not (out / FACTORS).exists()
    assert inspect(str(out)).total["pattern"] == "2:4"
    assert verify(str(out))["weights"] == 14


# -------------------------------------------------------------------------------- interrupted runs


@pytest.mark.sampled(3)
@every_form
@pytest.mark.parametrize("propagate", [None, True], ids=["plain", "propagate"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_interrupted_run_goes_on_to_the_same_bytes(run, family, tmp_path, form, propagate, name):
    """The second block's inputs come through the first one, made again from what was written."""
    options = {"format": form, "propagate": propagate}
    whole = run(family(name), tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(family(name), tmp_path / "out", Stop(), **options)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / FACTORS).is_file()
    report = run(family(name), tmp_path / "out", **options)
    assert report.entry.resumed_blocks == 1
    assert hashes(report.out) == hashes(whole.out)
    assert verify(str(report.out))["fingerprint"] == verify(str(whole.out))["fingerprint"]
    rows = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in entry["weights"]]
        for entry in (report.entry.to_json(), whole.entry.to_json())
    ]
    assert rows[0] == rows[1]


def test_propagation_changes_the_second_block_only(run, family, made, tmp_path):
    through = factors_in(run(family("llama"), tmp_path / "out", propagate=True).out)
    plain = factors_in(made("llama").out)
    for name, stored in through.items():
        same = torch.equal(stored.parts["values"], plain[name].parts["values"])
        assert same == (".0." in name), name


@pytest.mark.parametrize("forms", [FORMS, FORMS[::-1]], ids=["dense first", "factored first"])
def test_interrupted_run_does_not_go_on_in_the_other_form(run, family, tmp_path, forms):
    with pytest.raises(KeyboardInterrupt):
        run(family("llama"), tmp_path / "out", Stop(), format=forms[0])
    with refused("other-recipe", "format", *forms, kind=UsageError):
        run(family("llama"), tmp_path / "out", format=forms[1])


@pytest.mark.parametrize("forms", [FORMS, FORMS[::-1]], ids=["dense first", "factored first"])
def test_one_form_can_take_the_place_of_the_other(family, made, row_file, tmp_path, forms):
    out = shutil.copytree(made("llama", forms[0]).out, tmp_path / "out")
    options = {"method": "armor", "option": OPTIONS, "format": forms[1]}
    config = PruneConfig(calibration=str(row_file), **options)
    prune(config, str(family("llama")), out, overwrite=True)
    assert hashes(out) == hashes(made("llama", forms[1]).out)


# -------------------------------------------------------------------------------- what is refused


def test_factored_form_cannot_be_pruned(run, made, tmp_path):
    folder = made("llama", "factored").out
    for method in ("armor", "wanda"):
        with refused("kind-not-taken", str(folder), kind=DataError):
            run(folder, tmp_path / "out", method=method, option={})
    with refused("kind-not-taken", str(folder), kind=DataError):
        plan(PruneConfig(method="magnitude"), str(folder), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@every_form
def test_neither_form_is_a_sparse_model_to_be_refined(run, family, made, tmp_path, form):
    options = {"method": None, "refine": "dsnot", "option": {}, "dense": str(family("llama"))}
    with pytest.raises(DataError):
        run(made("llama", form).out, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "dsnot"])
def test_factored_form_is_refused_for_a_method_without_factors(run, family, tmp_path, method):
    with refused("no-effect", method, "--format factored", kind=UsageError):
        run(family("llama"), tmp_path / "out", method=method, option={}, format="factored")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("llama", {"pattern": "50%"}, ("q_proj.weight", "N:M", "50%")),
        ("llama", {"pattern": "8:16", "option": {}}, ("q_proj.weight", "8:16", "12,870")),
        ("llama", {"option": {"block": "6"}}, ("q_proj.weight", "block=6", "2:4")),
        ("llama_odd", {"pattern": "1:2", "option": {"block": "3"}}, ("block=3", "1:2")),
    ],
)
def test_what_does_not_fit_is_refused_by_name_before_anything_is_written(
    run, family, tmp_path, name, options, named
):
    with refused("pattern-does-not-fit", *named, kind=UsageError):
        run(family(name), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_weights_of_other_sides_get_other_blocks(run, family):
    """32 and 66 have only 2 in common."""
    report = run(family("llama_odd"), pattern="1:2", option={"block": "8", "sweeps": "2"})
    blocks = {
        row["name"].split(".")[-2]: row["numbers"]["block"]
        for row in report.entry.to_json()["weights"]
    }
    assert blocks["q_proj"] == 8
    assert blocks["up_proj"] == blocks["down_proj"] == 2
    assert verify(str(report.out))["pattern"] == ["1:2"]


def test_reconstruction_has_an_effect_or_is_refused(run, family, made):
    try:
        report = run(family("llama_tied"), reconstruct="cg")
    except UsageError:
        return
    assert hashes(report.out) != hashes(made("llama_tied").out)


# -------------------------------------------------------------------------------- what is reported


@every_form
@every_family
def test_bits_per_weight_are_those_of_the_factors(made, name, form):
    report = made(name, form)
    factors = factors_in(report.out)
    n_bytes = size = 0
    for row in report.entry.to_json()["weights"]:
        stored = sum(part.nbytes for part in factors[row["name"]].parts.values())
        assert row["bits"] == 8 * stored / row["size"]
        n_bytes, size = n_bytes + stored, size + row["size"]
    card = (report.out / "README.md").read_text()
    assert f"| bits of a pruned weight as factors | {8 * n_bytes / size:.2f} |" in card


def test_plan_tells_the_bytes_that_are_then_written(family, made, row_file, tmp_path):
    for form in FORMS:
        options = {"method": "armor", "option": OPTIONS, "format": form}
        config = PruneConfig(calibration=str(row_file), **options)
        found = plan(config, str(family("llama")), tmp_path / "out")
        report = made("llama", form)
        files = report.out.glob("*.safetensors")
        assert found["bytes_to_write"] == sum(file.stat().st_size for file in files)
        assert found["method"] == "armor from nowag"
        assert found["notes"] == ["block size of the factors: 8 in 14 weights"]
        for key in ("zeros", "size", "weights", "bits_per_weight"):
            assert found[key] == getattr(report.entry.totals, key)


def test_layer_refuses_a_core_whose_places_do_not_rise(made):
    model = sparsekit.load(made("llama", "factored").out, "float32")
    layer = next(m for m in model.modules() if isinstance(m, FormLinear))
    layer.indices.zero_()  # every kept value lies first in its group
    with refused("invalid-places", kind=DataError):
        layer(torch.ones(1, layer.target.shape[1]))


@pytest.mark.slow
def test_model_card_tells_what_was_asked_for_besides_the_method(run, family):
    options = {
        "compensate": "lowrank",
        "rank": "10%",
        "budget": "5s",
        "option": {"armor.block": "8"},
    }
    entry = run(family("llama"), method="armor", initial="sparsegpt", **options)
    card = (entry.out / "README.md").read_text()
    assert "| method | armor from sparsegpt {'block': '8'," in card
    assert "| begun with | {'damping': '0.01'" in card
    assert "| rank of the compensation | 0.1 of a side |" in card
    assert "| time limit | 5 s |" in card
    assert "reconstruction" not in card
    plain = {"method": "wanda", "option": {}, "pattern": "60%"}
    owl = run(family("llama"), allocate="owl", reconstruct="cg", **plain)
    card = (owl.out / "README.md").read_text()
    assert "| reconstruction | cg |" in card
    assert "| allocation of zeros | owl |" in card
    assert "time limit" not in card


def test_model_card_says_what_it_is(run, family, made):
    cards = {form: (made("llama", form).out / "README.md").read_text() for form in FORMS}
    cards["plain"] = (run(family("llama"), method="wanda", option={}).out / "README.md").read_text()
    dense, factored, plain = (
        " ".join(cards[form].split()) for form in ("dense", "factored", "plain")
    )
    assert "**They are not sparse themselves**" in dense
    assert "take the space and time of dense ones" in dense
    assert "`sparsekit-factors.safetensors`" in dense
    assert "`AutoModelForCausalLM.from_pretrained`" in dense
    assert "exact zeros" not in dense + factored
    assert "Not a plain checkpoint" in factored
    assert "`sparsekit.load` and `sparsekit eval` run them" in factored
    assert "not sparse themselves" not in factored + plain
    assert "Its zeros are stored in dense weights" in plain


def test_history_tells_options_and_form(made):
    for form in FORMS:
        report = made("llama", form)
        (entry,) = (entry.to_json() for entry in Checkpoint.open(report.out).pruned())
        recipe = entry["settings"]
        assert (recipe["method"], recipe["format"]) == ("armor from nowag", form)
        assert (recipe["options"]["block"], recipe["options"]["sweeps"]) == ("8", "4")
        assert recipe["propagate"] is False
        for row in entry["weights"]:
            assert row["numbers"]["block"] == 8
            assert 1 <= row["numbers"]["sweeps"] <= 4


def test_command_line_writes_and_verifies_the_factored_form(cli, family, made, row_file, tmp_path):
    out = tmp_path / "out"
    flags = ("--method", "armor", "-O", "block=8", "-O", "sweeps=4", "--format", "factored")
    found = cli("prune", family("llama"), "-o", out, "--calibration", row_file, *flags)
    assert (found.code, found.stdout) == (0, f"{out}\n")
    assert hashes(out) == hashes(made("llama", "factored").out)
    assert cli("verify", out).code == cli("verify", out, "--pattern", "2:4").code == 0
    assert cli("verify", out, "--pattern", "1:4").code == 1
