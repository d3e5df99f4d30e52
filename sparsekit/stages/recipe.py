"""A recipe: which stages are done to a model, in which variants, checked before all else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsekit.errors import DataError, SparsekitError, UsageError, did_you_mean
from sparsekit.stages.recipeform import (
    BESIDE,
    TOP,
    VERBS,
    VERSION,
    defaults,
    form,
    problems,
    read_yaml,
    variants,
)

# What `from` calls the model that a recipe begins with, and a baseline too.
MODEL = "model"
# What a stage takes, of the forms that a model has on its way.
TAKES = {
    "prune": ("plain",),
    "recover": ("plain",),
    "quantize": ("plain",),
    "pack": ("plain", "quantized"),
    "eval": ("plain", "quantized", "packed"),
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One stage of one variant: what is done to which model."""

    name: str
    """Its folder in the run's; of an `eval` the folder that is measured."""
    verb: str
    stage: int
    """Which stage of the recipe it is a variant of."""
    words: Mapping[str, Any]
    """All words of the verb."""
    parent: str | None
    """The name of the step whose output it reads; None: the recipe's model."""
    path: str
    """Where the recipe says it, as `stages[0].prune`."""

    @property
    def config(self) -> Any:
        """The checked configuration that the words spell; None for a verb without any.

        Raises:
            UsageError: The words cannot be used together.
            DataError: A file that they name cannot be used.
        """
        spell = VERBS[self.verb]
        told = {key: value for key, value in self.words.items() if key != "baseline"}
        return None if spell is None else spell(**told)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A checked recipe."""

    model: str
    steps: Sequence[Step]
    """In an order in which each comes after what it reads."""
    stages: int
    text: str
    """What was written."""

    def stage_of(self, name: str) -> int:
        """The number of the stage that a word names: its place, its verb, or the name of a step.

        Raises:
            UsageError: There is none, or there are several.
        """
        makers = [step for step in self.steps if step.verb != "eval"]  # others bear their names
        found = {step.stage for step in makers if step.name == name}
        found = found or {s.stage for s in self.steps if name in (s.verb, str(s.stage))}
        if len(found) == 1:
            return found.pop()
        known = sorted({s.verb for s in self.steps} | {s.name for s in self.steps})
        reason = "names several stages" if found else "names no stage"
        hint = f"stages are counted from 0 to {self.stages - 1}; " + did_you_mean(name, known)
        raise UsageError(f"--from {name} {reason}", hint)


@dataclass
class _Draft:
    """A recipe while it is read."""

    errors: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)
    """The stages that were given names."""
    forms: dict[str | None, str] = field(default_factory=lambda: {None: "plain"})
    """Of each step by name, the form of the model that it makes."""


def read_recipe(file: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, with some of its words replaced.

    Args:
        file: A YAML file.
        overrides: As `model=demo` or `prune.samples=8`, the latter for every stage of the verb.

    Raises:
        DataError: The file cannot be read.
        UsageError: Says everything that is wrong, each with its place.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise DataError(f"the recipe {file} cannot be read: {reason}") from error
    try:
        return parse(text, overrides)
    except UsageError as error:
        raise UsageError(f"{file}: {error.message}", error.hint) from error


def parse(text: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a text; see `read_recipe`."""
    told = read_yaml(text)
    if not isinstance(told, dict):
        raise UsageError("a recipe is a mapping with the keys model and stages")
    version = told.get("version", VERSION)
    if isinstance(version, int) and version > VERSION:
        raise UsageError(
            f"version {version} is of a newer sparsekit, this one reads up to {VERSION}",
            "update sparsekit",
        )
    draft = _Draft()
    for override in overrides:
        _override(told, override, draft)
    _check_top(told, draft)
    stages = told.get("stages")
    for number, stage in enumerate(stages if isinstance(stages, list) else []):
        _read_stage(number, stage, told, draft)
    _refuse_one_place(draft)
    if draft.errors:
        many = f"{len(draft.errors)} errors:\n  " if len(draft.errors) > 1 else ""
        raise UsageError(many + "\n  ".join(draft.errors))
    return Recipe(model=told["model"], steps=draft.steps, stages=len(stages), text=text)


def _override(told: dict[str, Any], override: str, draft: _Draft) -> None:
    """Replace a word, in the recipe that was read."""
    key, equals, text = override.partition("=")
    if not equals:
        draft.errors.append(f"{override!r}: write it as key=value")
        return
    value = read_yaml(text)
    verb, dot, word = key.partition(".")
    if not dot and key in ("model", "seed"):
        told[key] = value
        return
    if not dot or verb not in VERBS:
        hint = did_you_mean(verb, [*VERBS, "model", "seed"])
        draft.errors.append(f"{override!r}: write it as model=…, seed=… or VERB.WORD=…; {hint}")
        return
    written: list[dict[str, Any]] = []
    for stage in told.get("stages") or []:
        if isinstance(stage, dict) and verb in stage:
            stage[verb] = stage[verb] if stage[verb] is not None else {}
            given = stage[verb] if isinstance(stage[verb], list) else [stage[verb]]
            written += [one for one in given if isinstance(one, dict)]
    if not written:
        draft.errors.append(f"{override!r}: the recipe has no stage {verb!r} with words")
    # Where some variants have the word, others may have no use for it.
    having = [one for one in written if word in one or f"{word}s" in one]
    for one in having or written:
        one.pop(f"{word}s", None)  # which it stands in the place of
        one[word] = value


def _check_top(told: Mapping[str, Any], draft: _Draft) -> None:
    """What is wrong beside the stages."""
    for key in told:
        if key not in TOP:
            draft.errors.append(f"{key}: unknown; {did_you_mean(str(key), TOP)}")
    if not isinstance(told.get("version", VERSION), int):
        draft.errors.append(f"version: a number is wanted, not {told['version']!r}")
    if not isinstance(told.get("model"), str):
        draft.errors.append("model: the name of a model is wanted: a folder, a hub id or demo")
    seed = told.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        draft.errors.append(f"seed: a number that is not negative is wanted, not {seed!r}")
    if not isinstance(told.get("stages"), list) or not told["stages"]:
        draft.errors.append("stages: a list of stages is wanted, as - prune: {method: wanda}")


def _read_stage(number: int, stage: Any, told: Mapping[str, Any], draft: _Draft) -> None:
    """The steps of one stage."""
    path = f"stages[{number}]"
    stage = {stage: {}} if isinstance(stage, str) else stage
    if not isinstance(stage, dict):
        draft.errors.append(f"{path}: a stage is written as VERB: {{…}}")
        return
    verbs = [key for key in stage if key not in BESIDE]
    if len(verbs) != 1 or verbs[0] not in VERBS:
        wrong = next((verb for verb in verbs if verb not in VERBS), None)
        hint = did_you_mean(str(wrong), [*VERBS, *BESIDE]) if wrong is not None else ""
        what = f"unknown {wrong!r}; {hint}" if hint else "a stage has one verb"
        draft.errors.append(f"{path}: {what}")
        return
    (verb,) = verbs
    name = stage.get("name")
    if name is not None and not (isinstance(name, str) and re.fullmatch(r"[\w.+-]+", name)):
        draft.errors.append(f"{path}.name: letters, digits and .+-_ make a name, not {name!r}")
        return
    if name in draft.names or name == MODEL:
        draft.errors.append(f"{path}.name: {name!r} is taken")
        return
    parents = _parents(stage, number, path, told, draft)
    given = stage[verb] if stage[verb] is not None else {}
    for index, one in enumerate(given if isinstance(given, list) else [given]):
        place = f"{path}.{verb}[{index}]" if isinstance(given, list) else f"{path}.{verb}"
        if not isinstance(one, dict):
            draft.errors.append(f"{place}: words are written as {{key: value}}, not {one!r}")
        elif found := problems(verb, one, place):
            draft.errors += found
        else:
            for words in _all_words(verb, one, told):
                _add_steps(verb, words, one, parents, number, name, place, draft)
    if name is not None:
        draft.names[name] = number


def _all_words(
    verb: str, given: Mapping[str, Any], told: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """All words of each variant of a stage; the recipe's seed is that of every stage with one."""
    known = defaults(verb)
    shared = {"seed": told["seed"]} if "seed" in known and "seed" in told else {}
    for variant in variants(verb, given):
        words = known | shared | form(verb).model_validate(variant).model_dump(exclude_unset=True)
        for key in ("baseline", "dense", "teacher"):
            if words.get(key) == MODEL:
                words[key] = told.get("model")
        yield {key: list(v) if isinstance(v, tuple) else v for key, v in words.items()}


def _parents(
    stage: Mapping[str, Any], number: int, path: str, told: Mapping[str, Any], draft: _Draft
) -> list[str | None]:
    """The names of the steps whose outputs a stage reads."""
    start = stage.get("from")
    if start == MODEL:
        return [None]
    if start is None:
        made = [step for step in draft.steps if step.verb != "eval"]
        return [step.name for step in made if step.stage == made[-1].stage] or [None]
    if start in draft.names:
        found = [s.name for s in draft.steps if s.stage == draft.names[start] and s.verb != "eval"]
        if found:
            return list(found)
        draft.errors.append(f"{path}.from: {start!r} makes no model")
        return []
    later = [one.get("name") for one in told["stages"][number:] if isinstance(one, dict)]
    if start in later:
        draft.errors.append(f"{path}.from: {start!r} comes later, and would make a cycle")
    else:
        hint = did_you_mean(str(start), [*draft.names, MODEL])
        draft.errors.append(f"{path}.from: no stage has the name {start!r}; {hint}")
    return []


def _add_steps(
    verb: str,
    words: dict[str, Any],
    given: Mapping[str, Any],
    parents: Sequence[str | None],
    number: int,
    name: str | None,
    path: str,
    draft: _Draft,
) -> None:
    """A step for each of the models that a variant of a stage reads."""
    for parent in parents:
        before = draft.forms.get(parent, "plain")
        if before not in TAKES[verb]:
            draft.errors.append(f"{path}: {parent} is {before} by then, which {verb} does not take")
            continue
        label = _label(verb, words, given, name)
        own = (parent or MODEL) if verb == "eval" else f"{parent}.{label}" if parent else label
        step = Step(name=own, verb=verb, stage=number, words=words, parent=parent, path=path)
        try:
            config = step.config
        except SparsekitError as error:
            told = f"{path}: {error.message}" + (f"; {error.hint}" if error.hint else "")
            draft.errors += [] if told in draft.errors else [told]
            continue
        draft.steps.append(step)
        if verb != "eval":
            draft.forms[own] = _form_after(verb, config)


def _form_after(verb: str, config: Any) -> str:
    """The form of the model that a stage makes."""
    if verb == "pack":
        return "packed"
    coded = verb == "quantize" and config.format != "dense"
    return "quantized" if coded or getattr(config, "then", None) else "plain"


def _label(verb: str, words: Mapping[str, Any], given: Mapping[str, Any], name: str | None) -> str:
    """What a step adds to the name of its folder: its own name or method, and what is varied."""
    varied = [key.removesuffix("s") for key in given if key not in words]
    main = {"prune": "method", "recover": "method", "quantize": "grid"}.get(verb)
    first = name or (str(words[main] or "wanda") if main else verb)
    left = [key for key in varied if key != main or name is not None]
    text = "-".join([first, *(str(words[key]) for key in left)])
    return re.sub(r"[^\w.+-]+", "-", text.replace(":", "of").replace("%", "pct")).strip("-")


def _refuse_one_place(draft: _Draft) -> None:
    """Note where two steps would write to one folder."""
    places: dict[str, Step] = {}
    for step in draft.steps:
        other = places.setdefault(step.name, step) if step.verb != "eval" else step
        if other is not step:
            draft.errors.append(
                f"{step.path} and {other.path} both write to {step.name}: give one of the stages a "
                "name"
            )
