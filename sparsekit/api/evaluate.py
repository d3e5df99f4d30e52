"""Verb `eval` as a function."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparsekit.api.keywords import measure
from sparsekit.progress import SILENT, Progress
from sparsekit.scoring.config import EvalConfig

if TYPE_CHECKING:
    from sparsekit.scoring.evaluate import Score


@measure(EvalConfig)
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
