"""What ARMOR buys for its time on SmolLM2-135M, and what DSnoT does: the project's limits.

Slow: `pytest -m slow tests/test_quality.py -s` (about an hour and a half on two quiet cores). Rows,
windows and the published perplexities are those of `test_real_model.py`. Times are told and, but
for the budgets, not checked: they are the machine's.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sparsekit.errors import SparsekitError
from sparsekit.models.calibration import Calibration
from sparsekit.models.demo import demo_model
from sparsekit.stages.config import EvalConfig, PruneConfig
from sparsekit.stages.evaluate import evaluate
from sparsekit.stages.inspect import verify
from sparsekit.stages.prune import prune
from sparsekit.stages.report import bits_per_weight

PARITY = Path(__file__).parents[2] / "shared" / "parity" / "smollm2"
ROWS = PARITY / "calibration_c4_32x512.safetensors"
WINDOWS = PARITY / "eval_wikitext2_16x1024.safetensors"
SPARSEGPT = 96.98  # 2:4, published

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PARITY.is_dir(), reason="the parity data (../shared) is not here"),
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Prunes, verifies and scores; gives perplexity, seconds and report entry."""
    folder, calibration = tmp_path_factory.mktemp("quality"), Calibration(source=str(ROWS))

    def run(name: str, **options) -> tuple[float, float, dict]:
        config = PruneConfig(calibration=calibration, **options)
        report = prune(config, str(demo_model()), folder / name)
        verify(str(report.out))
        found = evaluate(EvalConfig(text=str(WINDOWS)), [str(report.out)])[0].perplexity
        assert found is not None
        bits = bits_per_weight(report.entry["weights"])
        seconds = report.entry["seconds"]
        print(f"{name}: perplexity {found.value:.2f}, {seconds:.0f} s, {bits or 16:.2f} bits")
        return found.value, seconds, dict(report.entry)

    return run


def test_armor_is_far_below_sparsegpt_and_better_with_more_time(measured):
    found = {
        minutes: measured(f"armor-{minutes}m", method="armor", budget=60.0 * minutes)
        for minutes in (4, 8, 15)
    }
    for minutes, (perplexity, seconds, entry) in found.items():
        assert seconds < 60 * minutes * 1.1
        assert perplexity < 0.6 * SPARSEGPT
        assert bits_per_weight(entry["weights"]) < 16
    assert found[15][0] < found[8][0] < found[4][0]
    assert found[15][0] < 45


def test_compensation_makes_armor_better(measured):
    plain = measured("armor-64", method="armor", options={"block": "64", "sweeps": "6"})
    options = {"block": "64", "sweeps": "6"}
    more = measured("armor-64-5%", method="armor", options=options, compensate="lowrank")
    assert more[0] < plain[0]


def test_gram_proxy_is_better_than_the_diagonal_one(measured):
    options = {"block": "64", "sweeps": "6"}
    gram = measured("gram", method="armor", options=options)
    diagonal = measured("diagonal", method="armor", options={**options, "proxy": "diagonal"})
    assert gram[0] < diagonal[0]


@pytest.mark.parametrize("pattern", ["50%", "60%", "70%", "2:4"])
def test_dsnot_is_told_beside_wanda(measured, pattern):
    """No limit: what DSnoT gives on this model is reported, whichever way it goes."""
    wanda = measured(f"wanda {pattern}", method="wanda", pattern=pattern)
    dsnot = measured(f"dsnot {pattern}", method="dsnot", pattern=pattern)
    assert dsnot[2]["totals"]["zeros"] == wanda[2]["totals"]["zeros"]


def test_coordinate_descent_takes_a_twentieth_of_the_time_of_adam():
    weights = "self_attn.q_proj,mlp.up_proj"
    command = [sys.executable, "-m", "sparsekit", "bench", "armor", "demo", "--calibration", ROWS]
    command += ["--weights", weights, "--blocks", "32,64", "--json", "-q"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SparsekitError(done.stderr)
    for row in json.loads(done.stdout):
        print(row)
        assert row["als_loss"] <= row["adam_loss"]
        assert row["ratio"] >= 20
