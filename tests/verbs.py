"""The commands of the command line, with those of groups."""

from typer.main import get_command

from sparsekit.cli.app import app


def commands() -> dict[str, object]:
    found = {}
    for name, command in get_command(app).commands.items():
        for inner, sub in getattr(command, "commands", {"": command}).items():
            found[f"{name} {inner}".strip()] = sub
    return found


def replace(config, **words):
    """The configuration that a configuration's words spell with others in their place."""
    return type(config)(**{**config.words, **words})
