"""Small folders as stages and scoring leave them, written by hand."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

UP = "model.layers.{}.mlp.up_proj.weight"
CONFIG = {"text": "wikitext2", "length": 1024, "seed": 0}


def windows(log: float, **changes) -> dict:
    """A perplexity; all of the same windows unless something is changed."""
    plain = {
        "text": "wikitext2",
        "windows": 16,
        "length": 1024,
        "dtype": "float32",
        "device": "cpu",
        "fingerprint": "a" * 64,
        "perplexity": math.exp(log),
        "log_perplexity": log,
        "log_stderr": 0.05,
    }
    return {**plain, **changes}


def task(name: str, value: float, stderr: float | None, **changes) -> dict:
    """The score of a task, in `acc_norm`."""
    metric = {"value": value, "stderr": stderr, "higher_is_better": True}
    plain = {"task": name, "version": "1.0", "n": 100, "n_shot": 0, "samples_sha256": "b" * 64}
    return {**plain, "metrics": {"acc_norm": metric}, **changes}


def score(perplexity=None, tasks=(), difference=None, baseline=None, model="m", **config) -> dict:
    """An entry of `sparsekit-scores.json`."""
    return {
        "model": model,
        "perplexity": perplexity,
        "tasks": list(tasks),
        "difference": difference or {},
        "config": {**CONFIG, "tasks": [told["task"] for told in tasks], **config},
        "baseline": baseline,
    }


def row(index: int, **more) -> dict:
    """A half-sparse weight of a block."""
    return {"name": UP.format(index), "shape": [4, 8], "zeros": 16, "size": 32, **more}


def entry(stage: str, model: str, settings: dict, **more) -> dict:
    """What every stage leaves in a history."""
    return {
        "stage": stage,
        "model": model,
        "words": {},
        "source": {"path": model, "fingerprint": "c" * 64},
        "settings": settings,
        "versions": {"sparsekit": "0"},
        "seconds": 1.0,
        "peak_memory_bytes": 1,
        **more,
    }


SPARSE = {
    "weights": 2,
    "zeros": 32,
    "size": 64,
    "sparsity": 0.5,
    "mean_error": None,
    "bits_per_weight": None,
}


def pruned_entry(method: str = "wanda", pattern: str = "2:4", **changes) -> dict:
    """What `prune` leaves in a history."""
    solved = {"pattern": pattern, "seconds": 1.0}
    settings = {
        "method": method,
        "pattern": pattern,
        "options": {},
        "reconstruct": "none",
        "allocate": "none",
        "compensate": "0",
        "propagate": True,
        "skip": [],
        "format": "dense",
        "budget": None,
        "then": None,
        "device": "cpu",
        "dtype": "float32",
    }
    rows = {"source": "builtin", "samples": 32, "length": 512, "seed": 0, "fingerprint": "b" * 64}
    plain = {
        "words": {"method": method, "pattern": pattern, "samples": 32, "length": 512},
        "mask": None,
        "calibration": rows,
        "totals": SPARSE,
        "weights": [row(i, error=0.1 * (i + 1), **solved) for i in range(2)],
        "seconds": 10.0,
        "peak_memory_bytes": 500_000_000,
    }
    return entry("prune", "demo", settings, **plain) | changes


def recovered_entry(method: str = "ast", tokens: int = 4096) -> dict:
    """What `recover` leaves in a history."""
    settings = {
        "method": method,
        "pattern": "2:4",
        "options": {},
        "data": "e" * 64,
        "metric": "magnitude",
        "batch": 4,
        "length": 256,
        "accumulate": 1,
        "schedule": "flat",
        "temperature": 1.0,
        "teacher_top": None,
        "slorb": None,
        "mixed_precision": "no",
        "format": "dense",
        "seed": 0,
        "device": "cpu",
        "skip": [],
    }
    return entry(
        "recover",
        "pruned",
        settings,
        words={"method": method, "teacher": "demo", "tokens": tokens},
        teacher={"path": "demo", "fingerprint": "c" * 64},
        text="builtin",
        evaluated_on=None,
        tokens=tokens,
        processes=1,
        finished={"sparsity_measure": 0.5},
        kept_mass=None,
        plan={"rate": 1e-4, "share": 0.5, "steps": 4, "decay": 0.0},
        totals=SPARSE,
        weights=[row(i, pattern="2:4", flipped=0) for i in range(2)],
        seconds=100.0,
        peak_memory_bytes=900_000_000,
    )


def quantized_entry(grid: str = "int4-g64", method: str = "gptq") -> dict:
    """What `quantize` leaves in a history."""
    where = {"device": "cpu", "dtype": "float32", "skip": [], "format": "compressed-tensors"}
    counted = {"weights": 2, "zeros": 32, "zeros_before": 32, "size": 64, "mean_error": 0.02}
    solved = {"grid": grid, "zeros_before": 16, "error": 0.02, "seconds": 1.0, "bits": 4.25}
    return entry(
        "quantize",
        "trained",
        {"method": method, "grid": grid, "options": {}, **where},
        words={"grid": grid, "method": method},
        calibration=None,
        totals={**counted, "bits_per_weight": 4.25},
        weights=[row(i, **solved) for i in range(2)],
        seconds=5.0,
        peak_memory_bytes=400_000_000,
    )


def packed_entry() -> dict:
    """What `pack` leaves in a history."""
    sizes = {"bits_per_weight": 3.25, "bytes": 1, "bytes_before": 2}
    totals = {"weights": 2, "zeros": 32, "size": 64, **sizes}
    return entry("pack", "m", {"method": "pack", "pattern": "mixed"}, totals=totals)


def history_json(*entries: dict) -> str:
    """The contents of `sparsekit.json`."""
    return json.dumps({"format": 1, "history": list(entries)})


def checkpoint(folder: Path, *history: dict, dtype=torch.float32, rows: int = 4) -> Path:
    """A folder with two weights of `rows` × 8 numbers, and a history if there is any."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    weights = {UP.format(i): torch.ones(rows, 8, dtype=dtype) for i in range(2)}
    save_file(weights, folder / "model.safetensors")
    if history:
        (folder / "sparsekit.json").write_text(history_json(*history))
    return folder


def scored(folder: Path, *entries: dict) -> Path:
    """A folder with scores."""
    folder.mkdir(parents=True, exist_ok=True)
    value = {"format": 1, "scores": list(entries)}
    (folder / "sparsekit-scores.json").write_text(json.dumps(value))
    return folder


def training_log(folder: Path, factor: float = 1.0) -> Path:
    """A log of twelve steps, with a perplexity before and after, and flips in every third."""
    rows = [{"step": 0, "tokens": 0, "perplexity": 90.0, "evaluated_on": "8 x 1024 of wikitext2"}]
    for step in range(1, 13):
        row = {"step": step, "tokens": 1024 * step, "loss": 2.0, "flips": 50 * (step % 3 == 0)}
        rows.append({**row, "divergence": factor / step, "entropy": 3 + factor / step})
    rows[-1] |= {"perplexity": 60.0, "evaluated_on": "8 x 1024 of wikitext2"}
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "sparsekit-training.jsonl").write_text(text)
    return folder


def run_directory(root: Path) -> Path:
    """The dense model, a pruned one, the same trained, and that quantized, all scored alike."""
    accuracies = {"dense": 0.6, "wanda": 0.4, "wanda.ast": 0.5, "wanda.ast.int4": 0.45}
    logs = {"dense": 3.0, "wanda": 5.0, "wanda.ast": 4.0, "wanda.ast.int4": 4.2}
    stages = [pruned_entry(), recovered_entry(), quantized_entry()]
    for count, name in enumerate(logs):
        difference = {
            "log_perplexity": {"value": logs[name] - 3.0, "stderr": 0.01, "n": 16},
            **{
                f"{t}.acc_norm": {"value": accuracies[name] - 0.6, "stderr": 0.02, "n": 100}
                for t in ("arc_easy", "piqa")
            },
        }
        if count:
            checkpoint(root / name, *stages[:count], rows=4 if count < 3 else 2)
        entry = score(
            windows(logs[name]),
            [task("arc_easy", accuracies[name], 0.03), task("piqa", accuracies[name] + 0.2, 0.04)],
            difference if count else None,
            "demo" if count else None,
            limit=100,
        )
        scored(root / name, entry)
    training_log(root / "wanda.ast")
    return root
