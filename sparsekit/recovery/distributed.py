"""The processes that train together: one, or those that `accelerate launch` or `torchrun` started.

Each computes its part of the batches, and all take the same steps. Every process holds the whole
model, or the rows of each decoder block's weights are sharded over them (FSDP2).
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
# How long processes wait for one that tokenises, samples text or writes, and for one that is lost.
PATIENCE = timedelta(hours=6)


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1
    shards: bool = False
    """Whether each process holds a part of the decoder blocks only."""

    @classmethod
    def current(cls, device: str) -> Processes:
        """The processes that a launcher started, connected; or this one alone.

        Raises:
            UsageError: The launcher was told to shard the model in a way that cuts rows, or to
                compute in another type.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        shards = _asked("FSDP")
        older = shards and os.environ.get("FSDP_VERSION", "1") != "2"
        for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
            if _asked(name) and (older or name != "FSDP"):
                raise UsageError(
                    f"accelerate was told to use {name}{' 1' if older else ''}, which cuts weights "
                    "without regard to their rows: they and their masks would no longer match",
                    "launch it with --multi_gpu, or with --use_fsdp --fsdp_version 2",
                )
        if (precision := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":
            raise UsageError(
                f"accelerate was told to compute in {precision}, which is for recover to be told",
                "launch it with --mixed_precision no, and recover with --mixed-precision bf16",
            )
        from accelerate import PartialState

        state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
        return cls(rank=state.process_index, size=state.num_processes, shards=shards)

    @property
    def main(self) -> bool:
        """Whether this process reads, writes and tells for all."""
        return self.rank == 0

    def parts(self, count: int) -> range:
        """Which of so many equal parts of a step are this process's.

        Raises:
            UsageError: They cannot be shared out evenly.
        """
        if count % self.size:
            raise UsageError(
                f"--accumulate {count} cannot be shared by {self.size} processes",
                f"make it a multiple of {self.size}: it counts the forward passes of all",
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
        """Leave to each process some rows of the weights of these blocks."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (self.size,))
        # A block that stays whole after a forward pass goes on to compute with what it was then:
        # an evaluation changes weights and brings them back, and no backward pass follows it.
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)

    def broadcast(self, value: T) -> T:
        """The value that the main process has."""
        if self.size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """What each process has."""
        if self.size == 1:
            return [value]
        found: list[T] = [value] * self.size
        torch.distributed.all_gather_object(found, value)
        return found

    def require_same(self, value: str, what: str) -> None:
        """Refuse to go on when the processes do not have the same.

        Raises:
            NumericalError: They differ.
        """
        found = self.gather(value)
        if len(set(found)) > 1:
            odd = next(rank for rank, one in enumerate(found) if one != found[0])
            raise NumericalError(
                f"process {odd} has other {what} than process 0",
                "are versions, threads and devices the same everywhere?",
            )

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            torch.distributed.barrier()

    def leave(self) -> None:
        """Part when all are done: one that is gone before may take the others with it.

        A process whose connections still stand may abort as it ends, and its launcher stops the
        rest then, also the one that writes.
        """
        if self.size > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def _asked(name: str) -> bool:
    """Whether accelerate was told to use a way to shard models."""
    return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1")
