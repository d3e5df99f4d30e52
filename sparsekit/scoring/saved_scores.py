"""The scores of a checkpoint, stored with it in `sparsekit-scores.json`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekit.checkpoint.folder import PROVENANCE
from sparsekit.errors import DataError, UsageError
from sparsekit.files import read_json, write_json
from sparsekit.scoring.config import EvalConfig
from sparsekit.scoring.score_table import write_scores

if TYPE_CHECKING:
    from sparsekit.scoring.evaluate import Score


SCORES = "sparsekit-scores.json"
# Raised when an older sparsekit would misread the file.
FORMAT = 1
# Where in the folder of a run the scores of its own model lie, and what that is called.
DENSE = "dense"
AGAIN = "delete the file and score the model again"


def read_scores(folder: Path) -> list[dict[str, Any]]:
    """The scores of a folder, oldest first; none when it has no such file.

    An entry is a `Score` as JSON with the options that it was measured with, `config`, and the
    name of the model that its differences are to, `baseline` (None: it has none). Beside a
    checkpoint of ours it has the fingerprint of the weights that were scored, `weights`.

    Raises:
        DataError: The file is damaged, or a newer sparsekit wrote it.
    """
    file = folder / SCORES
    if not file.is_file():
        return []
    found = read_json(file)
    if isinstance(found, dict) and found.get("format") not in (None, FORMAT):
        raise DataError(
            f"{file} has format {found['format']!r}",
            "a newer sparsekit wrote it: update sparsekit",
            code="newer-version",
        )
    entries = found.get("scores") if isinstance(found, dict) else None
    if not isinstance(entries, list):
        raise DataError(f"{file} has no scores that sparsekit wrote", AGAIN, code="invalid-scores")
    for index, entry in enumerate(entries):
        if wrong := _wrong(entry):
            raise DataError(
                f"{file}: score {index} has no usable {wrong}", AGAIN, code="invalid-scores"
            )
    return entries


def add_score(folder: Path, entry: Mapping[str, Any]) -> None:
    """Keep a score, and show it in the model card, if sparsekit wrote the folder.

    It replaces one with the same options and the same baseline.

    Args:
        folder: Of the checkpoint, or any other; it is made when it is not there.
        entry: As of `read_scores`.

    Raises:
        DataError: The scores that are there cannot be read.
        StorageError: The disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = [old for old in read_scores(folder) if _run(old) != _run(entry)]
    scores = [*kept, dict(entry) | _scored(folder)]
    write_json(folder / SCORES, {"format": FORMAT, "scores": scores})
    write_scores(folder, scores)


def is_of(entry: Mapping[str, Any], weights: str | None) -> bool:
    """Whether a score is of weights with this fingerprint, as far as it says."""
    return entry.get("weights") in (None, weights)


def _scored(folder: Path) -> dict[str, str]:
    """The fingerprint of the weights in a folder, where it has one."""
    file = folder / PROVENANCE
    found = read_json(file).get("fingerprint") if file.is_file() else None
    return {} if found is None else {"weights": found}


def save_scores(
    scores: Sequence[Score], models: Sequence[str], config: EvalConfig, baseline: str | None
) -> None:
    """Keep the scores of models in their folders.

    Raises:
        StorageError: The disk is full.
    """
    told = measurement(config, baseline)
    for score, model in zip(scores, models, strict=True):
        add_score(Path(model), told | score.to_json())


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
    """What an entry says of how it was measured: options that are set, and the baseline's name."""
    words = {k: v for k, v in config if v is not None and k != "baseline"}
    words["tasks"] = list(config.tasks)
    if config.include_path is not None:
        words["include_path"] = str(config.include_path)
    return {"config": words, "baseline": baseline}


def _run(entry: Mapping[str, Any]) -> tuple[Any, Any]:
    """The identity of a measurement, shared by the scores that repeat it."""
    return entry.get("config"), entry.get("baseline")


def _wrong(entry: Any) -> str:
    """The part of an entry that is not as it was written; empty when all are."""
    if not isinstance(entry, dict):
        return "parts"
    checks: dict[str, Callable[[Any], bool]] = {
        "config": lambda value: value is None or isinstance(value, dict),
        "baseline": lambda value: value is None or isinstance(value, str),
        "perplexity": lambda value: value is None or _is_perplexity(value),
        "tasks": lambda value: isinstance(value, list) and all(map(_is_task, value)),
        "difference": lambda value: (
            isinstance(value, dict) and all(map(_is_difference, value.values()))
        ),
    }
    return next((key for key, holds in checks.items() if not holds(entry.get(key))), "")


def _is_perplexity(value: Any) -> bool:
    """Whether a value says on what it was measured, and what came of it."""
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(key), str) for key in ("text", "dtype", "fingerprint"))
        and all(isinstance(value.get(key), int) for key in ("windows", "length"))
        and _is_number(value.get("log_perplexity"))
        and (value.get("log_stderr") is None or _is_number(value["log_stderr"]))
    )


def _is_task(value: Any) -> bool:
    """Whether a value is the score of a task."""
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(key), str) for key in ("task", "version"))
        and all(isinstance(value.get(key), int) for key in ("n", "n_shot"))
        and isinstance(value.get("metrics"), dict)
        and all(map(_is_figure, value["metrics"].values()))
    )


def _is_figure(value: Any) -> bool:
    """Whether a value is a figure with its standard error, if it has one."""
    return (
        isinstance(value, dict)
        and _is_number(value.get("value"))
        and (value.get("stderr") is None or _is_number(value["stderr"]))
    )


def _is_difference(value: Any) -> bool:
    """Whether a value is a figure, optionally with that of the baseline."""
    return _is_figure(value) and (value.get("baseline") is None or _is_figure(value["baseline"]))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
