"""A scale of inputs is taken back by what makes them, in every family, or not at all."""

import pytest
import torch

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.model.block_stream import BlockStream
from sparsekit.quantization.input_scale import fold_scale

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


@pytest.mark.parametrize(
    ("name", "modules", "maker"),
    [
        ("llama", ATTENTION, "norm"),
        ("llama", MLP, "norm"),
        ("llama", ("down_proj",), "up_proj"),
        ("llama", ("o_proj",), None),  # v has fewer heads
        ("llama", ("q_proj", "k_proj"), None),  # v reads the same norm
        ("gemma3", ATTENTION, "norm"),  # multiplies by 1 + weight
        ("gemma3", ("down_proj",), "up_proj"),
        ("qwen2", ATTENTION, "norm"),
        ("phi3", ("qkv_proj",), "norm"),
        ("phi3", ("down_proj",), None),  # one layer makes gate and up
        ("opt", ATTENTION, "norm"),  # with a bias
        ("opt", ("fc2",), "fc1"),  # ReLU lets a scale through
        ("opt", ("out_proj",), "v_proj"),  # as many heads
        ("gpt2", ("c_attn",), "norm"),
        ("gpt2", ("mlp.c_proj",), None),  # GELU does not
    ],
)
def test_the_block_computes_the_same_with_scaled_inputs(family, rows, name, modules, maker):
    stream = BlockStream(Checkpoint.open(family(name)), device="cpu", dtype=torch.float32)
    stream.feed(rows)
    block = next(iter(stream))
    block.load()
    targets = [t for t in block.targets if t.module.endswith(modules)]
    before, stored = block.run(1), block.tensors()
    width = targets[0].shape[1]
    scale = 0.5 + 2 * torch.rand(width, generator=torch.Generator().manual_seed(3))
    folded = fold_scale(block, targets, scale, block.targets)
    after = block.run(1)
    if maker is None:
        assert folded is None
        assert torch.equal(before, after)
        assert all(torch.equal(stored[name], t) for name, t in block.tensors().items())
        return
    assert folded is not None
    assert torch.allclose(folded.scale, scale, rtol=0.02)  # norms on disk are bfloat16 here
    assert torch.allclose(before, after, rtol=1e-3, atol=1e-3 * before.abs().max())
    changed = {n for n, t in block.tensors().items() if not torch.equal(stored[n], t)}
    if maker == "norm":
        assert folded.rows_of is None
        assert changed
        assert all("norm" in name or "ln_" in name for name in changed)
    else:
        assert folded.rows_of is not None
        assert folded.rows_of.module.endswith(maker)
        assert all(name.endswith(".bias") for name in changed)


def test_outliers_of_the_residual_stream_hide_no_wrong_place(family, rows):
    """Beside them all that a layer adds is little, also what it adds with a scale in gate_proj."""
    stream = BlockStream(Checkpoint.open(family("llama")), device="cpu", dtype=torch.float32)
    stream.feed(rows)
    block = next(iter(stream))
    block.load()
    for hidden in stream.hidden:
        hidden[..., 0] += 3e3
    targets = [t for t in block.targets if t.module.endswith("down_proj")]
    generator = torch.Generator().manual_seed(3)
    scale = 0.5 + 2 * torch.rand(targets[0].shape[1], generator=generator)
    folded = fold_scale(block, targets, scale, block.targets)
    assert folded is not None
    assert folded.rows_of is not None
    assert folded.rows_of.module.endswith("up_proj")
