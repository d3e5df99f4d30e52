"""Recording of the inputs of a block's weights and of the arguments of a block."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.errors import DataError
from sparsekit.model.architecture import Target
from sparsekit.solvers.input_stats import SAMPLE_TOKENS, InputStats, Stats

# Results of tensor comparisons, by identity; the second tensor is kept alive so that no
# other one can get its identity.
Comparisons = dict[tuple[int, int], tuple[bool, Tensor]]


class _Reached(Exception):
    """The last observed target has been reached; the rest of the block is not needed."""


class InputRecorder:
    """Forward pre-hooks that sum the inputs of a block's targets, row by row.

    Args:
        module: The block.
        name: Its name, for errors.
        targets: The weights whose inputs are summed.
        want: The sums to keep.
        rows: The number of token rows that will be run.
        device: The device of the sums.
        compute: Runs the block on the row of this index and returns its output.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        targets: list[Target],
        want: Stats,
        *,
        rows: int,
        device: torch.device,
        compute: Callable[[int], Tensor],
    ) -> None:
        self.module = module
        self.name = name
        self.want = want
        self.device = device
        self.compute = compute
        self.sums: dict[str, InputStats] = {}
        self._targets = targets
        self._handles: list[Any] = []
        self._inputs: list[tuple[str, Tensor, int]] = []
        self._order: list[str] = []  # targets in the order of their calls, from the first row
        self._leaders: list[str] = []  # for each call, the target whose sums take the input
        self._stop = False
        self._sample = [
            SAMPLE_TOKENS * (r + 1) // rows - SAMPLE_TOKENS * r // rows for r in range(rows)
        ]

    def __enter__(self) -> InputRecorder:
        for target in self._targets:
            module = self.module.get_submodule(target.module)
            self._handles.append(module.register_forward_pre_hook(self._hook(target.name)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def run(self, row: int, *, stop: bool) -> Tensor | None:
        """Run one row and add its inputs to the sums; None when it stopped at the last target."""
        self._inputs = []
        self._stop = stop and bool(self._order)
        output = None
        with suppress(_Reached):
            output = self.compute(row)
        if not self._order:
            self._learn()
        self._add(self._sample[row])
        self._inputs = []
        return output

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._inputs.append((name, args[0], args[0]._version))
            if self._stop and len(self._inputs) == len(self._order):
                raise _Reached

        return hook

    def _learn(self) -> None:
        """Learn the order of the calls, and which of them share an input, from the first row.

        Raises:
            DataError: A target was not called.
        """
        self._order = [name for name, _, _ in self._inputs]
        missing = [t.name for t in self._targets if t.name not in self._order]
        if missing:
            raise DataError(
                f"{', '.join(missing)}: no calibration token reaches it",
                "exclude it with --skip",
                code="unsupported-model",
            )
        for position, (name, x, _) in enumerate(self._inputs):
            earlier = (i for i in range(position) if self._inputs[i][1] is x)
            first = next(earlier, None)
            if first is not None and self._order.count(name) == 1:
                self._leaders.append(self._leaders[first])
            else:
                self._leaders.append(name)
        for name, leader in zip(self._order, self._leaders, strict=True):
            if name == leader and name not in self.sums:
                columns = next(t.shape[1] for t in self._targets if t.name == name)
                self.sums[name] = InputStats(columns, self.want, self.device)
            self.sums[name] = self.sums[leader]

    def _add(self, sample: int) -> None:
        if [name for name, _, _ in self._inputs] != self._order:
            raise DataError(
                f"{self.name}: its calls depend on the data",
                "exclude it with --skip",
                code="unsupported-model",
            )
        for (name, x, version), leader in zip(self._inputs, self._leaders, strict=True):
            if x._version != version:
                raise DataError(
                    f"{name}: its input is changed in place during the forward pass",
                    code="unsupported-model",
                )
            if name == leader:
                self.sums[name].update(x.reshape(-1, x.shape[-1]), sample)


@dataclass
class BlockCall:
    """The arguments of a block, other than the hidden states."""

    positional: tuple[Any, ...]
    named: dict[str, Any]


def equal_calls(first: Any, second: Any, seen: Comparisons) -> bool:
    """Whether two recorded values are equal, tensors by content."""
    if first is second:
        return True
    if type(first) is not type(second):
        return False
    if isinstance(first, BlockCall):
        return equal_calls(first.positional, second.positional, seen) and equal_calls(
            first.named, second.named, seen
        )
    if isinstance(first, Tensor):
        key = (id(first), id(second))
        if key not in seen:
            equal = first.shape == second.shape and torch.equal(first, second)
            seen[key] = (equal, second)
        return seen[key][0]
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(
            equal_calls(a, b, seen) for a, b in zip(first, second, strict=True)
        )
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(
            equal_calls(first[k], second[k], seen) for k in first
        )
    try:
        return bool(first == second)
    except (RuntimeError, ValueError, TypeError):
        return False
