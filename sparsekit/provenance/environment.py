"""The environment for a bug report: versions and machine, and nothing about the user."""

import importlib.metadata
import os
import platform
import re
import shutil
from pathlib import Path
from typing import Any

from sparsekit.files import cache_dir, existing_parent
from sparsekit.memory import available_memory

PACKAGES = ("torch", "transformers", "safetensors", "accelerate")
SHOWN = (*PACKAGES, "lm-eval", "compressed-tensors")
# Only these variables are shown: others may hold tokens and names.
VARIABLES = ("SPARSEKIT_CACHE", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def package_versions() -> dict[str, str]:
    """The versions of sparsekit, Python and the libraries that decide what it does."""
    shown = {
        "sparsekit": importlib.metadata.version("sparsekit"),
        "python": platform.python_version(),
    }
    for name in SHOWN:
        try:
            shown[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            shown[name] = "not installed"
    return shown


def environment() -> dict[str, Any]:
    """Versions, machine, cache and what torch sees; the home directory is written as `~`."""
    import psutil

    cache = cache_dir()
    count = os.cpu_count()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else count
    return {
        "versions": package_versions(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpus": count,
        "cpus_usable": usable,
        "memory_bytes": psutil.virtual_memory().total,
        "memory_free_bytes": available_memory(),
        "cache": without_home(str(cache)),
        "cache_free_bytes": shutil.disk_usage(existing_parent(cache)).free,
        **_torch(),
        "variables": {
            name: without_home(os.environ[name]) for name in VARIABLES if name in os.environ
        },
    }


def without_home(text: str) -> str:
    """A text with `~` instead of the home directory, whose name is mostly the user's."""
    home = os.path.expanduser("~").rstrip("/")
    homes = {home, str(Path(home).resolve())} - {"", "~", "/"}
    for place in sorted(homes, key=len, reverse=True):
        text = re.sub(rf"(?<![^\s:=]){re.escape(place)}(?=/|:|\s|$)", "~", text)
    return text


def _torch() -> dict[str, Any]:
    """The devices of torch, or why it cannot be asked."""
    try:
        import torch

        devices = [
            {
                "name": torch.cuda.get_device_name(index),
                "memory_bytes": torch.cuda.get_device_properties(index).total_memory,
            }
            for index in range(torch.cuda.device_count())
        ]
        return {
            "threads": torch.get_num_threads(),
            "cuda": torch.version.cuda,
            "cuda_devices": devices,
            "torch_error": None,
        }
    except (ImportError, OSError, RuntimeError) as error:
        reason = without_home(str(error).split("\n")[0])
        return {"threads": None, "cuda": None, "cuda_devices": [], "torch_error": reason}


def versions() -> dict[str, str]:
    """The versions that decide the numbers."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "sparsekit": importlib.metadata.version("sparsekit"),
        "python": platform.python_version(),
        **packages,
    }
