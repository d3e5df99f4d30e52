"""What a stage tells while it works; the command line draws it, the library stays silent."""


class Progress:
    """Receives the progress of one stage; this one drops all of it."""

    def begin(self, title: str, total: int, done: int = 0) -> None:
        """A piece of work of `total` steps starts, some of them done before; a running one ends."""

    def step(self, label: str) -> None:
        """One step is done; `label` names it (a block, a model)."""

    def note(self, text: str) -> None:
        """Something the user should know although nothing failed."""

    def end(self) -> None:
        """The piece of work is over."""


SILENT = Progress()
