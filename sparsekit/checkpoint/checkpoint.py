"""A Hugging Face checkpoint on disk, read lazily: headers first, tensors on request."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsekit.checkpoint.digest import TensorDigest, fingerprint_of
from sparsekit.checkpoint.entry import Entry, History
from sparsekit.checkpoint.folder import (
    FACTORS,
    INDEX,
    OTHER_WEIGHTS,
    PROVENANCE,
    SINGLE,
    load_config,
    load_tokenizer,
    quantization,
    weight_files,
)
from sparsekit.checkpoint.foreign import named_format
from sparsekit.checkpoint.kind import Kind, kind_of, refusal
from sparsekit.checkpoint.safetensors_file import TensorPlace, read_header, read_into, read_tensor
from sparsekit.errors import DamagedError, DataError
from sparsekit.files import CHUNK, read_json, sha256_json
from sparsekit.progress import SILENT, Progress
from sparsekit.weights.grids import Grid

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from sparsekit.checkpoint.stored_form import StoredForm
    from sparsekit.weights.form import Form


# The hint for a damaged one.
AGAIN = "copy the folder again"
# Reading a checkpoint of fewer bytes is too quick for a progress bar.
QUIET_BYTES = 1 << 30
# Stages whose history entries record a pattern for each weight.
PATTERN_STAGES = ("prune", "recover", "pack")


@dataclass(eq=False)
class Checkpoint:
    """A folder with `config.json` and safetensors weights."""

    path: Path
    places: Mapping[str, TensorPlace]
    """Every tensor of the model by name, in name order. A weight on a grid has the dtype of its
    scales and the place of its codes."""
    tensors: Mapping[str, TensorPlace]
    """Every tensor of the files by name, in name order."""
    headers: Mapping[str, int]
    """Weight files by name, with the offset of their data in bytes."""
    packed: Mapping[str, StoredForm] = field(default_factory=dict)
    """Each weight with a packed core, alone or next to its product."""
    grid: Grid | None = None
    """The grid of the weights in `quantized`; None if there are none, or in an unsupported
    format."""
    quantized: Mapping[str, StoredForm] = field(default_factory=dict)
    """Each weight on a grid in the format of compressed-tensors."""
    digests: dict[str, str] = field(default_factory=dict, init=False, repr=False)
    """The sha256 of the bytes of each tensor that was read and checked, or written."""
    damaged: bool = field(default=False, init=False, repr=False)
    """Whether reading found NaN, Inf, or other bytes than the recorded ones."""
    _fingerprint: str = field(default="", init=False, repr=False)
    _watched: bool = field(default=False, init=False, repr=False)

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Open the checkpoint in a local folder; headers are read and checked, data is not.

        Raises:
            DataError: The folder is missing, incomplete, or not in the safetensors format.
            DamagedError: So is a packed checkpoint that sparsekit wrote.
        """
        with _damage(path):
            return cls._open(path)

    @classmethod
    def _open(cls, path: Path) -> Checkpoint:
        places, headers = _read_headers(path)
        tensors, packed, quantized = dict(places), {}, {}
        if (path / FACTORS).is_file():
            factors, _ = read_header(path / FACTORS)
            tensors |= factors
            from sparsekit.checkpoint.stored_form import packed_forms

            packed = packed_forms(path, factors)
        grid = None
        if (settings := quantization(path)) is not None:
            from sparsekit.checkpoint.compressed_tensors import decoded_places, grid_of

            if (grid := grid_of(settings)) is not None:
                places, quantized = decoded_places(path, places, grid)
        return cls(
            path=path,
            places=dict(sorted(places.items())),
            tensors=dict(sorted(tensors.items())),
            headers=headers,
            packed=packed,
            grid=grid,
            quantized=quantized,
        )

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration.

        Raises:
            DataError: It cannot be read, needs remote code, or is unknown to transformers.
        """
        return load_config(self.path)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that is stored with the weights.

        Raises:
            DataError: There is none.
        """
        return load_tokenizer(self.path)

    @property
    def n_bytes(self) -> int:
        """Size of all weight files, in bytes."""
        files = {*self.headers, *(place.file for place in self.tensors.values())}
        return sum((self.path / file).stat().st_size for file in files)

    @cached_property
    def kind(self) -> Kind:
        """How the linear weights are stored."""
        return kind_of(
            read_json(self.path / "config.json"),
            on_grid=self.grid is not None,
            factors=bool(self.packed),
            alone=OTHER_WEIGHTS in self.headers,
        )

    def require(self, verb: str) -> None:
        """Refuse this checkpoint for a verb that does not take its kind.

        Raises:
            DataError: The verb does not take it; the hint says what to do instead.
        """
        detail = f" to {self.grid}" if self.grid else ""
        if self.kind in (Kind.LEGACY, Kind.FOREIGN):
            detail = named_format(read_json(self.path / "config.json"))
        if (error := refusal(verb, self.kind, self.path, detail)) is not None:
            raise error

    @property
    def layout(self) -> str:
        """The sha256 over the place, dtype and shape of every tensor."""
        return sha256_json(
            [[n, p.file, p.start, str(p.dtype), list(p.shape)] for n, p in self.places.items()]
        )

    @property
    def fingerprint(self) -> str:
        """The result of `scan`, with its errors."""
        return self.scan()

    def provenance(self) -> History:
        """The contents of `sparsekit.json`; an empty history if there is none.

        Raises:
            DataError: The file is not a history that this version reads.
        """
        file = self.path / PROVENANCE
        return History.read(file) if file.is_file() else History()

    def pruned(self, *, converted: bool = False) -> list[Entry]:
        """The history entries that gave this checkpoint its pattern, or trained it.

        Args:
            converted: Also conversions that found a pattern; they name no dense model.
        """
        return [
            entry
            for entry in self.provenance().history
            if entry.stage in PATTERN_STAGES
            or (converted and entry.stage == "convert" and entry.settings.pattern)
        ]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies of the named tensors, in their dtype on disk."""
        tensors = {}
        for name in names:
            if name in self.quantized:
                form = self.quantized[name].form(self.path, self.places[name].shape)
                tensors[name] = form.dense()
            else:
                tensors[name] = read_tensor(self.path, self.tensors[name])
                if self._watched:
                    self._note(name, TensorDigest.of(tensors[name]))
        return tensors

    def form(self, name: str, shape: tuple[int, int]) -> Form:
        """A weight `[out, in]` with a packed core, or one on a grid.

        Raises:
            FactorsError: A part is missing, or the parts do not fit together.
            DataError: Those of a weight on a grid do not fit together.
        """
        return self.stored(name).form(self.path, shape)

    def stored(self, name: str) -> StoredForm:
        """The stored form of such a weight."""
        return self.packed.get(name) or self.quantized[name]

    def watch(self) -> None:
        """Take the digest of each tensor that is read from now on, so that `scan` need not."""
        self._watched = True

    def has(self, digests: Mapping[str, str], progress: Progress = SILENT) -> bool:
        """Whether tensors have these digests; those of unknown ones are read.

        Raises:
            DataError: A tensor holds NaN or Inf.
        """
        if not digests.keys() <= self.tensors.keys():
            return False
        self._take(digests, progress)
        return all(self.digests[name] == digest for name, digest in digests.items())

    def scan(self, progress: Progress = SILENT) -> str:
        """Check that all values are finite, and compute the fingerprint.

        The fingerprint is the sha256 over name, dtype, shape and sha256 of all tensors in name
        order. Only tensors whose digests are not known yet are read.

        Raises:
            DataError: A tensor holds NaN or Inf, or the bytes are not those that
                `sparsekit.json` recorded.
            DamagedError: So does a packed checkpoint that sparsekit wrote.
        """
        if not self._fingerprint:
            with _damage(self.path):
                self._take(self.tensors, progress)
                self._fingerprint = self._recorded(fingerprint_of(self.tensors, self.digests))
        return self._fingerprint

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The bytes of a tensor, piece by piece in one buffer; its digest is taken on the way.

        Raises:
            DataError: It holds NaN or Inf, or changed since it was read before.
        """
        place, digest = self.tensors[name], TensorDigest(self.tensors[name].dtype)
        buffer = torch.empty(min(CHUNK, place.stop - place.start), dtype=torch.uint8)
        with (self.path / place.file).open("rb", buffering=0) as file:
            for start in range(place.start, place.stop, CHUNK):
                data = buffer[: min(CHUNK, place.stop - start)]
                read_into(file.fileno(), data, start, self.path / place.file)
                digest.add(data)
                yield data
        self._note(name, digest)

    def _take(self, names: Iterable[str], progress: Progress) -> None:
        """Read the tensors whose digests are not known."""
        left = [name for name in self.tensors if name in names and name not in self.digests]
        if not left:
            return
        places = [self.tensors[name] for name in left]
        if sum(place.stop - place.start for place in places) < QUIET_BYTES:
            progress = SILENT
        progress.begin(f"read and check {self.path.name}", len(left))
        for name in left:
            for _ in self.pieces(name):
                pass
            progress.step(name)
        progress.end()

    def _note(self, name: str, digest: TensorDigest) -> None:
        """Keep the digest of a tensor that was read whole."""
        if not digest.finite:
            self.damaged = True
            raise DataError(f"{self.path}: {name} holds NaN or Inf", code="not-finite")
        if self.digests.setdefault(name, digest.hex) != digest.hex:
            raise DataError(
                f"{self.path}: {name} changed while it was in use",
                "run the same command again when nothing writes there",
                code="source-changed",
            )

    def _recorded(self, fingerprint: str) -> str:
        """The fingerprint, which is the recorded one if there is any."""
        if self.provenance().fingerprint not in (None, fingerprint):
            self.damaged = True
            hint = f"the files are damaged; if they were changed on purpose, delete {PROVENANCE}"
            raise DataError(
                f"the weights in {self.path} are not those that {PROVENANCE} recorded",
                AGAIN if self.kind is Kind.PACKED else hint,
                code="fingerprint-mismatch",
            )
        return fingerprint


def _read_headers(path: Path) -> tuple[dict[str, TensorPlace], dict[str, int]]:
    """All tensors of a checkpoint's weight files, and the offset of the data in each file."""
    places: dict[str, TensorPlace] = {}
    headers: dict[str, int] = {}
    for file, names in weight_files(path).items():
        if not (path / file).is_file():
            raise DataError(
                f"{path} lacks {file}",
                "copy or make the folder again",
                code="incomplete-checkpoint",
            )
        tensors, headers[file] = read_header(path / file)
        for name in names or ():
            if name not in tensors:
                raise DataError(
                    f"{path / INDEX} says {name} is in {file}, but it is not there",
                    code="incomplete-checkpoint",
                )
        for name in tensors.keys() & places.keys():
            raise DataError(
                f"{path}: {name} is in {places[name].file} and again in {file}",
                code="ambiguous-weights",
            )
        places |= tensors
    return places, headers


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn a `DataError` about weights that sparsekit packed into a failed check.

    Raises:
        DamagedError: They were written by sparsekit, since `sparsekit.json` is next to them.
    """
    try:
        yield
    except DataError as error:
        plain = (path / SINGLE).is_file() or (path / INDEX).is_file()
        ours = (path / FACTORS).is_file() or (path / OTHER_WEIGHTS).is_file()
        if ours and not plain and (path / PROVENANCE).is_file():
            raise DamagedError(error.message, error.hint or AGAIN, code=error.code) from error
        raise
