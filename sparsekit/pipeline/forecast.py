"""Estimates of the time and memory of a run over blocks."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from sparsekit.memory import KEPT_BYTES
from sparsekit.pipeline.loops import Rewrite, rewrite_block
from sparsekit.solvers.input_stats import FACTORING_BYTES, SAMPLE_TOKENS, Stats

if TYPE_CHECKING:
    from sparsekit.checkpoint.checkpoint import Checkpoint
    from sparsekit.model.architecture import Target
    from sparsekit.model.block_stream import Block, BlockStream
    from sparsekit.progress import Progress
    from sparsekit.text.calibration import Calibration


def forecast(
    stream: BlockStream,
    targets: list[Target],
    transform: Rewrite,
    *,
    calibration: Calibration | None,
    want: Stats | None,
    propagate: bool,
    others: Sequence[Checkpoint] = (),
    passes: Sequence[Stats] = (),
    progress: Progress,
) -> float:
    """Estimate the seconds of a run on this machine by processing its first block.

    The text is read and the first block is observed, rewritten and advanced, as in the run; nothing
    is kept. The other blocks are assumed to take the same time per parameter. Writing the output
    and taking digests is assumed to take as long as reading the model, which is measured.

    Args:
        stream: The blocks.
        targets: The weights to rewrite.
        transform: Rewrites a block, as in `rewrite_blocks`.
        calibration: The rows that run through the blocks; None: none.
        want: The sums to collect over the inputs; None runs no forward pass.
        propagate: Whether hidden states come from the rewritten blocks or from the dense ones.
        others: Other models that are read before the first block.
        passes: Sums collected in earlier passes over all blocks that rewrite nothing.
        progress: Receives the progress of reading the text.
    """
    started = time.perf_counter()
    stream.source.scan(progress)
    reading = time.perf_counter() - started
    for other in others:
        other.scan(progress)
    rows = calibration.rows(stream.source, progress) if calibration else None
    began = time.perf_counter()
    if rows is not None:
        stream.feed(rows.tokens)
    feeding = time.perf_counter() - began
    sizes = [_size(stream.block(index)) for index in range(len(stream))]
    block, more = stream.block(0), sum(sizes) / sizes[0] - 1
    before = time.perf_counter()
    for sums in passes:
        block.load()
        block.observe(block.targets, sums, advance=True)
    rewrite_block(block, targets, transform, lambda *_: None, want=want, propagate=propagate)
    spent = time.perf_counter() - before
    block.release()
    total = time.perf_counter() - started
    return total + more * spent + reading + len(passes) * feeding


def peak_estimate(
    stream: BlockStream,
    want: Stats | None,
    calibration: Calibration | None,
    gram_bytes: int = FACTORING_BYTES,
) -> int:
    """Estimate this process's peak memory, without the interpreter and libraries, in bytes.

    Args:
        stream: The model, whose blocks are rewritten one at a time.
        want: The sums collected over the inputs of a block; None: none.
        calibration: The rows that run through it.
        gram_bytes: Working memory per entry of the largest Gram matrix.
    """
    source = stream.source
    places = source.places
    wide = torch.tensor([], dtype=stream.dtype).element_size()
    blocks = []
    for index in range(len(stream)):
        block = stream.block(index)
        stored = sum(places[name].stop - places[name].start for name in block.disk_names)
        numbers = sum(math.prod(places[name].shape) for name in block.disk_names)
        # Only a forward pass shows which weights share an input: assume a Gram matrix for each.
        widths = [target.shape[1] for target in block.targets]
        grams = 0
        if want and Stats.GRAM in want:
            grams = 4 * sum(w * w for w in widths) + gram_bytes * max(widths) ** 2
        solving = 2 * max(math.prod(target.shape) for target in block.targets)
        blocks.append(stored + wide * numbers + grams + 6 * 4 * solving)
    outside = max(wide * math.prod(p.shape) + p.stop - p.start for p in places.values())
    hidden = 0
    if calibration:
        samples, length = calibration.shape(source.config)
        width = source.config.get_text_config().hidden_size
        hidden = samples * length * width * wide
        # Activations of one row in a block, and the sampled inputs.
        ends = max(sum(sum(t.shape) for t in stream.block(i).targets) for i in range(len(stream)))
        hidden += (length * wide + SAMPLE_TOKENS * 4) * ends
    return hidden + max(max(blocks), outside) + KEPT_BYTES


def _size(block: Block) -> int:
    """Number of parameters of a block."""
    places = block.stream.source.places
    return sum(math.prod(places[name].shape) for name in block.disk_names)
