"""What the words of a command's flags, and of a recipe's keys, stand for.

Both have the same names and defaults: those of the functions here.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, Protocol, TypeVar

from sparsekit.errors import UsageError
from sparsekit.registry import as_text
from sparsekit.text.calibration import Calibration

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# Options of a method: text as `KEY=VALUE`, or a mapping.
MethodOptions = Sequence[str] | Mapping[str, object]


class ReadsRows(Protocol):
    """A configuration that may read calibration."""

    @property
    def calibration(self) -> Calibration | None:
        """The rows that were named."""

    @property
    def rows(self) -> Calibration | None:
        """The rows that are read."""

    def check(self) -> None:
        """Refuse what is wrong whatever the model is."""


Reading = TypeVar("Reading", bound=ReadsRows)


def named_rows(
    source: str | None, samples: int | None, length: int | None, seed: int
) -> Calibration | None:
    """The calibration whose source is named."""
    if source is None:
        return None
    return Calibration(source=source, samples=samples, length=length, seed=seed)


def with_rows(
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
        return replace(config, calibration=rows)  # type: ignore[type-var]
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
        return {key: as_text(value) for key, value in option.items()}
    options: dict[str, str] = {}
    for item in option:
        key, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"--option {item!r} has no value", "write --option KEY=VALUE")
        if key.strip() in options:
            raise UsageError(f"option {key.strip()!r} is given twice", "leave out one")
        options[key.strip()] = value.strip()
    return options


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


def one_of(flag: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse a value that is not among the choices of a flag."""
    if value not in choices:
        raise UsageError(f"{flag} {value!r} is not known", f"one of: {', '.join(choices)}")
