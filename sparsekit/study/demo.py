"""The recipe `quickstart` on any model, with its page."""

import json
from pathlib import Path

from sparsekit.progress import SILENT, Progress
from sparsekit.reporting.compare import Comparison
from sparsekit.reporting.page import report
from sparsekit.study.recipe import read_recipe, shipped
from sparsekit.study.run import places, run

PAGE = "report.html"


def demo(model: str, out: Path, progress: Progress = SILENT) -> Comparison:
    """Carry out `quickstart`, and write the page of its models into the folder.

    Args:
        model: A folder, hub id or `demo`.
        out: Folder of the run; what is finished in it is kept.
        progress: Told of each step.

    Returns:
        The dense model first, then one row for each method.
    """
    # JSON is YAML in which any name is text.
    recipe = read_recipe(shipped()["quickstart"], [f"model={json.dumps(model)}"])
    done = run(recipe, out, progress=progress)
    return report(places(recipe, out, done), out / PAGE)
