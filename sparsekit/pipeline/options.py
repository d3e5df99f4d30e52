"""Options of a verb, declared once as the fields of a frozen model.

A field declares the value's type, how it is written (`Word`), its help, and its flag (`Flag`).
Flags, recipe keys, the JSON schema and Python keywords are generated from it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, core_schema

from sparsekit.errors import SparsekitError, UsageError, did_you_mean
from sparsekit.registry import as_text

if TYPE_CHECKING:
    from sparsekit.text.calibration import Calibration

DEVICES = ("auto", "cpu", "cuda")
WHAT, CALIBRATION, WHERE = "What", "Calibration", "Where"
# Option names that users of other tools try, with the option and value to suggest.
GUESSES = {"sparsity": ("pattern", "50%")}


class KeywordError(UsageError, TypeError):
    """An option that does not exist."""


class _Refused(ValueError):
    """Wraps a sparsekit error for pydantic, which collects the errors of all fields."""

    def __init__(self, error: SparsekitError) -> None:
        super().__init__(error.message)
        self.error = error


@dataclass(frozen=True)
class Word:
    """How a value is written: the type of the word, and its parser."""

    type: Any
    parse: Callable[[Any], Any]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """The schema of the word, followed by the parser; None stays None."""

        def parse(word: Any) -> Any:
            try:
                return None if word is None else self.parse(word)
            except SparsekitError as error:
                raise _Refused(error) from error

        schema = handler.generate_schema(self.type)
        return core_schema.no_info_after_validator_function(parse, schema)


@dataclass(frozen=True, kw_only=True)
class Flag:
    """How the command line presents an option."""

    panel: str = WHAT
    spelling: tuple[str, ...] = ()
    """Spellings of the flag; empty: the field's name with dashes."""
    metavar: str = ""
    completes: str = ""
    """Name of the shell completion in `cli/complete.py`."""
    methods: tuple[str, ...] = ()
    """Kinds of methods whose names the shell completes."""
    before: tuple[str, ...] = ()
    """Words that the shell offers before them."""
    model: bool = False
    """Whether it names a model, for which `-` reads stdin."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One invalid option."""

    key: str
    error: SparsekitError
    """In terms of command-line flags."""
    reason: str
    """The message without the option's name, for use after its place in a recipe."""
    given: Any


class Options(BaseModel):
    """Options of a verb, checked when constructed.

    Raises:
        UsageError: An option does not exist, cannot have its value, or has no effect.
        DataError: A file that an option names cannot be used.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        validate_default=True,
        protected_namespaces=(),
        arbitrary_types_allowed=True,
    )

    def __init__(self, /, **words: Any) -> None:
        words = {k: str(v) if isinstance(v, Path) else v for k, v in words.items()}
        try:
            super().__init__(**words)
        except ValidationError as error:
            raise _problems(type(self), error)[0].error from None
        # Not a field, so that two spellings of the same options are equal.
        object.__setattr__(self, "_words", {k: w for k, w in words.items() if w is not None})

    @property
    def words(self) -> Mapping[str, Any]:
        """The given options as written."""
        return dict(self._words)

    @classmethod
    def problems(cls, words: Mapping[str, Any]) -> list[Problem]:
        """All options that are invalid on their own."""
        try:
            cls.__pydantic_validator__.validate_python(dict(words), self_instance=cls.__new__(cls))
        except ValidationError as error:
            return _problems(cls, error)
        except SparsekitError:
            pass  # conflicts between options are reported on construction
        return []

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Default of each option, as written."""
        return {name: field.default for name, field in cls.model_fields.items()}


class ReadsRows(Options):
    """Options of a verb that may read calibration."""

    calibration: Annotated[
        str | None,
        Field(
            description="builtin, self, c4, wikitext2, a .txt, .jsonl, .json.gz or .parquet file, "
            "or token rows in a .safetensors file. Default: builtin."
        ),
        Flag(panel=CALIBRATION, metavar="source", completes="sources"),
    ] = None
    samples: Annotated[
        int | None, Field(description="Calibration rows. Default: 128."), Flag(panel=CALIBRATION)
    ] = None
    length: Annotated[
        int | None, Field(description="Tokens per row. Default: 2048."), Flag(panel=CALIBRATION)
    ] = None
    seed: Annotated[
        int, Field(description="Seed of all random choices."), Flag(panel=CALIBRATION)
    ] = 0

    @property
    def needs_rows(self) -> bool:
        """Whether a method of this run reads calibration."""
        raise NotImplementedError

    @property
    def rows(self) -> Calibration | None:
        """Calibration of this run; None: none."""
        if self.calibration is None and not self.needs_rows:
            return None
        from sparsekit.text.calibration import Calibration

        source = self.calibration or "builtin"
        return Calibration(source=source, samples=self.samples, length=self.length, seed=self.seed)

    def check_rows(self, title: str, *others: str) -> None:
        """Refuse unusable calibration, and calibration options without calibration.

        Args:
            title: The methods of the run.
            others: Further options that have no effect without calibration.

        Raises:
            UsageError: An option has no effect, or a number is out of range.
            DataError: The source cannot be used.
        """
        if self.rows is not None:
            return self.rows.check()
        if self.seed < 0:
            message = f"--seed must not be negative, not {self.seed}"
            raise UsageError(message, code="out-of-range")
        names = ("samples", "length", *others)
        unused = [f"--{name}" for name in names if getattr(self, name) is not None]
        if unused:
            flags = f"{' and '.join(unused)} {'have' if unused[1:] else 'has'}"
            raise UsageError(
                f"{title} reads no calibration: {flags} no effect",
                "leave it out, or pass --calibration to measure the output error",
                code="no-effect",
            )


def _problems(config: type[Options], error: ValidationError) -> list[Problem]:
    """The errors of pydantic, one per option."""
    by_key: dict[str, list[Mapping[str, Any]]] = {}
    for details in error.errors():
        by_key.setdefault(str(details["loc"][0]), []).append(dict(details))
    return [_problem(config, key, errors) for key, errors in by_key.items()]


def _problem(config: type[Options], key: str, errors: Sequence[Mapping[str, Any]]) -> Problem:
    first, given = errors[0], errors[0]["input"]
    flag = f"--{key.replace('_', '-')}"
    raised = first.get("ctx", {}).get("error")
    if isinstance(raised, _Refused):
        return Problem(key=key, error=raised.error, reason=str(raised.error), given=given)
    if first["type"] == "extra_forbidden":
        hint = suggestion(key, config)
        wrong = KeywordError(f"there is no option {key!r}", hint, code="no-option")
        return Problem(key=key, error=wrong, reason=f"unknown; {hint}", given=None)
    if first["type"] == "literal_error":
        known = choices_of(config.model_fields[key].annotation)
        hint = f"one of: {', '.join(known)}"
        hint = did_you_mean(given, known, hint) if isinstance(given, str) and known[4:] else hint
        unknown = UsageError(f"{flag} {given!r} is not known", hint, code="not-a-choice")
        reason = f"one of {', '.join(known)} is wanted, not {given!r}"
        return Problem(key=key, error=unknown, reason=reason, given=given)
    if first["type"] == "greater_than_equal":
        required, code = f"must be at least {first['ctx']['ge']}", "out-of-range"
    else:
        required, code = " or ".join(dict.fromkeys(e["msg"].lower() for e in errors)), "wrong-type"
    text = f"{required}, not {given!r}"
    message = f"{flag} {text}" if required.startswith("must") else f"{flag}: {text}"
    return Problem(key=key, error=UsageError(message, code=code), reason=text, given=given)


def suggestion(key: str, config: type[Options]) -> str:
    """A suggestion for an option that does not exist."""
    option, value = GUESSES.get(key.replace("-", "_"), ("", ""))
    if option in config.model_fields:
        return f"use --{option} {value}"
    return did_you_mean(key, config.model_fields)


def choices_of(annotation: Any) -> tuple[str, ...]:
    """The words of a closed choice; empty for other types."""
    return tuple(choice for choice in get_args(annotation) if isinstance(choice, str))


def flag_of(config: type[Options], name: str) -> Flag:
    """How the command line presents an option."""
    return next(item for item in config.model_fields[name].metadata if isinstance(item, Flag))


def word_type(config: type[Options], name: str) -> Any:
    """The type that an option is written as."""
    field = config.model_fields[name]
    return next((item.type for item in field.metadata if isinstance(item, Word)), field.annotation)


def as_keywords(text: str) -> str:
    """A message about flags, reworded for recipes and Python."""
    text = text.replace("-O ", "option ").replace("--no-propagate", "propagate=False")
    return re.sub(r"(?<![\w-])--([a-z][a-z-]*)", lambda m: m[1].replace("-", "_"), text)


def parsed(option: Sequence[str] | Mapping[str, object]) -> dict[str, str]:
    """The options of `-O KEY=VALUE` or of a mapping, as text.

    Raises:
        UsageError: An option has no value, or is given twice.
    """
    if isinstance(option, Mapping):
        return {key: as_text(value) for key, value in option.items()}
    options: dict[str, str] = {}
    for item in option:
        key, equals, value = item.partition("=")
        if not equals:
            message = f"--option {item!r} has no value"
            raise UsageError(message, "write --option KEY=VALUE", code="no-value")
        if key.strip() in options:
            message = f"option {key.strip()!r} is given twice"
            raise UsageError(message, "leave out one", code="given-twice")
        options[key.strip()] = value.strip()
    return options


def seconds(flag: str) -> Callable[[str], float]:
    """Return a parser of `90s`, `10m` or `2h`; its errors name the flag."""

    def parse(text: str) -> float:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
        duration = float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
        if not duration:
            message = f"{flag} {text!r} is not a duration"
            raise UsageError(message, "write it as 90s, 10m or 2h", code="not-a-duration")
        return duration

    return parse


def count(text: str | int) -> int:
    """The number of tokens in `4096`, `200K`, `20M` or `1.5B`.

    Raises:
        UsageError: It is not a whole number above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", str(text).strip().upper())
    units = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
    tokens = Fraction(match[1]) * units[match[2]] if match else Fraction(0)
    if tokens < 1 or tokens.denominator != 1:
        message = f"--tokens {text!r} is not a whole number of tokens"
        raise UsageError(message, "write it as 200K or 20M", code="not-a-count")
    return int(tokens)


def one_of(flag: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse a value that is not one of the choices of a flag."""
    if value not in choices:
        hint = f"one of: {', '.join(choices)}"
        raise UsageError(f"{flag} {value!r} is not known", hint, code="not-a-choice")


def written(word: Any) -> Any:
    """A default as written; the field holds the parsed value."""
    return word


MethodOptions = Annotated[
    Mapping[str, str],
    Word(Sequence[str] | Mapping[str, object], parsed),
    Field(description="Option of the method, KEY=VALUE or METHOD.KEY=VALUE; repeatable."),
    Flag(spelling=("--option", "-O"), metavar="KEY=VALUE"),
]
Skip = Annotated[
    Sequence[str],
    Field(description="Glob of weights to leave dense, e.g. down_proj; repeatable."),
    Flag(metavar="glob"),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"], Field(description="Device to compute on."), Flag(panel=WHERE)
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    Field(description="Compute type."),
    Flag(panel=WHERE),
]
