"""Pruning from disk to disk: what changes, what does not, and what is written about it."""

import json
from pathlib import Path

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file
from torch import nn

from sparsekit import registry as methods
from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.errors import DataError, NumericalError, UsageError
from sparsekit.files import sha256_file
from sparsekit.memory import KEPT_BYTES
from sparsekit.provenance.entry import Report
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.dry_run import plan
from sparsekit.pruning.prune import prune
from sparsekit.text.rows import fingerprint

METHODS = methods.names("pruners")
KEEPS_SURVIVORS = ("magnitude", "nowag", "ria", "wanda")
LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def run(row_file, tmp_path):
    """Prunes a folder with the token rows of conftest.py; gives the report."""

    def pruned(source: Path, name: str = "out", **options) -> Report:
        options.setdefault("calibration", str(row_file))
        return prune(PruneConfig(**options), str(source), tmp_path / name)

    return pruned


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def weight_hashes(folder: Path) -> dict[str, str]:
    return {file.name: sha256_file(file) for file in sorted(folder.glob("*.safetensors"))}


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "sparsekit.json").read_text())["history"]


def linears(name: str) -> bool:
    return name.split(".")[-2] in LLAMA_LINEARS


def kept_of_groups(weight: torch.Tensor, group: int) -> torch.Tensor:
    """The number of weights that are not zero in each group of a `[out, in]` weight."""
    return (weight != 0).view(weight.shape[0], -1, group).sum(-1)


def loaded(folder: Path, dtype=torch.float32) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


# What a method makes of a checkpoint


@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_a_checkpoint_that_loads_with_exact_zeros(run, family, rows, method):
    report = run(family("llama"), method=method)
    model = loaded(report.out)
    count = 0
    for name, module in model.model.named_modules():
        if isinstance(module, nn.Linear):
            assert (kept_of_groups(module.weight, 4) == 2).all(), name
            count += 1
    assert count == 14
    with torch.no_grad():
        assert model(input_ids=rows).logits.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "llama_sharded", "llama_tied"])
def test_nothing_outside_the_targets_changes(run, family, method, name):
    source = family(name)
    before, after = tensors_in(source), tensors_in(run(source, method=method).out)
    assert list(before) == list(after)
    for tensor in before:
        same = torch.equal(before[tensor], after[tensor])
        assert same == (not linears(tensor)), tensor
        assert before[tensor].dtype == after[tensor].dtype


@pytest.mark.parametrize("method", METHODS)
def test_survivors_stay_bit_identical_where_the_method_only_chooses_a_mask(run, family, method):
    before, after = tensors_in(family("llama")), tensors_in(run(family("llama"), method=method).out)
    same = []
    for name in filter(linears, before):
        mask = after[name] != 0
        same.append(torch.equal(after[name][mask], before[name][mask]))
    assert all(same) if method in KEEPS_SURVIVORS else not any(same)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("text", ["50%", "37.5%/tensor", "1:4", "4:8"])
def test_zeros_are_exactly_as_many_as_the_pattern_says(run, family, method, text):
    report = run(family("llama"), method=method, pattern=text)
    share = {"50%": 0.5, "37.5%/tensor": 0.375, "1:4": 0.75, "4:8": 0.5}[text]
    after = tensors_in(report.out)
    for row in report.entry.to_json()["weights"]:
        weight = after[row["name"]]
        assert int((weight == 0).sum()) == row["zeros"] == share * weight.numel()
        assert row["pattern"] == text
        if text == "50%":
            assert ((weight == 0).sum(1) == weight.shape[1] // 2).all()
        if text in ("1:4", "4:8"):
            keep, group = map(int, text.split(":"))
            assert (kept_of_groups(weight, group) == keep).all()


@pytest.mark.parametrize(
    "name", ["qwen2", "qwen3", "mistral", "gemma3", "gpt2", "opt", "phi3", "llama_tied"]
)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_every_family_is_pruned_along_its_inputs(run, family, rows, method, name):
    from transformers.pytorch_utils import Conv1D

    report = run(family(name), method=method)
    model = loaded(report.out)
    found = 0
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head:
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            assert (kept_of_groups(weight, 4) == 2).all()
            found += 1
    assert found == len(report.entry.to_json()["weights"]) > 0
    with torch.no_grad():
        assert model(input_ids=rows).logits.isfinite().all()


# Which inputs count: an independent Wanda


def two_of_four(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Wanda 2:4 in plain loops' terms: of four neighbours the two best stay."""
    scores = (weight.abs() * norms).view(weight.shape[0], -1, 4)
    keep = torch.zeros_like(scores, dtype=torch.bool)
    keep.scatter_(-1, scores.argsort(dim=-1, descending=True, stable=True)[..., :2], True)
    return weight * keep.view_as(weight)


@torch.no_grad()
def wanda_by_hooks(folder: Path, rows: torch.Tensor, *, propagate: bool) -> dict:
    """Wanda 2:4 on an ordinary model that is run as a whole for each block."""
    dense, model = loaded(folder), loaded(folder)
    made = {}
    for index, block in enumerate(model.model.layers):
        observed = block if propagate else dense.model.layers[index]
        squares: dict[str, torch.Tensor] = {}

        def add(name, x, squares=squares):
            squares[name] = squares.get(name, 0) + x.double().square().flatten(0, -2).sum(0)

        handles = [
            module.register_forward_pre_hook(lambda _, args, name=name, add=add: add(name, args[0]))
            for name, module in observed.named_modules()
            if isinstance(module, nn.Linear)
        ]
        for row in rows:
            (model if propagate else dense)(input_ids=row[None])
        for handle in handles:
            handle.remove()
        for name, total in squares.items():
            module = block.get_submodule(name)
            module.weight.copy_(two_of_four(module.weight, total.sqrt().float()))
            made[f"model.layers.{index}.{name}.weight"] = module.weight.clone()
    return made


@pytest.mark.parametrize("propagate", [True, False])
@pytest.mark.parametrize("name", ["llama", "llama_sharded"])
def test_wanda_equals_an_independent_one_on_the_ordinary_model(run, family, rows, name, propagate):
    after = tensors_in(run(family(name), propagate=propagate).out)
    expected = wanda_by_hooks(family(name), rows, propagate=propagate)
    assert sorted(expected) == sorted(filter(linears, after))
    for weight, value in expected.items():
        assert torch.equal(after[weight].float(), value), weight


def test_propagating_changes_every_block_but_the_first(run, family):
    dense = tensors_in(run(family("llama"), "dense", propagate=False).out)
    through = tensors_in(run(family("llama"), "through", propagate=True).out)
    same = {name: torch.equal(dense[name], through[name]) for name in filter(linears, dense)}
    assert all(equal for name, equal in same.items() if ".0." in name)
    assert not all(equal for name, equal in same.items() if ".1." in name)


@pytest.mark.parametrize(("method", "expected"), [("wanda", True), ("nowag", False)])
def test_propagation_is_the_methods_own_unless_it_is_asked_for(run, family, method, expected):
    own = run(family("llama"), "own", method=method)
    assert own.entry.settings.propagate is expected
    asked = run(family("llama"), "asked", method=method, propagate=expected)
    assert weight_hashes(asked.out) == weight_hashes(own.out)


def test_order_of_the_calibration_rows_does_not_matter(run, family, rows, tmp_path):
    save_file({"tokens": rows.flip(0).contiguous()}, tmp_path / "flipped.safetensors")
    flipped = str(tmp_path / "flipped.safetensors")
    one = run(family("llama"), "one")
    two = run(family("llama"), "two", calibration=flipped)
    assert weight_hashes(one.out) == weight_hashes(two.out)
    assert one.entry.calibration.fingerprint != two.entry.calibration.fingerprint


@pytest.mark.parametrize("method", METHODS)
def test_two_runs_give_the_same_bytes(run, family, method):
    one, two = (run(family("llama"), name, method=method) for name in ("one", "two"))
    assert weight_hashes(one.out) == weight_hashes(two.out)


def test_other_calibration_rows_give_other_masks(run, family, row_file):
    few = {"calibration": str(row_file), "samples": 1, "length": 6}
    one, two = run(family("llama"), "one"), run(family("llama"), "two", **few)
    assert weight_hashes(one.out) != weight_hashes(two.out)
    assert (two.entry.calibration.samples, two.entry.calibration.length) == (1, 6)


def test_compute_dtype_never_reaches_the_disk(run, family):
    report = run(family("llama_sharded"), dtype="bfloat16")
    assert {t.dtype for t in tensors_in(report.out).values()} == {torch.float16}
    assert report.entry.settings.dtype == "bfloat16"


def test_pruning_a_pruned_checkpoint_again_changes_no_byte(run, pruned):
    again = run(pruned)
    assert weight_hashes(again.out) == weight_hashes(pruned)
    assert all(row["error"] == 0 for row in again.entry.to_json()["weights"])


# --reconstruct cg


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria"])
def test_reconstruction_keeps_the_mask_and_lowers_every_error(run, family, method):
    plain = run(family("llama_tied"), "plain", method=method, propagate=False)
    solved = run(family("llama_tied"), "solved", method=method, propagate=False, reconstruct="cg")
    before, after = tensors_in(plain.out), tensors_in(solved.out)
    for name in filter(linears, before):
        assert torch.equal(before[name] != 0, after[name] != 0), name
        assert not torch.equal(before[name], after[name])
    for old, new in zip(
        plain.entry.to_json()["weights"], solved.entry.to_json()["weights"], strict=True
    ):
        assert new["error"] < 0.9 * old["error"], new["name"]


def test_reconstruction_of_a_data_free_method_reads_calibration_rows():
    assert PruneConfig(method="magnitude").rows is None
    rows = PruneConfig(method="magnitude", reconstruct="cg").rows
    assert rows is not None
    assert rows.source == "builtin"


def test_methods_rank_as_published_on_correlated_inputs(run, family):
    """Same inputs for all (no propagation): the error of the layer's output falls."""
    errors = {
        method: run(
            family("llama_tied"), method, method=method, propagate=False
        ).entry.totals.mean_error
        for method in ("magnitude", "wanda", "sparsegpt", "alps")
    }
    assert errors["alps"] < errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


def test_relative_error_is_that_of_the_layers_output(run, family, rows):
    report = run(family("llama_tied"))
    row = next(
        r
        for r in report.entry.to_json()["weights"]
        if r["name"].endswith("0.self_attn.q_proj.weight")
    )
    dense, sparse = loaded(family("llama_tied")), loaded(report.out)
    seen = []
    dense.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].flatten(0, -2))
    )
    with torch.no_grad():
        for tokens in rows:
            dense(input_ids=tokens[None])
    x = torch.cat(seen)
    w, pruned = (m.model.layers[0].self_attn.q_proj.weight.detach() for m in (dense, sparse))
    lost = (x @ (w - pruned).T).square().sum()
    expected = float(lost / (x @ w.T).square().sum())
    # The report samples tokens: with fewer tokens than samples, some count once more.
    assert row["error"] == pytest.approx(expected, rel=0.05)


# What is written


def test_provenance_says_what_was_done_and_with_what(run, family, rows, row_file):
    import importlib.metadata

    report = run(family("llama"), method="sparsegpt", option={"block": "64"}, skip=["o_proj"])
    source = Checkpoint.open(family("llama"))
    found = json.loads((report.out / "sparsekit.json").read_text())
    (entry,) = found["history"]
    assert entry == report.entry.to_json()
    assert found["fingerprint"] == Checkpoint.open(report.out).scan()
    assert found["fingerprint"] != source.scan()
    assert entry["stage"] == "prune"
    assert entry["source"] == {"path": str(family("llama")), "fingerprint": source.scan()}
    assert entry["settings"]["method"] == "sparsegpt"
    assert entry["settings"]["pattern"] == "2:4"
    assert entry["settings"]["options"] == {"damping": "0.01", "block": "64"}
    assert entry["settings"]["skip"] == ["o_proj"]
    assert entry["calibration"] == {
        "source": str(row_file),
        "samples": rows.shape[0],
        "length": rows.shape[1],
        "seed": 0,
        "fingerprint": fingerprint(rows),
        "notes": [],
    }
    for package in ("torch", "transformers", "safetensors"):
        assert entry["versions"][package] == importlib.metadata.version(package)
    assert len(entry["weights"]) == 12
    assert entry["skipped"] == [
        {"name": "model.layers.0.self_attn.o_proj.weight", "reason": "--skip o_proj"},
        {"name": "model.layers.1.self_attn.o_proj.weight", "reason": "--skip o_proj"},
        {"name": "lm_head.weight", "reason": "no linear weight of a decoder block"},
        {"name": "model.embed_tokens.weight", "reason": "no linear weight of a decoder block"},
    ]
    assert entry["totals"]["zeros"] * 2 == entry["totals"]["size"]
    assert entry["totals"]["weights"] == 12
    row = entry["weights"][0]
    assert row["name"] == "model.layers.0.self_attn.q_proj.weight"
    assert (row["shape"], row["size"], row["zeros"]) == ([32, 32], 1024, 512)
    assert 0 < row["error"] < 1
    assert row["numbers"] == {"damping": 0.01}
    assert row["seconds"] >= 0
    assert entry["resumed_blocks"] == 0
    assert entry["seconds"] > 0
    assert entry["peak_memory_bytes"] > 1 << 26


def test_data_free_run_says_that_nothing_was_measured(run, family):
    entry = run(family("llama"), method="magnitude", calibration=None).entry.to_json()
    assert entry["calibration"] is None
    assert entry["settings"]["calibration"] is None
    assert entry["totals"]["mean_error"] is None
    assert all(row["error"] is None for row in entry["weights"])


def test_data_free_method_with_calibration_has_its_error_measured(run, family):
    without = run(family("llama"), "without", method="magnitude", calibration=None)
    with_rows = run(family("llama"), "with", method="magnitude")
    assert weight_hashes(without.out) == weight_hashes(with_rows.out)
    assert all(0 < row["error"] < 1 for row in with_rows.entry.to_json()["weights"])


def test_history_is_carried_when_an_output_is_pruned_again(run, pruned):
    again = run(pruned, pattern="1:4", method="magnitude", calibration=None)
    first, second = history(again.out)
    assert first == history(pruned)[0]
    assert second["settings"]["pattern"] == "1:4"
    recorded = json.loads((pruned / "sparsekit.json").read_text())["fingerprint"]
    assert second["source"] == {"path": str(pruned), "fingerprint": recorded}


def test_model_card_tells_how_it_was_made(run, family, rows, row_file):
    text = (run(family("llama"), skip=["layers.1.mlp.*"]).out / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\ntags:\n- sparsekit\n")
    assert "# llama, pruned to 2:4" in text
    assert "| method | wanda |" in text
    assert "11 linear weights, 50.00% of them zero" in text
    assert fingerprint(rows)[:16] in text
    assert f"`{row_file.name}`" in text
    assert str(row_file.parent) not in text  # nobody else has that folder
    assert "- `model.layers.1.mlp.up_proj.weight`: --skip layers.1.mlp.*" in text
    assert "`sparsekit verify .`" in text


@pytest.mark.parametrize("name", ["llama", "llama_sharded", "gpt2"])
def test_output_has_the_files_of_its_source_and_nothing_left_over(run, family, name):
    source, out = family(name), run(family(name)).out
    ours, theirs = ({file.name for file in folder.iterdir()} for folder in (out, source))
    assert ours == theirs | {"sparsekit.json", "README.md"}
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            assert (out / file.name).read_bytes() == file.read_bytes()
    assert sorted(p.name for p in out.parent.iterdir()) == [out.name]


def test_shards_keep_their_names_tensors_and_sizes(run, family):
    source = family("llama_sharded")
    out = run(source).out
    shards = sorted(file.name for file in source.glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        assert load_file(out / shard).keys() == load_file(source / shard).keys()
        assert (out / shard).stat().st_size == (source / shard).stat().st_size


# --skip


@pytest.mark.parametrize(
    ("glob", "left"),
    [
        ("o_proj", ["0.self_attn.o_proj", "1.self_attn.o_proj"]),
        ("[qk]_proj", [f"{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qk"]),
        ("self_attn.v_proj", ["0.self_attn.v_proj", "1.self_attn.v_proj"]),
        ("1.mlp", [f"1.mlp.{x}_proj" for x in ("gate", "up", "down")]),
        ("layers.0.mlp.down_proj", ["0.mlp.down_proj"]),
        ("model.layers.0.mlp.up_proj.weight", ["0.mlp.up_proj"]),
        ("*.1.*.o_proj.*", ["1.self_attn.o_proj"]),
    ],
)
def test_skip_matches_a_component_a_run_of_them_or_the_whole_name(run, family, glob, left):
    report = run(family("llama"), skip=[glob])
    before, after = tensors_in(family("llama")), tensors_in(report.out)
    dense = [n for n in filter(linears, before) if torch.equal(before[n], after[n])]
    assert dense == sorted(f"model.layers.{name}.weight" for name in left)
    reasons = {row["name"]: row["reason"] for row in report.entry.to_json()["skipped"]}
    assert sorted(name for name, why in reasons.items() if why == f"--skip {glob}") == dense


def test_skips_may_overlap(run, family):
    entry = run(family("llama"), skip=["self_attn", "q_proj", "layers.0.self_attn"]).entry.to_json()
    assert entry["totals"]["weights"] == 6
    names = [row["name"] for row in entry["skipped"]]
    assert len(names) == len(set(names)) == 10  # eight, embeddings and head


def test_skip_of_part_of_a_component_matches_nothing(run, family):
    with refused("no-match", "--skip 'o_pro'", "'o_proj'", kind=UsageError):
        run(family("llama"), skip=["o_pro"])


def test_skip_that_leaves_nothing_is_refused(run, family):
    with refused("no-weights", "--skip", kind=UsageError):
        run(family("llama"), skip=["self_attn", "mlp"])


@pytest.mark.parametrize("propagate", [True, False])
@pytest.mark.parametrize("block", ["0", "1"])
def test_skipping_a_whole_block_leaves_it_dense_and_goes_on(run, family, block, propagate):
    report = run(family("llama"), skip=[f"layers.{block}"], propagate=propagate)
    before, after = tensors_in(family("llama")), tensors_in(report.out)
    for name in filter(linears, before):
        skipped = f"layers.{block}." in name
        assert torch.equal(before[name], after[name]) == skipped
    if block == "0":  # the second block's inputs are then those of the dense model in any case
        dense = tensors_in(run(family("llama"), "whole", propagate=False).out)
        name = "model.layers.1.mlp.down_proj.weight"
        assert torch.equal(after[name], dense[name])


def test_model_that_already_has_the_pattern_is_noted(family, tmp_path):
    seen = [Recorder() for _ in range(3)]
    config = PruneConfig(method="magnitude", pattern="2:4")
    once = prune(config, str(family("llama")), tmp_path / "once", progress=seen[0]).out
    prune(config, str(once), tmp_path / "twice", progress=seen[1])
    other = PruneConfig(method="magnitude", pattern="1:4")
    prune(other, str(once), tmp_path / "other", progress=seen[2])
    notes = [[note for note in one.notes if "already has the pattern" in note] for one in seen]
    assert [len(found) for found in notes] == [0, 1, 0]
    assert all(text in notes[1][0] for text in (str(once), "2:4", "14"))


# What is refused, before anything is written


def assert_refused(tmp_path: Path, error: type, match: str, **arguments) -> None:
    out = tmp_path / "refused"
    with pytest.raises(error, match=match):
        prune(PruneConfig(**arguments.get("config", {})), str(arguments["model"]), out)
    assert not out.exists()
    assert not out.with_name("refused.partial").exists()


def test_pattern_that_does_not_divide_a_layer_is_named_with_the_way_out(
    run, family, row_file, tmp_path
):
    odd = family("llama_odd")
    config = {"calibration": str(row_file)}
    match = (
        r"model\.layers\.0\.mlp\.down_proj\.weight: 66 inputs do not divide into groups of 4; "
        r"--pattern 1:2 fits, or leave it dense with --skip down_proj$"
    )
    assert_refused(tmp_path, UsageError, match, config=config, model=odd)
    assert run(odd, skip=["down_proj"]).entry.totals.weights == 12
    assert run(odd, "half", pattern="50%").entry.totals.weights == 14


@pytest.mark.parametrize(
    ("pattern", "way"),
    [("5:10", "--pattern 4:8 fits$"), ("2:5", "50% fits every weight$"), ("6:12", "4:8 fits$")],
)
def test_pattern_that_fits_no_layer_comes_with_one_that_does(family, tmp_path, pattern, way):
    """The tiny llama has weights with 32 and with 64 inputs; skipping all of them is no way."""
    config = {"method": "magnitude", "pattern": pattern}
    match = rf"q_proj\.weight: 32 inputs do not divide into groups of \d+; .*{way}"
    assert_refused(tmp_path, UsageError, match, config=config, model=family("llama"))


def test_mixture_of_experts_is_refused(family, tmp_path):
    match = r"'mixtral'.*would be left alone.*experts"
    assert_refused(tmp_path, DataError, match, model=family("mixtral"))


def test_weight_that_is_not_finite_is_refused_by_name(copy_of, tmp_path):
    folder = copy_of("llama_tied")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    match = r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or Inf"
    assert_refused(tmp_path, DataError, match, model=folder, config={"method": "magnitude"})


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_inputs_that_overflow_are_an_error_that_names_the_weight(
    copy_of, row_file, tmp_path, method, block
):
    """Infinite norms rank nothing: a mask from them would be arbitrary."""
    folder = copy_of("llama_tied")
    tensors = load_file(folder / "model.safetensors")
    for part in ("up_proj", "gate_proj"):
        tensors[f"model.layers.{block}.mlp.{part}.weight"] *= 1e30
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = PruneConfig(method=method, calibration=str(row_file))
    name = f"model.layers.{block}.mlp.down_proj.weight"
    with refused("not-finite", name, kind=NumericalError):
        prune(config, str(folder), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_token_rows_of_another_vocabulary_are_refused(family, tmp_path):
    save_file({"tokens": torch.full((2, 8), 260)}, tmp_path / "big.safetensors")
    config = {"calibration": str(tmp_path / "big.safetensors")}
    match = r"token 260, the model's vocabulary has 260"
    assert_refused(tmp_path, DataError, match, model=family("llama"), config=config)


def test_text_without_a_tokenizer_is_refused(family, tmp_path):
    (tmp_path / "some.txt").write_text("words " * 1000)
    config = {"calibration": str(tmp_path / "some.txt"), "samples": 2, "length": 8}
    assert_refused(
        tmp_path, DataError, "has no tokenizer", model=family("llama_tied"), config=config
    )


def test_existing_output_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "model").mkdir()
    with refused("output-exists", "/out", kind=UsageError):
        prune(PruneConfig(), str(tmp_path / "model"), tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        ({"method": "wandaa"}, "no-method", ("'wandaa'", "'wanda'")),
        ({"method": "sparsegpt", "option": {"blok": "3"}}, "no-option", ("'blok'", "'block'")),
        (
            {"method": "sparsegpt", "option": {"block": "x"}},
            "not-a-number",
            ("block of sparsegpt", "'x'"),
        ),
        ({"option": {"block": "3"}}, "no-option", ("wanda", "'block'")),
        ({"reconstruct": "lsq"}, "not-a-choice", ("--reconstruct 'lsq'", "none, cg")),
        ({"device": "tpu"}, "not-a-choice", ("--device 'tpu'",)),
        ({"dtype": "int4"}, "not-a-choice", ("--dtype 'int4'",)),
    ],
)
def test_wrong_options_are_refused_whatever_the_model_is(tmp_path, options, code, named):
    with refused(code, *named, kind=UsageError):
        prune(PruneConfig(**options), str(tmp_path), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"pattern": "2;4"}, r"'2;4'.*N:M"),
        ({"calibration": "buildin"}, r"'buildin'.*'builtin'"),
        ({"samples": 0}, r"samples.*0"),
    ],
)
def test_wrong_values_are_refused_whatever_the_model_is(tmp_path, options, match):
    assert_refused(tmp_path, UsageError, match, model=tmp_path, config=options)


# The plan


def plan_of(family, row_file, tmp_path, **options):
    options.setdefault("calibration", str(row_file))
    source = options.pop("source", family("llama"))
    return plan(PruneConfig(**options), str(source), tmp_path / "out")


def test_plan_counts_what_prune_then_writes_and_writes_nothing(run, family, row_file, tmp_path):
    found = plan_of(family, row_file, tmp_path, skip=["k_proj"])
    assert list(tmp_path.iterdir()) == []
    report = run(family("llama"), skip=["k_proj"])
    assert found["zeros"] == report.entry.totals.zeros
    assert found["size"] == report.entry.totals.size
    assert found["weights"] == report.entry.totals.weights == 12
    assert found["blocks"] == 2
    assert found["skipped"] == report.entry.to_json()["skipped"]
    written = sum(file.stat().st_size for file in report.out.glob("*.safetensors"))
    assert found["bytes_to_write"] == written
    assert found["bytes_free"] > written
    assert (found["device"], found["dtype"]) == ("cpu", "float32")


def test_plan_makes_the_same_checks_as_prune(family, row_file, tmp_path):
    with refused("pattern-does-not-divide", "66", kind=UsageError):
        plan_of(family, row_file, tmp_path, source=family("llama_odd"))
    (tmp_path / "out").mkdir()
    with refused("output-exists", "/out", kind=UsageError):
        plan_of(family, row_file, tmp_path)


def test_peak_estimate_grows_with_rows_and_with_gram_matrices(family, row_file, tmp_path):
    def estimate(**options) -> int:
        return plan_of(family, row_file, tmp_path, **options)["peak_memory_estimate_bytes"]

    few, many = ({"calibration": "builtin", "samples": n, "length": 128} for n in (16, 64))
    one = estimate(**few)
    hidden = 16 * 128 * 32 * 4  # rows, tokens, hidden size, float32
    assert estimate(**many) - one == 3 * hidden
    block = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32 + 2 * 32)  # bfloat16 on disk
    assert one > hidden + 3 * block  # on disk and as float32
    grams = 4 * (32 * 32 + 64 * 64)
    assert estimate(**few, method="sparsegpt") >= one + grams
    # What one row makes: inputs and outputs of seven weights; and 256 sampled inputs.
    ends = (32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3
    row = (128 + 256) * 4 * ends
    assert estimate(calibration=None, method="magnitude") == one - hidden - row


def test_peak_estimate_does_not_grow_with_depth(family, row_file, tmp_path):
    """The memory that is needed is that of one block, not of the model."""
    found = plan_of(family, row_file, tmp_path, source=family("llama_deep"))
    size = Checkpoint.open(family("llama_deep")).n_bytes
    rows = 5 * 24 * 64 * 4  # the hidden states of the row file
    row = (24 + 256) * 4 * (128 * 2 + 96 * 2 + 320 * 3)
    assert found["peak_memory_estimate_bytes"] - rows - row - KEPT_BYTES < 1.5 * size


def test_peak_estimate_counts_the_rows_that_are_really_read(family, row_file, tmp_path):
    file, longer = (
        plan_of(family, row_file, tmp_path, **c)["peak_memory_estimate_bytes"]
        for c in ({}, {"calibration": "builtin", "samples": 5, "length": 25})
    )
    # One token more in each of five rows, and in all inputs and outputs of one row.
    assert longer - file == 5 * 32 * 4 + 4 * 512
    # 2048 tokens are asked for by default, the model takes 256.
    capped = plan_of(family, row_file, tmp_path, calibration=None, samples=5)
    most = plan_of(family, row_file, tmp_path, calibration=None, samples=5, length=256)
    assert capped["peak_memory_estimate_bytes"] == most["peak_memory_estimate_bytes"]


def test_dry_run_sees_that_a_model_to_sample_from_does_not_fit(family, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsekit.model.full_model.available_memory", lambda: 1000)
    config = PruneConfig(calibration="self")
    with refused("not-enough-memory", "'self'", "builtin", kind=DataError):
        plan(config, str(family("llama")), tmp_path / "out")


def test_dry_run_sees_a_missing_tokenizer_before_any_weight(family, tmp_path):
    with refused("no-tokenizer", kind=DataError):
        plan(PruneConfig(), str(family("llama_tied")), tmp_path / "out")


def test_interrupted_run_goes_on_when_the_model_has_moved(copy_of, row_file, tmp_path):
    source = copy_of("llama")
    config = PruneConfig(calibration=str(row_file))
    whole = weight_hashes(prune(config, str(source), tmp_path / "whole").out)

    class Stop(Recorder):
        def step(self, label: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(config, str(source), tmp_path / "out", progress=Stop())
    moved = source.rename(tmp_path / "moved")
    report = prune(config, str(moved), tmp_path / "out")
    assert report.entry.resumed_blocks == 1
    assert weight_hashes(report.out) == whole


def test_damping_that_is_raised_for_every_weight_is_told(family, tmp_path):
    """Four tokens for 32 inputs: the Gram matrix is singular without damping."""
    save_file({"tokens": torch.arange(4)[None]}, tmp_path / "rows.safetensors")
    config = PruneConfig(
        method="sparsegpt",
        option={"damping": "0"},
        calibration=str(tmp_path / "rows.safetensors"),
    )
    seen = Recorder()
    report = prune(config, str(family("llama")), tmp_path / "out", progress=seen)
    assert all(row["numbers"]["damping"] > 0 for row in report.entry.to_json()["weights"])
    assert seen.notes == [note for note in seen.notes if "14 weights needed their damping" in note]
    assert len(seen.notes) == 1


def test_float64_survivors_keep_all_of_their_digits(copy_of, tmp_path):
    source = copy_of("llama_tied")
    tensors = {k: v.double() / 3 for k, v in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    prune(PruneConfig(method="magnitude"), str(source), tmp_path / "out")
    for name, weight in tensors_in(tmp_path / "out").items():
        assert torch.equal(weight, torch.where(weight != 0, tensors[name], 0.0))


# What is told meanwhile


class Recorder:
    def __init__(self) -> None:
        self.begun: list[tuple[str, int]] = []
        self.steps: list[str] = []
        self.notes: list[str] = []

    def begin(self, title: str, total: int) -> None:
        self.begun.append((title, total))

    def step(self, label: str) -> None:
        self.steps.append(label)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def end(self) -> None:
        pass


def test_progress_names_the_method_and_every_block(family, row_file, tmp_path):
    seen = Recorder()
    config = PruneConfig(calibration=str(row_file))
    prune(config, str(family("llama")), tmp_path / "out", progress=seen)
    assert seen.begun == [("wanda 2:4", 2)]
    assert seen.steps == ["model.layers.0", "model.layers.1"]
    assert seen.notes == []


def test_reading_a_large_checkpoint_is_shown_weight_by_weight(family, monkeypatch):
    monkeypatch.setattr("sparsekit.checkpoint.checkpoint.QUIET_BYTES", 0)
    seen = Recorder()
    Checkpoint.open(family("llama")).scan(seen)
    names = list(Checkpoint.open(family("llama")).places)
    assert seen.begun[0] == ("read and check llama", len(names))
    assert seen.steps[: len(names)] == names


def test_capped_length_is_told_and_recorded(family, tmp_path):
    seen = Recorder()
    config = PruneConfig(samples=2, length=4000)
    report = prune(config, str(family("llama")), tmp_path / "out", progress=seen)
    note = "length capped at 256: the model's maximum"
    assert seen.notes == [note]
    assert report.entry.calibration.notes == (note,)
    assert report.entry.calibration.length == 256
