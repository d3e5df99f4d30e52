"""The command `deploy`: streams and exit codes."""

import json


def test_deploy_tells_every_runtime(cli, pruned, tmp_path):
    found = cli("deploy", pruned)
    assert found.code == 0
    assert "vLLM\tyes\tno\tno" in found.stdout.splitlines()
    assert "March 2026" in " ".join(found.stderr.split())
    told = json.loads(cli("deploy", pruned, "--json", "-q").stdout)
    assert told["form"]["pattern"] == "2:4"
    assert len(told["runtimes"]) == 7
    assert cli("deploy", tmp_path / "nothing").code == 2
