"""The verbs as functions, with the words of their flags: what the commands do, from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

from sparsekit.errors import UsageError
from sparsekit.pipeline.options import MethodOptions
from sparsekit.progress import SILENT, Progress
from sparsekit.pruning.config import prune_config
from sparsekit.quantization.config import quantize_config
from sparsekit.recovery.config import recover_config
from sparsekit.scoring.config import eval_config

if TYPE_CHECKING:
    from sparsekit.provenance.entry import Report
    from sparsekit.scoring.evaluate import Score
    from sparsekit.study.run import Done


class PruneWords(TypedDict, total=False):
    """The flags of `sparsekit prune`; what is left out has the flag's default."""

    method: str | None
    pattern: str | None
    option: MethodOptions
    preset: str | None
    initial: str | None
    refine: str | None
    dense: str | None
    calibration: str | None
    samples: int | None
    length: int | None
    seed: int
    skip: Sequence[str]
    reconstruct: str
    propagate: bool | None
    allocate: str
    compensate: str
    rank: str | None
    format: str
    budget: str | None
    then: str | None
    device: str
    dtype: str


class RecoverWords(TypedDict, total=False):
    """The flags of `sparsekit recover`."""

    method: str
    data: str
    tokens: str | int | None
    max_time: str | None
    teacher: str | None
    pattern: str | None
    option: MethodOptions
    skip: Sequence[str]
    metric: str
    batch: int
    length: int
    accumulate: int
    lr: float | None
    schedule: str
    share: float | None
    temperature: float
    teacher_top: int | None
    slorb: int | None
    format: str
    save_every: int | None
    eval_every: int | None
    eval_text: str | None
    seed: int
    device: str
    dtype: str
    mixed_precision: str


class QuantizeWords(TypedDict, total=False):
    """The flags of `sparsekit quantize`."""

    method: str
    grid: str
    option: MethodOptions
    calibration: str | None
    samples: int | None
    length: int | None
    seed: int
    skip: Sequence[str]
    format: str
    device: str
    dtype: str


class EvalWords(TypedDict, total=False):
    """The flags of `sparsekit eval`, but for the baseline."""

    text: str | None
    length: int | None
    tasks: str | Sequence[str]
    include_path: str | Path | None
    limit: int | None
    batch_size: int | None
    seed: int
    device: str
    dtype: str


def prune(
    model: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
    **given: Unpack[PruneWords],
) -> Report:
    """Write a pruned copy of a model, as `sparsekit prune MODEL -o OUT` does.

    Args:
        model: A folder, hub id or `demo`.
        out: The folder to make; it appears when it is complete.
        overwrite: Replace an earlier output of sparsekit.
        progress: Told of each block.
        given: Words of `PruneWords`, as `method="sparsegpt", pattern="2:4", samples=32`.

    Returns:
        The folder, and what was done.

    Raises:
        SparsekitError: As the command; its message and hint are what that shows.
    """
    config = prune_config(**given)
    from sparsekit.pruning.prune import prune as stage

    return stage(config, str(model), Path(out), overwrite=overwrite, progress=progress)


def recover(
    model: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
    **given: Unpack[RecoverWords],
) -> Report | None:
    """Write a trained copy of a model, as `sparsekit recover MODEL -o OUT` does.

    Args and errors are those of `prune`; the words are those of `RecoverWords`.

    Returns:
        The folder, and what was done; None in a process that trains along with the main one.
    """
    config = recover_config(**given)
    from sparsekit.recovery.recover import recover as stage

    return stage(config, str(model), Path(out), overwrite=overwrite, progress=progress)


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
    **given: Unpack[QuantizeWords],
) -> Report:
    """Write a copy of a model on a grid, as `sparsekit quantize MODEL -o OUT` does.

    Args and errors are those of `prune`; the words are those of `QuantizeWords`.
    """
    config = quantize_config(**given)
    from sparsekit.quantization.quantize import quantize as stage

    return stage(config, str(model), Path(out), overwrite=overwrite, progress=progress)


def evaluate(
    models: str | Path | Sequence[str | Path],
    *,
    baseline: str | Path | None = None,
    save: bool = False,
    progress: Progress = SILENT,
    **given: Unpack[EvalWords],
) -> list[Score]:
    """The scores of one or more models, as `sparsekit eval MODELS` measures them.

    Args:
        models: Folders, hub ids or `demo`.
        baseline: The model that paired differences are taken to; its score comes first.
        save: Keep the scores beside each model, which sparsekit wrote, for `compare` and `report`.
        progress: Told of each block and model.
        given: Words of `EvalWords`, as `text="wikitext2", length=2048`.

    Raises:
        SparsekitError: As the command.
    """
    config = eval_config(**given)
    names = [str(name) for name in ([models] if isinstance(models, (str, Path)) else models)]
    first = None if baseline is None else str(baseline)
    from sparsekit.scoring.saved_scores import require_own, save_scores

    if save:
        require_own(names)
    from sparsekit.scoring.evaluate import evaluate as stage

    found = stage(config, names, first, progress)
    if save:
        save_scores(found[len(found) - len(names) :], names, config, first)
    return found


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
    """Carry out a recipe, as `sparsekit run RECIPE -o OUT` does.

    Args:
        recipe: A file, the name of one that is shipped, or what one would hold.
        out: The folder of the run; None: the recipe's name.
        overrides: Words to replace, as `prune.samples=8`.
        start: The stage to make again, with what follows.
        dry: Whether to look only.
        timed: Of a dry run: tell how long steps would take, from their first blocks.
        progress: Told of each step.

    Returns:
        What became of each step.

    Raises:
        SparsekitError: As the command.
    """
    if timed and not dry:
        raise UsageError("timed has no effect without dry", "add it, or leave timed out")
    from sparsekit.study.recipe import parse, read_recipe, recipe_file
    from sparsekit.study.schema import write_yaml

    if isinstance(recipe, Mapping):
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in recipe.items()}
        told, name = parse(write_yaml(plain), overrides), "run"
    else:
        file = recipe_file(str(recipe))
        told, name = read_recipe(file, overrides), file.stem
    from sparsekit.study.run import run as stage

    return stage(told, Path(out or name), start=start, dry=dry, timed=timed, progress=progress)
