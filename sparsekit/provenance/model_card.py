"""The README of each checkpoint that a stage writes, from its entry of the history."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from sparsekit import registry as methods
from sparsekit.provenance.front_matter import Origin, front_matter
from sparsekit.provenance.history import (
    base_name,
    calibration_text,
    stages_before,
    tags,
    training_text,
)

WEIGHTS = "The whole history, with one row for each weight, is in `sparsekit.json`."
Entry = Mapping[str, Any]
# How each form is loaded, from its folder.
STOCK = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")"""
OWN = """\
import sparsekit

model = sparsekit.load(".")"""
PLAIN = """\
A plain Hugging Face checkpoint of the same size as its source: the pruned weights are exact
zeros in dense tensors. It loads with `AutoModelForCausalLM.from_pretrained`. No common server
runs faster because of the zeros; torch's 2:4 kernels may, on GPUs with large batches
(`sparsekit deploy` tells where)."""
PRODUCTS = """\
A plain Hugging Face checkpoint that loads with `AutoModelForCausalLM.from_pretrained`. Its pruned
weights are put together from factors: a sparse core with block-diagonal or low-rank matrices.
**They are not sparse themselves**, and take the space and time of dense ones. The factors lie in
`sparsekit-factors.safetensors`."""
FACTORED = """\
Not a plain checkpoint: each pruned weight is kept as factors, a packed sparse core with
block-diagonal or low-rank matrices. `sparsekit.load` and `sparsekit eval` run them product by
product; `AutoModelForCausalLM.from_pretrained` finds no weights and says so. It is smaller on
disk and in memory; no server runs it, and nothing runs faster because of it."""
CODED = """\
A Hugging Face checkpoint in the format of compressed-tensors: it loads with
`AutoModelForCausalLM.from_pretrained` where that package is installed, and in vLLM, which has
kernels for such grids; transformers expands the weights in memory and is not faster. Pruned
weights are exact zeros; they make it neither smaller nor faster than other weights on this grid."""
PACKED = """\
Not a plain checkpoint: each sparse weight is kept as its values and their places, or as factors.
`sparsekit.load` and `sparsekit eval` run it; `sparsekit unpack` gives every tensor back;
after `import sparsekit` `AutoModelForCausalLM.from_pretrained` loads it too, and without that it
finds no weights and says so. It saves space and costs time: each layer unpacks its weight
whenever it is called."""
UNPACKED = """\
A Hugging Face checkpoint that loads with `AutoModelForCausalLM.from_pretrained`, unpacked from a
smaller form of it. It takes the space and time that it took before it was packed. No common server
runs faster because of zeros; torch's 2:4 kernels may, on GPUs with large batches (`sparsekit
deploy` tells where)."""
CONVERTED = """\
A Hugging Face checkpoint with dense weights, converted from a form that no library reads any more.
It takes the space and time of dense weights: no common server runs faster because of zeros."""
ROUNDED = """\
A plain Hugging Face checkpoint of the same size as its source, whose weights are rounded to the
numbers of the grid: for scoring, or for a converter that takes it from there. It is neither
smaller nor faster than its source."""


def _what_it_is(form: str, bits: float | None, grid: str | None = None) -> str:
    """The first paragraph of the card."""
    if grid is not None:
        return CODED
    if bits is None:
        return PLAIN
    return FACTORED if form == "factored" else PRODUCTS


def _asked(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a run was asked for besides its method, without what was left out."""
    budget, rank = recipe["budget"], recipe["compensate"]
    told = {
        "begun with": recipe.get("initial_options"),
        "reconstruction": recipe["reconstruct"],
        "allocation of zeros": recipe["allocate"],
        "rank of the compensation": rank != "0" and f"{float(Fraction(rank)):.3g} of a side",
        "time limit": budget and f"{budget:g} s",
        "kept weights are on the grid": recipe["then"],
    }
    return [(name, str(value)) for name, value in told.items() if value and value != "none"]


def model_card(entry: Entry, origin: Origin, history: Sequence[Entry]) -> str:
    """The README of a pruned checkpoint."""
    recipe, summary = entry["recipe"], entry["totals"]
    error, bits = summary["mean_error"], summary["bits_per_weight"]
    calibration = entry["calibration"]
    text = calibration_text(calibration) if calibration else "none (the method needs no data)"
    counted = "them" if bits is None else "their cores"
    rows = [
        ("method", f"{recipe['method']} {recipe['options'] or ''}".strip()),
        *_asked(recipe),
        ("pattern", recipe["pattern"]),
        (
            "pruned",
            f"{summary['weights']} linear weights, {summary['sparsity']:.2%} of {counted} zero",
        ),
        ("calibration", text),
        ("bits of a pruned weight as factors", "-" if bits is None else f"{bits:.2f}"),
        ("mean relative output error", "not measured" if error is None else f"{error:.4f}"),
    ]
    skipped = "".join(f"\n- `{row['name']}`: {row['reason']}" for row in entry["skipped"])
    return _card(
        [*history, entry],
        origin,
        done=f"pruned to {recipe['pattern']}",
        text=_what_it_is(recipe["format"], bits, recipe["then"]),
        rows=rows,
        end=f"{WEIGHTS} Check the zeros with\n`sparsekit verify .`.\n\n"
        f"Matrices left dense:{skipped or ' none'}",
    )


def recover_card(entry: Entry, origin: Origin, history: Sequence[Entry]) -> str:
    """The README of a trained checkpoint."""
    recipe, summary, plan = entry["recipe"], entry["totals"], entry["plan"]
    kept, largest = entry["kept_mass"], f"{recipe['teacher_top']} largest probabilities"
    flipped = sum(row["flipped"] for row in entry["weights"])
    moved = entry["finished"].get("moved")
    loss = "CE"
    if plan["share"]:
        loss = f"{plan['share']:.2f} KL from `{base_name(entry['teacher']['path'])}`, rest CE"
    rows = [
        ("method", f"{recipe['method']} {_own_options(recipe)}".strip()),
        ("decay", f"{plan['decay']:.3g}" if plan.get("decay") else "-"),
        ("pattern", recipe["pattern"]),
        ("kept by", "-" if recipe["metric"] == "magnitude" else "|w| times the norm of its input"),
        ("sparse", f"{summary['weights']} linear weights, {summary['sparsity']:.2%} of them zero"),
        ("trained on", training_text(entry)),
        ("evaluated on the way on", entry["evaluated_on"] or "-"),
        ("steps", f"{plan['steps']} of {entry['tokens'] // plan['steps']} tokens"),
        ("learning rate", f"{plan['rate']:g}, {recipe['schedule']}"),
        ("loss", loss),
        ("multiplied in", "bfloat16" if recipe.get("mixed_precision") == "bf16" else "-"),
        ("of the teacher", "-" if kept is None else f"{largest}, {kept:.2%} of its mass"),
        ("entries that changed sides", f"{flipped / summary['size']:.4%}"),
        (
            "last hidden states, moved by leaving out what is off the masks",
            "-" if moved is None else f"{moved:.2%}",
        ),
        ("inputs of a span of the branches", str(recipe["slorb"] or "-")),
    ]
    return _card(
        [*history, entry],
        origin,
        done=f"trained at {recipe['pattern']}",
        text=_what_it_is(recipe["format"], summary["bits_per_weight"]),
        rows=[(name, value) for name, value in rows if value != "-"],
        end="The whole history, with one row for each weight, is in `sparsekit.json`; the log of "
        "training is in\n`sparsekit-training.jsonl`. Check the zeros with `sparsekit verify .`.",
    )


def _own_options(recipe: Mapping[str, Any]) -> str:
    """The options that a recoverer has, but for the decay, which is told as it was chosen."""
    names = [option.name for option in methods.describe("recoverers", recipe["method"]).options]
    told = [f"{n}={recipe['options'][n]}" for n in names if n in recipe["options"] and n != "decay"]
    return f"({', '.join(told)})" if told else ""


def quantize_card(entry: Entry, origin: Origin, history: Sequence[Entry]) -> str:
    """The README of a quantized checkpoint."""
    recipe, summary, calibration = entry["recipe"], entry["totals"], entry["calibration"]
    error = summary["mean_error"]
    dense = recipe["format"] == "dense"
    rows = [
        ("method", f"{recipe['method']} {recipe['options'] or ''}".strip()),
        ("grid", recipe["grid"]),
        ("quantized", f"{summary['weights']} linear weights"),
        ("bits of such a weight on disk", f"{summary['bits_per_weight']:.2f}"),
        (
            "zeros",
            f"{summary['zeros'] / summary['size']:.2%}, "
            f"{summary['zeros_before'] / summary['size']:.2%} before; none was given a value",
        ),
        ("calibration", calibration_text(calibration) if calibration else "none"),
        ("mean relative output error", "not measured" if error is None else f"{error:.4f}"),
    ]
    skipped = "".join(f"\n- `{row['name']}`: {row['reason']}" for row in entry["skipped"])
    return _card(
        [*history, entry],
        origin,
        done=f"quantized to {recipe['grid']}",
        text=ROUNDED if dense else CODED,
        rows=rows,
        end=f"{WEIGHTS}\n\nMatrices left as they were:{skipped or ' none'}",
    )


def unpack_card(entry: Entry, origin: Origin, history: Sequence[Entry]) -> str:
    """The README of a checkpoint that was unpacked."""
    summary = entry["totals"]
    rows = [
        ("unpacked weights", str(summary["weights"])),
        ("bytes", f"{summary['bytes']:,} ({summary['bytes_before']:,} before)"),
    ]
    text = PRODUCTS if summary["products"] else UNPACKED
    text = CODED if entry["recipe"].get("grid") else text
    return _card([*history, entry], origin, done="unpacked", text=text, rows=rows)


def pack_card(entry: Entry, origin: Origin, history: Sequence[Entry]) -> str:
    """The README of a packed checkpoint."""
    summary = entry["totals"]
    rows = [
        ("packed weights", str(summary["weights"])),
        ("zeros in them", f"{summary['zeros'] / summary['size']:.2%}"),
        ("bits of such a weight", f"{summary['bits_per_weight']:.3f}"),
        ("bytes", f"{summary['bytes']:,} ({summary['bytes_before']:,} before)"),
    ]
    return _card([*history, entry], origin, done="packed", text=PACKED, rows=rows)


def convert_card(entry: Entry, origin: Origin, history: Sequence[Entry]) -> str:
    """The README of a converted checkpoint."""
    summary = entry["totals"]
    rows = [
        ("form before", entry["recipe"]["form"]),
        ("pattern", entry["recipe"].get("pattern", "none that all weights have")),
        ("converted weights", str(summary["weights"])),
        ("zeros in them", f"{summary['zeros'] / summary['size']:.2%}"),
    ]
    return _card(
        [*history, entry],
        origin,
        done="converted",
        text=CODED if entry["quantized"] else CONVERTED,
        rows=rows,
    )


def _card(
    entries: Sequence[Entry],
    origin: Origin,
    *,
    done: str,
    text: str,
    rows: Sequence[tuple[str, str]],
    end: str = "The whole history is in `sparsekit.json`.",
) -> str:
    """A README: what the checkpoint is, how it is loaded, how it was made.

    Args:
        entries: Of the whole history; the last is that of this stage.
        origin: What the stage began with.
        done: What it did, for the heading.
        text: What the checkpoint is.
        rows: What is told of the stage.
        end: What stands last.
    """
    versions = entries[-1]["versions"].items()
    made_with = ", ".join(f"{name} {version}" for name, version in versions)
    told = (*stages_before(entries), *rows, ("made with", made_with))
    table = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in told)
    library = None if text == FACTORED else "transformers"
    return f"""{front_matter(origin, tags(entries), library)}
# {_line(origin.title)}, {done}

{text}

```python
{OWN if text in (FACTORED, PACKED) else STOCK}
```

| | |
|---|---|
{table}

{end}
"""


def _line(text: str) -> str:
    """A text without what would end its line, as the name of a folder may."""
    return " ".join(text.split())


def _cell(text: str) -> str:
    """A text that stays in one cell of a table."""
    return _line(text).replace("|", "\\|")
