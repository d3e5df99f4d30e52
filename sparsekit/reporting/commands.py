"""The commands that make and score a model again, from what its history and scores tell."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from decimal import ROUND_DOWN, Context, Decimal
from fractions import Fraction
from typing import Any

from sparsekit import registry as methods
from sparsekit.recovery.config import RecoverConfig
from sparsekit.reporting.model_row import Row
from sparsekit.scoring.config import EvalConfig

# Of the recipe of a recovery what is a flag of the same name; the rest of it follows or is told
# beside the recipe.
RECOVER_FLAGS = (
    *("metric", "batch", "length", "accumulate", "schedule", "temperature", "teacher_top", "slorb"),
    *("format", "seed", "device", "mixed_precision"),
)


def commands(row: Row) -> list[str]:
    """A line for each stage of a model, and for each time that it was scored.

    One more packs what a stage unpacks. Options that have their default are left out. Stages before
    the last write to numbered folders, whatever they wrote to at the time.
    """
    name, lines, model = row.path.resolve().name, [], ""
    for index, entry in enumerate(row.history):
        out = name if index == len(row.history) - 1 else f"{name}-{index + 1}"
        if model and _packed_before(entry, row.history[index - 1]):
            lines.append(_line(["sparsekit", "pack", model, "-o", f"{model}-packed"]))
            model = f"{model}-packed"
        try:
            lines.append(_line([*_stage(entry, model), "-o", out]))
        except (KeyError, TypeError, ValueError):
            lines.append(f"# {entry.get('stage')!r}: what it was asked for is not all recorded")
        model = out
    for entry in row.scores:
        words = _score(entry, model or str(entry.get("model") or name))
        # Only beside a model that sparsekit wrote does `eval` keep scores.
        lines.append(_line([*words, *(["--save"] if row.history else [])]))
    return lines


def _packed_before(entry: Mapping[str, Any], last: Mapping[str, Any]) -> bool:
    """Whether a stage unpacks what `pack` wrote: `unpack` takes that out of the history.

    Args:
        entry: Of the stage.
        last: Of the one before; what it wrote as factors alone was unpacked as it is.
    """
    return entry.get("stage") == "unpack" and last.get("recipe", {}).get("format") != "factored"


def _stage(entry: Mapping[str, Any], model: str) -> list[str]:
    """A stage's words without its output.

    Args:
        entry: Of the history.
        model: The output of the stage before; empty for the first.

    Raises:
        KeyError: The entry lacks a part.
        ValueError: No command makes such a stage.
    """
    stage, recipe = entry.get("stage"), entry.get("recipe", {})
    source = model or entry["source"]["path"]
    if stage == "prune":
        words = [source]
        if mask := entry.get("mask"):
            # The stage before is the last of the mask's own; where it has none, the dense model's.
            own = [model, "--dense", entry["source"]["path"]]
            words = own if mask.get("history") else [mask["path"], "--dense", source]
        return ["sparsekit", "prune", *words, *_prune(entry, recipe)]
    if stage == "recover":
        return ["sparsekit", "recover", source, *_recover(entry, recipe)]
    if stage == "quantize":
        words = ["--method", recipe["method"], "--grid", recipe["grid"]]
        words += ["--format", "dense"] if recipe["format"] == "dense" else []
        words += _options("quantizers", recipe["method"], recipe["options"])
        return ["sparsekit", "quantize", source, *words, *_rows(entry), *_where(recipe)]
    if stage in ("pack", "unpack", "convert"):
        return ["sparsekit", stage, source]
    raise ValueError(stage)


def _prune(entry: Mapping[str, Any], recipe: Mapping[str, Any]) -> Iterator[str]:
    """The flags of a pruning."""
    last, _, first = recipe["method"].partition(" from ")
    if entry.get("mask"):
        yield from ("--refine", last)
    else:
        yield from ("--method", last, *(["--initial", first] if first else []))
    yield from ("--pattern", recipe["pattern"])
    if first:
        yield from _options("refiners", last, recipe.get("options", {}), f"{last}.")
        if not entry.get("mask"):
            yield from _options("pruners", first, recipe.get("initial_options", {}), f"{first}.")
    else:
        yield from _options("pruners", last, recipe.get("options", {}))
    for flag in ("reconstruct", "allocate"):
        if recipe.get(flag) not in (None, "none"):
            yield from (f"--{flag}", recipe[flag])
    if recipe.get("compensate") not in (None, "0"):
        yield from ("--compensate", "lowrank", "--rank", _percent(Fraction(recipe["compensate"])))
    if recipe.get("format") == "factored":
        yield from ("--format", "factored")
    if recipe.get("budget"):
        yield from ("--budget", f"{recipe['budget']:g}s")
    if recipe.get("then"):
        yield from ("--then", recipe["then"])
    yield from _rows(entry)
    if recipe.get("propagate") is not None:
        yield "--propagate" if recipe["propagate"] else "--no-propagate"
    yield from _where(recipe)


def _percent(share: Fraction) -> str:
    """A share as `--rank` takes it: exact, where it came from there.

    One without an end is cut off so late that every rank, which is rounded up, stays the same.
    """
    numerator, denominator = (100 * share).as_integer_ratio()
    digits = Context(prec=max(40, denominator.bit_length() + 3), rounding=ROUND_DOWN)
    return f"{digits.divide(Decimal(numerator), Decimal(denominator)):f}%"


def _recover(entry: Mapping[str, Any], recipe: Mapping[str, Any]) -> Iterator[str]:
    """The flags of a training; what it chose for itself, and how far it came, is named."""
    yield from ("--method", recipe["method"], "--pattern", recipe["pattern"])
    yield from ("--data", str(entry["text"]), "--tokens", str(entry["tokens"]))
    plan = entry["plan"]
    if entry["teacher"] and plan["share"]:
        yield from ("--teacher", entry["teacher"]["path"])
    yield from ("--lr", str(plan["rate"]), "--kl-weight", str(plan["share"]))
    default = RecoverConfig.defaults()
    for name in RECOVER_FLAGS:
        if recipe.get(name) not in (None, default[name]):
            yield from (f"--{name.replace('_', '-')}", str(recipe[name]))
    yield from _options("recoverers", recipe["method"], recipe["options"])
    yield from _skipped(recipe)


def _rows(entry: Mapping[str, Any]) -> Iterator[str]:
    """The flags of calibration."""
    if told := entry.get("calibration"):
        yield from ("--calibration", told["source"], "--samples", str(told["samples"]))
        yield from ("--length", str(told["length"]), "--seed", str(told["seed"]))


def _where(recipe: Mapping[str, Any]) -> Iterator[str]:
    """What stays dense, where it is computed, and in which type."""
    yield from _skipped(recipe)
    yield from ("--device", recipe["device"], "--dtype", recipe["dtype"])


def _skipped(recipe: Mapping[str, Any]) -> Iterator[str]:
    for glob in recipe.get("skip", ()):
        yield from ("--skip", glob)


def _options(kind: str, method: str, options: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The options of a method that do not have their default."""
    is_known = method in methods.names(kind)
    told = methods.describe(kind, method).options if is_known else ()
    default = {option.name: option.default for option in told}
    for name, value in options.items():
        # What methods share without being an option of each is no flag of theirs.
        if is_known and name not in default:
            continue
        if _plain(value) != _plain(default.get(name, "")):
            yield from ("-O", f"{prefix}{name}={methods.as_text(value)}")


def _plain(value: Any) -> str:
    """A value as text, the same for all spellings of a number."""
    text = methods.as_text(value).strip("'\"")
    try:
        return repr(float(text))
    except ValueError:
        return text


def _score(entry: Mapping[str, Any], model: str) -> list[str]:
    """The words that score a model."""
    told = entry.get("config") or {}
    words = ["sparsekit", "eval", model]
    if entry.get("baseline"):
        words += ["--baseline", entry["baseline"]]
    for name, default in EvalConfig.defaults().items():
        value = told.get(name)
        if value is None or value == default or value == []:
            continue
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        words += [f"--{name.replace('_', '-')}", text]
    return words


def _line(words: Sequence[str]) -> str:
    """Words as a shell takes them."""
    return shlex.join(map(str, words))
