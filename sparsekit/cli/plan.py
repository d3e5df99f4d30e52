"""Plan of a dry run."""

from collections.abc import Mapping, Sequence
from typing import Any

from sparsekit.cli.console import Terminal


def show_plan(terminal: Terminal, plan: dict[str, Any]) -> None:
    """Show a plan; stdout stays empty without --json."""
    settings = (plan.get(key) for key in ("method", "pattern", "then", "grid"))
    weights = str(plan["weights"]) + (f" in {plan['blocks']} blocks" if "blocks" in plan else "")
    rows = [
        ("model", plan["model"]),
        ("output", plan["out"]),
        ("method", ", ".join(filter(None, settings))),
        ("weights", weights),
        *_more(plan),
        ("to write", _written(plan)),
        *_memory(plan),
        *_time(plan),
        *([("compute", _computed(plan))] if "dtype" in plan else []),
        *(("left dense", f"{row['name']}: {row['reason']}") for row in plan["skipped"]),
    ]
    for note in plan["notes"]:
        terminal.note(note)
    terminal.table("plan (nothing was written)", ("", ""), rows)
    if terminal.json:
        terminal.result("", plan)


def _computed(plan: Mapping[str, Any]) -> str:
    """Compute type and device."""
    mixed = plan.get("mixed_precision") == "bf16"
    dtype = f"{plan['dtype']}, products in bfloat16," if mixed else plan["dtype"]
    return f"{dtype} on {plan['device']}"


def plan_costs(plan: Mapping[str, Any] | None, ahead: int | None) -> tuple[str | None, str | None]:
    """Bytes to write and memory above the libraries of a recipe's step; `ahead` without a plan."""
    if plan is None:
        return None, f"{_size(ahead)} and more" if ahead is not None else None
    memory = plan.get("peak_memory_estimate_bytes")
    shown = _size(memory) if memory else f"{_size(plan['peak_memory_at_least_bytes'])} and more"
    return _size(plan["bytes_to_write"]), shown


def plans_together(plans: Sequence[Mapping[str, Any]]) -> tuple[str | None, str, str]:
    """Seconds, bytes to write and largest memory of several steps."""
    times = [plan.get("seconds_estimate") for plan in plans]
    known = [seconds for seconds in times if seconds is not None]
    more = " and more" if len(known) < len(times) else ""  # packing has no estimate
    time = f"about {sum(known):.0f}{more}" if known else None
    least = "peak_memory_at_least_bytes"
    most = max(plan.get("peak_memory_estimate_bytes", plan.get(least, 0)) for plan in plans)
    open_ended = any(least in plan for plan in plans)
    memory = f"{_size(most)} {'and more' if open_ended else 'at most'}"
    return time, _size(sum(plan["bytes_to_write"] for plan in plans)), memory


def _more(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows that only some commands have."""
    rows = []
    if "zeros" in plan:
        rows.append(("zeros", f"{plan['zeros']:,} of {plan['size']:,}"))
    if "patterns" in plan:
        counts = (f"{count} of {pattern}" for pattern, count in plan["patterns"].items())
        rows.append(("found", ", ".join(counts)))
    if plan.get("bits_per_weight") is not None:
        rows.append(("factors", f"{plan['bits_per_weight']:.2f} bits per weight"))
    if "step_tokens" in plan:
        rows.append(("teacher", plan["teacher"] or "none"))
        steps = "as many as the time allows" if plan["steps"] is None else f"{plan['steps']:,}"
        rows.append(("steps", f"{steps}, of {plan['step_tokens']:,} tokens of {plan['data']}"))
    return rows


def _written(plan: dict[str, Any]) -> str:
    """Bytes of the output, and of the saved states until it is complete."""
    text = f"{_size(plan['bytes_to_write'])} of {_size(plan['bytes_free'])} free"
    if "bytes_before" in plan:
        text += f", instead of {_size(plan['bytes_before'])}"
    if "state_bytes" in plan:
        text += f", and up to {_size(plan['state_bytes'])} of saved states until it is complete"
    return text


def _memory(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """Memory of the run; for training, that of weights and that of a batch."""
    if "peak_memory_at_least_bytes" in plan:
        least = _size(plan["peak_memory_at_least_bytes"])
        batch = _size(plan["activation_bytes_estimate"])
        return [("memory", f"{least} above the libraries, plus about {batch} for a batch")]
    return [("peak memory", f"{_size(plan['peak_memory_estimate_bytes'])} above the libraries")]


def _time(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """Duration of the run, if it was estimated."""
    seconds = plan.get("seconds_estimate")
    if seconds is None:
        return []
    minutes = f" ({seconds / 60:.1f} min)" if seconds >= 60 else ""
    return [("time", f"about {seconds:.0f} s{minutes} on this machine in its present state")]


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB"
