"""A recipe: which stages are done to a model, in which variants, checked before all else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekit.checkpoint.entry import History
from sparsekit.errors import DataError, UsageError, did_you_mean
from sparsekit.files import read_json
from sparsekit.provenance.history import command, lineage
from sparsekit.study.schema import TOP, VERBS, VERSION, defaults, read_yaml, write_yaml
from sparsekit.study.steps import MODEL, Draft, Step, is_seed, read_stage, refuse_one_place

# In a checkout a link to the folder of the same name at its top.
SHIPPED = Path(__file__).parents[1] / "recipes"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A checked recipe."""

    model: str
    steps: Sequence[Step]
    """In an order in which each comes after what it reads."""
    stages: int
    names: Mapping[str, int]
    """The stages that were given names."""
    text: str
    """The recipe as written."""

    def steps_of(self, name: str) -> list[Step]:
        """The steps that a word names: a step, or all steps of a stage by its place, verb or name.

        Raises:
            UsageError: There is none, or there are several stages.
        """
        makers = [step for step in self.steps if step.verb != "eval"]  # others bear their names
        if found := [step for step in makers if step.name == name]:
            return found
        stages = {step.stage for step in self.steps if name in (step.verb, str(step.stage))}
        stages = {self.names[name]} if name in self.names else stages
        if len(stages) == 1:
            return [step for step in self.steps if step.stage in stages]
        known = sorted({s.verb for s in self.steps} | {s.name for s in makers} | set(self.names))
        reason = "names several stages" if stages else "names no stage"
        hint = f"stages are counted from 0 to {self.stages - 1}; " + did_you_mean(name, known)
        raise UsageError(
            f"--from {name} {reason}", hint, code="ambiguous-stage" if stages else "no-stage"
        )


def read_recipe(file: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, with some of its words replaced.

    Args:
        file: A YAML file, or the `sparsekit.json` of a checkpoint: its stages, as they were given.
        overrides: As `model=demo` or `prune.samples=8`, the latter where the word is, else in all
            stages of the verb.

    Raises:
        DataError: The file cannot be read.
        UsageError: Lists all errors, each with its place.
    """
    if file.suffix == ".json" and "history" in read_json(file):
        repeated = _repeated(file)
        return checked(repeated, write_yaml(repeated), overrides)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise DataError(
            f"the recipe {file} cannot be read: {reason}", code="cannot-read"
        ) from error
    try:
        return parse(text, overrides)
    except UsageError as error:
        raise UsageError(f"{file}: {error.message}", error.hint, code=error.code) from error


def _repeated(file: Path) -> dict[str, Any]:
    """The recipe that repeats the stages of a history.

    Raises:
        UsageError: A stage is one that recipes do not have.
        DataError: There is no stage, or no history that this version reads.
    """
    entries = lineage(History.read(file).history)
    if not entries:
        raise DataError(f"{file} has no stage to repeat", code="no-history")
    stages = []
    for entry in entries:
        verb, words = entry.stage, dict(entry.words)
        if verb not in VERBS:
            raise UsageError(
                f"{file}: a recipe has no stage {verb!r}",
                f"repeat it with: {command(entry)}",
                code="not-repeatable",
            )
        for key in ("dense", "teacher"):  # in a recipe this word means its model
            if words.get(key) == MODEL:
                words[key] = f"./{MODEL}"
        stages.append({verb: words})
    return {"version": VERSION, "model": entries[0].model, "stages": stages}


def parse(text: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a text; arguments and errors are those of `read_recipe`."""
    return checked(read_yaml(text), text, overrides)


def checked(mapping: Any, text: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML value; `text` is how it was written.

    Raises:
        UsageError: Lists all errors, each with its place.
    """
    if not isinstance(mapping, dict):
        raise UsageError(
            "a recipe is a mapping with the keys model and stages", code="invalid-recipe"
        )
    version = mapping.get("version", VERSION)
    if type(version) is int and version > VERSION:
        raise UsageError(
            f"version {version} was written for a newer sparsekit; this one reads up to {VERSION}",
            "update sparsekit",
            code="newer-version",
        )
    draft, stages = Draft(), mapping.get("stages")
    stages = list(stages) if isinstance(stages, list) else []
    stages = [{stage: {}} if isinstance(stage, str) else stage for stage in stages]
    for override in overrides:
        _override(mapping, stages, override, draft)
    _check_top(mapping, draft)
    for number, stage in enumerate(stages):
        read_stage(number, stage, {**mapping, "stages": stages}, draft)
    refuse_one_place(draft)
    if draft.errors:
        many = f"{len(draft.errors)} errors:\n  " if len(draft.errors) > 1 else ""
        raise UsageError(many + "\n  ".join(draft.errors), code="invalid-recipe")
    return Recipe(
        model=mapping["model"],
        steps=draft.steps,
        stages=len(stages),
        names=draft.names,
        text=write_yaml({**mapping, "stages": stages}) if overrides else text,
    )


def _override(mapping: dict[str, Any], stages: Sequence[Any], override: str, draft: Draft) -> None:
    """Replace a word, in the recipe that was read."""
    key, equals, text = override.partition("=")
    try:
        value = read_yaml(text)
    except UsageError as error:
        draft.errors.append(f"{override!r}: {error.message}")
        return
    verb, dot, word = key.partition(".")
    if not dot and equals and key in ("model", "seed"):
        mapping[key] = value
        return
    if not dot or not equals or verb not in VERBS:
        hint = did_you_mean(verb, [*VERBS, "model", "seed"])
        draft.errors.append(f"{override!r}: write it as model=…, seed=… or VERB.WORD=…; {hint}")
        return
    if isinstance(defaults(verb).get(word), list | tuple) and not isinstance(value, list | dict):
        value = [value]  # as on the command line, where the flag can be given again
    written: list[dict[str, Any]] = []
    for stage in stages:
        if isinstance(stage, dict) and verb in stage:
            stage[verb] = stage[verb] if stage[verb] is not None else {}
            given = stage[verb] if isinstance(stage[verb], list) else [stage[verb]]
            written += [one for one in given if isinstance(one, dict)]
    if not written:
        draft.errors.append(f"{override!r}: the recipe has no stage {verb!r} with words")
    # Where some have the word, others may have no use for it.
    having = [one for one in written if word in one or f"{word}s" in one]
    for one in having or written:
        one.pop(f"{word}s", None)  # which it replaces
        if word.endswith("s"):
            one.pop(word.removesuffix("s"), None)
        one[word] = value


def _check_top(mapping: Mapping[str, Any], draft: Draft) -> None:
    """Refuse mistakes outside the stages."""
    for key in mapping:
        if key not in TOP:
            draft.errors.append(f"{key}: unknown; {did_you_mean(str(key), TOP)}")
    if type(mapping.get("version", VERSION)) is not int or mapping.get("version", VERSION) < 1:
        draft.errors.append(f"version: must be a number, not {mapping['version']!r}")
    if not isinstance(mapping.get("model"), str):
        draft.errors.append("model: the name of a model is wanted: a folder, a hub id or demo")
    if "seed" in mapping and not is_seed(mapping["seed"]):
        draft.errors.append(f"seed: must be a number that is not negative, not {mapping['seed']!r}")
    if not isinstance(mapping.get("stages"), list) or not mapping["stages"]:
        draft.errors.append("stages: a list of stages is wanted, as - prune: {method: wanda}")


def shipped() -> dict[str, Path]:
    """The files of all recipes, by name.

    Raises:
        DataError: The installation lacks them.
    """
    if found := {file.stem: file for file in sorted(SHIPPED.glob("*.yaml"))}:
        return found
    raise DataError(
        f"the recipes are not in {SHIPPED}",
        "install sparsekit again",
        code="incomplete-installation",
    )


def recipe_file(word: str) -> Path:
    """The file of a recipe: a path, or the name of one that is shipped.

    Raises:
        UsageError: There is no such recipe.
    """
    path = Path(word)
    if path.is_file():
        return path
    known = shipped()
    if word in known:
        return known[word]
    if path.suffix in (".yaml", ".yml") or "/" in word:
        raise UsageError(f"no such recipe: {word}", "see 'sparsekit recipe ls'", code="no-recipe")
    raise UsageError(f"no recipe {word!r}", did_you_mean(word, known), code="no-recipe")


def summary(file: Path) -> str:
    """The summary of a recipe in its first line."""
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()
