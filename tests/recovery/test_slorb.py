"""A branch beside a sparse layer begins with what the layer lacks (A7)."""

import pytest
import torch
from torch import nn

from sparsekit.recovery.slorb import Branch, attach
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
