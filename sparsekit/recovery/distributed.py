"""Processes that train together: one, or those started by `accelerate launch` or `torchrun`.

Each process computes its part of the batches, and all take the same steps. Every process holds the
whole model, or the rows of the decoder blocks' weights are sharded over the processes (FSDP2).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, nn

from sparsekit.errors import NumericalError, UsageError

T = TypeVar("T")
# How long processes wait for a process that tokenises, samples text, writes, or is lost.
PATIENCE = timedelta(hours=6)


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process, among the processes that train together."""

    rank: int = 0
    size: int = 1
    shards: bool = False
    """Whether each process holds only a part of the decoder blocks."""

    @classmethod
    def current(cls, device: str) -> Processes:
        """Connect the processes that a launcher started; without one, this process alone.

        Raises:
            UsageError: The launcher is configured to shard rows, or to use mixed precision.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        shards = _asked("FSDP")
        older = shards and os.environ.get("FSDP_VERSION", "1") != "2"
        for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
            if _asked(name) and (older or name != "FSDP"):
                raise UsageError(
                    f"accelerate is configured to use {name}{' 1' if older else ''}, which cuts "
                    "weights within rows, so weights and masks would no longer match",
                    "launch with --multi_gpu, or with --use_fsdp --fsdp_version 2",
                    code="launcher-shards",
                )
        if (precision := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":
            raise UsageError(
                f"accelerate is configured for mixed precision {precision}, which is an option of "
                "recover",
                "launch with --mixed_precision no, and pass --mixed-precision bf16 to recover",
                code="launcher-precision",
            )
        from accelerate import PartialState

        state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
        return cls(rank=state.process_index, size=state.num_processes, shards=shards)

    @property
    def main(self) -> bool:
        """Whether this process reads, writes and reports for all."""
        return self.rank == 0

    def parts(self, count: int) -> range:
        """The parts of a step that this process computes, of `count` equal parts.

        Raises:
            UsageError: The parts cannot be divided evenly.
        """
        if count % self.size:
            raise UsageError(
                f"--accumulate {count} cannot be divided among {self.size} processes",
                f"make it a multiple of {self.size}: it counts the forward passes of all processes",
                code="accumulate-does-not-divide",
            )
        return range(self.rank, count, self.size)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.size == 1:
            return
        works = [torch.distributed.all_reduce(tensor, async_op=True) for tensor in tensors]
        for work in works:
            work.wait()

    def shard(self, blocks: Iterable[nn.Module], device: torch.device) -> None:
        """Shard the rows of these blocks' weights over the processes."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (self.size,))
        # A block that is not resharded keeps computing with the gathered weights: an evaluation
        # changes weights and restores them, and no backward pass follows.
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)

    def broadcast(self, value: T) -> T:
        """The value of the main process."""
        if self.size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def require_same(self, value: str, what: str) -> None:
        """Stop unless all processes have the same value.

        Raises:
            NumericalError: The values differ.
        """
        values = self.gather(value)
        if len(set(values)) > 1:
            odd = next(rank for rank, other in enumerate(values) if other != values[0])
            raise NumericalError(
                f"process {odd} has other {what} than process 0",
                "check that versions, threads and devices are the same everywhere",
                code="processes-differ",
            )

    def wait(self) -> None:
        """Wait until all processes get here."""
        if self.size > 1:
            torch.distributed.barrier()

    def leave(self) -> None:
        """Disconnect when all processes are done.

        A process that ends with open connections may abort, and its launcher would then stop the
        other processes, including the one that writes.
        """
        if self.size > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def _asked(name: str) -> bool:
    """Whether accelerate is configured to shard models in this way."""
    return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1")
