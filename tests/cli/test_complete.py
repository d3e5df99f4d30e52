"""Shell completion, asked as the shells ask: by environment variables."""

import subprocess

import pytest
from forked import Answer, answers
from verbs import commands

from sparsekit import registry as methods
from sparsekit.errors import SparsekitError
from sparsekit.pruning.config import PruneConfig
from sparsekit.quantization.config import QuantizeConfig
from sparsekit.recovery.config import RecoverConfig
from sparsekit.scoring.config import EvalConfig
from sparsekit.study.recipe import recipe_file
from sparsekit.weights.grids import Grid
from sparsekit.weights.patterns import Pattern

HEAVY = ("torch", "transformers", "numpy", "datasets", "huggingface_hub")


def asked(*variables: dict[str, str]) -> list[Answer]:
    """What sparsekit answers a shell that sets these variables."""
    return answers([([], more) for more in variables])


OFFERS = [
    ("sparsekit quan", ["quantize"]),
    ("sparsekit prune m --meth", ["--method"]),
    ("sparsekit prune m --method s", ["sparsegpt"]),
    ("sparsekit prune m --refine ", ["armor", "dsnot"]),
    ("sparsekit prune m --pattern 2", ["2:4", "2:8"]),
    ("sparsekit prune m --then w", ["w8a8"]),
    ("sparsekit prune m --calibration ", ["builtin", "self", "c4", "wikitext2"]),
    ("sparsekit prune m --preset p", ["published"]),
    ("sparsekit quantize m --grid f", ["fp8"]),
    ("sparsekit quantize m --method ", ["awq", "gptq", "rtn"]),
    ("sparsekit recover m --method ", ["auto", "ast", "cast", "fixed"]),
    ("sparsekit recover m --dtype ", ["auto", "float32"]),
    ("sparsekit eval m --text ", ["builtin", "c4", "wikitext2"]),
    ("sparsekit convert m --format ", ["plain", "packed"]),
    ("sparsekit bench recover --method f", ["fixed"]),
    ("sparsekit run sparsegpt-", ["sparsegpt-ast", "sparsegpt-cast-int4"]),
    ("sparsekit recipe show quic", ["quickstart"]),
    ("sparsekit recipe cp quic", ["quickstart"]),
    ("sparsekit recipe validate quickstart wanda-", ["wanda-dsnot-60"]),
]


@pytest.fixture(scope="module")
def offers() -> list[Answer]:
    """What bash is offered at the end of each line."""
    return asked(
        *(
            {
                "_SPARSEKIT_COMPLETE": "complete_bash",
                "COMP_WORDS": line,
                "COMP_CWORD": str(line.count(" ")),
            }
            for line, _ in OFFERS
        )
    )


@pytest.mark.parametrize("number", range(len(OFFERS)), ids=lambda number: OFFERS[number][0])
def test_word_is_completed_without_importing_torch(offers, number):
    found = offers[number]
    assert found.code == 0, found.stderr
    assert found.stdout.split() == OFFERS[number][1]
    assert "sparsekit" in found.packages
    assert not found.packages & set(HEAVY)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_script_for_the_shell_is_given(shell):
    (found,) = asked({"_SPARSEKIT_COMPLETE": f"source_{shell}"})
    assert found.code == 0
    assert "_SPARSEKIT_COMPLETE=complete_" + shell in found.stdout
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=found.stdout, text=True, check=True)


def test_zsh_is_told_what_a_method_does():
    words = "sparsekit prune m --method wan"
    (found,) = asked({"_SPARSEKIT_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": words})
    summary = methods.describe("pruners", "wanda").summary
    assert '"wanda"' in found.stdout
    assert summary[:20] in found.stdout


def flags() -> list[tuple[str, str, str]]:
    """Every option that completes, with each word that it offers."""
    found = []
    for name, command in commands().items():
        for parameter in command.params:
            if getattr(parameter, "_custom_shell_complete", None) is not None:
                items = parameter.shell_complete(None, "")
                found += [(name, parameter.name, item.value) for item in items]
    return found


KINDS = ("pruners", "refiners", "recoverers", "quantizers")


def refused(command: str, flag: str, word: str) -> bool:
    """Whether a command does not take a word that completion offers for an option."""
    checks = {
        "name": lambda: methods.find(word),
        "pattern": lambda: Pattern.parse(word),
        "then": lambda: Grid.parse(word),
        "recipe": lambda: recipe_file(word),
        "recipes": lambda: recipe_file(word),
        "grid": lambda: Grid.parse(word),
        "text": lambda: EvalConfig(text=word),
        "preset": lambda: PruneConfig(method="dsnot", preset=word),
        "initial": lambda: PruneConfig(method="dsnot", initial=word),
        "refine": lambda: PruneConfig(refine=word),
        "calibration": lambda: None if word in ("builtin", "self", "c4", "wikitext2") else 1 / 0,
        "resident": lambda: None if word in ("packed", "expand") else 1 / 0,
    }
    config = {"quantize": QuantizeConfig, "recover": RecoverConfig, "eval": EvalConfig}
    made = config.get(command.split()[-1], PruneConfig)
    field = flag
    more = {"tokens": 8192} if made is RecoverConfig else {}
    more |= {"eval_text": {"eval_every": 1}, "format": {"slorb": 16}}.get(flag, {}) if more else {}
    try:
        checks.get(flag, lambda: made(**{field: word}, **more))()
    except SparsekitError:
        return True
    return False


def test_every_word_that_is_offered_is_one_that_is_taken():
    found = flags()
    assert len({(command, flag) for command, flag, _ in found}) > 30
    assert [row for row in found if refused(*row)] == []
