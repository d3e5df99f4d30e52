"""How the reports of `bench` look, in the same way."""

from typing import Any

from sparsekit.cli.console import Terminal


def show_inference(terminal: Terminal, result: dict[str, Any]) -> None:
    """What loading and running took; stdout has a line for each model, with tokens a second."""
    memory = {"resident_bytes": "MB resident", "peak_bytes": "MB peak"}
    if result["device"] == "cuda":
        memory |= {"device_bytes": "MB on the GPU", "device_peak_bytes": "MB peak there"}
    rows = [
        (
            row["model"],
            f"{row['disk_bytes'] / 1e6:.1f}",
            f"{row['load_seconds']:.1f}",
            *(f"{row[name] / 1e6:.0f}" for name in memory),
            f"{row['prefill']:.1f}",
            f"{row['decode']:.1f}",
        )
        for row in result["models"]
    ]
    same = "the same" if result["same_tokens"] else "different"
    terminal.table(
        f"prompt of {result['prompt']}, {result['new']} generated ({same} tokens), "
        f"{result['threads']} threads, {result['device']}",
        ("model", "MB on disk", "load s", *memory.values(), "prefill/s", "decode/s"),
        rows,
    )
    lines = (f"{row['model']}\t{row['decode']:.2f}" for row in result["models"])
    terminal.result("\n".join(lines), result)


def show_train_speed(terminal: Terminal, result: dict[str, Any]) -> None:
    """Speed of training as a share of the possible, and the parts of its memory."""
    terminal.table(
        f"{result['method']} on {result['model']}, {result['threads']} threads",
        ("tokens/s", "GFLOP/token", "matrix GFLOP/s", "share of the possible"),
        [
            (
                f"{result['tokens_per_second']:.1f}",
                f"{result['flop_per_token'] / 1e9:.3f}",
                f"{result['matrix_gflops']:.1f}",
                f"{result['share_of_the_possible']:.3f}",
            )
        ],
    )
    parts = [(name, f"{size / 1e6:.0f} MB") for name, size in result["bytes"].items()]
    terminal.table("memory", ("what", "size"), [*parts, ("peak", _megabytes(result))])
    terminal.result(f"{result['share_of_the_possible']:.3f}", result)


def _megabytes(result: dict[str, Any]) -> str:
    return f"{result['peak_bytes'] / 1e6:.0f} MB"


def show_bench(terminal: Terminal, result: dict[str, Any]) -> None:
    """Times, their ratio, and memory."""
    ratio = result["ratio"]
    rows = [
        (
            "model",
            f"{result['model']}: {result['model_bytes'] / 1e9:.2f} GB, {result['blocks']} blocks",
        ),
        ("rows", "{} of {} tokens".format(*result["rows"])),
        ("prune s", " ".join(f"{s:.1f}" for s in result["prune_seconds"])),
        ("one forward s", " ".join(f"{s:.1f}" for s in result["floor_seconds"]) or "not run"),
        ("prune / forward", " ".join(f"{r:.2f}" for r in result["ratios"]) or "-"),
        ("their median", "-" if ratio is None else f"{ratio:.2f}"),
        ("solve s", f"{result['solve_seconds']:.1f}"),
        ("peak memory above start", f"{result['peak_bytes_above_start'] / 1e6:.0f} MB"),
        ("threads", result["threads"]),
    ]
    terminal.table(f"{result['method']} {result['pattern']}", ("", ""), rows)
    terminal.result("-" if ratio is None else f"{ratio:.3f}", result)


def show_race(terminal: Terminal, rows: list[dict[str, Any]]) -> None:
    """Both solvers of ARMOR, one line for each weight and side; stdout has the least ratio."""
    terminal.table(
        "the loss of Adam, and coordinate descent until it is as low",
        ("weight", "block", "NoWag-P", "Adam", "its s", "its steps", "als", "its s", "sweeps", "x"),
        [
            (
                row["weight"],
                row["block"],
                f"{row['first_loss']:.5f}",
                f"{row['adam_loss']:.5f}",
                f"{row['adam_seconds']:.1f}",
                row["adam_iterations"],
                f"{row['als_loss']:.5f}",
                f"{row['als_seconds']:.2f}",
                row["als_sweeps"],
                "not reached" if row["ratio"] is None else f"{row['ratio']:.1f}",
            )
            for row in rows
        ],
    )
    ratios = [row["ratio"] for row in rows]
    least = None if None in ratios else min(ratios)
    terminal.result("-" if least is None else f"{least:.1f}", rows)
