"""A model as a stream of decoder blocks: one block in memory at a time, for any model size.

The model is built without weights. A recorder pass runs it with every block replaced by the
identity and records the arguments of each block, since sliding-window masks and rotary tables
differ by layer. Blocks are then loaded one after another and run on the hidden states of all
token rows, with bit for bit the result of the ordinary forward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.errors import NumericalError
from sparsekit.model.architecture import Target, find_targets
from sparsekit.model.skeleton import Skeleton
from sparsekit.solvers.input_stats import InputStats, Stats

if TYPE_CHECKING:
    from sparsekit.model.recording import BlockCall, Comparisons

# Families for which the test suite checks that the stream equals the forward pass bit for bit.
TESTED_FAMILIES = frozenset(
    {"gemma3_text", "gpt2", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3"}
)
# Logits are computed in pieces of at most this many bytes.
LOGIT_BYTES = 1 << 28


class BlockStream:
    """The decoder blocks of a checkpoint, in order, with their input hidden states.

    Args:
        source: The checkpoint.
        device: The device of the computation; hidden states are kept in host memory.
        dtype: The compute dtype; the dtype on disk never changes.

    Raises:
        DataError: The architecture cannot be streamed; the message names every weight that would
            be skipped.
    """

    def __init__(self, source: Checkpoint, *, device: str, dtype: torch.dtype) -> None:
        self.source = source
        self.device = torch.device(device)
        self.dtype = dtype
        self.skeleton = Skeleton(source, self.device, dtype)
        self.model = self.skeleton.model
        self.hidden: list[Tensor] = []
        """The input of the current block for each token row, `[1, length, hidden]`."""
        self._calls: list[list[BlockCall]] = []
        self._seen: Comparisons = {}

    def __len__(self) -> int:
        return len(self.skeleton.blocks)

    @property
    def tested(self) -> bool:
        """Whether the test suite covers this family."""
        return self.source.config.model_type in TESTED_FAMILIES

    def names(self) -> list[str]:
        """The block names, in order."""
        return [f"{self.skeleton.prefix}.{index}" for index in range(len(self))]

    def targets(self) -> list[Target]:
        """All prunable weights, block by block."""
        return [t for index in range(len(self)) for t in self.block(index).targets]

    def block(self, index: int) -> Block:
        """One block, without its weights."""
        return Block(self, index)

    @torch.no_grad()
    def feed(self, tokens: Tensor) -> None:
        """Record the arguments of each block for these token rows `[rows, length]`."""
        self.hidden = []
        self._calls = [[] for _ in self.skeleton.blocks]
        needed = self.skeleton.before_blocks()
        with self.skeleton.resident(needed), self._stubs(self._record):
            for row in tokens:
                self.model.base_model(input_ids=row[None].to(self.device), use_cache=False)

    def __iter__(self) -> Iterator[Block]:
        """Each block in turn, without its weights; the caller loads it, it is released here."""
        for index in range(len(self)):
            block = self.block(index)
            try:
                yield block
            finally:
                block.release()
        self.skeleton.forget_memory()

    @torch.no_grad()
    def losses(self, tokens: Tensor) -> Tensor:
        """The mean next-token loss of each row after the last block, `[rows]` float64.

        Args:
            tokens: The rows that were fed.
        """
        rows = []
        tail = self.skeleton.after_blocks()
        with self.skeleton.resident(tail), self._stubs(lambda *_: self.hidden[len(rows)]):
            for row in tokens:
                rows.append(self._row_loss(row.to(self.device)))
        return torch.stack(rows)

    def _row_loss(self, row: Tensor) -> Tensor:
        count = len(row) - 1
        vocabulary = self.source.config.get_text_config().vocab_size
        step = max(1, LOGIT_BYTES // (4 * vocabulary))
        if "logits_to_keep" not in inspect.signature(self.model.forward).parameters:
            step = count
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for start in range(0, count, step):
            wanted = torch.arange(start, min(start + step, count), device=self.device)
            logits = self.logits(len(row), wanted if step < count else None)[0, : len(wanted)]
            loss = nn.functional.cross_entropy(logits.float(), row[wanted + 1], reduction="none")
            total += loss.double().sum()
        return total.cpu() / count

    def logits(self, length: int, wanted: Tensor | None = None) -> Tensor:
        """Logits of the model's own tail (norm, head) on the output of the last block's stub."""
        embedding = self.model.get_input_embeddings()
        dummy = torch.zeros(
            1, length, embedding.embedding_dim, dtype=self.dtype, device=self.device
        )
        keep = {} if wanted is None else {"logits_to_keep": wanted}
        return self.model(inputs_embeds=dummy, use_cache=False, **keep).logits

    def _record(self, index: int, hidden: Tensor, call: BlockCall) -> Tensor:
        from sparsekit.model.recording import equal_calls

        if index == 0:
            self.hidden.append(hidden.to("cpu", copy=True))
            self._seen = {}
        calls = self._calls[index]
        # Rows of the same length have equal arguments, which are kept once.
        alike = calls and equal_calls(calls[0], call, self._seen)
        calls.append(calls[0] if alike else call)
        return hidden

    @contextmanager
    def _stubs(self, answer: Callable[[int, Tensor, BlockCall], Tensor]) -> Iterator[None]:
        """Replace the forward of every block by a function."""
        from sparsekit.model.recording import BlockCall

        def stub(index: int) -> Callable[..., Tensor]:
            def forward(*args: Any, **kwargs: Any) -> Tensor:
                hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
                return answer(index, hidden, BlockCall(args[1:], kwargs)).to(self.device)

            return forward

        for index, module in enumerate(self.skeleton.blocks):
            module.forward = stub(index)
        try:
            yield
        finally:
            for module in self.skeleton.blocks:
                del module.forward


@dataclass
class Block:
    """One decoder block of a stream."""

    stream: BlockStream
    index: int
    name: str = field(init=False)
    targets: list[Target] = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.stream.names()[self.index]
        self.module = self.stream.skeleton.blocks[self.index]
        inside = f"{self.name}."
        self._names = {
            name: on_disk
            for name, on_disk in self.stream.skeleton.on_disk.items()
            if name.startswith(inside)
        }
        self.targets = find_targets(self.module, self.name, self._names)
        self._disk: dict[str, Tensor] = {}

    def load(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Move the block's weights to the device, from the source or from `tensors`."""
        disk = self.stream.source.read(self._names.values()) if tensors is None else dict(tensors)
        self._disk = disk
        held = {name: disk[on_disk] for name, on_disk in self._names.items()}
        self.stream.skeleton.hold(self.name, held)

    def release(self) -> None:
        """Free the block's weights."""
        if self._disk:
            self.stream.skeleton.drop(self._names)
            n_bytes = sum(tensor.nbytes for tensor in self._disk.values())
            self._disk = {}
            self.stream.skeleton.passed(n_bytes)

    @property
    def disk_names(self) -> list[str]:
        """Names on disk of all tensors of the block."""
        return list(self._names.values())

    def weight(self, target: Target) -> Tensor:
        """The weight of a target, `[out, in]` float32 on the device."""
        weight = self._disk[target.name].to(self.stream.device, torch.float32)
        return target.from_disk(weight).contiguous()

    def replace(self, target: Target, weight: Tensor) -> Tensor:
        """Replace a weight `[out, in]`, and return it as it will be on disk.

        The result is `[out, in]` in the dtype on disk, without negative zeros.

        Raises:
            NumericalError: The weight is not finite in the dtype on disk.
        """
        old = self._disk[target.name]
        cast = target.to_disk(weight).to("cpu", old.dtype).contiguous()
        if old.dtype == torch.float64:  # a weight that stays as it is keeps all of its digits
            cast = torch.where(cast == old.float(), old, cast)
        cast = cast.masked_fill(cast == 0, 0.0)
        low, high = cast.aminmax()
        if not (low.isfinite() & high.isfinite()):
            raise NumericalError(
                f"{target.name} is not finite after pruning ({old.dtype} on disk)",
                code="not-finite",
            )
        self._disk[target.name] = cast
        name = next(n for n, on_disk in self._names.items() if on_disk == target.name)
        self.stream.skeleton.hold(self.name, {name: cast})
        return target.from_disk(cast)

    def stored(self, name: str) -> Tensor:
        """A tensor of the block as it is on disk, by its name in the block."""
        return self._disk[self._names[f"{self.name}.{name}"]]

    def put(self, name: str, tensor: Tensor) -> None:
        """Replace a tensor by its name in the block; it has the dtype on disk."""
        full = f"{self.name}.{name}"
        self._disk[self._names[full]] = tensor
        self.stream.skeleton.hold(self.name, {full: tensor})

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the block as they will be on disk."""
        return dict(self._disk)

    @torch.no_grad()
    def observe(
        self, targets: Iterable[Target], want: Stats, *, advance: bool = False
    ) -> dict[str, InputStats]:
        """Input statistics of each target over all token rows, by its name on disk.

        Targets that read the same tensor (q, k and v) share one object. Unless the hidden states
        advance in the same pass, the computation of a row stops at the last target, which saves the
        last product of the block.

        Args:
            targets: The weights to observe.
            want: The statistics to keep.
            advance: Also replace the hidden states by this block's output.
        """
        from sparsekit.model.recording import InputRecorder

        rows = len(self.stream.hidden)
        recorder = InputRecorder(
            self.module,
            self.name,
            list(targets),
            want,
            rows=rows,
            device=self.stream.device,
            compute=self.run,
        )
        with recorder:
            for row in range(rows):
                output = recorder.run(row, stop=not advance)
                if advance and output is not None:
                    self._carry_on(row, output)
        return recorder.sums

    @torch.no_grad()
    def advance(self) -> None:
        """Replace the hidden states of all rows by this block's output."""
        for row in range(len(self.stream.hidden)):
            self._carry_on(row, self.run(row))

    def _carry_on(self, row: int, output: Tensor) -> None:
        """Store a row's output as the next block's input, reusing its memory."""
        old = self.stream.hidden[row]
        if (old.shape, old.dtype) == (output.shape, output.dtype):
            old.copy_(output)
        else:
            self.stream.hidden[row] = output.to("cpu")

    def run(self, row: int) -> Tensor:
        """This block's output for one row, `[1, length, hidden]` on the device."""
        call = self.stream._calls[self.index][row]
        hidden = self.stream.hidden[row].to(self.stream.device)
        output = self.module(hidden, *call.positional, **call.named)
        return output[0] if isinstance(output, tuple) else output
