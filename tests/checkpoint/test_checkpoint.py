"""Reading a checkpoint: the bytes of safetensors, and the ways in which a folder can be damaged."""

import hashlib
import json
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file
from scorings import entry, pruned_entry

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.folder import INDEX
from sparsekit.errors import DataError
from sparsekit.model.block_stream import BlockStream
from sparsekit.model.skeleton import build_without_weights

WEIGHTS = "model.safetensors"


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def header_of(path: Path) -> tuple[dict, int]:
    """The header of a safetensors file and the offset of its data, by the format's definition."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), 8 + length


def independent_fingerprint(folder: Path) -> str:
    """By the description, without sparsekit: over name, dtype, shape and sha256 of each tensor."""
    rows = []
    for file in folder.glob("*.safetensors"):
        header, begin = header_of(file)
        header.pop("__metadata__", None)
        for name, place in header.items():
            start, stop = place["data_offsets"]
            digest = hashlib.sha256(file.read_bytes()[begin + start : begin + stop]).hexdigest()
            rows.append([name, place["dtype"], place["shape"], digest])
    return hashlib.sha256(json.dumps(sorted(rows), separators=(",", ":")).encode()).hexdigest()


def poison(folder: Path, name: str, value: float) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


# What is read


def test_every_dtype_is_read_as_safetensors_reads_it(tmp_path):
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(0, 256, (4, 24), dtype=torch.uint8, generator=generator)
    small = torch.randn(4, 3, generator=generator)
    tensors = {
        "f64": small.double(),
        "f32": small,
        "f16": small.half(),
        "bf16": small.bfloat16(),
        "f8a": small.to(torch.float8_e4m3fn),
        "f8b": small.to(torch.float8_e5m2),
        "i64": bits.view(torch.int64).clone(),
        "i32": bits.view(torch.int32).clone(),
        "i16": bits.view(torch.int16).clone(),
        "i8": bits.view(torch.int8).clone(),
        "u8": bits,
        "bool": bits > 100,
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    found = checkpoint.read(checkpoint.places)
    expected = load_file(tmp_path / WEIGHTS)
    assert list(found) == sorted(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].contiguous().view(-1).view(torch.uint8).tolist() == (
            tensor.contiguous().view(-1).view(torch.uint8).tolist()
        )
    assert checkpoint.scan() == independent_fingerprint(tmp_path)


@pytest.mark.parametrize("name", ["llama", "llama_sharded", "gpt2"])
def test_checkpoint_has_every_tensor_of_every_shard(family, name):
    folder = family(name)
    shards = sorted(folder.glob("*.safetensors"))
    assert (len(shards) > 1) == (name != "llama")
    expected = {key: value for file in shards for key, value in load_file(file).items()}
    checkpoint = Checkpoint.open(folder)
    assert list(checkpoint.places) == sorted(expected)
    for key, tensor in checkpoint.read(checkpoint.places).items():
        assert tensor.dtype == expected[key].dtype
        assert torch.equal(tensor, expected[key])
    assert checkpoint.n_bytes == sum(file.stat().st_size for file in shards)


@pytest.mark.parametrize("name", ["llama", "llama_sharded"])
def test_fingerprint_is_the_sha256_of_names_types_shapes_and_digests(family, name):
    assert Checkpoint.open(family(name)).fingerprint == independent_fingerprint(family(name))


def test_fingerprint_does_not_depend_on_how_tensors_are_sharded(family, tmp_path):
    tensors = load_file(family("llama") / WEIGHTS)
    tmp_path.joinpath("config.json").write_text("{}")
    weight_map = {}
    for number, name in enumerate(reversed(sorted(tensors))):
        file = f"model-{number % 3}.safetensors"
        weight_map[name] = file
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n, at in weight_map.items() if at == file}, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert Checkpoint.open(tmp_path).fingerprint == Checkpoint.open(family("llama")).fingerprint


def test_read_tensors_have_memory_of_their_own(family):
    checkpoint = Checkpoint.open(family("llama"))
    name = next(iter(checkpoint.places))
    before = checkpoint.read([name])[name].clone()
    checkpoint.read([name])[name].zero_()
    assert torch.equal(checkpoint.read([name])[name], before)


def test_file_longer_than_the_read_buffer_is_scanned_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("sparsekit.checkpoint.checkpoint.CHUNK", 64)
    save_file({"a": torch.randn(7, 13), "b": torch.randn(100)}, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text("{}")
    assert Checkpoint.open(tmp_path).scan() == independent_fingerprint(tmp_path)


def test_untouched_source_has_no_history(family):
    assert Checkpoint.open(family("llama")).provenance().history == ()


# An incomplete folder


def test_missing_folder_is_named(tmp_path):
    with refused("no-such-model", "/nowhere", kind=DataError):
        Checkpoint.open(tmp_path / "nowhere")


def test_folder_without_config_is_refused(copy_of):
    folder = copy_of("llama")
    (folder / "config.json").unlink()
    with refused("no-config", folder, kind=DataError):
        Checkpoint.open(folder)


def test_folder_without_weights_is_refused(copy_of):
    folder = copy_of("llama")
    (folder / WEIGHTS).unlink()
    with refused("no-safetensors", folder, WEIGHTS, kind=DataError):
        Checkpoint.open(folder)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", "model.gguf"])
def test_other_weight_formats_are_refused_with_how_to_convert(copy_of, file):
    folder = copy_of("llama")
    (folder / WEIGHTS).rename(folder / file)
    with refused("no-safetensors", file, "save_pretrained", kind=DataError):
        Checkpoint.open(folder)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_file_is_refused(copy_of, keep):
    folder = copy_of("llama")
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    reason = "empty" if keep == 0 else ""
    with refused("damaged-file", folder / WEIGHTS, reason, kind=DataError):
        Checkpoint.open(folder)


def test_truncated_shard_is_named(copy_of):
    folder = copy_of("llama_sharded")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with refused("damaged-file", shard, kind=DataError):
        Checkpoint.open(folder)


def test_file_that_shrinks_after_it_was_opened_is_refused(copy_of):
    folder = copy_of("llama")
    checkpoint = Checkpoint.open(folder)
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-1000])
    with refused("damaged-file", folder / WEIGHTS, "byte", kind=DataError):
        checkpoint.scan()


@pytest.mark.parametrize("bit", range(0, 8))
def test_header_with_a_flipped_length_bit_is_refused(copy_of, bit):
    folder = copy_of("llama")
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[1] ^= 1 << bit
    (folder / WEIGHTS).write_bytes(data)
    with refused("damaged-file", folder / WEIGHTS, kind=DataError):
        Checkpoint.open(folder)


def test_any_flipped_bit_in_the_header_is_refused_or_read_within_the_file(copy_of):
    """A flip must not end in anything but a `DataError`, whatever the header then says."""
    folder = copy_of("llama")
    data = (folder / WEIGHTS).read_bytes()
    _, begin = header_of(folder / WEIGHTS)
    refused = 0
    for at in range(8, begin, 7):
        broken = bytearray(data)
        broken[at] ^= 1 << at % 8
        (folder / WEIGHTS).write_bytes(broken)
        try:
            checkpoint = Checkpoint.open(folder)
            BlockStream(checkpoint, device="cpu", dtype=torch.float32)
        except DataError:
            refused += 1
    assert refused > (begin - 8) / 7 * 0.9


def test_flipped_bit_in_the_data_of_an_output_is_seen_by_its_fingerprint(copy_of, pruned):
    folder = copy_of(pruned)
    assert Checkpoint.open(folder).scan()
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    with refused("fingerprint-mismatch", folder, "sparsekit.json", kind=DataError):
        Checkpoint.open(folder).scan()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("[]", "invalid-history"),
        ('{"history": []}', "invalid-history"),
        ('{"format": 2, "history": []}', "invalid-history"),
        ('{"format": 1, "history": 3}', "invalid-history"),
        ("{", "invalid-json"),
    ],
)
def test_broken_provenance_is_refused(copy_of, text, code):
    folder = copy_of("llama")
    (folder / "sparsekit.json").write_text(text)
    with refused(code, "sparsekit.json", kind=DataError):
        Checkpoint.open(folder).provenance()


# The index of a sharded checkpoint


def test_index_that_names_a_missing_shard_is_refused(copy_of):
    folder = copy_of("llama_sharded")
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.unlink()
    with refused("incomplete-checkpoint", INDEX, shard.name, kind=DataError):
        Checkpoint.open(folder)


def test_index_that_names_a_tensor_which_its_shard_lacks_is_refused(copy_of):
    folder = copy_of("llama_sharded")
    index = json.loads((folder / INDEX).read_text())
    first, last = min(index["weight_map"].values()), max(index["weight_map"].values())
    name = next(n for n, file in index["weight_map"].items() if file == first)
    index["weight_map"][name] = last
    (folder / INDEX).write_text(json.dumps(index))
    with refused("incomplete-checkpoint", INDEX, name, last, kind=DataError):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("text", "code", "named"),
    [
        ("{", "invalid-json", ""),
        ("[]", "invalid-index", "weight_map"),
        ("{}", "invalid-index", "weight_map"),
        ('{"weight_map": {}}', "invalid-index", "weight_map"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "invalid-index", "../b.safetensors"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "invalid-index", "/etc/passwd"),
        ('{"weight_map": {"a": 3}}', "invalid-index", "3"),
    ],
)
def test_broken_index_is_refused(copy_of, text, code, named):
    folder = copy_of("llama_sharded")
    (folder / INDEX).write_text(text)
    with refused(code, folder / INDEX, named, kind=DataError):
        Checkpoint.open(folder)


# Weights that are not numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["llama", "llama_tied", "mistral"], ids=["bfloat16", "float32", "float16"]
)
def test_weight_that_is_not_finite_is_named(copy_of, name, value):
    folder = copy_of(name)
    tensor = "model.layers.1.mlp.up_proj.weight"
    poison(folder, tensor, value)
    with refused("not-finite", folder, tensor, kind=DataError):
        Checkpoint.open(folder).scan()


def test_integers_that_would_be_nan_as_floats_are_fine(tmp_path):
    save_file({"a": torch.full((4,), -1, dtype=torch.int32)}, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text("{}")
    assert Checkpoint.open(tmp_path).scan() == independent_fingerprint(tmp_path)


# The configuration


def test_unknown_model_type_says_that_a_newer_transformers_may_know_it(copy_of):
    folder = copy_of("llama")
    edit_config(folder, model_type="llama9000")
    with refused("unsupported-model", "'llama9000'", "pip install -U transformers", kind=DataError):
        _ = Checkpoint.open(folder).config


def test_configuration_without_a_model_type_is_refused(copy_of):
    folder = copy_of("llama")
    edit_config(folder, model_type=None)
    with refused("unsupported-model", folder, "None", kind=DataError):
        _ = Checkpoint.open(folder).config


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("{", "invalid-json"),
        ("", "invalid-json"),
        ("[]", "unsupported-model"),
        ("3", "unsupported-model"),
        ('"llama"', "unsupported-model"),
    ],
)
def test_configuration_that_is_not_a_json_object_is_refused(copy_of, text, code):
    folder = copy_of("llama")
    (folder / "config.json").write_text(text)
    with refused(code, folder, kind=DataError):
        _ = Checkpoint.open(folder).config


def test_configuration_that_is_not_utf8_is_refused(copy_of):
    folder = copy_of("llama")
    (folder / "config.json").write_bytes(b'{"model_type": "\xff"}')
    with refused("invalid-json", folder / "config.json", kind=DataError):
        _ = Checkpoint.open(folder).config


def test_remote_code_is_not_run(copy_of):
    folder = copy_of("llama")
    edit_config(folder, model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    (folder / "mine.py").write_text("raise SystemExit('it was run')")
    with refused("unsupported-model", folder, "remote code", kind=DataError):
        _ = Checkpoint.open(folder).config


def test_remote_code_is_not_run_whatever_stdin_answers(start, copy_of):
    """transformers asks at a terminal, and takes a yes from any stdin."""
    folder = copy_of("llama")
    edit_config(folder, model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    (folder / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()")
    process = start("inspect", folder, stdin=subprocess.PIPE)
    stdout, stderr = process.communicate("y\ny\ny\n", timeout=120)
    assert (process.returncode, stdout) == (2, "")
    assert "remote code" in stderr
    assert stderr.endswith("[unsupported-model]\n")
    assert not (folder / "ran").exists()


def test_two_forms_of_the_weights_are_refused(copy_of):
    folder = copy_of("llama_sharded")
    shutil.copy(next(folder.glob("*.safetensors")), folder / WEIGHTS)
    with refused("ambiguous-weights", folder, WEIGHTS, INDEX, kind=DataError):
        Checkpoint.open(folder)


def test_index_of_the_single_file_is_accepted(copy_of):
    folder = copy_of("llama")
    names = dict.fromkeys(Checkpoint.open(folder).places, WEIGHTS)
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    assert len(Checkpoint.open(folder).places) == len(names)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"hidden_size": "x"}, "hidden_size"), ({"num_attention_heads": 0}, "zero")],
)
def test_configuration_that_makes_no_sense_is_reported_with_the_reason(copy_of, changes, reason):
    folder = copy_of("llama")
    edit_config(folder, **changes)
    with refused("unsupported-model", "'llama'", reason, kind=DataError):
        build_without_weights(Checkpoint.open(folder), torch.float32)


FOREIGN = {
    "no parts": [{"stage": "prune"}],
    "no entry": ["prune"],
    "no list": {},
    "another tool's stage": [entry("distil", "m", {"method": "distil"})],
    "a part too many": [pruned_entry(colour="red")],
    "a number that is a text": [pruned_entry(seconds="10")],
    "no pattern": [pruned_entry(pattern=None)],
}


@pytest.mark.parametrize("history", FOREIGN.values(), ids=FOREIGN)
def test_foreign_history_is_refused(copy_of, history):
    folder = copy_of("llama")
    (folder / "sparsekit.json").write_text(json.dumps({"format": 1, "history": history}))
    with refused("invalid-history", folder / "sparsekit.json", kind=DataError):
        Checkpoint.open(folder).provenance()


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128},
            ("(gptq)", "take the model"),
        ),
        (
            {"quant_method": "compressed-tensors", "format": "pack\nquantized"},
            ("(compressed-tensors, pack quantized)", "take the model"),
        ),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-bitmask"}},
            ("(compressed-tensors, sparse-bitmask)", "sparsekit convert"),
        ),
    ],
)
def test_quantized_checkpoint_is_refused_with_a_hint(copy_of, key, settings, named):
    folder = copy_of("llama")
    edit_config(folder, **{key: settings})
    with refused("kind-not-taken", folder, *named, kind=DataError):
        build_without_weights(Checkpoint.open(folder), torch.float32)


def test_model_that_is_not_a_causal_language_model_is_refused(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with refused("unsupported-model", "'t5'", kind=DataError):
        build_without_weights(Checkpoint.open(tmp_path / "t5"), torch.float32)


def test_weight_missing_from_the_files_is_named(copy_of):
    folder = copy_of("llama")
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with refused("unsupported-model", "model.layers.*.mlp.up_proj.weight", kind=DataError):
        BlockStream(Checkpoint.open(folder), device="cpu", dtype=torch.float32)


# The tokenizer


def test_missing_tokenizer_says_that_token_rows_need_none(family):
    with refused("no-tokenizer", "token rows", "--text", kind=DataError):
        Checkpoint.open(family("llama_tied")).tokenizer()


def test_broken_tokenizer_is_refused(copy_of):
    folder = copy_of("llama")
    (folder / "tokenizer.json").write_text("{}")
    with refused("invalid-tokenizer", folder, kind=DataError):
        Checkpoint.open(folder).tokenizer()


def test_tokenizer_next_to_the_weights_is_loaded(family):
    tokenizer = Checkpoint.open(family("llama")).tokenizer()
    text = "Any text, byte by byte: é"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
