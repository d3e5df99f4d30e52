"""The command `quantize`: streams, exit codes, what is told."""

import json


def test_quantize_gives_the_path_and_tells_the_rest(cli, pruned, row_file, tmp_path):
    command = ("quantize", pruned, "-o", tmp_path / "out", "--grid", "int4-g16")
    found = cli(*command, "--calibration", row_file)
    assert found.code == 0
    assert found.stdout == f"{tmp_path / 'out'}\n"
    assert "gptq int4-g16 in" in found.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| grid | int4-g16 |" in card
    assert "none was given a value" in card
    found = cli(*command, "--method", "rtn", "--overwrite", "--json", "-q")
    told = json.loads(found.stdout)
    assert told["out"] == str(tmp_path / "out")
    assert told["calibration"] is None
    assert told["totals"]["zeros"] >= told["totals"]["zeros_before"] > 0
    assert found.stderr == ""
    assert "rtn int4-g16" in cli("inspect", tmp_path / "out").stderr


def test_wrong_words_are_code_two_and_name_the_right_ones(cli, pruned, tmp_path):
    command = ("quantize", pruned, "-o", tmp_path / "out")
    for wrong, right in (
        (("--method", "gptk"), "did you mean 'gptq'"),
        (("--grid", "int5"), "one of int4-g128, int8, w8a8, fp8"),
        (("--grid", "int4-g24", "--method", "rtn"), "do not divide into groups of 24"),
        (("--format", "dens"), "one of: compressed-tensors, dense"),
        (("--method", "rtn", "--samples", "4"), "rtn reads no calibration"),
        (("-O", "damping"), "write --option KEY=VALUE"),
    ):
        found = cli(*command, *wrong)
        assert found.code == 2
        assert found.stdout == ""
        assert right in found.stderr
    assert not (tmp_path / "out").exists()
