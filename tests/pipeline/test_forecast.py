"""What a run is expected to take, as a plan tells, and what it took, as its entry does."""

import json
import mmap
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.memory import peak_memory, watch_peak
from sparsekit.model.block_stream import Block, BlockStream
from sparsekit.packing.convert import convert
from sparsekit.packing.dry_run import plan_convert, plan_pack, plan_unpack
from sparsekit.packing.pack import pack
from sparsekit.packing.unpack import unpack
from sparsekit.pipeline import forecast, loops, output
from sparsekit.pipeline.cost import Cost
from sparsekit.pipeline.forecast import peak_estimate
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.method_chain import MethodChain
from sparsekit.recovery import recover as stage
from sparsekit.recovery import tuning as trainplan
from sparsekit.recovery.config import RecoverConfig
from sparsekit.recovery.loop import Training
from sparsekit.reporting.compare import compare
from sparsekit.text.calibration import Calibration

LEGACY = str(Path(__file__).parents[1] / "data" / "legacy" / "sparse-24-bitmask")


class Clock:
    """A clock that stands still until it is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def stream(family) -> BlockStream:
    """Two blocks of one size."""
    import torch

    return BlockStream(Checkpoint.open(family("llama")), device="cpu", dtype=torch.float32)


@pytest.fixture
def slow(monkeypatch) -> Clock:
    """A clock that only the long parts of a run move, each by another time."""
    clock = Clock()
    monkeypatch.setattr("sparsekit.pipeline.forecast.time", SimpleNamespace(perf_counter=clock))
    for owner, name, seconds in (
        (Checkpoint, "scan", 3.0),
        (BlockStream, "feed", 1.0),
        (Block, "observe", 0.5),
        (loops, "rewrite_block", 5.0),
        (forecast, "rewrite_block", 5.0),
    ):

        def slowed(*words, part=getattr(owner, name), seconds=seconds, **more):
            clock.now += seconds
            return part(*words, **more)

        monkeypatch.setattr(owner, name, slowed)
    return clock


@pytest.mark.parametrize(
    "words",
    [
        ["prune", "--method", "magnitude"],
        ["prune", "--method", "wanda"],
        ["prune", "--allocate", "owl", "--pattern", "50%"],
        ["quantize", "--grid", "int4-g16"],
        ["quantize", "--grid", "int8", "--method", "rtn"],
    ],
    ids=" ".join,
)
def test_a_timed_plan_tells_what_the_run_then_takes(cli, family, row_file, tmp_path, slow, words):
    verb, *flags = words
    if not {"rtn", "magnitude"} & set(words):
        flags += ["--calibration", row_file]
    command = (verb, family("llama"), "-o", tmp_path / "out", *flags)
    planned = cli(*command, "--dry-run", "--time", "--json", "-q")
    assert planned.code == 0, planned.stderr
    begun = slow.now
    assert cli(*command).code == 0
    taken = slow.now - begun
    assert taken >= 2 * 5.0 + 2 * 3.0  # both blocks; reading before them and after
    assert json.loads(planned.stdout)["seconds_estimate"] == pytest.approx(taken, rel=0.05)


def test_training_keeps_the_seconds_that_it_took(family, tmp_path, monkeypatch):
    """Of 8 steps that each take 10 s, with three evaluations of 5 s."""
    clock = Clock()
    monkeypatch.setattr(output, "Cost", partial(Cost, clock))
    for module in ("recover", "loop", "tuning", "deadline"):
        fake = SimpleNamespace(perf_counter=clock)
        monkeypatch.setattr(f"sparsekit.recovery.{module}.time", fake)

    def slowed(function, seconds):
        def slow(*words, **more):
            clock.now += seconds
            return function(*words, **more)

        return slow

    monkeypatch.setattr(Training, "gradients", slowed(Training.gradients, 10.0))
    monkeypatch.setattr(stage, "measure", slowed(stage.measure, 5.0))
    monkeypatch.setattr(trainplan, "measure", slowed(trainplan.measure, 5.0))
    config = RecoverConfig(method="fixed", tokens=8 * 64, batch=2, length=32, eval_every=5)
    entry = stage.recover(config, str(family("llama")), tmp_path / "out").entry.to_json()
    assert entry["seconds"] == 8 * 10.0 + 3 * 5.0  # saving stands still here


def test_a_peak_of_memory_is_of_one_run():
    """The peak of a larger run before does not count (Linux)."""
    # Not from the heap, which a training before may have told to keep what is freed.
    with mmap.mmap(-1, 200_000_000) as held:
        for _ in range(200):
            held.write(b"x" * 1_000_000)
        high = peak_memory()
    watch_peak()
    assert peak_memory() < high - 100_000_000
    assert abs(peak_memory() - psutil.Process().memory_info().rss) < 50_000_000


def test_the_memory_that_a_method_makes_of_a_gram_matrix_is_its_own(stream):
    """ALPS holds eigenvectors, SparseGPT only a factor."""
    rows = Calibration(source="builtin", samples=1, length=8)
    chains = {
        name: MethodChain.build(PruneConfig(method=name), None) for name in ("sparsegpt", "alps")
    }
    room = {k: peak_estimate(stream, c.want, rows, c.gram_bytes) for k, c in chains.items()}
    wide = max(target.shape[1] for target in stream.block(0).targets)
    assert room["alps"] - room["sparsegpt"] == (48 - 16) * wide**2


def test_the_entries_of_other_forms_hold_time_and_memory_too(pruned, tmp_path):
    """Which `compare` shows: peak memory is that of all stages."""
    packed, plain, out = (tmp_path / name for name in ("packed", "plain", "out"))
    rooms = [plan_pack(str(pruned), packed)]
    entries = [pack(str(pruned), packed).entry.to_json()]
    rooms.append(plan_unpack(str(packed), plain))
    entries.append(unpack(str(packed), plain).entry.to_json())
    rooms.append(plan_convert(LEGACY, out))
    entries.append(convert(LEGACY, out).entry.to_json())
    for room, entry in zip(rooms, entries, strict=True):
        assert entry["seconds"] > 0
        assert 0 < room["peak_memory_estimate_bytes"] < 2 * entry["peak_memory_bytes"]
    (row,) = compare([out]).rows
    assert row.peak_bytes == entries[-1]["peak_memory_bytes"]


@pytest.mark.parametrize(
    "words",
    [
        ["prune"],
        ["prune", "--allocate", "owl", "--pattern", "50%"],
        ["prune", "--method", "sparsegpt", "--then", "int8"],
        ["prune", "--method", "armor", "-O", "sweeps=1", "-O", "armor.block=16"],
        ["quantize", "--method", "rtn", "--grid", "int8"],
        ["quantize", "--grid", "int4-g16"],
    ],
    ids=" ".join,
)
def test_a_timed_plan_works_on_one_block_and_writes_nothing(cli, family, row_file, tmp_path, words):
    verb, *flags = words
    if "rtn" not in words:
        flags += ["--calibration", row_file]
    command = (verb, family("llama"), "-o", tmp_path / "out", *flags, "--dry-run")
    found = cli(*command, "--time", "--json", "-q")
    assert found.code == 0, found.stderr
    seconds = json.loads(found.stdout)["seconds_estimate"]
    assert 0 < seconds < 60
    assert list(tmp_path.iterdir()) == []
    assert json.loads(cli(*command, "--json", "-q").stdout)["seconds_estimate"] is None
    assert "about" in cli(*command, "--time").stderr


def test_a_timed_plan_of_a_budget_tells_the_budget(cli, family, row_file, tmp_path):
    found = cli(
        *("prune", family("llama"), "-o", tmp_path / "out", "--method", "armor", "--budget", "90s"),
        *("-O", "armor.block=16", "--calibration", row_file, "--dry-run", "--time"),
    )
    assert "about 90 s (1.5 min)" in found.stderr


@pytest.mark.parametrize(
    ("flags", "least"), [(["--tokens", "9600"], 0.1), (["--max-time", "5m"], 300.0)]
)
def test_a_timed_plan_of_training(cli, pruned, row_file, tmp_path, flags, least):
    found = cli(
        *("recover", pruned, "-o", tmp_path / "out", "--data", row_file, *flags),
        *("--batch", "2", "--length", "24", "--dry-run", "--time", "--json", "-q"),
    )
    assert found.code == 0, found.stderr
    assert least <= json.loads(found.stdout)["seconds_estimate"] <= 600
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["prune", "quantize", "recover"])
def test_time_without_dry_run_is_refused(cli, family, tmp_path, verb):
    more = {"quantize": ["--grid", "int8"], "recover": ["--tokens", "9600"]}
    found = cli(verb, family("llama"), "-o", tmp_path / "out", *more.get(verb, []), "--time")
    assert found.code == 2
    assert "--time has no effect without --dry-run" in found.stderr
