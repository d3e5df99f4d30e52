"""The layout of an output's weight files, known before the first tensor is computed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.folder import FACTORS, OTHER_WEIGHTS, SINGLE, part_name
from sparsekit.checkpoint.safetensors_file import TYPE_NAMES, TensorPlace

if TYPE_CHECKING:
    from sparsekit.weights.core_format import CoreFormat
    from sparsekit.weights.quantized import Shapes

# Size of a weight file, unless the files are laid out as in the source.
SHARD_BYTES = 5 << 30


def factor_types(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> Shapes:
    """Dtypes and shapes of the factors of a weight: its own dtype, and bytes for places."""
    return {
        part: (torch.uint8 if part == "indices" else dtype, shape) for part, shape in shapes.items()
    }


@dataclass(frozen=True)
class Layout:
    """Weight files at full size, each with its header."""

    places: Mapping[str, TensorPlace]
    headers: Mapping[str, bytes]
    """Weight files by name, with the bytes before their data."""

    @classmethod
    def of(cls, source: Checkpoint) -> Layout:
        """The layout of a checkpoint's own files."""
        headers = {}
        for file, length in source.headers.items():
            with (source.path / file).open("rb") as stream:
                headers[file] = stream.read(length)
        return cls(source.places, headers)

    def with_file(
        self,
        file: str,
        tensors: Shapes,
        metadata: Mapping[str, str],
    ) -> Layout:
        """Add a file with tensors of these dtypes and shapes, in this order."""
        sizes = [dtype.itemsize * math.prod(shape) for dtype, shape in tensors.values()]
        stops = list(accumulate(sizes, initial=0))
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        for name, offsets in zip(tensors, pairwise(stops), strict=True):
            dtype, shape = tensors[name]
            header[name] = {
                "dtype": TYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": offsets,
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        data = 8 + len(text)
        places = dict(self.places)
        for name, (start, stop) in zip(tensors, pairwise(stops), strict=True):
            places[name] = TensorPlace(file, *tensors[name], data + start, data + stop)
        headers = {**self.headers, file: len(text).to_bytes(8, "little") + text}
        return Layout(places, headers)

    @classmethod
    def with_factors(
        cls,
        source: Checkpoint,
        parts: Mapping[str, Shapes],
        formats: Mapping[str, CoreFormat],
        *,
        alone: bool,
    ) -> Layout:
        """The layout of a checkpoint with a file for the factors of some of its weights.

        Args:
            source: The checkpoint.
            parts: Dtype and shape of each factor, by weight.
            formats: How the core of each of these weights is packed.
            alone: Whether the factors are stored instead of the weights or next to them.
        """
        shapes = {
            part_name(name, part): shape
            for name, factors in parts.items()
            for part, shape in factors.items()
        }
        base = cls.of(source)
        if alone:
            others = {n: (p.dtype, p.shape) for n, p in source.places.items() if n not in parts}
            base = cls({}, {}).with_file(OTHER_WEIGHTS, others, {"format": "pt"})
        return base.with_packed(shapes, formats)

    def with_packed(self, tensors: Shapes, formats: Mapping[str, CoreFormat]) -> Layout:
        """Add a file for packed cores and the factors around them."""
        return self.with_file(FACTORS, tensors, {name: str(fmt) for name, fmt in formats.items()})

    @classmethod
    def plain(cls, tensors: Shapes, shard_bytes: int) -> Layout:
        """The layout of plain weights in files named as other tools expect them.

        Args:
            tensors: Dtype and shape of each tensor, in their order on disk.
            shard_bytes: Maximum size of a file, unless it holds a single larger tensor.
        """
        shards: list[Shapes] = [{}]
        filled = 0
        for name, (dtype, shape) in tensors.items():
            n_bytes = dtype.itemsize * math.prod(shape)
            if shards[-1] and filled + n_bytes > shard_bytes:
                shards.append({})
                filled = 0
            shards[-1][name] = dtype, shape
            filled += n_bytes
        layout = cls({}, {})
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            file = SINGLE if len(shards) == 1 else file
            layout = layout.with_file(file, shard, {"format": "pt"})
        return layout

    @classmethod
    def with_codes(
        cls,
        source: Checkpoint,
        parts: Mapping[str, Shapes],
    ) -> Layout:
        """The layout of a checkpoint with some weights stored as codes and scales.

        Args:
            source: The checkpoint.
            parts: For each of these weights the dtype and shape of its tensors, by the last part of
                their name.
        """
        layout = cls({}, {})
        for file in source.headers:
            tensors: Shapes = {}
            for name, place in source.places.items():
                if place.file != file:
                    continue
                if name in parts:
                    tensors |= {part_name(name, part): t for part, t in parts[name].items()}
                else:
                    tensors[name] = place.dtype, place.shape
            layout = layout.with_file(file, tensors, {"format": "pt"})
        return layout

    def index(self) -> dict[str, object]:
        """The contents of `model.safetensors.index.json` for these files."""
        total = sum(place.stop - place.start for place in self.places.values())
        weight_map = {name: place.file for name, place in self.places.items()}
        return {"metadata": {"total_size": total}, "weight_map": weight_map}

    def size(self, file: str) -> int:
        """Size of a file in bytes."""
        stops = [place.stop for place in self.places.values() if place.file == file]
        return max(stops, default=len(self.headers[file]))

    @property
    def n_bytes(self) -> int:
        """Size of all files in bytes."""
        return sum(self.size(file) for file in self.headers)
