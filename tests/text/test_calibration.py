"""Token rows: the draw, the files, the cache, the evaluation windows, text of the model itself."""

import gzip
import hashlib
import json
import logging
import math
import random
import struct
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.kind import TAKES, Kind
from sparsekit.errors import DataError, UsageError
from sparsekit.files import cache_dir
from sparsekit.text import cache_file, calibration
from sparsekit.text import self_text as selftext
from sparsekit.text import sources as texts
from sparsekit.text.calibration import Calibration, evaluation_rows

BOS, EOS, VOCABULARY = 0, 1, 258


class Folder:
    """What calibration needs of a checkpoint, and a count of the times its tokenizer was loaded."""

    def __init__(self, path: Path, config) -> None:
        self.path = path
        self.config = config
        self.fingerprint = "weights-1"
        self.kind, self.grid = Kind.PLAIN, None
        self.loads = 0

    def require(self, verb: str) -> None:
        assert TAKES[verb][self.kind] == ""

    @property
    def places(self):
        return Checkpoint.open(self.path).places

    def tokenizer(self):
        from transformers import AutoTokenizer

        self.loads += 1
        if not (self.path / "tokenizer.json").is_file():
            raise DataError(f"{self.path} has no tokenizer")
        return AutoTokenizer.from_pretrained(self.path)


class Recorder:
    def __init__(self) -> None:
        self.events = []

    def begin(self, title, total, done=0):
        self.events.append(("begin", total))

    def step(self, label):
        self.events.append(("step", label))

    def note(self, text):
        self.events.append(("note", text))

    def end(self):
        self.events.append(("end",))


def save_tokenizer(path: Path, bos: bool = True) -> None:
    """One token per byte, BOS in front: the length of an ASCII text is its characters plus one."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": BOS, "</s>": EOS} | {letter: i + 2 for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    names = {"bos_token": "<s>", "eos_token": "</s>"} if bos else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(path)


def tiny_config(**changes):
    from transformers import LlamaConfig

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaConfig(**{**sizes, **changes})


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A working directory with the cache inside, away from the user's own."""
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "cache"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


@pytest.fixture
def checkpoint(tmp_path, home):
    folder = tmp_path / "model"
    save_tokenizer(folder)
    return Folder(folder, tiny_config())


@pytest.fixture
def local_datasets(home, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home.parent / "datasets")


def words(seed: int, count: int) -> str:
    return "".join(random.Random(seed).choices("abcdefgh ", k=count))


def documents_of(*lengths: int) -> list[str]:
    return [words(i, n) for i, n in enumerate(lengths)]


def json_lines(documents: list[str]) -> str:
    return "".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in documents)


def cached_files() -> list[Path]:
    return sorted((cache_dir() / "tokens").glob("*"))


def ids_of(checkpoint, text: str) -> list[int]:
    return checkpoint.tokenizer()(text)["input_ids"]


def wanda_draw(documents, checkpoint, samples, length, seed):
    """lib/data.py of Wanda, with its calls of the global generator, written out on its own."""
    tokenizer = checkpoint.tokenizer()
    random.seed(seed)
    rows = []
    for _ in range(samples):
        while True:
            i = random.randint(0, len(documents) - 1)
            encoded = tokenizer(documents[i], return_tensors="pt")
            if encoded.input_ids.shape[1] > length:
                break
        i = random.randint(0, encoded.input_ids.shape[1] - length - 1)
        rows.append(encoded.input_ids[:, i : i + length])
    return torch.cat(rows)


# --- the draw ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 7])
def test_documents_are_drawn_as_the_reference_draws_them(home, checkpoint, seed):
    documents = documents_of(10, 80, 19, 31, 5, 200, 20)
    Path("docs.jsonl").write_text(json_lines(documents))
    drawn = Calibration(source="docs.jsonl", samples=25, length=20, seed=seed).rows(checkpoint)
    assert drawn.tokens.dtype == torch.int64
    assert torch.equal(drawn.tokens, wanda_draw(documents, checkpoint, 25, 20, seed))


def test_a_document_as_long_as_a_window_is_rejected_and_one_token_more_is_taken(home, checkpoint):
    # 20 and 21 tokens with BOS; the second has exactly one start.
    Path("docs.jsonl").write_text(json_lines(["a" * 19, "b" * 20]))
    tokens = Calibration(source="docs.jsonl", samples=6, length=20).rows(checkpoint).tokens
    expected = ids_of(checkpoint, "b" * 20)[:20]
    assert tokens.tolist() == [expected] * 6


def test_all_kinds_of_document_files_give_the_same_rows(home, checkpoint):
    import pyarrow
    from pyarrow import parquet

    documents = documents_of(30, 40, 90, 60)
    Path("a.jsonl").write_text(json_lines(documents) + "\n")
    Path("b.json.gz").write_bytes(gzip.compress(json_lines(documents).encode()))
    parquet.write_table(pyarrow.table({"id": [1, 2, 3, 4], "text": documents}), "c.parquet")
    drawn = [
        Calibration(source=name, samples=5, length=24).rows(checkpoint)
        for name in ("a.jsonl", "b.json.gz", "c.parquet")
    ]
    assert torch.equal(drawn[0].tokens, wanda_draw(documents, checkpoint, 5, 24, 0))
    assert len({rows.fingerprint for rows in drawn}) == 1
    assert [rows.source for rows in drawn] == ["a.jsonl", "b.json.gz", "c.parquet"]


@pytest.mark.parametrize("name", ["t.txt", "t.raw", "t.md", "T.TXT"])
def test_windows_of_running_text_start_uniformly_in_one_tokenised_text(home, checkpoint, name):
    text = words(3, 300) + "\r\n\n" + words(4, 300)
    Path(name).write_bytes(text.encode())
    tokens = Calibration(source=name, samples=9, length=16, seed=5).rows(checkpoint).tokens
    ids = ids_of(checkpoint, text)
    assert len(ids) == 604  # nothing was normalised away
    random.seed(5)
    starts = [random.randint(0, len(ids) - 16 - 1) for _ in range(9)]
    assert tokens.tolist() == [ids[start : start + 16] for start in starts]


def test_the_seed_decides_the_rows_and_the_global_generators_are_left_alone(home, checkpoint):
    Path("t.txt").write_text(words(1, 500))
    random.seed(11)
    before = random.getstate(), torch.get_rng_state()
    drawn = [
        Calibration(source="t.txt", samples=4, length=16, seed=seed).rows(checkpoint)
        for seed in (0, 1)
    ]
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert drawn[0].fingerprint != drawn[1].fingerprint


def test_documents_that_are_all_too_short_end_in_an_error_that_names_the_longest(home, checkpoint):
    Path("docs.jsonl").write_text(json_lines(documents_of(10, 29, 15)))
    named = ("docs.jsonl", "3 documents", "30 tokens", "--length 29")
    with refused("text-too-short", *named, kind=DataError):
        Calibration(source="docs.jsonl", samples=2, length=30).rows(checkpoint)
    # The hint is true.
    assert len(Calibration(source="docs.jsonl", samples=2, length=29).rows(checkpoint).tokens) == 2


def test_running_text_that_is_too_short_says_how_long_it_is(home, checkpoint):
    Path("t.txt").write_text("a" * 29)
    with refused("text-too-short", "t.txt", "30 tokens", "--length 29", kind=DataError):
        Calibration(source="t.txt", samples=2, length=30).rows(checkpoint)
    Path("t.txt").write_text(" ")
    with refused("text-too-short", "t.txt", kind=DataError):
        Calibration(source="t.txt", samples=2, length=30).rows(checkpoint)


def test_a_text_longer_than_the_models_maximum_brings_no_warning(home, checkpoint, caplog):
    file = checkpoint.path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 8}))
    Path("t.txt").write_text(words(1, 100))
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        Calibration(source="t.txt", samples=3, length=8).rows(checkpoint)
    finally:
        logger.removeHandler(caplog.handler)
    assert checkpoint.tokenizer().model_max_length == 8
    assert caplog.messages == []


def test_progress_counts_the_rows(home, checkpoint):
    Path("t.txt").write_text(words(1, 100))
    progress = Recorder()
    Calibration(source="t.txt", samples=3, length=8).rows(checkpoint, progress)
    steps = [("step", "row 1"), ("step", "row 2"), ("step", "row 3")]
    assert progress.events == [("begin", 3), *steps, ("end",)]


# --- numbers of rows and tokens ---------------------------------------------------------------


def test_defaults_are_128_rows_of_2048_builtin_tokens(checkpoint):
    drawn = Calibration().rows(checkpoint)
    assert drawn.tokens.shape == (128, 2048)
    assert drawn.source == "builtin"
    assert drawn.notes == ()


@pytest.mark.parametrize("asked", [None, 65])
def test_length_is_capped_at_the_models_maximum_with_a_note(checkpoint, asked):
    from transformers import GPT2Config

    checkpoint.config = GPT2Config(vocab_size=VOCABULARY, n_positions=64)
    drawn = Calibration(samples=2, length=asked).rows(checkpoint)
    scored = evaluation_rows("builtin", checkpoint, length=asked, limit=2)
    for rows in (drawn, scored):
        assert rows.tokens.shape == (2, 64)
        assert rows.notes == ("length capped at 64: the model's maximum",)
    assert Calibration(samples=2, length=64).rows(checkpoint).notes == ()


def test_a_model_without_a_maximum_has_no_cap(checkpoint):
    from transformers import PretrainedConfig

    checkpoint.config = PretrainedConfig(vocab_size=VOCABULARY)
    drawn = Calibration(samples=2, length=5000).rows(checkpoint)
    assert drawn.tokens.shape == (2, 5000)
    assert drawn.notes == ()


def test_fingerprint_covers_shape_and_ids(home, checkpoint):
    values = [[5, 6, 7, 8], [1, 2, 3, 200]]
    save_file({"x": torch.tensor(values, dtype=torch.int32)}, "a.safetensors")
    save_file({"y": torch.tensor(values).view(4, 2)}, "b.safetensors")
    first = Calibration(source="a.safetensors").rows(checkpoint)
    other = Calibration(source="b.safetensors").rows(checkpoint)
    expected = hashlib.sha256(struct.pack("<10q", 2, 4, 5, 6, 7, 8, 1, 2, 3, 200)).hexdigest()
    assert first.fingerprint == expected
    assert other.fingerprint != expected


def test_a_tokenizer_made_for_another_model_is_refused(home, checkpoint):
    Path("t.txt").write_text("é" * 50)
    checkpoint.config = tiny_config(vocab_size=100)
    with refused("token-out-of-range", "t.txt", "100", kind=DataError):
        Calibration(source="t.txt", samples=1, length=10).rows(checkpoint)


# --- what check() refuses ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "code", "named"),
    [
        ("wikitext", "unknown-source", "did you mean 'wikitext2'"),
        ("missing.txt", "no-such-file", "builtin, self, c4, wikitext2"),
        ("sub/c4", "no-such-file", ""),
        ("folder", "no-such-file", "is a folder"),
        ("table.csv", "unknown-file-type", ".txt"),
        ("list.json", "unknown-file-type", ".json.gz"),
        ("empty.jsonl", "empty-file", ""),
    ],
)
def test_sources_that_cannot_be_used_are_refused_at_once(home, source, code, named):
    Path("folder").mkdir()
    Path("table.csv").write_text("text\n")
    Path("list.json").write_text("[]")
    Path("empty.jsonl").touch()
    with refused(code, source, named):
        Calibration(source=source).check()
    with refused(code, source, named):
        evaluation_rows(source, None)


@pytest.mark.parametrize(
    ("numbers", "named"),
    [
        ({"samples": 0}, ("samples is 0", "at least 1")),
        ({"length": 1}, ("length is 1", "at least 2")),
        ({"seed": -1}, ("seed is -1", "at least 0")),
    ],
)
def test_numbers_out_of_range_are_refused_at_once(numbers, named):
    with refused("out-of-range", *named, kind=UsageError):
        Calibration(**numbers).check()
    with refused("out-of-range", *named, kind=UsageError):
        Calibration(**numbers).rows(None)


@pytest.mark.parametrize("source", texts.SOURCES)
def test_named_sources_pass_the_check(source):
    Calibration(source=source, samples=1, length=2).check()


# --- broken files -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "code", "place"),
    [
        (b'{"text": "a"', "invalid-json", "line 3"),
        (b'{"txt": "a"}', "no-text-field", "line 3"),
        (b'{"text": 5}', "no-text-field", "line 3"),
        (b'["text"]', "no-text-field", "line 3"),
        (b'{"text": "\xff"}', "not-utf8", "byte 27"),
    ],
)
@pytest.mark.parametrize("name", ["docs.jsonl", "docs.json.gz"])
def test_a_broken_line_is_named(home, checkpoint, name, line, code, place):
    data = b'{"text": "abc"}\n\n' + line + b"\n"
    Path(name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with refused(code, place, kind=DataError) as caught:
        Calibration(source=name, samples=1, length=2).rows(checkpoint)
    assert caught.value.message.startswith(name)


def test_text_that_is_not_utf8_is_named_with_the_byte(home, checkpoint):
    Path("t.txt").write_bytes(b"abc\xe9def")
    with refused("not-utf8", "t.txt", "byte 3", kind=DataError):
        Calibration(source="t.txt", samples=1, length=2).rows(checkpoint)


@pytest.mark.parametrize("cut", [slice(0, -12), slice(3, None)])
def test_a_damaged_gzip_file_is_named(home, checkpoint, cut):
    data = gzip.compress(json_lines(documents_of(500, 500)).encode())
    Path("docs.json.gz").write_bytes(data[cut])
    with refused("damaged-file", "docs.json.gz", kind=DataError):
        Calibration(source="docs.json.gz", samples=1, length=2).rows(checkpoint)


def test_a_file_of_blank_lines_holds_no_documents(home, checkpoint):
    Path("docs.jsonl").write_text("\n \n")
    with refused("no-documents", "docs.jsonl", kind=DataError):
        Calibration(source="docs.jsonl", samples=1, length=2).rows(checkpoint)


def test_broken_parquet_files_are_named(home, checkpoint):
    import pyarrow
    from pyarrow import parquet

    Path("bad.parquet").write_bytes(b"PAR1 no table PAR1")
    parquet.write_table(pyarrow.table({"content": ["a"]}), "other.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", None]}), "null.parquet")
    parquet.write_table(pyarrow.table({"text": [1, 2]}), "number.parquet")
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], "string")}), "none.parquet")
    expected = {
        "bad": ("damaged-file", ""),
        "other": ("no-text-field", "content"),
        "null": ("no-text-field", "row 1"),
        "number": ("no-text-field", "row 0"),
        "none": ("no-documents", ""),
    }
    for name, (code, named) in expected.items():
        with refused(code, named, kind=DataError) as caught:
            Calibration(source=f"{name}.parquet", samples=1, length=2).rows(checkpoint)
        assert caught.value.message.startswith(f"{name}.parquet")


# --- row files --------------------------------------------------------------------------------


def test_a_row_file_is_used_as_it_is_without_tokenizer_or_cache(home, checkpoint):
    rows = torch.arange(60, dtype=torch.int32).view(6, 10)
    save_file({"anything": rows}, "rows.safetensors")
    whole = Calibration(source="rows.safetensors").rows(checkpoint)
    part = Calibration(source="rows.safetensors", samples=2, length=4).rows(checkpoint)
    assert torch.equal(whole.tokens, rows.long())
    assert whole.tokens.dtype == torch.int64
    assert torch.equal(part.tokens, rows[:2, :4].long())
    assert part.notes == ()
    assert checkpoint.loads == 0
    assert cached_files() == []


def test_a_row_file_longer_than_the_model_is_capped_with_a_note(home, checkpoint):
    save_file({"rows": torch.arange(60).view(6, 10)}, "rows.safetensors")
    checkpoint.config = tiny_config(max_position_embeddings=8)
    drawn = Calibration(source="rows.safetensors").rows(checkpoint)
    assert drawn.tokens.shape == (6, 8)
    assert drawn.notes == ("length capped at 8: the model's maximum",)


@pytest.mark.parametrize(
    ("numbers", "code", "named"),
    [
        ({"samples": 7}, "too-few-rows", ("6 rows", " 7 ", "--samples 6")),
        ({"length": 11}, "rows-too-short", ("10 tokens", " 11 ", "--length 10")),
    ],
)
def test_more_than_a_row_file_holds_is_refused(home, checkpoint, numbers, code, named):
    save_file({"rows": torch.arange(60).view(6, 10)}, "rows.safetensors")
    with refused(code, "rows.safetensors", *named, kind=DataError):
        Calibration(source="rows.safetensors", **numbers).rows(checkpoint)


@pytest.mark.parametrize("value", [-1, VOCABULARY])
def test_a_token_outside_the_vocabulary_is_named_with_its_place(home, checkpoint, value):
    rows = torch.zeros(3, 5, dtype=torch.int64)
    rows[1, 4] = value
    save_file({"rows": rows}, "rows.safetensors")
    for read in (
        lambda: Calibration(source="rows.safetensors").rows(checkpoint),
        lambda: evaluation_rows("rows.safetensors", checkpoint, length=None, limit=None),
    ):
        place = ("rows.safetensors", "row 1, column 4", f"token {value},", "258")
        with refused("token-out-of-range", *place, kind=DataError):
            read()
    rows[1, 4] = VOCABULARY - 1
    save_file({"rows": rows}, "rows.safetensors")
    assert len(Calibration(source="rows.safetensors").rows(checkpoint).tokens) == 3


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"a": torch.zeros(2, 3)}, "F32 of shape [2, 3]"),
        ({"a": torch.zeros(2, 3, dtype=torch.bool)}, "BOOL"),
        ({"a": torch.zeros(6, dtype=torch.int64)}, "shape [6]"),
        ({"a": torch.zeros(0, 6, dtype=torch.int64)}, "shape [0, 6]"),
        ({"a": torch.zeros(6, 1, dtype=torch.int64)}, "shape [6, 1]"),
        ({"a": torch.zeros(2, 2).long(), "b": torch.zeros(2, 2).long()}, "2 tensors"),
    ],
)
def test_other_safetensors_files_are_refused(home, checkpoint, tensors, named):
    save_file(tensors, "rows.safetensors")
    with refused("not-a-row-file", "rows.safetensors", named, kind=DataError):
        Calibration(source="rows.safetensors").rows(checkpoint)


def test_a_corrupt_row_file_is_refused(home, checkpoint):
    Path("rows.safetensors").write_bytes(b"not tensors at all")
    with refused("damaged-file", "rows.safetensors", kind=DataError):
        Calibration(source="rows.safetensors").rows(checkpoint)


# --- the cache --------------------------------------------------------------------------------


def test_a_second_run_takes_the_rows_from_the_cache_without_tokenising(home, checkpoint):
    Path("t.txt").write_text(words(1, 300))
    wanted = Calibration(source="t.txt", samples=4, length=16)
    first = wanted.rows(checkpoint)
    assert checkpoint.loads == 1
    progress = Recorder()
    second = wanted.rows(checkpoint, progress)
    assert checkpoint.loads == 1
    assert progress.events == []
    assert torch.equal(first.tokens, second.tokens)
    assert first.fingerprint == second.fingerprint
    assert len(cached_files()) == 1


def test_everything_that_decides_the_rows_is_in_the_cache_key(home, checkpoint):
    Path("t.txt").write_text(words(1, 300))
    base = {"source": "t.txt", "samples": 4, "length": 16, "seed": 0}
    for change in ({}, {"samples": 5}, {"length": 17}, {"seed": 1}, {"source": "builtin"}):
        Calibration(**{**base, **change}).rows(checkpoint)
    assert len(cached_files()) == 5
    Path("t.txt").write_text(words(2, 300))
    Calibration(**base).rows(checkpoint)
    assert len(cached_files()) == 6
    with (checkpoint.path / "tokenizer_config.json").open("a") as file:
        file.write("\n")
    Calibration(**base).rows(checkpoint)
    assert len(cached_files()) == 7
    # The same bytes are another source as documents than as running text.
    Path("t.txt").write_text(json_lines(documents_of(50, 60)))
    Path("t.jsonl").write_text(json_lines(documents_of(50, 60)))
    text = Calibration(**base).rows(checkpoint)
    documents = Calibration(**{**base, "source": "t.jsonl"}).rows(checkpoint)
    assert text.fingerprint != documents.fingerprint


def test_a_renamed_file_is_the_same_source(home, checkpoint):
    Path("t.txt").write_text(words(1, 300))
    Calibration(source="t.txt", samples=4, length=16).rows(checkpoint)
    Path("t.txt").rename("u.txt")
    assert Calibration(source="u.txt", samples=4, length=16).rows(checkpoint).source == "u.txt"
    assert checkpoint.loads == 1


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-8] ^= 1  # still a token id of the vocabulary
    path.write_bytes(data)


def replace_by_other_tensor(path: Path) -> None:
    save_file({"other": torch.zeros(4, 16).long()}, path)


def drop_fingerprint(path: Path) -> None:
    save_file({"tokens": torch.zeros(4, 16).long()}, path)


@pytest.mark.parametrize(
    "damage", [truncate, flip_last_byte, replace_by_other_tensor, drop_fingerprint]
)
def test_a_damaged_cache_file_is_rebuilt(home, checkpoint, damage):
    Path("t.txt").write_text(words(1, 300))
    wanted = Calibration(source="t.txt", samples=4, length=16)
    first = wanted.rows(checkpoint)
    (file,) = cached_files()
    damage(file)
    assert cache_file.read_or_remove(file) is None
    assert not file.exists()
    file.write_bytes(b"damaged once more")
    again = wanted.rows(checkpoint)
    assert checkpoint.loads == 2
    assert torch.equal(first.tokens, again.tokens)
    assert cached_files() == [file]
    assert torch.equal(load_file(file)["tokens"], first.tokens)


# --- built-in text ----------------------------------------------------------------------------


def test_builtin_evaluation_never_sees_calibration_text():
    calibrated = calibration.calibration_texts("builtin")[0]
    evaluated = calibration.evaluation_text("builtin")
    for i, name in enumerate(sorted(topics)):
        assert (topics[name] in evaluated) == (i % 5 == 4)
        assert (topics[name] in calibrated) == (i % 5 != 4)


# --- hub data sets, in a local folder of the same layout ------------------------------------------


def test_c4_is_drawn_from_the_documents_of_its_first_training_file(
    home, checkpoint, local_datasets
):
    documents = documents_of(10, 80, 19, 31, 5, 200)
    shard = Path("allenai/c4/en/c4-train.00000-of-01024.json.gz")
    shard.parent.mkdir(parents=True)
    shard.write_bytes(gzip.compress(json_lines(documents).encode()))
    other = shard.with_name("c4-train.00001-of-01024.json.gz")
    other.write_bytes(gzip.compress(json_lines(["z" * 500] * 20).encode()))
    drawn = Calibration(source="c4", samples=8, length=20).rows(checkpoint)
    assert torch.equal(drawn.tokens, wanda_draw(documents, checkpoint, 8, 20, 0))


def test_c4_is_evaluated_on_1100_documents_and_256_windows(home, checkpoint, local_datasets):
    shard = Path("allenai/c4/en/c4-validation.00000-of-00008.json.gz")
    shard.parent.mkdir(parents=True)
    documents = [*documents_of(*[4] * 1100), "z" * 1000]
    shard.write_bytes(gzip.compress(json_lines(documents).encode()))
    ids = ids_of(checkpoint, " ".join(documents[:1100]))
    assert len(ids) == 5500
    long = evaluation_rows("c4", checkpoint, length=50, limit=None)
    assert long.tokens.tolist() == [ids[i : i + 50] for i in range(0, 5500, 50)]
    short = evaluation_rows("c4", checkpoint, length=10, limit=None)
    assert short.tokens.shape == (256, 10)
    assert short.tokens.flatten().tolist() == ids[:2560]


def write_wikitext(lines: dict[str, list[str]]) -> None:
    import pyarrow
    from pyarrow import parquet

    folder = Path("Salesforce/wikitext/wikitext-2-raw-v1")
    folder.mkdir(parents=True)
    for split, rows in lines.items():
        parquet.write_table(
            pyarrow.table({"text": rows}), folder / f"{split}-00000-of-00001.parquet"
        )
    # The real card names several configurations; it must not make the choice ambiguous.
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n"
        for name in ("wikitext-103-raw-v1", "wikitext-2-raw-v1")
    )
    (folder.parent / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")


def test_wikitext2_joins_train_lines_by_spaces_and_test_lines_by_empty_lines(
    home, checkpoint, local_datasets
):
    train, test = documents_of(60, 0, 70), [words(8, 40), "", words(9, 25)]
    write_wikitext({"train": train, "test": test, "validation": ["z" * 300]})
    drawn = Calibration(source="wikitext2", samples=40, length=12, seed=2).rows(checkpoint).tokens
    ids = ids_of(checkpoint, f"{train[0]}  {train[2]}")
    random.seed(2)
    starts = [random.randint(0, len(ids) - 12 - 1) for _ in range(40)]
    assert drawn.tolist() == [ids[start : start + 12] for start in starts]
    scored = evaluation_rows("wikitext2", checkpoint, length=10, limit=None).tokens
    assert scored.flatten().tolist() == ids_of(checkpoint, f"{test[0]}\n\n\n\n{test[2]}")[:70]


def test_files_that_a_data_set_does_not_have_are_named(home, local_datasets):
    Path("data").mkdir()
    Path("data/other.json.gz").write_bytes(gzip.compress(b"{}"))
    with refused("cannot-read", "en/train.json.gz", "./data", kind=DataError):
        texts.hub_texts("./data", "en/train.json.gz")


@pytest.mark.parametrize("source", ["c4", "wikitext2"])
def test_without_the_hub_the_error_offers_the_builtin_text(
    home, checkpoint, local_datasets, monkeypatch, source
):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home.parent / "hub"))
    with refused("hub-unavailable", kind=DataError) as caught:
        Calibration(source=source).rows(checkpoint)
    assert "builtin" in caught.value.hint


# --- evaluation -------------------------------------------------------------------------------


def test_evaluation_cuts_a_text_without_overlap_and_drops_the_tail(home, checkpoint):
    text = words(1, 95)
    Path("t.txt").write_text(text)
    scored = evaluation_rows("t.txt", checkpoint, length=10, limit=None)
    ids = ids_of(checkpoint, text)
    assert len(ids) == 96
    assert ids.count(BOS) == 1
    assert scored.tokens.tolist() == [ids[i : i + 10] for i in range(0, 90, 10)]
    assert scored.source == "t.txt"


def test_evaluation_joins_documents_by_an_empty_line(home, checkpoint):
    Path("docs.jsonl").write_text(json_lines(["abc", "def"]))
    scored = evaluation_rows("docs.jsonl", checkpoint, length=9, limit=None)
    assert scored.tokens.tolist() == [ids_of(checkpoint, "abc\n\ndef")]


def test_a_limit_takes_evenly_spaced_windows(home, checkpoint):
    rows = torch.arange(7)[:, None].repeat(1, 3)
    save_file({"rows": rows}, "rows.safetensors")
    taken = {
        limit: evaluation_rows("rows.safetensors", checkpoint, length=None, limit=limit).tokens
        for limit in (1, 3, 7, 9, None)
    }
    assert taken[1][:, 0].tolist() == [0]
    assert taken[3][:, 0].tolist() == [0, 2, 4]
    assert all(torch.equal(taken[limit], rows) for limit in (7, 9, None))
    Path("t.txt").write_text("".join(letter * 4 for letter in "abcdefg"))
    whole = evaluation_rows("t.txt", checkpoint, length=4, limit=None).tokens
    two = evaluation_rows("t.txt", checkpoint, length=4, limit=2).tokens
    assert len(whole) == 7
    assert torch.equal(two, whole[[0, 3]])


def test_evaluation_of_a_row_file_needs_no_tokenizer_and_can_be_cut(home, checkpoint):
    save_file({"rows": torch.arange(60).view(6, 10)}, "rows.safetensors")
    scored = evaluation_rows("rows.safetensors", checkpoint, length=4, limit=None)
    assert torch.equal(scored.tokens, torch.arange(60).view(6, 10)[:, :4])
    assert checkpoint.loads == 0


def test_evaluation_text_shorter_than_a_window_is_refused(home, checkpoint):
    Path("t.txt").write_text("a" * 9)
    assert evaluation_rows("t.txt", checkpoint, length=10, limit=None).tokens.shape == (1, 10)
    with refused("text-too-short", "t.txt", "10 tokens", "11", kind=DataError):
        evaluation_rows("t.txt", checkpoint, length=11, limit=None)


def test_evaluation_on_the_models_own_text_and_bad_numbers_are_refused(checkpoint):
    with refused("unsuitable-source", "builtin", kind=UsageError):
        evaluation_rows("self", checkpoint, length=None, limit=None)
    with refused("out-of-range", "limit is 0", kind=UsageError):
        evaluation_rows("builtin", checkpoint, length=None, limit=0)
    with refused("out-of-range", "length is 1", kind=UsageError):
        evaluation_rows("builtin", checkpoint, length=1, limit=None)


# --- text of the model itself -----------------------------------------------------------------


@pytest.fixture
def model_folder(checkpoint):
    """A tiny random Llama whose own settings would stop at EOS and draw greedily."""
    from transformers import GenerationConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(checkpoint.config)
    model.generation_config = GenerationConfig(
        eos_token_id=list(range(1, VOCABULARY)), do_sample=True, top_k=1, max_length=5
    )
    model.save_pretrained(checkpoint.path)
    return checkpoint


def test_self_rows_are_full_length_seeded_and_open_with_bos(model_folder):
    before = torch.get_rng_state()
    drawn = [
        Calibration(source="self", samples=10, length=24, seed=seed).rows(model_folder)
        for seed in (0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(rows.tokens.shape == (10, 24) for rows in drawn)
    assert all((rows.tokens[:, 0] == BOS).all() for rows in drawn)
    assert drawn[0].fingerprint != drawn[1].fingerprint
    again = selftext.sample_rows(model_folder, 10, 24, 0)
    assert torch.equal(drawn[0].tokens, again)


def test_interrupted_sampling_resumes_with_the_same_rows(model_folder, tmp_path):
    class Stops(Recorder):
        def step(self, label):
            if label.startswith("16 of"):
                raise KeyboardInterrupt

    wanted, kept = selftext.sample_rows(model_folder, 20, 9, 0), tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        selftext.sample_rows(model_folder, 20, 9, 0, Stops(), kept=kept)
    again = Recorder()
    rows = selftext.sample_rows(model_folder, 20, 9, 0, again, kept=kept)
    assert again.events[1:] == [("step", "20 of 20 rows"), ("end",)]
    assert torch.equal(rows, wanted)


def test_damaged_rows_of_an_interrupted_sampling_are_drawn_again(model_folder, tmp_path):
    wanted, kept = selftext.sample_rows(model_folder, 10, 9, 0), tmp_path / "kept"
    selftext.sample_rows(model_folder, 8, 9, 0, kept=kept)
    whole = kept.read_bytes()
    for damaged in (whole[:-8] + b"12345678", whole[:-8], b"nothing"):
        kept.write_bytes(damaged)
        assert torch.equal(selftext.sample_rows(model_folder, 10, 9, 0, kept=kept), wanted)


def test_nothing_of_an_interrupted_sampling_stays_beside_the_rows(model_folder):
    Calibration(source="self", samples=2, length=6).rows(model_folder)
    folder = cache_dir() / "tokens"
    assert [path.suffix for path in folder.iterdir()] == [".safetensors"]


def test_self_draws_from_the_whole_distribution_of_the_model(model_folder):
    """A model that gives 1/2 to EOS and the rest to all others alike must show just that."""
    from transformers import GenerationConfig, LlamaForCausalLM

    model = LlamaForCausalLM(model_folder.config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.5, top_k=1, top_p=0.7)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        model.model.norm.weight.fill_(1.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        # Nearly alike only, since a top-k filter keeps all that tie with the last one kept.
        rest = torch.linspace(1.0, 1.01, VOCABULARY)
        rest[EOS] = 0
        logits = (0.5 * rest / rest.sum()).log()
        logits[EOS] = math.log(0.5)
        model.lm_head.weight.copy_(logits[:, None] / 16)
    model.save_pretrained(model_folder.path)
    drawn = selftext.sample_rows(model_folder, 16, 129, 0)[:, 1:]
    share = (drawn == EOS).double().mean().item()
    assert share == pytest.approx(0.5, abs=0.045)  # 2048 draws: four standard deviations
    assert len(drawn.unique()) > 200


def test_self_rows_are_cached_by_weights_and_config(model_folder):
    wanted = Calibration(source="self", samples=2, length=6)
    progress = Recorder()
    first = wanted.rows(model_folder, progress)
    assert progress.events == [("begin", 1), ("step", "2 of 2 rows"), ("end",)]
    again = wanted.rows(model_folder, progress)
    assert len(progress.events) == 3
    assert torch.equal(first.tokens, again.tokens)
    model_folder.fingerprint = "weights-2"
    wanted.rows(model_folder, progress)
    assert len(progress.events) == 6
    model_folder.config = tiny_config(rms_norm_eps=0.5)
    wanted.rows(model_folder, progress)
    assert len(progress.events) == 9


@pytest.mark.parametrize(
    ("tokenizer", "ids", "expected"),
    [
        (True, {"bos_token_id": 9}, BOS),
        (False, {"bos_token_id": 9, "eos_token_id": 8}, 9),
        (False, {"eos_token_id": [7, 8]}, 7),
        (False, {"bos_token_id": VOCABULARY, "eos_token_id": 8}, 8),
        (False, {}, None),
    ],
)
def test_the_first_token_is_bos_else_eos_else_none(checkpoint, tokenizer, ids, expected):
    if not tokenizer:
        save_tokenizer(checkpoint.path, bos=False)
    checkpoint.config = tiny_config(**ids)
    assert selftext.start_token(checkpoint) == expected


def test_sampling_from_a_model_larger_than_the_memory_is_refused(model_folder, monkeypatch):
    monkeypatch.setattr("sparsekit.model.full_model.available_memory", lambda: 1000)
    with refused("not-enough-memory", "'self'", "builtin", kind=DataError):
        selftext.sample_rows(model_folder, 2, 8, 0)


def test_without_bos_eos_and_tokenizer_the_first_tokens_are_random_ids(model_folder):
    for file in model_folder.path.glob("tokenizer*"):
        file.unlink()
    drawn = selftext.sample_rows(model_folder, 12, 3, 0)
    assert len(drawn[:, 0].unique()) > 3
    assert torch.equal(drawn, selftext.sample_rows(model_folder, 12, 3, 0))
    assert not torch.equal(drawn[:, 0], selftext.sample_rows(model_folder, 12, 3, 1)[:, 0])
