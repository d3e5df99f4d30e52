"""The commands `pack` and `unpack`: streams, exit codes, what is told."""

import json


def test_packing_and_unpacking_chain(cli, pruned, tmp_path):
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    found = cli("pack", pruned, "-o", packed)
    assert found.code == 0
    assert found.stdout == f"{packed}\n"
    assert "2:4" in found.stderr
    assert "MB in the place of" in found.stderr
    assert cli("verify", packed).code == 0
    found = cli("unpack", packed, "-o", plain, "--json", "-q")
    assert json.loads(found.stdout)["out"] == str(plain)
    assert found.stderr == ""
    assert (plain / "model.safetensors").is_file()
    assert "# " in (packed / "README.md").read_text()


def test_wrong_input_is_code_two_and_damage_is_code_one(cli, pruned, family, tmp_path):
    out = tmp_path / "out"
    for command, words in (
        (("pack", family("llama"), "-o", out), "is not sparse"),
        (("pack", pruned, "-o", pruned), "is the model itself"),
        (("unpack", pruned, "-o", out), "is not packed"),
        (("unpack", tmp_path / "nothing", "-o", out), "no such model folder"),
    ):
        found = cli(*command)
        assert found.code == 2
        assert found.stdout == ""
        assert words in found.stderr
    packed = tmp_path / "packed"
    assert cli("pack", pruned, "-o", packed).code == 0
    file = packed / "sparsekit-factors.safetensors"
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 1
    file.write_bytes(whole)
    found = cli("verify", packed)
    assert found.code == 1
    assert "sparsekit.json recorded" in found.stderr
    assert not out.exists()
