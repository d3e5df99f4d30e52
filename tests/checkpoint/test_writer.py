"""Writing a checkpoint: nothing of value is overwritten, and no failure costs finished work."""

import contextlib
import json
import os
import resource
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file

from sparsekit.checkpoint import output_folder as output
from sparsekit.checkpoint import writer as module
from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.entry import History, UnpackEntry
from sparsekit.checkpoint.entry_parts import Settings, Source, UnpackedTotals
from sparsekit.checkpoint.folder import INDEX
from sparsekit.checkpoint.writer import CheckpointWriter
from sparsekit.errors import DataError, StorageError, UsageError
from sparsekit.files import sha256_file
from sparsekit.progress import Progress
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.prune import prune

RECIPE = {"method": "none", "seed": 3}
UP, DOWN = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("up", "down"))

ENTRY = UnpackEntry(
    stage="unpack",
    model="m",
    words={},
    source=Source(path="m", fingerprint="a" * 64),
    settings=Settings(method="unpack"),
    versions={},
    totals=UnpackedTotals(weights=0, products=0, bytes=0, bytes_before=0),
    seconds=0.0,
    peak_memory_bytes=None,
)


def writer(source: Path, out: Path, recipe=RECIPE, **options) -> CheckpointWriter:
    return CheckpointWriter(out, Checkpoint.open(source), recipe, **options)


def write_all(source: Path, out: Path, changes: dict, **options) -> Checkpoint:
    """A copy of a checkpoint with some tensors changed."""
    with writer(source, out, **options) as opened:
        for name, tensor in changes.items():
            opened.write(name, {name: tensor}, [name])
        opened.complete()
        return opened.commit(ENTRY, "card\n")


def zeros_like(source: Path, name: str) -> torch.Tensor:
    return torch.zeros_like(Checkpoint.open(source).read([name])[name])


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below a folder with its sha256."""
    return {
        str(path.relative_to(folder)): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def header(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


# What is written


@pytest.mark.parametrize("name", ["llama", "llama_sharded", "gpt2"])
def test_output_has_the_headers_and_shards_of_its_source(family, tmp_path, name):
    source = family(name)
    changed = next(n for n, p in Checkpoint.open(source).places.items() if len(p.shape) == 2)
    made = write_all(source, tmp_path / "out", {changed: zeros_like(source, changed)})
    assert made.path == tmp_path / "out"
    files = sorted(path.name for path in source.glob("*.safetensors"))
    assert sorted(path.name for path in made.path.glob("*.safetensors")) == files
    for file in files:
        assert header(made.path / file) == header(source / file)
        before, after = load_file(source / file), load_file(made.path / file)
        for tensor in before:
            expected = torch.zeros_like(before[tensor]) if tensor == changed else before[tensor]
            assert torch.equal(after[tensor], expected)
            assert after[tensor].dtype == expected.dtype


def test_output_without_a_change_is_the_source_byte_for_byte(family, tmp_path):
    source = family("llama_sharded")
    write_all(source, tmp_path / "out", {})
    before, after = snapshot(source), snapshot(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"sparsekit.json", "README.md"}


def test_provenance_has_the_fingerprint_and_the_sources_history(copy_of, tmp_path):
    source = copy_of("llama")
    made = write_all(source, tmp_path / "one", {UP: zeros_like(source, UP)})
    again = write_all(made.path, tmp_path / "two", {})
    assert made.provenance() == History(format=1, fingerprint=made.scan(), history=(ENTRY,))
    assert again.provenance().history == (ENTRY, ENTRY)
    assert again.scan() == made.scan() != Checkpoint.open(source).scan()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_gives(family, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_all(family("llama"), tmp_path / "out", {UP: zeros_like(family("llama"), UP)})
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == dict.fromkeys(modes, mode)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask


def test_source_whose_files_are_links_gives_real_files(family, tmp_path):
    """The hub's cache keeps a model as links into another folder."""
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for file in family("llama_sharded").iterdir():
        (linked / file.name).symlink_to(file)
    write_all(linked, tmp_path / "out", {})
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    before, after = snapshot(family("llama_sharded")), snapshot(tmp_path / "out")
    assert {name: after[name] for name in before} == before


def test_other_weights_and_hidden_files_are_not_carried_over(copy_of, tmp_path):
    source = copy_of("llama")
    for name in ("pytorch_model.bin", "model.gguf", ".gitattributes", "README.md", "adapter.pt"):
        (source / name).write_text("x")
    (source / "chat_template.jinja").write_text("kept")
    write_all(source, tmp_path / "out", {})
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "chat_template.jinja" in names
    assert not names & {"pytorch_model.bin", "model.gguf", ".gitattributes", "adapter.pt"}
    assert (tmp_path / "out" / "README.md").read_text() == "card\n"


def test_tensor_that_the_index_does_not_list_keeps_its_bytes(copy_of, tmp_path):
    source = copy_of("llama_sharded")
    index = json.loads((source / INDEX).read_text())
    shard = min(index["weight_map"].values())
    tensors = load_file(source / shard) | {"extra": torch.arange(64.0)}
    save_file(tensors, source / shard, {"format": "pt"})
    write_all(source, tmp_path / "out", {})
    assert torch.equal(load_file(tmp_path / "out" / shard)["extra"], torch.arange(64.0))


def test_missing_parent_folders_are_made(family, tmp_path):
    made = write_all(family("llama"), tmp_path / "a" / "b" / "out", {})
    assert made.scan() == Checkpoint.open(family("llama")).scan()


@pytest.mark.parametrize("tensor", [torch.zeros(64, 32), torch.zeros(32, 64, dtype=torch.bfloat16)])
def test_tensor_of_another_dtype_or_shape_is_refused(family, tmp_path, tensor):
    with writer(family("llama"), tmp_path / "out") as opened:
        with refused("shape-mismatch", UP, "torch.bfloat16", kind=DataError):
            opened.write("part", {UP: tensor}, None)
        assert opened.finished == {}


# What is refused


def test_existing_output_is_refused_and_untouched(family, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("x")
    with refused("output-exists", "out", "--overwrite", kind=UsageError):
        writer(family("llama"), tmp_path / "out")
    assert snapshot(tmp_path) == {"out/kept": sha256_file(tmp_path / "out" / "kept")}


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_overwrite_refuses_what_sparsekit_did_not_write(family, tmp_path, kind):
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "kept").write_text("x")
    else:
        out.write_text("x")
    before = snapshot(tmp_path)
    code = "not-by-sparsekit" if kind == "folder" else "not-a-folder"
    with refused(code, out, kind=UsageError):
        writer(family("llama"), out, overwrite=True)
    assert snapshot(tmp_path) == before


def test_overwrite_takes_an_empty_folder(family, tmp_path):
    (tmp_path / "out").mkdir()
    assert write_all(family("llama"), tmp_path / "out", {}, overwrite=True).places


def test_overwrite_keeps_the_old_output_until_the_new_one_is_complete(family, tmp_path):
    out, source = tmp_path / "out", family("llama")
    write_all(source, out, {UP: zeros_like(source, UP)})
    before = snapshot(out)
    with writer(source, out, overwrite=True) as opened:
        opened.write("part", {DOWN: zeros_like(source, DOWN)}, None)
        assert snapshot(out) == before
    assert snapshot(out) == before  # left without a commit
    write_all(source, out, {DOWN: zeros_like(source, DOWN)}, overwrite=True)
    assert not Checkpoint.open(out).read([DOWN])[DOWN].any()
    assert Checkpoint.open(out).read([UP])[UP].any()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_leaves_every_other_folder_alone(family, tmp_path):
    out, source = tmp_path / "out", family("llama")
    write_all(source, out, {})
    beside = tmp_path / "out.replaced-by-me"
    shutil.copytree(out, beside)
    before = snapshot(beside)
    write_all(source, out, {UP: zeros_like(source, UP)}, overwrite=True)
    assert snapshot(beside) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.replaced-by-me"]


def test_run_killed_between_its_two_renames_is_finished_by_the_same_one(
    family, tmp_path, monkeypatch
):
    out, source = tmp_path / "out", family("llama")
    changed = {UP: zeros_like(source, UP)}
    write_all(source, out, {})
    rename, calls = os.rename, []

    def killed(*paths):
        calls.append(paths)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(*paths)

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        write_all(source, out, changed, overwrite=True)
    monkeypatch.undo()
    assert not out.exists()
    write_all(source, out, {}, overwrite=True)
    assert not Checkpoint.open(out).read([UP])[UP].any()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not any(path.name.startswith(".sparsekit") for path in out.iterdir())


@pytest.mark.parametrize("target", ["there", "nowhere"])
def test_link_is_no_output(family, tmp_path, target):
    (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / target)
    with refused("output-is-link", "out", kind=UsageError):
        writer(family("llama"), tmp_path / "out", overwrite=True)


def test_room_that_a_killed_run_has_laid_out_is_not_asked_for_again(family, tmp_path, monkeypatch):
    source = Checkpoint.open(family("llama"))
    shutil.copy(family("llama") / "model.safetensors", tmp_path)
    usage = shutil.disk_usage("/")
    needed = source.n_bytes + output.SPARE_BYTES
    monkeypatch.setattr(
        module.shutil, "disk_usage", lambda _: usage._replace(free=needed - source.n_bytes)
    )
    output.require_space(tmp_path, source)
    (tmp_path / "model.safetensors").unlink()
    with refused("not-enough-disk", kind=StorageError):
        output.require_space(tmp_path, source)


def test_further_chat_templates_are_carried_over(copy_of, tmp_path):
    source = copy_of("llama")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    write_all(source, tmp_path / "out", {})
    carried = tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja"
    assert carried.read_text() == "{{ messages }}"


@pytest.mark.parametrize("overwrite", [False, True])
def test_model_itself_or_a_folder_around_it_is_no_output(copy_of, tmp_path, overwrite):
    source = copy_of("llama")
    (source / "sparsekit.json").write_text('{"history": []}')
    (tmp_path / "sparsekit.json").write_text('{"history": []}')
    before = snapshot(tmp_path)
    with refused("output-is-source", kind=UsageError):
        writer(source, source, overwrite=overwrite)
    with refused("output-is-source", kind=UsageError):
        writer(source, source.parent / "x" / ".." / source.name, overwrite=overwrite)
    (tmp_path / "link").symlink_to(source)
    with refused("output-is-source", kind=UsageError):
        writer(source, tmp_path / "link", overwrite=overwrite)
    (tmp_path / "link").unlink()
    with refused("output-is-source", tmp_path, source, kind=UsageError):
        writer(source, tmp_path, overwrite=overwrite)
    assert snapshot(tmp_path) == before


def test_output_that_another_process_writes_is_refused(family, tmp_path):
    with (
        writer(family("llama"), tmp_path / "out"),
        refused("output-in-use", "out.partial", kind=UsageError),
        writer(family("llama"), tmp_path / "out"),
    ):
        pass
    write_all(family("llama"), tmp_path / "out", {})  # the lock went with its holder


def test_folder_that_appears_at_the_output_meanwhile_is_not_replaced(family, tmp_path):
    source, out = family("llama"), tmp_path / "out"
    with writer(source, out) as opened:
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
        with refused("output-exists", out, kind=UsageError):
            opened.complete()
            opened.commit(ENTRY, "card\n")
    assert (out / "thesis.txt").read_text() == "mine"


def test_foreign_folder_beside_the_output_is_left_alone(family, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "model.safetensors").write_text("mine")
    with refused("not-by-sparsekit", "out.partial", kind=UsageError):
        write_all(family("llama"), tmp_path / "out", {})
    assert (tmp_path / "out.partial" / "model.safetensors").read_text() == "mine"


def test_source_files_named_like_a_control_file_are_carried_over(copy_of, tmp_path):
    source = copy_of("llama")
    for name in ("recipe.json", "journal.jsonl", "lock"):
        (source / name).write_text(name)
    write_all(source, tmp_path / "out", {})
    for name in ("recipe.json", "journal.jsonl", "lock"):
        assert (tmp_path / "out" / name).read_text() == name


# Interruption


def test_interrupted_run_goes_on_with_its_finished_parts(family, tmp_path):
    source, out = family("llama"), tmp_path / "out"
    with contextlib.suppress(KeyboardInterrupt), writer(source, out) as opened:
        opened.write("one", {UP: zeros_like(source, UP)}, {"rows": [1, 2]})
        raise KeyboardInterrupt
    assert not out.exists()
    with writer(source, out) as opened:
        assert opened.finished == {"one": {"rows": [1, 2]}}
        assert not opened.read([UP])[UP].any()
        opened.write("two", {DOWN: zeros_like(source, DOWN)}, None)
        opened.complete()
        opened.commit(ENTRY, "card\n")
    whole = write_all(
        source, tmp_path / "whole", {n: zeros_like(source, n) for n in (UP, DOWN)}
    ).path
    assert snapshot(out) == snapshot(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_journal_line_that_was_cut_off_does_not_count(family, tmp_path):
    source, out = family("llama"), tmp_path / "out"
    with writer(source, out) as opened:
        opened.write("one", {UP: zeros_like(source, UP)}, None)
        opened.write("two", {DOWN: zeros_like(source, DOWN)}, None)
    journal = tmp_path / "out.partial" / ".sparsekit-journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-4])
    with writer(source, out) as opened:
        assert list(opened.finished) == ["one"]
        opened.complete()
        made = opened.commit(ENTRY, "card\n")
    # The second part was not finished, so its tensor is the source's.
    assert torch.equal(made.read([DOWN])[DOWN], Checkpoint.open(source).read([DOWN])[DOWN])
    assert not made.read([UP])[UP].any()


def test_part_that_follows_a_cut_off_line_is_found_again(family, tmp_path):
    source, out = family("llama"), tmp_path / "out"
    with writer(source, out) as opened:
        opened.write("one", {UP: zeros_like(source, UP)}, None)
    with (tmp_path / "out.partial" / ".sparsekit-journal.jsonl").open("ab") as journal:
        journal.write(b'{"part": "tw')
    with writer(source, out) as opened:
        opened.write("three", {DOWN: zeros_like(source, DOWN)}, None)
    with writer(source, out) as opened:
        assert list(opened.finished) == ["one", "three"]


@pytest.mark.parametrize(
    ("recipe", "fields"),
    [
        ({"method": "none", "seed": 4}, "seed (3, now 4)"),
        ({"method": "other", "seed": 4}, "method (none, now other), seed (3, now 4)"),
        ({"method": "none"}, "seed"),
        ({"method": "none", "seed": 3, "more": 1}, "more"),
    ],
)
def test_interrupted_run_of_another_recipe_is_named_by_its_differing_fields(
    family, tmp_path, recipe, fields
):
    source, out = family("llama"), tmp_path / "out"
    with writer(source, out) as opened:
        opened.write("one", {UP: zeros_like(source, UP)}, None)
    before = snapshot(tmp_path)
    with (
        refused("other-recipe", f"another {fields}; ", kind=UsageError),
        writer(source, out, recipe),
    ):
        pass
    assert snapshot(tmp_path) == before


def test_command_with_another_seed_does_not_go_on_with_an_interrupted_one(
    family, row_file, tmp_path
):
    class Stop(Progress):
        def step(self, label: str) -> None:
            raise KeyboardInterrupt

    source = str(family("llama"))
    config = PruneConfig(calibration=str(row_file))
    with pytest.raises(KeyboardInterrupt):
        prune(config, source, tmp_path / "out", progress=Stop())
    other = PruneConfig(calibration=str(row_file), samples=2, pattern="1:4")
    with refused("other-recipe", "calibration, pattern (2:4, now 1:4)", kind=UsageError):
        prune(other, source, tmp_path / "out")
    assert prune(config, source, tmp_path / "out").entry.resumed_blocks == 1


# A disk that is full


def test_too_little_free_space_is_refused_before_anything_is_written(family, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**6))
    with (
        refused("not-enough-disk", "0.07 GB", "0.00 GB free", kind=StorageError),
        writer(family("llama"), tmp_path / "out"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_output_below_a_file_cannot_be_written(family, tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        refused("not-a-folder", "file/out", "/file is", kind=UsageError),
        writer(family("llama"), tmp_path / "file" / "out"),
    ):
        pass


@contextlib.contextmanager
def largest_file(n_bytes: int):
    """Let every write beyond so many bytes of a file fail, as a full disk does (EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))  # Python ignores SIGXFSZ
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_failing_layout_leaves_nothing_and_the_source_untouched(copy_of, row_file, tmp_path):
    source, out = copy_of("llama"), tmp_path / "out"
    before = snapshot(source)
    config = PruneConfig(calibration=str(row_file))
    with largest_file(20_000), refused("cannot-write", "File too large", kind=StorageError):
        prune(config, str(source), out)
    assert snapshot(source) == before
    assert [path.name for path in tmp_path.iterdir()] == [source.name]
    assert prune(config, str(source), out).entry.resumed_blocks == 0


def test_write_error_at_the_end_keeps_all_blocks_for_the_same_command(copy_of, row_file, tmp_path):
    source, out = copy_of("llama_sharded"), tmp_path / "out"
    (source / "vocabulary.txt").write_bytes(b"word\n" * 40_000)  # larger than any shard
    before = snapshot(source)
    config = PruneConfig(method="sparsegpt", calibration=str(row_file))
    with largest_file(150_000), refused("cannot-write", kind=StorageError):
        prune(config, str(source), out)
    assert not out.exists()
    assert snapshot(source) == before
    assert prune(config, str(source), out).entry.resumed_blocks == 2
    whole = prune(config, str(source), tmp_path / "whole").out
    for path in whole.glob("*.safetensors"):
        assert sha256_file(path) == sha256_file(out / path.name)
    assert (out / "vocabulary.txt").read_bytes() == (source / "vocabulary.txt").read_bytes()


def test_disk_that_fills_up_on_the_way_costs_no_finished_block(
    family, row_file, tmp_path, small_disk
):
    class Fill(Progress):
        """Takes all room once the first block is finished."""

        def step(self, label: str) -> None:
            with contextlib.suppress(OSError), (small_disk / "filler").open("wb", 0) as filler:
                while filler.write(bytes(1 << 16)):
                    pass

    out = small_disk / "out"
    config = PruneConfig(method="sparsegpt", calibration=str(row_file))
    source = str(family("llama_deep"))
    with refused("cannot-write", "No space left", kind=StorageError):
        prune(config, source, out, progress=Fill())
    assert not out.exists()
    (small_disk / "filler").unlink()
    resumed = prune(config, source, out)
    assert resumed.entry.resumed_blocks >= 1
    whole = prune(config, source, tmp_path / "whole").out
    for path in whole.glob("*.safetensors"):
        assert sha256_file(path) == sha256_file(out / path.name)
