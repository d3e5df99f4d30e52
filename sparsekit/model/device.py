"""Device and dtype of the computation."""

import time

import torch

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.errors import UsageError

# Side of the matrices that dtypes are timed with, and the number of tries; the fastest one counts.
SIDE, TRIES = 512, 3


def pick_device(name: str) -> str:
    """The device for `auto`, `cpu` or `cuda`.

    Raises:
        UsageError: CUDA is not available.
    """
    present = torch.cuda.is_available()
    if name == "cuda" and not present:
        raise UsageError(
            "--device cuda: this torch sees no CUDA device", "use --device cpu", code="no-cuda"
        )
    return ("cuda" if present else "cpu") if name == "auto" else name


def compute_dtype(name: str, device: str, source: Checkpoint) -> torch.dtype:
    """The dtype of the forward passes; tensors on disk keep theirs.

    `auto` is float32 on a CPU, where 16-bit products are several times slower unless the CPU has
    matrix units for them, and the checkpoint's own dtype on a GPU.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[
            name
        ]
    if device == "cpu":
        return torch.float32
    matrices = [place for place in source.places.values() if len(place.shape) == 2]
    own = max(matrices, key=lambda place: place.stop - place.start).dtype
    return own if own in (torch.bfloat16, torch.float16) else torch.float32


def product_seconds(dtype: torch.dtype) -> float:
    """Time of a product of two small matrices on the CPU."""
    matrix, times = torch.ones(SIDE, SIDE, dtype=dtype), []
    for _ in range(TRIES):
        begun = time.perf_counter()
        torch.mm(matrix, matrix)
        times.append(time.perf_counter() - begun)
    return min(times)
