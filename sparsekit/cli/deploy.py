"""The verb `deploy`."""

from sparsekit.cli.showforms import show_deployment
from sparsekit.cli.console import Terminal
from sparsekit.cli.options import Debug, Device, Json, Model, Quiet, named


def deploy(
    model: Model,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show where MODEL loads, and where it is smaller or faster, with the reason.

    Example: sparsekit deploy pruned
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working() as progress:
        name = named(model)
        from sparsekit.stages.deploy import deploy as stage

        show_deployment(terminal, stage(name, device, progress))
