"""The verbs of recipes: `run`, and `recipe` with what belongs to it."""

from pathlib import Path
from typing import Annotated

import typer

from sparsekit.cli import complete
from sparsekit.cli.show import show_run
from sparsekit.cli.showcompare import show_table
from sparsekit.cli.console import Terminal
from sparsekit.cli.options import Debug, DryRun, Json, Quiet, Timed, refuse_timed
from sparsekit.errors import UsageError
from sparsekit.files import write_atomic

Recipe = Annotated[
    str,
    typer.Argument(
        help="A YAML file, or a name of 'sparsekit recipe ls'.", autocompletion=complete.recipes
    ),
]

app = typer.Typer(
    help="List, show, copy and check recipes.", no_args_is_help=True, rich_markup_mode=None
)


def run(
    recipe: Recipe,
    words: Annotated[
        list[str] | None,
        typer.Argument(help="Words to replace, as model=org/name or prune.samples=8."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the run. Default: the recipe's name."),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option("--from", help="Make this stage and what follows again, as recover or 1."),
    ] = None,
    dry_run: DryRun = False,
    timed: Timed = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Carry out a recipe; what is finished is kept, and what was interrupted goes on.

    Example: sparsekit run quickstart -o study
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working(resumable=True) as progress:
        refuse_timed(dry_run=dry_run, timed=timed)
        from sparsekit.stages.recipe import read_recipe
        from sparsekit.stages.shipped import recipe_file

        file = recipe_file(recipe)
        told = read_recipe(file, words or [])
        from sparsekit.stages.run import run as stage

        folder = out or Path(file.stem)
        done = stage(told, folder, start=start, dry=dry_run, timed=timed, progress=progress)
        if not dry_run and any(one.step.verb == "eval" for one in done):
            from sparsekit.stages.compare import compare
            from sparsekit.stages.run import places

            show_table(terminal, compare(places(told, folder, done)))
        show_run(terminal, folder, done, dry=dry_run)


@app.command("ls")
def list_recipes(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """List the recipes that come with sparsekit.

    Example: sparsekit recipe ls
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working():
        from sparsekit.stages.shipped import shipped, summary

        found = {name: summary(file) for name, file in shipped().items()}
        terminal.result("\n".join(f"{name}\t{text}" for name, text in found.items()), found)


@app.command("show")
def show_recipe(
    recipe: Recipe, json: Json = False, quiet: Quiet = False, debug: Debug = False
) -> None:
    """Write a recipe to stdout.

    Example: sparsekit recipe show quickstart
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working():
        from sparsekit.stages.recipeform import read_yaml
        from sparsekit.stages.shipped import recipe_file

        text = recipe_file(recipe).read_text(encoding="utf-8")
        terminal.result(text.rstrip("\n"), read_yaml(text))


@app.command("cp")
def copy_recipe(
    recipe: Recipe,
    target: Annotated[Path, typer.Argument(help="The file, or folder, to write.")],
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Copy a recipe to a file of your own.

    Example: sparsekit recipe cp quickstart mine.yaml
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working():
        from sparsekit.stages.shipped import recipe_file

        source = recipe_file(recipe)
        file = target / source.name if target.is_dir() else target
        if file.exists():
            raise UsageError(f"{file} exists", "choose another name")
        write_atomic(file, source.read_bytes())
        terminal.result(file, {"out": str(file)})


@app.command("validate")
def validate(
    recipes: Annotated[
        list[str],
        typer.Argument(help="YAML files, or names of recipe ls.", autocompletion=complete.recipes),
    ],
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check recipes without reading a model; all errors of one are told at once.

    Example: sparsekit recipe validate quickstart
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working():
        from sparsekit.stages.recipe import read_recipe
        from sparsekit.stages.shipped import recipe_file

        steps = {}
        for recipe in recipes:
            file = recipe_file(recipe)
            steps[str(file)] = [
                step.name for step in read_recipe(file).steps if step.verb != "eval"
            ]
        terminal.result("\n".join(steps), steps)


@app.command("schema")
def print_schema(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Write the JSON schema of recipes, which editors check them by.

    Example: sparsekit recipe schema
    """
    terminal = Terminal(json=True, quiet=quiet, debug=debug)
    with terminal.working():
        from sparsekit.stages.recipeform import schema

        terminal.result("", schema())
