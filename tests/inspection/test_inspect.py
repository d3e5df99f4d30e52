"""What `inspect` counts and what `verify` refuses."""

import pytest
from refusals import refused
from safetensors.torch import load_file, save_file

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.errors import CheckFailedError, DataError, PatternError, UsageError
from sparsekit.inspection.inspect import inspect
from sparsekit.inspection.verify import verify
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.prune import prune

WEIGHTS = "model.safetensors"
SIZES = {"q_proj": 1024, "k_proj": 512, "v_proj": 512, "o_proj": 1024} | dict.fromkeys(
    ("gate_proj", "up_proj", "down_proj"), 2048
)


def magnitude(source, out, **options):
    return prune(PruneConfig(method="magnitude", **options), str(source), out).out


def edit(folder, change):
    """Change the tensors of a folder and drop its history."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / "sparsekit.json").unlink(missing_ok=True)
    return folder


def test_dense_checkpoint_is_dense(family):
    found = inspect(family("llama"))
    assert found.total == {
        "name": "total", "size": 2 * sum(SIZES.values()), "zeros": 0, "sparsity": 0.0,
        "pattern": "dense",
    }  # fmt: skip
    assert not found.history
    assert found.fingerprint is None
    assert found.n_bytes == (family("llama") / WEIGHTS).stat().st_size


@pytest.mark.parametrize(
    ("asked", "found", "share"),
    [
        ("2:4", "2:4", 0.5),
        ("1:4", "1:4", 0.75),
        ("4:8", "4:8", 0.5),
        ("8:16", "8:16", 0.5),
        ("50%", "unstructured", 0.5),
        ("25%/tensor", "unstructured", 0.25),
    ],
)
def test_strictest_common_pattern_is_found(family, tmp_path, asked, found, share):
    report = inspect(magnitude(family("llama"), tmp_path / "out", pattern=asked))
    assert (report.total["pattern"], report.total["sparsity"]) == (found, share)


@pytest.mark.parametrize("pattern", ["6:8", "2:16", "1:8"])
def test_pattern_of_the_history_is_found_again(family, tmp_path, pattern):
    config = PruneConfig(method="magnitude", pattern=pattern)
    out = prune(config, str(family("llama")), tmp_path / "out").out
    assert inspect(str(out)).total["pattern"] == pattern


def test_blocks_and_types_are_counted_apart(family, tmp_path):
    out = magnitude(family("llama"), tmp_path / "out", skip=["layers.0", "o_proj", "mlp.up_proj"])
    report = inspect(out)
    first, second = report.blocks
    assert (first["name"], first["pattern"], first["zeros"]) == ("model.layers.0", "dense", 0)
    zeros = (sum(SIZES.values()) - SIZES["o_proj"] - SIZES["up_proj"]) // 2
    assert (second["name"], second["pattern"], second["zeros"]) == (
        "model.layers.1", "unstructured", zeros,
    )  # fmt: skip
    types = {row["name"].rpartition(".")[2]: row for row in report.types}
    assert {name: row["size"] for name, row in types.items()} == {
        name: 2 * size for name, size in SIZES.items()
    }
    for name, row in types.items():
        left = name in ("o_proj", "up_proj")
        assert row["sparsity"] == (0 if left else 0.25)
        assert row["pattern"] == ("dense" if left else "unstructured")
    assert report.total["zeros"] == zeros
    assert report.history[0].settings.method == "magnitude"
    assert report.fingerprint == Checkpoint.open(out).scan()


def test_gpt2_is_read_along_its_inputs(family, tmp_path):
    out = magnitude(family("gpt2"), tmp_path / "out")
    assert inspect(out).total["pattern"] == "2:4"
    assert verify(out)["weights"] == 8
    # The transposed check would find no pattern: on disk the groups run down the columns.
    disk = {k: v for f in out.glob("*.safetensors") for k, v in load_file(f).items()}
    stored = disk["transformer.h.0.mlp.c_fc.weight"]
    assert not ((stored != 0).view(stored.shape[0], -1, 4).sum(-1) <= 2).all()


def test_verify_takes_pattern_and_weights_from_the_history(family, tmp_path):
    out = magnitude(family("llama"), tmp_path / "out", pattern="4:8", skip=["o_proj"])
    found = verify(out)
    assert found["pattern"] == ["4:8"]
    assert found["weights"] == 12
    assert found["zeros"] * 2 == found["size"]
    assert found["tensors"] == len(Checkpoint.open(out).places)
    assert found["fingerprint"] == Checkpoint.open(out).scan()
    # Weights that were left dense on purpose are not asked for the pattern.
    assert verify(out, "4:8")["weights"] == 12
    with refused("pattern-violated", "2:4", kind=PatternError):
        verify(out, "2:4")


def test_verify_without_a_history_checks_every_linear_weight(copy_of, pruned):
    folder = edit(copy_of(pruned), lambda tensors: None)
    assert verify(folder, "2:4")["weights"] == 14
    with refused("no-history", folder, "--pattern 2:4", kind=UsageError):
        verify(folder)


def test_latest_pattern_of_a_weight_counts(family, tmp_path):
    first = magnitude(family("llama"), tmp_path / "first", pattern="1:4")
    second = magnitude(first, tmp_path / "second", pattern="2:4", skip=["mlp"])
    found = verify(second)
    assert found["weights"] == 14
    assert found["pattern"] == ["1:4", "2:4"]


@pytest.mark.parametrize("pattern", ["50%", "50%/tensor"])
def test_verify_of_shares_counts_rows_or_the_tensor(family, tmp_path, pattern):
    out = magnitude(family("llama_tied"), tmp_path / "out", pattern=pattern)
    assert verify(out)["zeros"] == sum(SIZES.values())
    name = "model.layers.1.mlp.gate_proj.weight"

    def fill(tensors) -> None:
        weight = tensors[name]
        row, column = (weight == 0).nonzero()[-1].tolist()
        weight[row, column] = 1

    edit(out, fill)
    with refused("pattern-violated", name, pattern, kind=PatternError):
        verify(out, pattern)


def test_first_offender_is_the_first_in_the_models_order(copy_of, pruned):
    def fill(tensors) -> None:
        for name in ("1.mlp.down_proj", "1.self_attn.k_proj", "0.mlp.gate_proj"):
            tensors[f"model.layers.{name}.weight"][5, :4] = 1

    with refused(
        "pattern-violated", "model.layers.0.mlp.gate_proj.weight", "row 5", kind=PatternError
    ):
        verify(edit(copy_of(pruned), fill), "2:4")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_any_tensor_that_is_not_finite_is_an_offender(copy_of, pruned, name, value):
    folder = edit(copy_of(pruned), lambda tensors: tensors[name].view(-1)[1].fill_(value))
    with refused("not-finite", name, kind=CheckFailedError):
        verify(folder, "2:4")


def test_negative_zero_is_an_offender_with_its_place(copy_of, pruned):
    name = "model.layers.1.self_attn.v_proj.weight"
    places = []

    def change(tensors) -> None:
        row, column = (tensors[name] == 0).nonzero()[7].tolist()
        tensors[name][row, column] = -0.0
        places.append((row, column))

    folder = edit(copy_of(pruned), change)
    ((row, column),) = places
    with refused("negative-zero", f"{name}: row {row}, input {column}", kind=CheckFailedError):
        verify(folder, "2:4")


def test_negative_zero_of_a_source_does_not_survive_pruning(copy_of, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"

    def change(tensors) -> None:
        tensors[name][:, :3] = -0.0

    out = magnitude(edit(copy_of("llama"), change), tmp_path / "out")
    weight = load_file(out / WEIGHTS)[name]
    assert not (weight.signbit() & (weight == 0)).any()
    assert verify(out)["weights"] == 14


def test_damaged_output_is_an_offender_and_not_merely_unreadable(copy_of, pruned):
    folder = copy_of(pruned)
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    with refused("fingerprint-mismatch", kind=CheckFailedError):
        verify(folder)


def test_tied_weights_that_differ_are_an_offender(copy_of, tmp_path):
    out = magnitude(copy_of("llama_tied"), tmp_path / "out")

    def untie(tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][0, 0] += 1

    with refused("tied-weights-differ", "lm_head.weight", kind=CheckFailedError):
        verify(edit(out, untie), "2:4")


def test_mixture_of_experts_is_refused_here_too(family):
    with refused("unsupported-model", "mixtral", kind=DataError):
        inspect(family("mixtral"))


def test_progress_counts_the_blocks(family):
    class Recorder:
        def __init__(self):
            self.steps = []

        def begin(self, title, total):
            self.begun = (title, total)

        def step(self, label):
            self.steps.append(label)

        def note(self, text):
            raise AssertionError(text)

        def end(self):
            self.ended = True

    seen = Recorder()
    inspect(family("gemma3"), seen)
    assert seen.begun == ("inspect", 3)
    assert seen.steps == [f"model.layers.{i}" for i in range(3)]
    assert seen.ended
