"""The command `convert`: streams and exit codes."""

from pathlib import Path

LEGACY = Path(__file__).parents[1] / "data" / "legacy"


def test_convert_gives_the_path(cli, tmp_path):
    found = cli("convert", LEGACY / "sparse-24-bitmask", "-o", tmp_path / "plain")
    assert found.code == 0
    assert found.stdout == f"{tmp_path / 'plain'}\n"
    assert "convert sparse-24-bitmask" in found.stderr
    assert "50.00%" in found.stderr
    found = cli("convert", tmp_path / "plain", "-o", tmp_path / "again")
    assert found.code == 2
    assert found.stdout == ""
    assert "which convert does not take" in found.stderr


def test_convert_gives_a_packed_one_too(cli, tmp_path):
    found = cli(
        *("convert", LEGACY / "sparse-24-bitmask", "-o", tmp_path / "packed", "--format", "packed")
    )
    assert found.code == 0
    assert found.stdout == f"{tmp_path / 'packed'}\n"
    assert "2:4" in found.stderr
