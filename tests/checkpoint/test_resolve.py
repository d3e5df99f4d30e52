"""Names of models: folders, the demo model, and what is no model."""

from pathlib import Path

import pytest

from sparsekit.checkpoint.demo_model import SMOLLM2
from sparsekit.checkpoint.resolve import check_reference, display_name, resolve
from sparsekit.errors import DataError, UsageError
from sparsekit.files import cache_dir


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
    assert display_name(reference) == expected


@pytest.mark.parametrize(
    ("reference", "meant"),
    [("dmo", r"did you mean 'demo'"), ("lama", r"did you mean 'llama'"), ("x", r"pass a folder")],
)
def test_near_miss_is_told_what_could_be_meant(family, monkeypatch, reference, meant):
    monkeypatch.chdir(family("llama").parent)
    with pytest.raises(DataError, match=rf"no such model folder: {reference}; {meant}"):
        check_reference(reference)


def test_check_refuses_a_folder_without_a_checkpoint_and_leaves_hub_ids_alone(tmp_path):
    with pytest.raises(DataError, match=r"has no config\.json"):
        check_reference(str(tmp_path))
    with pytest.raises(UsageError, match="empty"):
        check_reference("")
    check_reference("org/name")
    check_reference("demo")


@pytest.mark.parametrize("name", ["./" + "n" * 300, "~nobody-of-this-name/x", "a\nb", "a/b/c"])
def test_name_that_no_folder_can_have_is_refused_like_any_other(name):
    with pytest.raises(DataError, match="no such model folder"):
        check_reference(name)
