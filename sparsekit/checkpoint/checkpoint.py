"""A Hugging Face checkpoint on disk, read lazily: names and places first, bytes when asked."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekit.checkpoint.compressed_tensors import decoded_places, grid_of, quantization
from sparsekit.checkpoint.folder import (
    FACTORS,
    INDEX,
    OTHER_WEIGHTS,
    PROVENANCE,
    SINGLE,
    load_config,
    load_tokenizer,
    weight_files,
)
from sparsekit.checkpoint.foreign import named_format
from sparsekit.checkpoint.kind import Kind, kind_of, refusal
from sparsekit.checkpoint.safetensors_file import (
    TensorPlace,
    is_finite,
    read_header,
    read_into,
    read_tensor,
)
from sparsekit.checkpoint.stored_form import StoredForm, packed_forms
from sparsekit.errors import DamagedError, DataError
from sparsekit.files import CHUNK, read_json, sha256_json
from sparsekit.progress import SILENT, Progress
from sparsekit.weights.form import Form
from sparsekit.weights.grids import Grid

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


# What to do about a damaged one.
AGAIN = "copy the folder again"
# A checkpoint of fewer bytes is read so soon that nobody waits for a sign of it.
SOON_READ = 1 << 30
# Stages after which each weight has a pattern that the history tells.
PATTERN_STAGES = ("prune", "recover", "pack")


@dataclass(eq=False)
class Checkpoint:
    """A folder with `config.json` and safetensors weights."""

    path: Path
    places: Mapping[str, TensorPlace]
    """Every tensor of the model by name, in name order; a weight on a grid has the type that it is
    computed in, and the place of its codes."""
    tensors: Mapping[str, TensorPlace]
    """Every tensor of the files by its name there, in name order."""
    headers: Mapping[str, int]
    """Weight files by name, with the length in bytes of what precedes their data."""
    packed: Mapping[str, StoredForm] = field(default_factory=dict)
    """Each weight with a packed core, alone or next to its product."""
    grid: Grid | None = None
    """Of the weights in `quantized`; None without such, or if sparsekit does not read their
    format."""
    quantized: Mapping[str, StoredForm] = field(default_factory=dict)
    """Each weight on a grid in the format of compressed-tensors."""
    _fingerprint: str = field(default="", init=False, repr=False)

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """The checkpoint in a local folder; its headers are read and checked, its data is not.

        Raises:
            DataError: The folder is missing, incomplete, or not in the safetensors format.
            DamagedError: The same of a packed one that sparsekit wrote.
        """
        with _damage(path):
            return cls._open(path)

    @classmethod
    def _open(cls, path: Path) -> Checkpoint:
        """See `open`."""
        files = weight_files(path)
        places: dict[str, TensorPlace] = {}
        headers: dict[str, int] = {}
        for file, names in files.items():
            if not (path / file).is_file():
                raise DataError(f"{path} lacks {file}", "copy or make the folder again")
            found, headers[file] = read_header(path / file)
            for name in names or ():
                if name not in found:
                    raise DataError(f"{path / INDEX} says {name} is in {file}, but it is not there")
            for name in found.keys() & places.keys():
                raise DataError(f"{path}: {name} is in {places[name].file} and again in {file}")
            places |= found
        tensors, packed, quantized = dict(places), {}, {}
        if (path / FACTORS).is_file():
            factors, _ = read_header(path / FACTORS)
            tensors |= factors
            packed = packed_forms(path, factors)
        grid = grid_of(quantization(path))
        if grid is not None:
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
            DataError: It cannot be read, needs code of its own, or is unknown to transformers.
        """
        return load_config(self.path)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that lies beside the weights.

        Raises:
            DataError: There is none.
        """
        return load_tokenizer(self.path)

    @property
    def n_bytes(self) -> int:
        """Size of all weight files."""
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
            DataError: Says what to do instead.
        """
        detail = f" to {self.grid}" if self.grid else ""
        if self.kind in (Kind.LEGACY, Kind.FOREIGN):
            detail = named_format(read_json(self.path / "config.json"))
        if (error := refusal(verb, self.kind, self.path, detail)) is not None:
            raise error

    @property
    def layout(self) -> str:
        """The sha256 of where every tensor lies, with its type and shape."""
        return sha256_json(
            [[n, p.file, p.start, str(p.dtype), list(p.shape)] for n, p in self.places.items()]
        )

    @property
    def fingerprint(self) -> str:
        """The result of `scan`, which raises what it raises."""
        return self.scan()

    def provenance(self) -> dict[str, Any]:
        """What `sparsekit.json` says of this checkpoint; an empty history when there is none."""
        file = self.path / PROVENANCE
        if not file.is_file():
            return {"history": []}
        found = read_json(file)
        history = found.get("history") if isinstance(found, dict) else None
        if not isinstance(history, list) or not all(map(_is_entry, history)):
            raise DataError(
                f"{file} has no history that sparsekit wrote", "delete it if it is not sparsekit's"
            )
        return found

    def pruned(self, *, converted: bool = False) -> list[dict[str, Any]]:
        """The entries of the history that gave this checkpoint its pattern, or trained it.

        Args:
            converted: Whether conversions count that found one; they name no dense model.
        """
        history = self.provenance()["history"]
        return [e for e in history if e.get("stage") in PATTERN_STAGES or (converted and _found(e))]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, in their dtype on disk, in memory of their own."""
        tensors = {}
        for name in names:
            if name in self.quantized:
                form = self.quantized[name].form(self.path, self.places[name].shape)
                tensors[name] = form.dense()
            else:
                tensors[name] = read_tensor(self.path, self.tensors[name])
        return tensors

    def form(self, name: str, shape: tuple[int, int]) -> Form:
        """A weight `[out, in]` with a packed core, or one on a grid.

        Raises:
            FactorsError: A part is missing, or the parts do not fit together.
            DataError: The same of a weight on a grid.
        """
        return self.stored(name).form(self.path, shape)

    def stored(self, name: str) -> StoredForm:
        """Where such a weight lies."""
        return self.packed.get(name) or self.quantized[name]

    def scan(self, progress: Progress = SILENT) -> str:
        """The fingerprint, after making sure that all numbers are finite.

        The fingerprint is the sha256 over name and raw bytes of all tensors in name order. The
        first call reads every byte; later ones give its result.

        Raises:
            DataError: A tensor holds NaN or Inf, or the bytes are not those that
                `sparsekit.json` recorded.
            DamagedError: The same of a packed checkpoint that sparsekit wrote.
        """
        if not self._fingerprint:
            with _damage(self.path):
                self._fingerprint = self._scan(progress)
        return self._fingerprint

    def _scan(self, progress: Progress) -> str:
        """See `scan`."""
        if self.n_bytes < SOON_READ:
            progress = SILENT
        progress.begin(f"read and check {self.path.name}", len(self.tensors))
        digest = hashlib.sha256()
        buffer = torch.empty(CHUNK, dtype=torch.uint8)
        for name, place in self.tensors.items():
            digest.update(name.encode())
            with self._opened(place.file) as handle:
                for start in range(place.start, place.stop, CHUNK):
                    data = buffer[: min(CHUNK, place.stop - start)]
                    read_into(handle, data, start, self.path / place.file)
                    digest.update(data.numpy())
                    if not is_finite(data.view(place.dtype)):
                        raise DataError(f"{self.path}: {name} holds NaN or Inf")
            progress.step(name)
        progress.end()
        fingerprint = digest.hexdigest()
        recorded = self.provenance().get("fingerprint")
        if recorded not in (None, fingerprint):
            hint = f"the files are damaged; if they were changed on purpose, delete {PROVENANCE}"
            raise DataError(
                f"the weights in {self.path} are not those that {PROVENANCE} recorded",
                AGAIN if self.kind is Kind.PACKED else hint,
            )
        return fingerprint

    @contextlib.contextmanager
    def _opened(self, file: str) -> Iterator[int]:
        handle = os.open(self.path / file, os.O_RDONLY)
        try:
            yield handle
        finally:
            os.close(handle)


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Fail as a check does where weights that only sparsekit packs can no longer be read.

    Raises:
        DamagedError: They were whole once, as `sparsekit.json` lies beside them.
    """
    try:
        yield
    except DataError as error:
        plain = (path / SINGLE).is_file() or (path / INDEX).is_file()
        ours = (path / FACTORS).is_file() or (path / OTHER_WEIGHTS).is_file()
        if ours and not plain and (path / PROVENANCE).is_file():
            raise DamagedError(error.message, error.hint or AGAIN) from error
        raise


def _found(entry: Mapping[str, Any]) -> bool:
    """Whether a history entry is one of `convert` that tells a pattern of each weight."""
    recipe = entry.get("recipe")
    return entry.get("stage") == "convert" and isinstance(recipe, dict) and "pattern" in recipe


def _is_entry(entry: Any) -> bool:
    """Whether a history entry has what stages write that tell of each weight, if it is theirs."""
    if not isinstance(entry, dict):
        return False
    asked = (("stage", str), ("model", str), ("words", dict))
    if not all(isinstance(entry.get(key), kind) for key, kind in asked):
        return False
    parts = (("recipe", dict), ("source", dict), ("weights", list))
    told = entry.get("stage") in PATTERN_STAGES or _found(entry)
    return not told or all(isinstance(entry.get(k), t) for k, t in parts)
