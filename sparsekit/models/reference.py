"""Which folder a model's name stands for: a path, a hub id, or the demo model."""

from pathlib import Path

from sparsekit.errors import DataError, UsageError
from sparsekit.models.demo import SMOLLM2, demo_model
from sparsekit.progress import SILENT, Progress

DEMO = "demo"


def resolve(reference: str, progress: Progress = SILENT) -> Path:
    """The local folder of a model: a folder as it is, `demo` and a hub id after their download.

    Raises:
        DataError: There is no such folder, and no such model can be fetched.
        UsageError: The reference is empty.
        StorageError: The demo model cannot be kept in the cache.
    """
    if not reference:
        raise UsageError("the model's name is empty", "pass a folder, a hub id or 'demo'")
    if reference == DEMO:
        return demo_model(progress)
    path = Path(reference).expanduser()
    if path.exists() or reference.count("/") != 1 or reference.startswith((".", "/", "~")):
        if not path.is_dir():
            raise DataError(
                f"no such model folder: {reference}", "pass a folder, a hub id (org/name) or 'demo'"
            )
        return path
    return _download(reference)


def title(reference: str) -> str:
    """What a model is called without its place: the last part of its path or hub id."""
    return SMOLLM2.model if reference == DEMO else Path(reference).resolve().name


def _download(repo: str) -> Path:
    """The hub's snapshot of a model, in the hub's own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    kept = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*"]
    try:
        return Path(snapshot_download(repo, allow_patterns=kept))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"no folder {repo}, and the hub did not give a model of that name: {reason}",
            "pass a local folder, or check the name and the connection",
        ) from error
