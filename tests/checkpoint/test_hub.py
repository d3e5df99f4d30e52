"""Models of a hub, which a server on this machine plays: the requests that a download takes."""

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from refusals import assert_refused

from sparsekit.checkpoint.folder import INDEX, SINGLE
from sparsekit.files import sha256_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A model hub that serves one folder as `org/name`, and notes what was fetched from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fetched: list[str] = []
        self.gated = False
        self.cut: str | None = None
        """A file whose transfer breaks off in the middle."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def _answer(self, *, body: bool) -> None:
                name = self.path.removeprefix(f"/org/name/resolve/{COMMIT}/")
                files = sorted(hub.folder.iterdir())
                if self.path.startswith("/api/models/org/name/tree/"):
                    tree = [
                        {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0"}
                        for f in files
                    ]
                    self._send(200, json.dumps(tree).encode(), body=body)
                elif self.path.startswith("/api/models/org/name"):
                    siblings = [{"rfilename": file.name} for file in files]
                    info = {"id": "org/name", "sha": COMMIT, "siblings": siblings}
                    self._send(200, json.dumps(info).encode(), body=body)
                elif hub.gated:
                    self.code = "GatedRepo"
                    self._send(403, b"", body=body)
                elif (hub.folder / name).is_file():
                    if body:
                        hub.fetched.append(name)
                    self._send(200, (hub.folder / name).read_bytes(), body=body, name=name)
                else:
                    found = self.path.startswith("/org/name/")
                    self.code = "EntryNotFound" if found else "RepoNotFound"
                    self._send(404, b"", body=body)

            def _send(self, status: int, data: bytes, *, body: bool, name: str = "") -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                if status != 200:
                    self.send_header("X-Error-Code", self.code)
                self.end_headers()
                if body and name and name == hub.cut:
                    data = data[: len(data) // 2]
                    self.close_connection = True
                if body:
                    self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def environment(self, home: Path) -> dict[str, str]:
        """What makes a process take this hub for the hub."""
        hidden = ("HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        own = {name: value for name, value in os.environ.items() if name.upper() not in hidden}
        host, port = self.server.server_address[:2]
        return own | {"HF_ENDPOINT": f"http://{host}:{port}", "HF_HOME": str(home)}


@pytest.fixture
def hub(copy_of) -> Iterator[Callable[[str], Hub]]:
    started = []

    def serve(family: str) -> Hub:
        started.append(Hub(copy_of(family)))
        return started[-1]

    yield serve
    for running in started:
        running.server.shutdown()
        running.server.server_close()


@pytest.mark.slow
def test_hub_model_is_fetched_once_shard_by_shard_and_pruned(hub, spawn, tmp_path):
    served = hub("llama_deep")
    (served.folder / "consolidated.safetensors").write_bytes(b"another form of the weights")
    shards = sorted(set(json.loads((served.folder / INDEX).read_text())["weight_map"].values()))
    environment = served.environment(tmp_path / "home")
    for out in ("first", "second"):
        found = spawn(
            *("prune", "org/name", "--method", "magnitude", "-o", tmp_path / out), env=environment
        )
        assert found.code == 0, found.stderr
    assert [name for name in served.fetched if name.endswith(".safetensors")] == shards
    assert "fetch org/name" in found.stderr
    for shard in shards:
        written = [sha256_file(tmp_path / out / shard) for out in ("first", "second")]
        assert written[0] == written[1] != sha256_file(served.folder / shard)


@pytest.mark.slow
def test_hub_model_of_an_unknown_type_is_refused_before_its_weights(hub, spawn, tmp_path):
    served = hub("llama")
    config = json.loads((served.folder / "config.json").read_text())
    (served.folder / "config.json").write_text(json.dumps({**config, "model_type": "llama9"}))
    found = spawn("inspect", "org/name", env=served.environment(tmp_path / "home"))
    assert_refused(found, 2, "unsupported-model", "'llama9'")
    assert [name for name in served.fetched if name.endswith(".safetensors")] == []


@pytest.mark.slow
def test_hub_model_without_safetensors_says_how_to_convert_it(hub, spawn, tmp_path):
    served = hub("llama")
    (served.folder / "model.safetensors").rename(served.folder / "pytorch_model.bin")
    found = spawn("inspect", "org/name", env=served.environment(tmp_path / "home"))
    assert (found.code, found.stdout) == (2, "")
    assert "org/name" in found.stderr
    assert "save_pretrained" in found.stderr
    assert found.stderr.endswith("[no-safetensors]\n")


def test_name_that_the_hub_does_not_have_is_one_line(hub, spawn, tmp_path):
    found = spawn("inspect", "org/other", env=hub("llama").environment(tmp_path / "home"))
    assert found.code == 2
    assert "org/other" in found.stderr
    assert found.stderr.endswith("[hub-unavailable]\n")


@pytest.fixture
def refused(spawn, tmp_path) -> Callable[..., SimpleNamespace]:
    """Inspects `org/name`, which must be refused in one line."""

    def inspect(
        hub: Hub, code: str, *named: object, exit_code: int = 2, **options
    ) -> SimpleNamespace:
        environment = hub.environment(tmp_path / "home")
        found = spawn("inspect", "org/name", "-q", env=environment, **options)
        assert_refused(found, exit_code, code, *named)
        return found

    return inspect


@pytest.mark.slow
def test_model_in_the_cache_needs_no_hub(hub, spawn, tmp_path):
    served = hub("llama_sharded")
    environment = served.environment(tmp_path / "home")
    online = spawn("inspect", "org/name", "--json", env=environment)
    offline = spawn("inspect", "org/name", "--json", env=environment | {"HF_HUB_OFFLINE": "1"})
    assert online.code == offline.code == 0, offline.stderr
    assert online.stdout == offline.stdout


@pytest.mark.slow
def test_model_partly_in_the_cache_says_so_when_the_hub_is_out_of_reach(hub, spawn, tmp_path):
    served = hub("llama_sharded")
    shard = sorted(path.name for path in served.folder.glob("*.safetensors"))[1]
    environment = served.environment(tmp_path / "home")
    assert spawn("inspect", "org/name", env=environment).code == 0
    next((tmp_path / "home").rglob(shard)).unlink()
    found = spawn("inspect", "org/name", env=environment | {"HF_HUB_OFFLINE": "1"})
    assert found.code == 2
    assert f"{shard} of org/name" in found.stderr
    assert found.stderr.endswith("[hub-unavailable]\n")


def test_gated_model_says_how_to_get_at_it(hub, refused):
    served = hub("llama")
    served.gated = True
    refused(served, "gated-model", "org/name", "hf auth login")


@pytest.mark.slow
def test_broken_transfer_is_one_line_and_the_same_command_goes_on(hub, refused, spawn, tmp_path):
    served = hub("llama_sharded")
    served.cut = sorted(path.name for path in served.folder.glob("*.safetensors"))[-1]
    refused(served, "hub-unavailable", "org/name")
    before = len(served.fetched)
    served.cut = None
    assert spawn("inspect", "org/name", env=served.environment(tmp_path / "home")).code == 0
    again = [name for name in served.fetched[before:] if name.endswith(".safetensors")]
    assert len(set(again)) == 1


@pytest.mark.slow
def test_full_disk_is_reported_with_the_cache_that_needs_room(hub, refused):
    served = hub("llama")
    limit = (served.folder / SINGLE).stat().st_size // 2

    def no_large_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    refused(served, "cannot-write", "org/name", "HF_HOME", exit_code=1, preexec_fn=no_large_files)


def change_index(folder: Path, shard: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = shard
    (folder / INDEX).write_text(json.dumps(index))


def quantize(folder: Path, method: str = "gptq") -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "code", "named"),
    [
        (lambda f: (f / "config.json").unlink(), "no-config", "config.json"),
        (quantize, "kind-not-taken", "(gptq)"),
        (lambda f: quantize(f, "sparsekit"), "kind-not-taken", "hf download org/name"),
        (lambda f: change_index(f, "../x.safetensors"), "invalid-index", "'../x.safetensors'"),
        (lambda f: change_index(f, "x.safetensors"), "incomplete-checkpoint", " x.safetensors"),
        (lambda f: (f / SINGLE).write_bytes(b"x"), "ambiguous-weights", SINGLE),
    ],
    ids=["no config", "quantized", "packed", "outside", "missing shard", "two forms"],
)
def test_repository_that_is_not_a_checkpoint_is_refused_by_its_name(
    hub, refused, damage, code, named
):
    served = hub("llama_sharded")
    damage(served.folder)
    found = refused(served, code, "org/name", named)
    assert "snapshots" not in found.stderr  # the path in the hub's cache helps nobody


@pytest.mark.slow
def test_a_model_on_a_grid_of_ours_is_fetched_as_any_other(hub, spawn, tmp_path):
    served = hub("llama")
    words = ("--method", "rtn", "--grid", "int8", "-q")
    made = spawn("quantize", served.folder, "-o", tmp_path / "small", *words)
    assert made.code == 0, made.stderr
    shutil.rmtree(served.folder)
    shutil.copytree(tmp_path / "small", served.folder)
    environment = served.environment(tmp_path / "home")
    found = spawn("inspect", "org/name", "--json", "-q", env=environment)
    assert found.code == 0, found.stderr
    assert "int8" in found.stdout


@pytest.mark.slow
def test_a_hub_model_is_loaded_from_python_too(hub, tmp_path):
    served = hub("llama")
    code = "import sparsekit; print(type(sparsekit.load('org/name')).__name__)"
    environment = served.environment(tmp_path / "home")
    words = [sys.executable, "-c", code]
    found = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "LlamaForCausalLM" in found.stdout
