"""An entry of `sparsekit-scores.json`: a score, and how it was measured."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, JsonValue

from sparsekit.checkpoint.entry_parts import Part

# Raised when another version would misread the file.
FORMAT = 1
Number = Annotated[float, Field(allow_inf_nan=False)]


class ScorePart(Part):
    """A part of an entry; what no reader needs has no field."""

    model_config = ConfigDict(extra="allow")


class SavedFigure(ScorePart):
    """A value with its standard error."""

    value: Number
    stderr: Number | None = None


class SavedDifference(SavedFigure):
    """A paired difference to the baseline."""

    baseline: SavedFigure | None = None
    """The value of the baseline itself."""


class SavedPerplexity(ScorePart):
    """A perplexity, and what it was measured on."""

    text: str
    windows: int
    length: int
    fingerprint: str
    dtype: str
    log_perplexity: Number
    log_stderr: Number | None = None


class SavedTask(ScorePart):
    """The score of a task."""

    task: str
    version: str
    n: int
    n_shot: int
    metrics: dict[str, SavedFigure]
    samples_sha256: str = ""


class ScoreEntry(ScorePart):
    """A score, the options it was measured with, and the model its differences are to."""

    model: str | None = None
    """The model, as it was given."""
    config: dict[str, JsonValue] | None = None
    baseline: str | None = None
    perplexity: SavedPerplexity | None = None
    tasks: tuple[SavedTask, ...]
    difference: dict[str, SavedDifference]
    weights: str | None = None
    """The fingerprint of the weights that were scored, in a checkpoint that sparsekit wrote."""
    of: str | None = None
    """The dependencies of the scored step of a recipe."""


class Scores(Part):
    """The contents of `sparsekit-scores.json`."""

    format: Literal[1] = FORMAT
    scores: tuple[ScoreEntry, ...]
