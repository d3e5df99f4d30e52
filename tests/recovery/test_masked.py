"""The zeros of a sparse model survive other people's training."""

import pytest
import torch
from refusals import refused
from torch import nn

import sparsekit
from sparsekit.errors import UsageError


@pytest.fixture
def model(pruned):
    return sparsekit.load(pruned, "float32")


def zeros(model):
    return {n: p.detach() == 0 for n, p in model.named_parameters() if ".layers." in n}


def losses(model, rows):
    return model(input_ids=rows, labels=rows).loss


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_zeros_survive_a_plain_loop_and_the_rest_is_trained(model, rows, kind):
    before, first = zeros(model), losses(model, rows).item()
    optimizer = kind(model.parameters(), lr=1e-2)
    with sparsekit.masked(model) as masked:
        for _ in range(3):
            losses(model, rows).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert all(torch.equal(z, before[n]) for n, z in zeros(model).items())
    assert losses(model, rows).item() < first
    assert masked.count >= sum(int(z.sum()) for z in before.values())


def test_without_it_the_same_loop_fills_them(model, rows):
    before = zeros(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses(model, rows).backward()
    optimizer.step()
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(zeros(model)[name], before[name])


def test_afterwards_optimizers_are_free_again(model, rows):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with sparsekit.masked(model):
        pass
    losses(model, rows).backward()
    optimizer.step()
    assert zeros(model)["model.layers.0.mlp.up_proj.weight"].float().mean() < 0.5


def test_zeros_survive_the_trainer_of_transformers(model, rows, tmp_path):
    """After every one of its steps."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    before = zeros(model)
    kept = []

    class Looks(TrainerCallback):
        def on_step_end(self, *_, **__):
            kept.append(all(torch.equal(z, before[n]) for n, z in zeros(model).items()))

    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    weight = model.model.layers[0].mlp.up_proj.weight
    old = weight.detach().clone()
    with sparsekit.masked(model):
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Looks()]).train()
    assert kept == [True] * 3
    assert not torch.equal(weight, old)
    assert all(torch.equal(z, before[n]) for n, z in zeros(model).items())


def test_adapters_that_are_merged_leave_the_zeros(model):
    """As LoRA merges: the product of two thin matrices is added to the weight."""
    before, layer = zeros(model), model.model.layers[0].mlp.up_proj
    old = layer.weight.detach().clone()
    with sparsekit.masked(model), torch.no_grad():
        layer.weight += torch.ones(64, 2) @ torch.ones(2, 32)
    assert all(torch.equal(z, before[n]) for n, z in zeros(model).items())
    assert (layer.weight != old).sum() == (old != 0).sum()


@pytest.mark.parametrize("first", ["masked", "adapters"])
def test_adapters_of_peft_learn_and_leave_the_zeros_when_they_are_merged(model, rows, first):
    from peft import LoraConfig, get_peft_model

    before, old = zeros(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    config = LoraConfig(r=2, target_modules=["up_proj", "q_proj"])
    adapted = get_peft_model(model, config) if first == "adapters" else None
    with sparsekit.masked(adapted or model):
        adapted = adapted or get_peft_model(model, config)
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            losses(adapted, rows).backward()
            optimizer.step()
            optimizer.zero_grad()
        learned = [p for n, p in adapted.named_parameters() if "lora_B" in n]
        assert learned
        assert all(p.any() for p in learned)
        merged = adapted.merge_and_unload()
    after = dict(merged.named_parameters())
    assert all(torch.equal(z, before[n]) for n, z in zeros(merged).items())
    name = "model.layers.0.mlp.up_proj.weight"
    assert (after[name] != old[name]).sum() > 0.9 * (old[name] != 0).sum()


def test_embeddings_and_matrices_of_zeros_are_left_alone(model):
    table, matrix = model.get_input_embeddings().weight, model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        table[3] = 0
        matrix.zero_()
    with sparsekit.masked(model), torch.no_grad():
        table[3] = 1
        matrix[0] = 1
    assert table[3].all()
    assert matrix[0].all()


def test_a_model_without_zeros_is_refused():
    with refused("not-sparse", kind=UsageError):
        sparsekit.masked(nn.Linear(4, 4))
    with refused("wrong-type", "str", kind=UsageError):
        sparsekit.masked("pruned")
