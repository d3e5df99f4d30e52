"""A recipe carried out: each step once, its output kept.

A step whose record is the same is not done again, and one that was interrupted goes on as its verb
does.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekit.errors import SparsekitError, UsageError
from sparsekit.files import exclusive, write_atomic, write_json
from sparsekit.models.checkpoint import Checkpoint
from sparsekit.progress import SILENT, Progress
from sparsekit.stages.evaluate import evaluations
from sparsekit.stages.pack import pack
from sparsekit.stages.plan import plan
from sparsekit.stages.prune import prune
from sparsekit.stages.quantize import quantize
from sparsekit.stages.recipe import Recipe
from sparsekit.stages.recipesteps import DENSE, Step
from sparsekit.stages.records import RECORDS, Run, contents
from sparsekit.stages.recover import recover
from sparsekit.stages.scores import add_score, measurement, read_scores

RECIPE = "recipe.yaml"
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
    again = [*again, *work.stale]
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
    record = work.intend(step)
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
    told = measurement(config, baseline) | {"read": contents(steps[0].words)}
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


def _same(entry: Mapping[str, Any], told: Mapping[str, Any], key: str) -> bool:
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


def write_recipe(work: Run) -> None:
    """Keep the recipe with its outputs."""
    write_atomic(work.out / RECIPE, work.recipe.text.encode())


def _locked(work: Run) -> Any:
    """Keep other runs out of the folder."""
    (work.out / RECORDS).mkdir(parents=True, exist_ok=True)
    return exclusive(work.out / RECORDS / "lock")
