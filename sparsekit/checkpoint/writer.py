"""Writing a checkpoint of the same layout as its source: `OUT` exists exactly when it is complete.

Names, shapes and dtypes are known before the first weight is computed (those of the source, and of
the factors that weights will get), so each tensor has a known place in a file with a known header.
The files are laid out at full size in `OUT.partial` (a full disk shows at once); each finished part
is written to its place, made durable and entered into a journal; one rename publishes the folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.digest import TensorDigest, bytes_of
from sparsekit.checkpoint.entry import Entry, History
from sparsekit.checkpoint.folder import INDEX, OTHER_WEIGHTS, PACKED_INDEX, PROVENANCE, SINGLE
from sparsekit.checkpoint.layout import Layout
from sparsekit.checkpoint.output_folder import (
    LOCK,
    refuse_foreign,
    refuse_output,
    refuse_source,
    require_space,
)
from sparsekit.checkpoint.safetensors_file import read_tensor
from sparsekit.errors import DataError, StorageError, UsageError
from sparsekit.files import (
    exclusive,
    fsync_path,
    read_json,
    reserve,
    storage_errors,
    write_atomic,
    write_json,
)
from sparsekit.progress import SILENT, Progress

# Dot files, so that no file of a checkpoint has such a name and none is ever carried over.
JOURNAL = ".sparsekit-journal.jsonl"
RUN_KEY = ".sparsekit-run-key.json"
REPLACED = ".sparsekit-replaced"
# The one folder of a checkpoint; others (`original`, `onnx`) hold other forms of the model.
CHAT_TEMPLATES = "additional_chat_templates"
# Prefixes of files that belong to one run only.
OWN = (".", "sparsekit-training", "sparsekit-scores")
# What is not carried over from the source: weights in any format, and what sparsekit writes.
LEFT_OUT = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".partial")


class CheckpointWriter:
    """Writes one checkpoint, part by part; use it as a context manager.

    Args:
        out: The folder to make. The parts of an interrupted run are next to it.
        source: The checkpoint whose layout and other files the output takes.
        layout: The weight files to make; None: those of the source.
        key: Everything that decides the output's bytes. A run with the same key resumes
            an interrupted one.
        overwrite: Replace an existing output of sparsekit when the new one is complete.
        progress: Shows the reading of what an interrupted run has read of the source.

    Raises:
        UsageError: The output exists, is being written by another process, or an interrupted
            run with another key is in the way.
        StorageError: The disk has no room.
    """

    def __init__(
        self,
        out: Path,
        source: Checkpoint,
        key: Mapping[str, Any],
        *,
        layout: Layout | None = None,
        overwrite: bool = False,
        progress: Progress = SILENT,
    ) -> None:
        self.out = out
        self.source = source
        self.layout = Layout.of(source) if layout is None else layout
        self.finished: dict[str, Any] = {}
        """Part name to the note it was written with; filled from the journal of an earlier run."""
        self._digests: dict[str, str] = {}
        """Of the tensors that were written."""
        self._journaled: set[str] = set()
        """The tensors of the source whose digests the journal has."""
        self._progress = progress
        self._closing = contextlib.ExitStack()
        self._overwrite = overwrite
        refuse_source(out, source.path)
        refuse_output(out, overwrite=overwrite)
        self.partial = out.with_name(out.name + ".partial")
        self._key = json.loads(json.dumps(key))

    def __enter__(self) -> CheckpointWriter:
        with contextlib.ExitStack() as stack:
            refuse_foreign(self.partial)
            with storage_errors(self.partial):
                self.partial.mkdir(parents=True, exist_ok=True)
            stack.enter_context(exclusive(self.partial / LOCK))
            if (self.partial / RUN_KEY).is_file():
                self._resume()
            else:
                self._begin()
            self._closing = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.close()

    def write(self, part: str, tensors: Mapping[str, Tensor], note: Any) -> None:
        """Put tensors in their places and enter the part into the journal, durably.

        Args:
            part: The name under which the part is found again after an interruption.
            tensors: By name on disk, each with the shape and dtype of its place.
            note: A JSON value kept with the part.
        """
        with storage_errors(self.partial):
            digests = {name: self._put(name, tensor) for name, tensor in tensors.items()}
            for file in {self.layout.places[name].file for name in tensors}:
                fsync_path(self.partial / file)
            read = {n: d for n, d in self.source.digests.items() if n not in self._journaled}
            line = json.dumps({"part": part, "tensors": digests, "read": read, "note": note})
            with (self.partial / JOURNAL).open("a") as journal:
                journal.write(line + "\n")
                journal.flush()
                os.fsync(journal.fileno())
        self.finished[part] = note
        self._digests |= digests
        self._journaled |= read.keys()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of finished parts, as they were written."""
        places = self.layout.places
        return {name: read_tensor(self.partial, places[name]) for name in names}

    def complete(self, config: Mapping[str, Any] | None = None) -> None:
        """Copy what was not written, and the files besides the weights.

        Args:
            config: The contents of config.json; None: those of the source's.

        Raises:
            DataError: A tensor of the source is not finite, or was another when it was used.
            StorageError: The disk is full.
        """
        with storage_errors(self.partial):
            self._carry_over()
            if config is not None:
                write_json(self.partial / "config.json", config)
            for file in self.layout.headers:
                fsync_path(self.partial / file)

    def commit(self, entry: Entry, card: str, history: Sequence[Entry] | None = None) -> Checkpoint:
        """Add provenance and card to what is complete, and publish the folder.

        Args:
            entry: This stage's entry of the history.
            card: The text of README.md.
            history: The entries before this one; None: those of the source.

        Returns:
            The finished checkpoint.
        """
        output = Checkpoint.open(self.partial)
        output.digests |= self._digests
        fingerprint = output.scan()
        if history is None:
            history = self.source.provenance().history
        provenance = History(fingerprint=fingerprint, history=(*history, entry))
        write_json(self.partial / PROVENANCE, provenance.to_json())
        write_atomic(self.partial / "README.md", card.encode())
        with storage_errors(self.out):
            fsync_path(self.partial)
            self._publish()
            for name in (JOURNAL, RUN_KEY, LOCK):
                (self.out / name).unlink(missing_ok=True)
            if (self.out / REPLACED).is_dir():
                shutil.rmtree(self.out / REPLACED)
        return Checkpoint.open(self.out)

    def abandon(self) -> None:
        """Remove the folder next to the output: nothing in it is worth resuming."""
        self._discard()

    def _begin(self) -> None:
        try:
            require_space(self.partial, self.layout)
            with storage_errors(self.partial):
                for file, header in self.layout.headers.items():
                    _lay_out(self.partial / file, header, self.layout.size(file))
        except StorageError:
            self._discard()
            raise
        write_json(self.partial / RUN_KEY, self._key)

    def _resume(self) -> None:
        earlier = read_json(self.partial / RUN_KEY)
        if earlier != self._key:
            keys = sorted(earlier.keys() | self._key.keys())
            pairs = ((key, earlier.get(key), self._key.get(key)) for key in keys)
            differences = ", ".join(_difference(*pair) for pair in pairs if pair[1] != pair[2])
            raise self._other_run(differences)
        journal = self.partial / JOURNAL
        lines = journal.read_bytes().split(b"\n") if journal.is_file() else []
        whole = lines[:-1]  # a line without its end was cut off by the interruption
        write_atomic(journal, b"".join(line + b"\n" for line in whole))
        read: dict[str, str] = {}
        for line in whole:
            row = json.loads(line)
            self.finished[row["part"]] = row["note"]
            self._digests |= row["tensors"]
            read |= row["read"]
        if not self.source.has(read, self._progress):
            raise self._other_run("source")
        self._journaled |= read.keys()

    def _other_run(self, differences: str) -> UsageError:
        return UsageError(
            f"{self.partial} holds an interrupted run with another {differences}",
            "repeat that run, delete the folder, or choose another output",
            code="other-recipe",
        )

    def _put(self, name: str, tensor: Tensor) -> str:
        """Write a tensor to its place; returns the sha256 of its bytes."""
        place = self.layout.places[name]
        if tensor.dtype != place.dtype or tuple(tensor.shape) != place.shape:
            raise DataError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, its place in the file is "
                f"{place.dtype} {place.shape}",
                code="shape-mismatch",
            )
        digest = TensorDigest.of(tensor)
        if not digest.finite:
            raise DataError(f"{self.partial}: {name} holds NaN or Inf", code="not-finite")
        _write_pieces(self.partial / place.file, place.start, [bytes_of(tensor)])
        return digest.hex

    def _carry_over(self) -> None:
        """Copy the tensors that no part wrote, and every file that is not a weight."""
        for name in self.source.places:
            goal = self.layout.places.get(name)
            if goal is not None and name not in self._digests:
                _write_pieces(self.partial / goal.file, goal.start, self.source.pieces(name))
                self._digests[name] = self.source.digests[name]
        templates = self.source.path / CHAT_TEMPLATES
        if templates.is_dir():
            (self.partial / CHAT_TEMPLATES).mkdir(exist_ok=True)
            for file in sorted(templates.iterdir()):
                write_atomic(self.partial / CHAT_TEMPLATES / file.name, file.read_bytes())
        for file in sorted(self.source.path.iterdir()):
            own = file.name in (
                PROVENANCE,
                "README.md",
                INDEX,
                PACKED_INDEX,
            ) or file.name.startswith(OWN)
            if file.is_file() and not own and file.suffix not in LEFT_OUT:
                write_atomic(self.partial / file.name, file.read_bytes())
        self._write_index()

    def _write_index(self) -> None:
        """The index of the weight files, where loaders look for one."""
        files = self.layout.headers.keys()
        if OTHER_WEIGHTS in files:
            write_json(self.partial / PACKED_INDEX, self.layout.index())
            return
        index = self.source.path / INDEX
        kept = self.source.headers.keys() <= files
        kept = kept and self.source.places.keys() <= self.layout.places.keys()
        if kept and index.is_file():
            write_atomic(self.partial / INDEX, index.read_bytes())
        elif SINGLE not in files:
            write_json(self.partial / INDEX, self.layout.index())

    def _publish(self) -> None:
        # The run may have taken hours: what is at the output now is looked at again.
        refuse_output(self.out, overwrite=self._overwrite)
        # The old output waits in the new one's folder: after a kill between the two renames the
        # same command finds it there.
        if self.out.exists():
            os.rename(self.out, self.partial / REPLACED)
        os.rename(self.partial, self.out)
        fsync_path(self.out.parent)

    def _discard(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)


def _difference(key: str, earlier: Any, now: Any) -> str:
    """A part of two run keys that differs, with both values where they are short words."""
    short = all(isinstance(v, (str, int, float)) and len(str(v)) < 30 for v in (earlier, now))
    return f"{key} ({earlier}, now {now})" if short else key


def _lay_out(target: Path, header: bytes, size: int) -> None:
    """A file of this size that begins with this header."""
    handle = os.open(target, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o666)
    try:
        reserve(handle, size)
        _write_at(handle, memoryview(header), 0)
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_pieces(target: Path, start: int, pieces: Iterable[Tensor]) -> None:
    """Write bytes into a file from an offset on."""
    handle = os.open(target, os.O_WRONLY)
    try:
        for piece in pieces:
            _write_at(handle, memoryview(piece.numpy()), start)
            start += piece.numel()
    finally:
        os.close(handle)


def _write_at(handle: int, data: memoryview, start: int) -> None:
    while data:
        count = os.pwrite(handle, data, start)
        data, start = data[count:], start + count
