"""The steps that a stage of a recipe stands for: variants, names, order, and what is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sparsekit.checkpoint.kind import Kind, refusal
from sparsekit.errors import SparsekitError, did_you_mean
from sparsekit.pipeline.options import as_keywords
from sparsekit.registry import describe
from sparsekit.scoring.saved_scores import DENSE
from sparsekit.study.schema import BESIDE, VERBS, defaults, problems, variants

# What `from` calls the model that a recipe begins with, and a baseline too.
MODEL = "model"
# The file of a run that keeps its recipe, beside the folders of its steps.
RECIPE = "recipe.yaml"
# Names that stand for something else.
RESERVED = (MODEL, DENSE, RECIPE)
# A letter somewhere, so that it is no place of a stage; no dot first, as hidden files have.
NAME = r"(?=.*[A-Za-z_])[A-Za-z0-9_][\w.+-]{0,99}(?<!\.partial)"


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

    config: Any
    """What the words spell; None for a verb without any."""


@dataclass
class Draft:
    """A recipe while it is read."""

    errors: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)
    """The stages that were given names."""
    kinds: dict[str | None, Kind] = field(default_factory=lambda: {None: Kind.PLAIN})
    """Of each step by name, the kind of checkpoint that it makes."""


def read_stage(number: int, stage: Any, told: Mapping[str, Any], draft: Draft) -> None:
    """The steps of one stage."""
    path = f"stages[{number}]"
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
    if name is not None and not (isinstance(name, str) and re.fullmatch(NAME, name)):
        draft.errors.append(f"{path}.name: letters, digits and .+-_ make a name, not {name!r}")
        return
    if name in draft.names or name in RESERVED:
        draft.errors.append(f"{path}.name: {name!r} is taken")
        return
    if name is not None:
        draft.names[name] = number
    parents = _parents(stage, number, path, told, draft)
    given = stage[verb] if stage[verb] is not None else {}
    if given == []:
        draft.errors.append(f"{path}.{verb}: the list of variants is empty")
    for index, one in enumerate(given if isinstance(given, list) else [given]):
        place = f"{path}.{verb}[{index}]" if isinstance(given, list) else f"{path}.{verb}"
        if not isinstance(one, dict) or not all(isinstance(key, str) for key in one):
            draft.errors.append(f"{place}: words are written as {{key: value}}, not {one!r}")
        elif found := problems(verb, one, place):
            draft.errors += found
        else:
            for words in _all_words(verb, one, told):
                every = defaults(verb)
                _add_steps(
                    Step(
                        name=_label(verb, every | words, one, name),
                        verb=verb,
                        stage=number,
                        words=every | words,
                        parent=None,
                        path=place,
                        config=None,
                    ),
                    words,
                    parents,
                    draft,
                )


def _all_words(
    verb: str, given: Mapping[str, Any], told: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """The words of each variant of a stage; the recipe's seed is that of all that draw."""
    for variant in variants(verb, given):
        words = dict(variant)
        if "seed" in defaults(verb) and is_seed(told.get("seed")):
            words.setdefault("seed", told["seed"])
        for key in ("baseline", "dense", "teacher"):
            if words.get(key) == MODEL:
                words[key] = told.get("model")
        yield words


def is_seed(value: Any) -> bool:
    """Whether a value can seed what is drawn."""
    return type(value) is int and value >= 0


def _parents(
    stage: Mapping[str, Any], number: int, path: str, told: Mapping[str, Any], draft: Draft
) -> list[str | None]:
    """The names of the steps whose outputs a stage reads; what cannot be is noted."""
    start = stage.get("from")
    if start is not None and not isinstance(start, str):
        draft.errors.append(f"{path}.from: the name of a stage is wanted, not {start!r}")
        return []
    if start == MODEL:
        return [None]
    if start is None:
        made = [step for step in draft.steps if step.verb != "eval"]
        return [step.name for step in made if step.stage == made[-1].stage] or [None]
    if start in draft.names and draft.names[start] < number:
        found = [s.name for s in draft.steps if s.stage == draft.names[start] and s.verb != "eval"]
        if found:
            return list(found)
        if "eval" in told["stages"][draft.names[start]]:
            draft.errors.append(f"{path}.from: {start!r} makes no model")
        return []  # else what is wrong with that stage is told already
    later = [one.get("name") for one in told["stages"][number:] if isinstance(one, dict)]
    if start in later:
        draft.errors.append(f"{path}.from: {start!r} comes later, and would make a cycle")
    else:
        hint = did_you_mean(str(start), [*draft.names, MODEL])
        draft.errors.append(f"{path}.from: no stage has the name {start!r}; {hint}")
    return []


def _add_steps(
    variant: Step, words: Mapping[str, Any], parents: Sequence[str | None], draft: Draft
) -> None:
    """A step for each of the models that a variant of a stage reads; what cannot be is noted.

    Args:
        variant: With its own part of the name, no parent and no configuration.
        words: Those of its words that are given.
        parents: The steps that make those models; None: the recipe's own.
        draft: Gets the steps.
    """
    verb, path, label = variant.verb, variant.path, variant.name
    config, refused, model = None, "", VERBS[verb]
    try:
        config = None if model is None else model(**words)
    except SparsekitError as error:
        refused = f"{path}: {as_keywords(str(error))}"
    for parent in parents:
        unfit = refusal(verb, draft.kinds.get(parent, Kind.PLAIN), parent)
        wrong = [f"{path}: {unfit}"] if unfit else []
        own = (parent or MODEL) if verb == "eval" else f"{parent}.{label}" if parent else label
        wrong += [refused] if refused else []
        draft.errors += [told for told in wrong if told not in draft.errors]
        if wrong:
            continue
        draft.steps.append(replace(variant, name=own, parent=parent, config=config))
        if verb != "eval":
            draft.kinds[own] = _kind_after(verb, config)


def _kind_after(verb: str, config: Any) -> Kind:
    """The kind of checkpoint that a stage makes."""
    if verb == "pack":
        return Kind.PACKED
    if getattr(config, "format", None) == "factored":
        return Kind.FACTORED
    coded = verb == "quantize" and config.format != "dense"
    if coded or getattr(config, "then", None):
        return Kind.QUANTIZED
    return Kind.PRODUCTS if _keeps_factors(verb, config) else Kind.PLAIN


def _keeps_factors(verb: str, config: Any) -> bool:
    """Whether a stage keeps weights as factors."""
    if verb == "recover":
        return config.slorb is not None
    if verb != "prune":
        return False
    refiner = config.refiner and describe("refiners", config.refiner)
    return config.compensate != "none" or bool(refiner and refiner.factors)


def _label(verb: str, words: Mapping[str, Any], given: Mapping[str, Any], name: str | None) -> str:
    """What a step adds to the name of its folder: its own name or method, and what is varied."""
    varied = [key.removesuffix("s") for key in given if key not in words]
    main = {"prune": "method", "recover": "method", "quantize": "grid"}.get(verb)
    first = name or (str(words[main] or "wanda") if main else verb)
    left = [key for key in varied if key != main or name is not None]
    text = "-".join([first, *(str(words[key]) for key in left)])
    return re.sub(r"[^\w.+-]+", "-", text.replace(":", "of").replace("%", "pct")).strip("-")


def refuse_one_place(draft: Draft) -> None:
    """Note where two steps would write to one folder."""
    places: dict[str, Step] = {}
    for step in draft.steps:
        other = places.setdefault(step.name, step) if step.verb != "eval" else step
        if other is not step:
            draft.errors.append(
                f"{step.path} and {other.path} both write to {step.name}: give one of the stages a "
                "name, or write what differs under keys in the plural, as methods: [rtn]"
            )
