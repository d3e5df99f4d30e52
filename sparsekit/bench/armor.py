"""How long ARMOR's two solvers take to the same loss, on the same weights, one after the other."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.resolve import resolve
from sparsekit.errors import UsageError, did_you_mean
from sparsekit.model.block_stream import BlockStream
from sparsekit.model.device import pick_device
from sparsekit.progress import SILENT, Progress
from sparsekit.pruning.refiners.armor import EPSILON, Armor
from sparsekit.solvers.armor_adam import BlockAdam
from sparsekit.solvers.armor_als import BlockFit
from sparsekit.solvers.input_stats import Want
from sparsekit.solvers.nowag_scaling import importance, normalise
from sparsekit.text.calibration import Calibration
from sparsekit.weights.patterns import Pattern

PATTERN = Pattern(keep=2, group=4)
# Sweeps after which coordinate descent counts as not having reached the loss.
MOST_SWEEPS = 200


def race(
    model: str,
    *,
    weights: Sequence[str],
    blocks: Sequence[int],
    decoder_block: int,
    iterations: int,
    calibration: Calibration,
    progress: Progress = SILENT,
) -> list[dict[str, Any]]:
    """Run Adam for so many iterations, then coordinate descent until its loss is as low.

    Both begin with NoWag-P at 2:4 and minimise the published loss on the inputs of the dense model;
    the time of evaluating the loss after each sweep counts.

    Args:
        model: A folder, hub id or `demo`.
        weights: Module names in the decoder block, as `mlp.up_proj`.
        blocks: Sides of the blocks of A and B.
        decoder_block: Number of the decoder block.
        iterations: Of Adam.
        calibration: The rows.
        progress: Told of each pair.

    Returns:
        One row for each weight and side, with the losses, seconds and their ratio.

    Raises:
        UsageError: There is no such block or weight, or a side does not fit.
    """
    if iterations < 1:
        raise UsageError(f"--iterations must be at least 1, not {iterations}")
    source = Checkpoint.open(resolve(model, progress))
    device = pick_device("auto")
    stream = BlockStream(source, device=device, dtype=torch.float32)
    if not 0 <= decoder_block < len(stream):
        raise UsageError(f"{model} has {len(stream)} decoder blocks, so no {decoder_block}")
    shapes = {t.module: t.shape for t in stream.block(decoder_block).targets}
    for weight in weights:
        if weight not in shapes:
            raise UsageError(f"no weight {weight!r} in a block", did_you_mean(weight, shapes))
        for side in blocks:
            if (
                side < PATTERN.group
                or side % PATTERN.group
                or any(n % side for n in shapes[weight])
            ):
                raise UsageError(f"blocks of {side} do not divide {weight}, {shapes[weight]}")
    stream.feed(calibration.rows(source, progress).tokens)
    found = []
    progress.begin("race", len(weights) * len(blocks))
    for weight, dense, squares in _inputs(stream, decoder_block, weights):
        for side in blocks:
            result = _pair(dense, importance(squares), side, iterations)
            found.append({"weight": weight, "shape": list(dense.shape), "block": side, **result})
            progress.step(f"{weight} {side}")
    progress.end()
    return found


def _inputs(
    stream: BlockStream, index: int, weights: Sequence[str]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, dense weight and summed squared inputs of some weights of one decoder block."""
    for block in stream:
        block.load()
        if block.index < index:
            block.advance()
            continue
        chosen = [target for target in block.targets if target.module in weights]
        sums = block.observe(chosen, Want.NORMS)
        for target in chosen:
            yield target.module, block.weight(target), sums[target.name].squares
        return


def _pair(weight: Tensor, squares: Tensor, side: int, iterations: int) -> dict[str, Any]:
    """Both solvers on one weight."""
    normal, _, _ = normalise(weight, EPSILON)
    mask = PATTERN.mask(normal.square() * squares)
    core = normal * mask
    shared: dict[str, Any] = {"block": side, "keep": PATTERN.keep, "group": PATTERN.group}
    adam = BlockAdam(normal, core, mask, squares, rate=Armor.rate, **shared)
    first = adam.loss()
    started = time.perf_counter()
    for _ in range(iterations):
        adam.step()
    adam_seconds, goal = time.perf_counter() - started, adam.loss()
    fit = BlockFit(normal, core, squares, **shared)
    started = time.perf_counter()
    loss, sweeps = first, 0
    while loss > goal and sweeps < MOST_SWEEPS:
        loss, sweeps = fit.sweep(), sweeps + 1
    seconds = time.perf_counter() - started
    return {
        "first_loss": first,
        "adam_iterations": iterations,
        "adam_loss": goal,
        "adam_seconds": adam_seconds,
        "als_loss": loss,
        "als_sweeps": sweeps,
        "als_seconds": seconds,
        "ratio": adam_seconds / seconds if sweeps and loss <= goal else None,
    }
