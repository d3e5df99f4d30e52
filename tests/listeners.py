"""Listeners for the progress of a stage that several tests use."""

from sparsekit.progress import Progress


class Notes(Progress):
    """Keeps what was noted, and the labels of the steps."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.labels: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)

    def step(self, label: str) -> None:
        self.labels.append(label)


class StopsAt(Progress):
    """Interrupts training when so many of its steps are done."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def step(self, label: str) -> None:
        self.left -= "tokens/s" in label
        if self.left == 0:
            raise KeyboardInterrupt
