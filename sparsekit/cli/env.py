"""The verb `env`, and what `--version` says."""

import sys
from typing import Any

from sparsekit.cli.console import Terminal
from sparsekit.cli.options import Debug, Json, Quiet


def version_text() -> str:
    """The version alone in the first line, for scripts; below it those of the libraries."""
    from sparsekit.stages.environment import package_versions

    found = package_versions()
    first = found.pop("sparsekit")
    return "\n".join([first, *(f"{name} {version}" for name, version in found.items())])


def env(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Show versions and machine for a bug report, without names, keys and home directory.

    Example: sparsekit env
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working():
        from sparsekit.stages.environment import environment

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
