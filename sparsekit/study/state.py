"""The dependencies of the outputs of a recipe's steps, and whether the outputs are there.

Beside the folders of a run's steps stands, in `.sparsekit-run`, what each output depends on and the
fingerprint that it had.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.entry import reason
from sparsekit.checkpoint.folder import config_of
from sparsekit.checkpoint.output_folder import refuse_source
from sparsekit.checkpoint.resolve import resolve
from sparsekit.errors import DataError, UsageError
from sparsekit.files import exclusive, read_json, sha256_file, sha256_json, write_json
from sparsekit.model.block_stream import BlockStream
from sparsekit.pipeline.selection import skipped
from sparsekit.progress import SILENT, Progress
from sparsekit.provenance.entry import NUMERICS
from sparsekit.quantization.storage import refuse_grid
from sparsekit.scoring.harness import load_tasks
from sparsekit.study.recipe import Recipe
from sparsekit.study.steps import Step
from sparsekit.text.calibration import tokenizer_key

RECORDS = ".sparsekit-run"
# By word, what the content of a file or the weights of a model decide.
FILES = ("calibration", "data", "text", "eval_text")
MODELS = ("dense", "teacher", "baseline")


@dataclass(kw_only=True)
class Run:
    """A recipe, where it is carried out, and what is known of its models."""

    recipe: Recipe
    out: Path
    progress: Progress
    source: Checkpoint
    keys: dict[str | None, str] = field(default_factory=dict)
    """Of each step what its output depends on, as a sha256."""
    prints: dict[str, str] = field(default_factory=dict)
    """The fingerprints of models, by the words that name them or by the state of their files."""
    files: dict[tuple[str, int, int], str] = field(default_factory=dict)
    """The sha256 of files that were read, by path, size and time."""

    @classmethod
    def open(cls, recipe: Recipe, out: Path, progress: Progress = SILENT) -> Run:
        """A run that nothing was done for yet.

        Raises:
            UsageError: The folder cannot be one of a run.
            DataError: The model cannot be read.
        """
        refuse_place(out)
        source = Checkpoint.open(resolve(recipe.model, progress))
        refuse_source(out, source.path)
        run = cls(recipe=recipe, out=out, progress=progress, source=source)
        run.keys[None] = _print_of_all(source, progress)
        for step in recipe.steps:
            if step.verb != "eval":
                run.keys[step.name] = sha256_json(run.depends(step))
        return run

    def depends(self, step: Step) -> dict[str, Any]:
        """Everything that decides the output of a step."""
        return {
            "verb": step.verb,
            "words": {**step.words, **self.read(step)},
            "from": self.keys[step.parent],
            "numerics": NUMERICS,
        }

    def read(self, step: Step) -> dict[str, str]:
        """The other inputs of a step, by word: the sha256 of a file or of a model's weights."""
        inputs = {}
        for word in FILES:
            path = Path(str(step.words.get(word)))
            if step.words.get(word) is not None and path.is_file():
                inputs[word] = f"sha256 {self._sha256(path)}"
        if (folder := step.words.get("include_path")) is not None:
            files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            inputs["include_path"] = f"sha256 {sha256_json([self._sha256(path) for path in files])}"
        for word in MODELS:
            if step.words.get(word) is not None:
                inputs[word] = self._print(step.words[word])
        return inputs

    def folder(self, name: str | None) -> Path:
        """The folder of a step's output; None: that of the recipe's model."""
        return self.out / name if name is not None else self.source.path

    def model(self, name: str | None) -> str:
        """The name by which verbs read the output of a step; None: the recipe's model."""
        return str(self.folder(name)) if name is not None else self.recipe.model

    def record(self, step: Step) -> Path:
        """The file that records what a step's output depends on."""
        return self.out / RECORDS / f"{step.name}.json"

    def finished(self, step: Step, *, again: bool = False) -> bool:
        """Whether a step's output is there, as this recipe makes it.

        Args:
            step: The step.
            again: Whether it is made again in any case; only a folder that does not belong to
                this run is refused.

        Raises:
            UsageError: A folder is in the way, or was made by another recipe.
            DataError: The output, or its record, is no longer what was written.
        """
        folder, record = self.folder(step.name), self.record(step)
        if not folder.exists():
            return False
        if not record.is_file():
            raise UsageError(
                f"{folder} was not made by this run",
                "move it, or choose another --out",
                code="not-by-this-run",
            )
        if again:
            return False
        recorded, now = Record.read(record), self.depends(step)
        way_out = f"make it again with --from {step.name}"
        if recorded.depends != now:
            raise UsageError(
                f"{folder} was made by another recipe: {_difference(recorded.depends, now)}",
                f"choose another --out, or {way_out}",
                code="other-recipe",
            )
        try:
            fingerprint = self._fingerprint(step.name)
        except DataError as error:
            raise type(error)(error.message, way_out, code=error.code) from error
        if recorded.fingerprint is None:  # killed before the record was complete
            return fingerprint != recorded.before
        if fingerprint != recorded.fingerprint:
            raise DataError(
                f"{folder} is not what the run wrote (fingerprint {fingerprint[:12]}…, it was "
                f"{recorded.fingerprint[:12]}…)",
                f"put its weights, config.json and tokenizer back, or {way_out}",
                code="fingerprint-mismatch",
            )
        return self._fingerprint(step.parent) in (None, recorded.parent)

    def replaces(self, step: Step) -> bool:
        """Whether a step's folder holds an earlier output of this run."""
        return self.folder(step.name).exists() and self.record(step).is_file()

    def intend(self, step: Step) -> None:
        """Record that a step is going to be made, from what, and what it replaces."""
        record = self.record(step)
        intended = Record(
            depends=self.depends(step),
            fingerprint=None,
            before=self._before(step.name),
            parent=self._fingerprint(step.parent),
        )
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, intended.model_dump(mode="json"))

    def settle(self, step: Step) -> None:
        """Complete the record of a step whose output is complete."""
        intended = Record.read(self.record(step))
        if intended.fingerprint is None:
            complete = intended.model_copy(update={"fingerprint": self._fingerprint(step.name)})
            write_json(self.record(step), complete.model_dump(mode="json"))

    def locked(self) -> AbstractContextManager[None]:
        """Keeps other runs out of the folder, which is made.

        Raises:
            UsageError: Another run is in it.
        """
        (self.out / RECORDS).mkdir(parents=True, exist_ok=True)
        return exclusive(self.out / RECORDS / "lock")

    def require_measurable(self, step: Step) -> None:
        """Refuse tasks and a baseline that do not exist, before what comes first is done.

        Raises:
            UsageError: A task is unknown.
            DataError: The baseline cannot be read.
        """
        config = step.config
        if step.words["baseline"] is not None:
            self._print(step.words["baseline"])
        if config.tasks and repr(config) not in self.prints:
            load_tasks(config.tasks, config.include_path, config.seed)
            self.prints[repr(config)] = "its tasks are known"

    def require_grid(self, step: Step) -> None:
        """Refuse a grid that does not divide the weights, whose shapes no step changes.

        Raises:
            UsageError: Names the first such weight.
        """
        grid = step.config.grid
        targets = BlockStream(self.source, device="cpu", dtype=torch.float32).targets()
        left = skipped([target.name for target in targets], step.words["skip"])
        coded = [target for target in targets if target.name not in left]
        try:
            refuse_grid(grid, coded, [], flag="grid:", coded=False)
        except UsageError as error:
            raise UsageError(
                f"{step.path}: {error.message}", error.hint, code=error.code
            ) from error

    def _before(self, name: str) -> str | None:
        """The fingerprint of what is to be replaced; None also where that is too damaged for one.

        It is damaged still after a kill, and named as such then.
        """
        with contextlib.suppress(DataError):
            return self._fingerprint(name)
        return None

    def _fingerprint(self, name: str | None) -> str | None:
        """The fingerprint of an output; None if there is none, and for the recipe's model."""
        folder = self.folder(name)
        if name is None or not folder.exists():
            return None
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        state = repr([(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files])
        if state not in self.prints:  # every byte is read, once
            self.prints[state] = _print_of_all(Checkpoint.open(folder), self.progress)
        return self.prints[state]

    def _sha256(self, path: Path) -> str:
        """The sha256 of a file, which is read once."""
        stat = path.stat()
        key = (str(path), stat.st_size, stat.st_mtime_ns)
        if key not in self.files:
            self.files[key] = sha256_file(path)
        return self.files[key]

    def _print(self, model: str) -> str:
        """The fingerprint of a model by its name."""
        if model == self.recipe.model:
            return self.keys[None]
        if model not in self.prints:
            self.prints[model] = Checkpoint.open(resolve(model, self.progress)).scan(self.progress)
        return self.prints[model]


def _print_of_all(source: Checkpoint, progress: Progress) -> str:
    """The sha256 over everything that a model computes with: weights, configuration, tokenizer.

    Raises:
        DataError: The model cannot be read.
    """
    config = json.dumps(config_of(source.config), sort_keys=True, default=str)
    return sha256_json([source.scan(progress), config, tokenizer_key(source)])


class Record(BaseModel):
    """The dependencies and the fingerprint of a step's output."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    depends: dict[str, JsonValue]
    fingerprint: str | None
    """The fingerprint of the output; None until it is complete."""
    before: str | None
    """The fingerprint of the output that it replaces."""
    parent: str | None
    """The fingerprint of the output that it was made from."""

    @classmethod
    def read(cls, file: Path) -> Record:
        """The record in a file.

        Raises:
            DataError: The file is damaged.
        """
        read_json(file)  # names the place of a syntax error
        try:
            return cls.model_validate_json(file.read_bytes(), strict=True)
        except ValidationError as error:
            raise DataError(
                f"{file} is damaged: {reason(error)}",
                "delete it and the folder that it describes",
                code="damaged-file",
            ) from error


def _difference(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The difference of two records, in words."""
    old, new = earlier.get("words", {}), now["words"]
    changed = [key for key in new.keys() | old.keys() if old.get(key) != new.get(key)]
    if changed:
        key = min(changed)
        short = all(len(str(words.get(key))) < 40 for words in (old, new))
        return f"{key} was {old.get(key)}, now {new.get(key)}" if short else f"{key} differs"
    if earlier.get("from") != now["from"]:
        return "it begins with another model"
    return "it was made by another version of sparsekit"


def refuse_place(out: Path) -> None:
    """Refuse a folder for a run that holds something else.

    Raises:
        UsageError: It does, or is not a folder.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"the output {out} is a file", "choose another name", code="not-a-folder")
    if out.exists() and any(out.iterdir()) and not (out / RECORDS).is_dir():
        raise UsageError(
            f"{out} is not the folder of a run", "choose another --out", code="not-a-run"
        )
