"""Verbs of the command line. A command parses, calls one stage, and shows its report."""

from typing import Annotated

import typer

from sparsekit.cli import streams
from sparsekit.cli.about import env, list_methods, version_text
from sparsekit.cli.bench import app as bench
from sparsekit.cli.eval import evaluate
from sparsekit.cli.inspect import deploy, inspect, verify
from sparsekit.cli.pack import convert, pack, unpack
from sparsekit.cli.prune import prune
from sparsekit.cli.quantize import quantize
from sparsekit.cli.recover import recover
from sparsekit.cli.report import compare, report
from sparsekit.cli.study import app as recipe
from sparsekit.cli.study import demo, run
from sparsekit.cli.verb import Command, Group

app = typer.Typer(
    cls=Group,
    help="Prune Hugging Face language-model checkpoints on disk, and know what it cost.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the versions.")] = False,
) -> None:
    if version:
        print(version_text())
        raise typer.Exit()


VERBS = {
    "Make": {
        "prune": prune,
        "recover": recover,
        "quantize": quantize,
        "pack": pack,
        "unpack": unpack,
        "convert": convert,
    },
    "Measure": {"eval": evaluate, "inspect": inspect, "verify": verify, "bench": bench},
    "Look": {
        "compare": compare,
        "report": report,
        "deploy": deploy,
        "methods": list_methods,
        "env": env,
    },
    "Run": {"run": run, "recipe": recipe, "demo": demo},
}
for _panel, _verbs in VERBS.items():
    for _name, _verb in _verbs.items():
        if isinstance(_verb, typer.Typer):
            app.add_typer(_verb, name=_name, rich_help_panel=_panel)
        else:
            app.command(_name, cls=Command, rich_help_panel=_panel)(_verb)


def main() -> None:
    """Run the command line."""
    stdout = streams.guard()
    try:
        # The same name under `python -m`, also for shell completion.
        app(prog_name="sparsekit")
    except SystemExit as end:
        raise SystemExit(streams.exit_code(stdout, end.code)) from None
