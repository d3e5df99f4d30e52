"""Short trainings of tiny models, as the tests of recovery use them."""

import math

from safetensors.torch import load_file, save_file

from sparsekit.recovery import export as trainwrite
from sparsekit.recovery.config import RecoverConfig

# Twelve steps of 2 x 16 tokens.
SHORT = RecoverConfig(method="ast", tokens=384, batch=2, length=16, lr=1e-3)


# Settles within its steps.
CAST = RecoverConfig(
    method="cast", option={"decay": "1e-2"}, tokens=9600, batch=2, length=16, lr=4e-3
)


def unsettled(monkeypatch):
    """Let a model pass whose entries off the mask have not vanished."""
    monkeypatch.setattr(trainwrite, "MOST_MOVED", math.inf)


def linear(checkpoint):
    return {n: p for n, p in checkpoint.places.items() if len(p.shape) == 2 and ".layers." in n}


def damaged(folder, change):
    """A copy's weights, changed, without the history that would tell of it."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})
    (folder / "sparsekit.json").unlink(missing_ok=True)
