"""What every pruning method must do; a new file in `sparsekit/pruners` is tested by being there."""

import ast
import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from oracles import exact_count, inputs_of, sums_of, weight_of
from refusals import refused

import sparsekit.pruning.methods
from sparsekit import registry as methods
from sparsekit.errors import UsageError
from sparsekit.pruning.methods import Pruned, Pruner
from sparsekit.solvers.input_stats import InputStats
from sparsekit.weights.patterns import Pattern

PATTERNS = ["2:4", "1:4", "4:8", "50%", "37%", "50%/tensor"]

every_method = pytest.mark.parametrize("name", methods.names("pruners"))
every_pattern = pytest.mark.parametrize("text", PATTERNS)


def load(name: str) -> Pruner:
    return methods.load("pruners", name, {})


def sums_for(pruner: Pruner, inputs: torch.Tensor) -> InputStats | None:
    return sums_of(inputs, pruner.needs) if pruner.needs else None


def run(name: str, text: str, weight: torch.Tensor, inputs: torch.Tensor) -> Pruned:
    """Prune, and check all that holds whatever the weight and the inputs are."""
    pruner, pattern, before = load(name), Pattern.parse(text), weight.clone()
    pruned = pruner.prune(weight, sums_for(pruner, inputs), pattern)
    assert torch.equal(weight, before), "the input weight was changed"
    assert pruned.mask.dtype == torch.bool
    assert pruned.weight.dtype == torch.float32
    assert pruned.weight.shape == pruned.mask.shape == weight.shape
    assert pruned.weight.isfinite().all()
    assert exact_count(pruned.mask, pattern)
    removed = pruned.weight[~pruned.mask]
    assert (removed == 0).all()
    assert not removed.signbit().any(), "-0.0 off the mask"
    pattern.check(pruned.weight, name)
    return pruned


@every_method
@every_pattern
def test_mask_has_exactly_the_pattern(name: str, text: str) -> None:
    pruned = run(name, text, weight_of(24, 64), inputs_of(200, 64))
    assert torch.equal(pruned.weight != 0, pruned.mask)  # no survivor of a random weight is 0


@every_method
@every_pattern
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (5, 136), (3, 200)])
def test_sizes_need_not_be_multiples_of_128(name: str, text: str, rows: int, columns: int) -> None:
    run(name, text, weight_of(rows, columns), inputs_of(300, columns))


@every_method
@pytest.mark.parametrize("text", ["50%", "29%", "50%/tensor"])
def test_unstructured_patterns_take_any_odd_size(name: str, text: str) -> None:
    run(name, text, weight_of(3, 131), inputs_of(300, 131))


@every_method
@pytest.mark.parametrize("text", ["3:6", "5:10", "16:32", "2:2", "0%"])
def test_unusual_patterns(name: str, text: str) -> None:
    run(name, text, weight_of(4, 480), inputs_of(600, 480))


@every_method
@pytest.mark.parametrize("text", ["2:4", "50%", "50%/tensor"])
def test_same_input_gives_the_same_bits(name: str, text: str) -> None:
    first = run(name, text, weight_of(24, 64), inputs_of(200, 64))
    again = run(name, text, weight_of(24, 64), inputs_of(200, 64))
    assert torch.equal(first.mask, again.mask)
    assert torch.equal(first.weight, again.weight)
    assert first.numbers == again.numbers


@every_method
def test_weights_with_the_same_input_share_sums_without_disturbing_them(name: str) -> None:
    pruner, inputs = load(name), inputs_of(200, 64)
    shared = sums_for(pruner, inputs)
    for seed, text in [(1, "2:4"), (2, "50%"), (1, "2:4")]:
        weight, pattern = weight_of(16, 64, seed), Pattern.parse(text)
        alone = pruner.prune(weight, sums_for(pruner, inputs), pattern)
        assert torch.equal(pruner.prune(weight, shared, pattern).weight, alone.weight)
    if shared is not None:
        assert torch.equal(shared.squares, sums_for(pruner, inputs).squares)


@every_method
def test_method_that_updates_weights_says_so(name: str) -> None:
    weight = weight_of(16, 64)
    pruned = run(name, "2:4", weight, inputs_of(200, 64))
    kept = torch.equal(pruned.weight, weight.masked_fill(~pruned.mask, 0.0))
    assert load(name).updates == (not kept)


@every_method
@every_pattern
def test_dead_inputs_give_finite_weights(name: str, text: str) -> None:
    run(name, text, weight_of(12, 64), inputs_of(200, 64, dead=(0, 5, 6, 7, 63)))


@every_method
@every_pattern
def test_all_zero_weight_stays_zero(name: str, text: str) -> None:
    pruned = run(name, text, torch.zeros(6, 64), inputs_of(200, 64))
    assert (pruned.weight == 0).all()


@every_method
@every_pattern
def test_a_zero_row_and_column_do_no_harm(name: str, text: str) -> None:
    weight = weight_of(12, 64)
    weight[3] = 0
    weight[:, 9] = 0
    run(name, text, weight, inputs_of(200, 64))


@every_method
@every_pattern
def test_bfloat16_values_with_many_ties_keep_the_exact_count(name: str, text: str) -> None:
    weight = weight_of(24, 64).mul(4).round().div(4).bfloat16().float()
    assert len(weight.abs().unique()) < 24
    run(name, text, weight, inputs_of(200, 64).bfloat16().float())


@every_method
def test_fewer_tokens_than_inputs(name: str) -> None:
    run(name, "2:4", weight_of(8, 64), inputs_of(6, 64))


@every_method
def test_transposed_weight_is_taken_as_it_is_indexed(name: str) -> None:
    weight, inputs = weight_of(16, 64), inputs_of(200, 64)
    strided = weight.T.contiguous().T
    assert not strided.is_contiguous()
    assert torch.equal(
        run(name, "2:4", strided, inputs).mask, run(name, "2:4", weight, inputs).mask
    )


# ------------------------------------------------------------------------------- description


@every_method
def test_description_matches_the_class(name: str) -> None:
    method, pruner = methods.describe("pruners", name), load(name)
    assert method.name == name
    assert method.data_free == (pruner.needs is None)
    fields = dataclasses.fields(pruner)
    assert [option.name for option in method.options] == [field.name for field in fields]
    for option, field in zip(method.options, fields, strict=True):
        assert ast.literal_eval(option.default) == field.default == getattr(pruner, field.name)
        assert type(field.default).__name__ == option.type


@every_method
def test_method_and_options_are_explained(name: str) -> None:
    method = methods.describe("pruners", name)
    assert method.summary
    assert method.source
    assert method.cost
    assert all(option.help.endswith(".") for option in method.options)


@every_method
def test_options_arrive_as_text_and_are_checked(name: str) -> None:
    for option in methods.describe("pruners", name).options:
        pruner = methods.load("pruners", name, {option.name: "3"})
        assert getattr(pruner, option.name) == 3
        assert type(getattr(pruner, option.name)).__name__ == option.type
        code = "not-a-choice" if option.choices else "not-a-number"
        with refused(code, f"option {option.name} of {name}", "many", kind=UsageError):
            methods.load("pruners", name, {option.name: "many"})
    with refused("no-option", name, "'colour'", kind=UsageError):
        methods.load("pruners", name, {"colour": "3"})


# -------------------------------------------------------------------------- a new pruning method

CONTRIBUTING = Path(__file__).parents[3] / "CONTRIBUTING.md"


@pytest.fixture
def sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The method that CONTRIBUTING.md shows, as the one file of a folder of pruners."""
    [text] = re.findall(r"```python\n(.*?)```", CONTRIBUTING.read_text("utf-8"), flags=re.DOTALL)
    folder = tmp_path / "pruning" / "methods"
    folder.mkdir(parents=True)
    (folder / "name.py").write_text(text, "utf-8")
    monkeypatch.setattr(methods, "__file__", str(tmp_path / "registry.py"))
    monkeypatch.setattr(sparsekit.pruning.methods, "__path__", [str(folder)])
    yield "name"
    sys.modules.pop("sparsekit.pruning.methods.name", None)


def test_sample_of_contributing_is_a_method_as_it_is_copied(sample: str) -> None:
    assert methods.names("pruners") == [sample]
    for text in PATTERNS:
        test_mask_has_exactly_the_pattern(sample, text)
        test_dead_inputs_give_finite_weights(sample, text)
    test_same_input_gives_the_same_bits(sample, "2:4")
    test_method_that_updates_weights_says_so(sample)
    test_description_matches_the_class(sample)
    test_method_and_options_are_explained(sample)
    test_options_arrive_as_text_and_are_checked(sample)
