"""The commands that make and score a model again, with the words that its history recorded."""

import shlex

from sparsekit.checkpoint.entry import Entry
from sparsekit.provenance.history import command, lineage
from sparsekit.reporting.model_row import Row
from sparsekit.scoring.config import EvalConfig
from sparsekit.scoring.score_entry import ScoreEntry


def commands(row: Row) -> list[str]:
    """A line for each stage of a model, and for each time that it was scored.

    One more packs what a stage unpacks. Stages before the last write to numbered folders, whatever
    they wrote to at the time.
    """
    history = lineage(row.history)
    name, lines, model = row.path.resolve().name, [], ""
    for index, entry in enumerate(history):
        out = name if index == len(history) - 1 else f"{name}-{index + 1}"
        if model and _packed_before(entry, history[index - 1]):
            lines.append(shlex.join(["sparsekit", "pack", model, "-o", f"{model}-packed"]))
            model = f"{model}-packed"
        lines.append(command(entry, model, out))
        model = out
    for entry in row.scores:
        words = _score(entry, model or entry.model or name)
        # `eval` keeps scores only with a model that sparsekit wrote.
        lines.append(shlex.join([*words, *(["--save"] if row.history else [])]))
    return lines


def _packed_before(entry: Entry, last: Entry) -> bool:
    """Whether a stage unpacks what `pack` wrote: `unpack` takes that out of the history.

    Args:
        entry: Of the stage.
        last: Of the one before; what it wrote as factors alone was unpacked as it is.
    """
    return entry.stage == "unpack" and last.settings.format != "factored"


def _score(entry: ScoreEntry, model: str) -> list[str]:
    """The words that score a model."""
    options = entry.config or {}
    words = ["sparsekit", "eval", model]
    if entry.baseline:
        words += ["--baseline", entry.baseline]
    for name, default in EvalConfig.defaults().items():
        value = options.get(name)
        if value is None or value == default or value == []:
            continue
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        words += [f"--{name.replace('_', '-')}", text]
    return words
