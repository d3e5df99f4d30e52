"""What every refiner must do; a new file in `sparsekit/refiners` is tested by being there."""

import ast
import dataclasses
from collections.abc import Mapping
from typing import get_args, get_type_hints

import pytest
import torch
from oracles import exact_count, inputs_of, sums_of, weight_of
from refusals import refused

from sparsekit import registry as methods
from sparsekit.errors import UsageError
from sparsekit.pruning.methods import Pruned
from sparsekit.pruning.refiners import Refiner
from sparsekit.solvers.input_stats import InputStats, Stats
from sparsekit.weights.patterns import Pattern

REFINERS = methods.names("refiners")
PATTERNS = ["2:4", "1:4", "4:8", "50%", "37%", "50%/tensor"]
UNUSUAL = ["3:6", "5:10", "16:32", "2:2", "0%", "29%"]
ODD = ["50%", "29%", "50%/tensor"]


def load(name: str) -> Refiner:
    return methods.load("refiners", name, {})


def accepted(patterns: list[str], rows: int, columns: int) -> list[tuple[str, str]]:
    """Each refiner with each of the patterns that it does not refuse for weights of this size."""
    return [
        (name, text)
        for name in REFINERS
        for text in patterns
        if not load(name).mismatch(Pattern.parse(text), rows, columns)
    ]


every_refiner = pytest.mark.parametrize("name", REFINERS)
every_pattern = pytest.mark.parametrize(("name", "text"), accepted(PATTERNS, 24, 64))


def sums_for(name: str, inputs: torch.Tensor, initial: str | None = None) -> InputStats:
    pruner = methods.load("pruners", initial or load(name).initial, {})
    return sums_of(inputs, load(name).needs | (pruner.needs or Stats.NORMS))


def start_of(
    name: str, text: str, weight: torch.Tensor, inputs: torch.Tensor, initial: str | None = None
) -> Pruned:
    """What the initial pruner makes of a weight."""
    pruner = methods.load("pruners", initial or load(name).initial, {})
    return pruner.prune(weight, sums_for(name, inputs, initial), Pattern.parse(text))


def copied(start: Pruned) -> Pruned:
    scores = None if start.scores is None else start.scores.clone()
    return Pruned(
        weight=start.weight.clone(),
        mask=start.mask.clone(),
        scores=scores,
        numbers=dict(start.numbers),
    )


def refine(
    name: str, text: str, weight: torch.Tensor, inputs: torch.Tensor, start: Pruned
) -> Pruned:
    """Refine, and check all that holds whatever the weight and the inputs are."""
    pattern, dense, before = Pattern.parse(text), weight.clone(), copied(start)
    refined = load(name).refine(weight, start, sums_for(name, inputs), pattern)
    assert torch.equal(weight, dense), "the dense weight was changed"
    assert torch.equal(start.mask, before.mask), "the given mask was changed"
    assert torch.equal(start.weight, before.weight), "the given weight was changed"
    assert (start.scores is None) == (before.scores is None)
    if start.scores is not None:
        assert torch.equal(start.scores, before.scores), "the given scores were changed"
    assert start.numbers == before.numbers, "the given numbers were changed"
    assert refined.mask.dtype == torch.bool
    assert refined.weight.dtype == torch.float32
    assert refined.weight.shape == refined.mask.shape == weight.shape
    assert refined.weight.isfinite().all()
    assert exact_count(refined.mask, pattern)
    assert start.numbers.keys() <= refined.numbers.keys(), "what the pruner reports is lost"
    for key, told in refined.numbers.items():
        if isinstance(told, torch.Tensor):
            assert told.shape == weight.shape[:1], f"{key} is no count of each row"
            assert not told.is_floating_point(), f"{key} is no count of each row"
    factors = getattr(refined, "factors", None)  # with such the weight is their product
    sparse = refined.weight if factors is None else factors.core.dense()
    removed = sparse[~refined.mask]
    assert (removed == 0).all()
    assert not removed.signbit().any(), "-0.0 off the mask"
    pattern.check(sparse, name)
    return refined


def plain(numbers: Mapping[str, float | torch.Tensor]) -> dict[str, float | list[float]]:
    """What a method tells, with counts of rows as lists."""
    return {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in numbers.items()}


def run(name: str, text: str, weight: torch.Tensor, inputs: torch.Tensor) -> Pruned:
    """Prune with the refiner's own initial method, refine, and check as `refine` does."""
    return refine(name, text, weight, inputs, start_of(name, text, weight, inputs))


@every_pattern
def test_mask_has_exactly_the_pattern(name: str, text: str) -> None:
    refined = run(name, text, weight_of(24, 64), inputs_of(200, 64))
    assert (refined.weight[refined.mask] != 0).all()  # no survivor of a random weight is 0


@pytest.mark.parametrize(
    ("name", "text", "rows", "columns"),
    [
        (*pair, *size)
        for size in [(1, 8), (5, 136), (3, 200), (12, 200), (136, 24)]
        for pair in accepted(PATTERNS, *size)
    ],
)
def test_sizes_need_not_be_multiples_of_128(name: str, text: str, rows: int, columns: int) -> None:
    run(name, text, weight_of(rows, columns), inputs_of(300, columns))


@pytest.mark.parametrize(("name", "text"), accepted(ODD, 3, 131))
def test_unstructured_patterns_take_any_odd_size(name: str, text: str) -> None:
    run(name, text, weight_of(3, 131), inputs_of(300, 131))


@pytest.mark.parametrize(("name", "text"), accepted(UNUSUAL, 60, 480))
def test_unusual_patterns(name: str, text: str) -> None:
    run(name, text, weight_of(60, 480), inputs_of(600, 480))


@every_refiner
def test_pattern_that_is_usual_for_pruners_is_accepted(name: str) -> None:
    """`prune` names 2:4 as the way out when a refiner refuses a pattern."""
    assert not load(name).mismatch(Pattern.parse("2:4"), 64, 64)


@every_pattern
@pytest.mark.parametrize("initial", methods.names("pruners"))
def test_every_pruner_can_come_first(name: str, text: str, initial: str) -> None:
    weight, inputs = weight_of(24, 64), inputs_of(200, 64)
    refine(name, text, weight, inputs, start_of(name, text, weight, inputs, initial))


@every_pattern
def test_mask_can_come_without_scores_as_that_of_a_sparse_model_does(name: str, text: str) -> None:
    weight, inputs = weight_of(24, 64), inputs_of(200, 64)
    start = start_of(name, text, weight, inputs, "sparsegpt")
    given = Pruned(weight=start.weight, mask=start.mask)
    refine(name, text, weight, inputs, given)


@every_pattern
def test_same_input_gives_the_same_bits(name: str, text: str) -> None:
    first = run(name, text, weight_of(24, 64), inputs_of(200, 64))
    again = run(name, text, weight_of(24, 64), inputs_of(200, 64))
    assert torch.equal(first.mask, again.mask)
    assert torch.equal(first.weight, again.weight)
    assert plain(first.numbers) == plain(again.numbers)


@every_refiner
def test_weights_with_the_same_input_share_sums_without_disturbing_them(name: str) -> None:
    refiner, inputs = load(name), inputs_of(200, 64)
    shared = sums_for(name, inputs)
    patterns = [text for found, text in accepted(["2:4", "50%", "2:4"], 16, 64) if found == name]
    for seed, text in enumerate(patterns):
        weight, pattern = weight_of(16, 64, seed), Pattern.parse(text)
        start = start_of(name, text, weight, inputs)
        alone = refiner.refine(weight, start, sums_for(name, inputs), pattern)
        assert torch.equal(refiner.refine(weight, start, shared, pattern).weight, alone.weight)
    assert torch.equal(shared.squares, sums_for(name, inputs).squares)


@pytest.mark.parametrize(
    ("name", "text"), [(n, t) for n, t in accepted(["2:4", "50%"], 24, 64) if load(n).rowwise]
)
def test_rows_of_a_rowwise_refiner_do_not_depend_on_each_other(name: str, text: str) -> None:
    """Weights with the same inputs are then solved as one."""
    weight, inputs = weight_of(24, 64), inputs_of(200, 64)
    whole = run(name, text, weight, inputs)
    parts = [run(name, text, part, inputs) for part in weight.split([1, 8, 15])]
    assert torch.equal(torch.cat([part.mask for part in parts]), whole.mask)
    assert torch.equal(torch.cat([part.weight for part in parts]), whole.weight)


@every_pattern
def test_dead_inputs_give_finite_weights(name: str, text: str) -> None:
    run(name, text, weight_of(24, 64), inputs_of(200, 64, dead=(0, 5, 6, 7, 63)))


@every_pattern
def test_all_zero_weight_stays_zero(name: str, text: str) -> None:
    refined = run(name, text, torch.zeros(24, 64), inputs_of(200, 64))
    assert (refined.weight == 0).all()


@every_pattern
def test_a_zero_row_and_column_do_no_harm(name: str, text: str) -> None:
    weight = weight_of(24, 64)
    weight[3] = 0
    weight[:, 9] = 0
    run(name, text, weight, inputs_of(200, 64))


@every_pattern
def test_bfloat16_values_with_many_ties_keep_the_exact_count(name: str, text: str) -> None:
    weight = weight_of(24, 64).mul(4).round().div(4).bfloat16().float()
    assert len(weight.abs().unique()) < 24
    run(name, text, weight, inputs_of(200, 64).bfloat16().float())


@every_refiner
def test_fewer_tokens_than_inputs(name: str) -> None:
    run(name, "2:4", weight_of(8, 64), inputs_of(6, 64))


@every_refiner
def test_transposed_weight_is_taken_as_it_is_indexed(name: str) -> None:
    weight, inputs = weight_of(16, 64), inputs_of(200, 64)
    strided = weight.T.contiguous().T
    assert not strided.is_contiguous()
    assert torch.equal(
        run(name, "2:4", strided, inputs).mask, run(name, "2:4", weight, inputs).mask
    )


# ------------------------------------------------------------------------------- description


@every_refiner
def test_description_matches_the_class(name: str) -> None:
    method, refiner = methods.describe("refiners", name), load(name)
    assert method.name == name
    assert not method.data_free
    assert isinstance(refiner.needs, Stats)
    assert method.initial == refiner.initial
    assert method.presets == refiner.presets
    fields = dataclasses.fields(refiner)
    assert [option.name for option in method.options] == [field.name for field in fields]
    for option, field in zip(method.options, fields, strict=True):
        default = getattr(refiner, field.name)
        assert field.default == default
        if option.type == "bool":
            assert option.default == {True: "yes", False: "no"}[default]
        else:
            assert ast.literal_eval(option.default) == default
        if choices := choices_of(name, option.name):
            assert field.default in choices
            assert tuple(ast.literal_eval(option.type.removeprefix("Literal"))) == choices
        else:
            assert type(field.default).__name__ == option.type


@every_refiner
def test_method_and_options_are_explained(name: str) -> None:
    method = methods.describe("refiners", name)
    assert method.summary
    assert method.source
    assert all(option.help.endswith(".") for option in method.options)


@every_refiner
def test_refiner_begins_with_a_pruner_that_there_is(name: str) -> None:
    assert load(name).initial in methods.names("pruners")


@every_refiner
def test_no_method_is_a_pruner_and_a_refiner(name: str) -> None:
    """`--method` takes the names of both."""
    assert name not in methods.names("pruners")


@every_refiner
def test_options_arrive_as_text_and_are_checked(name: str) -> None:
    for option in methods.describe("refiners", name).options:
        number = 0 if getattr(load(name), option.name) == 1 else 1
        values = {text: text for text in choices_of(name, option.name)} or {str(number): number}
        if option.type == "bool":
            values = {"yes": True, "true": True, "no": False, "false": False}
        for text, value in values.items():
            refiner = methods.load("refiners", name, {option.name: text})
            assert getattr(refiner, option.name) == value
            assert type(getattr(refiner, option.name)).__name__ in (option.type, "str")
        code = "not-a-choice" if option.choices else "not-a-number"
        with refused(code, f"option {option.name} of {name}", "many", kind=UsageError):
            methods.load("refiners", name, {option.name: "many"})
    with refused("no-option", name, "'colour'", kind=UsageError):
        methods.load("refiners", name, {"colour": "3"})


@every_refiner
def test_presets_set_options_that_there_are_to_values_that_they_take(name: str) -> None:
    method = methods.describe("refiners", name)
    for preset, values in method.presets.items():
        refiner = methods.load("refiners", name, {}, preset)
        texts = {option: methods.as_text(value) for option, value in values.items()}
        assert methods.load("refiners", name, texts) == refiner
        for option, value in values.items():
            taken = getattr(refiner, option)
            assert (taken, type(taken)) == (value, type(value)), f"{preset}: {option}"
        rest = {option.name for option in method.options} - values.keys()
        assert all(getattr(refiner, option) == getattr(load(name), option) for option in rest)


@every_refiner
def test_option_goes_before_the_preset(name: str) -> None:
    for preset, values in methods.describe("refiners", name).presets.items():
        for option in values:
            default = getattr(load(name), option)
            refiner = methods.load("refiners", name, {option: methods.as_text(default)}, preset)
            assert getattr(refiner, option) == default


@every_refiner
def test_unknown_preset_is_refused(name: str) -> None:
    with refused("no-preset", name, "'colour'", kind=UsageError):
        methods.load("refiners", name, {}, "colour")


def choices_of(name: str, option: str) -> tuple[str, ...]:
    """The words that an option takes; empty for a number."""
    return get_args(get_type_hints(type(load(name)))[option])
