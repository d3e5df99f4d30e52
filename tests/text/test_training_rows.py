"""Rows to train on: every token once an epoch, in an order of its own, tokenised once."""

import gzip
import json
import os

import pytest
import torch
from refusals import refused
from safetensors.torch import save_file

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.errors import DataError, UsageError
from sparsekit.text import rows as rowfiles
from sparsekit.text import sources as texts
from sparsekit.text import training_rows as corpus
from sparsekit.text.training_rows import Corpus


@pytest.fixture
def llama(family):
    return Checkpoint.open(family("llama"))


@pytest.fixture
def documents(tmp_path):
    found = [f"document {n} " + "x" * n for n in range(200)]
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in found))
    return path, found


def stream_of(rows):
    return torch.as_tensor(rows.stream[: rows.count])


def test_stream_is_the_documents_each_closed_by_the_end_of_text_token(llama, documents):
    path, found = documents
    rows = Corpus(source=str(path), length=64).rows(llama, llama)
    tokenizer = llama.tokenizer()
    wanted = [i for text in found for i in [*tokenizer(text)["input_ids"], 257]]
    assert stream_of(rows).tolist() == wanted


def test_an_epoch_has_every_row_once_and_the_next_another_order(llama, documents):
    rows = Corpus(source=str(documents[0]), length=64).rows(llama, llama)
    stream = stream_of(rows)
    cut = stream[: len(rows) * 64].view(-1, 64).long()
    first, second = rows.take(0, len(rows)), rows.take(len(rows), len(rows))
    assert sorted(first.tolist()) == sorted(cut.tolist()) == sorted(second.tolist())
    assert not torch.equal(first, cut)
    assert not torch.equal(first, second)


def test_rows_do_not_depend_on_how_many_are_taken_at_once(llama, documents):
    rows = Corpus(source=str(documents[0]), length=64, seed=3).rows(llama, llama)
    singly = torch.cat([rows.take(i, 1) for i in range(7)])
    assert torch.equal(rows.take(0, 7), singly)


def test_numbers_say_which_rows_of_the_stream_are_taken(llama, documents):
    rows = Corpus(source=str(documents[0]), length=64).rows(llama, llama)
    cut = stream_of(rows)[: len(rows) * 64].view(-1, 64).long()
    last = len(rows) - 3  # into the next epoch
    assert torch.equal(cut[rows.numbers(last, 6)], rows.take(last, 6))


def test_seeds_give_other_orders(llama, documents):
    both = [Corpus(source=str(documents[0]), length=64, seed=s).rows(llama, llama) for s in (0, 1)]
    assert both[0].fingerprint == both[1].fingerprint
    assert not torch.equal(both[0].take(0, 9), both[1].take(0, 9))


def test_text_is_tokenised_once(llama, documents, monkeypatch):
    first = Corpus(source=str(documents[0]), length=64).rows(llama, llama)
    monkeypatch.setattr(corpus, "token_ids", None)
    again = Corpus(source=str(documents[0]), length=32).rows(llama, llama)
    assert again.fingerprint == first.fingerprint


def test_no_more_tokens_are_read_than_asked_for(llama, documents):
    rows = Corpus(source=str(documents[0]), length=16, tokens=100).rows(llama, llama)
    assert rows.count == 100
    assert len(rows) == 6


def test_more_tokens_of_a_text_are_added_to_those_that_are_there(llama, documents, monkeypatch):
    """Also those of a document that the first limit was in, and again less than is there."""
    path, found = documents
    whole = Corpus(source=str(path), length=16).rows(llama, llama)
    monkeypatch.setenv("SPARSEKIT_CACHE", str(path.parent / "own"))
    skipped, ids = [], corpus.token_ids

    def spy(source, checkpoint, count):
        skipped.append(count)
        return ids(source, checkpoint, count)

    monkeypatch.setattr(corpus, "token_ids", spy)
    for tokens, count in ((2500, 2500), (1000, 1000), (6000, 6000), (None, whole.count)):
        rows = Corpus(source=str(path), length=16, tokens=tokens).rows(llama, llama)
        assert rows.count == count
        assert torch.equal(stream_of(rows), stream_of(whole)[:count])
    assert rows.fingerprint == whole.fingerprint
    first, second, third = skipped  # the second run found all that it needed
    assert first == 0 < second < third < len(found)
    Corpus(source=str(path), length=16, tokens=10**6).rows(llama, llama)
    assert len(skipped) == 3  # the text is known to have no more


@pytest.mark.parametrize("more", [0, 50])
def test_an_interrupt_keeps_what_was_tokenised(llama, documents, monkeypatch, more):
    """The same command goes on with the document that it was in, to the same tokens."""
    path, _ = documents
    whole = Corpus(source=str(path), length=16).rows(llama, llama)
    monkeypatch.setenv("SPARSEKIT_CACHE", str(path.parent / "own"))
    before = Corpus(source=str(path), length=16, tokens=1000).rows(llama, llama)
    skipped, ids = [], corpus.token_ids

    def stops(source, checkpoint, count):
        skipped.append(count)
        for number, found in enumerate(ids(source, checkpoint, count)):
            if len(skipped) == 1 and number == more:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(corpus, "token_ids", stops)
    with pytest.raises(KeyboardInterrupt):
        Corpus(source=str(path), length=16).rows(llama, llama)
    rows = Corpus(source=str(path), length=16).rows(llama, llama)
    assert skipped[1] == skipped[0] + more > 0
    assert torch.equal(stream_of(rows)[:1000], stream_of(before))
    assert torch.equal(stream_of(rows), stream_of(whole))
    assert rows.fingerprint == whole.fingerprint


def test_what_a_killed_process_has_left_of_a_text_is_removed_after_a_day(
    llama, documents, monkeypatch
):
    path, _ = documents
    monkeypatch.setenv("SPARSEKIT_CACHE", str(path.parent / "own"))
    Corpus(source=str(path), length=16, tokens=1000).rows(llama, llama)
    (file,) = (path.parent / "own" / "corpora").glob("*.safetensors")
    parts = [file.with_name(f".{file.name}.{number}.part") for number in (1, 2)]
    for part in parts:
        part.write_bytes(b"x")
    os.utime(parts[0], (0, 0))
    Corpus(source=str(path), length=16, tokens=6000).rows(llama, llama)
    assert [part.exists() for part in parts] == [False, True]


def test_a_cache_whose_tokens_were_changed_is_named(llama, documents, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "own"))
    Corpus(source=str(documents[0]), length=64).rows(llama, llama)
    (file,) = (tmp_path / "own" / "corpora").iterdir()
    data = bytearray(file.read_bytes())
    data[-8] ^= 1
    file.write_bytes(data)
    with refused("damaged-file", file, kind=DataError):
        Corpus(source=str(documents[0]), length=64).rows(llama, llama)


def test_a_damaged_cache_is_not_added_to(llama, documents, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "own"))
    Corpus(source=str(documents[0]), length=64, tokens=500).rows(llama, llama)
    (file,) = (tmp_path / "own" / "corpora").iterdir()
    data = bytearray(file.read_bytes())
    data[-8] ^= 1
    file.write_bytes(data)
    with refused("damaged-file", file, kind=DataError):
        Corpus(source=str(documents[0]), length=64, tokens=5000).rows(llama, llama)


def test_tokens_that_the_model_does_not_know_are_refused(llama, documents, monkeypatch):
    monkeypatch.setattr(llama.config, "vocab_size", 120)  # of 258
    with refused("token-out-of-range", "257", "120", kind=DataError):
        Corpus(source=str(documents[0]), length=64).rows(llama, llama)


def test_long_rows_of_a_file_are_cut_into_pieces(llama, row_file, rows):
    length = rows.shape[1] // 2 - 1
    found = Corpus(source=str(row_file), length=length).rows(llama, None)
    wanted = rows[:, : 2 * length].reshape(-1, length)
    assert sorted(found.take(0, len(found)).tolist()) == sorted(wanted.tolist())
    assert len(found) == 2 * len(rows)
    assert "2 tokens of each row" in found.notes[0]


def test_rows_beyond_the_models_maximum_are_cut_too(llama, tmp_path):
    """Of 600 tokens each; the maximum is 256."""
    rows = torch.arange(1200).remainder(250).view(2, 600)
    save_file({"tokens": rows}, tmp_path / "rows.safetensors")
    found = Corpus(source=str(tmp_path / "rows.safetensors"), length=128).rows(llama, None)
    assert len(found) == 8
    assert "88 tokens of each row" in found.notes[0]


@pytest.mark.parametrize(("length", "width"), [(None, 24), (5, 20), (16, 16)])
def test_a_row_file_is_read_in_parts(llama, row_file, rows, monkeypatch, length, width):
    monkeypatch.setattr(rowfiles, "PIECE_TOKENS", 2 * rows.shape[1])
    monkeypatch.setattr(rowfiles, "read_row_file", None)
    found = Corpus(source=str(row_file), length=length).rows(llama, None)
    wanted = rows[:, :width].reshape(-1, length or width)
    assert torch.equal(torch.stack([found.row(n) for n in range(len(found))]), wanted)
    assert found.fingerprint == rowfiles.fingerprint(wanted)


def test_a_token_beyond_the_vocabulary_is_named_with_its_row_of_the_file(llama, tmp_path):
    rows = torch.zeros(5, 8, dtype=torch.int32)
    rows[3, 6] = llama.config.vocab_size
    save_file({"tokens": rows}, tmp_path / "rows.safetensors")
    with refused("token-out-of-range", f"row 3, column 6 is token {rows[3, 6]}", kind=DataError):
        Corpus(source=str(tmp_path / "rows.safetensors"), length=2).rows(llama, None)


def test_an_endless_source_is_read_as_far_as_needed(llama, tmp_path, monkeypatch):
    def endless(_):
        while True:
            yield "more and more "

    monkeypatch.setattr(corpus, "training_texts", endless)
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n')
    assert Corpus(source=str(path), length=8, tokens=5000).rows(llama, llama).count == 5000


def test_a_plain_text_comes_in_pieces_that_make_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "PIECE_BYTES", 10)
    path = tmp_path / "plain.txt"
    text = "ab\ncdé\n" * 5 + "a line that is longer than a piece\nend without newline"
    path.write_text(text, encoding="utf-8")
    pieces = list(texts.training_texts(str(path)))
    assert "".join(pieces) == text
    assert len(pieces) > 4
    assert all(piece.endswith("\n") for piece in pieces[:-1])


@pytest.mark.parametrize("text", ["wörter ünd möre " * 9, "é" * 70, "a€𝄞" * 20])
@pytest.mark.parametrize("piece", [1, 3, 7])
def test_a_line_without_end_is_cut_too(tmp_path, monkeypatch, text, piece):
    """At spaces where there are some, else between characters; it is never whole in memory."""
    monkeypatch.setattr(texts, "PIECE_BYTES", piece)
    monkeypatch.setattr(texts, "LINE_BYTES", 20)
    path = tmp_path / "plain.txt"
    path.write_text(f"short\n{text}\nend", encoding="utf-8")
    pieces = list(texts.training_texts(str(path)))
    assert "".join(pieces) == f"short\n{text}\nend"
    assert max(len(one.encode()) for one in pieces) <= 20 + 2 * piece
    if " " in text:
        assert {one[0] for one in pieces[2:-2]} == {" "}


def test_text_that_is_not_utf8_is_named_with_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "PIECE_BYTES", 4)
    path = tmp_path / "plain.txt"
    path.write_bytes(b"ab\ncd\n\xff\n")
    with refused("not-utf8", path, "byte 6", kind=DataError):
        list(texts.training_texts(str(path)))


def test_parquet_and_compressed_lines_are_streamed_too(tmp_path, documents):
    import pyarrow
    from pyarrow import parquet

    found = documents[1]
    parquet.write_table(pyarrow.table({"text": found}), tmp_path / "d.parquet", row_group_size=7)
    with gzip.open(tmp_path / "d.json.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in found)
    for name in ("d.parquet", "d.json.gz"):
        assert list(texts.training_texts(str(tmp_path / name))) == found


def test_builtin_trains_on_what_is_not_held_out(llama):
    rows = Corpus(length=64).rows(llama, llama)
    text = texts.builtin_text(held_out=False)
    assert stream_of(rows).tolist() == llama.tokenizer()(text)["input_ids"]


def test_a_row_file_is_taken_as_it_is(llama, row_file, rows):
    found = Corpus(source=str(row_file), length=None).rows(llama, llama)
    assert sorted(found.take(0, len(rows)).tolist()) == sorted(rows.tolist())


def test_self_is_sampled_from_the_teacher(llama, family):
    teacher = Checkpoint.open(family("llama"))
    found = Corpus(source="self", length=16, tokens=40).rows(llama, teacher)
    assert (len(found), found.length) == (3, 16)


def test_less_text_than_a_row_is_refused(llama, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("short")
    with refused("text-too-short", path, "5 tokens", "64", "--length 5", kind=DataError):
        Corpus(source=str(path), length=64).rows(llama, llama)


def test_a_damaged_cache_is_named(llama, documents, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "own"))
    Corpus(source=str(documents[0]), length=64).rows(llama, llama)
    (file,) = (tmp_path / "own" / "corpora").iterdir()
    file.write_bytes(file.read_bytes()[:700])
    with refused("damaged-file", file, kind=DataError):
        Corpus(source=str(documents[0]), length=64).rows(llama, llama)


@pytest.mark.parametrize(
    "wrong", [{"source": "no/such.txt"}, {"length": 1}, {"seed": -1}, {"source": "buildin"}]
)
def test_wrong_words_are_refused_before_anything_is_read(wrong):
    with pytest.raises((UsageError, DataError)):
        Corpus(**wrong).check()
