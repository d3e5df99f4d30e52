"""Progress of a stage: the command line draws it, the library is silent by default."""


class Progress:
    """Receiver of the progress of one stage; this one discards it."""

    def begin(self, title: str, total: int, done: int = 0) -> None:
        """A task of `total` steps starts, `done` of them complete; a running task ends."""

    def step(self, label: str) -> None:
        """One step is complete; `label` names it (a block, a model)."""

    def note(self, text: str) -> None:
        """Something the user should know, although nothing failed."""

    def end(self) -> None:
        """The task ends."""


SILENT = Progress()
