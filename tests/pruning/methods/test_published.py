"""Whole runs on a tiny Llama against what the published code computed (tests/data/tiny-llama).

The published masks, weights and logits were recorded by running locuslab/wanda@8e8fc87, which
holds magnitude, Wanda and SparseGPT, on the same model and calibration tokens; the README beside
the data says how. Weights and logits differ from ours by the order of float32 sums: recorded
here, at most 5e-6 of a tensor's norm and 2e-5 of logits up to 6.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from oracles import PublishedThreshold
from safetensors.torch import load_file

from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.prune import prune
from sparsekit.weights.patterns import Pattern

DATA = Path(__file__).parents[2] / "data" / "tiny-llama"


@dataclass(frozen=True, kw_only=True)
class Run:
    """Our output beside the published one."""

    out: Path
    dense: dict[str, torch.Tensor]
    ours: dict[str, torch.Tensor]
    published: dict[str, torch.Tensor]
    """A kept mask for magnitude and Wanda, weights for SparseGPT; without the logits."""
    logits: torch.Tensor  # [64, 256], published, of the first calibration row

    def ours_kept(self, name: str) -> torch.Tensor:
        return self.ours[name] != 0

    def published_kept(self, name: str) -> torch.Tensor:
        return self.published[name] != 0

    def check_masks(self) -> None:
        assert len(self.published) == 21  # 3 blocks of 7 linear weights
        for name in self.published:
            assert torch.equal(self.ours_kept(name), self.published_kept(name)), name

    def check_weights(self) -> None:
        for name, wanted in self.published.items():
            if wanted.dtype == torch.bool:  # the method does not change survivors
                assert torch.equal(self.ours[name], self.dense[name] * wanted), name
            else:
                assert (self.ours[name] - wanted).norm() <= 1e-4 * wanted.norm(), name

    def check_the_rest(self) -> None:
        assert self.ours.keys() == self.dense.keys()
        for name in self.dense.keys() - self.published.keys():
            assert torch.equal(self.ours[name], self.dense[name]), name

    def check_logits(self) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.out)
        tokens = load_file(DATA / "calibration.safetensors")["calibration_tokens"]
        with torch.no_grad():
            logits = model(tokens[:1]).logits[0]
        torch.testing.assert_close(logits, self.logits, rtol=0, atol=1e-3)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Run]:
    def prune_as_published(
        method: str, pattern: str, recorded: str, kind: type[Pattern] = Pattern
    ) -> Run:
        calibration = str(DATA / "calibration.safetensors")
        config = PruneConfig(
            method=method, pattern=pattern, calibration=calibration, device="cpu", dtype="float32"
        )
        object.__setattr__(config, "pattern", kind.parse(pattern))
        out = tmp_path / "out"
        prune(config, str(DATA / "model"), out)
        published = load_file(DATA / f"{recorded}.safetensors")
        ours: dict[str, torch.Tensor] = {}
        for part in out.glob("*.safetensors"):
            ours |= load_file(part)
        return Run(
            out=out,
            dense=load_file(DATA / "model" / "model.safetensors"),
            ours=ours,
            logits=published.pop("logits_row0"),
            published=published,
        )

    return prune_as_published


@pytest.mark.parametrize(
    ("method", "pattern", "recorded"),
    [
        ("magnitude", "2:4", "magnitude_2x4"),
        ("wanda", "2:4", "wanda_2x4"),
        ("wanda", "4:8", "wanda_4x8"),
        ("wanda", "50%", "wanda_0.5"),
        ("wanda", "60%", "wanda_0.6"),
        ("sparsegpt", "2:4", "sparsegpt_2x4"),
        ("sparsegpt", "4:8", "sparsegpt_4x8"),
    ],
)
def test_run_equals_the_published_one(run, method: str, pattern: str, recorded: str) -> None:
    found = run(method, pattern, recorded)
    found.check_masks()
    found.check_weights()
    found.check_the_rest()
    found.check_logits()


@pytest.mark.parametrize(
    ("method", "recorded"), [("magnitude", "magnitude_0.5"), ("sparsegpt", "sparsegpt_0.5")]
)
def test_run_with_the_published_threshold_equals_the_published_one(
    run, method: str, recorded: str
) -> None:
    found = run(method, "50%/tensor", recorded, PublishedThreshold)
    found.check_masks()
    found.check_weights()
    found.check_the_rest()
    found.check_logits()


def test_published_magnitude_removes_one_weight_more_in_every_tensor(run) -> None:
    found = run("magnitude", "50%/tensor", "magnitude_0.5")
    for name in found.published:
        ours, published = found.ours_kept(name), found.published_kept(name)
        size = found.dense[name].abs()
        extra = ours & ~published
        assert not (published & ~ours).any(), name
        assert int(extra.sum()) == 1, name
        assert float(size[extra]) == float(size[ours].min()), name
        assert int(ours.sum()) == ours.numel() - ours.numel() // 2, name


@pytest.mark.parametrize("pattern", ["4:8", "60%/tensor"])
def test_magnitude_without_a_recorded_run_follows_its_published_rule(run, pattern: str) -> None:
    """No run was recorded for these two; the rule needs no calibration, so it is applied here.

    `prune_magnitude` of the same code removes the 4 smallest of every 8, or everything up to the
    absolute weight of rank ⌊0.6 n⌋ of the tensor.
    """
    kind = PublishedThreshold if pattern == "60%/tensor" else Pattern
    found = run("magnitude", pattern, "magnitude_2x4", kind)  # for the names of its 21 weights
    for name in found.published:
        size = found.dense[name].abs()
        if pattern == "4:8":
            groups = size.reshape(-1, 8)
            kept = torch.ones_like(groups, dtype=torch.bool)
            kept.scatter_(1, groups.topk(4, dim=1, largest=False).indices, False)
        else:
            kept = size > size.flatten().sort().values[int(size.numel() * 0.6)]
        assert torch.equal(found.ours_kept(name), kept.view_as(size)), name
