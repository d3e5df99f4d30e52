"""What the words of a command's flags, and of a recipe's keys, stand for.

Both have the same names and defaults: those of the functions here.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

from sparsekit.errors import UsageError
from sparsekit.models.calibration import Calibration
from sparsekit.stages.config import EvalConfig, PruneConfig
from sparsekit.stages.quantconfig import QuantizeConfig
from sparsekit.stages.trainconfig import RecoverConfig

# Options of a method: text as `KEY=VALUE`, or a mapping.
MethodOptions = Sequence[str] | Mapping[str, object]
# The configurations that may read calibration.
Reading = TypeVar("Reading", PruneConfig, QuantizeConfig)


def prune_config(
    *,
    method: str | None = None,
    pattern: str | None = None,
    option: MethodOptions = (),
    preset: str | None = None,
    initial: str | None = None,
    refine: str | None = None,
    dense: str | None = None,
    calibration: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    skip: Sequence[str] = (),
    reconstruct: str = "none",
    propagate: bool | None = None,
    allocate: str = "none",
    compensate: str = "none",
    rank: str | None = None,
    format: str = "dense",
    budget: str | None = None,
    then: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> PruneConfig:
    """The checked configuration that the words of `prune` spell.

    Raises:
        UsageError: A word is not one that can be used, or has no effect.
        DataError: The calibration source cannot be used.
    """
    config = PruneConfig(
        method=method,
        pattern=pattern,
        options=parsed(option),
        preset=preset,
        initial=initial,
        refine=refine,
        dense=dense,
        calibration=_named_rows(calibration, samples, length, seed),
        skip=skip,
        reconstruct=reconstruct,  # type: ignore[arg-type]  (check() refuses other words)
        propagate=propagate,
        allocate=allocate,  # type: ignore[arg-type]  (the same)
        compensate=compensate,  # type: ignore[arg-type]  (the same)
        rank=rank,
        budget=None if budget is None else seconds(budget),
        then=then,
        format=format,  # type: ignore[arg-type]  (the same)
        device=device,
        dtype=dtype,
    )
    flags = "--samples, --length, --seed and --propagate"
    given = not (samples is length is propagate is None and seed == 0)
    return _with_rows(config, samples, length, seed, flags if given else "", config.title)


def recover_config(
    *,
    method: str = "auto",
    data: str = "builtin",
    tokens: str | int | None = None,
    max_time: str | None = None,
    teacher: str | None = None,
    pattern: str | None = None,
    option: MethodOptions = (),
    skip: Sequence[str] = (),
    metric: str = "magnitude",
    batch: int = 2,
    length: int = 512,
    accumulate: int = 1,
    lr: float | None = None,
    schedule: str = "auto",
    share: float | None = None,
    temperature: float = 1.0,
    teacher_top: int | None = None,
    slorb: int | None = None,
    format: str = "dense",
    save_every: int | None = None,
    eval_every: int | None = None,
    eval_text: str | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    mixed_precision: str = "no",
) -> RecoverConfig:
    """The checked configuration that the words of `recover` spell.

    Raises:
        UsageError: A word is not one that can be used, or has no effect.
        DataError: The data cannot be used.
    """
    config = RecoverConfig(
        method=method,
        options=parsed(option),
        data=data,
        teacher=teacher,
        tokens=None if tokens is None else count(str(tokens)),
        max_time=None if max_time is None else seconds(max_time, "--max-time"),
        pattern=pattern,
        skip=skip,
        metric=metric,  # type: ignore[arg-type]  (check() refuses other words)
        batch=batch,
        length=length,
        accumulate=accumulate,
        lr=lr,
        schedule=schedule,  # type: ignore[arg-type]  (the same)
        share=share,
        temperature=temperature,
        teacher_top=teacher_top,
        slorb=slorb,
        format=format,  # type: ignore[arg-type]  (the same)
        save_every=save_every,
        eval_every=eval_every,
        eval_text=eval_text,
        seed=seed,
        device=device,
        dtype=dtype,
        mixed_precision=mixed_precision,  # type: ignore[arg-type]  (the same)
    )
    config.check()
    return config


def quantize_config(
    *,
    method: str = "gptq",
    grid: str = "int4-g128",
    option: MethodOptions = (),
    calibration: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    skip: Sequence[str] = (),
    format: str = "compressed-tensors",
    device: str = "auto",
    dtype: str = "auto",
) -> QuantizeConfig:
    """The checked configuration that the words of `quantize` spell.

    Raises:
        UsageError: A word is not one that can be used, or has no effect.
        DataError: The calibration source cannot be used.
    """
    config = QuantizeConfig(
        method=method,
        grid=grid,
        options=parsed(option),
        calibration=_named_rows(calibration, samples, length, seed),
        skip=skip,
        format=format,  # type: ignore[arg-type]  (check() refuses other words)
        device=device,
        dtype=dtype,
    )
    flags = "--samples, --length and --seed"
    given = not (samples is length is None and seed == 0)
    return _with_rows(config, samples, length, seed, flags if given else "", config.method)


def eval_config(
    *,
    text: str | None = None,
    length: int | None = None,
    tasks: str | Sequence[str] = "",
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
) -> EvalConfig:
    """The checked configuration that the words of `eval` spell.

    Raises:
        UsageError: A word is not one that can be used, or has no effect.
        DataError: The text cannot be used.
    """
    names = tasks.split(",") if isinstance(tasks, str) else tasks
    config = EvalConfig(
        text=text,
        length=length,
        tasks=[name.strip() for name in names if name.strip()],
        include_path=None if include_path is None else Path(include_path),
        limit=limit,
        batch_size=batch_size,
        seed=seed,
        device=device,
        dtype=dtype,
    )
    config.check()
    return config


def _named_rows(
    source: str | None, samples: int | None, length: int | None, seed: int
) -> Calibration | None:
    """The calibration whose source is named."""
    if source is None:
        return None
    return Calibration(source=source, samples=samples, length=length, seed=seed)


def _with_rows(
    config: Reading, samples: int | None, length: int | None, seed: int, flags: str, title: str
) -> Reading:
    """A checked configuration, with the default source of calibration where it reads one.

    Args:
        config: Its calibration is the one that was named, if any was.
        samples: Rows of the default source.
        length: Tokens in each.
        seed: Of their draw.
        flags: Those of rows that were given; empty: none.
        title: What reads the rows, or does not.

    Raises:
        UsageError: Flags were given, and no rows are read; or as `check`.
        DataError: As `check`.
    """
    config.check()
    if config.calibration is None and config.rows is not None:
        rows = Calibration(samples=samples, length=length, seed=seed)
        rows.check()
        return replace(config, calibration=rows)
    if config.calibration is None and flags:
        raise UsageError(
            f"{title} reads no calibration: {flags} have no effect",
            "leave them out, or pass --calibration to have the output error measured",
        )
    return config


def parsed(option: MethodOptions) -> dict[str, str]:
    """The options of `-O KEY=VALUE`, or of a mapping, as text.

    Raises:
        UsageError: One has no value, or is given twice.
    """
    if isinstance(option, Mapping):
        return {key: _text(value) for key, value in option.items()}
    options: dict[str, str] = {}
    for item in option:
        key, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"--option {item!r} has no value", "write --option KEY=VALUE")
        if key.strip() in options:
            raise UsageError(f"option {key.strip()!r} is given twice", "leave out one")
        options[key.strip()] = value.strip()
    return options


def _text(value: object) -> str:
    """A value of YAML as one would write it on the command line; its `yes` is a truth value."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def seconds(text: str, flag: str = "--budget") -> float:
    """What `90s`, `10m` or `2h` stands for.

    Raises:
        UsageError: It is no time.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    found = float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if not found:
        raise UsageError(f"{flag} {text!r} is no time", "write it as 90s, 10m or 2h")
    return found


def count(text: str) -> int:
    """What `4096`, `200K`, `20M` or `1.5B` stands for.

    Raises:
        UsageError: It is no whole number of tokens.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.strip().upper())
    units = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
    found = Fraction(match[1]) * units[match[2]] if match else Fraction(0)
    if found < 1 or found.denominator != 1:
        raise UsageError(f"--tokens {text!r} is no number of tokens", "write it as 200K or 20M")
    return int(found)
