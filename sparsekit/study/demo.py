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
    """Run `quickstart` and write its report into the folder.

    Args:
        model: A folder, hub id or `demo`.
        out: Folder of the run; finished steps in it are kept.
        progress: Reports each step.

    Returns:
        The dense model first, then one row for each method.
    """
    # In JSON, which is YAML, every name is text.
    recipe = read_recipe(shipped()["quickstart"], [f"model={json.dumps(model)}"])
    done = run(recipe, out, progress=progress)
    return report(places(recipe, out, done), out / PAGE)
