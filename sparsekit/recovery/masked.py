"""Keep the zeros of a sparse model through anybody's training loop."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparsekit.errors import UsageError


class Masked:
    """Holds which entries of a model's matrices are zero, and makes them zero again.

    Once entered, it does so after every step of every torch optimizer in this process, and a last
    time when it is left, which also covers a merge of adapters in between.

    Args:
        model: The model; the zeros are those that its matrices have now. Embeddings are left alone,
            and so are matrices of zeros only, with which the adapters of PEFT begin.

    Raises:
        UsageError: The model has no zeros.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise UsageError(
                f"masked takes a torch module, not a {type(model).__name__}",
                "load a folder with sparsekit.load",
            )
        self._zeros: list[tuple[nn.Parameter, Tensor]] = []
        tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
        for parameter in model.parameters():
            zero = parameter.detach() == 0
            # All zero is no mask but a beginning, as of an adapter that does nothing yet.
            if parameter.ndim < 2 or not zero.any() or zero.all():
                continue
            if not any(parameter is table for table in tables):
                self._zeros.append((parameter, zero))
        if not self._zeros:
            raise UsageError("the model's matrices have no zeros to keep", "prune it first")
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
        """Make the entries zero a last time and let the optimizers go."""
        self.apply()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @torch.no_grad()
    def apply(self) -> None:
        """Make the entries zero again."""
        for parameter, zero in self._zeros:
            parameter.masked_fill_(zero.to(parameter.device), 0.0)

    @property
    def count(self) -> int:
        """How many entries are kept at zero."""
        return sum(int(zero.sum()) for _, zero in self._zeros)
