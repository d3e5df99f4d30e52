"""Keep the zeros of a sparse model in any training loop."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparsekit.errors import UsageError


class Masked:
    """Keeps the current zeros of a model's matrices at zero.

    As a context manager, it resets them after every step of every torch optimizer in this process,
    and once more on exit, which also covers adapters that were merged in between.

    Args:
        model: The model. Embeddings are ignored, and so are matrices that are all zero, such as
            fresh PEFT adapters.

    Raises:
        UsageError: The model has no zeros.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise UsageError(
                f"masked takes a torch module, not a {type(model).__name__}",
                "load a folder with sparsekit.load",
                code="wrong-type",
            )
        self._zeros: list[tuple[nn.Parameter, Tensor]] = []
        tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
        for parameter in model.parameters():
            zero = parameter.detach() == 0
            # All zero is not a mask, but e.g. a fresh adapter.
            if parameter.ndim < 2 or not zero.any() or zero.all():
                continue
            if not any(parameter is table for table in tables):
                self._zeros.append((parameter, zero))
        if not self._zeros:
            message = "the model's matrices have no zeros to keep"
            raise UsageError(message, "prune it first", code="not-sparse")
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    def __enter__(self) -> Masked:
        self._hook = register_optimizer_step_post_hook(lambda *_: self.apply())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Reset the entries a last time and remove the optimizer hook."""
        self.apply()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @torch.no_grad()
    def apply(self) -> None:
        """Reset the entries to zero."""
        for parameter, zero in self._zeros:
            parameter.masked_fill_(zero.to(parameter.device), 0.0)

    @property
    def count(self) -> int:
        """Number of entries that are kept at zero."""
        return sum(int(zero.sum()) for _, zero in self._zeros)
