"""What is said of each runtime follows from the form of the checkpoint."""

import re
import tomllib
from itertools import product

import pytest
from safetensors.torch import load_file, save_file

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.kind import Kind
from sparsekit.inspection import sparse_kernels as sparsespeed
from sparsekit.inspection.deploy import TABLE, deploy
from sparsekit.inspection.sparse_kernels import measure_kernels
from sparsekit.packing.pack import pack
from sparsekit.progress import SILENT
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.prune import prune
from sparsekit.quantization.config import QuantizeConfig
from sparsekit.quantization.quantize import quantize


@pytest.fixture
def forms(family, pruned, row_file, tmp_path):
    """Gives the folder of a tiny model in a form."""

    def folder(form: str):
        out = tmp_path / form
        if form == "dense":
            return family("llama")
        if form == "2:4":
            return pruned
        if form == "50%":
            return prune(
                PruneConfig(method="magnitude", pattern="50%"), str(family("llama")), out
            ).out
        if form == "packed":
            return pack(str(pruned), out).out
        if form in ("composed", "factored"):
            config = PruneConfig(
                method="magnitude",
                compensate="lowrank",
                format="dense" if form == "composed" else "factored",
                calibration=str(row_file),
            )
            return prune(config, str(family("llama")), out).out
        return quantize(QuantizeConfig(method="rtn", grid=form), str(pruned), out).out

    return folder


@pytest.mark.parametrize(
    ("form", "answers"),
    [  # loads, smaller, faster
        ("dense", {"transformers": "yes no no", "vLLM": "yes no no", "sparsekit": "yes no no"}),
        ("2:4", {"transformers": "yes no no", "vLLM": "yes no no", "llama.cpp": "yes no no"}),
        ("2:4", {"OpenVINO (CPU)": "yes no no"}),
        ("50%", {"TensorRT core (by ONNX)": "yes no no", "vLLM": "yes no no"}),
        (
            "composed",
            {
                "torch semi-structured (CUDA)": "no no no",
                "TensorRT core (by ONNX)": "yes no no",
                "sparsekit": "yes no no",
            },
        ),
        ("packed", {"transformers": "yes yes no", "vLLM": "no no no", "sparsekit": "yes yes no"}),
        ("factored", {"transformers": "no no no", "vLLM": "no no no", "sparsekit": "yes yes no"}),
        ("int8", {"transformers": "yes part no", "vLLM": "yes yes yes", "llama.cpp": "no no no"}),
        ("int4-g32", {"vLLM": "yes yes yes", "llama.cpp": "yes no no"}),
        ("w8a8", {"llama.cpp": "yes no no"}),
        ("fp8", {"llama.cpp": "yes no no"}),
        ("int4-g16", {"transformers": "yes part no", "vLLM": "part part part"}),
    ],
)
def test_answers_follow_from_the_form(forms, form, answers):
    report = deploy(str(forms(form)))
    assert len(report.runtimes) == 7
    assert all(seen and verdict.reason for _, seen, verdict in report.runtimes)
    found = {name: f"{v.loads} {v.smaller} {v.faster}" for name, _, v in report.runtimes}
    assert answers.items() <= found.items()


def test_products_of_sparse_factors_are_not_sparse(forms):
    report = deploy(str(forms("composed")))
    assert (report.form.kind, report.form.pattern) == (Kind.PRODUCTS, "dense")
    assert {"kind": "plain", "composed": True}.items() <= report.to_json()["form"].items()
    reasons = {name: verdict.reason for name, _, verdict in report.runtimes}
    assert "pack keeps the factors alone" in reasons["sparsekit"]


@pytest.mark.parametrize(
    ("form", "words"), [("int4-g8", "128 and whole rows, not of 8"), ("fp8", "those with AMX")]
)
def test_what_vllm_has_no_kernels_for_everywhere_is_told(forms, form, words):
    assert words in {n: v.reason for n, _, v in deploy(str(forms(form))).runtimes}["vLLM"]


def test_codes_that_the_converter_of_llama_cpp_refuses_are_told_with_what_it_takes(forms):
    """What its `dequant_model` asserts of pack-quantized, which int8 by rows is stored as."""
    reasons = {n: v.reason for n, _, v in deploy(str(forms("int8"))).runtimes}
    assert "with groups only: quantize to int8-g32" in reasons["llama.cpp"]


def test_a_date_is_not_told_as_a_version(family):
    for _, seen, _ in deploy(str(family("llama"))).runtimes:
        assert seen.startswith("looked at ") == ("2026-" in seen)


def test_every_row_has_a_date_a_source_and_known_traits():
    known = {"plain", "quantized", "packed", "factored", "2:4", "dense", "composed", "odd-shape"}
    known |= {"odd-group", "grouped", "float"}
    for runtime in tomllib.loads(TABLE.read_text())["runtime"]:
        assert re.fullmatch(r"20\d\d-\d\d", runtime["looked_at"])
        assert runtime["source"]
        for words, answers, reason in runtime["rows"]:
            assert set(words.split()) <= known
            assert len(answers.split()) == 3
            assert reason


def test_shapes_that_kernels_do_not_take_are_told(forms):
    """The tiny model's sides are 16 to 64."""
    found = {name.partition(" ")[0]: v for name, _, v in deploy(str(forms("2:4"))).runtimes}
    assert found["torch"].loads == "part"
    assert "no multiple of 64" in found["torch"].reason


def test_kernels_are_timed_on_the_layers_that_are_sparse(pruned, monkeypatch):
    """On a CPU, with dense weights in the place of the kernels': what is run, not how fast."""
    monkeypatch.setattr(sparsespeed, "BATCHES", (1, 3))
    monkeypatch.setattr(sparsespeed, "PROMPT", 8)
    converted = []
    found = measure_kernels(
        Checkpoint.open(pruned), "cpu", SILENT, lambda weight: converted.append(weight) or weight
    )
    assert len(converted) == 14
    assert all((weight.unflatten(1, (-1, 4)) != 0).sum(-1).max() <= 2 for weight in converted)
    assert [(s.batch, s.phase) for s in found] == list(product((1, 3), ("prefill", "decode")))
    assert all(s.gain == s.dense / s.sparse > 0 for s in found)


def test_what_cannot_be_measured_says_why(forms, monkeypatch):
    assert deploy(str(forms("2:4")), "cpu").unmeasured == "no CUDA device"
    monkeypatch.setattr("sparsekit.inspection.deploy.pick_device", lambda _: "cuda")
    assert "do not support this checkpoint" in deploy(str(forms("50%"))).unmeasured
    # The tiny model's sides are no multiples of 64.
    assert "do not support this checkpoint" in deploy(str(forms("2:4"))).unmeasured


def test_a_few_zeros_make_no_sparse_model(copy_of, family):
    folder = copy_of("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0] = 0.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    report = deploy(str(folder))
    assert report.form.pattern == "dense"
    assert {name: v for name, _, v in report.runtimes}["sparsekit"].reason == "nothing is sparse"


def test_kernels_are_not_timed_where_they_take_only_some_weights(family, tmp_path):
    """GPT-2's layers are no nn.Linear: dense ones would be timed twice."""
    out = prune(PruneConfig(method="magnitude"), str(family("gpt2")), tmp_path / "out").out
    with pytest.raises(RuntimeError, match=r"0 of 8 sparse weights belong to nn\.Linear"):
        measure_kernels(Checkpoint.open(out), "cpu", SILENT, lambda weight: weight)
