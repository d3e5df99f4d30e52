"""Verbs as functions whose keywords are the options of the commands."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

from sparsekit.errors import SparsekitError, UsageError
from sparsekit.pipeline.options import Options, as_keywords, word_type
from sparsekit.progress import SILENT, Progress
from sparsekit.pruning.config import PruneConfig
from sparsekit.quantization.config import QuantizeConfig
from sparsekit.recovery.config import RecoverConfig
from sparsekit.scoring.config import EvalConfig

if TYPE_CHECKING:
    from sparsekit.provenance.entry import Report
    from sparsekit.scoring.evaluate import Score
    from sparsekit.study.run import Done

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


def _writer(
    config: Callable[P, Options],
) -> Callable[[Callable[..., Result]], Writer[P, Result]]:
    return lambda body: _with_keywords(config, body)


def _measure(
    config: Callable[P, Options],
) -> Callable[[Callable[..., Result]], Measure[P, Result]]:
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


@_writer(PruneConfig)
def prune(  # noqa: D417  (callers pass keywords instead of config)
    config: PruneConfig,
    model: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Report:
    """Write a pruned copy of a model, as `sparsekit prune MODEL -o OUT` does.

    Args:
        model: A folder, hub id or `demo`.
        out: Folder to write; it appears when it is complete.
        overwrite: Replace an earlier output of sparsekit.
        progress: Reports each block.

    Returns:
        The folder, and the history entry.

    Raises:
        SparsekitError: As the command, with the same message and hint.
    """
    from sparsekit.pruning.prune import prune as stage

    return stage(config, str(model), Path(out), overwrite=overwrite, progress=progress)


@_writer(RecoverConfig)
def recover(
    config: RecoverConfig,
    model: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Report | None:
    """Write a trained copy of a model, as `sparsekit recover MODEL -o OUT` does.

    Arguments and errors are those of `prune`, except for the options.

    Returns:
        The folder, and the history entry; None in processes other than the main one.
    """
    from sparsekit.recovery.recover import recover as stage

    return stage(config, str(model), Path(out), overwrite=overwrite, progress=progress)


@_writer(QuantizeConfig)
def quantize(
    config: QuantizeConfig,
    model: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Report:
    """Write a quantized copy of a model, as `sparsekit quantize MODEL -o OUT` does.

    Arguments and errors are those of `prune`, except for the options.
    """
    from sparsekit.quantization.quantize import quantize as stage

    return stage(config, str(model), Path(out), overwrite=overwrite, progress=progress)


@_measure(EvalConfig)
def evaluate(  # noqa: D417  (the same)
    config: EvalConfig,
    models: str | Path | Sequence[str | Path],
    *,
    save: bool = False,
    progress: Progress = SILENT,
) -> list[Score]:
    """Scores of models, as `sparsekit eval MODELS` measures them; a baseline comes first.

    Args:
        models: Folders, hub ids or `demo`.
        save: Store the scores with each model, which sparsekit must have written.
        progress: Reports each block and model.

    Raises:
        SparsekitError: As the command.
    """
    names = [str(name) for name in ([models] if isinstance(models, (str, Path)) else models)]
    from sparsekit.scoring.saved_scores import require_own, save_scores

    if save:
        require_own(names)
    from sparsekit.scoring.evaluate import evaluate as stage

    scores = stage(config, names, config.baseline, progress)
    if save:
        save_scores(scores[len(scores) - len(names) :], names, config, config.baseline)
    return scores


def run(
    recipe: str | Path | Mapping[str, object],
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    start: str | None = None,
    dry: bool = False,
    timed: bool = False,
    progress: Progress = SILENT,
) -> list[Done]:
    """Run a recipe, as `sparsekit run RECIPE -o OUT` does.

    Args:
        recipe: A file, the name of a shipped recipe, or the content of one.
        out: Folder of the run; None: the recipe's name.
        overrides: Options to replace, e.g. `prune.samples=8`.
        start: Stage to run again, with the stages after it.
        dry: Whether to plan only.
        timed: Whether a dry run estimates the duration of steps from their first blocks.
        progress: Reports each step.

    Returns:
        The outcome of each step.

    Raises:
        SparsekitError: As the command.
    """
    if timed and not dry:
        hint = "add it, or leave out timed"
        raise UsageError("timed has no effect without dry", hint, code="no-effect")
    from sparsekit.study.recipe import parse, read_recipe, recipe_file
    from sparsekit.study.schema import write_yaml

    if isinstance(recipe, Mapping):
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in recipe.items()}
        parsed, name = parse(write_yaml(plain), overrides), "run"
    else:
        file = recipe_file(str(recipe))
        parsed, name = read_recipe(file, overrides), file.stem
    from sparsekit.study.run import run as stage

    return stage(parsed, Path(out or name), start=start, dry=dry, timed=timed, progress=progress)
