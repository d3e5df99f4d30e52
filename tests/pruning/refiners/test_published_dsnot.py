"""Whole DSnoT runs on a tiny Llama against what the published code chose (tests/data/dsnot-llama).

The five masks were recorded by running zyxxmu/DSnoT@4c029df on the same model and calibration
tokens; the README beside the data says how. All of them are the same bit for bit.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.prune import prune

DATA = Path(__file__).parents[2] / "data" / "dsnot-llama"


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """One published run, and how ours is asked for the same."""

    name: str
    initial: str
    pattern: str
    modules: str

    def masks(self) -> dict[str, torch.Tensor]:
        """The kept masks `[out, in]` by weight name."""
        return {
            key.removeprefix(f"{self.name}/"): unpacked(packed)
            for key, packed in load_file(DATA / "masks.safetensors").items()
            if key.startswith(f"{self.name}/")
        }


RUNS = [
    Recorded(name="wanda_skip-mlp_0.5", initial="wanda", pattern="50%", modules="attention"),
    Recorded(name="wanda_skip-mlp_0.6", initial="wanda", pattern="60%", modules="attention"),
    Recorded(name="wanda_skip-mlp_2x4", initial="wanda", pattern="2:4", modules="attention"),
    Recorded(name="wanda_skip-none_0.6", initial="wanda", pattern="60%", modules="all"),
    Recorded(
        name="magnitude_skip-mlp_0.6", initial="magnitude", pattern="60%", modules="attention"
    ),
]

every_run = pytest.mark.parametrize("recorded", RUNS, ids=lambda recorded: recorded.name)


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=1)).bool()


def weights_of(config: PruneConfig, out: Path) -> dict[str, torch.Tensor]:
    prune(config, str(DATA / "model"), out)
    return load_file(out / "model.safetensors")


def config_of(recorded: Recorded, **changes: object) -> PruneConfig:
    options = {
        "method": "dsnot",
        "initial": recorded.initial,
        "preset": "published",
        "option": {"modules": "all"} if recorded.modules == "all" else {},
        "pattern": recorded.pattern,
        "calibration": str(DATA / "calibration.safetensors"),
        "device": "cpu",
        "dtype": "float32",
    }
    return PruneConfig(**{**options, **changes})


def test_every_recorded_run_is_compared() -> None:
    names = {key.partition("/")[0] for key in load_file(DATA / "masks.safetensors")}
    assert names == {recorded.name for recorded in RUNS}


@every_run
def test_run_equals_the_published_one_bit_for_bit(recorded: Recorded, tmp_path: Path) -> None:
    published, dense = recorded.masks(), load_file(DATA / "model" / "model.safetensors")
    assert len(published) == 7  # the linear weights of one block
    ours = weights_of(config_of(recorded), tmp_path / "out")
    for name, wanted in published.items():
        assert torch.equal(ours[name], dense[name] * wanted), name
    for name in dense.keys() - published.keys():
        assert torch.equal(ours[name], dense[name]), name


@every_run
def test_published_run_swaps_weights_where_it_refines_and_nowhere_else(
    recorded: Recorded, tmp_path: Path
) -> None:
    """Our initial method gives the mask before: unrefined weights show that it is the published."""
    config = config_of(recorded, method=recorded.initial, initial=None, preset=None, option={})
    before = weights_of(config, tmp_path / "initial")
    for name, after in recorded.masks().items():
        swapped = int((after & (before[name] == 0)).sum())
        refined = recorded.modules == "all" or "self_attn" in name
        assert (swapped > 0) == refined, name
        assert torch.equal(after.sum(1), (before[name] != 0).sum(1)), name


@pytest.mark.parametrize(
    "option",
    [{"units": "relative"}, {"same_sign": "yes"}, {"power": "0"}, {"cycles": "5"}],
    ids=lambda option: "".join(option),
)
def test_every_option_of_the_preset_is_needed(option: dict[str, str], tmp_path: Path) -> None:
    """The equality above is not one that any option would give."""
    recorded = RUNS[1]
    ours = weights_of(config_of(recorded, option=option), tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(ours[name] != 0, recorded.masks()[name])
