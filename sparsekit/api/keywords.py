"""Functions whose keywords are the options of a verb, typed for editors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

from sparsekit.errors import SparsekitError
from sparsekit.pipeline.options import Options, as_keywords, word_type
from sparsekit.progress import SILENT, Progress

P = ParamSpec("P")
Result = TypeVar("Result", covariant=True)


class Writer(Protocol[P, Result]):
    """A verb that writes a model; its keywords are the options."""

    def __call__(
        self,
        model: str | Path,
        out: str | Path,
        overwrite: bool = False,
        progress: Progress = SILENT,
        *none: P.args,
        **words: P.kwargs,
    ) -> Result:
        """Run the verb."""


class Measure(Protocol[P, Result]):
    """A verb that measures models; its keywords are the options."""

    def __call__(
        self,
        models: str | Path | Sequence[str | Path],
        save: bool = False,
        progress: Progress = SILENT,
        *none: P.args,
        **words: P.kwargs,
    ) -> Result:
        """Run the verb."""


def writer(
    config: Callable[P, Options],
) -> Callable[[Callable[..., Result]], Writer[P, Result]]:
    """Decorator of a verb that writes a model: its first argument becomes keywords."""
    return lambda body: _with_keywords(config, body)


def measure(
    config: Callable[P, Options],
) -> Callable[[Callable[..., Result]], Measure[P, Result]]:
    """Decorator of a verb that measures models: its first argument becomes keywords."""
    return lambda body: _with_keywords(config, body)


def _with_keywords(config: Any, body: Callable[..., Any]) -> Any:
    """Convert a function of a configuration into one of the options."""
    parameters = list(inspect.signature(body).parameters.values())[1:]
    # Options that only this verb has come first.
    names = sorted(config.model_fields, key=lambda name: name not in config.__annotations__)
    fields = {name: config.model_fields[name] for name in names}
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=word_type(config, name),
        )
        for name, field in fields.items()
    ]

    def verb(*places: Any, **keywords: Any) -> Any:
        words = {key: value for key, value in keywords.items() if key not in mine}
        with _as_keywords():
            made = config(**words)
            return body(made, *places, **{k: v for k, v in keywords.items() if k in mine})

    mine = [parameter.name for parameter in parameters]
    places = [parameter for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]
    rest = [parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    result = inspect.signature(body).return_annotation
    verb.__name__ = verb.__qualname__ = body.__name__
    verb.__module__ = body.__module__
    signature = inspect.Signature([*places, *options, *rest], return_annotation=result)
    verb.__signature__ = signature  # type: ignore[attr-defined]
    lines = (f"    {name}: {as_keywords(field.description)}" for name, field in fields.items())
    verb.__doc__ = "\n".join([inspect.cleandoc(body.__doc__ or ""), "", "Options:", *lines])
    return verb


@contextmanager
def _as_keywords() -> Iterator[None]:
    """Name keywords instead of flags in errors."""
    try:
        yield
    except SparsekitError as error:
        error.message, error.hint = as_keywords(error.message), as_keywords(error.hint)
        error.args = (error.message,)
        raise
