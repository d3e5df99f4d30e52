"""How the reports of `quantize`, `pack`, `unpack`, `convert` and `deploy` look."""

import sys
from typing import TYPE_CHECKING, Any

from sparsekit.cli.console import Terminal
from sparsekit.cli.show import by_kind, kind_row

if TYPE_CHECKING:
    from sparsekit.stages.deploy import DeployReport
    from sparsekit.stages.report import Report


def show_quantized(terminal: Terminal, report: "Report") -> None:
    """The outcome of `quantize`, by kind of weight."""
    entry = report.entry
    rows = [kind_row(name, group) for name, group in by_kind(entry["weights"]).items()]
    rows.append(kind_row("all", entry["weights"]))
    terminal.table(
        f"{entry['recipe']['method']} {entry['recipe']['grid']} in {entry['seconds']:.0f} s, "
        f"{entry['totals']['bits_per_weight']:.2f} bits a weight",
        ("weights", "count", "zeros", "relative error", "worst", "solve s"),
        rows,
    )
    terminal.result(report.out, report.to_json())


def show_packed(terminal: Terminal, report: "Report") -> None:
    """The outcome of `pack`, by pattern, beside what theory says of it."""
    by_pattern: dict[str, list[dict[str, Any]]] = {}
    for row in report.entry["weights"]:
        kind = row["pattern"] if ":" in row["pattern"] else "bit mask"
        kind = f"{kind} {row['grid']}" if "grid" in row else kind
        by_pattern.setdefault(kind, []).append(row)
    rows = []
    for pattern, group in by_pattern.items():
        size = sum(row["size"] for row in group)
        names = ("value_bits", "place_bits", "bits", "share")
        mean = {n: sum(row[n] * row["size"] for row in group) / size for n in names}
        with_places = mean["value_bits"] + mean["place_bits"]
        rest = max(0.0, mean["bits"] - with_places)
        smaller = (32 / bits for bits in (mean["value_bits"], with_places, mean["bits"]))
        rows.append(
            (
                pattern,
                len(group),
                f"{sum(row['zeros'] for row in group) / size:.2%}",
                f"{mean['value_bits']:.3f} + {mean['place_bits']:.3f} + {rest:.3f}",
                f"{mean['bits']:.3f}",
                f"{mean['share']:.4f}",
                ", ".join(f"{times:.1f}x" for times in smaller),
            )
        )
    summary = report.entry["totals"]
    terminal.table(
        f"{summary['bytes'] / 1e6:.1f} MB in the place of {summary['bytes_before'] / 1e6:.1f} MB",
        (
            "pattern",
            "weights",
            "zeros",
            "bits: values + places + rest",
            "together",
            "share of its bytes",
            "against float32: values, with places, with all",
        ),
        rows,
    )
    terminal.result(report.out, report.to_json())


def show_unpacked(terminal: Terminal, report: "Report") -> None:
    """The outcome of `unpack`: its path."""
    terminal.result(report.out, report.to_json())


def show_converted(terminal: Terminal, report: "Report") -> None:
    """The outcome of `convert`."""
    entry = report.entry
    summary = entry["totals"]
    terminal.table(
        f"{entry['recipe']['form']} in {entry['seconds']:.0f} s",
        ("weights", "zeros"),
        [(summary["weights"], f"{summary['zeros'] / summary['size']:.2%}")],
    )
    terminal.result(report.out, report.to_json())


def show_deployment(terminal: Terminal, report: "DeployReport") -> None:
    """Where a checkpoint runs; stdout has a runtime a line, with the three answers."""
    form = report.form
    terminal.table(
        f"{report.model}: {form.kind}, {form.pattern}" + (f", {form.grid}" if form.grid else ""),
        ("runtime", "version", "loads", "smaller", "faster", "reason"),
        [(n, seen, v.loads, v.smaller, v.faster, v.reason) for n, seen, v in report.runtimes],
    )
    if report.speeds:
        terminal.table(
            "torch's 2:4 kernels on this GPU",
            ("batch", "pass", "dense ms", "sparse ms", "times as fast"),
            [
                (
                    speed.batch,
                    speed.phase,
                    *(f"{1e3 * s:.2f}" if s else "-" for s in (speed.dense, speed.sparse)),
                    f"{speed.gain:.2f}" if speed.gain else "out of memory",
                )
                for speed in report.speeds
            ],
        )
    else:
        terminal.note(f"torch's 2:4 kernels were not measured: {report.unmeasured}")
    lines = ("\t".join((n, v.loads, v.smaller, v.faster)) for n, _, v in report.runtimes)
    if terminal.json or terminal.quiet or not sys.stdout.isatty():
        terminal.result("\n".join(lines), report.to_json())
