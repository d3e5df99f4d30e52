"""The commands `pack` and `unpack`: streams, exit codes, what is told."""

import json
import re


def test_packing_and_unpacking_chain(cli, pruned, tmp_path):
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    found = cli("pack", pruned, "-o", packed)
    assert found.code == 0
    assert found.stdout == f"{packed}\n"
    assert "2:4" in found.stderr
    assert "MB instead of" in found.stderr
    assert cli("verify", packed).code == 0
    found = cli("unpack", packed, "-o", plain, "--json", "-q")
    assert json.loads(found.stdout)["out"] == str(plain)
    assert found.stderr == ""
    assert (plain / "model.safetensors").is_file()
    assert "# " in (packed / "README.md").read_text()


def test_the_screen_tells_the_ratios_that_theory_gives(cli, pruned, tmp_path):
    """Of 16-bit numbers, and of 4-bit codes, two of four with a place of two bits each."""
    screen = cli("pack", pruned, "-o", tmp_path / "packed").stderr
    row = next(line for line in screen.splitlines() if "2:4" in line)
    assert "8.000 + 1.000 + 0.000" in row
    assert "0.5625" in row  # 9 of 16 bits
    assert "4.0x, 3.6x, 3.6x" in row  # 32 / 8, 32 / 9
    coded = tmp_path / "coded"
    quantize = ("quantize", pruned, "-o", coded, "--method", "rtn", "--grid", "int4-g16")
    assert cli(*quantize).code == 0
    screen = cli("pack", coded, "-o", tmp_path / "packed-codes").stderr
    row = next(line for line in screen.splitlines() if "2:4 int4-g16" in line)
    assert "2.000 + 1.000 + 1.000" in row  # and a scale of 16 bits for each 16 inputs
    assert "16.0x, 10.7x, 8.0x" in row  # 32 / 2, 32 / 3, 32 / 4


def test_wrong_input_is_code_two_and_damage_is_code_one(cli, pruned, family, tmp_path):
    out = tmp_path / "out"
    for command, words in (
        (("pack", family("llama"), "-o", out), "is not sparse"),
        (("pack", pruned, "-o", pruned), "is the model itself"),
        (("unpack", pruned, "-o", out), "is plain, which unpack does not take"),
        (("unpack", tmp_path / "nothing", "-o", out), "no such model folder"),
    ):
        found = cli(*command)
        assert found.code == 2
        assert found.stdout == ""
        assert words in found.stderr
    packed = tmp_path / "packed"
    assert cli("pack", pruned, "-o", packed).code == 0
    file = packed / "sparsekit-factors.safetensors"
    whole = file.read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    for damaged, *told in (
        (changed, "sparsekit.json recorded", ".weight is not what was packed"),
        (whole[:-3], *["is not a whole safetensors file"] * 2),
    ):
        file.write_bytes(damaged)
        commands = (("verify", packed, "-q"), ("unpack", packed, "-o", out, "-q"))
        for command, words in zip(commands, told, strict=True):
            found = cli(*command)
            assert found.code == 1
            assert found.stdout == ""
            assert words in found.stderr
            assert re.search(
                r" again( \[[a-z-]+\])?\n$", found.stderr
            )  # copy the folder, or the file
            assert found.stderr.count("\n") == 1
    assert not out.exists()
