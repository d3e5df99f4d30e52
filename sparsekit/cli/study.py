"""Verbs `run`, `recipe` and `demo`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsekit.cli import complete
from sparsekit.cli.console import Terminal
from sparsekit.cli.options import Debug, DryRun, Json, Quiet, Timed, named, refuse_timed
from sparsekit.cli.plan import plan_costs, plans_together
from sparsekit.cli.report import show_table
from sparsekit.cli.verb import Command, Group
from sparsekit.errors import UsageError
from sparsekit.files import write_atomic

if TYPE_CHECKING:
    from sparsekit.study.run import Done


Recipe = Annotated[
    str,
    typer.Argument(
        help="YAML file, or a name from 'sparsekit recipe ls'.", autocompletion=complete.recipes
    ),
]
app = typer.Typer(
    cls=Group,
    help="List, show, copy and check recipes.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def run(
    recipe: Recipe,
    words: Annotated[
        list[str] | None,
        typer.Argument(help="Values to replace, e.g. model=org/name or prune.samples=8."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the run. Default: the recipe's name."),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--from", help="Run this stage and the following ones again, e.g. recover or 1."
        ),
    ] = None,
    dry_run: DryRun = False,
    timed: Timed = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run a recipe; finished steps are kept, and an interrupted run resumes.

    Example: sparsekit run quickstart -o study
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working(resumable=True) as progress:
        refuse_timed(dry_run=dry_run, timed=timed)
        from sparsekit.study.recipe import read_recipe, recipe_file

        file = recipe_file(recipe)
        parsed = read_recipe(file, words or [])
        from sparsekit.study.run import run as stage

        folder = out or Path(file.stem)
        done = stage(parsed, folder, start=start, dry=dry_run, timed=timed, progress=progress)
        if not dry_run and any(outcome.step.verb == "eval" for outcome in done):
            from sparsekit.reporting.compare import compare
            from sparsekit.study.run import places

            show_table(terminal, compare(places(parsed, folder, done)))
        show_run(terminal, folder, done, dry=dry_run)


@app.command("ls", cls=Command)
def list_recipes(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """List the recipes that come with sparsekit.

    Example: sparsekit recipe ls
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working():
        from sparsekit.study.recipe import shipped, summary

        summaries = {name: summary(file) for name, file in shipped().items()}
        text = "\n".join(f"{name}\t{text}" for name, text in summaries.items())
        terminal.result(text, {"recipes": summaries})


@app.command("show", cls=Command)
def show_recipe(
    recipe: Recipe, json: Json = False, quiet: Quiet = False, debug: Debug = False
) -> None:
    """Write a recipe to stdout.

    Example: sparsekit recipe show quickstart
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working():
        from sparsekit.study.recipe import recipe_file
        from sparsekit.study.schema import read_yaml

        text = recipe_file(recipe).read_text(encoding="utf-8")
        terminal.document(text.rstrip("\n"), read_yaml(text))


@app.command("cp", cls=Command)
def copy_recipe(
    recipe: Recipe,
    target: Annotated[Path, typer.Argument(help="File or folder to write.")],
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Copy a recipe to your own file.

    Example: sparsekit recipe cp quickstart mine.yaml
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working():
        from sparsekit.study.recipe import recipe_file

        source = recipe_file(recipe)
        file = target / source.name if target.is_dir() else target
        if file.exists():
            raise UsageError(f"{file} exists", "choose another name", code="output-exists")
        write_atomic(file, source.read_bytes())
        terminal.result(file, {"out": str(file)})


@app.command("validate", cls=Command)
def validate(
    recipes: Annotated[
        list[str],
        typer.Argument(
            help="YAML files, or names from recipe ls.", autocompletion=complete.recipes
        ),
    ],
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check recipes without reading a model; all errors are reported at once.

    Example: sparsekit recipe validate quickstart
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working():
        from sparsekit.study.recipe import read_recipe, recipe_file

        steps = {}
        for recipe in recipes:
            file = recipe_file(recipe)
            steps[str(file)] = [
                step.name for step in read_recipe(file).steps if step.verb != "eval"
            ]
        terminal.result("\n".join(steps), {"recipes": steps})


@app.command("schema", cls=Command)
def print_schema(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Write the JSON schema of recipes, for editors.

    Example: sparsekit recipe schema
    """
    terminal = Terminal(json=True, quiet=quiet, debug=debug)
    with terminal.working():
        from sparsekit.study.schema import schema

        terminal.document("", schema())


def demo(
    model: Annotated[str, typer.Argument(help="Model to use instead of SmolLM2-135M.")] = "demo",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the checkpoints.")] = Path(
        "sparsekit-demo"
    ),
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Prune a small model to 2:4 in three ways, score the results, and write a report.

    This is the recipe quickstart; an interrupted run resumes.

    Example: sparsekit demo
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working(resumable=True) as progress:
        name = named(model)
        from sparsekit.study.demo import PAGE
        from sparsekit.study.demo import demo as stage

        comparison = stage(name, out, progress)
        show_table(terminal, comparison)
        terminal.note(f"report with charts: {out / PAGE}")
        terminal.result(out, {"out": str(out), **comparison.to_json()})


def show_run(terminal: Terminal, out: Path, done: Sequence["Done"], *, dry: bool) -> None:
    """Show the outcome of each step; stdout has the final models."""
    models = [outcome for outcome in done if outcome.step.verb != "eval"]
    rows = [
        (
            *(outcome.step.name, outcome.step.verb, outcome.state, _seconds(outcome)),
            *(plan_costs(outcome.plan, outcome.memory_ahead) if dry else ()),
            str(outcome.folder),
        )
        for outcome in done
    ]
    plans = [outcome.plan for outcome in done if outcome.plan is not None]
    if len(plans) > 1:
        rows.append((f"these {len(plans)} together", None, None, *plans_together(plans), None))
    title = "plan (nothing was written)" if dry else f"{out}"
    costs = ("to write", "memory") if dry else ()
    terminal.table(title, ("step", "verb", "", "seconds", *costs, "folder"), rows)
    parents = {outcome.step.parent for outcome in models}
    last = [str(outcome.folder) for outcome in models if outcome.step.name not in parents]
    if terminal.json or not dry:
        value = {"out": str(out), "steps": [outcome.to_json() for outcome in done]}
        terminal.result("\n".join(last), value)


def _seconds(done: "Done") -> str | None:
    if done.plan is not None and (seconds := done.plan.get("seconds_estimate")) is not None:
        return f"about {seconds:.0f}"
    return f"{done.seconds:.0f}" if done.state == "made" else None
