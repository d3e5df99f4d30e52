"""Options of `recover`: which are refused, and the schedules of the rate."""

import pytest
from refusals import refused
from trainings import SHORT
from verbs import replace

from sparsekit.errors import (
    DataError,
    UsageError,
)
from sparsekit.recovery.config import rate_at
from sparsekit.recovery.prepare import prepare_recover
from sparsekit.recovery.recover import recover


@pytest.mark.parametrize(
    ("method", "asked", "taken"),
    [
        ("fixed", "auto", "linear"),
        ("ast", "auto", "cosine"),
        ("cast", "auto", "flat"),
        ("fixed", "flat", "flat"),
    ],
)
def test_a_method_has_its_own_schedule(pruned, tmp_path, method, asked, taken):
    config = replace(SHORT, method=method, schedule=asked)
    assert prepare_recover(config, str(pruned), tmp_path / "out").config.schedule == taken


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        ({"method": "asst"}, "no-method", ("'asst'", "'ast'")),
        ({"teacher": "dense", "kl_weight": 0.0}, "no-effect", ("--teacher", "--kl-weight 0")),
        ({"schedule": "cosin"}, "not-a-choice", ("--schedule 'cosin'", "'cosine'")),
        ({"dtype": "bfloat16"}, "not-a-choice", ("--dtype bfloat16", "--mixed-precision bf16")),
        ({"mixed_precision": "bf61"}, "not-a-choice", ("--mixed-precision 'bf61'", "no, bf16")),
        ({"tokens": None}, "tokens-or-max-time", ("--tokens", "--max-time")),
        ({"max_time": "9s"}, "tokens-or-max-time", ("--tokens", "--max-time", "not both")),
        (
            {"tokens": None, "max_time": "9s", "data": "self"},
            "missing-option",
            ("--data self", "--tokens"),
        ),
        ({"tokens": 31}, "too-few-tokens", ("--tokens 31", "32")),
        ({"batch": 0}, "out-of-range", ("--batch", "1")),
        ({"lr": -1.0}, "out-of-range", ("--lr", "-1")),
        ({"kl_weight": 1.5}, "out-of-range", ("--kl-weight", "1.5")),
        ({"metric": "activations"}, "not-a-choice", ("--metric 'activations'", "magnitude")),
        ({"temperature": 0.0}, "out-of-range", ("--temperature", "100")),
        ({"option": {"decai": "1"}}, "no-option", ("'decai'", "'decay'")),
        ({"eval_text": "builtin"}, "no-effect", ("--eval-text", "--eval-every")),
    ],
)
def test_wrong_words_are_refused_at_once(change, code, named):
    with refused(code, *named, kind=UsageError):
        replace(SHORT, **change)


@pytest.mark.parametrize(
    ("change", "match"), [({"data": "no.txt"}, "no.txt"), ({"pattern": "2;4"}, "2;4")]
)
def test_wrong_values_are_refused_at_once(change, match):
    with pytest.raises((UsageError, DataError), match=match):
        replace(SHORT, **change)


def test_a_metric_has_no_effect_on_a_mask_that_stays(pruned, tmp_path):
    config = replace(SHORT, method="fixed", metric="activation")
    with refused("no-effect", "--metric activation", pruned, kind=UsageError):
        recover(config, str(pruned), tmp_path / "out")


def test_rates_rise_stay_and_fall():
    steps = 200
    rates = {
        name: [rate_at(name, step, steps) for step in range(steps)]
        for name in ("flat", "cosine", "linear", "constant")
    }
    assert set(rates["constant"]) == {1.0}
    for name in ("flat", "cosine", "linear"):
        assert rates[name][0] == pytest.approx(1 / 8)  # 4 % of the steps rise
        assert rates[name][8] > 0.9
    assert rates["flat"][100] == rates["flat"][179] == 1.0
    assert rates["flat"][-1] == pytest.approx(1 / 20)
    assert rates["cosine"][-1] == pytest.approx(0.1, abs=1e-3)
    assert rates["linear"][100] == 0.5
