"""Recipes: all errors at once with their places, variants, names, orders."""

import pytest
import typer
from refusals import refused

from sparsekit.cli.app import app
from sparsekit.errors import DataError, UsageError
from sparsekit.study.recipe import parse, read_recipe
from sparsekit.study.schema import VERBS, defaults, read_yaml, schema, write_yaml

HEAD = "model: demo\nstages:\n"


def names(text: str) -> list[tuple[str, str, str | None]]:
    return [(step.name, step.verb, step.parent) for step in parse(HEAD + text).steps]


def errors(text: str, *overrides: str) -> list[str]:
    with pytest.raises(UsageError) as error:
        parse(text, overrides)
    head, *rest = error.value.message.split("\n  ")
    return rest if rest else [head]


def test_plurals_are_all_combinations_and_later_stages_follow_each():
    found = names("- prune: {methods: [wanda, ria], patterns: [2:4, 50%]}\n- pack\n")
    made = ["wanda-2of4", "wanda-50pct", "ria-2of4", "ria-50pct"]
    assert found[:4] == [(name, "prune", None) for name in made]
    assert found[4:] == [(f"{name}.pack", "pack", name) for name in made]


def test_a_list_of_words_is_a_list_of_variants():
    text = "- prune: [{method: magnitude}, {method: wanda, samples: 8}]\n- eval\n- pack\n"
    assert names(text) == [
        *[("magnitude", "prune", None), ("wanda", "prune", None)],
        *[("magnitude", "eval", "magnitude"), ("wanda", "eval", "wanda")],
        *[("magnitude.pack", "pack", "magnitude"), ("wanda.pack", "pack", "wanda")],
    ]


def test_a_stage_may_begin_with_an_earlier_one_by_its_name():
    text = """
- prune: {method: wanda}
  name: first
- recover: {method: ast, tokens: 4096}
- quantize: {grid: int8}
  from: first
- eval: {baseline: model}
  from: model
"""
    assert names(text) == [
        *[("first", "prune", None), ("first.ast", "recover", "first")],
        *[("first.int8", "quantize", "first"), ("model", "eval", None)],
    ]


def test_the_seed_of_a_recipe_is_that_of_each_stage_that_has_none():
    text = "seed: 7\n" + HEAD + "- prune: [{method: wanda}, {method: ria, seed: 1}]\n- pack\n"
    assert [step.words.get("seed") for step in parse(text).steps] == [7, 1, None, None]


def test_model_as_baseline_is_the_recipes_own():
    (_, step) = parse(HEAD + "- prune: {}\n- eval: {baseline: model}\n").steps
    assert step.words["baseline"] == "demo"


def test_options_are_a_mapping_or_the_text_of_flags():
    text = "- prune: {method: sparsegpt, option: {block: 64}}\n"
    again = text.replace("{block: 64}", "[block=64]")
    configs = [parse(HEAD + one).steps[0].config for one in (text, again)]
    assert configs[0].option == {"block": "64"}
    assert configs[0] == configs[1]


def test_all_errors_are_told_at_once_with_their_places():
    found = errors(
        "modle: x\nversion: one\nseed: -1\nstages:\n"
        "- prune: {metod: wanda, samples: many}\n"
        "- prun: {}\n"
        "- recover: {tokens: 4096, learning_rate: 1}\n"
        "- quantize: {grid: int3}\n"
        "- {prune: {}, pack: {}}\n"
        "- 7\n"
    )
    wanted = [
        "modle: unknown; did you mean 'model'?",
        "version: ",
        "model: ",
        "seed: ",
        "stages[0].prune.samples: ",
        "stages[0].prune.metod: unknown; did you mean 'method'?",
        "stages[1]: unknown 'prun'; did you mean 'prune'?",
        "stages[2].recover.learning_rate: unknown; ",
        "stages[3].quantize.grid: ",
        "stages[4]: ",
        "stages[5]: ",
    ]
    assert len(found) == len(wanted)
    for told, begin in zip(found, wanted, strict=True):
        assert told.startswith(begin)
    assert "int3" in found[8]


def test_an_impossible_order_does_not_hide_what_else_is_wrong():
    with pytest.raises(UsageError) as error:
        parse("model: demo\nstages:\n- pack\n- quantize: {method: gptqq}\n- recover: {}\n")
    for told in (
        "stages[1].quantize: pack is packed",
        "'gptqq'",
        "'gptq'",
        "stages[2].recover: ",
    ):
        assert told in error.value.message


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("- pack\n- prune: {}\n", ("stages[1].prune: ", "pack", "packed")),
        ("- quantize: {}\n- recover: {tokens: 4096}\n", ("stages[1].recover: ", "quantized")),
        ("- prune: {then: int8}\n- quantize: {}\n", ("stages[1].quantize: ", "quantized")),
        ("- prune: {}\n  name: a\n- pack:\n  name: a\n", ("stages[1].name: 'a'",)),
        ("- prune: {}\n  name: model\n", ("stages[0].name: 'model'",)),
        ("- prune: {}\n  name: ../x\n", ("stages[0].name: ", "'../x'")),
        ("- prune: {}\n  from: b\n- pack:\n  name: b\n", ("stages[0].from: 'b'", "cycle")),
        ("- prune: {}\n  name: b\n  from: b\n", ("stages[0].from: 'b'", "cycle")),
        ("- prune: {}\n  from: c\n", ("stages[0].from: ", "'c'", "known: model")),
        ("- prune: {}\n- eval:\n  name: e\n- pack:\n  from: e\n", ("stages[2].from: 'e'",)),
        ("- prune: {methods: wanda}\n", ("stages[0].prune.methods: ", "'method'")),
        ("- prune: {methods: []}\n", ("stages[0].prune.methods: ", "'method'")),
        (
            "- prune: {method: ria, methods: [wanda]}\n",
            ("stages[0].prune: ", "'method'", "'methods'"),
        ),
        ("- prune: {methods: [wanda, wanda]}\n", ("stages[0].prune.methods: ", "twice")),
        ("- prune: {}\n  name: dense\n", ("stages[0].name: 'dense'",)),
        ("- prune: {}\n  name: recipe.yaml\n", ("stages[0].name: 'recipe.yaml'",)),
        ("- prune: {}\n  name: .hidden\n", ("stages[0].name: ", "'.hidden'")),
        ("- prune: {}\n  from: [a]\n", ("stages[0].from: ", "['a']")),
        ("- prune: []\n", ("stages[0].prune: ", "empty")),
        ("- prune: {1: 2}\n", ("stages[0].prune: ", "{key: value}", "{1: 2}")),
        ("- prune: {option: 5}\n", ("stages[0].prune.option: ",)),
        ("- prune: {seed: true}\n", ("stages[0].prune.seed: ", "integer")),
        ("- recover: {mixed_precision: false}\n", ("no, bf16", "False")),
        ("- prune: {propagate: yes}\n", ("boolean", "'yes'")),
        ("- prune: [7]\n", ("stages[0].prune[0]: ", "{key: value}", "7")),
        ("- recover: {method: ast}\n", ("stages[0].recover: ", "tokens")),
        ("- prune: {method: armor}\n- recover: {tokens: 4096}\n", ("stages[1].recover: armor",)),
        ("- prune: {refine: armor}\n- quantize: {}\n", ("stages[1].quantize: ", "armor")),
        ("- prune: {compensate: lowrank}\n- quantize: {}\n", ("stages[1].quantize: wanda",)),
        (
            "- recover: {slorb: 16, tokens: 4096}\n- recover: {tokens: 4096}\n",
            ("stages[1].recover: ", "factors"),
        ),
        (
            "- prune: [{method: wanda, samples: 4}, {method: wanda, samples: 8}]\n",
            ("stages[0].prune[1]", "stages[0].prune[0]", "wanda", "methods: [rtn]"),
        ),
    ],
)
def test_what_cannot_be_is_refused(text, named):
    (found,) = errors(HEAD + text)
    for value in named:
        assert value in found


def test_the_order_is_seen_whatever_stands_between():
    text = "- prune: {}\n- quantize: {format: dense}\n- eval\n- recover: {tokens: 4096}\n- pack\n"
    assert [verb for _, verb, _ in names(text)] == ["prune", "quantize", "eval", "recover", "pack"]


@pytest.mark.parametrize(
    "first",
    [
        "prune: {method: armor}",
        "prune: {compensate: lowrank}",
        "recover: {slorb: 16, tokens: 4096}",
    ],
)
def test_products_of_factors_are_packed_measured_and_pruned_anew(first):
    text = f"- {first}\n- eval\n- pack\n- prune: {{}}\n  name: anew\n  from: first\n"
    text = text.replace("\n- eval", "\n  name: first\n- eval") + "- quantize: {}\n"
    assert [verb for _, verb, _ in names(text)][2:] == ["pack", "prune", "quantize"]


def test_a_recipe_of_a_newer_version_is_refused_for_that_alone():
    assert "version 2 was written for a newer sparsekit" in errors("version: 2\nnew: things\n")[0]


@pytest.mark.parametrize("text", ["", "[1]", "prune", "a: [", "a: 1\na: 2"])
def test_what_is_no_recipe_is_one_error(text):
    assert len(errors(text)) == 1


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    with refused("cannot-read", "none.yaml", "No such file", kind=DataError):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "r.yaml").write_bytes(b"\xff")
    with refused("cannot-read", "r.yaml", "UTF-8", kind=DataError):
        read_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("model: 1")
    with refused("invalid-recipe", "r.yaml: 2 errors:\n  model: ", kind=UsageError):
        read_recipe(tmp_path / "r.yaml")


def test_a_seed_may_be_there_where_a_method_draws_nothing():
    text = (
        "seed: 3\n" + HEAD + "- prune: {methods: [magnitude, wanda]}\n- quantize: {method: rtn}\n"
    )
    assert [step.words["seed"] for step in parse(text).steps] == [3, 3, 3, 3]


def test_the_recipe_that_is_kept_has_the_words_that_were_replaced():
    text = (
        HEAD + "- prune: {methods: [wanda, ria], pattern: 2:4, option: {power: '1e-1'}}\n- pack\n"
    )
    text = text.replace("wanda, ria", "ria")
    changed = parse(text, ["prune.samples=8"])
    again = parse(changed.text)
    assert again.steps == changed.steps
    assert again.steps[0].words["samples"] == 8
    assert again.steps[0].words["option"] == {"power": "1e-1"}


@pytest.mark.parametrize("value", ["2:4", "1:30", "yes", "no", "on", "5m", "2020-01-01"])
def test_what_looks_like_a_number_or_a_date_of_old_is_text(value):
    (found,) = errors(HEAD + f"- prune: {{samples: {value}}}\n")
    assert f"not '{value}'" in found
    assert read_yaml(f"a: {value}") == {"a": value} == read_yaml(write_yaml({"a": value}))


def test_what_is_written_is_read_as_the_same():
    value = {
        **{"model": "a é b", "z": ["2:4", "1e-1", "true", "null", "08", "0x1f", "", "- a", "a: b"]},
        **{"stages": [{"prune": {"methods": ["ria"], "lr": 1e-05}}, {"pack": {}}], "c": [True]},
        **{"d": None, "long": "word " * 60},
    }
    text = write_yaml(value)
    assert read_yaml(text) == value
    assert text.index("model:") < text.index("stages:")
    with refused("not-yaml", kind=UsageError):
        write_yaml({"a": object()})


@pytest.mark.parametrize("text", ["!!int abc", "!!float abc", "[" * 5000])
def test_yaml_that_python_cannot_read_is_one_error(text):
    assert "not valid YAML" in errors(HEAD + f"- prune: {{samples: {text}}}\n")[0]


def test_factors_alone_are_not_trained_or_packed():
    text = "- prune: {compensate: lowrank, format: factored}\n- recover: {tokens: 4096}\n"
    assert "holds factors only, which recover does not take" in errors(HEAD + text)[0]


def test_words_are_replaced_where_they_are_else_in_every_variant():
    text = HEAD + "- prune: [{method: dsnot}, {method: wanda, samples: 64}]\n- eval\n"
    steps = parse(text, ["prune.samples=8", "model=x", "seed=2"]).steps
    assert [step.words.get("samples") for step in steps] == [None, 8, None, None]
    assert [step.words["seed"] for step in steps] == [2, 2, 2, 2]
    many = HEAD + "- prune: {methods: [wanda, ria]}\n"
    assert [step.name for step in parse(many, ["prune.method=nowag"]).steps] == ["nowag"]


def test_one_value_stands_for_a_list_of_one():
    text = HEAD + "- prune: {method: sparsegpt}\n"
    told = parse(text, ["prune.skip=o_proj", "prune.option=damping=0.1"])
    assert told.steps[0].words["skip"] == ["o_proj"]
    assert told.steps[0].words["option"] == ["damping=0.1"]


def test_variants_take_the_place_of_one_value():
    told = parse(HEAD + "- prune: {method: wanda}\n", ["prune.methods=[ria, nowag]"])
    assert [step.name for step in told.steps] == ["ria", "nowag"]


@pytest.mark.parametrize("override", ["samples", "samples=8", "prnue.samples=8", "pack.x=1"])
def test_a_replacement_that_names_no_word_is_refused(override):
    assert repr(override) in errors(HEAD + "- prune: {}\n", override)[0]


@pytest.mark.parametrize("verb", VERBS)
def test_flags_and_recipe_keys_are_the_same_words_with_the_same_defaults(verb):
    command = typer.main.get_command(app).commands[verb]
    terminal = (
        "model",
        "models",
        "out",
        "overwrite",
        "json",
        "quiet",
        "debug",
        "dry_run",
        "timed",
        "help",
        "save",
    )
    flags = {p.name: p.default for p in command.params if p.name not in (*terminal, "save")}
    if "form" in flags:
        flags["format"] = flags.pop("form")
    plain = {key: list(v) if isinstance(v, tuple) else v for key, v in flags.items()}
    keys = {k: list(v) if isinstance(v, tuple) else v for k, v in defaults(verb).items()}
    assert plain == keys


def test_all_errors_of_one_stage_are_told_at_once():
    found = errors(HEAD + "- prune: {pattern: 2/4, then: int3, sparsity: 0.5, allocate: even}\n")
    assert [one.partition(": ")[0] for one in found] == [
        f"stages[0].prune.{key}" for key in ("pattern", "allocate", "then", "sparsity")
    ]
    assert "unknown; use pattern 50%" in found[-1]


def test_errors_name_keys_not_flags():
    (found,) = errors(HEAD + "- prune: {rank: 5%}\n")
    assert found == "stages[0].prune: rank has no effect without compensate lowrank"


def test_the_schema_has_the_words_as_they_are_written():
    stages = schema()["properties"]["stages"]["items"]["anyOf"]
    prune = stages[0]["properties"]["prune"]["anyOf"][0]["properties"]
    assert prune["pattern"]["anyOf"] == [{"type": "string"}, {"type": "null"}]
    assert prune["allocate"]["enum"] == ["none", "owl"]
    assert prune["patterns"]["items"] == prune["pattern"]
    assert all(one.get("description") for name, one in prune.items() if name in defaults("prune"))


def test_a_step_is_named_by_stage_verb_or_name():
    recipe = parse(HEAD + "- prune: {methods: [wanda, ria]}\n- eval\n- pack\n")
    wanted = {"prune": [0, 0], "0": [0, 0], "ria": [0], "eval": [1, 1], "pack": [2, 2]}
    for name, stages in wanted.items():
        assert [step.stage for step in recipe.steps_of(name)] == stages
    with refused("no-stage", "recover", kind=UsageError):
        recipe.steps_of("recover")
    twice = parse(HEAD + "- prune: {}\n- eval\n- pack\n- eval\n")
    with refused("ambiguous-stage", "eval", kind=UsageError):
        twice.steps_of("eval")
