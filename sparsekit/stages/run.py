"""A recipe carried out: each step once, keyed by what it depends on, and its output kept.

Each step writes a checkpoint into a folder of the run; beside it, in `.sparsekit-run`, stands what
its output depends on. A step whose record is the same is not done again, and one that was
interrupted goes on as its verb does.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparsekit.errors import DataError, SparsekitError, UsageError
from sparsekit.files import exclusive, read_json, sha256_file, sha256_json, write_atomic, write_json
from sparsekit.models.checkpoint import Checkpoint
from sparsekit.models.output import refuse_source
from sparsekit.models.reference import resolve
from sparsekit.progress import SILENT, Progress
from sparsekit.stages.config import EvalConfig
from sparsekit.stages.evaluate import evaluations
from sparsekit.stages.pack import pack
from sparsekit.stages.plan import plan
from sparsekit.stages.prune import prune
from sparsekit.stages.quantize import quantize
from sparsekit.stages.recipe import Recipe, Step
from sparsekit.stages.recover import recover
from sparsekit.stages.report import NUMERICS
from sparsekit.stages.scores import Entry, add_score, read_scores

RECORDS = ".sparsekit-run"
RECIPE = "recipe.yaml"
# Where the scores of the recipe's own model go.
DENSE = "dense"
# By word, what the content of a file or the weights of a model decide.
FILES = ("calibration", "data", "text", "eval_text")
MODELS = ("dense", "teacher", "baseline")
WRITERS = {"prune": prune, "recover": recover, "quantize": quantize}


@dataclass(frozen=True, kw_only=True)
class Done:
    """What became of a step."""

    step: Step
    folder: Path
    state: str
    """`made`, `kept` (it was finished before) or, of a dry run, `to do`."""
    seconds: float = 0.0
    """That this run spent on it."""

    def to_json(self) -> dict[str, Any]:
        """Everything that there is, as JSON."""
        return {
            "name": self.step.name,
            "verb": self.step.verb,
            "folder": str(self.folder),
            "state": self.state,
            "seconds": round(self.seconds, 3),
        }


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
        words = dict(step.words)
        for word in FILES:
            if isinstance(words.get(word), str) and Path(words[word]).is_file():
                words[word] = f"sha256 {sha256_file(Path(words[word]))}"
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
        if told["fingerprint"] is None:  # killed between its output and its record
            write_json(record, told | {"fingerprint": found})
        elif found != told["fingerprint"]:
            raise DataError(
                f"{folder} is not what the run wrote (fingerprint {found[:12]}…, it was "
                f"{told['fingerprint'][:12]}…)",
                f"put it back, or make it again with --from {step.stage}",
            )
        return True

    def _print(self, model: str) -> str:
        """The fingerprint of a model by its name."""
        if model == self.recipe.model:
            return self.keys[None]
        if model not in self.prints:
            self.prints[model] = Checkpoint.open(resolve(model, self.progress)).scan(self.progress)
        return self.prints[model]


def run(
    recipe: Recipe,
    out: Path,
    *,
    start: str | None = None,
    dry: bool = False,
    progress: Progress = SILENT,
) -> list[Done]:
    """Carry out a recipe.

    Args:
        recipe: What to do.
        out: The folder of the run, with a folder for each step.
        start: The stage to begin with, by its place, verb or name; it and what follows is made
            again. None: all that is not finished.
        dry: Whether to look only.
        progress: Told of each step.

    Returns:
        What became of each step, in order.

    Raises:
        UsageError: A folder is in the way, or `start` names no stage.
        DataError: A model or text cannot be read, or an output was changed.
    """
    first = None if start is None else recipe.stage_of(start)
    work = Run.open(recipe, out, progress)
    again = _again(recipe, first)
    states = {
        step.name: step.name not in again and work.finished(step)
        for step in recipe.steps
        if step.verb != "eval"
    }
    for step in recipe.steps:
        if first is not None and step.stage < first and not states.get(step.name, True):
            raise UsageError(
                f"--from {start}: {step.name}, which comes before, is not finished",
                "run the recipe without --from first",
            )
    for step in recipe.steps:  # what can be known to be wrong before the first long step
        if step.verb == "prune" and step.parent is None and not states[step.name]:
            plan(step.config, recipe.model, work.folder(step.name), overwrite=step.name in again)
    if dry:
        kept = {True: "kept", False: "to do"}
        return [
            Done(step=s, folder=work.folder(s.name), state=kept[states[s.name]])
            for s in recipe.steps
            if s.verb != "eval"
        ]
    with _locked(work):
        return list(_carried_out(work, states, again))


def _carried_out(work: Run, states: Mapping[str, bool], again: Sequence[str]) -> list[Done]:
    """Do what is to be done, in the order of the stages."""
    found: list[Done] = []
    write_recipe(work)
    for stage in range(work.recipe.stages):
        steps = [step for step in work.recipe.steps if step.stage == stage]
        if steps and steps[0].verb == "eval":
            found += _scored(work, steps)
            continue
        for step in steps:
            begun = time.perf_counter()
            if not states[step.name]:
                _make(work, step, overwrite=step.name in again)
            spent = time.perf_counter() - begun
            state = "kept" if states[step.name] else "made"
            work.progress.note(f"{step.name}: {state}")
            folder = work.folder(step.name)
            found.append(Done(step=step, folder=folder, state=state, seconds=spent))
    return found


def _make(work: Run, step: Step, *, overwrite: bool) -> None:
    """Carry out a step that writes a checkpoint, and record what it depends on.

    Raises:
        SparsekitError: As the verb; the message begins with the name of the step.
    """
    folder, model = work.folder(step.name), work.model(step.parent)
    record = {"depends": work.depends(step), "fingerprint": None}
    work.record(step).parent.mkdir(parents=True, exist_ok=True)
    write_json(work.record(step), record)
    how = {"overwrite": overwrite, "progress": work.progress}
    try:
        if step.verb == "pack":
            pack(model, folder, **how)
        else:
            WRITERS[step.verb](step.config, model, folder, **how)
    except SparsekitError as error:
        error.message = f"{step.path}, {step.name}: {error.message}"
        raise
    write_json(work.record(step), record | {"fingerprint": Checkpoint.open(folder).scan()})


def _scored(work: Run, steps: Sequence[Step]) -> list[Done]:
    """Measure the models of a stage, but for those that were measured in the same way before."""
    config, baseline = steps[0].config, steps[0].words["baseline"]
    told = _told(work, config, baseline)
    left: list[Step] = []
    found: list[Done] = []
    for step in steps:
        folder = _scores_of(work, step.parent)
        if any(_same(entry, told, work.keys[step.parent]) for entry in read_scores(folder)):
            found.append(Done(step=step, folder=folder, state="kept"))
        else:
            left.append(step)
    if not left:
        return found
    begun = time.perf_counter()
    models = [work.model(step.parent) for step in left]
    parents: list[str | None] = [step.parent for step in left]
    if baseline is not None:
        parents.insert(0, None)
    scores = evaluations(config, models, baseline, work.progress)
    for parent, score in zip(parents, scores, strict=True):
        if parent is not None or baseline in (None, work.recipe.model):
            first = parent is None and baseline is not None
            entry = told | {"baseline": None} if first else told
            entry = entry | {"of": work.keys[parent], **score.to_json()}
            add_score(_scores_of(work, parent), entry)
        if parent in {step.parent for step in left}:
            step = next(step for step in left if step.parent == parent)
            now = time.perf_counter()
            folder = _scores_of(work, parent)
            found.append(Done(step=step, folder=folder, state="made", seconds=now - begun))
            begun = now
    return found


def _told(work: Run, config: EvalConfig, baseline: str | None) -> Entry:
    """What an entry of the scores says of how it was measured."""
    words = {key: value for key, value in asdict(config).items() if value is not None}
    words["tasks"] = list(config.tasks)
    if "include_path" in words:
        words["include_path"] = str(words["include_path"])
    return {"config": words, "baseline": baseline}


def _same(entry: Entry, told: Entry, key: str) -> bool:
    """Whether an entry is of the same model, measured in the same way."""
    return entry.get("of") == key and all(entry.get(name) == told[name] for name in told)


def _scores_of(work: Run, name: str | None) -> Path:
    """The folder that the scores of a model are kept in."""
    return work.out / (name if name is not None else DENSE)


def _again(recipe: Recipe, first: int | None) -> list[str]:
    """The steps that are made again: those of a stage, and all that begin with their outputs."""
    if first is None:
        return []
    found: list[str] = []
    for step in recipe.steps:
        if step.verb != "eval" and (step.stage == first or step.parent in found):
            found.append(step.name)
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


def write_recipe(work: Run) -> None:
    """Keep the recipe with its outputs."""
    write_atomic(work.out / RECIPE, work.recipe.text.encode())


def _locked(work: Run) -> Any:
    """Keep other runs out of the folder."""
    (work.out / RECORDS).mkdir(parents=True, exist_ok=True)
    return exclusive(work.out / RECORDS / "lock")
