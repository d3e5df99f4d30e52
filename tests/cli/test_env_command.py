"""`--version` and `env`: what a bug report needs, and nothing else."""

import importlib.metadata
import json
import os
import platform

import pytest
import torch

import sparsekit
from sparsekit.provenance import environment
from sparsekit.provenance.environment import without_home

LIBRARIES = (
    *("torch", "transformers", "safetensors", "accelerate", "lm-eval", "compressed-tensors"),
)
SECRET = "hf_do_not_tell_anybody"


def test_version_has_itself_in_the_first_line_and_the_libraries_below(cli):
    found = cli("--version")
    first, *rest = found.stdout.splitlines()
    assert (found.code, first, found.stderr) == (0, sparsekit.__version__, "")
    told = dict(line.split(" ") for line in rest)
    assert told.pop("python") == platform.python_version()
    assert told == {name: importlib.metadata.version(name) for name in LIBRARIES}


def test_version_names_a_library_that_is_not_there(cli, monkeypatch):
    monkeypatch.setattr(environment, "SHOWN", ("torch", "no-such-library"))
    assert "no-such-library not installed\n" in cli("--version").stdout


def test_env_tells_versions_and_machine(cli):
    found = cli("env", "--json")
    assert found.code == 0
    told = json.loads(found.stdout)
    assert told["versions"]["sparsekit"] == sparsekit.__version__
    assert told["versions"]["lm-eval"] == importlib.metadata.version("lm-eval")
    assert told["platform"] == platform.platform()
    assert 1 <= told["cpus_usable"] <= told["cpus"] == os.cpu_count()
    assert 0 < told["memory_free_bytes"] <= told["memory_bytes"]
    assert told["cache_free_bytes"] > 0
    assert told["threads"] == torch.get_num_threads()
    assert len(told["cuda_devices"]) == torch.cuda.device_count()
    assert told["cuda"] == torch.version.cuda


def test_env_has_a_row_a_line_on_stdout_and_a_table_on_stderr(cli):
    found = cli("env")
    rows = dict(line.split("\t") for line in found.stdout.splitlines())
    assert rows["torch"] == torch.__version__
    assert rows["cache"].endswith(" free")
    for name in ("platform", "CPUs", "memory", "CUDA devices"):
        assert name in rows
        assert name in found.stderr
    assert cli("env", "-q").stdout.count("\n") == len(rows)
    assert cli("env", "-q").stderr == ""


def test_env_tells_no_secret_and_no_home(cli, tmp_path, monkeypatch):
    home = tmp_path / "jane.doe"
    (home / "cache").mkdir(parents=True)
    for name in ("HF_TOKEN", "SPARSEKIT_TOKEN", "WANDB_API_KEY", "USER", "HOSTNAME", "PATH"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("SPARSEKIT_CACHE", str(home / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    for arguments in (["env"], ["env", "--json"]):
        found = cli(*arguments)
        text = found.stdout + found.stderr
        assert "~/cache" in text
        assert "OMP_NUM_THREADS" in text
        for word in (SECRET, "jane.doe", platform.node()):
            assert word not in text
    told = json.loads(found.stdout)
    assert told["variables"] == {"SPARSEKIT_CACHE": "~/cache", "OMP_NUM_THREADS": "3"}
    assert told["cache"] == "~/cache"


def test_env_says_so_when_torch_cannot_be_imported(cli, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    found = cli("env")
    assert found.code == 0
    assert "threads of torch\ttorch fails: " in found.stdout


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/home/jane", "~"),
        ("/home/jane/x", "~/x"),
        ("/home/janet/x", "/home/janet/x"),
        ("/a/home/jane/x", "/a/home/jane/x"),
        ("/home/jane:/home/jane/x", "~:~/x"),
        ("4", "4"),
    ],
)
def test_home_is_written_as_a_tilde(monkeypatch, text, told):
    monkeypatch.setenv("HOME", "/home/jane")
    assert without_home(text) == told


def test_root_as_home_leaves_paths_as_they_are(monkeypatch):
    monkeypatch.setenv("HOME", "/")
    assert without_home("/var/cache") == "/var/cache"
