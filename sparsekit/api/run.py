"""Verb `run` as a function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparsekit.errors import UsageError
from sparsekit.progress import SILENT, Progress

if TYPE_CHECKING:
    from sparsekit.study.run import Done


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
