"""What the outputs of a recipe's steps depend on, and whether they are there.

Beside the folders of a run's steps stands, in `.sparsekit-run`, what each output depends on and the
fingerprint that it had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsekit.errors import DataError, UsageError
from sparsekit.files import read_json, sha256_file, sha256_json, write_json
from sparsekit.models.checkpoint import Checkpoint
from sparsekit.models.output import refuse_source
from sparsekit.models.reference import resolve
from sparsekit.progress import SILENT, Progress
from sparsekit.stages.recipe import Recipe
from sparsekit.stages.recipesteps import Step
from sparsekit.stages.report import NUMERICS

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
    """The fingerprints of models that words name."""
    stale: set[str] = field(default_factory=set)
    """The steps whose folder holds what was to be replaced when a run was killed."""

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
        found = cls(recipe=recipe, out=out, progress=progress, source=source)
        found.keys[None] = source.scan(progress)
        for step in recipe.steps:
            if step.verb != "eval":
                found.keys[step.name] = sha256_json(found.depends(step))
        return found

    def depends(self, step: Step) -> dict[str, Any]:
        """Everything that decides the output of a step."""
        words = {**step.words, **contents(step.words)}
        for word in MODELS:
            if words.get(word) is not None:
                words[word] = self._print(words[word])
        return {
            "verb": step.verb,
            "words": words,
            "from": self.keys[step.parent],
            "numerics": NUMERICS,
        }

    def folder(self, name: str | None) -> Path:
        """Where a step's output lies; of none, the recipe's model."""
        return self.out / name if name is not None else self.source.path

    def model(self, name: str | None) -> str:
        """What the verbs call the model that a step makes; of none, the recipe's word for it."""
        return str(self.folder(name)) if name is not None else self.recipe.model

    def record(self, step: Step) -> Path:
        """Where it stands what a step's output depends on."""
        return self.out / RECORDS / f"{step.name}.json"

    def finished(self, step: Step) -> bool:
        """Whether a step's output is there, as this recipe makes it.

        Raises:
            UsageError: A folder is in the way, or was made by another recipe.
            DataError: The output is no longer what was written.
        """
        folder, record = self.folder(step.name), self.record(step)
        if not folder.exists():
            return False
        if not record.is_file():
            raise UsageError(
                f"{folder} was not made by this run", "move it, or choose another --out"
            )
        told, now = read_json(record), self.depends(step)
        if told["depends"] != now:
            raise UsageError(
                f"{folder} was made by another recipe: {_difference(told['depends'], now)}",
                f"choose another --out, or make it again with --from {step.stage}",
            )
        found = Checkpoint.open(folder).scan(self.progress)
        if told["fingerprint"] is None:  # killed before the record was complete
            if found == told["before"]:
                self.stale.add(step.name)
                return False
            write_json(record, told | {"fingerprint": found})
        elif found != told["fingerprint"]:
            raise DataError(
                f"{folder} is not what the run wrote (fingerprint {found[:12]}…, it was "
                f"{told['fingerprint'][:12]}…)",
                f"put it back, or make it again with --from {step.stage}",
            )
        return True

    def intend(self, step: Step) -> dict[str, Any]:
        """Record that a step is to be made, and what it replaces; gives the record."""
        folder, record = self.folder(step.name), self.record(step)
        before = Checkpoint.open(folder).scan(self.progress) if folder.exists() else None
        told = {"depends": self.depends(step), "fingerprint": None, "before": before}
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, told)
        return told

    def _print(self, model: str) -> str:
        """The fingerprint of a model by its name."""
        if model == self.recipe.model:
            return self.keys[None]
        if model not in self.prints:
            self.prints[model] = Checkpoint.open(resolve(model, self.progress)).scan(self.progress)
        return self.prints[model]


def contents(words: Mapping[str, Any]) -> dict[str, str]:
    """The sha256 of the files that words name, by word."""
    found = {}
    for word in FILES:
        path = Path(words[word]) if isinstance(words.get(word), str) else None
        if path is not None and path.is_file():
            found[word] = f"sha256 {sha256_file(path)}"
    if words.get("include_path") is not None:
        files = sorted(path for path in Path(words["include_path"]).rglob("*") if path.is_file())
        found["include_path"] = f"sha256 {sha256_json([sha256_file(file) for file in files])}"
    return found


def _difference(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What two records differ in, in words."""
    old, new = earlier.get("words", {}), now["words"]
    changed = [key for key in new.keys() | old.keys() if old.get(key) != new.get(key)]
    if changed:
        key = min(changed)
        short = all(len(str(words.get(key))) < 40 for words in (old, new))
        return f"{key} was {old.get(key)}, now {new.get(key)}" if short else f"{key} differs"
    if earlier.get("from") != now["from"]:
        return "the model that it begins with is another"
    return "it is of another version of sparsekit"


def refuse_place(out: Path) -> None:
    """Refuse a folder for a run that holds something else.

    Raises:
        UsageError: It does, or is no folder.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"the output {out} is a file", "choose another name")
    if out.exists() and any(out.iterdir()) and not (out / RECORDS).is_dir():
        raise UsageError(f"{out} is not the folder of a run", "choose another --out")
