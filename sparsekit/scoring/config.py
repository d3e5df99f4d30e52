"""Options of eval."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from sparsekit.errors import UsageError
from sparsekit.pipeline.options import Device, Dtype, Flag, Options, Word, written
from sparsekit.text.sources import check_source

BATCH_SIZE = 8


def _names(words: str | Sequence[str]) -> list[str]:
    """Names separated by commas."""
    names = words.split(",") if isinstance(words, str) else words
    return [name.strip() for name in names if name.strip()]


def _folder(word: str) -> Path:
    if not Path(word).is_dir():
        raise UsageError(f"--include-path {word} is not a folder", code="not-a-folder")
    return Path(word)


def _source(word: str) -> str:
    check_source(word)
    return word


class EvalConfig(Options):
    """Options of `eval`."""

    text: Annotated[
        str | None,
        Word(str | None, _source),
        Field(
            description="Text for perplexity: builtin (its held-out part), c4, wikitext2, a text "
            "file, or token rows in a .safetensors file. Default: builtin when no task is named."
        ),
        Flag(metavar="source", completes="windows"),
    ] = None
    length: Annotated[
        int | None, Field(description="Tokens per window. Default: 2048."), Flag()
    ] = None
    tasks: Annotated[
        Sequence[str],
        Word(str | Sequence[str], _names),
        Field(description="lm-eval tasks, comma-separated."),
        Flag(metavar="names"),
    ] = written("")
    include_path: Annotated[
        Path | None,
        Word(str | None, _folder),
        Field(description="Folder with further task files."),
        Flag(metavar="path"),
    ] = None
    limit: Annotated[
        int | None,
        Field(ge=1, description="Maximum number of windows, and of samples per task."),
        Flag(),
    ] = None
    baseline: Annotated[
        str | None,
        Field(description="Model to report paired differences to."),
        Flag(metavar="model", model=True),
    ] = None
    batch_size: Annotated[
        int | None,
        Field(ge=1, description=f"Samples per forward pass of a task. Default: {BATCH_SIZE}."),
        Flag(),
    ] = None
    seed: Annotated[int, Field(description="Seed of all random choices."), Flag()] = 0
    device: Device = "auto"
    dtype: Dtype = "auto"

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Refuse options that conflict."""
        for name in ("include_path", "batch_size"):
            if getattr(self, name) is not None and not self.tasks:
                message = f"--{name.replace('_', '-')} has no effect without --tasks"
                raise UsageError(message, code="no-effect")
        if self.seed < 0:
            raise UsageError(f"--seed must not be negative, not {self.seed}", code="out-of-range")
        return self

    @property
    def windows_of(self) -> str | None:
        """Text that perplexity is measured on; None: tasks only."""
        return self.text or (None if self.tasks else "builtin")
