"""The stream of blocks: bit for bit the ordinary forward, with one block in memory."""

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file
from torch import nn

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.errors import DataError, NumericalError
from sparsekit.model.block_stream import BlockStream
from sparsekit.solvers.input_stats import Stats

NINE = ["llama", "llama_tied", "qwen2", "qwen3", "mistral", "gemma3", "gpt2", "opt", "phi3"]
WINDOW = 8  # of the sliding layers in conftest.py


def stream_of(folder, dtype=torch.float32) -> BlockStream:
    return BlockStream(Checkpoint.open(folder), device="cpu", dtype=dtype)


def ordinary(folder, dtype=torch.float32) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def inputs_of_linears(model: nn.Module, rows) -> dict[str, torch.Tensor]:
    """The inputs of each linear layer of the ordinary model, `[tokens, in]`, by module name."""
    from transformers.pytorch_utils import Conv1D

    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2))
        )
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]
    for row in rows:
        model(input_ids=row[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@torch.no_grad()
def streamed_logits(stream: BlockStream, rows) -> list[torch.Tensor]:
    """The logits of every row, by the same steps as a perplexity run."""
    stream.feed(rows)
    for block in stream:
        block.load()
        block.advance()
    found = []
    with (
        stream.skeleton.resident(stream.skeleton.after_blocks()),
        stream._stubs(lambda *_: stream.hidden[len(found)]),
    ):
        for row in rows:
            found.append(stream.logits(len(row))[0])
    return found


def assert_same_as_forward(folder, rows, dtype) -> None:
    stream, model = stream_of(folder, dtype), ordinary(folder, dtype)
    for row, streamed in zip(rows, streamed_logits(stream, rows), strict=True):
        with torch.no_grad():
            expected = model(input_ids=row[None], use_cache=False).logits[0]
        assert expected.dtype == dtype
        assert torch.equal(streamed, expected)


@pytest.mark.parametrize("name", NINE)
def test_streamed_logits_equal_the_ordinary_forward_bit_for_bit(family, rows, name):
    assert_same_as_forward(family(name), rows, torch.float32)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_stream_equals_forward_in_bfloat16_too(family, rows, name):
    assert_same_as_forward(family(name), rows, torch.bfloat16)


def test_block_that_widens_the_hidden_states_is_not_narrowed(family, rows, monkeypatch):
    """Some families keep the residual in float32 whatever the compute type is."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    plain = LlamaDecoderLayer.forward
    monkeypatch.setattr(
        LlamaDecoderLayer,
        "forward",
        lambda self, hidden, *args, **kw: plain(self, hidden.bfloat16(), *args, **kw).float() / 3,
    )
    stream = stream_of(family("llama"), torch.bfloat16)
    stream.feed(rows)
    for block in stream:
        before = [hidden.bfloat16() for hidden in stream.hidden]
        block.load()
        block.advance()
        after = stream.hidden
        assert {hidden.dtype for hidden in after} == {torch.float32}
        assert any(not torch.equal(h, h.bfloat16().float()) for h in after)
        assert not any(torch.equal(b, a.bfloat16()) for b, a in zip(before, after, strict=True))


def test_hidden_states_are_not_the_tensors_that_the_model_made(family, rows):
    """They are overwritten in place, and a block may be called with the embeddings again."""
    stream = stream_of(family("llama"))
    made = []
    inner = stream.model.get_input_embeddings()
    inner.register_forward_hook(lambda _module, _args, output: made.append(output))
    stream.feed(rows)
    kept = [tensor.clone() for tensor in made]
    for block in stream:
        block.load()
        block.advance()
    assert len(made) == len(rows)
    for tensor, copy in zip(made, kept, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("name", NINE)
def test_hidden_states_after_each_block_equal_those_of_the_ordinary_forward(family, rows, name):
    folder = family(name)
    stream, model = stream_of(folder), ordinary(folder)
    outputs: list[torch.Tensor] = []
    for name_of_block in stream.names():
        model.get_submodule(name_of_block).register_forward_hook(
            lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        for row in rows:
            model(input_ids=row[None], use_cache=False)
    stream.feed(rows)
    for block in stream:
        block.load()
        block.advance()
        for index, hidden in enumerate(stream.hidden):
            assert torch.equal(hidden, outputs[index * len(stream) + block.index])


@pytest.mark.parametrize("name", NINE)
def test_losses_equal_the_cross_entropy_of_transformers_for_each_row(family, rows, name):
    folder = family(name)
    stream, model = stream_of(folder), ordinary(folder)
    streamed_logits(stream, rows)
    losses = stream.losses(rows)
    assert losses.shape == (len(rows),)
    assert losses.dtype == torch.float64
    with torch.no_grad():
        expected = [model(input_ids=row[None], labels=row[None]).loss.double() for row in rows]
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-6, atol=0)


def test_losses_do_not_depend_on_how_many_logits_are_made_at_once(family, rows, monkeypatch):
    stream = stream_of(family("llama"))
    streamed_logits(stream, rows)
    whole = stream.losses(rows)
    monkeypatch.setattr("sparsekit.model.block_stream.LOGIT_BYTES", 5 * 4 * 260)
    torch.testing.assert_close(stream.losses(rows), whole, rtol=1e-6, atol=0)


def test_sliding_and_full_layers_are_recorded_with_different_arguments(family, rows):
    """With the first block's arguments for all blocks, as in paper code, gemma3 would be wrong."""
    stream = stream_of(family("gemma3"))
    stream.feed(rows)
    sliding, full, again = (calls[0].named for calls in stream._calls)
    masks = [call["attention_mask"] for call in (sliding, full, again)]
    assert torch.equal(masks[0], masks[2])
    visible = masks[0][0, 0] if masks[0].dtype == torch.bool else masks[0][0, 0] == 0
    assert int(visible[-1].sum()) == WINDOW
    # A full layer's mask is left out (plain causal attention) or lets the last token see all.
    assert masks[1] is None or int((masks[1][0, 0][-1] == 0).sum()) == rows.shape[1]
    assert not torch.equal(sliding["position_embeddings"][0], full["position_embeddings"][0])


def test_one_recorded_call_serves_all_rows_of_a_length(family, rows):
    stream = stream_of(family("gemma3"))
    stream.feed(rows)
    for calls in stream._calls:
        assert len(calls) == len(rows)
        assert all(call is calls[0] for call in calls)


@pytest.mark.parametrize(
    ("name", "shared", "alone"),
    [
        (
            "llama",
            [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]],
            ["o_proj", "down_proj"],
        ),
        ("opt", [["q_proj", "k_proj", "v_proj"]], ["out_proj", "fc1", "fc2"]),
        ("phi3", [], ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    ],
)
def test_weights_that_read_one_tensor_share_one_sum(family, rows, name, shared, alone):
    stream = stream_of(family(name))
    stream.feed(rows)
    block = stream.block(0)
    block.load()
    found = block.observe(block.targets, Stats.GRAM)
    sums = {key.removesuffix(".weight").rpartition(".")[2]: value for key, value in found.items()}
    for group in shared:
        assert len({id(sums[member]) for member in group}) == 1
    groups = [*shared, *([member] for member in alone)]
    assert len({id(value) for value in sums.values()}) == len(groups)
    assert sorted(sums) == sorted(member for group in groups for member in group)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt"])
def test_sums_equal_those_of_plain_hooks_on_the_ordinary_model(family, rows, name):
    folder = family(name)
    expected = inputs_of_linears(ordinary(folder), rows)
    stream = stream_of(folder)
    stream.feed(rows)
    for block in stream:
        block.load()
        sums = block.observe(block.targets, Stats.GRAM)
        for target in block.targets:
            x = expected[f"{block.name}.{target.module}"].double()
            assert sums[target.name].tokens == rows.numel()
            gram = sums[target.name].gram.double()
            assert gram.shape == (target.shape[1], target.shape[1])
            scale = (x.T @ x).abs().max()
            assert (gram - x.T @ x).abs().max() < 1e-6 * scale
        block.advance()


@pytest.mark.parametrize("want", [Stats.NORMS, Stats.GRAM])
def test_stopping_early_gives_the_sums_of_a_full_pass(family, rows, want):
    def collected(advance: bool) -> list[torch.Tensor]:
        stream = stream_of(family("gemma3"))
        stream.feed(rows)
        found = []
        for block in stream:
            block.load()
            sums = block.observe(block.targets, want, advance=advance)
            found += [sums[t.name].squares for t in block.targets]
            if not advance:
                block.advance()
        return found + list(stream.hidden)

    for early, full in zip(collected(False), collected(True), strict=True):
        assert torch.equal(early, full)


def test_stopping_early_spares_the_last_product_of_every_row_but_the_first(family, rows):
    stream = stream_of(family("llama"))
    stream.feed(rows)
    block = stream.block(0)
    block.load()
    runs = []
    block.module.mlp.down_proj.register_forward_hook(lambda *_: runs.append(1))
    before = [hidden.clone() for hidden in stream.hidden]
    block.observe(block.targets, Stats.NORMS)
    assert len(runs) == 1  # the first row shows the order of the calls
    assert all(torch.equal(a, b) for a, b in zip(before, stream.hidden, strict=True))


def test_gpt2_weights_are_handed_out_as_out_by_in(family):
    folder = family("gpt2")
    stream, model = stream_of(folder), ordinary(folder)
    block = stream.block(1)
    block.load()
    shapes = {target.module: target.shape for target in block.targets}
    assert shapes == {
        "attn.c_attn": (96, 32),
        "attn.c_proj": (32, 32),
        "mlp.c_fc": (128, 32),
        "mlp.c_proj": (32, 128),
    }
    for target in block.targets:
        stored = model.get_submodule(f"transformer.h.1.{target.module}").weight
        weight = block.weight(target)
        assert weight.dtype == torch.float32
        assert torch.equal(weight, stored.T)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_replaced_weight_goes_to_disk_in_its_own_orientation_and_dtype(family, name):
    stream = stream_of(family(name))
    block = stream.block(0)
    block.load()
    target = next(t for t in block.targets if t.shape[0] != t.shape[1])
    place = stream.source.places[target.name]
    weight = torch.arange(target.shape[0] * target.shape[1]).view(target.shape).float() / 64
    given = block.replace(target, weight)
    stored = block.tensors()[target.name]
    assert (tuple(stored.shape), stored.dtype) == (place.shape, place.dtype)
    cast = weight.to(place.dtype)
    assert torch.equal(given, cast)
    assert torch.equal(stored, cast.T if name == "gpt2" else cast)
    # The module computes with what will be on disk.
    held = block.module.get_submodule(target.module).weight
    assert torch.equal(held, stored.float())


def test_replace_turns_negative_zeros_and_underflow_into_positive_zero(family):
    stream = stream_of(family("mistral"))  # float16
    block = stream.block(0)
    block.load()
    target = block.targets[0]
    weight = torch.full(target.shape, -1e-12)
    weight[0] = -0.0
    stored = block.replace(target, weight)
    assert not stored.any()
    assert not stored.signbit().any()


def test_weight_that_overflows_the_dtype_on_disk_is_an_error_that_names_it(family):
    stream = stream_of(family("mistral"))  # float16
    block = stream.block(0)
    block.load()
    target = block.targets[0]
    with refused("not-finite", "model.layers.0.self_attn.q_proj.weight", kind=NumericalError):
        block.replace(target, torch.full(target.shape, 1e6))


def test_tensors_of_a_block_are_the_bytes_on_disk(family):
    from safetensors.torch import load_file

    disk = load_file(family("gemma3") / "model.safetensors")
    stream = stream_of(family("gemma3"))
    block = stream.block(2)
    block.load()
    found = block.tensors()
    assert sorted(found) == sorted(n for n in disk if n.startswith("model.layers.2."))
    for name, tensor in found.items():
        assert tensor.dtype == disk[name].dtype
        assert torch.equal(tensor, disk[name])


def test_mixture_of_experts_is_refused_with_every_weight_that_would_be_skipped(family):
    experts = [f"experts.*.{weight}.weight (8)" for weight in ("w1", "w2", "w3")]  # 2 blocks of 4
    with refused("unsupported-model", "'mixtral'", *experts, kind=DataError):
        stream_of(family("mixtral"))


def test_matrices_outside_linear_layers_are_refused_by_name(tmp_path):
    """E.g. the experts of DBRX: two-dimensional parameters outside linear layers."""
    from transformers import DbrxConfig, DbrxForCausalLM
    from transformers.models.dbrx.configuration_dbrx import DbrxAttentionConfig, DbrxFFNConfig

    attention = DbrxAttentionConfig(kv_n_heads=2)
    attention.rope_theta = 10000.0
    config = DbrxConfig(
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        vocab_size=260,
        attn_config=attention,
        ffn_config=DbrxFFNConfig(ffn_hidden_size=16, moe_num_experts=2, moe_top_k=1),
    )
    DbrxForCausalLM(config).save_pretrained(tmp_path / "dbrx")
    with refused("unsupported-model", kind=DataError) as caught:
        stream_of(tmp_path / "dbrx")
    assert "ffn.experts.mlp.w1 (2)" in str(caught.value)


def test_tied_weight_that_is_stored_under_the_heads_name_is_found(copy_of):
    folder = copy_of("llama_tied")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert len(stream_of(folder)) == 2


def test_experts_that_are_packed_on_disk_too_are_refused_by_name(tmp_path):
    """Here every name matches, but the experts are not linear layers and would stay dense."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        pad_token_id=258,
        eos_token_id=257,
    )
    GptOssForCausalLM(config).save_pretrained(tmp_path / "oss")
    with refused("unsupported-model", kind=DataError) as caught:
        stream_of(tmp_path / "oss")
    for part in ("gate_up_proj", "down_proj"):
        assert f"model.layers.*.mlp.experts.{part} (2)" in str(caught.value)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_only_one_block_is_in_memory_at_a_time(family, rows, name):
    stream = stream_of(family(name))

    def real() -> set[str]:
        return {n for n, p in stream.model.named_parameters() if not p.is_meta}

    assert real() == set()
    stream.feed(rows)
    assert real() == set()
    for block in stream:
        block.load()
        block.observe(block.targets, Stats.GRAM, advance=True)
        assert real() == {
            n for n, _ in stream.model.named_parameters() if n.startswith(block.name + ".")
        }
    assert real() == set()
    stream.losses(rows)
    assert real() == set()


def test_weights_are_released_when_the_work_on_a_block_fails(family, rows):
    stream = stream_of(family("llama"))
    stream.feed(rows)

    def work() -> None:
        for block in stream:
            block.load()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert all(p.is_meta for p in stream.model.parameters())


def test_names_and_targets_are_those_on_disk(family):
    stream = stream_of(family("gpt2"))
    assert stream.names() == ["transformer.h.0", "transformer.h.1"]
    assert len(stream.targets()) == 8
    assert all(target.name in stream.source.places for target in stream.targets())
    assert stream.tested


@pytest.mark.parametrize("name", NINE)
def test_every_family_of_the_nine_counts_as_tested(family, name):
    assert stream_of(family(name)).tested


def test_checkpoint_of_a_bare_base_model_is_streamed(family, rows, tmp_path):
    """GPT-2's own checkpoint on the hub has no `transformer.` in its names."""
    from transformers import AutoModel

    AutoModel.from_pretrained(family("gpt2")).save_pretrained(tmp_path / "bare")
    config = (family("gpt2") / "config.json").read_text()
    (tmp_path / "bare" / "config.json").write_text(config)
    bare = stream_of(tmp_path / "bare")
    assert bare.block(0).targets[0].name == "h.0.attn.c_attn.weight"
    whole = streamed_logits(stream_of(family("gpt2")), rows)
    for ours, theirs in zip(streamed_logits(bare, rows), whole, strict=True):
        assert torch.equal(ours, theirs)


def test_shape_that_differs_from_the_configuration_is_refused(copy_of):
    folder = copy_of("llama_tied")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        config.replace('"intermediate_size": 64', '"intermediate_size": 68')
    )
    with refused("shape-mismatch", "mlp.", "64", "68", kind=DataError):
        stream_of(folder)


def test_untested_family_is_streamed_but_does_not_count_as_tested(tmp_path, rows):
    from transformers import OlmoConfig, OlmoForCausalLM

    config = OlmoConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=258,
        eos_token_id=257,
    )
    OlmoForCausalLM(config).save_pretrained(tmp_path / "olmo")
    assert_same_as_forward(tmp_path / "olmo", rows, torch.float32)
    assert not stream_of(tmp_path / "olmo").tested
