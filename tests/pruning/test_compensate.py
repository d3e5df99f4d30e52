"""Low-rank compensation of what pruning loses: the theorem it rests on, and whole runs with it.

That the leading singular vectors give the least error is Eckart and Young's theorem; `numpy`'s
singular values are the oracle. Runs are on the tiny checkpoints of conftest.py.
"""

import numpy as np
import pytest
import torch
from oracles import inputs_of, sums_of, weight_of
from refusals import refused
from transformers import AutoModelForCausalLM

import sparsekit
from sparsekit.errors import UsageError
from sparsekit.inspection.inspect import inspect
from sparsekit.inspection.verify import verify
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.prune import prune
from sparsekit.scoring.config import EvalConfig
from sparsekit.scoring.evaluate import evaluate
from sparsekit.solvers.input_stats import Stats
from sparsekit.solvers.low_rank import compensate


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_error_is_the_tail_of_the_singular_values_and_falls_with_the_rank(shape):
    lost = weight_of(*shape)
    scale = sums_of(inputs_of(200, shape[1]), Stats.NORMS).squares.sqrt()
    singular = np.linalg.svd((lost * scale).double().numpy(), compute_uv=False)
    before = np.inf
    for rank in (1, 2, 5, 12, 24):
        up, down = compensate(lost, scale, rank)
        assert up.shape == (shape[0], rank)
        assert down.shape == (rank, shape[1])
        error = float((((lost - up @ down) * scale).double() ** 2).sum())
        assert error == pytest.approx(float((singular[rank:] ** 2).sum()), rel=1e-4, abs=1e-6)
        assert error < before
        before = error


def test_dead_inputs_and_nothing_lost_give_finite_factors():
    scale = torch.ones(16)
    scale[3:7] = 0
    for lost in (weight_of(8, 16), torch.zeros(8, 16)):
        up, down = compensate(lost, scale, 2)
        assert up.isfinite().all()
        assert down.isfinite().all()


@pytest.fixture
def run(row_file, tmp_path):
    def pruned(source, name="out", **options):
        rows = str(row_file)
        options = {"compensate": "lowrank", "rank": "10%", **options}
        if options["compensate"] == "none":
            del options["rank"]
        return prune(PruneConfig(calibration=rows, **options), str(source), tmp_path / name)

    return pruned


METHODS = [
    {"method": "wanda"},
    {"method": "magnitude", "pattern": "60%"},
    {"method": "sparsegpt", "pattern": "50%/tensor"},
    {"method": "dsnot", "pattern": "50%"},
    {"method": "armor", "option": {"block": "8", "sweeps": "2"}},
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("options", METHODS, ids=lambda o: o["method"])
@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_every_method_loses_less_with_it_and_both_forms_agree(family, run, row_file, name, options):
    plain = run(family(name), "plain", **{**options, "compensate": "none"})
    dense = run(family(name), "dense", **options)
    factored = run(family(name), "factored", format="factored", **options)
    for before, after in zip(
        plain.entry.to_json()["weights"], dense.entry.to_json()["weights"], strict=True
    ):
        assert after["error"] < before["error"], after["name"]
        assert after["zeros"] == before["zeros"], after["name"]
        assert after["numbers"]["rank"] == -(-min(after["shape"]) // 10)
    scores = evaluate(EvalConfig(text=str(row_file)), [str(dense.out), str(factored.out)])
    one, other = (score.perplexity.value for score in scores)
    assert other == pytest.approx(one, rel=1e-5)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(dense.out)(tokens).logits
        ours = sparsekit.load(factored.out)(tokens).logits
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-4)
    for report in (dense, factored):
        assert verify(str(report.out))["weights"] == len(report.entry.to_json()["weights"])
        assert inspect(str(report.out)).total["zeros"] == report.entry.totals.zeros


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        ({"rank": "5"}, "not-a-percentage", "'5'"),
        ({"rank": "0%"}, "not-a-percentage", "'0%'"),
        ({"rank": "101%"}, "not-a-percentage", "'101%'"),
        ({"compensate": "none", "rank": "5%"}, "no-effect", "--rank"),
        ({"compensate": "lora", "rank": None}, "not-a-choice", "--compensate 'lora'"),
    ],
)
def test_wrong_options_are_refused(options, code, named):
    with refused(code, named, kind=UsageError):
        PruneConfig(**{"compensate": "lowrank", **options})
