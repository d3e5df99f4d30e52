"""`bench infer` on tiny models: what is counted, and that packed ones give the same tokens."""

import os

import pytest
import torch
from refusals import refused

import sparsekit
from sparsekit.bench import infer
from sparsekit.bench.infer import InferConfig, bench_infer
from sparsekit.checkpoint.folder import FACTORS
from sparsekit.errors import CheckFailedError, DataError, UsageError
from sparsekit.packing.pack import pack


@pytest.mark.slow
def test_a_packed_model_generates_the_same_tokens(pruned, tmp_path):
    packed = pack(str(pruned), tmp_path / "packed").out
    found = bench_infer(InferConfig(prompt=8, new=4), [str(pruned), str(packed)])
    assert found["same_tokens"]
    one, two = found["models"]
    assert len(one["tokens"]) == 4
    assert two["disk_bytes"] < one["disk_bytes"]
    for row in found["models"]:
        assert row["load_seconds"] > 0
        assert row["prefill"] > 0
        assert row["decode"] > 0
        assert row["peak_bytes"] >= row["resident_bytes"]
        assert (row["device_bytes"], row["device_peak_bytes"]) == (0, 0)


def test_on_a_gpu_its_memory_is_told_and_waited_for(pruned, monkeypatch):
    """With the CPU in the place of one: what is asked for, and when."""
    calls, clock, to = [], infer.time.perf_counter, torch.Tensor.to

    def stay(tensor, *args, **options):
        return to(
            tensor,
            *("cpu" if arg in ("cuda", torch.device("cuda")) else arg for arg in args),
            **options,
        )

    monkeypatch.setattr(torch.Tensor, "to", stay)
    monkeypatch.setattr(infer, "pick_device", lambda _: "cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    monkeypatch.setattr(infer.time, "perf_counter", lambda: calls.append("clock") or clock())
    row = infer._measure(InferConfig(prompt=8, new=2), "name", str(pruned), 1)
    assert (row.device_bytes, row.device_peak_bytes) == (5, 7)
    assert calls == ["clock", "wait", "clock"] * 3


@pytest.mark.parametrize("change", [{"prompt": 0}, {"new": 1}, {"batch": 0}])
def test_numbers_that_measure_nothing_are_refused(pruned, change):
    with refused("out-of-range", f"--{next(iter(change))}", kind=UsageError):
        bench_infer(InferConfig(**change), [str(pruned)])


def test_a_packed_model_that_is_expanded_takes_more_memory(pruned, tmp_path, monkeypatch):
    packed = pack(str(pruned), tmp_path / "packed").out
    with refused("not-a-choice", "--resident", "'all'", kind=UsageError):
        bench_infer(InferConfig(resident="all"), [str(packed)])
    calls = []
    monkeypatch.setattr(infer, "expand", calls.append)
    for how, count in (("packed", 0), ("expand", 1)):
        infer._measure(InferConfig(prompt=8, new=4, resident=how), "name", str(packed), 1)
        assert len(calls) == count
    models = [sparsekit.load(packed, resident=how) for how in ("packed", "expand")]
    size, dense = (sum(p.nbytes for p in model.parameters()) for model in models)
    plain = sum(p.nbytes for p in sparsekit.load(pruned).parameters())
    assert size < dense == plain


def test_what_fails_in_the_other_process_is_told_as_it_is(pruned, tmp_path):
    packed = pack(str(pruned), tmp_path / "packed").out
    file = packed / FACTORS
    whole, middle = file.read_bytes(), file.stat().st_size // 2
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with refused("fingerprint-mismatch", "packed", kind=CheckFailedError):
        bench_infer(InferConfig(prompt=8, new=2), [str(packed)])


def test_a_process_that_is_killed_is_an_error_and_no_endless_wait(pruned, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", _EndsTheReader)
    with refused("process-died", str(pruned), kind=DataError):
        bench_infer(InferConfig(prompt=8, new=2), [str(pruned)])


class _EndsTheReader:
    """An argument that ends the process that reads it."""

    def __reduce__(self) -> tuple[object, ...]:
        return os._exit, (9,)


def test_a_model_that_does_not_fit_when_expanded_is_refused(pruned, tmp_path, monkeypatch):
    packed = pack(str(pruned), tmp_path / "packed").out
    monkeypatch.setattr("sparsekit.model.form_linear.available_memory", lambda: 1000)
    with refused("not-enough-memory", kind=DataError):
        sparsekit.load(packed, "float32", "expand")
