"""The README of each checkpoint that a stage writes, from its entry of the history."""

from collections.abc import Sequence
from fractions import Fraction
from typing import assert_never

from sparsekit import registry as methods
from sparsekit.checkpoint.entry import (
    ConvertEntry,
    Entry,
    PackEntry,
    PruneEntry,
    QuantizeEntry,
    RecoverEntry,
    UnpackEntry,
)
from sparsekit.checkpoint.entry_parts import (
    PackedTotals,
    PruneSettings,
    RecoverSettings,
    UnpackedTotals,
)
from sparsekit.provenance.front_matter import Origin, front_matter
from sparsekit.provenance.history import (
    base_name,
    calibration_text,
    command,
    stages_before,
    tags,
    training_text,
)

Rows = Sequence[tuple[str, str | None]]
# How each form is loaded, from its folder.
STOCK = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")"""
OWN = """\
import sparsekit

model = sparsekit.load(".")"""
PLAIN = """\
A plain Hugging Face checkpoint that loads with `AutoModelForCausalLM.from_pretrained`. Its zeros
are stored in dense weights, which take as much space and time as before. No common server runs
faster because of zeros; torch's 2:4 kernels may, on GPUs with large batches (`sparsekit deploy`
shows where)."""
ROUNDED = """\
A plain Hugging Face checkpoint of the same size as its source, whose weights are rounded to the
numbers of the grid: for scoring, or for a converter that takes it from there. It is neither
smaller nor faster than its source."""
PRODUCTS = """\
A plain Hugging Face checkpoint that loads with `AutoModelForCausalLM.from_pretrained`. Its pruned
weights are put together from factors: a sparse core with block-diagonal or low-rank matrices.
**They are not sparse themselves**, and take the space and time of dense ones. The factors are in
`sparsekit-factors.safetensors`."""
CODED = """\
A Hugging Face checkpoint in the format of compressed-tensors: it loads with
`AutoModelForCausalLM.from_pretrained` where that package is installed, and in vLLM, which has
kernels for such grids; transformers expands the weights in memory and is not faster. Pruned
weights are exact zeros; they make it neither smaller nor faster than other weights on this grid."""
FACTORED = """\
Not a plain checkpoint: each pruned weight is kept as factors, a packed sparse core with
block-diagonal or low-rank matrices. `sparsekit.load` and `sparsekit eval` run them product by
product; `AutoModelForCausalLM.from_pretrained` finds no weights and says so. It is smaller on
disk and in memory; no server runs it, and nothing runs faster because of it."""
PACKED = """\
Not a plain checkpoint: each sparse weight is kept as its values and their places, or as factors.
`sparsekit.load` and `sparsekit eval` run it; `sparsekit unpack` gives every tensor back;
after `import sparsekit.hf` `AutoModelForCausalLM.from_pretrained` loads it too, and without that it
finds no weights and says so. It saves space and costs time: each layer unpacks its weight
whenever it is called."""
HISTORY = "The whole history, with one row for each weight, is in `sparsekit.json`."
LOG = " The log of\ntraining is in `sparsekit-training.jsonl`."


def model_card(entry: Entry, origin: Origin, history: Sequence[Entry]) -> str:
    """The README of a checkpoint: what it is, how it is loaded, how it was made.

    Args:
        entry: Of the stage that made it.
        origin: The model that the stage began with.
        history: The entries before.
    """
    entries = [*history, entry]
    rows = [
        *stages_before(entries),
        *_rows(entry),
        ("made with", ", ".join(f"{name} {v}" for name, v in entry.versions.items())),
    ]
    table = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows if value)
    form = _form(entry)
    library = None if form == FACTORED else "transformers"
    return f"""{front_matter(origin, tags(entries), library)}
# {_line(origin.title)}, {_done(entry)}

{form}

```python
{OWN if form in (FACTORED, PACKED) else STOCK}
```

| | |
|---|---|
{table}

Made by:

```sh
{command(entry, public=True)}
```

{_end(entry)}
"""


def _form(entry: Entry) -> str:
    """The paragraph on what the checkpoint is."""
    settings = entry.settings
    match entry:
        case PackEntry():
            return PACKED
        case ConvertEntry():
            return CODED if entry.quantized else PLAIN
        case QuantizeEntry():
            return ROUNDED if settings.format == "dense" else CODED
        case UnpackEntry():
            product = PRODUCTS if entry.totals.products else PLAIN
            return CODED if settings.grid else product
        case PruneEntry() if entry.settings.then:
            return CODED
        case _ if entry.totals.bits_per_weight is None:
            return PLAIN
        case _:
            return FACTORED if settings.format == "factored" else PRODUCTS


def _done(entry: Entry) -> str:
    """The stage, for the heading."""
    match entry:
        case PruneEntry():
            return f"pruned to {entry.settings.pattern}"
        case RecoverEntry():
            return f"trained at {entry.settings.pattern}"
        case QuantizeEntry():
            return f"quantized to {entry.settings.grid}"
        case _:
            return f"{entry.stage}ed"


def _end(entry: Entry) -> str:
    """The end of the card: where the rest is recorded, and which weights were left out."""
    text = HISTORY + (LOG if isinstance(entry, RecoverEntry) else "")
    if isinstance(entry, PruneEntry | RecoverEntry):
        text += " Check the zeros with\n`sparsekit verify .`."
    if entry.skipped is None:
        return text
    skipped = "".join(f"\n- `{row.name}`: {row.reason}" for row in entry.skipped)
    return f"{text}\n\nMatrices left as they were:{skipped or ' none'}"


def _prune_rows(entry: PruneEntry) -> Rows:
    settings, totals, rows = entry.settings, entry.totals, entry.calibration
    bits = totals.bits_per_weight
    zero = f"{totals.sparsity:.2%} of {'them' if bits is None else 'their cores'} zero"
    return [
        ("method", f"{settings.method} {settings.options or ''}".strip()),
        *_asked(settings),
        ("pattern", settings.pattern),
        ("pruned", f"{totals.weights} linear weights, {zero}"),
        ("calibration", calibration_text(rows) if rows else "none (the method needs no data)"),
        ("bits of a pruned weight as factors", None if bits is None else f"{bits:.2f}"),
        ("mean relative output error", _error(totals.mean_error)),
    ]


def _asked(settings: PruneSettings) -> list[tuple[str, str]]:
    """The options of a run besides its method, without those left out."""
    budget, rank = settings.budget, settings.compensate
    options = {
        "begun with": settings.initial_options,
        "reconstruction": settings.reconstruct,
        "allocation of zeros": settings.allocate,
        "rank of the compensation": rank != "0" and f"{float(Fraction(rank)):.3g} of a side",
        "time limit": budget and f"{budget:g} s",
        "kept weights are on the grid": settings.then,
    }
    return [(name, str(value)) for name, value in options.items() if value and value != "none"]


def _recover_rows(entry: RecoverEntry) -> Rows:
    settings, totals, plan = entry.settings, entry.totals, entry.plan
    kept, largest = entry.kept_mass, f"{settings.teacher_top} largest probabilities"
    flipped = sum(row.flipped for row in entry.weights)
    moved = entry.finished.moved
    loss = "CE"
    if plan.share and entry.teacher:
        loss = f"{plan.share:.2f} KL from `{base_name(entry.teacher.path)}`, rest CE"
    by_input = settings.metric != "magnitude"
    return [
        ("method", f"{settings.method} {_own_options(settings)}".strip()),
        ("decay", f"{plan.decay:.3g}" if plan.decay else None),
        ("pattern", settings.pattern),
        ("kept by", "|w| times the norm of its input" if by_input else None),
        ("sparse", f"{totals.weights} linear weights, {totals.sparsity:.2%} of them zero"),
        ("trained on", training_text(entry)),
        ("evaluated on the way on", entry.evaluated_on),
        ("steps", f"{plan.steps} of {entry.tokens // plan.steps} tokens"),
        ("learning rate", f"{plan.rate:g}, {settings.schedule}"),
        ("loss", loss),
        ("multiplied in", "bfloat16" if settings.mixed_precision == "bf16" else None),
        ("of the teacher", None if kept is None else f"{largest}, {kept:.2%} of its mass"),
        ("entries that changed sides", f"{flipped / totals.size:.4%}"),
        (
            "last hidden states, moved by leaving out what is off the masks",
            None if moved is None else f"{moved:.2%}",
        ),
        ("inputs of a span of the branches", settings.slorb and str(settings.slorb)),
    ]


def _own_options(settings: RecoverSettings) -> str:
    """The options that a recoverer has, except the decay, which is shown as it was chosen."""
    described = methods.describe("recoverers", settings.method).options
    names = [option.name for option in described if option.name != "decay"]
    options = settings.options
    words = [f"{n}={methods.as_text(options[n])}" for n in names if n in options]
    return f"({', '.join(words)})" if words else ""


def _quantize_rows(entry: QuantizeEntry) -> Rows:
    settings, totals, rows = entry.settings, entry.totals, entry.calibration
    return [
        ("method", f"{settings.method} {settings.options or ''}".strip()),
        ("grid", settings.grid),
        ("quantized", f"{totals.weights} linear weights"),
        ("bits of such a weight on disk", f"{totals.bits_per_weight:.2f}"),
        (
            "zeros",
            f"{totals.zeros / totals.size:.2%}, "
            f"{totals.zeros_before / totals.size:.2%} before; none was given a value",
        ),
        ("calibration", calibration_text(rows) if rows else "none"),
        ("mean relative output error", _error(totals.mean_error)),
    ]


def _pack_rows(entry: PackEntry) -> Rows:
    totals = entry.totals
    return [
        ("packed weights", str(totals.weights)),
        ("zeros in them", f"{totals.zeros / totals.size:.2%}"),
        ("bits of such a weight", f"{totals.bits_per_weight:.3f}"),
        _bytes(totals),
    ]


def _unpack_rows(entry: UnpackEntry) -> Rows:
    return [("unpacked weights", str(entry.totals.weights)), _bytes(entry.totals)]


def _convert_rows(entry: ConvertEntry) -> Rows:
    settings, totals = entry.settings, entry.totals
    return [
        ("form before", settings.form),
        ("pattern", settings.pattern or "none that all weights have"),
        ("converted weights", str(totals.weights)),
        ("zeros in them", f"{totals.zeros / totals.size:.2%}"),
    ]


def _rows(entry: Entry) -> Rows:
    """The rows of the card's table that are of one stage alone; None is left out."""
    match entry:
        case PruneEntry():
            return _prune_rows(entry)
        case RecoverEntry():
            return _recover_rows(entry)
        case QuantizeEntry():
            return _quantize_rows(entry)
        case PackEntry():
            return _pack_rows(entry)
        case UnpackEntry():
            return _unpack_rows(entry)
        case ConvertEntry():
            return _convert_rows(entry)
        case _:
            assert_never(entry)


def _bytes(totals: PackedTotals | UnpackedTotals) -> tuple[str, str]:
    return "bytes", f"{totals.bytes:,} ({totals.bytes_before:,} before)"


def _error(error: float | None) -> str:
    return "not measured" if error is None else f"{error:.4f}"


def _line(text: str) -> str:
    """A text without what would end its line, as the name of a folder may."""
    return " ".join(text.split())


def _cell(text: str) -> str:
    """A text that stays in one cell of a table."""
    return _line(text).replace("|", "\\|")
