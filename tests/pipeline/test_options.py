"""An option is declared in one place, from which everything else is made."""

import ast
import inspect
from pathlib import Path
from typing import Annotated

import pytest
import typer
from pydantic import Field
from refusals import refused
from typer.main import get_command
from typer.testing import CliRunner

import sparsekit
from sparsekit.api.keywords import writer
from sparsekit.cli.verb import Command, read, takes
from sparsekit.errors import UsageError
from sparsekit.pipeline.options import Flag, as_keywords
from sparsekit.pruning.config import PruneConfig

ROOT = Path(sparsekit.__file__).parent
# What makes something of the options of every verb.
FRONT = ("cli", "study", "pipeline", "api", "__init__.py")


class Fresh(PruneConfig):
    """The options of `prune`, and one more."""

    fresh: Annotated[int, Field(ge=1, description="Something new."), Flag()] = 3


def test_a_new_option_is_a_flag_a_keyword_and_a_key_of_the_schema():
    app, made = typer.Typer(rich_markup_mode=None), []

    @app.command(cls=Command)
    @takes(Fresh)
    def verb(**words) -> None:
        """Do it."""
        made.append(read(Fresh, words))

    shown = CliRunner().invoke(app, ["--help"]).stdout
    assert "--fresh <int>" in shown
    assert "Something new.  [default: 3]" in shown
    assert CliRunner().invoke(app, ["--fresh", "4", "--pattern", "50.0%"]).exit_code == 0
    assert made[0].fresh == 4
    assert made[0].words == {"pattern": "50.0%", "fresh": 4}
    assert {parameter.name for parameter in get_command(app).params} >= set(Fresh.model_fields)
    function = writer(Fresh)(lambda config, model, out: config)
    assert inspect.signature(function).parameters["fresh"].default == 3
    assert function("m", "o", fresh=5).fresh == 5
    with refused("out-of-range", "fresh must", "1", "0", kind=UsageError):
        function("m", "o", fresh=0)
    assert Fresh.model_json_schema()["properties"]["fresh"]["minimum"] == 1


def named(file: Path) -> set[str]:
    """What a file declares, takes as a parameter or passes on by name."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.arg, ast.keyword)):
            found.add(node.arg)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


@pytest.mark.parametrize("option", ["budget", "then", "allocate", "dense", "refine", "compensate"])
def test_an_option_is_written_where_it_is_declared_and_where_it_is_used(option):
    files = [*ROOT.glob("*/config.py")]
    for place in FRONT:
        path = ROOT / place
        files += path.rglob("*.py") if path.is_dir() else [path]
    assert [f.relative_to(ROOT).as_posix() for f in files if option in named(f)] == [
        "pruning/config.py"
    ]


def test_a_message_about_flags_is_one_about_keywords():
    assert as_keywords("--teacher-top has no effect; give -O x=1, not --no-propagate") == (
        "teacher_top has no effect; give option x=1, not propagate=False"
    )
    assert as_keywords("a--b is one word") == "a--b is one word"


def test_options_are_frozen_and_keep_their_words():
    config = PruneConfig(skip=["a"], calibration=None)
    assert config.words == {"skip": ["a"]}
    with pytest.raises(ValueError, match="frozen"):
        config.skip = []
    assert config.model_copy(update={"seed": 3}).words == {"skip": ["a"]}
