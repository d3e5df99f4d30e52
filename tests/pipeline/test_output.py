"""An output is made of one source, which is read once, checked on the way and named at the end."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from refusals import refused
from safetensors.torch import load_file, save_file

from sparsekit.checkpoint import safetensors_file
from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.errors import DataError, UsageError
from sparsekit.progress import Progress
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.prune import prune
from sparsekit.quantization.config import QuantizeConfig
from sparsekit.quantization.quantize import quantize

FIRST = "model.layers.0.mlp.up_proj.weight"
LAST = "model.layers.1.mlp.up_proj.weight"
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


class Stop(Progress):
    """Ends a run after its first block."""

    def step(self, label: str) -> None:
        """Called for each block."""
        if label == "model.layers.0":
            raise KeyboardInterrupt


def change(folder: Path, name: str, value: float) -> None:
    """Set the last number of a tensor; the file keeps its size."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def files(folder: Path) -> set[str]:
    """The names in a folder."""
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def read(monkeypatch):
    """Bytes of tensors that were read, by folder."""
    count: Counter[str] = Counter()
    preadv = os.preadv

    def counted(handle, buffers, start):
        found = preadv(handle, buffers, start)
        count[Path(os.readlink(f"/proc/self/fd/{handle}")).parent.name] += found
        return found

    monkeypatch.setattr(safetensors_file.os, "preadv", counted)
    return count


def tensor_bytes(folder: Path, *names: str) -> int:
    places = Checkpoint.open(folder).tensors
    return sum(places[name].stop - places[name].start for name in names or places)


@pytest.mark.parametrize("verb", ["prune", "quantize"])
def test_a_model_is_read_once_and_its_output_never(family, tmp_path, read, verb):
    source, out = family("llama"), tmp_path / "out"
    if verb == "prune":
        prune(PruneConfig(method="magnitude"), str(source), out)
    else:
        quantize(QuantizeConfig(method="rtn", grid="int4-g16"), str(source), out)
    assert read.pop(source.name) == tensor_bytes(source)
    assert sum(read.values()) < 0.01 * tensor_bytes(source)  # shapes of quantized weights
    assert Checkpoint.open(out).provenance().fingerprint == Checkpoint.open(out).scan()


def test_calibration_reads_only_what_is_outside_of_blocks_again(family, row_file, tmp_path, read):
    source = family("llama")
    prune(PruneConfig(calibration=str(row_file)), str(source), tmp_path / "out")
    assert read == {source.name: tensor_bytes(source) + tensor_bytes(source, EMBEDDING, NORM)}


def test_the_entry_has_the_fingerprint_of_what_was_read(family, tmp_path):
    report = prune(PruneConfig(method="magnitude"), str(family("llama")), tmp_path / "out")
    assert report.entry.source.fingerprint == Checkpoint.open(family("llama")).scan()


@pytest.mark.parametrize("name", [FIRST, LAST, EMBEDDING])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_source_that_is_not_finite_leaves_no_output(copy_of, tmp_path, name, value):
    source = copy_of("llama")
    change(source, name, value)
    with refused("not-finite", source, name, kind=DataError):
        prune(PruneConfig(method="magnitude"), str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_source_that_is_not_what_was_recorded_leaves_no_output(copy_of, tmp_path):
    made = prune(PruneConfig(method="magnitude"), str(copy_of("llama")), tmp_path / "made").out
    change(made, FIRST, 3.0)
    before = files(tmp_path)
    with refused("fingerprint-mismatch", made, "sparsekit.json", kind=DataError):
        quantize(QuantizeConfig(method="rtn", grid="int8"), str(made), tmp_path / "out")
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", [FIRST, EMBEDDING])
def test_an_interrupted_run_does_not_go_on_with_what_has_changed(copy_of, row_file, tmp_path, name):
    source, config = copy_of("llama"), PruneConfig(calibration=str(row_file))
    with pytest.raises(KeyboardInterrupt):
        prune(config, str(source), tmp_path / "out", progress=Stop())
    change(source, name, 3.0)
    with refused("other-recipe", tmp_path / "out.partial", "source", kind=UsageError):
        prune(config, str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_goes_on_with_what_it_had_not_read(copy_of, row_file, tmp_path):
    """Its output is that of the present source alone."""
    source, config = copy_of("llama"), PruneConfig(calibration=str(row_file))
    with pytest.raises(KeyboardInterrupt):
        prune(config, str(source), tmp_path / "out", progress=Stop())
    change(source, LAST, 3.0)
    resumed = prune(config, str(source), tmp_path / "out")
    whole = prune(config, str(source), tmp_path / "whole")
    assert (resumed.entry.resumed_blocks, whole.entry.resumed_blocks) == (1, 0)
    assert resumed.entry.source == whole.entry.source
    assert Checkpoint.open(resumed.out).scan() == Checkpoint.open(whole.out).scan()


def test_a_source_that_changes_during_a_run_is_refused(copy_of, row_file, tmp_path):
    class Changes(Progress):
        def step(self, label: str) -> None:
            if label == "model.layers.0":
                change(source, EMBEDDING, 3.0)

    source, config = copy_of("llama"), PruneConfig(calibration=str(row_file))
    with refused("source-changed", source, EMBEDDING, kind=DataError):
        prune(config, str(source), tmp_path / "out", progress=Changes())
    assert not (tmp_path / "out").exists()


def test_a_digest_of_the_journal_is_that_of_the_bytes(copy_of, row_file, tmp_path):
    source, config = copy_of("llama"), PruneConfig(calibration=str(row_file))
    with pytest.raises(KeyboardInterrupt):
        prune(config, str(source), tmp_path / "out", progress=Stop())
    journal = tmp_path / "out.partial" / ".sparsekit-journal.jsonl"
    [line] = map(json.loads, journal.read_text().splitlines())
    checkpoint = Checkpoint.open(source)
    checkpoint.scan()
    assert {FIRST, EMBEDDING} <= line["read"].keys()
    assert line["read"].items() <= checkpoint.digests.items()
    assert FIRST in line["tensors"]
