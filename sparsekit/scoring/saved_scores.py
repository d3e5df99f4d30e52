"""The scores of a checkpoint, stored with it in `sparsekit-scores.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from sparsekit.checkpoint.entry import History, reason
from sparsekit.checkpoint.folder import PROVENANCE
from sparsekit.errors import DataError, UsageError
from sparsekit.files import read_json, write_json
from sparsekit.scoring.config import EvalConfig
from sparsekit.scoring.score_entry import FORMAT, ScoreEntry, Scores
from sparsekit.scoring.score_table import write_scores

if TYPE_CHECKING:
    from sparsekit.scoring.evaluate import Score


SCORES = "sparsekit-scores.json"
# Subfolder of a run with the scores of its own model.
DENSE = "dense"
AGAIN = "delete the file and score the model again"


def read_scores(folder: Path) -> list[ScoreEntry]:
    """The scores of a folder, oldest first; none when it has no such file.

    Raises:
        DataError: The file is damaged, or a newer sparsekit wrote it.
    """
    file = folder / SCORES
    if not file.is_file():
        return []
    content = read_json(file)
    if isinstance(content, dict) and content.get("format") not in (None, FORMAT):
        raise DataError(
            f"{file} has format {content['format']!r}",
            "a newer sparsekit wrote it: update sparsekit",
            code="newer-version",
        )
    try:
        return list(Scores.model_validate_json(file.read_bytes(), strict=True).scores)
    except ValidationError as error:
        raise DataError(
            f"{file} has no scores that sparsekit wrote: {reason(error)}",
            AGAIN,
            code="invalid-scores",
        ) from error


def add_score(folder: Path, entry: Mapping[str, Any]) -> None:
    """Keep a score, and show it in the model card, if sparsekit wrote the folder.

    It replaces one with the same options and the same baseline.

    Args:
        folder: Of the checkpoint, or any other; it is made when it is not there.
        entry: The score as JSON, with the options that it was measured with.

    Raises:
        DataError: The scores that are there cannot be read.
        StorageError: The disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    added = ScoreEntry.model_validate_json(json.dumps({**entry, **_scored(folder)}))
    scores = [*(old for old in read_scores(folder) if _run(old) != _run(added)), added]
    write_json(folder / SCORES, {"format": FORMAT, "scores": [score.to_json() for score in scores]})
    write_scores(folder, scores)


def is_of(entry: ScoreEntry, weights: str | None) -> bool:
    """Whether a score is of weights with this fingerprint, as far as it says."""
    return entry.weights in (None, weights)


def _scored(folder: Path) -> dict[str, str]:
    """The fingerprint of the weights in a folder, where it has one."""
    file = folder / PROVENANCE
    fingerprint = History.read(file).fingerprint if file.is_file() else None
    return {} if fingerprint is None else {"weights": fingerprint}


def save_scores(
    scores: Sequence[Score], models: Sequence[str], config: EvalConfig, baseline: str | None
) -> None:
    """Keep the scores of models in their folders.

    Raises:
        StorageError: The disk is full.
    """
    measured = measurement(config, baseline)
    for score, model in zip(scores, models, strict=True):
        add_score(Path(model), measured | score.to_json())


def require_own(models: Sequence[str]) -> None:
    """Refuse to keep scores in folders that sparsekit did not write.

    Raises:
        UsageError: A model is not a folder that sparsekit wrote.
    """
    for model in models:
        if not (Path(model) / PROVENANCE).is_file():
            raise UsageError(
                f"--save: {model} was not written by sparsekit",
                "leave it out, or pass --json",
                code="not-by-sparsekit",
            )


def measurement(config: EvalConfig, baseline: str | None) -> dict[str, Any]:
    """The part of an entry that says how it was measured: the options, and the baseline's name."""
    words = {k: v for k, v in config if v is not None and k != "baseline"}
    words["tasks"] = list(config.tasks)
    if config.include_path is not None:
        words["include_path"] = str(config.include_path)
    return {"config": words, "baseline": baseline}


def _run(entry: ScoreEntry) -> tuple[Any, Any]:
    """The key of a measurement, which two scores of the same one share."""
    return entry.config, entry.baseline
