"""Names of models: folders, the demo model, a hub's, and what is no model."""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sparsekit.errors import DataError, UsageError
from sparsekit.files import cache_dir, sha256_file
from sparsekit.models.demo import SMOLLM2
from sparsekit.models.folder import INDEX
from sparsekit.models.reference import check, resolve, title

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_missing_folder_is_named_with_what_may_stand_there(tmp_path):
    with pytest.raises(DataError, match=r"no such model folder: .*/nowhere.*hub id"):
        resolve(str(tmp_path / "nowhere"))


def test_path_of_a_file_is_no_model(family):
    with pytest.raises(DataError, match="no such model folder"):
        resolve(str(family("llama") / "config.json"))


def test_empty_name_is_refused():
    with pytest.raises(UsageError, match="empty"):
        resolve("")


def test_folder_is_taken_as_it_is(family, monkeypatch):
    assert resolve(str(family("llama"))) == family("llama")
    monkeypatch.chdir(family("llama").parents[0])
    assert resolve("llama") == Path("llama")
    monkeypatch.chdir(family("llama").parents[1])
    assert resolve(f"{family('llama').parent.name}/llama").is_dir()  # not taken for a hub id


@pytest.fixture
def demo_folder(tmp_path, monkeypatch) -> Path:
    """Where the demo model lies once it has been fetched."""
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path))
    folder = cache_dir() / "demo" / f"{SMOLLM2.package}-{SMOLLM2.version}" / SMOLLM2.model
    folder.mkdir(parents=True)
    return folder


def test_demo_is_the_folder_in_the_cache(demo_folder):
    assert resolve("demo") == demo_folder


def test_folder_called_demo_is_reached_by_its_path(demo_folder, tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("./demo") == Path("demo")


@pytest.mark.parametrize(
    ("reference", "expected"),
    [("demo", "SmolLM2-135M-Instruct"), ("org/name", "name"), ("a/b/pruned/", "pruned")],
)
def test_title_is_the_name_without_its_place(reference, expected):
    assert title(reference) == expected


@pytest.mark.parametrize(
    ("reference", "meant"),
    [("dmo", r"did you mean 'demo'"), ("lama", r"did you mean 'llama'"), ("x", r"pass a folder")],
)
def test_near_miss_is_told_what_could_be_meant(family, monkeypatch, reference, meant):
    monkeypatch.chdir(family("llama").parent)
    with pytest.raises(DataError, match=rf"no such model folder: {reference}; {meant}"):
        check(reference)


def test_check_refuses_a_folder_without_a_checkpoint_and_leaves_hub_ids_alone(tmp_path):
    with pytest.raises(DataError, match=r"has no config\.json"):
        check(str(tmp_path))
    with pytest.raises(UsageError, match="empty"):
        check("")
    check("org/name")
    check("demo")


# A hub: the requests that a download takes, answered on this machine


class Hub:
    """A model hub that serves one folder as `org/name`, and notes what was fetched from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fetched: list[str] = []
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
                elif (hub.folder / name).is_file():
                    if body:
                        hub.fetched.append(name)
                    self._send(200, (hub.folder / name).read_bytes(), body=body)
                else:
                    found = self.path.startswith("/org/name/")
                    self.code = "EntryNotFound" if found else "RepoNotFound"
                    self._send(404, b"", body=body)

            def _send(self, status: int, data: bytes, *, body: bool) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                if status == 404:
                    self.send_header("X-Error-Code", self.code)
                self.end_headers()
                if body:
                    self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def environment(self, home: Path) -> dict[str, str]:
        """What makes a process take this hub for the hub."""
        hidden = ("HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
        own = {name: value for name, value in os.environ.items() if name not in hidden}
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


def test_hub_model_of_an_unknown_type_is_refused_before_its_weights(hub, spawn, tmp_path):
    served = hub("llama")
    config = json.loads((served.folder / "config.json").read_text())
    (served.folder / "config.json").write_text(json.dumps({**config, "model_type": "llama9"}))
    found = spawn("inspect", "org/name", env=served.environment(tmp_path / "home"))
    assert found.code == 2
    assert "'llama9'" in found.stderr
    assert [name for name in served.fetched if name.endswith(".safetensors")] == []


def test_hub_model_without_safetensors_says_how_to_convert_it(hub, spawn, tmp_path):
    served = hub("llama")
    (served.folder / "model.safetensors").rename(served.folder / "pytorch_model.bin")
    found = spawn("inspect", "org/name", env=served.environment(tmp_path / "home"))
    assert (found.code, found.stdout) == (2, "")
    assert "org/name has no safetensors weights" in found.stderr
    assert "save_pretrained" in found.stderr


def test_name_that_the_hub_does_not_have_is_one_line(hub, spawn, tmp_path):
    found = spawn("inspect", "org/other", env=hub("llama").environment(tmp_path / "home"))
    assert found.code == 2
    assert "no folder org/other, and the hub did not give a model of that name" in found.stderr
