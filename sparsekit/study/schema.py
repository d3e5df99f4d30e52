"""The form of a recipe: YAML without traps, the words of each stage, and the schema for editors."""

from __future__ import annotations

import inspect
import itertools
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from io import StringIO
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import YAMLError

from sparsekit.errors import UsageError, did_you_mean
from sparsekit.pruning.config import prune_config
from sparsekit.quantization.config import quantize_config
from sparsekit.recovery.config import recover_config
from sparsekit.scoring.config import eval_config

VERSION = 1
TOP = ("version", "model", "seed", "stages")
# By verb, the function whose keywords are its words; None: it has no words.
VERBS: Mapping[str, Callable[..., Any] | None] = {
    "prune": prune_config,
    "recover": recover_config,
    "quantize": quantize_config,
    "pack": None,
    "eval": eval_config,
}
# What is said of a stage beside its verb.
BESIDE = ("name", "from")
# Words of a stage that a recipe has, and the configuration has not.
MORE = {"eval": {"baseline": (str | None, None)}}


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
        raise UsageError(f"not valid YAML: {str(error)[:80]}") from error
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark else ""
        reason = getattr(error, "problem", None) or str(error).split("\n")[0]
        raise UsageError(f"{place}not valid YAML: {reason}") from error


def write_yaml(value: Any) -> str:
    """A value as YAML that `read_yaml` reads as the same.

    Raises:
        UsageError: It holds what YAML has no form for.
    """
    text = StringIO()
    try:
        _yaml().dump(value, text)
    except YAMLError as error:
        raise UsageError(f"a recipe holds text, numbers and lists: {error}"[:200]) from error
    return text.getvalue()


def _yaml() -> YAML:
    """A reader and writer, of which each use needs a new one."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Texts
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    return yaml


def _fields(verb: str) -> dict[str, tuple[Any, Any]]:
    """The words of a verb with their types and defaults."""
    spell = VERBS[verb]
    found = dict(MORE.get(verb, {}))
    if spell is not None:
        types = typing.get_type_hints(spell)
        for name, parameter in inspect.signature(spell).parameters.items():
            found[name] = (types[name], parameter.default)
    return found


@lru_cache
def form(verb: str) -> Any:
    """The pydantic model of a verb's words."""
    from pydantic import ConfigDict, create_model

    # A word may be called as a method of pydantic's models is.
    config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())
    fields: dict[str, Any] = {name: told for name, told in _fields(verb).items()}
    return create_model(verb, __config__=config, **fields)


def defaults(verb: str) -> dict[str, Any]:
    """The words of a verb as they are when none is given."""
    return {name: default for name, (_, default) in _fields(verb).items()}


def variants(verb: str, given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The words of a stage, once for each combination of the values of its plurals.

    `methods: [wanda, sparsegpt]` stands for two variants, whose `method` is one of them.
    """
    known = _fields(verb)
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
    """What is wrong with the form of a stage's words, each with its place."""
    from pydantic import ValidationError

    known, found, told = _fields(verb), [], dict(given)
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
    for words_ in variants(verb, told):
        try:
            form(verb).model_validate(words_)
        except ValidationError as error:
            found += _told(error.errors(), known, path)
    return list(dict.fromkeys(found))


def _told(errors: Sequence[Mapping[str, Any]], known: Mapping[str, Any], path: str) -> list[str]:
    """What pydantic found, in our words; a word that may be of several types is told once."""
    by_key: dict[str, list[Mapping[str, Any]]] = {}
    for error in errors:
        by_key.setdefault(str(error["loc"][0]), []).append(error)
    found = []
    for key, same in by_key.items():
        if same[0]["type"] == "extra_forbidden":
            found.append(f"{path}.{key}: unknown; {did_you_mean(key, known)}")
        else:
            wanted = " or ".join(dict.fromkeys(error["msg"].lower() for error in same))
            given = same[0]["input"]
            found.append(f"{path}.{key}: {wanted}, not {given!r}")
    return found


def schema() -> dict[str, Any]:
    """The JSON schema of recipes, which editors check them by."""
    stages = []
    for verb in VERBS:
        told = form(verb).model_json_schema()
        told.pop("title", None)
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
