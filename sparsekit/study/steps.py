"""Steps of a recipe's stages: variants, names, order and problems."""

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

# Name of the recipe's model in `from` and `baseline`.
MODEL = "model"
# File of a run with its recipe, next to the folders of its steps.
RECIPE = "recipe.yaml"
# Names with another meaning.
RESERVED = (MODEL, DENSE, RECIPE)
# With a letter, so that it is not the number of a stage, and without a leading dot.
NAME = r"(?=.*[A-Za-z_])[A-Za-z0-9_][\w.+-]{0,99}(?<!\.partial)"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One variant of a stage, applied to one model."""

    name: str
    """Folder within the run's folder; for `eval` the folder to measure."""
    verb: str
    stage: int
    """Index of the stage in the recipe."""
    words: Mapping[str, Any]
    """All options of the verb."""
    parent: str | None
    """Name of the step whose output it reads; None: the recipe's model."""
    path: str
    """Place in the recipe, e.g. `stages[0].prune`."""
    config: Any
    """Parsed options; None for a verb without options."""


@dataclass
class Draft:
    """A recipe while it is being read."""

    errors: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)
    """Stages by their given names."""
    kinds: dict[str | None, Kind] = field(default_factory=lambda: {None: Kind.PLAIN})
    """Kind of checkpoint that each step makes."""


def read_stage(number: int, stage: Any, recipe: Mapping[str, Any], draft: Draft) -> None:
    """Add the steps of one stage to the draft."""
    path = f"stages[{number}]"
    if not isinstance(stage, dict):
        draft.errors.append(f"{path}: a stage is written as VERB: {{…}}")
        return
    verbs = [key for key in stage if key not in BESIDE]
    if len(verbs) != 1 or verbs[0] not in VERBS:
        wrong = next((verb for verb in verbs if verb not in VERBS), None)
        hint = did_you_mean(str(wrong), [*VERBS, *BESIDE]) if wrong is not None else ""
        problem = f"unknown {wrong!r}; {hint}" if hint else "a stage has one verb"
        draft.errors.append(f"{path}: {problem}")
        return
    (verb,) = verbs
    name = stage.get("name")
    if name is not None and not (isinstance(name, str) and re.fullmatch(NAME, name)):
        draft.errors.append(
            f"{path}.name: a name has a letter, and letters, digits and .+-_ only, not {name!r}"
        )
        return
    if name in draft.names or name in RESERVED:
        draft.errors.append(f"{path}.name: {name!r} is taken")
        return
    if name is not None:
        draft.names[name] = number
    parents = _parents(stage, number, path, recipe, draft)
    given = stage[verb] if stage[verb] is not None else {}
    if given == []:
        draft.errors.append(f"{path}.{verb}: the list of variants is empty")
    for index, options in enumerate(given if isinstance(given, list) else [given]):
        place = f"{path}.{verb}[{index}]" if isinstance(given, list) else f"{path}.{verb}"
        if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
            draft.errors.append(f"{place}: options are written as {{key: value}}, not {options!r}")
        elif found := problems(verb, options, place):
            draft.errors += found
        else:
            for words in _all_words(verb, options, recipe):
                every = defaults(verb)
                _add_steps(
                    Step(
                        name=_label(verb, every | words, options, name),
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
    verb: str, given: Mapping[str, Any], recipe: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Options of each variant of a stage; the recipe's seed is the default of `seed`."""
    for variant in variants(verb, given):
        words = dict(variant)
        if "seed" in defaults(verb) and is_seed(recipe.get("seed")):
            words.setdefault("seed", recipe["seed"])
        for key in ("baseline", "dense", "teacher"):
            if words.get(key) == MODEL:
                words[key] = recipe.get("model")
        yield words


def is_seed(value: Any) -> bool:
    """Whether a value is a valid seed."""
    return type(value) is int and value >= 0


def _parents(
    stage: Mapping[str, Any], number: int, path: str, recipe: Mapping[str, Any], draft: Draft
) -> list[str | None]:
    """Names of the steps whose outputs a stage reads; problems go to the draft."""
    start = stage.get("from")
    if start is not None and not isinstance(start, str):
        draft.errors.append(f"{path}.from: the name of a stage, not {start!r}")
        return []
    if start == MODEL:
        return [None]
    if start is None:
        writers = [step for step in draft.steps if step.verb != "eval"]
        return [step.name for step in writers if step.stage == writers[-1].stage] or [None]
    if start in draft.names and draft.names[start] < number:
        found = [s.name for s in draft.steps if s.stage == draft.names[start] and s.verb != "eval"]
        if found:
            return list(found)
        if "eval" in recipe["stages"][draft.names[start]]:
            draft.errors.append(f"{path}.from: {start!r} makes no model")
        return []  # the problem of that stage is reported already
    later = [s.get("name") for s in recipe["stages"][number:] if isinstance(s, dict)]
    if start in later:
        draft.errors.append(f"{path}.from: {start!r} comes later, which would make a cycle")
    else:
        hint = did_you_mean(str(start), [*draft.names, MODEL])
        draft.errors.append(f"{path}.from: no stage has the name {start!r}; {hint}")
    return []


def _add_steps(
    variant: Step, words: Mapping[str, Any], parents: Sequence[str | None], draft: Draft
) -> None:
    """Add a step for each model that a variant reads; problems go to the draft.

    Args:
        variant: The step without parent and configuration, named for itself only.
        words: Given options.
        parents: Steps that make the models; None: the recipe's model.
        draft: Receives the steps.
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
        folder = (parent or MODEL) if verb == "eval" else f"{parent}.{label}" if parent else label
        wrong += [refused] if refused else []
        draft.errors += [problem for problem in wrong if problem not in draft.errors]
        if wrong:
            continue
        draft.steps.append(replace(variant, name=folder, parent=parent, config=config))
        if verb != "eval":
            draft.kinds[folder] = _kind_after(verb, config)


def _kind_after(verb: str, config: Any) -> Kind:
    """Kind of checkpoint that a stage makes."""
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
    """Part of a folder's name for a step: its name or method, and the varied options."""
    varied = [key.removesuffix("s") for key in given if key not in words]
    main = {"prune": "method", "recover": "method", "quantize": "grid"}.get(verb)
    first = name or (str(words[main] or "wanda") if main else verb)
    left = [key for key in varied if key != main or name is not None]
    text = "-".join([first, *(str(words[key]) for key in left)])
    return re.sub(r"[^\w.+-]+", "-", text.replace(":", "of").replace("%", "pct")).strip("-")


def refuse_one_place(draft: Draft) -> None:
    """Add an error for two steps that write to one folder."""
    places: dict[str, Step] = {}
    for step in draft.steps:
        other = places.setdefault(step.name, step) if step.verb != "eval" else step
        if other is not step:
            draft.errors.append(
                f"{step.path} and {other.path} both write to {step.name}: give one of the stages a "
                "name, or write the differing options under plural keys, e.g. methods: [rtn]"
            )
