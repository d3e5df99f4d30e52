"""Tiny real checkpoints of nine families, token rows, and the command line in both forms.

That this file is here also lets tests import `oracles`.
"""

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # processes that each start threads wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

VOCABULARY = 260  # 256 bytes and four special tokens
ROWS, LENGTH = 5, 24
WINDOW = 8  # of sliding attention: shorter than the rows, so that the mask of such a layer differs
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test that is `sampled`, leave every nth case in the default run."""
    counts: Counter[tuple[Path, str]] = Counter()
    for item in items:
        if (sampled := item.get_closest_marker("sampled")) is not None:
            place = (item.path, item.originalname)
            if counts[place] % sampled.args[0]:
                item.add_marker(pytest.mark.slow)
            counts[place] += 1


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute in one thread: small products only wait for each other on a shared machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def _cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(_cache, monkeypatch):
    """Keep what sparsekit caches out of the user's home."""
    monkeypatch.setenv("SPARSEKIT_CACHE", str(_cache))


@pytest.fixture(scope="session")
def family(tmp_path_factory) -> Callable[[str], Path]:
    """Gives the folder of a named tiny checkpoint; nobody may write there."""
    root = tmp_path_factory.mktemp("families")

    def folder(name: str) -> Path:
        if not (root / name).is_dir():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(list(MAKERS).index(name))
                MAKERS[name](root / name)
        return root / name

    return folder


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., None]:
    """Writes a random Llama of any shape to a folder."""
    return llama


@pytest.fixture
def copy_of(family, tmp_path) -> Callable[[str | Path], Path]:
    """Gives a private copy of a named checkpoint or of a folder, to be damaged."""

    def copy(what: str | Path) -> Path:
        source = family(what) if isinstance(what, str) else what
        return shutil.copytree(source, tmp_path / f"copy-of-{source.name}")

    return copy


@pytest.fixture(scope="session")
def rows() -> torch.Tensor:
    """Token rows that every family can take, `[5, 24]`."""
    return torch.randint(0, 256, (ROWS, LENGTH), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="session")
def row_file(rows, tmp_path_factory) -> Path:
    """The token rows as a file."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("rows") / "rows.safetensors"
    save_file({"tokens": rows}, path)
    return path


@pytest.fixture(scope="session")
def pruned(family, row_file, tmp_path_factory) -> Path:
    """The tiny llama at 2:4 by Wanda; nobody may write there."""
    from sparsekit.pruning.config import PruneConfig
    from sparsekit.pruning.prune import prune

    out = tmp_path_factory.mktemp("pruned") / "llama-2of4"
    config = PruneConfig(calibration=str(row_file))
    return prune(config, str(family("llama")), out).out


@pytest.fixture
def cli() -> Callable[..., SimpleNamespace]:
    """Runs the command line in this process; gives `code`, `stdout`, `stderr`."""
    from typer.testing import CliRunner

    from sparsekit.cli.app import app

    def run(*args: object, stdin: str | None = None) -> SimpleNamespace:
        found = CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)
        return SimpleNamespace(code=found.exit_code, stdout=found.stdout, stderr=found.stderr)

    return run


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts `sparsekit` as a process of its own, with pipes; kills it when the test ends.

    `program` are the arguments of Python that take the place of `-m sparsekit`.
    """
    started = []

    def popen(*args: object, program=("-m", "sparsekit"), **options) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        pipe = subprocess.PIPE
        plain = {"stdin": subprocess.DEVNULL, "stdout": pipe, "stderr": pipe, "text": True}
        command = [sys.executable, *program, *(str(arg) for arg in args)]
        started.append(subprocess.Popen(command, **{**plain, "env": environment, **options}))
        return started[-1]

    yield popen
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def spawn(start) -> Callable[..., SimpleNamespace]:
    """Runs `sparsekit` in a process of its own; gives `code`, `stdout`, `stderr`."""

    def run(*args: object, **options) -> SimpleNamespace:
        process = start(*args, **options)
        stdout, stderr = process.communicate(timeout=300)
        return SimpleNamespace(code=process.returncode, stdout=stdout, stderr=stderr)

    return run


def save_tokenizer(folder: Path) -> None:
    """One token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, "<s>", "</s>", "<pad>"]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def save(folder: Path, config, dtype=torch.float32, shard: str = "1GB") -> None:
    """A random model whose norms and biases are not trivial."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)


def llama(folder: Path, dtype=torch.float32, shard: str = "1GB", **changes) -> None:
    from transformers import LlamaConfig

    save(folder, LlamaConfig(**{**SHAPE, "tie_word_embeddings": False, **changes}), dtype, shard)


def llama_with_tokenizer(folder: Path) -> None:
    llama(folder, torch.bfloat16)
    save_tokenizer(folder)


def llama_deep(folder: Path) -> None:
    shape = {"num_hidden_layers": 6, "hidden_size": 64, "intermediate_size": 256}
    llama(folder, torch.bfloat16, "150KB", **shape)


def qwen2(folder: Path) -> None:
    from transformers import Qwen2Config

    save(folder, Qwen2Config(**SHAPE, tie_word_embeddings=False), torch.bfloat16)


def qwen3(folder: Path) -> None:
    from transformers import Qwen3Config

    save(folder, Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True))


def mistral(folder: Path) -> None:
    from transformers import MistralConfig

    save(folder, MistralConfig(**SHAPE, sliding_window=WINDOW), torch.float16)


def gemma3(folder: Path) -> None:
    from transformers import Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    shape = {**SHAPE, "num_hidden_layers": 3}
    config = Gemma3TextConfig(**shape, head_dim=16, sliding_window=WINDOW, layer_types=kinds)
    save(folder, config, torch.bfloat16)


def gpt2(folder: Path) -> None:
    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.2,
        bos_token_id=256,
        eos_token_id=257,
    )
    save(folder, config, shard="60KB")


def opt(folder: Path) -> None:
    from transformers import OPTConfig

    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        init_std=0.2,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    save(folder, config, torch.float16)


def phi3(folder: Path) -> None:
    from transformers import Phi3Config

    save(folder, Phi3Config(**SHAPE))


def mixtral(folder: Path) -> None:
    from transformers import MixtralConfig

    save(folder, MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2))


MAKERS: dict[str, Callable[[Path], None]] = {
    "llama": llama_with_tokenizer,  # bfloat16, untied
    "llama_tied": lambda folder: llama(folder, tie_word_embeddings=True),
    "qwen2": qwen2,
    "qwen3": qwen3,
    "mistral": mistral,
    "gemma3": gemma3,
    "gpt2": gpt2,  # several shards
    "opt": opt,
    "phi3": phi3,
    "mixtral": mixtral,  # refused
    "llama_sharded": lambda folder: llama(folder, torch.float16, "40KB"),
    "llama_odd": lambda folder: llama(folder, intermediate_size=66),
    "llama_deep": llama_deep,
}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 100 MB of its own, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100m", "sparsekit-test", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
