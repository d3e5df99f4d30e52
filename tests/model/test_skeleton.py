"""A model without its weights: which weights it holds, for how long, and on which device."""

import torch

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.model.skeleton import Skeleton


def skeleton_of(folder) -> Skeleton:
    return Skeleton(Checkpoint.open(folder), torch.device("cpu"), torch.float32)


def block_of(skeleton: Skeleton, index: int) -> dict[str, torch.Tensor]:
    """The values on disk of one block, by name in the model."""
    inside = f"{skeleton.prefix}.{index}."
    on_disk = {n: d for n, d in skeleton.on_disk.items() if n.startswith(inside)}
    values = skeleton.source.read(on_disk.values())
    return {name: values[disk] for name, disk in on_disk.items()}


def held(skeleton: Skeleton) -> dict[str, torch.Tensor]:
    return {n: p for n, p in skeleton.model.named_parameters() if not p.is_meta}


def test_a_block_takes_over_the_memory_of_the_one_before(family):
    skeleton = skeleton_of(family("llama_deep"))  # bfloat16 on disk
    places = []
    for index in range(3):
        values = block_of(skeleton, index)
        skeleton.hold(f"{skeleton.prefix}.{index}", values)
        found = held(skeleton)
        assert found.keys() == values.keys()
        for name, value in values.items():
            assert found[name].dtype == torch.float32
            assert torch.equal(found[name], value.float())
        places.append({name.split(".", 3)[3]: p.data_ptr() for name, p in found.items()})
        skeleton.drop(values)
        assert held(skeleton) == {}
    assert places[0] == places[1] == places[2]
    assert len(set(places[0].values())) == len(places[0])


def test_values_on_disk_are_not_changed_by_the_block_after(family):
    """A float32 checkpoint is not copied: its values must not become another block's."""
    skeleton = skeleton_of(family("llama"))
    first, second = block_of(skeleton, 0), block_of(skeleton, 1)
    kept = {name: value.clone() for name, value in first.items()}
    skeleton.hold(f"{skeleton.prefix}.0", first)
    skeleton.drop(first)
    skeleton.hold(f"{skeleton.prefix}.1", second)
    for name, value in first.items():
        assert torch.equal(value, kept[name])


def test_memory_between_blocks_is_given_back_at_the_end(family):
    skeleton = skeleton_of(family("llama_deep"))
    values = block_of(skeleton, 0)
    skeleton.hold(f"{skeleton.prefix}.0", values)
    before = next(iter(held(skeleton).values())).data_ptr()
    kept = list(held(skeleton).values())  # so that the allocator cannot hand it out again
    skeleton.drop(values)
    skeleton.forget_memory()
    skeleton.hold(f"{skeleton.prefix}.0", values)
    assert next(iter(held(skeleton).values())).data_ptr() != before
    assert len(kept) == len(values)


def test_heap_is_tidied_when_enough_bytes_have_passed(family, monkeypatch):
    trims = []
    monkeypatch.setattr("sparsekit.model.skeleton.trim_heap", lambda: trims.append(1))
    monkeypatch.setattr("sparsekit.model.skeleton.TRIM_BYTES", 100)
    skeleton = skeleton_of(family("llama"))
    for _ in range(5):
        skeleton.passed(40)
    assert len(trims) == 1
    skeleton.passed(80)
    assert len(trims) == 2


def test_names_outside_the_blocks_are_told_apart(family):
    skeleton = skeleton_of(family("llama"))
    assert skeleton.before_blocks() == ["model.embed_tokens.weight", "model.norm.weight"]
    assert skeleton.after_blocks() == ["model.norm.weight", "lm_head.weight"]
