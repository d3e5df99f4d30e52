"""What every file in recoverers/ keeps."""

import importlib
import json
import math
from dataclasses import fields

import pytest
import torch
from refusals import refused
from verbs import replace

from sparsekit import registry as methods
from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.errors import UsageError
from sparsekit.inspection.verify import verify
from sparsekit.recovery import export as trainwrite
from sparsekit.recovery.config import SCHEDULES, RecoverConfig
from sparsekit.recovery.log import LOG
from sparsekit.recovery.methods import Scale
from sparsekit.recovery.recover import recover

NAMES = methods.names("recoverers")
# Twelve steps of 2 x 16 tokens, with rates that move weights.
SHORT = RecoverConfig(tokens=384, batch=2, length=16, lr=1e-2)
SIZES = [10**8, 10**9, 10**10]


@pytest.fixture(autouse=True)
def unsettled(monkeypatch):
    """Twelve steps finish no decay."""
    monkeypatch.setattr(trainwrite, "MOST_MOVED", math.inf)


def test_there_are_methods():
    assert {"fixed", "ast", "cast"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_its_file_tells_source_and_differences_and_explains_each_option(name):
    text = importlib.import_module(f"sparsekit.recovery.methods.{name}").__doc__
    assert "\nSource: " in text
    assert "\nDiffers: " in text
    method = methods.load("recoverers", name, {})
    told = methods.describe("recoverers", name)
    assert {option.name for option in told.options} <= {field.name for field in fields(method)}
    assert all(option.help for option in told.options)


@pytest.mark.parametrize("name", NAMES)
def test_its_choices_are_possible_and_no_higher_for_larger_models(name):
    method = methods.load("recoverers", name, {})
    assert method.schedule in SCHEDULES[1:]
    scales = [Scale(parameters=size, weight=0.05, masked_gradient=1e-3) for size in SIZES]
    rates = [method.default_lr(scale) for scale in scales]
    shares = [method.default_kl_weight(scale) for scale in scales]
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] <= rates[0] < 1e-2
    assert all(0 <= share <= 1 for share in shares)
    decays = [method.decay_of(scale) for scale in scales]
    assert all(0 <= decay < math.inf for decay in decays)
    assert (decays[0] > 0) == method.needs_gradient


@pytest.mark.parametrize(
    ("name", "rates", "shares"),
    [
        ("ast", (1e-4, 5e-5, 2e-5), (2 / 3, 1 / 2, 1 / 3)),
        ("cast", (1e-4, 2e-5, 2e-5), (2 / 3, 1 / 2, 1 / 3)),
        ("fixed", (4e-4, 5e-5, 2e-5), (2 / 3, 1 / 2, 1 / 3)),
    ],
)
def test_default_rates_and_kl_weights(name, rates, shares):
    """Its section 5, but for small models: half of AST's rate there, and four times for `fixed`."""
    method = methods.load("recoverers", name, {})
    scales = [Scale(parameters=size, weight=0.05, masked_gradient=1e-3) for size in SIZES]
    assert tuple(method.default_lr(scale) for scale in scales) == rates
    assert tuple(method.default_kl_weight(scale) for scale in scales) == shares


@pytest.mark.parametrize(
    ("text", "value"), [("yes", True), ("true", True), ("no", False), ("false", False)]
)
def test_an_option_that_holds_or_not_is_a_truth_value(text, value):
    assert methods.load("recoverers", "ast", {"coupled": text}).coupled is value
    told = {option.name: option for option in methods.describe("recoverers", "ast").options}
    assert (told["coupled"].type, told["coupled"].default) == ("bool", "no")
    with refused("not-a-choice", "coupled of ast", "'maybe'", kind=UsageError):
        methods.load("recoverers", "ast", {"coupled": "maybe"})
    with refused("not-a-choice", "coupled of ast", "'1'", kind=UsageError):
        methods.load("recoverers", "ast", {"coupled": "1"})


@pytest.mark.parametrize("name", NAMES)
def test_its_output_has_the_pattern_and_the_same_bytes_again(pruned, tmp_path, name):
    config, prints = replace(SHORT, method=name), []
    for number in range(2):
        out = recover(config, str(pruned), tmp_path / str(number)).out
        assert verify(str(out))["zeros"] == 9216
        prints.append(Checkpoint.open(out).fingerprint)
    assert prints[0] == prints[1]
    log = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    assert [row["step"] for row in log] == list(range(1, 13))
    assert all(math.isfinite(row["loss"]) for row in log)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_cut_into_parts_is_the_same_step(pruned, tmp_path, name):
    """Means over parts of equal size are the mean over all, to the rounding of float32."""
    found = []
    for batch, accumulate in ((4, 1), (1, 4)):
        config = replace(SHORT, method=name, batch=batch, accumulate=accumulate, lr=1e-3)
        out = Checkpoint.open(recover(config, str(pruned), tmp_path / str(batch)).out)
        found.append(out.read(out.places))
    for tensor, other in zip(*(tensors.values() for tensors in found), strict=True):
        assert torch.equal(tensor == 0, other == 0)
        assert torch.allclose(tensor.float(), other.float(), atol=2e-3)
