"""References of models: folders, the demo model, and words that are neither."""

from pathlib import Path

import pytest
from refusals import refused

from sparsekit.checkpoint.demo_model import SMOLLM2
from sparsekit.checkpoint.resolve import check_reference, display_name, resolve
from sparsekit.errors import DataError, UsageError
from sparsekit.files import cache_dir


def test_missing_folder_is_named_with_the_alternatives(tmp_path):
    with refused("no-such-model", "/nowhere", "hub id", "'demo'", kind=DataError):
        resolve(str(tmp_path / "nowhere"))


def test_path_of_a_file_is_refused(family):
    with refused("not-a-folder", "llama/config.json", kind=DataError):
        resolve(str(family("llama") / "config.json"))


def test_empty_name_is_refused():
    with refused("empty-name", kind=UsageError):
        resolve("")


def test_folder_is_taken_as_it_is(family, monkeypatch):
    assert resolve(str(family("llama"))) == family("llama")
    monkeypatch.chdir(family("llama").parents[0])
    assert resolve("llama") == Path("llama")
    monkeypatch.chdir(family("llama").parents[1])
    assert resolve(f"{family('llama').parent.name}/llama").is_dir()  # not taken for a hub id


@pytest.fixture
def demo_folder(tmp_path, monkeypatch) -> Path:
    """The folder of the demo model, as if it had been fetched."""
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
def test_display_name_is_the_last_part(reference, expected):
    assert display_name(reference) == expected


@pytest.mark.parametrize(
    ("reference", "hint"),
    [("dmo", "did you mean 'demo'"), ("lama", "did you mean 'llama'"), ("x", "hub id")],
)
def test_near_miss_gets_a_suggestion(family, monkeypatch, reference, hint):
    monkeypatch.chdir(family("llama").parent)
    with refused("no-such-model", f": {reference}; ", hint, kind=DataError):
        check_reference(reference)


def test_check_refuses_a_folder_without_a_checkpoint_and_leaves_hub_ids_alone(tmp_path):
    with refused("no-config", tmp_path, kind=DataError):
        check_reference(str(tmp_path))
    with refused("empty-name", kind=UsageError):
        check_reference("")
    check_reference("org/name")
    check_reference("demo")


@pytest.mark.parametrize("name", ["./" + "n" * 300, "~nobody-of-this-name/x", "a\nb", "a/b/c"])
def test_name_that_no_folder_can_have_is_refused_like_any_other(name):
    with refused("no-such-model", name, kind=DataError):
        check_reference(name)
