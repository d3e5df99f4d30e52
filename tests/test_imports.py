"""A verb loads what it needs: the modules of sparsekit in a process that prunes by magnitude."""

import subprocess
import sys

import pytest

# Files and packages of sparsekit, as the issue that set this limit counts them.
MOST = 60
COMMAND = """
import sys
from sparsekit.__main__ import main
sys.argv = ["sparsekit", "prune", {model!r}, "-o", {out!r}, "--method", "magnitude", "--quiet"]
try:
    main()
except SystemExit as end:
    assert not end.code
"""
FUNCTION = """
import sparsekit
sparsekit.prune({model!r}, {out!r}, method="magnitude")
"""
COUNT = """
import sys
print(*sorted(n for n in sys.modules if n.split(".")[0] == "sparsekit"), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "code", [COMMAND, pytest.param(FUNCTION, marks=pytest.mark.slow)], ids=["command", "function"]
)
def test_a_magnitude_prune_loads_at_most_sixty_modules(family, tmp_path, code):
    code = code.format(model=str(family("llama")), out=str(tmp_path / "out")) + COUNT
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (tmp_path / "out" / "config.json").is_file(), ran.stderr
    loaded = ran.stderr.splitlines()[-1].split()
    assert "sparsekit.pruning.methods.magnitude" in loaded
    assert len(loaded) <= MOST, loaded
