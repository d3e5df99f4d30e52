"""Packing and unpacking from disk to disk: the same bytes, checks, refusals."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import sparsekit.hf
from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.folder import FACTORS, PROVENANCE
from sparsekit.errors import CheckFailedError, DataError
from sparsekit.inspection.deploy import deploy
from sparsekit.inspection.inspect import inspect
from sparsekit.inspection.verify import verify
from sparsekit.model.form_linear import FormLinear
from sparsekit.packing import pack as stage
from sparsekit.packing.pack import pack
from sparsekit.packing.unpack import unpack
from sparsekit.progress import Progress
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.prune import prune
from sparsekit.quantization.config import QuantizeConfig
from sparsekit.quantization.quantize import quantize
from sparsekit.recovery.config import RecoverConfig
from sparsekit.recovery.recover import recover
from sparsekit.scoring.config import EvalConfig
from sparsekit.scoring.evaluate import evaluate


class StopsIn(Progress):
    """Interrupts a run after so many weights of a part of it."""

    def __init__(self, part: str, steps: int) -> None:
        self.part, self.left, self.on = part, steps, False

    def begin(self, title: str, total: int) -> None:
        self.on = title == self.part

    def step(self, label: str) -> None:
        self.left -= self.on
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.fixture
def sparse(family, tmp_path):
    """Gives a folder pruned to a pattern, of a named tiny checkpoint."""

    def folder(pattern: str = "2:4", name: str = "llama"):
        config = PruneConfig(method="magnitude", pattern=pattern)
        return prune(config, str(family(name)), tmp_path / "sparse").out

    return folder


def tensors_in(folder) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same_bytes(one, two) -> bool:
    """Whether two folders have the same tensors, of the same types, bit for bit."""
    before, after = tensors_in(one), tensors_in(two)
    return before.keys() == after.keys() and all(
        tensor.dtype == after[name].dtype
        and torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8))
        for name, tensor in before.items()
    )


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "gemma3", "phi3", "opt", "gpt2", "llama_sharded"]
)
@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_unpacking_gives_the_same_bytes_of_every_tensor(sparse, tmp_path, pattern, name):
    source = sparse(pattern, name)
    packed = pack(str(source), tmp_path / "packed").out
    plain = unpack(str(packed), tmp_path / "plain").out
    assert same_bytes(source, plain)
    assert Checkpoint.open(packed).n_bytes < 0.9 * Checkpoint.open(source).n_bytes
    history = [json.loads((f / PROVENANCE).read_text())["history"] for f in (source, plain)]
    assert history[1][:-1] == history[0]
    assert verify(str(plain))["pattern"] == [pattern]
    AutoModelForCausalLM.from_pretrained(plain)


def test_what_is_packed_runs_and_is_checked_as_it_is(sparse, row_file, tmp_path):
    source = sparse()
    packed = pack(str(source), tmp_path / "packed").out
    told = verify(str(packed))
    assert (told["pattern"], told["weights"]) == (["2:4"], 14)
    assert inspect(str(packed)).total["pattern"] == "2:4"
    one, two = evaluate(EvalConfig(text=str(row_file)), [str(source), str(packed)])
    assert one.perplexity.losses == two.perplexity.losses
    tokens = torch.arange(5, 13)[None]
    wanted = AutoModelForCausalLM.from_pretrained(source).generate(tokens, max_new_tokens=8)
    expanded = sparsekit.load(packed, resident="expand")
    assert torch.equal(expanded.generate(tokens, max_new_tokens=8), wanted)
    for model in (sparsekit.load(packed), AutoModelForCausalLM.from_pretrained(packed)):
        assert torch.equal(model.generate(tokens, max_new_tokens=8), wanted)
        kinds = [type(layer) for layer in model.modules()]
        assert kinds.count(FormLinear) == 14


@pytest.mark.parametrize("form", ["packed", "factored"])
def test_packed_weights_that_are_loaded_are_never_saved(sparse, composed, tmp_path, form):
    """Under the names of their parts a stock loader finds no weight, and draws random numbers."""
    if form == "packed":
        source = pack(str(sparse()), tmp_path / "packed").out
    else:
        source = composed(method="magnitude", compensate="lowrank", format="factored")
    model, out = sparsekit.load(source), tmp_path / "saved"
    with refused("kind-not-taken", "save_pretrained", "sparsekit unpack", kind=DataError):
        model.save_pretrained(out)
    assert not out.exists()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_expanded_weights_are_saved_as_those_of_a_plain_model(sparse, tmp_path, name):
    source, out = sparse(name=name), tmp_path / "saved"
    packed = pack(str(source), tmp_path / "packed").out
    sparsekit.load(packed, resident="expand").save_pretrained(out)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    model, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(told.values())
    wanted = AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert model.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("order", ["first", "after", "never"])
def test_importing_sparsekit_hf_is_what_lets_transformers_load_it(sparse, tmp_path, order):
    packed = pack(str(sparse()), tmp_path / "packed").out
    lines = ["from transformers import AutoModelForCausalLM", "import sparsekit.hf"]
    if order != "after":
        lines.reverse()
    if order == "never":  # sparsekit alone changes nothing of transformers
        lines[0] = "import sparsekit.model.form_linear"
    load = f"AutoModelForCausalLM.from_pretrained({str(packed)!r}, output_loading_info=True)"
    code = "\n".join([*lines, f"print(sorted(map(len, {load}[1].values())))"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if order == "never":
        assert done.returncode == 1
        assert "OSError: Error no file named model.safetensors" in done.stderr
    else:
        assert done.stdout == "[0, 0, 0, 0]\n"


def test_the_history_tells_size_and_share_of_each_weight(sparse, tmp_path):
    entry = pack(str(sparse()), tmp_path / "packed").entry.to_json()
    dtype = Checkpoint.open(tmp_path / "packed").tensors["model.layers.0.mlp.up_proj.values"].dtype
    size, share = 8 * dtype.itemsize, 0.5 + 1 / (8 * dtype.itemsize)
    for row in entry["weights"]:
        assert row["pattern"] == "2:4"
        assert row["share"] == pytest.approx(share)
        assert row["bits"] == pytest.approx(share * size)
    assert entry["totals"]["bytes"] < entry["totals"]["bytes_before"]


def test_a_weight_that_is_written_is_not_packed_again(sparse, tmp_path, monkeypatch):
    source, calls, real = sparse(), [], stage.weight_of
    monkeypatch.setattr(stage, "weight_of", lambda *a: calls.append(a) or real(*a))
    with pytest.raises(KeyboardInterrupt):
        pack(str(source), tmp_path / "out", progress=StopsIn("pack", 5))
    assert len(calls) == 5
    pack(str(source), tmp_path / "out")
    assert len(calls) == 14


@pytest.mark.parametrize("stage", ["pack", "unpack"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(sparse, tmp_path, stage):
    source, run = sparse(), pack
    if stage == "unpack":
        source, run = pack(str(source), tmp_path / "packed").out, unpack
    whole = run(str(source), tmp_path / "whole").out
    with pytest.raises(KeyboardInterrupt):
        run(str(source), tmp_path / "out", progress=StopsIn(stage, 5))
    assert not (tmp_path / "out").exists()
    report = run(str(source), tmp_path / "out")
    out = report.out
    for file in whole.glob("*.safetensors"):
        assert file.read_bytes() == (out / file.name).read_bytes()


def test_a_changed_byte_is_found_and_named(sparse, row_file, tmp_path):
    packed = pack(str(sparse()), tmp_path / "packed").out
    file = packed / FACTORS
    whole = file.read_bytes()
    checks = (
        verify,
        inspect,
        deploy,
        lambda path: evaluate(EvalConfig(text=str(row_file)), [path]),
        sparsekit.load,
        AutoModelForCausalLM.from_pretrained,
    )
    file.write_bytes(whole[:-3])
    for check in (*checks, lambda path: unpack(path, tmp_path / "plain")):
        with refused("damaged-file", kind=CheckFailedError):
            check(str(packed))
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    for check in checks:
        with refused("fingerprint-mismatch", "copy the folder again", kind=CheckFailedError):
            check(str(packed))
    with refused("wrong-checksum", "packed: model.layers", "copy", kind=CheckFailedError):
        unpack(str(packed), tmp_path / "plain")
    # With a fingerprint that somebody fitted to it, the weight's own is still another.
    told = json.loads((packed / PROVENANCE).read_text())
    del told["fingerprint"]
    (packed / PROVENANCE).write_text(json.dumps(told))
    with refused("wrong-checksum", "packed: model.layers", "copy", kind=CheckFailedError):
        unpack(str(packed), tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("without", ["row", "name", "sha256", "content"])
def test_a_weight_that_the_history_has_no_checksum_of_is_not_unpacked(sparse, tmp_path, without):
    packed = pack(str(sparse()), tmp_path / "packed").out
    told = json.loads((packed / PROVENANCE).read_text())
    rows = told["history"][-1]["weights"]
    name = rows[3]["name"]
    if without == "row":
        del rows[3]
    elif without == "content":
        rows[3] = None
    else:
        del rows[3][without]
    (packed / PROVENANCE).write_text(json.dumps(told))
    missing = refused("no-checksum", name, "copy", kind=CheckFailedError)
    with missing if without == "row" else refused("invalid-history", packed / PROVENANCE):
        unpack(str(packed), tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("part", ["values", "indices"])
def test_a_missing_part_is_named(sparse, tmp_path, part):
    packed = pack(str(sparse()), tmp_path / "packed").out
    checkpoint, tensors = Checkpoint.open(packed), load_file(packed / FACTORS)
    del tensors[f"model.layers.0.mlp.up_proj.{part}"]
    save_file(
        tensors,
        packed / FACTORS,
        {n: str(stored.format) for n, stored in checkpoint.packed.items()},
    )
    told = json.loads((packed / PROVENANCE).read_text())
    del told["fingerprint"]
    (packed / PROVENANCE).write_text(json.dumps(told))
    with refused("incomplete-checkpoint", f"up_proj.{part}", kind=CheckFailedError):
        unpack(str(packed), tmp_path / "plain")
    with refused("incomplete-checkpoint", "up_proj"):
        verify(str(packed))


def test_a_model_that_is_not_sparse_is_refused_with_the_size_it_would_have(family, tmp_path):
    with refused("not-sparse", "its 14 ", " MB", "prune", kind=DataError):
        pack(str(family("llama")), tmp_path / "out")
    assert not list(tmp_path.iterdir())


GRIDS = ("int4", "int4-g16", "int8", "w8a8", "fp8")


@pytest.fixture
def coded(sparse, tmp_path):
    """Gives a folder pruned to a pattern and quantized to a grid, of the tiny llama."""

    def folder(grid: str, pattern: str = "2:4"):
        config = QuantizeConfig(method="rtn", grid=grid)
        return quantize(config, str(sparse(pattern)), tmp_path / "coded").out

    return folder


@pytest.mark.sampled(4)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "50%"])
def test_codes_come_back_too(coded, tmp_path, grid, pattern):
    source = coded(grid, pattern)
    packed = pack(str(source), tmp_path / "packed").out
    plain = unpack(str(packed), tmp_path / "plain").out
    assert same_bytes(source, plain)
    configs = [json.loads((f / "config.json").read_text()) for f in (source, plain)]
    assert configs[0] == configs[1]
    assert (
        json.loads((packed / "config.json").read_text())["quantization_config"]["quant_method"]
        == "sparsekit"
    )
    assert Checkpoint.open(plain).grid == Checkpoint.open(source).grid


@pytest.mark.parametrize("grid", GRIDS)
def test_packed_codes_compute_what_the_codes_compute(coded, row_file, tmp_path, grid):
    source = coded(grid)
    packed = pack(str(source), tmp_path / "packed").out
    assert verify(str(packed))["pattern"] == ["2:4"]
    assert inspect(str(packed)).total["pattern"] == "2:4"
    one, two = evaluate(EvalConfig(text=str(row_file)), [str(source), str(packed)])
    assert one.perplexity.losses == two.perplexity.losses
    tokens = torch.arange(5, 13)[None]
    # What compressed-tensors itself makes of the codes, which it expands at the first call.
    wanted = AutoModelForCausalLM.from_pretrained(source)(tokens).logits
    for model in (sparsekit.load(packed), AutoModelForCausalLM.from_pretrained(packed)):
        assert [type(layer) for layer in model.modules()].count(FormLinear) == 14
        torch.testing.assert_close(model(tokens).logits, wanted)
    expanded = sparsekit.load(packed, resident="expand")
    assert torch.equal(expanded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    ("grid", "bits"),
    [("int4-g16", 2 + 1), ("int8", 4 + 1), ("fp8", 4 + 1)],  # codes of two in four, and places
)
def test_codes_take_the_bits_that_theory_says(coded, tmp_path, grid, bits):
    packed = pack(str(coded(grid)), tmp_path / "packed")
    checkpoint = Checkpoint.open(packed.out)
    for row in packed.entry.to_json()["weights"]:
        rows, columns = row["shape"]
        scales = checkpoint.tensors[row["name"].removesuffix("weight") + "scale"]
        own = 8 * (scales.stop - scales.start) / (rows * columns)
        assert row["value_bits"] + row["place_bits"] == bits
        assert row["bits"] == pytest.approx(bits + own)
        assert row["grid"] == grid


@pytest.mark.parametrize("part", ["values", "indices", "scale"])
def test_a_missing_part_of_codes_is_named(coded, tmp_path, part):
    packed = pack(str(coded("int4-g16")), tmp_path / "packed").out
    checkpoint, tensors = Checkpoint.open(packed), load_file(packed / FACTORS)
    del tensors[f"model.layers.0.mlp.up_proj.{part}"]
    told = {n: str(stored.format) for n, stored in checkpoint.packed.items()}
    save_file(tensors, packed / FACTORS, told)
    with refused("incomplete-checkpoint", "up_proj", part, kind=CheckFailedError):
        unpack(str(packed), tmp_path / "plain")
    with refused("incomplete-checkpoint", "up_proj", part, kind=DataError):
        sparsekit.load(packed)


def test_codes_without_zeros_are_refused_with_the_size_they_would_have(family, tmp_path):
    config = QuantizeConfig(method="rtn", grid="int8")
    coded = quantize(config, str(family("llama")), tmp_path / "coded").out
    with refused("not-sparse", "its 14 ", " MB", kind=DataError):
        pack(str(coded), tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "skip"), [("qwen2", "down_proj"), ("opt", "fc1"), ("llama_sharded", "o_proj")]
)
def test_codes_beside_biases_and_in_shards_come_back(sparse, tmp_path, name, skip):
    source = quantize(
        QuantizeConfig(method="rtn", grid="int8", skip=(skip,)),
        str(sparse("2:4", name)),
        tmp_path / "coded",
    ).out
    packed = pack(str(source), tmp_path / "packed").out
    plain = unpack(str(packed), tmp_path / "plain").out
    assert same_bytes(source, plain)
    tokens = torch.arange(5, 13)[None]
    wanted = AutoModelForCausalLM.from_pretrained(source)(tokens).logits
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(packed)(tokens).logits, wanted)


def test_codes_that_are_not_sparse_are_packed_with_the_others(family, tmp_path):
    pruned = PruneConfig(method="magnitude", skip=("down_proj",))
    source = prune(pruned, str(family("llama")), tmp_path / "sparse").out
    files = load_file(source / "model.safetensors")
    files["model.layers.1.self_attn.o_proj.weight"].zero_()
    save_file(files, source / "model.safetensors", {"format": "pt"})
    (source / PROVENANCE).unlink()
    coded = quantize(QuantizeConfig(method="rtn", grid="int8"), str(source), tmp_path / "coded").out
    packed = pack(str(coded), tmp_path / "packed")
    patterns = {
        row["name"].split(".")[-2]: row["pattern"] for row in packed.entry.to_json()["weights"]
    }
    assert ":" not in patterns["down_proj"]
    assert patterns["o_proj"] == "1:4"  # of the last block: nothing but zeros
    assert same_bytes(coded, unpack(str(packed.out), tmp_path / "plain").out)


def test_scales_keep_their_type_when_the_model_computes_in_a_narrower_one(coded, tmp_path):
    """Float32 scales in a model that computes in bfloat16: a cast of them would be seen."""
    source = coded("int8")
    file = source / "model.safetensors"
    tensors = {
        name: tensor.float() * 1.001 if name.endswith("_scale") else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})
    (source / PROVENANCE).unlink()
    packed = pack(str(source), tmp_path / "packed").out
    at = "model.layers.0.mlp.up_proj"
    wanted = Checkpoint.open(source).read([f"{at}.weight"])[f"{at}.weight"]
    assert wanted.dtype == torch.float32
    stock = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16)
    stock.get_submodule(at).expand()
    for model in (sparsekit.load(packed, "bfloat16", "expand"), stock):
        assert torch.equal(model.get_submodule(at).weight, wanted.bfloat16())


@pytest.mark.parametrize("what", ["int9 bfloat16", "int8 int8", "2;4"])
def test_damaged_words_beside_the_tensors_are_named(coded, tmp_path, what):
    packed = pack(str(coded("int8")), tmp_path / "packed").out
    told = dict.fromkeys(Checkpoint.open(packed).packed, f"2:4 {what}")
    save_file(load_file(packed / FACTORS), packed / FACTORS, told)
    with pytest.raises(CheckFailedError, match=r"factors\.safetensors: model\.layers\.\S+: "):
        verify(str(packed))
    with pytest.raises(CheckFailedError, match=r"factors\.safetensors: model\.layers\.\S+: "):
        unpack(str(packed), tmp_path / "plain")


def test_a_place_outside_its_group_is_named(coded, tmp_path):
    packed = pack(str(coded("int8", "4:8")), tmp_path / "packed").out
    tensors, checkpoint = load_file(packed / FACTORS), Checkpoint.open(packed)
    told = {n: str(stored.format) for n, stored in checkpoint.packed.items()}
    tensors["model.layers.0.mlp.up_proj.indices"][0] = 0
    save_file(tensors, packed / FACTORS, told)
    with refused("fingerprint-mismatch", kind=CheckFailedError):
        sparsekit.load(packed)
    (packed / PROVENANCE).unlink()  # and where nobody has recorded the bytes
    model = sparsekit.load(packed)
    with refused("invalid-places", "layers.0.mlp.up_proj.weight", "4:8", kind=DataError):
        model(torch.arange(4)[None])


def test_codes_outside_the_blocks_are_refused_by_name(coded, tmp_path):
    """As some other tools quantize the head too."""
    source = coded("w8a8")
    file, head = source / "model.safetensors", torch.ones(260, 32)
    tensors = load_file(file) | {"lm_head.weight": head.to(torch.int8)}
    save_file(tensors | {"lm_head.weight_scale": head[:, :1].clone()}, file, {"format": "pt"})
    (source / PROVENANCE).unlink()
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": False}
    (source / "config.json").write_text(json.dumps(config))
    with refused("not-in-a-block", "lm_head.weight", kind=DataError):
        pack(str(source), tmp_path / "out")


@pytest.fixture
def composed(family, row_file, tmp_path):
    """Gives a folder whose weights are products of the factors beside them."""

    def folder(name: str = "llama", **options: Any):
        calibration = str(row_file)
        options = options or {"method": "magnitude", "compensate": "lowrank"}
        config = PruneConfig(calibration=calibration, **options)
        return prune(config, str(family(name)), tmp_path / "composed").out

    return folder


@torch.no_grad()
def far(one, two) -> float:
    """How far the logits of two folders' models lie apart, as a share of theirs, in float32.

    Factors are not rounded where their products are.
    """
    found = [
        sparsekit.load(path, "float32")(torch.arange(5, 13)[None]).logits for path in (one, two)
    ]
    return ((found[0] - found[1]).norm() / found[1].norm()).item()


@pytest.fixture
def with_branches(family, row_file, tmp_path):
    """Gives a folder whose weights were trained with low-rank branches, the factors beside them."""

    def folder(name: str):
        config = RecoverConfig(
            method="ast", data=str(row_file), tokens=96, batch=2, length=16, lr=1e-3, slorb=16
        )
        return recover(config, str(family(name)), tmp_path / "branches").out

    return folder


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("made_by", ["lowrank", "armor", "slorb"])
def test_factors_are_kept_alone_and_multiplied_out(
    composed, with_branches, tmp_path, made_by, name
):
    if made_by == "slorb":
        source = with_branches(name)
    elif made_by == "armor":
        source = composed(name, method="armor", option={"block": "8", "sweeps": "4"})
    else:
        source = composed(name)
    packed = pack(str(source), tmp_path / "packed").out
    assert Checkpoint.open(packed).n_bytes < 0.9 * Checkpoint.open(source).n_bytes
    assert verify(str(packed))["pattern"] == ["2:4"]
    plain = unpack(str(packed), tmp_path / "plain").out
    assert same_bytes(source, plain)
    verify(str(plain))
    assert far(packed, source) < 0.01
    tokens = torch.arange(5, 13)[None]
    stock = AutoModelForCausalLM.from_pretrained(packed)(tokens).logits
    assert torch.equal(stock, sparsekit.load(packed)(tokens).logits)
    expanded = sparsekit.load(packed, "float32", "expand")(tokens).logits
    factors = sparsekit.load(packed, "float32")(tokens).logits
    torch.testing.assert_close(expanded, factors, rtol=1e-4, atol=1e-4)


def test_weights_that_were_changed_after_pruning_are_not_lost(composed, tmp_path):
    source = composed()
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1.5
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (source / PROVENANCE).unlink()
    with refused("factors-differ", "up_proj", " at [", kind=DataError):
        pack(str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["codes", "factors"])
def test_an_interrupted_pack_of_other_forms_goes_on_to_the_same_bytes(
    coded, composed, tmp_path, kind
):
    source = coded("int4-g16") if kind == "codes" else composed()
    whole = pack(str(source), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        pack(str(source), tmp_path / "out", progress=StopsIn("pack", 5))
    again = pack(str(source), tmp_path / "out")
    assert again.entry.to_json()["weights"] == whole.entry.to_json()["weights"]
    for file in whole.out.glob("*.safetensors"):
        assert file.read_bytes() == (again.out / file.name).read_bytes()


def test_factors_that_were_written_alone_are_multiplied_out(composed, tmp_path):
    source = composed(method="magnitude", compensate="lowrank", format="factored")
    plain = unpack(str(source), tmp_path / "plain").out
    assert verify(str(plain))["weights"] == 14
    assert far(plain, source) < 0.01


def test_what_is_in_the_other_form_already_is_refused(sparse, tmp_path):
    source = sparse()
    with refused("kind-not-taken", "plain", "unpack", kind=DataError):
        unpack(str(source), tmp_path / "out")
    packed = pack(str(source), tmp_path / "packed").out
    with refused("kind-not-taken", "packed", "sparsekit unpack", kind=DataError):
        pack(str(packed), tmp_path / "out")
    (packed / PROVENANCE).unlink()
    with refused("no-history", packed, kind=DataError):
        unpack(str(packed), tmp_path / "out")


def test_stages_that_take_plain_models_say_how_to_make_one(sparse, tmp_path):
    packed, out = str(pack(str(sparse()), tmp_path / "packed").out), tmp_path / "out"
    runs = (
        lambda: prune(PruneConfig(method="magnitude"), packed, out),
        lambda: quantize(QuantizeConfig(method="rtn", grid="int8"), packed, out),
        lambda: recover(RecoverConfig(tokens=2048), packed, out),
    )
    for run in runs:
        with refused("kind-not-taken", "packed", "sparsekit unpack", kind=DataError):
            run()
    assert not out.exists()
