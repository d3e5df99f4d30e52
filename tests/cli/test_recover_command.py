"""The commands `recover` and `bench recover`: streams, exit codes, what is told."""

import json

import pytest
from refusals import refused

from sparsekit.errors import UsageError
from sparsekit.pipeline.options import count


def test_recover_gives_the_path_and_tells_the_rest(cli, pruned, row_file, tmp_path):
    command = ("recover", pruned, "-o", tmp_path / "out", "--data", row_file, "--length", 16)
    found = cli(*command, "--tokens", 64, "--eval-every", 2, "--eval-text", row_file)
    assert found.code == 0
    assert found.stdout == f"{tmp_path / 'out'}\n"
    assert "2 steps of 32 tokens" in found.stderr
    assert (
        "of the sparse model before training, on 5 x 24 tokens of rows.safetensors" in found.stderr
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| trained on | 64 tokens of `rows.safetensors` (sha256 `" in card
    assert "| evaluated on the way on | 5 x 24 tokens of rows.safetensors |" in card
    found = cli(*command, "--tokens", 64, "--overwrite", "--json", "-q")
    told = json.loads(found.stdout)
    assert told["out"] == str(tmp_path / "out")
    assert told["text"] == str(row_file)
    assert told["evaluated_on"] is None
    assert found.stderr == ""


def test_wrong_words_are_code_two_and_name_the_right_ones(cli, pruned, tmp_path):
    command = ("recover", pruned, "-o", tmp_path / "out", "--tokens", 2000)
    for wrong, right in (
        (("--method", "astt"), "did you mean 'ast'"),
        (("--schedule", "cosin"), "did you mean 'cosine'"),
        (("-O", "ramp=2", "--method", "ast"), "ramp of ast must be between 0 and 1, not 2"),
        (("--lr", "3"), "--lr must be between 0 and 1"),
        (("--eval-every", "2", "--eval-text", "self"), "--eval-text"),
    ):
        found = cli(*command, *wrong)
        assert found.code == 2
        assert found.stdout == ""
        assert right in found.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "wanted"), [("4.1M", 4_100_000), ("2.01M", 2_010_000), ("16.1K", 16_100), ("7", 7)]
)
def test_a_number_of_tokens_is_read_exactly(text, wanted):
    assert count(text) == wanted


@pytest.mark.parametrize("text", ["0", "1.5", "0.0001K", "K", "-3", "2T"])
def test_what_is_no_number_of_tokens_is_refused(text):
    with refused("not-a-count", "--tokens", kind=UsageError):
        count(text)


def test_bench_recover_gives_its_numbers(cli, pruned):
    found = cli("bench", "recover", pruned, "--length", 16, "--steps", 1, "--json", "-q")
    assert found.code == 0
    assert json.loads(found.stdout)["batch"] == [2, 16]
