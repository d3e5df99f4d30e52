"""Writing a trained model: final masks, pattern checks, tensors on disk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsekit.checkpoint.entry_parts import TrainedWeight
from sparsekit.checkpoint.folder import part_name
from sparsekit.checkpoint.writer import CheckpointWriter
from sparsekit.errors import CheckFailedError, NumericalError
from sparsekit.model.architecture import Target
from sparsekit.model.full_model import hidden_states
from sparsekit.progress import SILENT, Progress
from sparsekit.recovery.loop import Training
from sparsekit.recovery.loss import sparsity_measure
from sparsekit.recovery.optimizer import MaskedAdam
from sparsekit.recovery.prepare import RecoverJob
from sparsekit.recovery.slorb import Branch
from sparsekit.recovery.sparse_weight import is_sharded
from sparsekit.recovery.student import Student
from sparsekit.weights.core import Values
from sparsekit.weights.form import Form
from sparsekit.weights.patterns import Pattern

# Relative change of the last hidden states when a model that was dense until now is masked: up to
# the first value the decay has finished; up to the second there is a note; beyond it the run fails.
SETTLED, MOST_MOVED = 5e-3, 0.05
# Tensors per write.
TOGETHER = 32


@torch.no_grad()
def finish(training: Training, progress: Progress = SILENT) -> dict[str, Any]:
    """Select the mask a last time and apply it; returns numbers on how much that changes.

    Raises:
        CheckFailedError: The model was dense until now, and the entries off the mask have not
            vanished.
    """
    optimizer = training.optimizer
    dense_until_end = optimizer.rule.updates_pruned and not optimizer.rule.masks_forward
    flips = optimizer.refresh() if training.refresh else 0
    (size,) = optimizer.total(sum(w.weight.numel() for w in optimizer.sparse.values()))
    numbers = {"sparsity_measure": sparsity_measure(optimizer)}
    tokens = training.rows.take(0, 1).to(training.student.device)
    before = hidden_states(training.student, tokens) if dense_until_end else None
    for weight in optimizer.sparse.values():
        weight.view.copy_(weight.values)
    if before is not None:
        moved = (hidden_states(training.student, tokens) - before).norm() / before.norm()
        numbers["moved"] = moved.item()
        if not numbers["moved"] <= MOST_MOVED:
            length = "--max-time" if training.config.tokens is None else "--tokens"
            raise CheckFailedError(
                "the decay has not finished: applying the mask changes the last "
                f"hidden states by {numbers['moved']:.2%} (at most {MOST_MOVED:.1%}), and the last "
                f"selection changed {flips} of {size:.0f} entries",
                f"train with more {length}, a higher --lr or a stronger decay (-O decay=…)",
                code="decay-unfinished",
            )
        if numbers["moved"] > SETTLED:
            progress.note(
                "the decay has not quite finished: applying the mask changes the last hidden "
                f"states by {numbers['moved']:.2%}; --eval-every shows its perplexity"
            )
    return numbers


def write_tensors(
    job: RecoverJob, writer: CheckpointWriter | None, student: Student, optimizer: MaskedAdam
) -> list[TrainedWeight]:
    """Write all tensors; returns a report row for each sparse weight.

    Every process must call it, since sharded tensors are gathered from all.
    """
    rows: list[dict[str, Any]] = []
    parameters = dict(student.model.named_parameters(remove_duplicate=False))
    buffers = dict(student.model.named_buffers())
    names = {on_disk: name for name, on_disk in student.skeleton.on_disk.items()}
    tied: dict[str, list[str]] = {}
    for alias, origin in getattr(student.model, "all_tied_weights_keys", {}).items():
        if alias in job.layout.places and alias not in names:
            tied.setdefault(student.skeleton.on_disk[origin], []).append(alias)
    batch: dict[str, Tensor] = {}
    targets = {target.name: target for target in job.targets}
    for number, (on_disk, name) in enumerate(sorted(names.items()), 1):
        held = (parameters.get(name, buffers.get(name))).detach()
        whole = (held.full_tensor() if is_sharded(held) else held).cpu()
        flipped = optimizer.flipped(on_disk) if on_disk in targets else 0
        if writer is None:
            continue
        tensor = _as_on_disk(on_disk, whole, job.source.places[on_disk].dtype)
        if on_disk in targets:
            target = targets[on_disk]
            rows.append(_row(target, tensor, job.patterns.of(target)) | {"flipped": flipped})
            if on_disk in student.branches:
                mask, branch = student.sparse[on_disk].mask, student.branches[on_disk]
                pattern = job.patterns.of(target)
                stored, tensor = _with_branch(target, tensor, mask, branch, pattern)
                rows[-1]["bits"] = 8 * sum(t.nbytes for t in stored.values()) / tensor.numel()
                batch |= {part_name(on_disk, part): value for part, value in stored.items()}
        if on_disk in job.layout.places:
            batch[on_disk] = tensor
        for alias in tied.get(on_disk, ()):  # a checkpoint may keep both of two tied tensors
            batch[alias] = tensor
        if len(batch) >= TOGETHER or number == len(names):
            writer.write(f"{on_disk} and before", batch, None)
            batch = {}
    return [TrainedWeight(**row) for row in rows]


def _as_on_disk(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in its dtype on disk, without negative zeros.

    Raises:
        NumericalError: It is not finite in this dtype.
    """
    if not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype) + 0.0
    if not cast.isfinite().all():
        raise NumericalError(f"{name} does not fit into {dtype}", code="not-finite")
    return cast


def _row(target: Target, tensor: Tensor, pattern: Pattern) -> dict[str, Any]:
    """The report row of a weight, after checking its pattern as stored."""
    weight = target.from_disk(tensor)
    pattern.check(weight, target.name)
    return {
        "name": target.name,
        "shape": list(target.shape),
        "pattern": str(pattern),
        "zeros": int((weight == 0).sum()),
        "size": weight.numel(),
        "error": None,
        "bits": None,
    }


def _with_branch(
    target: Target, tensor: Tensor, mask: Tensor, branch: Branch, pattern: Pattern
) -> tuple[dict[str, Tensor], Tensor]:
    """The factors of a weight with a branch, and their product as stored."""
    core = Values(target.from_disk(tensor).float(), mask.cpu())
    up, down = branch.up.detach().cpu(), branch.down.detach().cpu()
    factors = Form(core=core, up=up, down=down).rounded(tensor.dtype)
    product = factors.dense().to(tensor.dtype) + 0.0
    if not product.isfinite().all():
        message = f"{target.name} does not fit into {tensor.dtype}"
        raise NumericalError(message, code="not-finite")
    stored = factors.packed(pattern).to(tensor.dtype).stored()
    return stored, target.to_disk(product).contiguous()
