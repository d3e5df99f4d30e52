"""A branch beside a sparse layer begins with what the layer lacks."""

import json

import pytest
import torch
from listeners import Notes, StopsAt
from refusals import refused
from torch import nn
from trainings import SHORT
from verbs import replace

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.kind import Kind
from sparsekit.errors import (
    UsageError,
)
from sparsekit.inspection.verify import verify
from sparsekit.recovery.log import LOG
from sparsekit.recovery.recover import recover
from sparsekit.recovery.slorb import Branch, attach
from sparsekit.scoring.config import EvalConfig
from sparsekit.scoring.evaluate import evaluate
from sparsekit.weights.patterns import Pattern

ROWS, COLUMNS, WIDTH = 6, 32, 8


@pytest.fixture
def layer():
    made = nn.Linear(COLUMNS, ROWS)
    generator = torch.Generator().manual_seed(0)
    made.weight.data = torch.randn(ROWS, COLUMNS, generator=generator)
    return made


def sparse(layer):
    """The layer at 2:4 with its branch, and its dense weight."""
    dense = layer.weight.data.clone()
    layer.weight.data *= Pattern.parse("2:4").mask(dense.abs())
    branch = Branch(dense - layer.weight.data, WIDTH)
    attach(layer, branch)
    return dense, branch


def test_every_row_has_its_sum_over_every_span(layer):
    dense, branch = sparse(layer)
    product = branch.up @ branch.down
    assert product.shape == dense.shape
    found, wanted = ((layer.weight + product), dense)
    sums = [t.unflatten(1, (-1, WIDTH)).sum(-1) for t in (found, wanted)]
    torch.testing.assert_close(*sums, rtol=0, atol=1e-5)
    assert torch.linalg.matrix_rank(product) <= COLUMNS // WIDTH


def test_inputs_that_are_constant_in_each_span_give_the_dense_output(layer):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, COLUMNS // WIDTH, generator=generator).repeat_interleave(WIDTH, 1)
    wanted = layer(x)
    sparse(layer)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)


def test_both_sides_are_parameters_of_the_layer_and_get_gradients(layer):
    _, branch = sparse(layer)
    generator = torch.Generator().manual_seed(1)
    layer(torch.randn(3, COLUMNS, generator=generator)).sum().backward()
    assert {"branch.up", "branch.down"} <= {name for name, _ in layer.named_parameters()}
    assert branch.up.grad.any()
    assert branch.down.grad.any()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("form", ["dense", "factored"])
def test_branches_are_kept_as_factors(family, row_file, tmp_path, name, form):
    """SLoRB: the product of the factors is what the training model computed with."""
    config = replace(
        SHORT,
        data=str(row_file),
        tokens=96,
        slorb=16,
        format=form,
        eval_every=3,
        eval_text=str(row_file),
    )
    notes = Notes()
    found = recover(config, str(family(name)), tmp_path / "out", progress=notes)
    assert any("cannot be folded" in note for note in notes.told)
    assert verify(str(found.out))["zeros"] == found.entry.totals.zeros
    assert found.entry.totals.sparsity == 0.5
    assert found.entry.totals.bits_per_weight > 0
    made = Checkpoint.open(found.out)
    assert made.kind is (Kind.FACTORED if form == "factored" else Kind.PRODUCTS)
    last = json.loads((found.out / LOG).read_text().splitlines()[-1])
    (score,) = evaluate(EvalConfig(text=str(row_file)), [str(found.out)])
    assert score.perplexity.value == pytest.approx(last["perplexity"], rel=0.02)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_branches_multiply_in_16_bits_too(family, row_file, tmp_path, name):
    losses = []
    for precision in ("no", "bf16"):
        config = replace(SHORT, data=str(row_file), tokens=96, slorb=16, mixed_precision=precision)
        out = recover(config, str(family(name)), tmp_path / precision).out
        assert verify(str(out))["zeros"] > 0
        losses.append([json.loads(row)["loss"] for row in (out / LOG).read_text().splitlines()])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_branches_go_on_after_an_interruption_to_the_same_bytes(family, tmp_path):
    config = replace(SHORT, slorb=16, save_every=3)
    whole = recover(config, str(family("llama")), tmp_path / "whole").out
    with pytest.raises(KeyboardInterrupt):
        recover(config, str(family("llama")), tmp_path / "again", progress=StopsAt(7))
    again = recover(config, str(family("llama")), tmp_path / "again").out
    assert Checkpoint.open(whole).fingerprint == Checkpoint.open(again).fingerprint


def test_a_branch_beside_a_pruned_weight_makes_up_for_what_it_lost(pruned, tmp_path):
    """Before the first step the sparse model with branches is closer to its parent."""
    logs = []
    for slorb in (None, 8):
        out = tmp_path / str(slorb)
        recover(replace(SHORT, slorb=slorb, kl_weight=1.0), str(pruned), out)
        logs.append(json.loads((out / LOG).read_text().splitlines()[0])["divergence"])
    assert logs[1] < logs[0]


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        ({"slorb": 24}, "slorb-does-not-divide", ("--slorb 24", "32 inputs")),
        ({"slorb": 16, "method": "cast"}, "conflicting-options", ("--slorb", "cast")),
        ({"format": "factored"}, "no-effect", ("--format factored", "--slorb")),
        ({"slorb": 0}, "out-of-range", ("--slorb", "1")),
    ],
)
def test_branches_that_cannot_be_are_refused(pruned, tmp_path, change, code, named):
    with refused(code, *named, kind=UsageError):
        recover(replace(SHORT, **change), str(pruned), tmp_path / "out")
