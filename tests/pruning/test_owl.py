"""How OWL shares the zeros out over blocks: its arithmetic, and whole runs on tiny checkpoints."""

import re

import pytest
import torch
from listeners import Notes
from refusals import refused
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparsekit.errors import UsageError
from sparsekit.inspection.verify import verify
from sparsekit.progress import SILENT
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.dry_run import plan
from sparsekit.pruning.owl import keep_shares, patterns_of
from sparsekit.pruning.prune import prune
from sparsekit.weights.patterns import Pattern

OUTLIERS, SIZES = [0.01, 0.05, 0.02, 0.03], [100, 300, 200, 400]


def mean(shares, sizes):
    return sum(share * n for share, n in zip(shares, sizes, strict=True)) / sum(sizes)


def test_mean_by_size_is_the_target_and_the_spread_is_two_lambda():
    shares = keep_shares(OUTLIERS, SIZES, 0.3)
    assert mean(shares, SIZES) == pytest.approx(0.3)
    assert max(shares) - min(shares) == pytest.approx(0.16)  # 2 * 0.08, as published
    assert sorted(range(4), key=shares.__getitem__) == sorted(range(4), key=OUTLIERS.__getitem__)


def test_blocks_alike_keep_the_same_share():
    assert keep_shares([0.02] * 3, [10, 20, 30], 0.4) == pytest.approx([0.4] * 3)


@pytest.mark.parametrize("keep", [0.01, 0.99])
def test_shares_are_clipped(keep):
    shares = keep_shares(OUTLIERS, SIZES, keep)
    assert all(0 <= share <= 1 for share in shares)
    assert mean(shares, SIZES) == pytest.approx(keep, abs=0.08)


@pytest.mark.parametrize("text", ["70%", "60%/tensor"])
def test_unstructured_shares_are_kept_to_a_hundredth_of_a_percent(text):
    pattern = Pattern.parse(text)
    kept = keep_shares(OUTLIERS, SIZES, 1 - float(pattern.sparsity))
    found = patterns_of(kept, SIZES, pattern)
    assert [str(Pattern.parse(str(one))) for one in found] == [str(one) for one in found]
    for one, share in zip(found, kept, strict=True):
        assert one.scope == pattern.scope
        assert float(one.sparsity) == pytest.approx(1 - share, abs=5e-5)


@pytest.mark.parametrize("text", ["4:8", "2:4", "8:16"])
def test_groups_are_rounded_so_that_their_mean_is_within_half_a_step_of_one_block(text):
    pattern = Pattern.parse(text)
    found = patterns_of(keep_shares(OUTLIERS, SIZES, 0.5), SIZES, pattern)
    assert {one.group for one in found} == {pattern.group}
    kept = mean([one.keep / one.group for one in found], SIZES)
    assert abs(kept - 0.5) <= max(SIZES) / sum(SIZES) / pattern.group / 2 + 1e-9


@pytest.fixture
def run(row_file, tmp_path):
    def pruned(source, out="out", progress=SILENT, **options):
        rows = str(row_file)
        options = {"allocate": "owl", "pattern": "60%", **options}
        config = PruneConfig(calibration=rows, **options)
        return prune(config, str(source), tmp_path / out, progress=progress)

    return pruned


@pytest.mark.parametrize("pattern", ["60%", "4:8"])
def test_block_with_outliers_keeps_more_and_the_whole_keeps_its_share(
    copy_of, family, run, pattern
):
    source = copy_of(family("llama_tied"))
    file = source / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:  # a few large weights in the second block
        if name.startswith("model.layers.1.") and name.endswith("proj.weight"):
            tensors[name].view(-1)[::20] *= 12
    save_file(tensors, file, {"format": "pt"})
    notes = Notes()
    report = run(source, pattern=pattern, progress=notes)
    rows = report.entry.to_json()["weights"]
    shares = [
        sum(r["zeros"] for r in rows if f".{block}." in r["name"])
        / sum(r["size"] for r in rows if f".{block}." in r["name"])
        for block in (0, 1)
    ]
    assert shares[1] < shares[0]
    # Each row of 32 inputs rounds its zeros down; groups of 8 differ by one step of a block.
    step = 1 / 32 if pattern == "60%" else 1 / 16
    asked = float(Pattern.parse(pattern).sparsity)
    assert report.entry.totals.sparsity == pytest.approx(asked, abs=step)
    assert len({row["pattern"] for row in rows}) == 2
    (note,) = [note for note in notes.told if note.startswith("blocks get from")]
    told = [float(number) / 100 for number in re.findall(r"([\d.]+)%", note)]
    parts = [float(Pattern.parse(row["pattern"]).sparsity) for row in rows]
    assert told[:2] == pytest.approx([min(parts), max(parts)], abs=1e-4)
    assert told[2] == pytest.approx(mean(parts, [row["size"] for row in rows]), abs=1e-4)
    assert told[3] == pytest.approx(asked)
    assert verify(str(report.out))["weights"] == len(rows)
    model = AutoModelForCausalLM.from_pretrained(report.out)
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


def test_first_block_is_pruned_as_alone_with_its_own_pattern(family, run):
    """The pass that counts outliers leaves nothing behind: block 0 sees the same inputs."""
    report = run(family("llama_tied"), method="sparsegpt")
    own = report.entry.to_json()["weights"][0]["pattern"]
    plain = run(family("llama_tied"), "plain", method="sparsegpt", allocate="none", pattern=own)
    ours, alone = (load_file(one.out / "model.safetensors") for one in (report, plain))
    first = [name for name in ours if name.startswith("model.layers.0.")]
    assert first
    assert all(torch.equal(ours[name], alone[name]) for name in first)


def test_factors_and_owl_are_refused_together(family, row_file, tmp_path):
    rows = str(row_file)
    config = PruneConfig(method="armor", allocate="owl", calibration=rows)
    with refused("conflicting-options", "--allocate", "armor", kind=UsageError):
        plan(config, str(family("llama")), tmp_path / "out")
    with refused("not-a-choice", "--allocate 'even'", kind=UsageError):
        PruneConfig(allocate="even")
