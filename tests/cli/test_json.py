"""The objects that --json writes: their version, and the names that recipes/README.md lists."""

import json
import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "recipes" / "README.md"


def names(verb: str) -> set[str]:
    """The names in the row of a verb."""
    text = README.read_text(encoding="utf-8").partition("## JSON output")[2]
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    (cells,) = [row[2] for row in rows if f"`{verb}`" in row[1]]
    return set(re.findall(r"`([a-z_]+)`", cells))


@pytest.mark.parametrize(
    ("verb", "command"),
    [
        ("eval", ("eval", "MODEL", "--length", 16, "--limit", 1)),
        ("compare", ("compare", "MODEL")),
        ("inspect", ("inspect", "MODEL")),
        ("verify", ("verify", "MODEL")),
        ("deploy", ("deploy", "MODEL", "--device", "cpu")),
        ("recipe ls", ("recipe", "ls")),
        ("recipe validate", ("recipe", "validate", "quickstart")),
        ("prune", ("prune", "DENSE", "-o", "OUT", "--method", "magnitude")),
    ],
)
def test_an_object_has_the_version_and_the_documented_names(
    cli, pruned, family, tmp_path, verb, command
):
    places = {"MODEL": pruned, "DENSE": family("llama"), "OUT": tmp_path / "out"}
    found = cli(*(places.get(word, word) for word in command), "--json")
    value = json.loads(found.stdout)
    assert value.pop("schema") == 1
    if verb == "prune":
        assert {"out", "stage", "settings", "source", "weights", "totals", "seconds"} <= set(value)
    else:
        assert set(value) <= names(verb)
        rows = value.get("models", [])
        assert all(set(row) <= names(verb) for row in rows)


def test_a_perplexity_has_the_names_of_python(cli, pruned):
    found = cli("eval", pruned, "--length", 16, "--limit", 1, "--json")
    (score,) = json.loads(found.stdout)["models"]
    assert set(score["perplexity"]) <= names("eval")
    assert score["perplexity"]["value"] > 1


def test_a_recipe_is_written_as_it_is(cli):
    assert set(json.loads(cli("recipe", "show", "quickstart", "--json").stdout)) >= {"stages"}
    assert "schema" not in json.loads(cli("recipe", "schema").stdout)
