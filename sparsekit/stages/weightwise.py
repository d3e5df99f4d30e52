"""The one loop over weights, for stages that look at each alone; goes on after an interruption."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from sparsekit.models.writer import CheckpointWriter
from sparsekit.progress import Progress
from sparsekit.stages.forecast import Cost

# Of the largest weight while it is packed, for each number: as it is, its places as 64-bit
# integers, sorted, and the masks of the patterns that are tried.
PACKING_BYTES = 32
# The same while it is unpacked: its places, and the dense weight.
UNPACKING_BYTES = 24

Make = Callable[[str], tuple[Mapping[str, Tensor], Any]]


def rewrite_weights(
    writer: CheckpointWriter,
    title: str,
    sizes: Mapping[str, int],
    make: Make,
    cost: Cost,
    progress: Progress,
) -> list[Any]:
    """Write what becomes of each weight that no earlier run has finished.

    Args:
        writer: Where they go.
        title: What is told to be done.
        sizes: How many numbers each weight has, by its name or that of the layer that has it.
        make: Given a name, the tensors to write and the note to keep with them.
        cost: Told of each that is made, from which it expects the time of all.
        progress: Told of each.

    Returns:
        The notes of all, in order.
    """
    progress.begin(title, len(sizes))
    cost.begin(sizes, writer.finished)
    for name in sizes:
        if name not in writer.finished:
            writer.write(name, *make(name))
            cost.done(name)
        progress.step(name)
    progress.end()
    return [writer.finished[name] for name in sizes]
