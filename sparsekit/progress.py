"""What a stage tells while it works; the command line draws it, the library stays silent."""

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of one stage."""

    def begin(self, title: str, total: int) -> None:
        """A piece of work of `total` steps starts; a running one ends."""

    def step(self, label: str) -> None:
        """One step is done; `label` names it (a block, a model)."""

    def note(self, text: str) -> None:
        """Something the user should know although nothing failed."""

    def end(self) -> None:
        """The piece of work is over."""


class Silent:
    """Drops every message."""

    def begin(self, title: str, total: int) -> None:
        """Drop it."""

    def step(self, label: str) -> None:
        """Drop it."""

    def note(self, text: str) -> None:
        """Drop it."""

    def end(self) -> None:
        """Drop it."""


SILENT = Silent()
