"""The form of a recipe: YAML without traps, the words of each stage, and the schema for editors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from io import StringIO
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import YAMLError

from sparsekit.errors import UsageError
from sparsekit.pipeline.options import Options, Problem, as_keywords
from sparsekit.pruning.config import PruneConfig
from sparsekit.quantization.config import QuantizeConfig
from sparsekit.recovery.config import RecoverConfig
from sparsekit.scoring.config import EvalConfig

VERSION = 1
TOP = ("version", "model", "seed", "stages")
# By verb, the model of its words; None: it has no words.
VERBS: Mapping[str, type[Options] | None] = {
    "prune": PruneConfig,
    "recover": RecoverConfig,
    "quantize": QuantizeConfig,
    "pack": None,
    "eval": EvalConfig,
}
# What is said of a stage beside its verb.
BESIDE = ("name", "from")


class _Texts(SafeConstructor):
    """Leaves a date as text."""


_Texts.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


def read_yaml(text: str) -> Any:
    """The value of a YAML 1.2 text: 2:4, 50%, yes and no are text, 1e-4 is a number.

    Raises:
        UsageError: It is not YAML, or a key comes twice; the line is told.
    """
    try:
        return _yaml().load(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not valid YAML: {str(error)[:80]}", code="invalid-yaml") from error
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark else ""
        reason = getattr(error, "problem", None) or str(error).split("\n")[0]
        raise UsageError(f"{place}not valid YAML: {reason}", code="invalid-yaml") from error


def write_yaml(value: Any) -> str:
    """A value as YAML that `read_yaml` reads as the same.

    Raises:
        UsageError: It holds what YAML has no form for.
    """
    text = StringIO()
    try:
        _yaml().dump(value, text)
    except YAMLError as error:
        message = f"a recipe holds text, numbers and lists: {error}"[:200]
        raise UsageError(message, code="not-yaml") from error
    return text.getvalue()


def _yaml() -> YAML:
    """A reader and writer, of which each use needs a new one."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Texts
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    return yaml


def defaults(verb: str) -> dict[str, Any]:
    """The words of a verb as they are when none is given."""
    config = VERBS[verb]
    words = {} if config is None else config.defaults()
    return {key: list(v) if isinstance(v, tuple) else v for key, v in words.items()}


def variants(verb: str, given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The words of a stage, once for each combination of the values of its plurals.

    `methods: [wanda, sparsegpt]` stands for two variants, whose `method` is one of them.
    """
    known = defaults(verb)
    plurals = {
        key: value
        for key, value in given.items()
        if key not in known and key.removesuffix("s") in known and key.endswith("s")
    }
    lists = {k: v for k, v in plurals.items() if isinstance(v, list) and v}
    plain = {key: value for key, value in given.items() if key not in lists}
    for values in itertools.product(*lists.values()):
        chosen = dict(zip((key.removesuffix("s") for key in lists), values, strict=True))
        yield {**plain, **chosen}


def problems(verb: str, given: Mapping[str, Any], path: str) -> list[str]:
    """What is wrong with the words of a stage, each with its place."""
    known, found, told = defaults(verb), [], dict(given)
    for key, value in given.items():
        single = key.removesuffix("s")
        if key not in known and single != key and single in known:
            if not isinstance(value, list) or not value:
                found.append(f"{path}.{key}: a list of values for {single!r} is wanted")
                del told[key]
            elif single in given:
                found.append(f"{path}: {single!r} and {key!r} are both there; leave out one")
            elif len({repr(one) for one in value}) < len(value):
                found.append(f"{path}.{key}: a value is there twice")
    config = VERBS[verb]
    for words in variants(verb, told):
        if config is None:
            found += [f"{path}.{key}: unknown; {verb} has no words" for key in words]
        else:
            found += [_told(problem, path) for problem in config.problems(words)]
    return list(dict.fromkeys(found))


def _told(problem: Problem, path: str) -> str:
    """A problem with its place."""
    return f"{path}.{problem.key}: {as_keywords(problem.reason)}"


def _json_schema(verb: str) -> dict[str, Any]:
    """The JSON schema of the words of a verb."""
    config = VERBS[verb]
    if config is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    found = config.model_json_schema()
    found.pop("title", None)
    return found


def schema() -> dict[str, Any]:
    """The JSON schema of recipes, which editors check them by."""
    stages = []
    for verb in VERBS:
        told = _json_schema(verb)
        single = dict(told.get("properties", {}))
        told["properties"] = single | {
            f"{name}s": {"type": "array", "minItems": 1, "items": one}
            for name, one in single.items()
            if f"{name}s" not in single
        }
        many = {"type": "array", "items": told, "minItems": 1}
        one_or_more = {"anyOf": [told, many, {"type": "null"}]}
        stages.append(
            {
                "type": "object",
                "properties": {verb: one_or_more, **{b: {"type": "string"} for b in BESIDE}},
                "required": [verb],
                "additionalProperties": False,
            }
        )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "sparsekit recipe",
        "type": "object",
        "properties": {
            "version": {"const": VERSION},
            "model": {"type": "string"},
            "seed": {"type": "integer", "minimum": 0},
            "stages": {
                "type": "array",
                "minItems": 1,
                "items": {"anyOf": [*stages, {"enum": list(VERBS)}]},
            },
        },
        "required": ["model", "stages"],
        "additionalProperties": False,
    }
