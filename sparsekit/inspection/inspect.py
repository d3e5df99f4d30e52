"""Sparsity, patterns, size and history of a checkpoint."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.entry import Entry
from sparsekit.checkpoint.resolve import resolve
from sparsekit.model.architecture import Target
from sparsekit.model.block_stream import BlockStream
from sparsekit.model.form_linear import form_layers
from sparsekit.progress import SILENT, Progress
from sparsekit.weights.patterns import SOUGHT, patterns_of, strictness


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Contents of a checkpoint."""

    model: str
    """As given by the user."""
    path: Path
    n_bytes: int
    blocks: list[dict[str, Any]]
    """Rows with `name`, `size`, `zeros`, `sparsity`, `pattern`."""
    types: list[dict[str, Any]]
    """The same rows by kind of weight, over all blocks."""
    total: dict[str, Any]
    history: Sequence[Entry]
    fingerprint: str | None

    def to_json(self) -> dict[str, Any]:
        """Everything except the weights of the history."""
        return {
            "model": self.model,
            "path": str(self.path),
            "bytes": self.n_bytes,
            "fingerprint": self.fingerprint,
            "total": self.total,
            "blocks": self.blocks,
            "types": self.types,
            "history": [
                {k: v for k, v in entry.to_json().items() if k != "weights"}
                for entry in self.history
            ],
        }


def inspect(model: str, progress: Progress = SILENT) -> Inspection:
    """Count zeros and look for patterns in the prunable weights of every block.

    Args:
        model: A folder, hub id or `demo`.
        progress: Reports each block.

    Raises:
        DataError: The folder is not a readable checkpoint, or its packed weights are damaged.
    """
    source = Checkpoint.open(resolve(model, progress))
    if source.kind.alone:
        source.scan(progress)  # zeros of a damaged checkpoint mean nothing
    stream = BlockStream(source, device="cpu", dtype=torch.float32)
    provenance = source.provenance()
    rows = [row for entry in provenance.history for row in entry.weights]
    recorded = {row.pattern for row in rows if row.pattern and ":" in row.pattern}
    sought = sorted({*SOUGHT, *recorded}, key=strictness)
    progress.begin("inspect", len(stream))
    by_block: dict[str, list[dict[str, Any]]] = {}
    by_type: dict[str, list[dict[str, Any]]] = {}
    for block, name, weight in _weights(source, stream, progress):
        zeros = int((weight == 0).sum())
        row = {"size": weight.numel(), "zeros": zeros, "patterns": patterns_of(weight, sought)}
        by_block.setdefault(block, []).append(row)
        kind = name.removesuffix(".weight").partition(f"{block}.")[2] or name
        by_type.setdefault(kind, []).append(row)
    progress.end()
    return Inspection(
        model=model,
        path=source.path,
        n_bytes=source.n_bytes,
        blocks=[_sum(name, rows) for name, rows in by_block.items()],
        types=[_sum(name, rows) for name, rows in by_type.items()],
        total=_sum("total", [row for rows in by_block.values() for row in rows]),
        history=provenance.history,
        fingerprint=provenance.fingerprint,
    )


def _weights(
    source: Checkpoint, stream: BlockStream, progress: Progress
) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Block, name and weight `[out, in]`, in the type on disk, of each linear weight.

    A weight with factors is represented by their core.
    """
    for index in range(len(stream)):
        block = stream.block(index)
        for target in block.targets:
            if target.name in source.packed:
                yield block.name, target.name, _core(source, target)
            else:
                weight = source.read([target.name])[target.name]
                yield block.name, target.name, target.from_disk(weight)
        for layer in form_layers(block.module):
            yield block.name, layer.target.name, _core(source, layer.target)
        progress.step(block.name)


def _core(source: Checkpoint, target: Target) -> torch.Tensor:
    """Core `[out, in]` of a weight, in float32."""
    return source.form(target.name, target.shape).core.dense().float()


def _sum(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    size, zeros = sum(row["size"] for row in rows), sum(row["zeros"] for row in rows)
    shared = [text for text in rows[0]["patterns"] if all(text in r["patterns"] for r in rows)]
    pattern = shared[0] if shared else ("unstructured" if zeros else "dense")
    return {
        "name": name,
        "size": size,
        "zeros": zeros,
        "sparsity": zeros / size if size else 0.0,
        "pattern": pattern,
    }
