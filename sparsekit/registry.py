"""Registry of methods: their names, descriptions and options, read from the files of the folders.

The files are parsed, not imported, so listing methods and refusing a wrong option needs no torch.
"""

import ast
import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsekit.errors import UsageError, did_you_mean

# The folder of each kind, relative to this file.
FOLDERS = {
    "pruners": "pruning/methods",
    "refiners": "pruning/refiners",
    "recoverers": "recovery/methods",
    "quantizers": "quantization/methods",
}
# Sections of a method's docstring, after its title.
SECTIONS = ("Source", "Differs", "Cost", "Result")
# Spellings of a boolean option.
BOOLS = {"yes": True, "no": False, "true": True, "false": False}


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of a method: a field of its dataclass."""

    name: str
    type: str
    default: str
    help: str

    @property
    def choices(self) -> tuple[str, ...]:
        """The words of a closed choice; empty for numbers."""
        if self.type == "bool":
            return tuple(BOOLS)
        is_literal = self.type.startswith("Literal[")
        return ast.literal_eval(self.type.removeprefix("Literal")) if is_literal else ()


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method as its file describes it."""

    name: str
    kind: str
    summary: str
    source: str
    """Paper and reference code."""
    differs: str
    """Deviations from the source; empty without any."""
    cost: str
    """Computation and memory per weight."""
    result: str
    """A measured result; empty without one."""
    data_free: bool
    """Whether a pruner or quantizer needs no calibration."""
    options: tuple[Option, ...]
    initial: str = ""
    """The pruner that a refiner starts from by default."""
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Named sets of a refiner's options."""
    unlimited: Mapping[str, Any] = field(default_factory=dict)
    """Options with which a refiner runs until a time limit ends it."""
    factors: bool = False
    """Whether a refiner stores weights as factors, with blocks of side `block_size`."""


def names(kind: str) -> list[str]:
    """Names of all methods of a kind (`pruners`, `refiners`, `recoverers`, `quantizers`)."""
    return sorted(file.stem for file in _folder(kind).glob("*.py") if file.stem != "__init__")


def describe(kind: str, name: str) -> Method:
    """Description of a method, from its file.

    Raises:
        UsageError: There is no such method.
    """
    if name not in names(kind):
        known = names(kind)
        message = f"there is no method {name!r} among the {kind}"
        raise UsageError(message, did_you_mean(name, known), code="no-method")
    tree = ast.parse((_folder(kind) / f"{name}.py").read_text(encoding="utf-8"))
    text = ast.get_docstring(tree) or ""
    summary = text.partition("\n")[0]
    body = _method_class(tree).body
    return Method(
        name=name,
        kind=kind,
        summary=(summary.partition(": ")[2] or summary).removesuffix("."),
        source=_section(text, "Source"),
        differs=_section(text, "Differs"),
        cost=_section(text, "Cost"),
        result=_section(text, "Result"),
        data_free=kind in ("pruners", "quantizers")
        and not any("needs" in (_field(n), getattr(n, "name", "")) for n in body),
        options=tuple(_options(body)),
        initial=_constant(body, "initial") or "",
        presets=_constant(body, "presets") or {},
        unlimited=_constant(body, "unlimited") or {},
        factors=any(getattr(node, "name", "") == "block_size" for node in body),
    )


def find(name: str) -> Method:
    """Description of the method of any kind.

    Raises:
        UsageError: There is no such method.
    """
    kinds = {method: kind for kind in FOLDERS for method in names(kind)}
    if name not in kinds:
        raise UsageError(
            f"there is no method {name!r}", did_you_mean(name, kinds), code="no-method"
        )
    return describe(kinds[name], name)


def load(
    kind: str,
    name: str,
    options: Mapping[str, str],
    preset: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Any:
    """The method with options given as text; `defaults` override its own defaults.

    Raises:
        UsageError: There is no such method or option, or a value does not fit its type.
    """
    values = {**(defaults or {}), **check(kind, name, options, preset)}
    module = importlib.import_module(f"sparsekit.{FOLDERS[kind].replace('/', '.')}.{name}")
    return getattr(module, name.capitalize())(**values)


def check(
    kind: str, name: str, options: Mapping[str, str], preset: str | None = None
) -> dict[str, Any]:
    """The values of options, without importing the method.

    Args:
        kind: The kind of method.
        name: The method.
        options: Values as text, by name; they override those of the preset.
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
            raise UsageError(f"{name} has no preset {preset!r}", hint, code="no-preset")
        values |= method.presets[preset]
    for key, text in options.items():
        if key not in known:
            hint = did_you_mean(key, known) if known else f"{name} has no options"
            raise UsageError(f"{name} has no option {key!r}", hint, code="no-option")
        values[key] = _parse(text, known[key], name)
    return values


def as_text(value: Any) -> str:
    """An option's value as written on the command line."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _parse(text: str, option: Option, method: str) -> Any:
    title, hint = f"option {option.name} of {method}", f"its default is {option.default}"
    if choices := option.choices:
        if text not in choices:
            message = f"{title} must be one of {', '.join(choices)}, not {text!r}"
            raise UsageError(message, hint, code="not-a-choice")
        return BOOLS[text] if option.type == "bool" else text
    if option.type == "str":
        return text
    kind, noun = {"int": (int, "a whole number"), "float": (float, "a number")}[option.type]
    try:
        value = kind(text)
    except ValueError as error:
        message = f"{title} must be {noun}, not {text!r}"
        raise UsageError(message, hint, code="not-a-number") from error
    if not 0 <= value < float("inf"):
        raise UsageError(f"{title} must not be negative, not {text}", hint, code="out-of-range")
    return value


def _section(text: str, title: str) -> str:
    """A section of a docstring, such as `Source:`, on one line; empty without it."""
    match = re.search(rf"^{title}:(.*?)(?=^(?:{'|'.join(SECTIONS)}):|\Z)", text, re.S | re.M)
    return " ".join(match[1].split()) if match else ""


def _folder(kind: str) -> Path:
    return Path(__file__).parent / FOLDERS[kind]


def _constant(body: list[ast.stmt], name: str) -> Any:
    """The literal value of a class variable; None without one."""
    for node in body:
        if _field(node) == name and isinstance(node, ast.AnnAssign) and node.value:
            return ast.literal_eval(node.value)
    return None


def _method_class(tree: ast.Module) -> ast.ClassDef:
    """The class that derives from the abstract class of its kind."""
    classes = (n for n in tree.body if isinstance(n, ast.ClassDef))
    kinds = ("Pruner", "Refiner", "Recoverer", "Quantizer")
    return next(n for n in classes if any(ast.unparse(b) in kinds for b in n.bases))


def _options(body: list[ast.stmt]) -> list[Option]:
    options = []
    for node, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or "ClassVar" in ast.unparse(node.annotation):
            continue
        text = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = " ".join(str(following.value.value).split())
        options.append(
            Option(
                name=_field(node),
                type=ast.unparse(node.annotation),
                default=_default(node.value) if node.value else "",
                help=text,
            )
        )
    return options


def _default(value: ast.expr) -> str:
    """A default as in the source; booleans as `yes` and `no`."""
    if isinstance(value, ast.Constant) and isinstance(value.value, bool):
        return as_text(value.value)
    return ast.unparse(value)


def _field(node: ast.stmt) -> str:
    named = isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    return node.target.id if named else ""
