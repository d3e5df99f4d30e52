"""Saved states of a training run; a kill at any time leaves the last complete one."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sparsekit.errors import DataError
from sparsekit.files import fsync_path, read_json, storage_errors, write_json
from sparsekit.recovery.distributed import Processes
from sparsekit.recovery.optimizer import MaskedAdam

# Seconds between saved states, without --save-every.
SAVE_SECONDS = 600.0
# Names the last complete state.
POINTER = ".sparsekit-state.json"
STATES = ".sparsekit-state-*.saved"


def save_state(folder: Path, optimizer: MaskedAdam, processes: Processes) -> None:
    """Write weights, masks (as bits), moments and the number of steps.

    The order of the rows follows from the number of steps and the seed; nothing else is random. If
    the model is sharded, each process writes its part.

    Raises:
        StorageError: It could not be written; the previous state is untouched.
    """
    file = _file(folder, optimizer.steps, processes)
    if processes.main or processes.shards:
        tensors = {name: t.detach().cpu().contiguous() for name, t in optimizer.state().items()}
        with storage_errors(folder):
            try:
                save_file(tensors, file, {"steps": str(optimizer.steps)})
            except SafetensorError as error:  # wraps the message of the system
                raise OSError(str(error)) from error
            fsync_path(file)
            fsync_path(folder)
    processes.wait()
    if processes.main:
        write_json(folder / POINTER, {"steps": optimizer.steps, "processes": processes.size})
        current = _file(folder, optimizer.steps, processes).name.rpartition("-")[0]
        for old in folder.glob(STATES):
            if old.name.rpartition("-")[0] != current:
                old.unlink(missing_ok=True)


def load_state(folder: Path, optimizer: MaskedAdam, processes: Processes) -> bool:
    """Load the saved state into an optimizer and its weights; False if there is none.

    Raises:
        DataError: It is damaged, or was sharded over another number of processes.
        NumericalError: It does not fit this run.
    """
    if not processes.broadcast((folder / POINTER).is_file()):
        return False
    pointer = read_json(folder / POINTER)
    file = _file(folder, pointer["steps"], processes)
    try:
        with safe_open(file, "pt") as state:
            tensors = {name: state.get_tensor(name) for name in state.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"the saved state {file} is damaged or missing: {error}",
            f"resume with {pointer['processes']} processes as before, or delete {folder}",
            code="state-damaged",
        ) from error
    optimizer.load_state(tensors, pointer["steps"])
    return True


def forget_states(folder: Path) -> None:
    """Delete the files that only a resumed run needs."""
    for file in (folder / POINTER, *folder.glob(STATES)):
        file.unlink(missing_ok=True)


def _file(folder: Path, steps: int, processes: Processes) -> Path:
    """File of this process's part of a state."""
    part = processes.rank if processes.shards else 0
    return folder / STATES.replace("*", f"{steps}-{part}")
