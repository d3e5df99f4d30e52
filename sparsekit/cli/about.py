"""Verb `env`, and the text of `--version`."""

import sys
from dataclasses import asdict
from typing import Any

from sparsekit import registry
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


def list_methods(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """List the pruning methods with their sources, options and defaults.

    Example: sparsekit methods
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working():
        show_methods(terminal)


def _needs(method: registry.Method) -> str:
    """What a method needs besides the weight."""
    if method.kind == "recoverers":
        return "text, the dense model"
    if method.initial:
        return f"calibration, {method.initial} (--initial)"
    return "nothing" if method.data_free else "calibration"


def show_methods(terminal: Terminal) -> None:
    """The methods; stdout has one name a line unless it is the terminal itself."""
    kinds = ("pruners", "refiners", "recoverers", "quantizers")
    found = [registry.describe(kind, name) for kind in kinds for name in registry.names(kind)]
    terminal.table(
        "methods of prune, of recover ("
        + ", ".join(registry.names("recoverers"))
        + ") and of quantize ("
        + ", ".join(registry.names("quantizers"))
        + ")",
        ("method", "what it does", "needs", "source"),
        [(m.name, m.summary, _needs(m), m.source) for m in found],
    )
    options = [(m.name, o.name, o.type, o.default, o.help) for m in found for o in m.options]
    terminal.table(
        "options (--option NAME=VALUE)", ("method", "name", "type", "default", ""), options
    )
    if terminal.json or terminal.quiet or not sys.stdout.isatty():
        names = "\n".join(m.name for m in found)
        terminal.result(names, [asdict(m) for m in found])
