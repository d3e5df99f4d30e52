"""The saved state of a training run: replaced in one step, so that a kill leaves the old one."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sparsekit.errors import DataError
from sparsekit.files import fsync_path, storage_errors
from sparsekit.tensors.maskedadam import MaskedAdam

STATE = ".sparsekit-state.safetensors"


def save_state(folder: Path, optimizer: MaskedAdam) -> None:
    """Write weights, masks (as bits), moments and the number of steps.

    The order of the rows follows from the number of steps and the seed, and nothing else is drawn.

    Raises:
        StorageError: It could not be written; the state before is untouched.
    """
    part = folder / f"{STATE}.part"
    tensors = {name: t.detach().cpu().contiguous() for name, t in optimizer.state().items()}
    with storage_errors(folder):
        try:
            try:
                save_file(tensors, part, {"steps": str(optimizer.steps)})
            except SafetensorError as error:  # wraps what the system said
                raise OSError(str(error)) from error
            fsync_path(part)
            os.replace(part, folder / STATE)
        finally:
            part.unlink(missing_ok=True)
        fsync_path(folder)


def load_state(folder: Path, optimizer: MaskedAdam) -> bool:
    """Bring an optimizer and its weights to the saved state; False when there is none.

    Raises:
        DataError: It is damaged.
        NumericalError: It does not fit this run.
    """
    if not (folder / STATE).is_file():
        return False
    try:
        with safe_open(folder / STATE, "pt") as file:
            steps = int(file.metadata()["steps"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"the saved state in {folder} is damaged: {error}", "delete the folder and start anew"
        ) from error
    optimizer.load_state(tensors, steps)
    return True
