"""DSnoT against a slow oracle, and what is known of it for certain.

The oracle is algorithm 1 of Zhang et al. 2024 as the specification of the published code reads
(zyxxmu/DSnoT@4c029df, `lib/prune.py`): for one row, in float64, every candidate is looked for
anew in each cycle. A row stops when there is none.
"""

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from oracles import exact_count, inputs_of, sums_of, weight_of
from refusals import refused

from sparsekit import registry as methods
from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.errors import UsageError
from sparsekit.model.block_stream import BlockStream
from sparsekit.pruning.methods import Pruned
from sparsekit.solvers.input_stats import Stats
from sparsekit.weights.patterns import Pattern

UNSTRUCTURED = ["50%", "37%", "60%"]
GROUPED = ["2:4", "4:8", "1:4"]

every_pattern = pytest.mark.parametrize("text", [*UNSTRUCTURED, *GROUPED, "50%/tensor"])
every_seed = pytest.mark.parametrize("seed", range(3))

CALIBRATION_ROWS = 4


def biased_inputs_of(
    tokens: int, columns: int, seed: int = 0, dead: tuple[int, ...] = ()
) -> torch.Tensor:
    """Inputs `[tokens, columns]` whose means are of the size of their deviations."""
    generator = torch.Generator().manual_seed(2000 + seed)
    x = inputs_of(tokens, columns, seed) + torch.randn(columns, generator=generator)
    x[:, list(dead)] = 0
    return x


def start_of(
    weight: torch.Tensor, inputs: torch.Tensor, text: str, initial: str = "wanda"
) -> Pruned:
    sums = sums_of(inputs, Stats.GRAM | Stats.MOMENTS, CALIBRATION_ROWS)
    return methods.load("pruners", initial, {}).prune(weight, sums, Pattern.parse(text))


def refine(
    weight: torch.Tensor,
    start: Pruned,
    inputs: torch.Tensor,
    text: str,
    preset: str | None = None,
    **options: float | str,
) -> Pruned:
    given = {key: str(value) for key, value in options.items()}
    dsnot = methods.load("refiners", "dsnot", given, preset)
    sums = sums_of(inputs, Stats.MOMENTS, CALIBRATION_ROWS)
    return dsnot.refine(weight, start, sums, Pattern.parse(text))


def run(
    weight: torch.Tensor, inputs: torch.Tensor, text: str, initial: str = "wanda", **options
) -> tuple[Pruned, Pruned]:
    """What the initial method makes of a weight, and what DSnoT then does."""
    start = start_of(weight, inputs, text, initial)
    return start, refine(weight, start, inputs, text, **options)


def swaps(start: Pruned, refined: Pruned) -> int:
    return int((refined.mask & ~start.mask).sum())


def missing(weight: torch.Tensor, inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What each row's mean output lacks, `[out]` float64."""
    return ((weight.double() * inputs.double().mean(0)) * ~mask).sum(1)


# -------------------------------------------------------------------------------- the oracle


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What DSnoT knows of each input, in plain loops over the tokens of each calibration row."""

    total: list[float]
    """Sum over the tokens of a row, averaged over rows."""
    mean: list[float]
    """Over all tokens."""
    variance: list[float]
    """Population variance over the tokens of a row, averaged over rows by their tokens."""
    norm: list[float]

    @classmethod
    def of(cls, inputs: torch.Tensor) -> "Statistics":
        rows = [row.double() for row in inputs.chunk(CALIBRATION_ROWS)]
        total, mean, variance, norm = [], [], [], []
        for j in range(inputs.shape[1]):
            columns = [row[:, j].tolist() for row in rows]
            tokens = sum(len(column) for column in columns)
            total.append(sum(sum(column) for column in columns) / len(columns))
            mean.append(sum(sum(column) for column in columns) / tokens)
            spread = 0.0
            for column in columns:
                centre = sum(column) / len(column)
                spread += sum((x - centre) ** 2 for x in column)
            variance.append(spread / tokens)
            norm.append(sum(x**2 for column in columns for x in column) ** 0.5)
        return cls(total=total, mean=mean, variance=variance, norm=norm)


def oracle_row(
    weight: list[float],
    kept: set[int],
    known: Statistics,
    *,
    group: int,
    cycles: int = 50,
    threshold: float = 0.1,
    units: str = "relative",
    power: float = 1.0,
    same_sign: str = "yes",
) -> tuple[set[int], str]:
    """The columns that a row keeps in the end, and why it stopped."""
    columns = range(len(weight))
    unit = known.total if units == "sequence" else known.mean
    given = [weight[j] * unit[j] for j in columns]
    score = [abs(weight[j]) * known.norm[j] for j in columns]
    to_grow, to_drop = set(columns) - kept, set(kept)
    error = first = sum(given[j] for j in to_grow)
    for _ in range(cycles):
        if abs(error) <= threshold * (abs(first) if units == "relative" else 1):
            return kept, "small"
        candidates = [j for j in to_grow if given[j] * error > 0]
        if not candidates:
            return kept, "nothing to grow"
        grown = max(candidates, key=lambda j: abs(given[j]) / known.variance[j] ** power)
        if group:
            candidates = [j for j in to_drop if j // group == grown // group]
        else:
            candidates = [j for j in to_drop if given[j] * error < 0]
        if not candidates:
            return kept, "nothing to remove"
        removed = min(candidates, key=lambda j: (score[j], j))
        after = error + given[removed] - given[grown]
        if (group or same_sign == "yes") and after * first <= 0:
            return kept, "sign"
        kept = kept - {removed} | {grown}
        to_grow, to_drop, error = to_grow - {grown}, to_drop - {removed}, after
    return kept, "cycles"


def oracle(
    weight: torch.Tensor, mask: torch.Tensor, inputs: torch.Tensor, text: str, **options
) -> tuple[torch.Tensor, Counter]:
    """The mask of a whole weight, and how many rows stopped for which reason."""
    known, group = Statistics.of(inputs), Pattern.parse(text).group
    wanted, reasons = torch.zeros_like(mask), Counter()
    for i, row in enumerate(weight.double().tolist()):
        before = set(mask[i].nonzero().flatten().tolist())
        kept, reason = oracle_row(row, before, known, group=group, **options)
        wanted[i, list(kept)] = True
        reasons[reason] += 1
    return wanted, reasons


OPTIONS = [
    {},
    {"power": 0.0},
    {"power": 0.5},
    {"cycles": 1},
    {"cycles": 4},
    {"threshold": 0.0},
    {"threshold": 0.5},
    {"units": "token"},
    {"units": "token", "threshold": 1.5},
    {"units": "sequence"},
    {"units": "sequence", "threshold": 20.0},
    {"same_sign": "no"},
    {"same_sign": "no", "units": "sequence", "threshold": 0.01},
    {"same_sign": "no", "threshold": 0.0, "power": 0.0},
]


def told(options: dict) -> str:
    return " ".join(f"{key}={value}" for key, value in options.items()) or "defaults"


@every_seed
@every_pattern
@pytest.mark.parametrize("options", OPTIONS, ids=told)
def test_mask_equals_the_oracle(options: dict, text: str, seed: int) -> None:
    weight, inputs = weight_of(9, 40, seed), biased_inputs_of(90, 40, seed)
    start, refined = run(weight, inputs, text, **options)
    wanted, _ = oracle(weight, start.mask, inputs, text, **options)
    assert torch.equal(refined.mask, wanted)


@pytest.mark.parametrize("initial", ["magnitude", "sparsegpt"])
@pytest.mark.parametrize("text", UNSTRUCTURED)
def test_any_initial_mask_is_refined_by_the_same_rule(text: str, initial: str) -> None:
    weight, inputs = weight_of(9, 40), biased_inputs_of(90, 40)
    start, refined = run(weight, inputs, text, initial)
    wanted, _ = oracle(weight, start.mask, inputs, text)
    assert not torch.equal(start.mask, start_of(weight, inputs, text).mask)
    assert swaps(start, refined) > 0
    assert torch.equal(refined.mask, wanted)


def test_problems_of_the_oracle_stop_for_every_reason_and_swap_weights() -> None:
    """Else its equality with the method would show less than it seems to."""
    reasons, swapped = Counter(), Counter()
    for text in ("50%", "37%", "2:4", "1:4"):
        for options in OPTIONS:
            weight, inputs = weight_of(9, 40), biased_inputs_of(90, 40)
            start = start_of(weight, inputs, text)
            wanted, found = oracle(weight, start.mask, inputs, text, **options)
            reasons += found
            swapped[told(options)] += int((wanted & ~start.mask).sum())
    assert set(reasons) == {"small", "nothing to grow", "nothing to remove", "sign", "cycles"}
    assert len(swapped) == len(OPTIONS)
    assert min(swapped.values()) > 0


@every_pattern
def test_every_option_has_an_effect(text: str) -> None:
    weight, inputs = weight_of(24, 64), biased_inputs_of(200, 64)
    _, plain = run(weight, inputs, text)
    for options in (
        {"power": 0},
        {"cycles": 1},
        {"threshold": 0.9},
        {"threshold": 9, "units": "token"},
    ):
        _, other = run(weight, inputs, text, **options)
        assert not torch.equal(other.mask, plain.mask), options
    _, other = run(weight, inputs, text, same_sign="no")
    grouped = Pattern.parse(text).scope == "group"  # there the sign is always kept
    assert torch.equal(other.mask, plain.mask) == grouped


def test_units_of_the_threshold_are_proportional() -> None:
    """A row of 50 tokens: 0.5 of a mean output is 25 of the sum over the tokens of a row."""
    weight, inputs = weight_of(24, 64), biased_inputs_of(200, 64)
    start, mean = run(weight, inputs, "50%", threshold=0.5, units="token")
    _, total = run(weight, inputs, "50%", threshold=25, units="sequence")
    assert swaps(start, mean) > 0
    assert torch.equal(mean.mask, total.mask)
    _, less = run(weight, inputs, "50%", threshold=0.5, units="sequence")
    assert not torch.equal(mean.mask, less.mask)


# -------------------------------------------------------------------------- what always holds


@pytest.mark.sampled(5)
@pytest.mark.parametrize("same_sign", ["yes", "no"])
@pytest.mark.parametrize(
    ("rows", "columns", "texts"),
    [
        (1, 4, ["50%", "25%", "75%", "2:4", "1:4", "3:4", "50%/tensor"]),
        (3, 8, ["50%", "37%", "75%", "2:4", "1:4", "4:8", "7:8", "50%/tensor"]),
        (2, 7, ["50%", "37%", "80%", "50%/tensor"]),
    ],
)
def test_counts_hold_on_tiny_layers_whose_candidates_run_out(
    rows: int, columns: int, texts: list[str], same_sign: str
) -> None:
    """There the published pointers run into each other and change the count of a row."""
    swapped = 0
    for text in texts:
        for seed in range(20):
            weight, inputs = weight_of(rows, columns, seed), biased_inputs_of(60, columns, seed)
            start, refined = run(weight, inputs, text, cycles=50, threshold=0, same_sign=same_sign)
            assert torch.equal(refined.mask.sum(1), start.mask.sum(1)), (text, seed)
            assert exact_count(refined.mask, Pattern.parse(text)), (text, seed)
            swapped += swaps(start, refined)
    assert swapped > 0


@pytest.mark.parametrize("initial", ["wanda", "magnitude"])
@pytest.mark.parametrize("text", [*UNSTRUCTURED, "50%/tensor"])
def test_no_swap_makes_an_expected_error_larger_while_its_sign_is_kept(
    text: str, initial: str
) -> None:
    weight, inputs = weight_of(24, 256), biased_inputs_of(400, 256)
    before = missing(weight, inputs, start_of(weight, inputs, text, initial).mask)
    sign = before.sign()
    for cycles in range(1, 20):
        start, refined = run(weight, inputs, text, initial, cycles=cycles, threshold=0)
        after = missing(weight, inputs, refined.mask)
        assert (after.abs() <= before.abs()).all(), cycles
        assert (after.sign() == sign).all(), cycles
        before = after
    assert (refined.mask & ~start.mask).sum(1).max() > 2


@pytest.mark.parametrize("text", GROUPED)
def test_expected_error_of_groups_keeps_its_sign(text: str) -> None:
    """It may grow: the weight that has to go is the weakest of its group, whatever its sign."""
    weight, inputs = weight_of(24, 64), biased_inputs_of(200, 64)
    start, refined = run(weight, inputs, text, threshold=0, same_sign="no")
    assert swaps(start, refined) > 0
    signs = [missing(weight, inputs, pruned.mask).sign() for pruned in (start, refined)]
    assert torch.equal(*signs)


@every_pattern
def test_each_cycle_goes_on_from_the_one_before(text: str) -> None:
    """A weight that has grown or gone is never moved again."""
    weight, inputs = weight_of(24, 64), biased_inputs_of(200, 64)
    start = start_of(weight, inputs, text)
    before = start.mask
    for cycles in range(1, 12):
        mask = refine(weight, start, inputs, text, cycles=cycles, threshold=0).mask
        grown, gone = mask & ~before, before & ~mask
        assert (grown.sum(1) <= 1).all()
        assert torch.equal(grown.sum(1), gone.sum(1))
        assert not (grown & start.mask).any()
        assert (gone <= start.mask).all()
        before = mask
    assert not torch.equal(before, start.mask)


@every_pattern
@pytest.mark.parametrize("initial", ["wanda", "sparsegpt"])
def test_survivors_are_those_of_the_dense_weight_bit_for_bit(text: str, initial: str) -> None:
    weight, inputs = weight_of(24, 64), biased_inputs_of(200, 64)
    start, refined = run(weight, inputs, text, initial)
    assert swaps(start, refined) > 0
    assert torch.equal(refined.weight, torch.where(refined.mask, weight, 0.0))


@every_pattern
@pytest.mark.parametrize("same_sign", ["yes", "no"])
def test_what_it_is_given_is_not_changed(text: str, same_sign: str) -> None:
    weight, inputs = weight_of(24, 64), biased_inputs_of(200, 64)
    start = start_of(weight, inputs, text)
    tensors = (weight, start.weight, start.mask, start.scores)
    before = [tensor.clone() for tensor in tensors]
    refined = refine(weight, start, inputs, text, same_sign=same_sign)
    assert swaps(start, refined) > 0
    assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))


@every_pattern
def test_no_cycle_gives_the_initial_mask(text: str) -> None:
    start, refined = run(weight_of(24, 64), biased_inputs_of(200, 64), text, cycles=0)
    assert torch.equal(refined.mask, start.mask)
    assert torch.equal(refined.weight, start.weight)


@every_pattern
def test_power_does_not_matter_when_all_variances_are_equal(text: str) -> None:
    """Means are eighths and deviations ±2, so that every sum is exact and every variance is 4."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randint(-16, 17, (64,), generator=generator) / 8
    signs = torch.tensor([1.0, -1.0]).repeat(25)
    deviations = [signs[torch.randperm(50, generator=generator)] for _ in range(4 * 64)]
    inputs = means + 2 * torch.stack(deviations).view(4, 64, 50).transpose(1, 2).reshape(200, 64)
    assert (sums_of(inputs, Stats.MOMENTS, CALIBRATION_ROWS).variance == 4).all()
    weight = weight_of(24, 64)
    start = start_of(weight, inputs, text)
    masks = [refine(weight, start, inputs, text, power=power).mask for power in (0, 1)]
    assert not torch.equal(masks[0], start.mask)
    assert torch.equal(*masks)


@every_pattern
@pytest.mark.parametrize("same_sign", ["yes", "no"])
def test_inputs_of_zero_mean_swap_nothing(text: str, same_sign: str) -> None:
    """Whole numbers, each with its opposite in the same row of tokens: the sums are exactly 0."""
    weight, half = weight_of(24, 64), (4 * inputs_of(100, 64)).round()
    inputs = torch.stack([half, -half], dim=1).flatten(0, 1)
    start, refined = run(weight, inputs, text, threshold=0, same_sign=same_sign)
    assert torch.equal(refined.mask, start.mask)
    start, refined = run(weight, inputs + 1, text, threshold=0, same_sign=same_sign)
    assert swaps(start, refined) > 0


@pytest.mark.parametrize("text", [*UNSTRUCTURED, "50%/tensor"])
@pytest.mark.parametrize("same_sign", ["yes", "no"])
def test_dead_inputs_are_never_swapped(text: str, same_sign: str) -> None:
    """They are not missed, and the published code's column 0 is not swapped in their place."""
    dead = (0, 5, 6, 7, 63)
    weight, inputs = weight_of(24, 64), biased_inputs_of(200, 64, dead=dead)
    start = start_of(weight, inputs, text, "magnitude")
    refined = refine(weight, start, inputs, text, threshold=0, same_sign=same_sign)
    assert start.mask[:, dead].any()
    assert swaps(start, refined) > 0
    assert torch.equal(refined.mask[:, dead], start.mask[:, dead])


@pytest.mark.parametrize("text", GROUPED)
def test_dead_inputs_never_grow_in_a_group(text: str) -> None:
    """They go first if they were kept: their score is zero."""
    dead = (0, 5, 6, 7, 63)
    weight, inputs = weight_of(24, 64), biased_inputs_of(200, 64, dead=dead)
    start, refined = run(weight, inputs, text, threshold=0)
    assert swaps(start, refined) > 0
    assert not (refined.mask & ~start.mask)[:, dead].any()


@every_pattern
def test_all_zero_weight_keeps_its_mask(text: str) -> None:
    start, refined = run(torch.zeros(6, 64), biased_inputs_of(200, 64), text, threshold=0)
    assert torch.equal(refined.mask, start.mask)
    assert (refined.weight == 0).all()


@every_pattern
def test_input_without_variance_grows_first(text: str) -> None:
    """A gain is divided by the variance: the published code's is infinite here."""
    weight, inputs = weight_of(24, 64), biased_inputs_of(200, 64)
    weight[:, 8], inputs[:, 8] = 1e-3, 0.5
    start, refined = run(weight, inputs, text, cycles=1, threshold=0)
    assert not start.mask[:, 8].any()
    swapped = (refined.mask & ~start.mask).any(1)
    lacking = missing(weight, inputs, start.mask) > 0  # where a positive share has to grow
    assert (swapped & lacking).sum() > 3
    assert torch.equal(refined.mask[:, 8], swapped & lacking)


@every_pattern
def test_of_inputs_without_variance_the_larger_share_grows_first(text: str) -> None:
    weight, inputs = weight_of(24, 64), biased_inputs_of(200, 64)
    for column, size in ((8, 1e-3), (24, 2e-3), (40, 4e-3), (56, 3e-3)):
        weight[:, column], inputs[:, column] = size, 0.5
    start, refined = run(weight, inputs, text, cycles=1, threshold=0)
    grown = refined.mask & ~start.mask
    assert grown[:, 40].sum() > 3
    assert not grown[:, [8, 24, 56]].any()


@every_pattern
def test_signs_of_outputs_do_not_matter(text: str) -> None:
    weight, inputs = weight_of(24, 64), biased_inputs_of(200, 64)
    start, refined = run(weight, inputs, text)
    assert swaps(start, refined) > 0
    flipped = weight * torch.tensor([1.0, -1.0]).repeat(12)[:, None]
    assert torch.equal(run(flipped, inputs, text)[1].mask, refined.mask)


def test_swaps_are_counted_beside_the_numbers_of_the_initial_method() -> None:
    weight, inputs = weight_of(24, 64), biased_inputs_of(200, 64)
    start, refined = run(weight, inputs, "50%", "sparsegpt")
    assert refined.numbers.keys() == {"damping", "swaps"}
    assert refined.numbers["damping"] == start.numbers["damping"] == 0.01
    of_rows = (refined.mask & ~start.mask).sum(1)
    assert torch.equal(refined.numbers["swaps"], of_rows)  # the rows of several weights may be one
    assert len(of_rows.unique()) > 1


@pytest.mark.parametrize("text", UNSTRUCTURED)
def test_refinement_lowers_the_bias_that_it_aims_at(text: str) -> None:
    """Of the mean output, over all rows; what it does to the error is another matter."""
    weight, inputs = weight_of(64, 128), biased_inputs_of(400, 128)
    start, refined = run(weight, inputs, text)
    before, after = (missing(weight, inputs, p.mask).abs().mean() for p in (start, refined))
    assert after < 0.5 * before


# ------------------------------------------------------------------------ groups and scores


@pytest.mark.parametrize("text", ["2:4", "4:8"])
def test_group_loses_what_the_initial_method_thinks_least_of(text: str) -> None:
    """With the scores of magnitude another weight goes than with those of Wanda."""
    weight, inputs = weight_of(24, 64), biased_inputs_of(200, 64)
    start = start_of(weight, inputs, text)
    masks = []
    for scores in (None, start.scores, weight.abs()):
        given = Pruned(weight=start.weight, mask=start.mask, scores=scores)
        masks.append(refine(weight, given, inputs, text).mask)
    assert torch.equal(masks[0], masks[1])  # without scores they are Wanda's
    assert not torch.equal(masks[1], masks[2])


def test_of_equal_scores_in_a_group_the_lower_column_goes() -> None:
    weight = torch.tensor([[1.0, 1.0, 0.5, 0.5, 1.0, 1.0, 0.5, 0.5]])
    inputs = 1 + torch.tensor([[1.0], [-1.0]]).repeat(4, 8)
    inputs[:, 2] *= 1.5  # the largest mean of what is missing ...
    start = start_of(weight, inputs, "2:4", "magnitude")
    assert start.mask.tolist() == [[True, True, False, False] * 2]
    refined = refine(weight, start, inputs, "2:4", cycles=1, threshold=0, power=0)
    assert refined.mask.tolist() == [[False, True, True, False, True, True, False, False]]


# ----------------------------------------------------------------------- options in words


@pytest.mark.parametrize(
    ("name", "attention", "others"),
    [
        (
            "llama",
            [f"self_attn.{x}_proj" for x in "qkvo"],
            [f"mlp.{x}_proj" for x in ("gate", "up", "down")],
        ),
        ("phi3", ["self_attn.qkv_proj", "self_attn.o_proj"], ["mlp.gate_up_proj", "mlp.down_proj"]),
        ("gpt2", ["attn.c_attn", "attn.c_proj"], ["mlp.c_fc", "mlp.c_proj"]),
        ("opt", [f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")], ["fc1", "fc2"]),
    ],
)
def test_modules_may_be_those_of_attention_only(family, name, attention, others) -> None:
    every, some = (
        methods.load("refiners", "dsnot", {"modules": modules}) for modules in ("all", "attention")
    )
    stream = BlockStream(Checkpoint.open(family(name)), device="cpu", dtype=torch.float32)
    names = [target.name for target in stream.targets()]
    parts = [*attention, *others]
    assert len(names) == 2 * len(parts)  # of two blocks
    for weight in names:
        (part,) = (part for part in parts if weight.endswith(f".{part}.weight"))
        assert some.applies_to(weight) == (part in attention), weight
        assert every.applies_to(weight)


def test_preset_has_the_published_values() -> None:
    """The defaults of the published `main.py`; attention only is its `--skip_layer mlp`."""
    dsnot = methods.load("refiners", "dsnot", {}, "published")
    assert (dsnot.cycles, dsnot.threshold, dsnot.power) == (50, 0.1, 1.0)
    assert (dsnot.units, dsnot.same_sign, dsnot.modules) == ("sequence", False, "attention")
    assert dsnot.initial == "wanda"
    assert dsnot != methods.load("refiners", "dsnot", {})


@pytest.mark.parametrize("text", ["2:4", "4:8", "1:4"])
def test_n_of_m_comes_with_a_caution_that_names_the_pattern(text: str) -> None:
    (caution,) = methods.load("refiners", "dsnot", {}).warnings(Pattern.parse(text), None)
    assert f"make {text} models worse" in caution
    assert "compare" in caution


@pytest.mark.parametrize("text", ["50%", "60%", "50%/tensor"])
def test_unstructured_pattern_comes_without_a_caution(text: str) -> None:
    wanda = methods.load("pruners", "wanda", {})
    assert methods.load("refiners", "dsnot", {}).warnings(Pattern.parse(text), wanda) == []


def test_pruner_whose_values_are_lost_is_named() -> None:
    sparsegpt = methods.load("pruners", "sparsegpt", {})
    (caution,) = methods.load("refiners", "dsnot", {}).warnings(Pattern.parse("50%"), sparsegpt)
    assert "sparsegpt" in caution


@pytest.mark.parametrize(
    ("option", "value", "code", "choices"),
    [
        ("units", "tokens", "not-a-choice", "relative, token, sequence"),
        ("same_sign", "1", "not-a-choice", "yes, no, true, false"),
        ("modules", "mlp", "not-a-choice", "all, attention"),
        ("cycles", "1.5", "not-a-number", ""),
        ("threshold", "-1", "out-of-range", ""),
    ],
)
def test_option_out_of_its_range_is_refused(
    option: str, value: str, code: str, choices: str
) -> None:
    with refused(code, f"{option} of dsnot", value, choices, kind=UsageError):
        methods.load("refiners", "dsnot", {option: value})
