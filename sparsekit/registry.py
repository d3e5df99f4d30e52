"""The folder is the registry: which methods there are, and their options, without importing them.

The files are parsed, not run, so that listing methods and refusing a wrong option needs no torch.
"""

import ast
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsekit.errors import UsageError, did_you_mean

# The folder of each kind, from this file's.
FOLDERS = {
    "pruners": "pruning/methods",
    "refiners": "pruning/refiners",
    "recoverers": "recovery/methods",
    "quantizers": "quantization/methods",
}
# How an option that holds or does not is given.
BOOLS = {"yes": True, "no": False, "true": True, "false": False}


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of a method: a field of its dataclass."""

    name: str
    type: str
    default: str
    help: str


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a method's file says of it."""

    name: str
    kind: str
    summary: str
    source: str
    data_free: bool
    """Of a pruner or quantizer: it needs no calibration."""
    options: tuple[Option, ...]
    initial: str = ""
    """The method that a refiner begins with by default."""
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Named sets of options, of a refiner."""
    unlimited: Mapping[str, Any] = field(default_factory=dict)
    """Options of a refiner with which only a time limit ends it."""
    factors: bool = False
    """Of a refiner: it keeps weights as factors, whose sides it tells by `block_size`."""


def names(kind: str) -> list[str]:
    """The names of all methods of a kind (`pruners`, `refiners`, `recoverers`, `quantizers`)."""
    return sorted(file.stem for file in _folder(kind).glob("*.py") if file.stem != "__init__")


def describe(kind: str, name: str) -> Method:
    """What a method's file says of it.

    Raises:
        UsageError: There is no such method.
    """
    if name not in names(kind):
        raise UsageError(f"no method {name!r} among the {kind}", did_you_mean(name, names(kind)))
    tree = ast.parse((_folder(kind) / f"{name}.py").read_text(encoding="utf-8"))
    text = ast.get_docstring(tree) or ""
    summary, _, rest = text.partition("\n")
    source = rest.partition("Source:")[2].partition("Differs:")[0]
    body = _method_class(tree).body
    return Method(
        name=name,
        kind=kind,
        summary=summary.partition(": ")[2] or summary,
        source=" ".join(source.split()),
        data_free=kind in ("pruners", "quantizers")
        and not any("needs" in (_field(n), getattr(n, "name", "")) for n in body),
        options=tuple(_options(body)),
        initial=_constant(body, "initial") or "",
        presets=_constant(body, "presets") or {},
        unlimited=_constant(body, "unlimited") or {},
        factors=any(getattr(node, "name", "") == "block_size" for node in body),
    )


def load(
    kind: str,
    name: str,
    options: Mapping[str, str],
    preset: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Any:
    """The method, with options given as text; `defaults` go before its own.

    Raises:
        UsageError: There is no such method or option, or a value does not fit its type.
    """
    values = {**(defaults or {}), **check(kind, name, options, preset)}
    module = importlib.import_module(f"sparsekit.{FOLDERS[kind].replace('/', '.')}.{name}")
    return getattr(module, name.capitalize())(**values)


def check(
    kind: str, name: str, options: Mapping[str, str], preset: str | None = None
) -> dict[str, Any]:
    """The options' values, without importing the method.

    Args:
        kind: The kind of method.
        name: The method.
        options: Values as text, by name; they go before those of the preset.
        preset: A named set of options.

    Raises:
        UsageError: There is no such method, option or preset, or a value does not fit its type.
    """
    method = describe(kind, name)
    known = {option.name: option for option in method.options}
    values: dict[str, Any] = {}
    if preset is not None:
        if preset not in method.presets:
            hint = did_you_mean(preset, method.presets) if method.presets else "leave it out"
            raise UsageError(f"{name} has no preset {preset!r}", hint)
        values |= method.presets[preset]
    for key, text in options.items():
        if key not in known:
            hint = did_you_mean(key, known) if known else f"{name} has no options"
            raise UsageError(f"{name} has no option {key!r}", hint)
        values[key] = _parse(text, known[key], name)
    return values


def as_text(value: Any) -> str:
    """The value of an option as it is written on the command line."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _parse(text: str, option: Option, method: str) -> Any:
    kinds = {"int": int, "float": float, "str": str}
    if option.type == "bool":
        if text not in BOOLS:
            raise UsageError(
                f"option {option.name} of {method} is one of {', '.join(BOOLS)}, not {text!r}",
                f"its default is {option.default}",
            )
        return BOOLS[text]
    if option.type.startswith("Literal["):
        choices = ast.literal_eval(option.type.removeprefix("Literal"))
        if text not in choices:
            raise UsageError(
                f"option {option.name} of {method} is one of {', '.join(choices)}, not {text!r}",
                f"its default is {option.default}",
            )
        return text
    try:
        value = kinds[option.type](text)
    except ValueError as error:
        raise UsageError(
            f"option {option.name} of {method} takes {option.type}, not {text!r}",
            f"its default is {option.default}",
        ) from error
    if isinstance(value, int | float) and not 0 <= value < float("inf"):
        raise UsageError(
            f"option {option.name} of {method} must be a number at or above 0, not {text}",
            f"its default is {option.default}",
        )
    return value


def _folder(kind: str) -> Path:
    return Path(__file__).parent / FOLDERS[kind]


def _constant(body: list[ast.stmt], name: str) -> Any:
    """The literal that a class variable is set to; None without one."""
    for node in body:
        if _field(node) == name and isinstance(node, ast.AnnAssign) and node.value:
            return ast.literal_eval(node.value)
    return None


def _method_class(tree: ast.Module) -> ast.ClassDef:
    """The one class that derives from the abstract class of its kind."""
    classes = (n for n in tree.body if isinstance(n, ast.ClassDef))
    kinds = ("Pruner", "Refiner", "Recoverer", "Quantizer")
    return next(n for n in classes if any(ast.unparse(b) in kinds for b in n.bases))


def _options(body: list[ast.stmt]) -> list[Option]:
    found = []
    for node, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or "ClassVar" in ast.unparse(node.annotation):
            continue
        text = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = " ".join(str(following.value.value).split())
        found.append(
            Option(
                name=_field(node),
                type=ast.unparse(node.annotation),
                default=_default(node.value) if node.value else "",
                help=text,
            )
        )
    return found


def _default(value: ast.expr) -> str:
    """A default as the source has it, and truth values as they are given."""
    if isinstance(value, ast.Constant) and isinstance(value.value, bool):
        return as_text(value.value)
    return ast.unparse(value)


def _field(node: ast.stmt) -> str:
    named = isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    return node.target.id if named else ""
