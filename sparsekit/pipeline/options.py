"""The options of a verb, declared once: a frozen model whose fields are its options.

A field says the type of the value, how it is written (`Word`), its help text, and how the command
line presents it (`Flag`). Flags, recipe keys, the JSON schema and the Python keywords come from it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, core_schema

from sparsekit.errors import SparsekitError, UsageError, did_you_mean
from sparsekit.registry import as_text
from sparsekit.text.calibration import Calibration

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
WHAT, CALIBRATION, WHERE = "What", "Calibration", "Where"
# The commonest guess of this field, and what it stands for.
GUESSES = {"sparsity": ("pattern", "50%")}


class KeywordError(UsageError, TypeError):
    """An option that does not exist."""


class _Refused(ValueError):
    """An error of ours on its way through pydantic, which collects those of all fields."""

    def __init__(self, error: SparsekitError) -> None:
        super().__init__(error.message)
        self.error = error


@dataclass(frozen=True)
class Word:
    """How a value is written: the type of the word, and what parses it."""

    type: Any
    parse: Callable[[Any], Any]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """The schema of the word, followed by the parser; None stands for itself."""

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
    """Other than the field's name with dashes."""
    metavar: str = ""
    completes: str = ""
    """What a shell offers, by the name that `cli/complete.py` has for it."""
    methods: tuple[str, ...] = ()
    """Kinds of methods whose names a shell offers."""
    before: tuple[str, ...] = ()
    """Words that it offers before them."""
    model: bool = False
    """Whether it names a model, so that `-` is read from stdin."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is wrong with one option."""

    key: str
    error: SparsekitError
    """In the words of the command line."""
    reason: str
    """The same beside a place that names the option."""
    given: Any


class Options(BaseModel):
    """The options of a verb. Making one is the check: what is wrong is refused there.

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
        # Outside the fields, so that two spellings of the same options are equal.
        given = {key: word for key, word in words.items() if word is not None}
        object.__setattr__(self, "_words", given)

    @property
    def words(self) -> Mapping[str, Any]:
        """The options that were given, as they were written."""
        return dict(self._words)

    @classmethod
    def problems(cls, words: Mapping[str, Any]) -> list[Problem]:
        """Everything that is wrong with the options one by one."""
        try:
            cls.__pydantic_validator__.validate_python(dict(words), self_instance=cls.__new__(cls))
        except ValidationError as error:
            return _problems(cls, error)
        except SparsekitError:
            return []  # which of them do not go together is said when one is made
        return []

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The options as they are written when none is given."""
        return {name: field.default for name, field in cls.model_fields.items()}


class ReadsRows(Options):
    """The options of a verb that may read calibration."""

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
        int | None, Field(description="Tokens of a row. Default: 2048."), Flag(panel=CALIBRATION)
    ] = None
    seed: Annotated[
        int, Field(description="Seed of everything that is drawn."), Flag(panel=CALIBRATION)
    ] = 0

    @property
    def needs_rows(self) -> bool:
        """Whether a method of this run reads calibration."""
        raise NotImplementedError

    @property
    def rows(self) -> Calibration | None:
        """The calibration that this run reads; None: none."""
        if self.calibration is None and not self.needs_rows:
            return None
        source = self.calibration or "builtin"
        return Calibration(source=source, samples=self.samples, length=self.length, seed=self.seed)

    def check_rows(self, title: str, *others: str) -> None:
        """Refuse calibration that cannot be had, and options of it where none is read.

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
            raise UsageError(f"--seed must not be negative, not {self.seed}")
        given = [name for name in ("samples", "length", *others) if getattr(self, name) is not None]
        if given:
            flags = " and ".join(f"--{name}" for name in given)
            raise UsageError(
                f"{title} reads no calibration: {flags} {'have' if given[1:] else 'has'} no effect",
                "leave that out, or pass --calibration to have the output error measured",
            )


def _problems(config: type[Options], error: ValidationError) -> list[Problem]:
    """What pydantic found, in our words; an option that may be of several types has one problem."""
    by_key: dict[str, list[Mapping[str, Any]]] = {}
    for one in error.errors():
        by_key.setdefault(str(one["loc"][0]), []).append(dict(one))
    return [_problem(config, key, same) for key, same in by_key.items()]


def _problem(config: type[Options], key: str, same: Sequence[Mapping[str, Any]]) -> Problem:
    first, given = same[0], same[0]["input"]
    flag = f"--{key.replace('_', '-')}"
    raised = first.get("ctx", {}).get("error")
    if isinstance(raised, _Refused):
        return Problem(key=key, error=raised.error, reason=str(raised.error), given=given)
    if first["type"] == "extra_forbidden":
        hint = suggestion(key, config)
        wrong = KeywordError(f"there is no option {key!r}", hint)
        return Problem(key=key, error=wrong, reason=f"unknown; {hint}", given=None)
    if first["type"] == "literal_error":
        known = choices_of(config.model_fields[key].annotation)
        hint = f"one of: {', '.join(known)}"
        hint = did_you_mean(given, known, hint) if isinstance(given, str) and known[4:] else hint
        unknown = UsageError(f"{flag} {given!r} is not known", hint)
        reason = f"one of {', '.join(known)} is wanted, not {given!r}"
        return Problem(key=key, error=unknown, reason=reason, given=given)
    if first["type"] == "greater_than_equal":
        wanted = f"must be at least {first['ctx']['ge']}"
    else:
        wanted = " or ".join(dict.fromkeys(one["msg"].lower() for one in same))
    text = f"{wanted}, not {given!r}"
    said = f"{flag} {text}" if wanted.startswith("must") else f"{flag}: {text}"
    return Problem(key=key, error=UsageError(said), reason=text, given=given)


def suggestion(key: str, config: type[Options]) -> str:
    """What could have been meant by an option that does not exist."""
    option, value = GUESSES.get(key.replace("-", "_"), ("", ""))
    if option in config.model_fields:
        return f"use --{option} {value}"
    return did_you_mean(key, config.model_fields)


def choices_of(annotation: Any) -> tuple[str, ...]:
    """The words that a closed choice has; empty where there are others."""
    return tuple(one for one in get_args(annotation) if isinstance(one, str))


def flag_of(config: type[Options], name: str) -> Flag:
    """How the command line presents an option."""
    return next(one for one in config.model_fields[name].metadata if isinstance(one, Flag))


def word_type(config: type[Options], name: str) -> Any:
    """The type that an option is written as."""
    field = config.model_fields[name]
    written = [one.type for one in field.metadata if isinstance(one, Word)]
    return written[0] if written else field.annotation


def as_keywords(text: str) -> str:
    """A message about flags in the words of recipes and of Python."""

    def keyword(match: re.Match[str]) -> str:
        return match[1].replace("-", "_")

    text = text.replace("-O ", "option ").replace("--no-propagate", "propagate=False")
    return re.sub(r"(?<![\w-])--([a-z][a-z-]*)", keyword, text)


def parsed(option: Sequence[str] | Mapping[str, object]) -> dict[str, str]:
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


def seconds(flag: str) -> Callable[[str], float]:
    """Parses `90s`, `10m` or `2h`, for a flag that errors name."""

    def parse(text: str) -> float:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
        found = float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
        if not found:
            raise UsageError(f"{flag} {text!r} is no time", "write it as 90s, 10m or 2h")
        return found

    return parse


def count(text: str | int) -> int:
    """What `4096`, `200K`, `20M` or `1.5B` stands for.

    Raises:
        UsageError: It is no whole number of tokens.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", str(text).strip().upper())
    units = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
    found = Fraction(match[1]) * units[match[2]] if match else Fraction(0)
    if found < 1 or found.denominator != 1:
        raise UsageError(f"--tokens {text!r} is no number of tokens", "write it as 200K or 20M")
    return int(found)


def one_of(flag: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse a value that is not among the choices of a flag."""
    if value not in choices:
        raise UsageError(f"{flag} {value!r} is not known", f"one of: {', '.join(choices)}")


def written(word: Any) -> Any:
    """A default as it is written; the field has what is parsed from it."""
    return word


MethodOptions = Annotated[
    Mapping[str, str],
    Word(Sequence[str] | Mapping[str, object], parsed),
    Field(description="KEY=VALUE of the method, or METHOD.KEY=VALUE; repeatable."),
    Flag(spelling=("--option", "-O"), metavar="KEY=VALUE"),
]
Skip = Annotated[
    Sequence[str],
    Field(description="Glob of weights to leave dense, as down_proj; repeatable."),
    Flag(metavar="glob"),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    Field(description="Where to compute."),
    Flag(panel=WHERE),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    Field(description="Compute type."),
    Flag(panel=WHERE),
]
