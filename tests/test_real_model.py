"""The promises that matter, kept on the real small model (make test-slow)."""

import pytest
import torch

from recall_merge import MergeRun, merge, verify
from recall_merge.demo.smollm import unpack
from tiny import load_tensors, lora, merged_by_peft, write_rows

pytestmark = pytest.mark.slow

WORDS = ["river", "executor", "letter", "garden", "number", "window", "market", "doctor"]
ROWS = [{"prompt": f"Is a {one} like a {two}? Answer yes or no.", "completion": "no"} for one in WORDS for two in WORDS if one != two]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    base = unpack(folder / "base")
    for seed, name in enumerate("ab"):
        lora(base, folder / name, seed=seed, r=8, lora_alpha=16, target_modules="all-linear", scale=0.01)
    write_rows(folder / "rows.jsonl", ROWS)
    return folder


def a_run(world, target, **settings):
    run = {
        "base": str(world / "base"),
        "experts": [{"name": name, "path": str(world / name)} for name in "ab"],
        "method": "recall",
        "samples": {"path": str(world / "rows.jsonl"), "count": 8},
        "out": {"path": world / target, "dtype": "float32"},
    }
    return MergeRun.model_validate(run | settings)


def test_threads_and_shards_do_not_change_a_byte(world):
    one = merge(a_run(world, "one", threads=1))
    two = merge(a_run(world, "two", threads=2, out={"path": world / "two", "dtype": "float32", "shard_size": "100MB"}))
    assert torch.equal(one.similarity, two.similarity)
    first, second = load_tensors(world / "one"), load_tensors(world / "two")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    verify(world / "two")


def test_adapters_equal_pefts_own_merge(world):
    result = merge(a_run(world, "merged"))
    dense = [load_tensors(merged_by_peft_float32(world, name)) for name in "ab"]
    base, found = load_tensors(world / "base"), load_tensors(world / "merged")
    for name, tensor in base.items():
        layer = int(name.split(".")[2]) + 1 if ".layers." in name else 0 if "embed" in name else 31
        start = tensor.float()
        wanted = start + sum(w * (full[name] - start) for w, full in zip(result.weights[layer].tolist(), dense, strict=True))
        assert (found[name] - wanted).norm() <= 1e-6 * wanted.norm(), name


def merged_by_peft_float32(world, name):
    """PEFT merges in the base's dtype; in bfloat16 that alone would be an error of a thousandth."""
    from tiny import load_model, quiet

    base = world / "base-float32"
    if not base.exists():
        with quiet():
            load_model(world / "base", dtype="float32").save_pretrained(base)
    return merged_by_peft(base, world / name, world / f"{name}-merged")
