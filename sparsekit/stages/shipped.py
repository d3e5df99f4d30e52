"""The recipes that come with sparsekit."""

from pathlib import Path

from sparsekit.errors import DataError, UsageError, did_you_mean

CHECKOUT = Path(__file__).parents[2]
INSTALLED = Path(__file__).parents[1] / "recipes"


def shipped() -> dict[str, Path]:
    """The files of all recipes, by name.

    Raises:
        DataError: The installation lacks them.
    """
    place = CHECKOUT / "recipes" if (CHECKOUT / "pyproject.toml").is_file() else INSTALLED
    if found := {file.stem: file for file in sorted(place.glob("*.yaml"))}:
        return found
    raise DataError(f"the recipes are not in {place}", "install sparsekit again")


def recipe_file(word: str) -> Path:
    """The file of a recipe: a path, or the name of one that is shipped.

    Raises:
        UsageError: There is no such recipe.
    """
    path = Path(word)
    if path.is_file():
        return path
    known = shipped()
    if word in known:
        return known[word]
    if path.suffix in (".yaml", ".yml") or "/" in word:
        raise UsageError(f"there is no recipe {word}", "see 'sparsekit recipe ls'")
    raise UsageError(f"no recipe {word!r}", did_you_mean(word, known))


def summary(file: Path) -> str:
    """What a recipe says of itself in its first line."""
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()
