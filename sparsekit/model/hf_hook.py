"""Tells transformers of packed checkpoints, as soon as it is there, without importing it.

`import sparsekit` has to be enough for `AutoModelForCausalLM.from_pretrained` to load them, and is
not to cost the seconds that transformers takes.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# The module whose tables name what transformers can load.
TABLES = "transformers.quantizers.auto"


def register() -> None:
    """Enter the loader into transformers' tables, now or once they are there."""
    if TABLES in sys.modules:
        importlib.import_module("sparsekit.model.hf_loader")
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch(MetaPathFinder):
    """Finds the one module as Python would, with a loader that registers after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


class _Then(Loader):
    """A module's own loader, and then the registration."""

    def __init__(self, own: Loader) -> None:
        self.own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.own.exec_module(module)
        importlib.import_module("sparsekit.model.hf_loader")
