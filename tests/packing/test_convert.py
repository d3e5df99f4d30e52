"""Checkpoints that an old release wrote, as plain ones; see data/make_legacy.py."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from refusals import refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparsekit.errors import DataError, PatternError, UsageError
from sparsekit.inspection.inspect import inspect
from sparsekit.inspection.verify import verify
from sparsekit.packing.convert import convert, convert_packed
from sparsekit.packing.pack import pack
from sparsekit.packing.unpack import unpack
from sparsekit.progress import Progress
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.prune import prune
from sparsekit.reporting.compare import compare
from sparsekit.reporting.curves import sparsity_by_block

LEGACY = Path(__file__).parents[1] / "data" / "legacy"
FORMS = ("sparse-24-bitmask", "sparse-bitmask", "marlin-24-int4", "marlin-24-int8")


def wanted(name: str) -> dict[str, torch.Tensor]:
    """The model that was written in the form; rounded in half precision as the release did it."""
    dense = load_file(LEGACY / "dense" / "model.safetensors")
    if "marlin" in name:
        high = 2 ** int(name[-1]) // 2 - 1
        for key, weight in dense.items():
            if weight.ndim == 2 and "embed" not in key:
                scale = (weight.float().abs().amax(1, keepdim=True) / (high + 0.5)).half()
                dense[key] = (weight / scale).round().clamp(-high - 1, high) * scale + 0.0
    return dense


@pytest.mark.parametrize("name", FORMS)
def test_every_tensor_comes_back(tmp_path, name):
    out = convert(str(LEGACY / name), tmp_path / "plain").out
    found, before = load_file(out / "model.safetensors"), wanted(name)
    assert found.keys() == before.keys()
    for key, tensor in before.items():
        assert torch.equal(found[key], tensor)
        assert not (found[key].signbit() & (found[key] == 0)).any() or "weight" not in key
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert verify(str(out), "2:4")["weights"] == 7
    assert inspect(str(out)).history[0].settings.form in name
    model, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(told.values())
    assert torch.isfinite(model(torch.arange(4)[None]).logits).all()


@pytest.mark.parametrize("form", ["plain", "packed", "unpacked"])
@pytest.mark.parametrize("name", FORMS)
def test_what_was_found_of_the_weights_is_in_the_history(tmp_path, name, form):
    out = {"plain": convert}.get(form, convert_packed)(str(LEGACY / name), tmp_path / "out").out
    out = unpack(str(out), tmp_path / "back").out if form == "unpacked" else out
    entry = inspect(str(out)).history[0].to_json()
    plain = {key: tensor for key, tensor in wanted(name).items() if "proj" in key}
    assert [row["name"] for row in entry["weights"]] == sorted(plain)
    for row in entry["weights"]:
        weight = plain[row["name"]]
        assert (row["shape"], row["size"]) == (list(weight.shape), weight.numel())
        assert (row["pattern"], row["zeros"]) == ("2:4", int((weight == 0).sum()))
    told = verify(str(out))
    assert (told["pattern"], told["weights"]) == (["2:4"], 7)
    [row] = compare([out]).rows
    assert row.pattern == "2:4"
    [trace] = sparsity_by_block([row])
    assert trace.up[0] >= 0.5


def irregular(tensors: dict[str, torch.Tensor]) -> None:
    """Fill the first four inputs of a row of the query's weight."""
    mask = tensors["model.layers.0.self_attn.q_proj.bitmask"]
    values = tensors["model.layers.0.self_attn.q_proj.compressed"]
    mask[0, 0] |= 0b1111
    tensors["model.layers.0.self_attn.q_proj.compressed"] = torch.cat([values[:2], values])


def test_weights_without_a_common_pattern_have_rows_and_no_pattern(tmp_path):
    source = broken(tmp_path, "sparse-bitmask", irregular)
    out = convert(str(source), tmp_path / "out").out
    [entry] = (entry.to_json() for entry in inspect(str(out)).history)
    assert "pattern" not in entry["settings"]
    told = {row["name"].split(".")[-2]: row.get("pattern") for row in entry["weights"]}
    assert told["q_proj"] is None
    assert set(told.values()) == {None, "2:4"}
    with refused("no-history", "--pattern", kind=UsageError):
        verify(str(out))
    [row] = compare([out]).rows
    assert row.pattern is None
    assert sparsity_by_block([row])


def test_what_was_converted_before_there_were_rows_opens(tmp_path):
    out = convert(str(LEGACY / FORMS[0]), tmp_path / "out").out
    told = json.loads((out / "sparsekit.json").read_text())
    del told["history"][0]["weights"], told["history"][0]["settings"]["pattern"]
    (out / "sparsekit.json").write_text(json.dumps(told))
    assert compare([out]).rows[0].pattern is None
    assert verify(str(out), "2:4")["weights"] == 7
    with refused("no-history", kind=UsageError):
        verify(str(out))


def test_a_converted_output_head_is_verified_too(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(LEGACY / "sparse-24-bitmask", source)
    tensors = load_file(source / "model.safetensors")
    for part in ("bitmask", "compressed"):  # 32 rows of 64, as the half of q_proj
        tensors[f"lm_head.{part}"] = tensors[f"model.layers.0.self_attn.q_proj.{part}"][:32].clone()
    tensors["lm_head.shape"] = torch.tensor([32, 64])
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": False}
    (source / "config.json").write_text(json.dumps(config))
    out = convert(str(source), tmp_path / "out").out
    assert verify(str(out))["weights"] == 8
    told = json.loads((out / "sparsekit.json").read_text())
    found = load_file(out / "model.safetensors")
    found["lm_head.weight"][3] = 1.0
    save_file(found, out / "model.safetensors", {"format": "pt"})
    del told["fingerprint"]
    (out / "sparsekit.json").write_text(json.dumps(told))
    with refused("pattern-violated", "lm_head.weight", "row 3", kind=PatternError):
        verify(str(out))


def test_a_converted_mask_is_refined_at_its_own_pattern(tmp_path):
    """What it was converted from is not taken for the dense model that it was made from."""
    save_file({"tokens": torch.arange(64).view(2, 32) % 29}, tmp_path / "rows.safetensors")
    rows = str(tmp_path / "rows.safetensors")
    given = convert(str(LEGACY / FORMS[0]), tmp_path / "given").out
    config = PruneConfig(refine="dsnot", dense=str(LEGACY / "dense"), calibration=rows)
    out = prune(config, str(given), tmp_path / "out").out
    assert verify(str(out))["pattern"] == ["2:4"]


@pytest.mark.parametrize("name", FORMS)
def test_a_packed_one_unpacks_to_the_plain_one(tmp_path, name):
    plain = convert(str(LEGACY / name), tmp_path / "plain").out
    packed = convert_packed(str(LEGACY / name), tmp_path / "packed").out
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["packed", "plain"]
    stages = [entry.stage for entry in inspect(str(packed)).history]
    assert stages == ["convert", "pack"]
    unpacked = unpack(str(packed), tmp_path / "unpacked").out
    before, after = (load_file(path / "model.safetensors") for path in (plain, unpacked))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_packed_one_is_called_as_the_model_it_was_made_from(tmp_path):
    """Not as the plain one in between, which is gone."""
    packed = convert_packed(str(LEGACY / FORMS[0]), tmp_path / "packed").out
    paths = [entry.source.path for entry in inspect(str(packed)).history]
    assert paths == [str(LEGACY / FORMS[0])] * 2
    assert f"# {FORMS[0]}, packed" in (packed / "README.md").read_text().splitlines()


def test_nothing_is_converted_for_a_packed_one_that_has_no_place(tmp_path):
    (tmp_path / "out").mkdir()
    with refused("output-exists", "out", kind=UsageError):
        convert_packed(str(LEGACY / FORMS[0]), tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_plain_one_that_cannot_be_packed_is_not_left_behind(tmp_path):
    """Nothing is sparse in it: a bit mask that says so of every entry."""

    def change(tensors):
        for name in [name for name in tensors if name.endswith(".bitmask")]:
            mask, prefix = tensors[name], name.removesuffix(".bitmask")
            tensors[name] = torch.full_like(mask, 255)
            tensors[f"{prefix}.compressed"] = torch.ones(8 * mask.numel(), dtype=torch.float16)

    source = broken(tmp_path, "sparse-bitmask", change)
    with refused("not-sparse", kind=DataError):
        convert_packed(str(source), tmp_path / "packed")
    assert [file.name for file in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("inputs", [512, 256])  # of 256, half are kept: as many as a group has
def test_scales_of_groups_come_back(tmp_path, inputs, key):
    """Against the sha256 of what compressed-tensors 0.14.0 itself makes of the codes."""
    source, file = tmp_path / "grouped", LEGACY / f"marlin-24-grouped-{inputs}.safetensors"
    with safe_open(file, "pt") as opened:
        digest = opened.metadata()["sha256"]
    shutil.copytree(LEGACY / "marlin-24-int4", source)
    shutil.copyfile(file, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    told = config.pop("quantization_config")
    told["config_groups"]["group_0"]["weights"] |= {"strategy": "group", "group_size": 128}
    (source / "config.json").write_text(json.dumps(config | {key: told}))
    out = convert(str(source), tmp_path / "plain").out
    weight = load_file(out / "model.safetensors")["x.weight"]
    assert hashlib.sha256(weight.view(torch.uint8).numpy()).hexdigest() == digest
    assert not json.loads((out / "config.json").read_text()).keys() & {key}


@pytest.mark.parametrize("size", [32, -1])
def test_a_size_of_groups_means_nothing_where_a_row_has_one_scale(tmp_path, size):
    source = tmp_path / "rows"
    shutil.copytree(LEGACY / "marlin-24-int8", source)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = size
    (source / "config.json").write_text(json.dumps(config))
    found = load_file(convert(str(source), tmp_path / "plain").out / "model.safetensors")
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted("marlin-24-int8").items())


def test_what_else_is_said_of_quantization_stays(tmp_path):
    """8-bit codes that were stored by a bit mask on top."""
    source = tmp_path / "stacked"
    shutil.copytree(LEGACY / "sparse-bitmask", source)
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".compressed")]:
        tensors[name] = tensors[name].clamp(-4, 4).to(torch.float8_e4m3fn)
        rows = tensors[name.replace("compressed", "bitmask")].shape[0]
        scale = torch.full((rows, 1), 0.5, dtype=torch.float16)
        tensors[name.replace("compressed", "weight_scale")] = scale
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    args = {"num_bits": 8, "type": "float", "symmetric": True}
    config["quantization_config"] |= {
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": args | {"strategy": "channel"},
                "input_activations": args | {"strategy": "token", "dynamic": True},
            }
        },
    }
    (source / "config.json").write_text(json.dumps(config))
    out = convert(str(source), tmp_path / "plain").out
    told = json.loads((out / "config.json").read_text())["quantization_config"]
    assert "sparsity_config" not in told
    assert told["format"] == "float-quantized"
    assert verify(str(out), "2:4")["weights"] == 7
    card = ModelCard.load(out / "README.md")
    assert card.data.tags == ["sparsekit", "quantized", "compressed-tensors"]
    assert "in the format of compressed-tensors" in card.text
    assert "dense weights" not in card.text
    _, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())


def broken(tmp_path: Path, name: str, change) -> Path:
    source = tmp_path / "broken"
    shutil.copytree(LEGACY / name, source)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return source


@pytest.mark.parametrize(
    ("name", "part", "words"),
    [
        ("sparse-24-bitmask", "bitmask", r"compressed is .* of \(2048,\), not"),
        ("sparse-bitmask", "bitmask", r"compressed is .* of \(2048,\), not"),
        ("sparse-24-bitmask", "shape", "is not the shape of a weight"),
        ("marlin-24-int4", "weight_packed", "weight_packed is .* not"),
        ("marlin-24-int4", "scale_packed", r"scale_packed is .* not .* of \(1, 64\)"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(tmp_path, name, part, words):
    full = f"model.layers.0.self_attn.q_proj.{part}"

    def change(tensors):
        old = tensors[full]
        tensors[full] = old ^ 1 if part == "bitmask" else torch.cat([old, old])

    source = broken(tmp_path, name, change)
    with pytest.raises(DataError, match=rf"broken: model\.layers\.0\.self_attn\.q_proj: .*{words}"):
        convert(str(source), tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize(
    ("name", "part", "tensor"),
    [
        ("sparse-bitmask", "shape", torch.tensor([-64, 64])),
        ("sparse-bitmask", "shape", torch.tensor([2**40, 2**40])),
        ("sparse-bitmask", "shape", torch.tensor([64.0, 64.0])),
        ("sparse-bitmask", "bitmask", torch.zeros(64, 8)),
        ("marlin-24-int4", "meta", torch.zeros(256, dtype=torch.int16)),
        ("marlin-24-int4", "meta", torch.zeros(2, 0, dtype=torch.int16)),
        ("marlin-24-int4", "meta", torch.zeros(2, 128)),
        ("marlin-24-int4", "weight_packed", torch.zeros(2, 128)),
    ],
    ids=str,
)
def test_parts_that_no_release_wrote_are_refused_and_crash_nothing(tmp_path, name, part, tensor):
    full = f"model.layers.0.self_attn.q_proj.{part}"
    source = broken(tmp_path, name, lambda tensors: tensors.update({full: tensor}))
    with pytest.raises(DataError, match=r"broken: model\.layers\.0\.self_attn\.q_proj: "):
        convert(str(source), tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_a_weight_that_no_tile_of_the_kernel_divides_is_refused(tmp_path):
    small = {
        "meta": torch.zeros(1, 32, dtype=torch.int16),
        "weight_packed": torch.zeros(1, 32, dtype=torch.int32),
        "scale_packed": torch.zeros(1, 16, dtype=torch.float16),
    }
    named = {f"model.layers.0.mlp.up_proj.{part}": tensor for part, tensor in small.items()}
    source = broken(tmp_path, "marlin-24-int4", lambda tensors: tensors.update(named))
    with refused("tiles-do-not-divide", "up_proj", "16 x 32", kind=DataError):
        convert(str(source), tmp_path / "plain")


def test_a_mask_of_2_4_with_three_values_in_a_group_is_refused(tmp_path):
    def change(tensors):
        mask = tensors["model.layers.0.mlp.up_proj.bitmask"]
        mask[0, 0] = 0b0001_0111  # as many as before, in other groups

    source = broken(tmp_path, "sparse-24-bitmask", change)
    with refused("pattern-violated", "2:4", kind=DataError):
        convert(str(source), tmp_path / "plain")


def test_a_missing_part_and_another_form_are_refused(tmp_path):
    source = broken(
        tmp_path, "sparse-bitmask", lambda t: t.pop("model.layers.0.mlp.up_proj.compressed")
    )
    with refused("incomplete-checkpoint", "model.layers.0.mlp.up_proj.compressed", kind=DataError):
        convert(str(source), tmp_path / "plain")
    with refused("kind-not-taken", "convert", "sparse-24", kind=DataError):
        convert(str(LEGACY / "dense"), tmp_path / "plain")
    magnitude = prune(PruneConfig(method="magnitude"), str(LEGACY / "dense"), tmp_path / "sparse")
    packed = pack(str(magnitude.out), tmp_path / "packed").out
    with refused("kind-not-taken", "packed", "convert", "sparsekit unpack", kind=DataError):
        convert(str(packed), tmp_path / "plain")


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path):
    class Stops(Progress):
        left = 3

        def step(self, label: str) -> None:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    source = str(LEGACY / "marlin-24-int4")
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "one", progress=Stops())
    one, two = convert(source, tmp_path / "one").out, convert(source, tmp_path / "two").out
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
