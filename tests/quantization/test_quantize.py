"""Quantization from disk to disk: what stock transformers loads, resume, refusals."""

import json
import shutil

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from listeners import Notes
from refusals import refused
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from verbs import replace

import sparsekit
from sparsekit.bench.infer import InferConfig, _measure
from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.compressed_tensors import grid_of
from sparsekit.errors import DataError, UsageError
from sparsekit.inspection.inspect import inspect
from sparsekit.inspection.verify import verify
from sparsekit.model.block_stream import BlockStream
from sparsekit.packing.convert import convert
from sparsekit.progress import Progress
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.prune import prune
from sparsekit.quantization.config import QuantizeConfig
from sparsekit.quantization.quantize import quantize
from sparsekit.recovery.config import RecoverConfig
from sparsekit.recovery.recover import recover
from sparsekit.scoring.config import EvalConfig
from sparsekit.scoring.evaluate import evaluate
from sparsekit.solvers.input_stats import Stats
from sparsekit.weights.grids import Grid
from sparsekit.weights.patterns import Pattern

ZEROED = "model.layers.0.mlp.up_proj.weight"
GRIDS = ("int4-g16", "int4", "int8", "w8a8", "fp8")


class StopsAfter(Progress):
    """Interrupts a run after so many blocks."""

    def __init__(self, blocks: int) -> None:
        self.left = blocks

    def step(self, label: str) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.fixture
def run(row_file, tmp_path):
    """Quantizes a folder with the token rows of conftest.py; gives the folder that is made."""

    def quantized(source, name: str = "out", progress=None, **options):
        options.setdefault("calibration", str(row_file))
        told = {} if progress is None else {"progress": progress}
        return quantize(QuantizeConfig(**options), str(source), tmp_path / name, **told).out

    return quantized


@pytest.fixture(scope="module")
def sparse(family, row_file, tmp_path_factory):
    """Gives the folder of a tiny Llama with a pattern, in bfloat16 as models are published."""
    root = tmp_path_factory.mktemp("sparse")

    def folder(pattern: str):
        out = root / pattern.replace(":", "-")
        if not out.exists():
            prune(PruneConfig(method="magnitude", pattern=pattern), str(family("llama")), out)
        return out

    return folder


@pytest.fixture(scope="module")
def with_zeros(family, tmp_path_factory):
    """The same of a model of which a row and a group of inputs of another are zero throughout."""
    root = tmp_path_factory.mktemp("zeros")

    def folder(pattern: str):
        out, dense = root / pattern.replace(":", "-"), root / "dense"
        if not dense.exists():
            shutil.copytree(family("llama"), dense)
            tensors = load_file(dense / "model.safetensors")
            tensors[ZEROED][3] = 0.0
            tensors[ZEROED][5, :16] = 0.0
            save_file(tensors, dense / "model.safetensors", {"format": "pt"})
        if not out.exists():
            prune(PruneConfig(method="magnitude", pattern=pattern), str(dense), out)
        return out

    return folder


def stock(folder, **options):
    """The model as transformers loads it, after a first forward, which expands the weights."""
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(told.values())
    model(torch.arange(4)[None])
    return model.eval()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "50%"])
def test_stock_transformers_loads_it_without_a_revived_zero(run, with_zeros, method, grid, pattern):
    source = with_zeros(pattern)
    out = run(source, method=method, grid=grid)
    before, model, found = Checkpoint.open(source), stock(out), Checkpoint.open(out)
    assert len(found.quantized) == 14
    weight = before.read([ZEROED])[ZEROED]
    assert not weight[3].any()
    assert not weight[5, :16].any()
    for name in found.quantized:
        weight = model.get_parameter(name).detach()
        assert torch.equal(weight, found.read([name])[name])
        assert not weight[before.read([name])[name] == 0].any()
        Pattern.parse(pattern).check(weight, name)
    told = verify(str(out))
    assert (told["pattern"], told["weights"]) == ([pattern], 14)
    assert inspect(str(out)).total["zeros"] == told["zeros"]


@pytest.mark.parametrize("grid", GRIDS)
def test_our_perplexity_is_that_of_the_stock_model(run, sparse, row_file, rows, grid):
    """Of grids for inputs too: those are rounded as compressed-tensors does it."""
    out = run(sparse("2:4"), method="rtn", grid=grid)
    found = evaluate(EvalConfig(text=str(row_file), dtype="float32"), [str(out)])[0].perplexity
    # Loaded in another type it would make other weights of the codes.
    model = torch.nn.Module.float(stock(out))
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss.item() for row in rows]
    assert found.log == pytest.approx(sum(losses) / len(losses), abs=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_configuration_is_one_that_compressed_tensors_and_vllm_take(run, sparse, grid):
    out = run(sparse("2:4"), method="rtn", grid=grid, skip=["down_proj"])
    told = json.loads((out / "config.json").read_text())["quantization_config"]
    assert QuantizationConfig.model_validate(told).quantization_status == "compressed"
    # Nothing else: vLLM refuses models with a `sparsity_config`, even an empty one.
    known = {"config_groups", "format", "ignore", "quant_method", "quantization_status"}
    assert told.keys() == known
    layers = [f"model.layers.{n}.mlp.down_proj" for n in (0, 1)]
    assert told["ignore"] == ["lm_head", *layers]
    assert grid_of(told) == Grid.parse(grid)


@pytest.mark.parametrize(
    ("grid", "each", "for_scales"),
    [("int4-g16", 4, 16 / 16), ("int8", 8, 16 / 32), ("w8a8", 8, 16 / 32), ("fp8", 8, 16 / 32)],
)
def test_sizes_are_those_that_the_grid_says(run, sparse, grid, each, for_scales):
    """A q_proj of 32 inputs has a 16-bit scale for each group or row, and maybe its shape."""
    out = run(sparse("2:4"), method="rtn", grid=grid)
    row = json.loads((out / "sparsekit.json").read_text())["history"][-1]["weights"][0]
    shape = 0 if grid in ("w8a8", "fp8") else 2 * 64 / (32 * 32)
    assert row["bits"] == pytest.approx(each + for_scales + shape)


def test_the_dense_form_holds_the_same_numbers(run, sparse):
    coded = Checkpoint.open(run(sparse("2:4"), "coded", grid="int4-g16"))
    dense = Checkpoint.open(run(sparse("2:4"), "dense", grid="int4-g16", format="dense"))
    assert not dense.quantized
    assert "quantization_config" not in json.loads((dense.path / "config.json").read_text())
    for name, weight in dense.read(dense.places).items():
        assert torch.equal(weight, coded.read([name])[name])
    assert verify(str(dense.path))["zeros"] == verify(str(coded.path))["zeros"]


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("form", ["compressed-tensors", "dense"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(run, sparse, tmp_path, form, method):
    options = {"method": method, "grid": "int4-g16", "format": form}
    with pytest.raises(KeyboardInterrupt):
        run(sparse("2:4"), progress=StopsAfter(1), **options)
    assert not (tmp_path / "out").exists()
    first, second = run(sparse("2:4"), **options), run(sparse("2:4"), "again", **options)
    entry = json.loads((first / "sparsekit.json").read_text())["history"][-1]
    assert entry["resumed_blocks"] == 1
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        run(sparse("2:4"), "other", progress=StopsAfter(1), **options)
    with refused("other-recipe", "grid", "int4-g16", kind=UsageError):
        run(sparse("2:4"), "other", **(options | {"grid": "int4"}))


def test_damping_that_had_to_be_raised_is_told(run, sparse, row_file):
    """24 tokens make no Gram matrix of 32 inputs that is positive definite."""
    notes, rows = Notes(), {"calibration": str(row_file), "samples": 1}
    options = {"option": {"damping": "0"}, **rows}
    run(sparse("2:4"), grid="int4-g16", progress=notes, **options)
    assert any("14 weights needed their damping raised" in note for note in notes.told)


def test_shards_get_an_index_of_what_is_in_them(run, copy_of, tmp_path):
    source = copy_of("llama_sharded")
    out = run(source, method="rtn", grid="int8")
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.layers.0.mlp.up_proj.weight_packed" in weight_map
    assert "model.layers.0.mlp.up_proj.weight" not in weight_map
    assert len(set(weight_map.values())) > 1
    stock(out)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral", "gemma3", "phi3", "opt"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_other_families_load_too_and_are_what_they_were(run, family, row_file, name, method):
    """At 8 bits hardly anything is lost, which a scale that nothing takes back would not leave."""
    out = run(family(name), method=method, grid="int8")
    stock(out)
    found, before = (
        score.perplexity
        for score in evaluate(EvalConfig(text=str(row_file)), [str(out), str(family(name))])
    )
    assert found.log == pytest.approx(before.log, rel=0.01)


def test_scales_of_awq_go_into_norms(run, sparse):
    before = Checkpoint.open(sparse("2:4"))
    after = Checkpoint.open(run(before.path, method="awq", grid="int4-g16"))
    norms = [name for name in before.places if "layernorm" in name]
    old, new = before.read(norms), after.read(norms)
    entry = json.loads((after.path / "sparsekit.json").read_text())["history"][-1]
    ratios = {row["name"]: row["numbers"].get("ratio", 0.0) for row in entry["weights"]}
    for name in norms:
        layer = "self_attn.q_proj" if "input" in name else "mlp.up_proj"
        weight = f"{name.rpartition('.weight')[0].rpartition('.')[0]}.{layer}.weight"
        assert torch.equal(old[name], new[name]) == (ratios[weight] == 0)
    assert any(ratios.values())


def test_a_group_that_does_not_divide_is_refused_with_one_that_does(run, sparse):
    named = "q_proj.weight", "32 inputs", "128", "--grid int4-g32"
    with refused("grid-does-not-divide", *named, kind=UsageError):
        run(sparse("2:4"), grid="int4-g128")


@pytest.mark.parametrize("skip", ["q_proj", "up_proj"])
def test_layers_that_servers_fuse_are_skipped_together(run, sparse, skip):
    with refused("splits-fused-layers", f"{skip}.weight", kind=UsageError):
        run(sparse("2:4"), grid="int4-g16", skip=[skip])
    run(sparse("2:4"), grid="int4-g16", skip=[skip], format="dense")


def test_gpt2_has_no_linear_layers_but_numbers(run, family):
    with refused("not-linear", ".weight", "--format dense", kind=UsageError):
        run(family("gpt2"), grid="int8")
    stock(run(family("gpt2"), grid="int8", format="dense"))


def test_what_is_quantized_already_is_refused_by_name(run, sparse, tmp_path):
    out = run(sparse("2:4"), grid="int4-g16")
    with refused("kind-not-taken", "int4-g16", "quantize", kind=DataError):
        run(out, "twice", grid="int8")
    with refused("kind-not-taken", "int4-g16", "prune", kind=DataError):
        prune(PruneConfig(method="magnitude"), str(out), tmp_path / "pruned")
    with refused("kind-not-taken", "int4-g16", "train", kind=DataError):
        recover(RecoverConfig(tokens=1024), str(out), tmp_path / "trained")


def test_a_model_of_factors_is_refused(run, family, row_file, tmp_path):
    config = PruneConfig(method="magnitude", compensate="lowrank", calibration=str(row_file))
    factored = prune(config, str(family("llama")), tmp_path / "factored").out
    with refused("kind-not-taken", "factored", "armor", kind=DataError):
        run(factored, grid="int4-g16")


@pytest.mark.parametrize(
    "change",
    [
        {"quant_method": "gptq"},
        {"format": "os.system"},
        {"format": "module.py:X"},
        {"quant_method": "module.py:X"},
        {"format": "sparse-24-bitmask"},
        {"config_groups": {}},
        {"config_groups": {"a": {"weights": {"num_bits": 4, "strategy": "group"}}}},
        {"kv_cache_scheme": {"num_bits": 8}},
        {"transform_config": {"config_groups": {"R4": {"type": "hadamard"}}}},
    ],
    ids=str,
)
def test_a_format_that_is_not_ours_is_refused_and_never_run(
    run, sparse, tmp_path, monkeypatch, change
):
    """A file that is named is there, and would leave a mark if it were run."""
    out, mark = run(sparse("2:4"), grid="int4-g16"), tmp_path / "mark"
    (out / "module.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass X: pass\n")
    monkeypatch.chdir(out)
    monkeypatch.syspath_prepend(str(out))
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] |= change
    (out / "config.json").write_text(json.dumps(config))
    for read in (
        lambda: inspect(str(out)),
        lambda: sparsekit.load(out),
        lambda: _measure(InferConfig(prompt=8, new=2), "out", str(out), 1),  # of `bench infer`
    ):
        with refused("kind-not-taken", "/out", kind=DataError):
            read()
    with pytest.raises(DataError) as caught:
        convert(str(out), tmp_path / "plain")
    assert caught.value.code in ("kind-not-taken", "no-weights")
    assert not mark.exists()


def test_tensors_that_do_not_fit_together_are_refused(run, sparse):
    out = run(sparse("2:4"), grid="int4-g16")
    tensors = load_file(out / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    (out / "sparsekit.json").unlink()
    short = {**tensors, f"{name}_scale": tensors[f"{name}_scale"][:, :1].contiguous()}
    save_file(short, out / "model.safetensors", {"format": "pt"})
    with refused("shape-mismatch", "up_proj.weight", "weight_scale", "int4-g16", kind=DataError):
        inspect(str(out))
    del tensors[f"{name}_packed"]
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with refused(
        "incomplete-checkpoint", "model.layers.0.mlp.up_proj.weight_packed", kind=DataError
    ):
        Checkpoint.open(out)


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        ({"method": "gptk"}, "no-method", ("'gptk'", "'gptq'")),
        ({"option": {"dampin": "1"}}, "no-option", ("'dampin'", "'damping'")),
        ({"format": "gguf"}, "not-a-choice", ("--format 'gguf'",)),
        ({"skip": ["nothing"]}, "no-match", ("--skip 'nothing'",)),
    ],
)
def test_wrong_words_are_refused(run, sparse, change, code, named):
    with refused(code, *named, kind=UsageError):
        run(sparse("2:4"), **({"grid": "int4-g16"} | change))


def test_an_unknown_grid_is_refused(run, sparse):
    with refused("unknown-grid", "'int5'", kind=UsageError):
        run(sparse("2:4"), grid="int5")


@pytest.mark.sampled(5)
@pytest.mark.parametrize("grid", ["int4-g16", "int8", "fp8"])
@pytest.mark.parametrize("pattern", ["2:4", "50%"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
def test_prune_can_quantize_in_the_same_pass(family, row_file, tmp_path, method, pattern, grid):
    rows = str(row_file)
    config = PruneConfig(method=method, pattern=pattern, then=grid, calibration=rows)
    done = prune(config, str(family("llama")), tmp_path / "out")
    assert verify(str(done.out))["pattern"] == [pattern]
    assert str(Checkpoint.open(done.out).grid) == grid
    assert done.entry.settings.then == grid
    told = sum(row["zeros"] for row in done.entry.to_json()["weights"])
    after = {"grid_damping" in row["numbers"] for row in done.entry.to_json()["weights"]}
    assert after == {method != "sparsegpt"}  # which rounds in its own sweep
    model, zeros = stock(done.out), 0
    model(torch.arange(4)[None])
    for name in Checkpoint.open(done.out).quantized:
        weight = model.get_parameter(name).detach()
        Pattern.parse(pattern).check(weight, name)
        zeros += int((weight == 0).sum())
    assert zeros == told


def test_one_pass_that_is_interrupted_goes_on_to_the_same_bytes(family, row_file, tmp_path):
    rows = str(row_file)
    config = PruneConfig(method="sparsegpt", then="int4-g16", calibration=rows)
    whole = prune(config, str(family("llama")), tmp_path / "whole").out
    with pytest.raises(KeyboardInterrupt):
        prune(config, str(family("llama")), tmp_path / "out", progress=StopsAfter(1))
    out = prune(config, str(family("llama")), tmp_path / "out").out
    for name in ("model.safetensors", "config.json"):
        assert (whole / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_one_pass_loses_less_than_two(family, row_file, rows, tmp_path, method):
    """Over the first block, whose inputs are those of the dense model in both cases.

    Found: 0.85 of the error of pruning and then GPTQ for Wanda, and 1.006 for SparseGPT, which has
    made up for most of it already.
    """
    calibration = str(row_file)
    source, notes = str(family("llama")), Notes()
    config = PruneConfig(method=method, then="int4-g16", calibration=calibration)
    one = prune(config, source, tmp_path / "one", progress=notes).out
    assert not [note for note in notes.told if "damping" in note]
    first = prune(replace(config, then=None), source, tmp_path / "first").out
    two = QuantizeConfig(method="gptq", grid="int4-g16", calibration=calibration)
    folders = one, quantize(two, str(first), tmp_path / "two").out
    stream = BlockStream(Checkpoint.open(family("llama")), device="cpu", dtype=torch.float32)
    stream.feed(rows)
    block = next(iter(stream))
    block.load()
    sums = block.observe(block.targets, Stats.NORMS, advance=False)
    lost = []
    for folder in folders:
        read = Checkpoint.open(folder).read([target.name for target in block.targets])
        errors = [sums[t.name].relative_error(block.weight(t), read[t.name]) for t in block.targets]
        lost.append(sum(errors))
    assert lost[0] < (0.95 if method == "wanda" else 1.02) * lost[1]


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        ({"then": "int4-g24"}, "grid-does-not-divide", ("24", "--then int4-g32")),
        ({"then": "int8", "skip": ("q_proj",)}, "splits-fused-layers", ("q_proj",)),
        (
            {"then": "int8", "compensate": "lowrank"},
            "conflicting-options",
            ("--then", "--compensate lowrank"),
        ),
        (
            {"then": "int8", "compensate": "lowrank", "format": "factored"},
            "conflicting-options",
            ("--then", "--format factored"),
        ),
        ({"then": "int8", "method": "armor"}, "conflicting-options", ("--then", "armor")),
    ],
)
def test_what_one_pass_cannot_do_is_refused(family, row_file, tmp_path, change, code, named):
    def run() -> None:
        config = PruneConfig(calibration=str(row_file), **change)
        prune(config, str(family("llama")), tmp_path / "out")

    with refused(code, *named, kind=UsageError):
        run()
    assert not (tmp_path / "out").exists()


def test_the_same_bytes_whatever_came_before(run, sparse):
    config = {"grid": "int4-g16"}
    one, two = run(sparse("2:4"), "one", **config), run(sparse("2:4"), "two", **config)
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_a_checkpoint_of_a_bare_base_model_names_layers_as_the_model_does(run, sparse, copy_of):
    """Its tensors lack the prefix `model.`; compressed-tensors goes by the modules' names."""
    folder = copy_of(sparse("2:4"))
    file = folder / "model.safetensors"
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    (folder / "sparsekit.json").unlink()
    out = run(folder, method="rtn", grid="int8", calibration=None, skip=["down_proj"])
    told = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert told == ["lm_head", *(f"model.layers.{n}.mlp.down_proj" for n in range(2))]
