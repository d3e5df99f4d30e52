"""Packing and unpacking from disk to disk: the same bytes, checks, refusals."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import sparsekit
from sparsekit.errors import CheckFailedError, DataError
from sparsekit.models.calibration import Calibration
from sparsekit.models.checkpoint import Checkpoint
from sparsekit.models.factored import FactoredLinear
from sparsekit.models.folder import FACTORS, PROVENANCE
from sparsekit.progress import Progress
from sparsekit.stages import pack as stage
from sparsekit.stages.config import EvalConfig, PruneConfig
from sparsekit.stages.evaluate import evaluate
from sparsekit.stages.inspect import inspect, verify
from sparsekit.stages.pack import pack, unpack
from sparsekit.stages.prune import prune
from sparsekit.stages.quantconfig import QuantizeConfig
from sparsekit.stages.quantize import quantize


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


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "phi3", "opt", "llama_sharded"])
@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_unpacking_gives_the_same_bytes_of_every_tensor(sparse, tmp_path, pattern, name):
    source = sparse(pattern, name)
    packed = pack(str(source), tmp_path / "packed").out
    plain = unpack(str(packed), tmp_path / "plain").out
    before, after = tensors_in(source), tensors_in(plain)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert torch.equal(tensor.view(torch.uint8), after[key].view(torch.uint8))
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
    for model in (sparsekit.load(packed), AutoModelForCausalLM.from_pretrained(packed)):
        assert torch.equal(model.generate(tokens, max_new_tokens=8), wanted)
        kinds = [type(layer) for layer in model.modules()]
        assert kinds.count(FactoredLinear) == 14


@pytest.mark.parametrize("order", ["first", "after", "never"])
def test_importing_sparsekit_is_what_lets_transformers_load_it(sparse, tmp_path, order):
    packed = pack(str(sparse()), tmp_path / "packed").out
    lines = ["from transformers import AutoModelForCausalLM", "import sparsekit"]
    if order != "after":
        lines.reverse()
    lines = [line for line in lines if order != "never" or "sparsekit" not in line]
    load = f"AutoModelForCausalLM.from_pretrained({str(packed)!r}, output_loading_info=True)"
    code = "\n".join([*lines, f"print(sorted(map(len, {load}[1].values())))"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if order == "never":
        assert done.returncode == 1
        assert "OSError: Error no file named model.safetensors" in done.stderr
    else:
        assert done.stdout == "[0, 0, 0, 0]\n"


def test_the_history_tells_size_and_share_of_each_weight(sparse, tmp_path):
    entry = pack(str(sparse()), tmp_path / "packed").entry
    dtype = Checkpoint.open(tmp_path / "packed").factors["model.layers.0.mlp.up_proj.values"].dtype
    size, share = 8 * dtype.itemsize, 0.5 + 1 / (8 * dtype.itemsize)
    for row in entry["weights"]:
        assert row["pattern"] == "2:4"
        assert row["share"] == pytest.approx(share)
        assert row["bits"] == pytest.approx(share * size)
    assert entry["totals"]["bytes"] < entry["totals"]["bytes_before"]


def test_a_weight_that_is_written_is_not_packed_again(sparse, tmp_path, monkeypatch):
    source, calls, real = sparse(), [], stage.pack_weight
    monkeypatch.setattr(stage, "pack_weight", lambda *a: calls.append(a) or real(*a))
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
    out = run(str(source), tmp_path / "out").out
    for file in whole.glob("*.safetensors"):
        assert file.read_bytes() == (out / file.name).read_bytes()


def test_a_changed_byte_is_found_and_named(sparse, tmp_path):
    packed = pack(str(sparse()), tmp_path / "packed").out
    file = packed / FACTORS
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    with pytest.raises(CheckFailedError, match="is not a whole safetensors file"):
        verify(str(packed))
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(CheckFailedError, match="are not those that"):
        verify(str(packed))
    # With a fingerprint that somebody fitted to it, the weight's own is still another.
    told = json.loads((packed / PROVENANCE).read_text())
    del told["fingerprint"]
    (packed / PROVENANCE).write_text(json.dumps(told))
    with pytest.raises(CheckFailedError, match=r"packed: model\.layers\S*\.weight"):
        unpack(str(packed), tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("part", ["values", "indices"])
def test_a_missing_part_is_named(sparse, tmp_path, part):
    packed = pack(str(sparse()), tmp_path / "packed").out
    checkpoint, tensors = Checkpoint.open(packed), load_file(packed / FACTORS)
    del tensors[f"model.layers.0.mlp.up_proj.{part}"]
    save_file(tensors, packed / FACTORS, dict(checkpoint.factor_patterns))
    told = json.loads((packed / PROVENANCE).read_text())
    del told["fingerprint"]
    (packed / PROVENANCE).write_text(json.dumps(told))
    with pytest.raises(CheckFailedError, match=r"lacks .*up_proj"):
        unpack(str(packed), tmp_path / "plain")
    with pytest.raises((CheckFailedError, DataError), match="up_proj"):
        verify(str(packed))


def test_a_model_that_is_not_sparse_is_refused_with_the_size_it_would_have(family, tmp_path):
    with pytest.raises(
        DataError, match=r"is not sparse: packed, its 14 .* about \S+ MB in the place of \S+; prune"
    ):
        pack(str(family("llama")), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_other_forms_are_refused_by_name(sparse, family, row_file, tmp_path):
    source = sparse()
    quantized = quantize(
        QuantizeConfig(method="rtn", grid="int8"), str(source), tmp_path / "quantized"
    ).out
    with pytest.raises(DataError, match="is quantized to int8"):
        pack(str(quantized), tmp_path / "out")
    config = PruneConfig(
        method="magnitude", compensate="lowrank", calibration=Calibration(source=str(row_file))
    )
    factored = prune(config, str(family("llama")), tmp_path / "factored").out
    with pytest.raises(DataError, match="has factors already"):
        pack(str(factored), tmp_path / "out")
    with pytest.raises(DataError, match="was not written by pack"):
        unpack(str(source), tmp_path / "out")
    with pytest.raises(DataError, match="was not written by pack"):
        unpack(str(factored), tmp_path / "out")
