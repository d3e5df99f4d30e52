"""Loops over blocks and over weights that write each result and resume after an interruption."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from sparsekit.checkpoint.writer import CheckpointWriter
from sparsekit.model.architecture import Target
from sparsekit.model.block_stream import Block, BlockStream
from sparsekit.progress import Progress
from sparsekit.solvers.input_stats import InputStats, Stats

# Memory per entry of the largest weight while it is packed: the weight, sorted positions as 64-bit
# integers, and the masks of the patterns that are tried.
PACKING_BYTES = 32
# The same while it is unpacked: positions and the dense weight.
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
    """Rewrite every block of a stream; returns the report rows of all blocks in order.

    A block that an earlier run has finished is not computed again: its stored weights only run
    forward, so the next block gets the same inputs, bit for bit.

    Args:
        stream: The source's blocks; fed with token rows when `want` is given.
        writer: Stores finished blocks.
        targets: The weights to rewrite.
        transform: Replaces the weights of a block, given sums by weight name; returns report rows
            and the tensors to write.
        restore: Returns the tensors that a stored block computes with.
        want: The sums to collect over the inputs; None runs no forward pass.
        propagate: Whether hidden states come from the rewritten blocks or from the dense ones.
        progress: Receives each finished block.
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
    """Observe, rewrite, write and advance one block; returns its report rows.

    Args:
        block: A block of a stream, not loaded.
        targets: The weights to rewrite.
        transform: Rewrites the block, as in `rewrite_blocks`.
        write: Takes the name of the block, the tensors to write and the report rows.
        want: The sums to collect over the inputs; None runs no forward pass.
        propagate: Whether hidden states come from the rewritten block or from the dense one.
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
    """Whether no later block needs this block's output."""
    return block.index == len(block.stream) - 1


def rewrite_weights(
    writer: CheckpointWriter,
    title: str,
    sizes: Mapping[str, int],
    make: Make,
    progress: Progress,
) -> list[Any]:
    """Convert and write each weight that no earlier run has finished.

    Args:
        writer: Stores the results.
        title: Title of the task in progress displays.
        sizes: Number of entries by name of the weight or of its layer.
        make: Given a name, returns the tensors to write and the note to keep with them.
        progress: Receives each finished weight.

    Returns:
        All notes, in order.
    """
    progress.begin(title, len(sizes))
    for name in sizes:
        if name not in writer.finished:
            writer.write(name, *make(name))
        progress.step(name)
    progress.end()
    return [writer.finished[name] for name in sizes]
