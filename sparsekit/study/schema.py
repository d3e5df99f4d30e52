"""Format of recipes: YAML, the options of each stage, and the JSON schema for editors."""

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
# Options model of each verb; None: the verb has no options.
VERBS: Mapping[str, type[Options] | None] = {
    "prune": PruneConfig,
    "recover": RecoverConfig,
    "quantize": QuantizeConfig,
    "pack": None,
    "eval": EvalConfig,
}
# Keys of a stage other than its verb.
BESIDE = ("name", "from")


class _Texts(SafeConstructor):
    """Constructor that reads dates as text."""


_Texts.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


def read_yaml(text: str) -> Any:
    """Parse YAML 1.2: 2:4, 50%, yes and no are text, 1e-4 is a number.

    Raises:
        UsageError: The text is not YAML, or a key occurs twice; the message names the line.
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
    """A value as YAML that `read_yaml` reads back unchanged.

    Raises:
        UsageError: The value cannot be written as YAML.
    """
    text = StringIO()
    try:
        _yaml().dump(value, text)
    except YAMLError as error:
        message = f"a recipe holds text, numbers and lists: {error}"[:200]
        raise UsageError(message, code="not-yaml") from error
    return text.getvalue()


def _yaml() -> YAML:
    """A YAML reader and writer for one use."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Texts
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    return yaml


def defaults(verb: str) -> dict[str, Any]:
    """Default options of a verb."""
    config = VERBS[verb]
    words = {} if config is None else config.defaults()
    return {key: list(v) if isinstance(v, tuple) else v for key, v in words.items()}


def variants(verb: str, given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Options of a stage for each combination of its plural keys.

    `methods: [wanda, sparsegpt]` gives two variants with one `method` each.
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
    """Problems with the options of a stage, each with its place."""
    known, found, usable = defaults(verb), [], dict(given)
    for key, value in given.items():
        single = key.removesuffix("s")
        if key not in known and single != key and single in known:
            if not isinstance(value, list) or not value:
                found.append(f"{path}.{key}: needs a list of values for {single!r}")
                del usable[key]
            elif single in given:
                found.append(f"{path}: {single!r} and {key!r} are both given; leave out one")
            elif len({repr(entry) for entry in value}) < len(value):
                found.append(f"{path}.{key}: a value is given twice")
    config = VERBS[verb]
    for words in variants(verb, usable):
        if config is None:
            found += [f"{path}.{key}: unknown; {verb} has no options" for key in words]
        else:
            found += [_located(problem, path) for problem in config.problems(words)]
    return list(dict.fromkeys(found))


def _located(problem: Problem, path: str) -> str:
    """A problem with its place."""
    return f"{path}.{problem.key}: {as_keywords(problem.reason)}"


def _json_schema(verb: str) -> dict[str, Any]:
    """JSON schema of the options of a verb."""
    config = VERBS[verb]
    if config is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    options = config.model_json_schema()
    options.pop("title", None)
    return options


def schema() -> dict[str, Any]:
    """JSON schema of recipes for editors."""
    stages = []
    for verb in VERBS:
        options = _json_schema(verb)
        single = dict(options.get("properties", {}))
        options["properties"] = single | {
            f"{name}s": {"type": "array", "minItems": 1, "items": value}
            for name, value in single.items()
            if f"{name}s" not in single
        }
        many = {"type": "array", "items": options, "minItems": 1}
        one_or_more = {"anyOf": [options, many, {"type": "null"}]}
        stages.append(
            {
                "type": "object",
                "properties": {verb: one_or_more, **{key: {"type": "string"} for key in BESIDE}},
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
