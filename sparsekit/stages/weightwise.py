"""The one loop over weights, for stages that look at each alone; goes on after an interruption."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from sparsekit.models.writer import CheckpointWriter
from sparsekit.progress import Progress

Make = Callable[[str], tuple[Mapping[str, Tensor], Any]]


def rewrite(
    writer: CheckpointWriter, title: str, names: Iterable[str], make: Make, progress: Progress
) -> list[Any]:
    """Write what becomes of each weight that no earlier run has finished.

    Args:
        writer: Where they go.
        title: What is told to be done.
        names: Of the weights, or of the layers that have them.
        make: Given a name, the tensors to write and the note to keep with them.
        progress: Told of each.

    Returns:
        The notes of all, in order.
    """
    names = list(names)
    progress.begin(title, len(names))
    for name in names:
        if name not in writer.finished:
            writer.write(name, *make(name))
        progress.step(name)
    progress.end()
    return [writer.finished[name] for name in names]
