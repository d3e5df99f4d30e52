"""The one loop over blocks: observe, rewrite, write, advance; and go on after an interruption."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from sparsekit.checkpoint.writer import CheckpointWriter
from sparsekit.model.architecture import Target
from sparsekit.model.block_stream import Block, BlockStream
from sparsekit.progress import Progress
from sparsekit.solvers.input_stats import InputStats, Stats

# Of the largest weight while it is packed, for each number: as it is, its places as 64-bit
# integers, sorted, and the masks of the patterns that are tried.
PACKING_BYTES = 32
# The same while it is unpacked: its places, and the dense weight.
UNPACKING_BYTES = 24
Make = Callable[[str], tuple[Mapping[str, Tensor], Any]]
Rewrite = Callable[[Block, dict[str, InputStats]], tuple[list[dict[str, Any]], dict[str, Tensor]]]


def rewrite_blocks(
    stream: BlockStream,
    writer: CheckpointWriter,
    targets: list[Target],
    transform: Rewrite,
    restore: Callable[[Block], dict[str, Tensor]],
    *,
    want: Stats | None,
    propagate: bool,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Rewrite every block of a stream; gives the report rows of all blocks, in order.

    A block that an earlier run has finished is not computed again: its written weights only
    carry the hidden states on, which gives the next block bit for bit the same inputs.

    Args:
        stream: The source's blocks; fed with token rows when `want` is given.
        writer: Where finished blocks go.
        targets: The weights to rewrite.
        transform: Replaces the weights of a block, given sums by weight name; gives the report
            rows, and the tensors to write.
        restore: The tensors of a block that has been written, as it computes with them.
        want: What to sum over the inputs; None runs no forward pass.
        propagate: Whether hidden states come from the rewritten blocks or from the dense ones.
        progress: Told of each block.
    """
    rows: list[dict[str, Any]] = []
    for block in stream:
        if block.name in writer.finished:
            rows += writer.finished[block.name]
            if want and not _is_last(block):
                block.load(restore(block) if propagate else None)
                block.advance()
        else:
            rows += rewrite_block(
                block, targets, transform, writer.write, want=want, propagate=propagate
            )
        progress.step(block.name)
    return rows


def rewrite_block(
    block: Block,
    targets: list[Target],
    transform: Rewrite,
    write: Callable[[str, dict[str, Tensor], Any], None],
    *,
    want: Stats | None,
    propagate: bool,
) -> list[dict[str, Any]]:
    """Observe, rewrite, write and advance one block; gives its report rows.

    Args:
        block: One of a stream, without its weights.
        targets: As of `rewrite`, as are `transform`, `want` and `propagate`.
        transform: See there.
        write: Takes the name of the block, the tensors to write and the report rows.
        want: See there.
        propagate: See there.
    """
    block.load()
    wanted = {target.name for target in targets}
    chosen = [target for target in block.targets if target.name in wanted]
    sums: dict[str, InputStats] = {}
    if want and chosen:
        sums = block.observe(chosen, want, advance=not propagate and not _is_last(block))
    rows, tensors = transform(block, sums)
    sums.clear()
    write(block.name, tensors, rows)
    if want and not _is_last(block) and (propagate or not chosen):
        block.advance()
    return rows


def _is_last(block: Block) -> bool:
    """Whether nothing needs this block's output."""
    return block.index == len(block.stream) - 1


def rewrite_weights(
    writer: CheckpointWriter,
    title: str,
    sizes: Mapping[str, int],
    make: Make,
    progress: Progress,
) -> list[Any]:
    """Write what becomes of each weight that no earlier run has finished.

    Args:
        writer: Where they go.
        title: What is told to be done.
        sizes: How many numbers each weight has, by its name or that of the layer that has it.
        make: Given a name, the tensors to write and the note to keep with them.
        progress: Told of each.

    Returns:
        The notes of all, in order.
    """
    progress.begin(title, len(sizes))
    for name in sizes:
        if name not in writer.finished:
            writer.write(name, *make(name))
        progress.step(name)
    progress.end()
    return [writer.finished[name] for name in sizes]
