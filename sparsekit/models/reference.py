"""Which folder a model's name stands for: a path, a hub id, or the demo model."""

from pathlib import Path

from sparsekit.errors import DataError, StorageError, UsageError, did_you_mean
from sparsekit.files import FULL, read_json
from sparsekit.models.configuration import load_config
from sparsekit.models.demo import SMOLLM2, demo_model
from sparsekit.models.folder import INDEX, SINGLE, weight_files
from sparsekit.progress import SILENT, Progress

DEMO = "demo"
# Everything of a hub model but its weights.
SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "LICENSE*")


def check(reference: str) -> None:
    """Refuse what can be no model, as far as names of files show it.

    This takes neither torch nor the network, so a wrong word is answered at once.

    Raises:
        DataError: There is no such folder, or it holds no checkpoint.
        UsageError: The reference is empty.
    """
    if not reference:
        raise UsageError("the model's name is empty", "pass a folder, a hub id or 'demo'")
    if _is_local(reference):
        weight_files(_folder(reference))


def resolve(reference: str, progress: Progress = SILENT) -> Path:
    """The local folder of a model: a folder as it is, `demo` and a hub id after their download.

    Raises:
        DataError: There is no such folder, and no such model can be fetched.
        UsageError: The reference is empty.
        StorageError: The model cannot be kept in the cache.
    """
    if not reference:
        check(reference)
    if reference == DEMO:
        return demo_model(progress)
    return _folder(reference) if _is_local(reference) else _download(reference, progress)


def title(reference: str) -> str:
    """What a model is called without its place: the last part of its path or hub id."""
    return SMOLLM2.model if reference == DEMO else Path(reference).resolve().name


def _is_local(reference: str) -> bool:
    if reference == DEMO:
        return False
    if Path(reference).exists():
        return True
    return reference.count("/") != 1 or reference.startswith((".", "/", "~"))


def _folder(reference: str) -> Path:
    path = Path(reference).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise DataError(f"no such model folder: {reference}", "it is a file: name its folder")
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    known = [DEMO, *(str(other) for other in beside if (other / "config.json").is_file())]
    hint = did_you_mean(reference, known, "pass a folder, a hub id (org/name) or 'demo'")
    raise DataError(f"no such model folder: {reference}", hint)


def _download(repo: str, progress: Progress) -> Path:
    """The hub's snapshot of a model, in the hub's own cache; weights last, shard by shard."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        folder = Path(snapshot_download(repo, allow_patterns=list(SMALL_FILES)))
        load_config(folder)
        shards = _shards(folder)
        progress.begin(f"fetch {repo}", len(shards))
        for shard in shards:
            # The commit is pinned, so that all files are of one state of the repository.
            hf_hub_download(repo, shard, revision=folder.name)
            progress.step(shard)
        progress.end()
    except LocalEntryNotFoundError as error:  # also the hub's way to say that it is out of reach
        raise _unavailable(repo, error) from error
    except EntryNotFoundError as error:
        raise DataError(
            f"{repo} has no safetensors weights ({SINGLE} or {INDEX}) on the hub",
            "if it has others, load it with AutoModelForCausalLM.from_pretrained, write it with "
            "save_pretrained, and pass that folder",
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        if getattr(error, "errno", None) in FULL:
            raise StorageError(
                f"the disk is full: {repo} cannot be kept in the hub's cache",
                "make room, or set HF_HOME to a folder on another disk",
            ) from error
        raise _unavailable(repo, error) from error
    return folder


def _unavailable(repo: str, error: Exception) -> DataError:
    reason = str(error).strip().split("\n")[0]
    return DataError(
        f"no folder {repo}, and the hub did not give a model of that name: {reason}",
        "pass a local folder, or check the name and the connection",
    )


def _shards(folder: Path) -> list[str]:
    """The weight files that the index of a snapshot names, or the one file without an index."""
    if not (folder / INDEX).is_file():
        return [SINGLE]
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"{folder / INDEX} has no weight_map")
    return sorted(set(map(str, weight_map.values())))
