"""Download of models from the Hugging Face hub into its own cache: small files first."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsekit.checkpoint.folder import (
    INDEX,
    SINGLE,
    indexed_files,
    is_packed,
    load_config,
    refuse_two_forms,
)
from sparsekit.errors import DataError, StorageError
from sparsekit.files import FULL
from sparsekit.progress import SILENT, Progress

# Everything of a model but its weights.
SMALL_FILES = ("*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", "LICENSE*", "README.md")
RETRY = "check the connection, then run the same command again: finished downloads are kept"


def fetch(repo: str, progress: Progress = SILENT) -> Path:
    """The folder of a hub model's snapshot; files in the hub's cache are not fetched again.

    Raises:
        DataError: There is no such model, it cannot be reached, or it is not a checkpoint.
        StorageError: The disk is full.
    """
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, HTTPError

    try:
        folder = _small_files(repo)
        _fetch_weights(repo, folder, _shards(repo, folder), progress)
    except GatedRepoError as error:
        raise DataError(
            f"{repo} is available only to users who accepted its terms",
            "accept them on its page on the hub, then log in: hf auth login",
            code="gated-model",
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise _unavailable(repo, error) from error
    except (HTTPError, RuntimeError) as error:  # RuntimeError: from the hub's transfer library
        raise DataError(
            f"{repo} could not be fetched: {_reason(error)}", RETRY, code="hub-unavailable"
        ) from error
    except OSError as error:
        if error.errno in FULL:
            raise StorageError(
                f"the disk is full: {repo} cannot be kept in the hub's cache",
                "make room, or set HF_HOME to a folder on another disk",
                code="cannot-write",
            ) from error
        raise _unavailable(repo, error) from error
    return folder


def _small_files(repo: str) -> Path:
    """Fetch everything but the weights, and check the configuration."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repo, allow_patterns=list(SMALL_FILES)))
    if not (folder / "config.json").is_file():
        raise DataError(
            f"{repo} has no config.json on the hub", "is it a language model?", code="no-config"
        )
    try:
        config = load_config(folder)
        _refuse_other_forms(repo, getattr(config, "quantization_config", None))
    except DataError as error:
        raise _renamed(error, folder, repo) from error
    return folder


def _renamed(error: DataError, folder: Path, repo: str) -> DataError:
    """An error about a snapshot that names the repository instead of the folder."""
    message = error.message.replace(str(folder), repo)
    return DataError(message, error.hint, code=error.code)


def _refuse_other_forms(repo: str, quantization: Any) -> None:
    """Refuse weights in a form that cannot be read directly from the hub.

    Args:
        repo: The hub id.
        quantization: The `quantization_config` in its config.json.

    Raises:
        DataError: They are packed, or in an unsupported format.
    """
    from sparsekit.checkpoint.compressed_tensors import grid_of
    from sparsekit.checkpoint.kind import unsupported_format

    if is_packed(quantization):
        raise DataError(
            f"{repo} is packed",
            f"fetch it with hf download {repo}, and name the folder",
            code="kind-not-taken",
        )
    if quantization and grid_of(quantization) is None:
        raise unsupported_format(repo, {"quantization_config": quantization})


def _shards(repo: str, folder: Path) -> list[str]:
    """The weight files that the snapshot's index names; without an index the single file."""
    if not (folder / INDEX).is_file():
        return [SINGLE]
    try:
        shards = sorted(indexed_files(folder))
        if _has_single(repo, folder):
            refuse_two_forms(folder, shards)
    except DataError as error:
        raise _renamed(error, folder, repo) from error
    return shards


def _has_single(repo: str, folder: Path) -> bool:
    """Whether the snapshot also has its weights in one file; offline, according to the cache."""
    from huggingface_hub import file_exists
    from huggingface_hub.errors import HTTPError

    try:
        return (folder / SINGLE).is_file() or file_exists(repo, SINGLE, revision=folder.name)
    except (HTTPError, OSError):
        return False


def _fetch_weights(repo: str, folder: Path, shards: list[str], progress: Progress) -> None:
    """Fetch the weight files of the snapshot, in name order."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    progress.begin(f"fetch {repo}", len(shards))
    try:
        # The commit is pinned, so that all files belong to the same commit.
        snapshot_download(
            repo,
            revision=folder.name,
            allow_patterns=shards,
            max_workers=1,
            tqdm_class=_bar(progress, len(shards)),
        )
    except LocalEntryNotFoundError as error:
        missing = ", ".join(shard for shard in shards if not (folder / shard).is_file())
        raise DataError(
            f"{missing} of {repo} is not in the hub's cache, and the hub cannot be reached",
            RETRY,
            code="hub-unavailable",
        ) from error
    progress.end()
    for shard in shards:
        if (folder / shard).is_file():
            continue
        if shard != SINGLE:
            raise DataError(
                f"{repo}: its {INDEX} names {shard}, which the hub does not have",
                code="incomplete-checkpoint",
            )
        raise DataError(
            f"{repo} has no safetensors weights ({SINGLE} or {INDEX}) on the hub",
            "if it has others, load it with AutoModelForCausalLM.from_pretrained, write it with "
            "save_pretrained, and pass that folder",
            code="no-safetensors",
        )


def _bar(progress: Progress, total: int) -> type:
    """A tqdm class that reports the number of fetched files to a `Progress`."""
    from tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            self._counts_files = options.get("unit") != "B"
            super().__init__(*args, **options | {"disable": True})

        def __iter__(self) -> Iterator[Any]:
            for item in self.iterable:
                yield item
                self.update()

        def update(self, n: float | None = 1) -> None:
            if self._counts_files:
                self.n += n or 0
                progress.step(f"{self.n} of {total} files")

    return Bar


def _unavailable(repo: str, error: Exception) -> DataError:
    return DataError(
        f"no folder {repo}, and the hub did not give a model of that name: {_reason(error)}",
        "pass a local folder, or check the name and the connection",
        code="hub-unavailable",
    )


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
