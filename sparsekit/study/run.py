"""Run a recipe: each step once, keeping its output.

A step whose record is the same is not done again; one that was interrupted resumes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sparsekit.errors import SparsekitError, StorageError, UsageError
from sparsekit.files import write_atomic
from sparsekit.packing.dry_run import plan_pack
from sparsekit.packing.pack import pack
from sparsekit.progress import SILENT, Progress
from sparsekit.pruning.dry_run import plan
from sparsekit.pruning.prune import prune
from sparsekit.quantization.dry_run import memory_ahead as quantize_memory
from sparsekit.quantization.dry_run import plan_quantize
from sparsekit.quantization.quantize import quantize
from sparsekit.recovery.dry_run import memory_ahead as recover_memory
from sparsekit.recovery.dry_run import plan_recover
from sparsekit.recovery.recover import recover
from sparsekit.scoring.evaluate import evaluations
from sparsekit.scoring.saved_scores import DENSE, add_score, measurement, read_scores
from sparsekit.study.recipe import Recipe
from sparsekit.study.state import Run
from sparsekit.study.steps import RECIPE, Step

PLANS = {"prune": plan, "recover": plan_recover, "quantize": plan_quantize, "pack": plan_pack}
# Memory of a verb on a model that does not exist yet, from the shapes of the recipe's model.
MEMORY = {"recover": recover_memory, "quantize": quantize_memory}
WRITERS = {"prune": prune, "recover": recover, "quantize": quantize, "pack": pack}


@dataclass(frozen=True, kw_only=True)
class Done:
    """The outcome of a step."""

    step: Step
    folder: Path
    state: str
    """`made`, `kept` (it was finished before) or, of a dry run, `to do`."""
    seconds: float = 0.0
    """Time of this run."""
    memory_ahead: int | None = None
    """Least memory of the step in bytes, in a dry run, if its model does not exist yet."""
    plan: Mapping[str, Any] | None = None
    """The step's plan, in a dry run, if its model exists already."""

    def to_json(self) -> dict[str, Any]:
        """Everything that there is, as JSON."""
        planned: dict[str, Any] = {} if self.plan is None else {"plan": dict(self.plan)}
        if self.memory_ahead is not None:
            planned["peak_memory_at_least_bytes"] = self.memory_ahead
        return {
            **planned,
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
    timed: bool = False,
    progress: Progress = SILENT,
) -> list[Done]:
    """Carry out a recipe.

    Args:
        recipe: What to do.
        out: The folder of the run, with a folder for each step.
        start: The stage to begin with, by its place, verb or name; it and what follows is made
            again. None: all that is not finished.
        dry: Whether to look only.
        timed: In a dry run, estimate the time of steps from their first blocks; not of `pack`.
        progress: Reports each step.

    Returns:
        The outcome of each step, in order.

    Raises:
        UsageError: A folder is in the way, or `start` names no stage.
        DataError: A model or text cannot be read, or an output was changed.
    """
    first = [] if start is None else recipe.steps_of(start)
    work = Run.open(recipe, out, progress)
    states = _states(work, first, start)
    plans = _plans(work, states, timed=dry and timed)
    if dry:
        return [_looked_at(work, step, states, plans, first) for step in recipe.steps]
    with work.locked():
        states = _states(work, first, start)  # another run may have ended since
        return _carried_out(work, states, first)


def places(recipe: Recipe, out: Path, done: Sequence[Done]) -> list[Path]:
    """The folders with outputs or scores of this recipe, that of its own model first."""
    folders = {one.folder for one in done}
    if any(step.words.get("baseline") == recipe.model for step in recipe.steps):
        folders.add(out / DENSE)
    return sorted(folders, key=lambda place: (place.name != DENSE, place.name))


def _looked_at(
    work: Run,
    step: Step,
    states: Mapping[str, bool],
    plans: Mapping[str, Mapping[str, Any]],
    first: Sequence[Step],
) -> Done:
    """The outcome of a step in a dry run; the measurements among the `first` are made again."""
    if step.verb == "eval":
        folder, plan = _scores_of(work, step.parent), None
        there = step not in first and (step.parent is None or states[step.parent])
        kept = there and _is_measured(work, step, _measurement(work, step))
    else:
        folder, plan, kept = work.folder(step.name), plans.get(step.name), states[step.name]
    memory = MEMORY.get(step.verb) if not kept and plan is None else None
    return Done(
        step=step,
        folder=folder,
        state="kept" if kept else "to do",
        plan=plan,
        memory_ahead=memory(step.config, work.source) if memory else None,
    )


def _states(work: Run, first: Sequence[Step], start: str | None) -> dict[str, bool]:
    """Of each step that writes, whether it is finished.

    Raises:
        UsageError: A folder is in the way, or what `start` begins with is not finished.
        DataError: An output was changed.
    """
    recipe, again = work.recipe, _again(work.recipe, first)
    makers = [step for step in recipe.steps if step.verb != "eval"]
    states = {step.name: work.finished(step, again=step.name in again) for step in makers}
    for step in first:
        parent = step.parent
        if parent is not None and not states[parent] and parent not in again:
            raise UsageError(
                f"--from {start}: the step {parent} before it is not finished",
                "run the recipe without --from first",
                code="unfinished-step",
            )
    return states


def _plans(work: Run, states: Mapping[str, bool], *, timed: bool) -> dict[str, dict[str, Any]]:
    """The plans of the steps whose model is there, by name; those that are finished have none.

    What can be known to be wrong is refused before the first long step.

    Raises:
        UsageError: A step does not fit the model, or a task is unknown.
        DataError: A model cannot be read.
    """
    plans = {}
    for step in work.recipe.steps:
        if step.verb == "eval":
            work.require_measurable(step)
        elif not states[step.name] and (step.parent is None or states[step.parent]):
            more = {} if step.verb == "pack" else {"timed": timed}
            plans[step.name] = _ready(PLANS, work, step)(**more)
        elif step.verb == "quantize":
            work.require_grid(step)
    _require_room(work, plans)
    return plans


def _require_room(work: Run, plans: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse steps whose outputs the disk has no room for together.

    Raises:
        StorageError: Says how much is missing.
    """
    ways = {name: (name, f"{name}.partial") for name in plans}  # where its room is taken already
    new = [plans[n] for n, names in ways.items() if not any(work.folder(w).exists() for w in names)]
    needed = sum(plan["bytes_to_write"] for plan in new)
    if new and needed > (free := new[0]["bytes_free"]):
        raise StorageError(
            f"the {len(new)} steps whose model is there need {needed / 1e9:.2f} GB, {work.out} has "
            f"{free / 1e9:.2f} GB free",
            "make room or choose another disk; nothing was written",
            code="not-enough-disk",
        )


def _carried_out(work: Run, states: Mapping[str, bool], first: Sequence[Step]) -> list[Done]:
    """Do what is to be done, in the order of the stages."""
    found: list[Done] = []
    write_atomic(work.out / RECIPE, work.recipe.text.encode())
    for stage in range(work.recipe.stages):
        steps = [step for step in work.recipe.steps if step.stage == stage]
        if steps and steps[0].verb == "eval":
            for group in _alike(steps):
                found += _scored(work, group, again=steps[0] in first)
            continue
        for step in steps:
            begun = time.perf_counter()
            kept = states[step.name] and work.finished(step)  # what comes before may be new
            if kept:
                work.settle(step)
            else:
                _make(work, step)
            spent, state = time.perf_counter() - begun, "kept" if kept else "made"
            work.progress.note(f"{step.name}: {state}")
            found.append(Done(step=step, folder=work.folder(step.name), state=state, seconds=spent))
    return found


def _make(work: Run, step: Step) -> None:
    """Carry out a step that writes a checkpoint, and record what it depends on.

    Raises:
        SparsekitError: As the verb; the message begins with the name of the step.
    """
    make = _ready(WRITERS, work, step)
    work.intend(step)
    try:
        make()
    except SparsekitError as error:
        error.message = f"{step.path}, {step.name}: {error.message}"
        raise
    work.settle(step)


def _ready(verbs: Mapping[str, Callable[..., Any]], work: Run, step: Step) -> Callable[..., Any]:
    """A verb or its plan with what the step gives it."""
    words = [*([] if step.config is None else [step.config]), work.model(step.parent)]
    how = {"overwrite": work.replaces(step), "progress": work.progress}
    return partial(verbs[step.verb], *words, work.folder(step.name), **how)


def _alike(steps: Sequence[Step]) -> list[list[Step]]:
    """The steps of a stage that measures, by how; the recipe's model apart, as its own baseline."""
    groups: dict[str, list[Step]] = {}
    for step in steps:
        own = step.parent is None and step.words["baseline"] is not None
        groups.setdefault(f"{own} {sorted(step.words.items(), key=str)}", []).append(step)
    return list(groups.values())


def _scored(work: Run, steps: Sequence[Step], *, again: bool) -> list[Done]:
    """Measure models in one way, except for those that were measured in that way before.

    Args:
        work: The run.
        steps: The steps of one stage that have the same words.
        again: Whether to measure those, too.
    """
    config, measured = steps[0].config, _measurement(work, steps[0])
    baseline = measured["baseline"]
    begun = time.perf_counter()
    left: list[Step] = []
    found: list[Done] = []
    for step in steps:
        if not again and _is_measured(work, step, measured):
            found.append(Done(step=step, folder=_scores_of(work, step.parent), state="kept"))
        else:
            left.append(step)
    if not left:
        return found
    models = [work.model(step.parent) for step in left]
    scores = evaluations(config, models, baseline, work.progress)
    if baseline is not None:
        first = next(scores)
        if baseline == work.recipe.model:
            entry = measured | {"baseline": None, "of": work.keys[None], **first.to_json()}
            add_score(_scores_of(work, None), entry)
    for step, score in zip(left, scores, strict=True):
        folder = _scores_of(work, step.parent)
        add_score(folder, measured | {"of": work.keys[step.parent], **score.to_json()})
        now = time.perf_counter()
        found.append(Done(step=step, folder=folder, state="made", seconds=now - begun))
        begun = now
    return found


def _measurement(work: Run, step: Step) -> dict[str, Any]:
    """How a step measures, as stored with its scores; no model is its own baseline."""
    baseline = step.words["baseline"]
    if step.parent is None and baseline == work.recipe.model:
        baseline = None
    return measurement(step.config, baseline) | {"read": work.read(step)}


def _is_measured(work: Run, step: Step, measured: Mapping[str, Any]) -> bool:
    """Whether the same model has scores that were measured in the same way."""
    saved = (entry.to_json() for entry in read_scores(_scores_of(work, step.parent)))
    wanted = {**measured, "of": work.keys[step.parent]}
    return any(all(entry.get(key) == wanted[key] for key in wanted) for entry in saved)


def _scores_of(work: Run, name: str | None) -> Path:
    """The folder that the scores of a model are kept in."""
    return work.out / (name if name is not None else DENSE)


def _again(recipe: Recipe, first: Sequence[Step]) -> set[str]:
    """The steps that are made again: the first ones, and all that begin with their outputs."""
    again = {step.name for step in first if step.verb != "eval"}
    for step in recipe.steps:
        if step.verb != "eval" and step.parent in again:
            again.add(step.name)
    return again
