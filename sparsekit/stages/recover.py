"""Train a sparse model against its dense parent, from disk to disk."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekit.errors import (
    CheckFailedError,
    DataError,
    NumericalError,
    SparsekitError,
    UsageError,
)
from sparsekit.files import read_json, sha256_json, write_atomic, write_json
from sparsekit.memory import peak_memory
from sparsekit.models.architecture import Target, find_blocks
from sparsekit.models.branch import Branch, attach
from sparsekit.models.calibration import evaluation_rows
from sparsekit.models.corpus import TrainingRows
from sparsekit.models.folder import factor_name
from sparsekit.models.reference import title
from sparsekit.models.skeleton import Skeleton, keep_heap
from sparsekit.models.whole import load_whole
from sparsekit.models.writer import CheckpointWriter
from sparsekit.progress import SILENT, Progress
from sparsekit.recoverers import Scale
from sparsekit.stages.curve import draw
from sparsekit.stages.device import pick_device
from sparsekit.stages.ranks import Ranks
from sparsekit.stages.recovery import Recovery, prepare, require_parent
from sparsekit.stages.report import NUMERICS, recover_card, totals, versions
from sparsekit.stages.trainconfig import RecoverConfig, rate_at
from sparsekit.stages.training import (
    Plan,
    Training,
    hidden_states,
    input_norms,
    measure,
    other_parameters,
    require_plain_head,
    sparsity_measure,
)
from sparsekit.stages.trainstate import POINTER, forget_states, load_state, save_state
from sparsekit.tensors.factored import Factored
from sparsekit.tensors.maskedadam import MaskedAdam, Rule, Settings, SparseWeight, is_sharded
from sparsekit.tensors.patterns import Pattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLAN = ".sparsekit-plan.json"
LOG = "sparsekit-training.jsonl"
CURVE = "sparsekit-training.png"
# The log while it grows.
PROGRESS = ".sparsekit-log.jsonl"
# Seconds between two saved states, when no number of steps is given.
SAVE_SECONDS = 600.0
# Steps at rate 0 that measure speed and gradients.
PROBED = 8
# Share of the time that is planned for, and seconds kept for writing.
PLANNED, WRITING = 0.95, 10.0
# Windows of an evaluation during training.
EVAL_WINDOWS = 8
# A model that computes with all entries is done when the last selection changes no more than this
# share of them, and leaving the others out moves the last hidden states by no more than that.
MOST_FLIPS, MOST_MOVED = 1e-3, 5e-3
# Tensors that go to disk together.
TOGETHER = 32
NEED = {"purpose": "training", "way_out": "train it where there is more memory"}
# Of the recipe that a resumed run must share, what the history tells elsewhere or not at all.
UNTOLD = ("stage", "versions", "source", "teacher", "config", "layout", "own_patterns")


@dataclass(frozen=True, kw_only=True)
class RecoverReport:
    """The outcome of `recover`."""

    out: Path
    entry: Mapping[str, Any]
    """This run's entry of the history."""

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON."""
        return {"out": str(self.out), **self.entry}


def recover(
    config: RecoverConfig,
    model: str,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> RecoverReport | None:
    """Write a trained copy of a model, with exactly its pattern, to the folder `out`.

    Args:
        config: What to do.
        model: A folder, hub id or `demo`; sparse from any pruner, or dense.
        out: The folder to make; it appears when it is complete.
        overwrite: Replace an earlier output of sparsekit.
        progress: Told of each step.

    Returns:
        What was done; None in a process that trains along with the main one.

    Raises:
        UsageError: The configuration does not fit the model, or `out` is in use.
        DataError: The model, its teacher or the text cannot be read or do not fit together.
        NumericalError: The loss is not finite; the last saved state is kept.
        CheckFailedError: The decay has not brought the entries off the mask to zero.
        StorageError: The output cannot be written.
    """
    started = time.perf_counter()
    config.check()
    ranks = Ranks.current(pick_device(config.device))
    ranks.parts(config.accumulate)
    progress = progress if ranks.main else SILENT
    job = prepare(config, model, out, overwrite=overwrite, progress=progress)
    rows = _rows(job, ranks, progress)
    config = replace(config, length=rows.length)  # which the model's maximum may have capped
    job = replace(job, config=config)
    prints = {"source": job.source.scan(progress), "teacher": job.teacher.scan(progress)}
    require_parent(job, prints["teacher"])
    recipe = _recipe(job, rows, ranks) | prints
    ranks.wait()
    writing = None
    if ranks.main:
        writing = CheckpointWriter(out, job.source, recipe, layout=job.layout, overwrite=overwrite)
    with writing or contextlib.nullcontext() as writer:
        ranks.wait()
        folder = out.with_name(out.name + ".partial")
        student = Student.load(job, rows, ranks)
        try:
            training = _training(job, student, rows, folder, ranks, started, progress)
        except SparsekitError:
            if writer is not None and not (folder / POINTER).is_file():
                writer.abandon()  # it was refused before the first step: another try may differ
            raise
        log = _train(training, job, folder, progress)
        finished = _finish(training)
        if not ranks.shards:
            ranks.require_same(training.optimizer.fingerprint(), "masks")
        weights = _write(job, writer, student, training.optimizer)
        if writer is None:
            return None
        _tell(job, writer, log, title(model))
        entry = {
            "stage": "recover",
            "recipe": {k: v for k, v in recipe.items() if k not in UNTOLD},
            "versions": recipe["versions"],
            "source": {"path": model, "fingerprint": prints["source"]},
            "teacher": {"path": job.teacher_name, "fingerprint": prints["teacher"]},
            "plan": asdict(training.plan),
            "tokens": training.plan.steps * config.step_tokens,
            "processes": ranks.size,
            "finished": finished,
            "totals": totals(weights),
            "weights": weights,
            "skipped": job.skipped,
            "seconds": round(time.perf_counter() - started, 3),
            "peak_memory_bytes": peak_memory(),
        }
        writer.commit(entry, recover_card(entry, title(model)))
        # Only now: until the output stands, all that was trained must be found again.
        forget_states(out)
        for file in (PLAN, PROGRESS):
            (out / file).unlink(missing_ok=True)
    return RecoverReport(out=out, entry=entry)


def _rows(job: Recovery, ranks: Ranks, progress: Progress) -> TrainingRows:
    """The rows; the main process tokenises the text, the others find it done."""
    corpus = job.config.corpus(job.config.tokens)
    if not ranks.main:
        ranks.wait()
    rows = corpus.rows(job.source, job.teacher, progress)
    if ranks.main:
        ranks.wait()
    for note in (*job.notes, *rows.notes):
        progress.note(note)
    wanted = job.config.batch * job.config.accumulate
    if len(rows) < wanted:
        raise DataError(
            f"{job.config.data} has {len(rows)} rows of {rows.length} tokens, a step takes "
            f"{wanted}",
            "give it more text, or a smaller --batch, --length or --accumulate",
        )
    passes = (job.config.tokens or 0) / (len(rows) * rows.length)
    if passes > 1:
        progress.note(f"the text is read {passes:.1f} times")
    return rows


def _tell(job: Recovery, writer: CheckpointWriter, log: list[dict[str, Any]], name: str) -> None:
    """Put log and picture into the output."""
    lines = "".join(json.dumps(row) + "\n" for row in log)
    write_atomic(writer.partial / LOG, lines.encode())
    picture = draw(log, f"{name}, {job.config.method} {job.patterns.base}")
    write_atomic(writer.partial / CURVE, picture)


@dataclass(frozen=True, kw_only=True, eq=False)
class Student:
    """The model that is trained, with the names that its weights have on disk."""

    model: PreTrainedModel
    skeleton: Skeleton
    sparse: Mapping[str, SparseWeight]
    """By name on disk."""
    branches: Mapping[str, Branch]
    """What lies beside sparse weights, by the same names."""
    ranks: Ranks

    @classmethod
    def load(cls, job: Recovery, rows: TrainingRows, ranks: Ranks) -> Student:
        """The model in float32, each weight that is to be sparse with its mask."""
        skeleton = Skeleton(job.source, job.device, torch.float32)
        model = skeleton.fill()
        keep_heap()
        require_plain_head(model)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        if ranks.shards:
            _refuse_cuts(job)
            ranks.shard(skeleton.blocks, job.device)
        parameters = dict(model.named_parameters())
        by_disk = {on_disk: name for name, on_disk in skeleton.on_disk.items()}
        norms: dict[str, Tensor] = {}
        if job.recoverer.metric == "activation":
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
        made = cls(model=model, skeleton=skeleton, sparse=sparse, branches={}, ranks=ranks)
        return replace(made, branches=made._branches(job)) if job.config.slorb else made

    def _branches(self, job: Recovery) -> dict[str, Branch]:
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
            dense = dense.T if target.transposed else dense
            branch = Branch(dense - weight.values, job.config.slorb or 1)
            layer = by_disk[target.name].removesuffix(".weight")
            attach(self.model.get_submodule(layer), branch)
            found[target.name] = branch
        return found

    def optimizer(self, rule: Rule) -> MaskedAdam:
        """A fresh one over all parameters."""
        others = other_parameters(self.model, [w.parameter for w in self.sparse.values()])
        sums = (lambda tensor: self.ranks.sum_([tensor])) if self.ranks.shards else None
        return MaskedAdam(self.sparse, others, rule, Settings(), sums)

    def scale(self, masked_gradient: float) -> Scale:
        """What the automatic choices go by."""
        total = count = 0.0
        for weight in self.sparse.values():
            total += weight.weight.abs().sum(dtype=torch.float64).item()
            count += int(weight.weight.count_nonzero())
        if self.ranks.shards:
            sums = torch.tensor([total, count], dtype=torch.float64, device=self.model.device)
            self.ranks.sum_([sums])
            total, count = sums.tolist()
        return Scale(
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            weight=total / max(1.0, count),
            masked_gradient=masked_gradient,
        )


def load_teacher(job: Recovery, ranks: Ranks) -> PreTrainedModel | None:
    """The frozen dense model; None when the loss does not ask for it."""
    if job.config.share == 0:
        return None
    teacher = load_whole(job.teacher, torch.float32, **NEED).to(job.device).requires_grad_(False)
    require_plain_head(teacher)
    if ranks.shards:
        ranks.shard(find_blocks(teacher)[1], job.device)
    return teacher


def _refuse_cuts(job: Recovery) -> None:
    """Refuse what shards of rows would cut into pieces that no longer match.

    Raises:
        UsageError: Names it.
    """
    way = "train it without shards, as with --multi_gpu"
    for target in job.targets:
        if target.transposed:
            raise UsageError(
                f"{target.name} is stored as [in, out]: its shards would cut groups of inputs", way
            )
        if job.patterns.of(target).scope == "tensor":
            raise UsageError(f"{job.patterns.of(target)} needs whole weights, not shards", way)
    if job.config.slorb is not None:
        raise UsageError("--slorb needs whole weights, not shards", way)


def _recipe(job: Recovery, rows: TrainingRows, ranks: Ranks) -> dict[str, Any]:
    """Everything that decides the output's bytes."""
    config = job.config
    told = {
        key: value
        for key, value in asdict(config).items()
        if key not in ("data", "teacher", "save_every", "eval_every", "eval_text", "dtype")
    }
    own = {name: str(pattern) for name, pattern in job.patterns.own.items()}
    model = {k: v for k, v in job.source.config.to_dict().items() if k != "_name_or_path"}
    return {
        "stage": "recover",
        "numerics": NUMERICS,
        "processes": ranks.size,
        **told,
        "options": asdict(job.recoverer),
        "pattern": str(job.patterns.base),
        "own_patterns": sha256_json(own),
        "data": rows.fingerprint,
        "length": rows.length,
        "config": sha256_json(model),
        "layout": job.source.layout,
        "device": job.device.type,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _training(
    job: Recovery,
    student: Student,
    rows: TrainingRows,
    folder: Path,
    ranks: Ranks,
    started: float,
    progress: Progress,
) -> Training:
    """The training as far as an interrupted run had come, or its beginning."""
    config = job.config
    teacher = load_teacher(job, ranks)
    if ranks.of_main((folder / PLAN).is_file()):
        plan = Plan(**read_json(folder / PLAN))
    else:
        plan = _plan(job, student, teacher, rows, ranks, started, progress)
        if ranks.main:
            write_json(folder / PLAN, asdict(plan))
    optimizer = student.optimizer(job.recoverer.rule(plan.decay))
    training = Training(
        student.model, teacher, optimizer, rows, config, plan, job.recoverer.refresh, ranks
    )
    if load_state(folder, optimizer, ranks):
        progress.note(f"going on after {optimizer.steps} steps in {folder}")
    return training


def _plan(
    job: Recovery,
    student: Student,
    teacher: PreTrainedModel | None,
    rows: TrainingRows,
    ranks: Ranks,
    started: float,
    progress: Progress,
) -> Plan:
    """Steps, rates and strengths, some of them measured on steps that change nothing."""
    config, recoverer = job.config, job.recoverer
    steps = config.steps()
    scale = student.scale(0.0)
    share = recoverer.share_of(scale) if config.share is None else config.share
    rate = config.lr or recoverer.rate_of(scale)
    gradient = 0.0
    if config.max_time is not None or recoverer.needs_gradient:
        still = Plan(steps=1 << 40, rate=0.0, share=share, decay=0.0, masked_gradient=0.0)
        optimizer = student.optimizer(recoverer.rule(0.0))
        trial = Training(student.model, teacher, optimizer, rows, config, still, 0, ranks)
        progress.begin("measuring speed and gradients", PROBED)
        seconds = []
        for _ in range(PROBED):
            seconds.append(trial.step().seconds)
            progress.step("")
        progress.end()
        gradient = optimizer.masked_mean()
        if config.max_time is not None:
            left = config.max_time - (time.perf_counter() - started) - WRITING
            steps = ranks.of_main(math.floor(PLANNED * left / median(seconds)))
            if steps < 1:
                raise UsageError(
                    f"--max-time: one step takes {median(seconds):.1f} s, {left:.0f} s are left",
                    "give it more time, or a smaller --batch, --length or --accumulate",
                )
            progress.note(f"{steps} steps of {median(seconds):.2f} s in the time that is left")
    decay = recoverer.decay_of(student.scale(gradient))
    plan = Plan(steps=steps, rate=rate, share=share, decay=decay, masked_gradient=gradient)
    progress.note(
        f"{steps} steps of {config.step_tokens} tokens, learning rate {rate:g} ({config.schedule})"
        f", {share:.2f} of the loss is the divergence from the teacher"
        + (f", decay {decay:.3g}" if decay else "")
    )
    _require_budget(job, student, plan, progress)
    return plan


def _require_budget(job: Recovery, student: Student, plan: Plan, progress: Progress) -> None:
    """Refuse a pull that cannot bring the entries off the mask to zero in the steps there are.

    Raises:
        UsageError: Says by how much.
    """
    if not job.recoverer.settles:
        return
    distance = decay_budget(job.config.schedule, plan)
    sizes = [w.weight[~w.mask].abs() for w in student.sparse.values()]
    count = sum(map(len, sizes))
    mean = sum(s.sum(dtype=torch.float64).item() for s in sizes) / max(1, count)
    high = max((_quantile(s, 0.99) for s in sizes if len(s)), default=0.0)
    progress.note(
        f"decay budget: a weight off the mask can travel {distance:.4g}; they measure {mean:.4g} "
        f"on average, the largest 99th percentile of a weight is {high:.4g}"
    )
    if distance < 1.5 * mean:
        raise UsageError(
            f"in {plan.steps} steps the decay moves a weight by {distance:.4g}, those off the mask "
            f"measure {mean:.4g} on average",
            f"{1.5 * mean / max(distance, 1e-12):.1f} times the --tokens or --lr would do, or "
            "start from a pruned model, or take --method ast",
        )


def decay_budget(schedule: str, plan: Plan) -> float:
    """How far the pull can move a weight in all steps together (specification, section 4.3)."""
    size, total = plan.masked_gradient, 0.0
    for step in range(plan.steps):
        share = step / plan.steps
        pull, noise = share * plan.decay, (1 - share) * size
        length = math.hypot(pull, noise)
        total += plan.rate * rate_at(schedule, step, plan.steps) * (pull / length if length else 0)
    return total


def _quantile(values: Tensor, share: float) -> float:
    """A quantile of a tensor of any size."""
    return values.kthvalue(max(1, math.ceil(share * len(values)))).values.item()


def _train(
    training: Training, job: Recovery, folder: Path, progress: Progress
) -> list[dict[str, Any]]:
    """Take the steps that are left; gives the log of all steps."""
    config, optimizer, ranks = job.config, training.optimizer, training.ranks
    log = [row for row in _read_log(folder / PROGRESS) if row["step"] <= optimizer.steps]
    ranks.wait()
    text = "".join(json.dumps(row) + "\n" for row in log)
    if ranks.main:
        write_atomic(folder / PROGRESS, text.encode())
    windows = None
    if config.eval_every is not None:
        source = config.eval_text or "builtin"
        length = None if config.eval_text else config.length
        windows = evaluation_rows(source, job.source, length=length, limit=EVAL_WINDOWS).tokens
    progress.begin(f"recover {config.method} {job.patterns.base}", training.plan.steps)
    for _ in range(optimizer.steps):
        progress.step("")
    saved = time.perf_counter()
    while not training.done:
        row = training.step().to_json()
        now = optimizer.steps
        if windows is not None and (now % config.eval_every == 0 or training.done):
            row["perplexity"] = measure(training.student, optimizer, windows)
            row["sparsity"] = sparsity_measure(optimizer)
            progress.note(f"step {now}: perplexity {row['perplexity']:.2f} of the sparse model")
        log.append(row)
        if ranks.main:
            with (folder / PROGRESS).open("a") as file:
                file.write(json.dumps(row) + "\n")
        late = ranks.of_main(time.perf_counter() - saved > SAVE_SECONDS)
        if training.done or (now % config.save_every == 0 if config.save_every else late):
            save_state(folder, optimizer, ranks)
            saved = time.perf_counter()
        rate = config.step_tokens / row["seconds"]
        progress.step(f"loss {row['loss']:.3f} {rate:.0f} tokens/s")
    progress.end()
    return log


def _read_log(file: Path) -> list[dict[str, Any]]:
    """The rows of a log; a line without its end was cut off by an interruption."""
    if not file.is_file():
        return []
    lines = file.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


@torch.no_grad()
def _finish(training: Training) -> dict[str, Any]:
    """Select once more, and leave out what is off the masks.

    Raises:
        CheckFailedError: The model computed with entries that the mask leaves out, and they have
            not vanished.
    """
    optimizer = training.optimizer
    settles = optimizer.rule.frees and not optimizer.rule.hides
    flips = optimizer.refresh() if training.refresh else 0
    (size,) = optimizer.total(sum(w.weight.numel() for w in optimizer.sparse.values()))
    found = {"last_flips": flips, "sparsity_measure": sparsity_measure(optimizer)}
    tokens = training.rows.take(0, 1).to(training.student.device)
    before = hidden_states(training.student, tokens) if settles else None
    for weight in optimizer.sparse.values():
        weight.view.copy_(weight.values)
    if before is not None:
        moved = (hidden_states(training.student, tokens) - before).norm() / before.norm()
        found["moved"] = moved.item()
        if flips > MOST_FLIPS * size or not found["moved"] <= MOST_MOVED:
            raise CheckFailedError(
                "the decay has not finished: leaving out what is off the mask moves the last "
                f"hidden states by {found['moved']:.2%} (at most {MOST_MOVED:.1%}), and the last "
                f"selection changed {flips} of {size:.0f} entries",
                "train on more --tokens, with a higher --lr or a stronger decay (-O decay=…)",
            )
    return found


def _write(
    job: Recovery, writer: CheckpointWriter | None, student: Student, optimizer: MaskedAdam
) -> list[dict[str, Any]]:
    """Put all tensors in their places; gives a row for each that is sparse.

    Every process takes part, since a sharded tensor is put together from all.
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
                stored, tensor = _with_branch(target, tensor, mask, branch, rows[-1]["pattern"])
                rows[-1]["bits"] = 8 * sum(t.nbytes for t in stored.values()) / tensor.numel()
                batch |= {factor_name(on_disk, part): made for part, made in stored.items()}
        if on_disk in job.layout.places:
            batch[on_disk] = tensor
        for alias in tied.get(on_disk, ()):  # a checkpoint may keep both of two tied tensors
            batch[alias] = tensor
        if len(batch) >= TOGETHER or number == len(names):
            writer.write(f"{on_disk} and before", batch, None)
            batch = {}
    return rows


def _as_on_disk(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in its type on disk, without negative zeros.

    Raises:
        NumericalError: It is not finite in this type.
    """
    if not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype) + 0.0
    if not cast.isfinite().all():
        raise NumericalError(f"{name} does not fit into {dtype}")
    return cast


def _row(target: Target, tensor: Tensor, pattern: Pattern) -> dict[str, Any]:
    """What became of a weight, after the check of its pattern as it goes to disk."""
    weight = tensor.T if target.transposed else tensor
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
    target: Target, tensor: Tensor, mask: Tensor, branch: Branch, pattern: str
) -> tuple[dict[str, Tensor], Tensor]:
    """The factors of a weight with a branch, and their product as it goes to disk."""
    core = tensor.T if target.transposed else tensor
    up, down = branch.up.detach().cpu(), branch.down.detach().cpu()
    factors = Factored(core=core.float(), mask=mask.cpu(), up=up, down=down).to(tensor.dtype)
    product = factors.dense().to(tensor.dtype) + 0.0
    if not product.isfinite().all():
        raise NumericalError(f"{target.name} does not fit into {tensor.dtype}")
    stored = factors.stored(Pattern.parse(pattern), tensor.dtype)
    return stored, (product.T.contiguous() if target.transposed else product)
