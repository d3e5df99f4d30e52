"""Recovery training pays on a model that is trained, pruned and trained again within the test.

Slow (two minutes on one core), but part of `.ci/run`: `pytest -m slow tests/test_recovery.py`.
The text is drawn from a random table of what follows two words, which the model can only learn.
"""

import pytest
import torch
from safetensors.torch import save_file
from verbs import replace

from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.prune import prune
from sparsekit.recovery.config import RecoverConfig
from sparsekit.recovery.recover import recover
from sparsekit.scoring.config import EvalConfig
from sparsekit.scoring.evaluate import evaluate

pytestmark = pytest.mark.slow

WORDS, LENGTH = 64, 64
DENSE_STEPS, STEPS = 600, 400
SHAPE = {
    "vocab_size": WORDS,
    "hidden_size": 128,
    "intermediate_size": 256,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def text(table: torch.Tensor, rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(rows, LENGTH, dtype=torch.int64)
    found[:, :2] = torch.randint(WORDS, (rows, 2), generator=generator)
    for place in range(2, LENGTH):
        follows = table[found[:, place - 2] * WORDS + found[:, place - 1]]
        found[:, place] = torch.multinomial(follows, 1, generator=generator)[:, 0]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_llama):
    """The text in two files, a dense model that has learned it, and that model at 2:4."""
    root = tmp_path_factory.mktemp("recovery")
    generator = torch.Generator().manual_seed(0)
    table = torch.softmax(3 * torch.randn(WORDS**2, WORDS, generator=generator), -1)
    rows = text(table, 4096, seed=1)
    save_file({"tokens": rows}, root / "train.safetensors")
    save_file({"tokens": text(table, 64, seed=2)}, root / "held-out.safetensors")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make_llama(root / "first", **SHAPE)
    learn(root / "first", root / "dense", rows)
    config = PruneConfig(calibration=str(root / "train.safetensors"), samples=32)
    prune(config, str(root / "dense"), root / "wanda")
    return root


def learn(start, out, rows):
    """Plain training of the dense model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(start)
    adam = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0)
    for step in range(DENSE_STEPS):
        share = min(1, (step + 1) / 30, (DENSE_STEPS - step) / (0.3 * DENSE_STEPS))
        adam.param_groups[0]["lr"] = 3e-3 * share
        batch = rows[step * 32 % 4096 :][:32]
        model(input_ids=batch, labels=batch).loss.backward()
        adam.step()
        adam.zero_grad()
    model.save_pretrained(out)


@pytest.fixture(scope="module")
def perplexity(folder):
    config = EvalConfig(text=str(folder / "held-out.safetensors"))
    return lambda name: evaluate(config, [str(folder / name)])[0].perplexity.value


@pytest.fixture(scope="module")
def fixed(folder, perplexity):
    train(folder, "fixed", "wanda", 1e-3)
    return perplexity("fixed")


def train(folder, method, start, rate):
    config = RecoverConfig(
        data=str(folder / "train.safetensors"),
        batch=16,
        length=LENGTH,
        tokens=STEPS * 16 * LENGTH,
    )
    recover(replace(config, method=method, lr=rate), str(folder / start), folder / method)


def test_training_on_the_fixed_mask_wins_back_most(perplexity, fixed):
    dense, wanda = perplexity("dense"), perplexity("wanda")
    assert wanda > 1.5 * dense
    assert fixed - dense < 0.2 * (wanda - dense)


@pytest.mark.parametrize("method", ["ast", "cast"])
def test_masks_that_move_beat_the_fixed_one(folder, perplexity, fixed, method):
    train(folder, method, "wanda", 1e-3)
    assert perplexity(method) < 0.995 * fixed
