"""What was measured of a model, kept beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsekit.errors import DataError
from sparsekit.files import read_json, write_json

SCORES = "sparsekit-scores.json"
FORMAT = 1

Entry = Mapping[str, Any]


def read_scores(folder: Path) -> list[Entry]:
    """The entries of a folder; none where nothing was measured.

    Raises:
        DataError: The file is damaged, or of another version.
    """
    file = folder / SCORES
    if not file.is_file():
        return []
    found = read_json(file)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise DataError(f"{file} is not of a form that this version reads", "delete it")
    return list(found["scores"])


def add_score(folder: Path, entry: Entry) -> None:
    """Keep an entry, in the place of one that was measured in the same way."""
    same = ("config", "baseline")
    left = [one for one in read_scores(folder) if any(one.get(k) != entry[k] for k in same)]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SCORES, {"format": FORMAT, "scores": [*left, entry]})
