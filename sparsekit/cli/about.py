"""The verbs `env` and `methods`, and the text of `--version`."""

import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from sparsekit import registry
from sparsekit.cli import complete
from sparsekit.cli.console import Terminal
from sparsekit.cli.options import Debug, Json, Quiet


def version_text() -> str:
    """The version in the first line, for scripts, followed by those of the libraries."""
    from sparsekit.provenance.environment import package_versions

    versions = package_versions()
    first = versions.pop("sparsekit")
    return "\n".join([first, *(f"{name} {version}" for name, version in versions.items())])


def env(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Show versions and machine for a bug report, without names, keys or home directory.

    Example: sparsekit env
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working():
        from sparsekit.provenance.environment import environment

        _show(terminal, environment())


def _show(terminal: Terminal, found: dict[str, Any]) -> None:
    """A table for people; stdout has a line for each row unless it is the terminal itself."""
    devices = (
        f"{device['name']}, {_size(device['memory_bytes'])}" for device in found["cuda_devices"]
    )
    rows = [
        *found["versions"].items(),
        ("platform", found["platform"]),
        ("processor", found["processor"]),
        ("CPUs", f"{found['cpus_usable']} of {found['cpus']}"),
        ("threads of torch", found["threads"] or f"torch fails: {found['torch_error']}"),
        ("CUDA of torch", found["cuda"] or "none"),
        ("CUDA devices", "; ".join(devices) or "none"),
        ("memory", f"{_size(found['memory_free_bytes'])} of {_size(found['memory_bytes'])} free"),
        ("cache", f"{found['cache']}, {_size(found['cache_free_bytes'])} free"),
        *found["variables"].items(),
    ]
    terminal.table("environment", ("", ""), rows)
    if terminal.json or terminal.quiet or not sys.stdout.isatty():
        terminal.result("\n".join(f"{name}\t{value}" for name, value in rows), found)


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB"


# What a user calls the kinds of methods.
KINDS = {
    "pruners": "pruner",
    "refiners": "refiner",
    "recoverers": "recoverer",
    "quantizers": "quantizer",
}
# The verbs that may follow a method.
LATER_VERBS = ("recover", "quantize", "pack")


def list_methods(
    name: Annotated[
        str | None,
        typer.Argument(help="Show one method in detail.", autocompletion=complete.names(*KINDS)),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """List the methods of prune, recover and quantize, or show one with its options.

    Example: sparsekit methods sparsegpt
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working():
        if name is None:
            _show_methods(terminal)
        else:
            _show_method(terminal, registry.find(name))


def _show_methods(terminal: Terminal) -> None:
    """One table of all methods; stdout has one name per line unless it is the terminal itself."""
    methods = [registry.describe(kind, name) for kind in KINDS for name in registry.names(kind)]
    rows = [
        (m.name, KINDS[m.kind], m.summary, _short(m.result), _needs(m), ", ".join(_followed_by(m)))
        for m in methods
    ]
    terminal.table(
        "methods; result: perplexity of SmolLM2-135M at 2:4 (22.9 when dense)",
        ("method", "kind", "what it does", "result", "calibrates", "can follow"),
        rows,
    )
    if terminal.json or terminal.quiet or not sys.stdout.isatty():
        terminal.result("\n".join(m.name for m in methods), {"methods": [*map(_as_json, methods)]})


def _show_method(terminal: Terminal, method: registry.Method) -> None:
    """One method with its options; stdout has a line for each row unless it is the terminal."""
    rows = [
        ("kind", KINDS[method.kind]),
        ("what it does", method.summary),
        ("source", method.source),
        ("differs", method.differs),
        ("cost", method.cost),
        ("result", method.result),
        ("calibrates", _needs(method)),
        ("starts from", method.initial),
        ("presets", ", ".join(method.presets)),
        ("can follow", ", ".join(_followed_by(method))),
    ]
    rows = [row for row in rows if row[1]]
    options = [(o.name, _type(o), o.default.strip("'"), o.help) for o in method.options]
    terminal.table(method.name, ("", ""), rows)
    terminal.table("options (-O NAME=VALUE)", ("name", "type", "default", "meaning"), options)
    if terminal.json or terminal.quiet or not sys.stdout.isatty():
        lines = ["\t".join(row) for row in [*rows, *(("option", *row) for row in options)]]
        terminal.result("\n".join(lines), _as_json(method))


def _as_json(method: registry.Method) -> dict[str, Any]:
    return {**asdict(method), "can_follow": _followed_by(method)}


def _needs(method: registry.Method) -> str:
    """Whether a method needs calibration, or trains."""
    if method.kind == "recoverers":
        return "trains"
    return "no" if method.data_free else "yes"


def _followed_by(method: registry.Method) -> list[str]:
    """The verbs that take a checkpoint made with this method."""
    from sparsekit.checkpoint.kind import TAKES, Kind

    kind = Kind.QUANTIZED if method.kind == "quantizers" else Kind.PLAIN
    if method.factors:
        kind = Kind.PRODUCTS
    return [verb for verb in LATER_VERBS if not TAKES[verb][kind]]


def _short(result: str) -> str:
    """A result without its setting, e.g. `99.8 in 78 s`."""
    return result.partition(" (")[0].removeprefix("perplexity ")


def _type(option: registry.Option) -> str:
    """The type of an option in words."""
    if option.type == "bool":
        return "yes or no"
    if option.choices:
        return "one of " + ", ".join(option.choices)
    return {"int": "whole number", "float": "number"}.get(option.type, "text")
