"""Killed runs go on where they stopped, to the bytes of an uninterrupted run."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparsekit.files import sha256_file

BLOCKS = 6  # of llama_deep in conftest.py
DEADLINE = 300.0  # only against a test that hangs: on a busy machine a start takes a minute
JOURNAL = ".sparsekit-journal.jsonl"
# The command line, which waits to be stopped when it opens the journal for one block too many:
# however late a signal is sent, it finds the run at work.
WAITING = f"""
import runpy, sys, time
blocks = int(sys.argv.pop(1))

def wait_at_journal(event, args):
    global blocks
    if event == "open" and str(args[0]).endswith("{JOURNAL}") and args[1] == "a":
        blocks -= 1
        if blocks < 0:
            time.sleep({DEADLINE})

sys.addaudithook(wait_at_journal)
runpy.run_module("sparsekit", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory) -> Path:
    """So many token rows that a block takes long enough to be hit."""
    path = tmp_path_factory.mktemp("many") / "rows.safetensors"
    generator = torch.Generator().manual_seed(3)
    save_file({"tokens": torch.randint(0, 256, (96, 128), generator=generator)}, path)
    return path


def arguments(family, rows: Path, out: Path, method: str = "sparsegpt") -> list:
    return [
        "prune", family("llama_deep"), "-o", out, "--method", method, "--calibration", rows,
    ]  # fmt: skip


def journal_lines(out: Path) -> int:
    journal = out.with_name(out.name + ".partial") / JOURNAL
    return journal.read_bytes().count(b"\n") if journal.is_file() else 0


def stop_after(start, command: list, out: Path, blocks: int, how: signal.Signals):
    """A run that gets a signal as soon as so many blocks are in its journal, and never later."""
    process = start(blocks, *command, program=("-c", WAITING))
    began = time.monotonic()
    while journal_lines(out) < blocks:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - began < DEADLINE
        assert not out.exists()
        time.sleep(0.001)
    process.send_signal(how)
    process.wait(DEADLINE)
    return process


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def uninterrupted(family, many_rows, tmp_path_factory):
    """The hashes of a run of a method that nothing interrupts."""
    made: dict[str, dict[str, str]] = {}

    def run(method: str) -> dict[str, str]:
        from sparsekit.pruning.config import PruneConfig
        from sparsekit.pruning.prune import prune

        if method not in made:
            config = PruneConfig(method=method, calibration=str(many_rows))
            out = tmp_path_factory.mktemp("whole") / "out"
            made[method] = hashes(prune(config, str(family("llama_deep")), out).out)
        return made[method]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("blocks", "method"),
    [(1, "sparsegpt"), (3, "nowag"), (2, "armor"), (BLOCKS - 1, "sparsegpt")],
    ids=["first", "middle", "factors", "last"],
)
def test_run_killed_at_a_block_is_finished_by_the_same_command_to_the_same_bytes(
    start, cli, family, many_rows, tmp_path, uninterrupted, blocks, method
):
    """`nowag` carries the dense model's hidden states on, `sparsegpt` the pruned one's."""
    out = tmp_path / "out"
    command = arguments(family, many_rows, out, method)
    process = stop_after(start, command, out, blocks, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    assert journal_lines(out) == blocks
    found = cli(*command, "--json")
    assert found.code == 0, found.stderr
    assert json.loads(found.stdout)["resumed_blocks"] == blocks
    assert f"going on after {blocks} finished blocks" in found.stderr
    assert hashes(out) == uninterrupted(method)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (out / JOURNAL).exists()
    assert cli("verify", out, "--pattern", "2:4").code == 0
    weights = json.loads((out / "sparsekit.json").read_text())["history"][0]["weights"]
    assert len(weights) == len({row["name"] for row in weights}) == 7 * BLOCKS


@pytest.mark.slow
def test_interrupt_is_exit_130_with_one_line_and_resumes_in_a_new_process(
    start, spawn, family, many_rows, tmp_path, uninterrupted
):
    out = tmp_path / "out"
    command = arguments(family, many_rows, out)
    process = stop_after(start, command, out, 2, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=DEADLINE)
    assert (process.returncode, stdout) == (130, "")
    assert stderr.endswith("interrupted; run the same command again to resume\n")
    assert "Traceback" not in stderr
    assert not out.exists()
    assert journal_lines(out) == 2
    found = spawn(*command)
    assert (found.code, found.stdout) == (0, f"{out}\n")
    assert hashes(out) == uninterrupted("sparsegpt")


def test_run_killed_while_its_weights_are_laid_out_is_finished_too(
    cli, family, many_rows, tmp_path, uninterrupted
):
    """Before the recipe is written nothing is promised: the next run begins anew."""
    out = tmp_path / "out"
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / ".sparsekit-lock").touch()
    (tmp_path / "out.partial" / "model-00001-of-00007.safetensors").write_bytes(b"half")
    assert cli(*arguments(family, many_rows, out)).code == 0
    assert hashes(out) == uninterrupted("sparsegpt")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ast", "cast"])
def test_training_that_is_killed_goes_on_to_the_same_bytes(
    start, cli, pruned, row_file, tmp_path, method
):
    """Killed at the first saved state it finds, at whatever step it is then."""
    options = (
        "--method", method, "--data", row_file, "--tokens", 9600, "--batch", 2, "--length", 16,
        "--save-every", 5, "--lr", 4e-3, *(("-O", "decay=1e-2") if method == "cast" else ()),
    )  # fmt: skip
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert cli("recover", pruned, "-o", whole, *options).code == 0
    process = start("recover", pruned, "-o", out, *options)
    began = time.monotonic()
    while not (tmp_path / "out.partial" / ".sparsekit-state.json").is_file():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - began < DEADLINE
        time.sleep(0.001)
    process.kill()
    process.wait(DEADLINE)
    assert not out.exists()
    found = cli("recover", pruned, "-o", out, *options)
    assert found.code == 0, found.stderr
    assert "going on after" in found.stderr
    assert hashes(out) == hashes(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
