"""Recipes on SmolLM2-135M: killed and started again, and one shell line.

On a real model: `pytest -m real tests/quality/test_real_recipes.py -s` (half an hour to an hour on
two cores).
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparsekit.files import sha256_file

pytestmark = pytest.mark.real
COMMAND = f"{sys.executable} -m sparsekit"


def environment() -> dict[str, str]:
    """The user's, with the user's cache."""
    return {key: value for key, value in os.environ.items() if key != "SPARSEKIT_CACHE"}


def shell(line: str) -> subprocess.CompletedProcess:
    """What a line of bash does when every failure counts."""
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line.replace("sparsekit ", f"{COMMAND} ")],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )


def killed(line: str, when: Path) -> None:
    """Start a command, and kill it as soon as a file or folder is there."""
    words = line.replace("sparsekit", COMMAND, 1).split()
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    )
    while process.poll() is None and not when.exists():
        time.sleep(0.2)
    assert process.poll() is None, "the command ended before it was killed"
    process.send_signal(signal.SIGKILL)
    process.wait()


def weights(out: Path) -> dict[str, str]:
    return {
        str(file.relative_to(out)): sha256_file(file) for file in sorted(out.rglob("*.safetensors"))
    }


def written(out: Path) -> dict[str, int]:
    """When the weights of each finished step were written, in nanoseconds."""
    return {
        file.parent.name: file.stat().st_mtime_ns
        for file in out.glob("*/model.safetensors")
        if not file.parent.name.endswith(".partial")
    }


def scored(out: Path) -> set[str]:
    """The models of steps that have scores."""
    return {file.parent.name for file in out.glob("*/sparsekit-scores.json")} - {"dense"}


def compared(out: Path) -> dict[str, list[dict]]:
    """The perplexities of a run's models by name, as `compare` tells them."""
    done = shell(f"sparsekit compare {out} --json")
    assert done.returncode == 0, done.stderr
    return {row["name"]: row["perplexity"] for row in json.loads(done.stdout)["models"]}


@pytest.mark.parametrize(
    ("recipe", "first", "second"),
    [
        ("quickstart", "magnitude", "sparsegpt.partial"),
        ("compare-oneshot-2x4", "sparsegpt.partial", "armor.partial"),
    ],
)
def test_a_study_that_is_killed_twice_gives_the_same_bytes(tmp_path, recipe, first, second):
    line = f"sparsekit run {recipe} -o"
    done = shell(f"{line} {tmp_path / 'whole'}")
    assert done.returncode == 0, done.stderr
    again = tmp_path / "again"
    killed(f"{line} {again}", again / first)
    made = written(again)
    assert made
    killed(f"{line} {again}", again / second)
    later = written(again)
    assert made.items() <= later.items()
    made = later
    measured = scored(again)
    done = shell(f"{line} {again} --json")
    assert done.returncode == 0, done.stderr
    assert weights(again) == weights(tmp_path / "whole")
    steps = json.loads(done.stdout)["steps"]
    kept = {(step["verb"], step["name"]) for step in steps if step["state"] == "kept"}
    assert kept >= {("prune", name) for name in made} | {("eval", name) for name in measured}
    assert made.items() <= written(again).items()  # no finished stage ran again
    found, other = compared(again), compared(tmp_path / "whole")
    assert found == other
    assert found.keys() == {"dense", *(step["name"] for step in steps if step["verb"] == "prune")}
    for name, perplexities in found.items():
        assert perplexities, name
        assert all(math.isfinite(one["log_perplexity"]) for one in perplexities), name
        assert all(one["perplexity"] is not None for one in perplexities), name  # None: no float
    print(shell(f"sparsekit compare {tmp_path / 'whole'} --markdown").stdout, flush=True)


def test_the_pipeline_of_the_readme_runs_from_one_line(tmp_path):
    """As it stands there, with fewer rows and tokens, and in another folder."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(
        r"^sparsekit prune .*\n  \| sparsekit recover - [^`]*", readme, re.MULTILINE
    )
    for old, new in (
        ("--samples 32 --length 512", "--samples 8 --length 256"),
        ("100K", "4096"),
        ("eval -", "eval - --length 256 --limit 8"),
        *((f"-o {name} ", f"-o {tmp_path / name} ") for name in "abc"),
        ("scores.json", str(tmp_path / "scores.json")),
    ):
        assert old in line
        line = line.replace(old, new)
    done = shell(line)
    assert done.returncode == 0, done.stderr
    (score,) = json.loads((tmp_path / "scores.json").read_text())["models"]
    assert score["model"] == str(tmp_path / "c")
    assert score["perplexity"]["value"] > 1
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["a", "b", "c", "scores.json"]
