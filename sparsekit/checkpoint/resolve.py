"""Model references: a folder, a hub id or the demo model."""

import contextlib
import os.path
from pathlib import Path

from sparsekit.checkpoint.folder import weight_files
from sparsekit.errors import DataError, UsageError, did_you_mean
from sparsekit.progress import SILENT, Progress

DEMO = "demo"


def check_reference(reference: str) -> Path | None:
    """Refuse a reference that cannot be a model; returns its folder if it is a local one.

    This needs neither torch nor the network, so a typo is reported at once.

    Raises:
        DataError: There is no such folder, or it does not hold a checkpoint.
        UsageError: The reference is empty.
    """
    if not reference:
        raise UsageError(
            "the model's name is empty", "pass a folder, a hub id or 'demo'", code="empty-name"
        )
    if not _is_local(reference):
        return None
    weight_files(folder := _folder(reference))
    return folder


def resolve(reference: str, progress: Progress = SILENT) -> Path:
    """The local folder of a model; `demo` and a hub id are downloaded first.

    Raises:
        DataError: There is no such folder, and no such model can be fetched.
        UsageError: The reference is empty.
        StorageError: The model cannot be kept in the cache.
    """
    if not reference:
        check_reference(reference)
    if reference == DEMO:
        from sparsekit.checkpoint.demo_model import demo_model

        return demo_model(progress)
    if _is_local(reference):
        return _folder(reference)
    from sparsekit.checkpoint.hub import fetch

    return fetch(reference, progress)


def local_folder(reference: str) -> Path | None:
    """The folder of a model that is on this machine, without network access; None: it is not."""
    if reference == DEMO:
        from sparsekit.checkpoint.demo_model import demo_folder

        place = demo_folder()
    elif _is_local(reference):
        place = Path(os.path.expanduser(reference))
    else:
        return None
    return place if (place / "config.json").is_file() else None


def display_name(reference: str) -> str:
    """The last part of a model's path or hub id."""
    if reference == DEMO:
        from sparsekit.checkpoint.demo_model import SMOLLM2

        return SMOLLM2.model
    return Path(reference).resolve().name


def hub_id(reference: str) -> str | None:
    """The hub id of a model or of `demo`; None for a folder."""
    if reference == DEMO:
        from sparsekit.checkpoint.demo_model import SMOLLM2

        return SMOLLM2.hub_id
    return None if _is_local(reference) else reference


def _is_local(reference: str) -> bool:
    if reference == DEMO:
        return False
    if os.path.exists(reference):
        return True
    return reference.count("/") != 1 or reference.startswith((".", "/", "~"))


def _folder(reference: str) -> Path:
    # Unlike Path's own, these raise nothing for a name that no file can have.
    place = os.path.expanduser(reference)
    if os.path.isdir(place):
        return Path(place)
    if os.path.isfile(place):
        raise DataError(
            f"{reference} is a file, not a model folder", "name its folder", code="not-a-folder"
        )
    known = [DEMO]
    with contextlib.suppress(OSError):
        siblings = [str(other) for other in Path(place).parent.iterdir()]
        known += [other for other in siblings if os.path.isfile(f"{other}/config.json")]
    forms = "pass a folder, a hub id (org/name) or 'demo'"
    suggestion = did_you_mean(reference, known, forms)
    hint = suggestion if suggestion == forms else f"{suggestion} Otherwise {forms}"
    raise DataError(f"no such model folder: {reference}", hint, code="no-such-model")
