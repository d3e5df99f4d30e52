"""Student and teacher, loaded whole."""

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
from sparsekit.recovery.config import RecoverConfig
from sparsekit.recovery.distributed import Processes
from sparsekit.recovery.loss import products_of
from sparsekit.recovery.memory_needs import require_memory
from sparsekit.recovery.methods import Recoverer, Rule, Scale
from sparsekit.recovery.optimizer import MaskedAdam, Settings
from sparsekit.recovery.prepare import RecoverJob
from sparsekit.recovery.slorb import Branch, attach
from sparsekit.recovery.sparse_weight import SparseWeight
from sparsekit.recovery.teacher_cache import TopTeacher
from sparsekit.text.training_rows import TrainingRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Batches for input norms, and steps with learning rate 0 that measure speed and gradients.
PROBED = 8
# Runs with fewer steps take as many measuring steps as training steps.
SHORT_RUN = 6
TRAINING = MemoryUse("training", hint="train it where there is more memory")


@dataclass(frozen=True, kw_only=True, eq=False)
class Student:
    """The model to train, with the names of its weights on disk."""

    model: PreTrainedModel
    skeleton: Skeleton
    sparse: Mapping[str, SparseWeight]
    """By name on disk."""
    branches: Mapping[str, Branch]
    """SLoRB branches, by the same names."""
    processes: Processes

    @classmethod
    def load(cls, job: RecoverJob, rows: TrainingRows, processes: Processes) -> Student:
        """Load the model in float32 and select the masks of its sparse weights."""
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
        student = cls(
            model=model, skeleton=skeleton, sparse=sparse, branches={}, processes=processes
        )
        return replace(student, branches=student._branches(job)) if job.config.slorb else student

    def _branches(self, job: RecoverJob) -> dict[str, Branch]:
        """A branch for each sparse weight, initialised with its error against the dense model."""
        branches = {}
        by_disk = {on_disk: name for name, on_disk in self.skeleton.on_disk.items()}
        for target in job.targets:
            place = job.teacher.places.get(target.name)
            weight = self.sparse[target.name]
            if place is None or place.shape != job.source.places[target.name].shape:
                raise DataError(
                    f"the teacher has no weight {target.name} of the same shape",
                    "--slorb needs the model's dense parent as the teacher",
                    code="other-shape",
                )
            dense = job.teacher.read([target.name])[target.name].to(job.device, torch.float32)
            branch = Branch(target.from_disk(dense) - weight.values, job.config.slorb or 1)
            layer = by_disk[target.name].removesuffix(".weight")
            attach(self.model.get_submodule(layer), branch)
            branches[target.name] = branch
        return branches

    def optimizer(self, rule: Rule) -> MaskedAdam:
        """A new optimizer of all parameters."""
        others = other_parameters(self.model, [w.parameter for w in self.sparse.values()])
        sums = (lambda tensor: self.processes.sum_([tensor])) if self.processes.shards else None
        return MaskedAdam(self.sparse, others, rule, Settings(), sums)

    def scale(self, masked_gradient: float) -> Scale:
        """Statistics for the automatic choices."""
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
        """Mean size of the entries off the masks, and the largest 99th percentile over weights.

        If weights are sharded, percentiles are those of the rows in each process.
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
        """Sums over all processes of values of this process's shards."""
        sums = torch.tensor(values, dtype=torch.float64)
        if self.processes.shards:
            sums = sums.to(self.model.device)
            self.processes.sum_([sums])
        return sums.tolist()


def load_teacher(job: RecoverJob, processes: Processes) -> PreTrainedModel | None:
    """The frozen dense model; None if the loss does not need it.

    It is float32 if its largest probabilities are cached, which other runs use too; otherwise it
    has the student's compute dtype.
    """
    if job.config.kl_weight == 0:
        return None
    teacher = load_whole(job.teacher, torch.float32, TRAINING).to(job.device).requires_grad_(False)
    require_plain_head(teacher)
    if job.config.teacher_top is None:
        # Not the buffers: with 8-bit rotary frequencies distant tokens would be radians off.
        for parameter in teacher.parameters():
            parameter.data = parameter.data.to(products_of(job.config))
    if processes.shards:
        processes.shard(find_blocks(teacher)[1], job.device)
    return teacher


def top_teacher(
    job: RecoverJob, rows: TrainingRows, processes: Processes, progress: Progress
) -> TopTeacher | None:
    """The teacher with cached probabilities; None without `--teacher-top`.

    Raises:
        DataError: A cached row is damaged, or the model is needed and does not fit into memory.
        StorageError: The disk has no space for the rows.
    """
    if job.config.teacher_top is None:
        return None
    teacher = TopTeacher.of(job, rows, cache(partial(load_teacher, job, processes)))
    positions = rows_of_run(job)
    if positions is not None:
        teacher.announce(positions, progress)
    if teacher.missing(positions):
        hint = "fill the cache first on a machine with more memory"
        require_memory(job.config, job.source, job.teacher, job.recoverer, job.device, hint)
    return teacher


def rows_of_run(job: RecoverJob) -> int | None:
    """Number of rows that a run reads; None with `--max-time`, which may read any number."""
    config = job.config
    if config.tokens is None:
        return None
    steps = max(config.steps(), probe_steps(config, job.recoverer))
    return steps * config.batch * config.accumulate


def probe_steps(config: RecoverConfig, recoverer: Recoverer) -> int:
    """Number of measuring steps before training; 0 if nothing needs to be measured."""
    if config.max_time is not None:
        return PROBED
    if not recoverer.needs_gradient:
        return 0
    return PROBED if config.steps() >= SHORT_RUN else config.steps()


@torch.no_grad()
def input_norms(
    model: PreTrainedModel, layers: Mapping[str, nn.Module], batches: Iterable[Tensor]
) -> dict[str, Tensor]:
    """Norms of the inputs of layers over batches `[rows, length]`, `[in]` float32, by name."""
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
    """All trained parameters that are not sparse; tied ones once."""
    taken = {id(parameter) for parameter in sparse}
    return {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in taken}
