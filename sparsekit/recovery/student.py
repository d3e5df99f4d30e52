"""The model that is trained and the one that teaches it, loaded whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsekit.errors import DataError
from sparsekit.memory import MemoryUse, keep_heap
from sparsekit.model.architecture import find_blocks
from sparsekit.model.full_model import hidden_states, load_whole, require_plain_head
from sparsekit.model.skeleton import Skeleton
from sparsekit.progress import Progress
from sparsekit.recovery.distributed import Processes
from sparsekit.recovery.loss import products_of
from sparsekit.recovery.memory_needs import require_memory
from sparsekit.recovery.methods import Rule, Scale
from sparsekit.recovery.optimizer import MaskedAdam, Settings
from sparsekit.recovery.prepare import RecoverJob
from sparsekit.recovery.slorb import Branch, attach
from sparsekit.recovery.sparse_weight import SparseWeight
from sparsekit.recovery.teacher_cache import TopTeacher
from sparsekit.text.training_rows import TrainingRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Batches that input norms are measured on, and steps at rate 0 that measure speed and gradients.
PROBED = 8
TRAINING = MemoryUse("training", hint="train it where there is more memory")


@dataclass(frozen=True, kw_only=True, eq=False)
class Student:
    """The model that is trained, with the names that its weights have on disk."""

    model: PreTrainedModel
    skeleton: Skeleton
    sparse: Mapping[str, SparseWeight]
    """By name on disk."""
    branches: Mapping[str, Branch]
    """What lies beside sparse weights, by the same names."""
    processes: Processes

    @classmethod
    def load(cls, job: RecoverJob, rows: TrainingRows, processes: Processes) -> Student:
        """The model in float32, each weight that is to be sparse with its mask."""
        skeleton = Skeleton(job.source, job.device, torch.float32)
        model = skeleton.fill()
        keep_heap()
        require_plain_head(model)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        if processes.shards:
            processes.shard(skeleton.blocks, job.device)
        parameters = dict(model.named_parameters())
        by_disk = {on_disk: name for name, on_disk in skeleton.on_disk.items()}
        norms: dict[str, Tensor] = {}
        if job.config.metric == "activation":
            modules = {t.name: by_disk[t.name].removesuffix(".weight") for t in job.targets}
            layers = {name: model.get_submodule(path) for name, path in modules.items()}
            batches = (rows.take(n * job.config.batch, job.config.batch) for n in range(PROBED))
            norms = input_norms(model, layers, batches)
        sparse = {
            target.name: SparseWeight.of(
                parameters[by_disk[target.name]],
                job.patterns.of(target),
                transposed=target.transposed,
                rule=job.recoverer.rule(0.0),
                spans=job.recoverer.spans,
                inputs=norms.get(target.name),
            )
            for target in job.targets
        }
        made = cls(model=model, skeleton=skeleton, sparse=sparse, branches={}, processes=processes)
        return replace(made, branches=made._branches(job)) if job.config.slorb else made

    def _branches(self, job: RecoverJob) -> dict[str, Branch]:
        """A branch beside each sparse weight, for what it lacks against the dense parent's."""
        found = {}
        by_disk = {on_disk: name for name, on_disk in self.skeleton.on_disk.items()}
        for target in job.targets:
            place = job.teacher.places.get(target.name)
            weight = self.sparse[target.name]
            if place is None or place.shape != job.source.places[target.name].shape:
                raise DataError(
                    f"the teacher has no weight {target.name} of the same shape",
                    "--slorb needs the dense parent as the teacher",
                )
            dense = job.teacher.read([target.name])[target.name].to(job.device, torch.float32)
            branch = Branch(target.from_disk(dense) - weight.values, job.config.slorb or 1)
            layer = by_disk[target.name].removesuffix(".weight")
            attach(self.model.get_submodule(layer), branch)
            found[target.name] = branch
        return found

    def optimizer(self, rule: Rule) -> MaskedAdam:
        """A fresh one over all parameters."""
        others = other_parameters(self.model, [w.parameter for w in self.sparse.values()])
        sums = (lambda tensor: self.processes.sum_([tensor])) if self.processes.shards else None
        return MaskedAdam(self.sparse, others, rule, Settings(), sums)

    def scale(self, masked_gradient: float) -> Scale:
        """What the automatic choices go by."""
        total = count = 0.0
        for weight in self.sparse.values():
            total += weight.weight.abs().sum(dtype=torch.float64).item()
            count += int(weight.weight.count_nonzero())
        total, count = self._over_shards(total, count)
        return Scale(
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            weight=total / max(1.0, count),
            masked_gradient=masked_gradient,
        )

    def off_mask(self) -> tuple[float, float]:
        """Mean size of the entries off the masks, and the largest 99th percentile of a weight's.

        Where weights are sharded, a percentile is that of the rows in one process.
        """
        total = count = high = 0.0
        for weight in self.sparse.values():
            sizes = weight.weight[~weight.mask].abs()
            if len(sizes):
                place = max(1, math.ceil(0.99 * len(sizes)))
                high = max(high, sizes.kthvalue(place).values.item())
            total, count = total + sizes.sum(dtype=torch.float64).item(), count + len(sizes)
        total, count = self._over_shards(total, count)
        return total / max(1.0, count), max(self.processes.gather(high))

    def _over_shards(self, *values: float) -> list[float]:
        """Sums over what this process holds, as sums over the whole model."""
        sums = torch.tensor(values, dtype=torch.float64)
        if self.processes.shards:
            sums = sums.to(self.model.device)
            self.processes.sum_([sums])
        return sums.tolist()


def load_teacher(job: RecoverJob, processes: Processes) -> PreTrainedModel | None:
    """The frozen dense model; None when the loss does not ask for it.

    Of a few largest probabilities, which other runs use too, it is float32; else of the type in
    which the student multiplies.
    """
    if job.config.kl_weight == 0:
        return None
    teacher = load_whole(job.teacher, torch.float32, TRAINING).to(job.device).requires_grad_(False)
    require_plain_head(teacher)
    if job.config.teacher_top is None:
        # Not its buffers: rotary frequencies of 8 bits turn far tokens by whole radians.
        for parameter in teacher.parameters():
            parameter.data = parameter.data.to(products_of(job.config))
    if processes.shards:
        processes.shard(find_blocks(teacher)[1], job.device)
    return teacher


def top_teacher(
    job: RecoverJob, rows: TrainingRows, processes: Processes, progress: Progress
) -> TopTeacher | None:
    """The teacher of whom the largest probabilities are kept; None when all are looked at.

    Raises:
        DataError: A row on disk is damaged, or the model is needed and does not fit into memory.
        StorageError: The disk has no room for the rows.
    """
    if job.config.teacher_top is None:
        return None
    teacher = TopTeacher.of(job, rows, cache(partial(load_teacher, job, processes)))
    positions = rows_of_run(job)
    if positions is not None:
        teacher.announce(positions, progress)
    if teacher.missing(positions):
        hint = "run it first where there is more memory, with the same cache of rows"
        require_memory(job.config, job.source, job.teacher, job.recoverer, job.device, hint)
    return teacher


def rows_of_run(job: RecoverJob) -> int | None:
    """How many rows in their order a run looks at; None: with `--max-time` it may be any."""
    config = job.config
    if config.tokens is None:
        return None
    steps = max(config.steps(), PROBED if job.recoverer.needs_gradient else 0)
    return steps * config.batch * config.accumulate


@torch.no_grad()
def input_norms(
    model: PreTrainedModel, layers: Mapping[str, nn.Module], batches: Iterable[Tensor]
) -> dict[str, Tensor]:
    """By name the norm of each input of a layer over batches `[rows, length]`, `[in]` float32."""
    sums: dict[str, Tensor] = {}

    def observe(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0].flatten(0, -2).float().square().sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

        return hook

    hooks = [layer.register_forward_pre_hook(observe(name)) for name, layer in layers.items()]
    for tokens in batches:
        hidden_states(model, tokens.to(model.device))
    for hook in hooks:
        hook.remove()
    return {name: squares.sqrt() for name, squares in sums.items()}


def other_parameters(model: nn.Module, sparse: Iterable[nn.Parameter]) -> dict[str, nn.Parameter]:
    """All trained parameters that are not to be sparse; a tied one comes once."""
    taken = {id(parameter) for parameter in sparse}
    return {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in taken}
