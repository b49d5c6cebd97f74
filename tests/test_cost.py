"""What a plan says a merge will cost: memory from the tensors' sizes, and which parts of the work it counts."""

from dataclasses import replace

import pytest
import torch

from recall_merge import MergeRun
from recall_merge.merging import cost, spans
from recall_merge.merging.cost import (
    device_memory,
    estimate_statistics,
    estimate_time,
    forward_memory,
    merge_memory,
    passes,
    peak_memory,
    statistics_memory,
    weights_memory,
    whole_model_memory,
)
from recall_merge.merging.plan import make_plan
from tiny import fine_tuned, make_model, save_model, write_rows

ROWS = [{"prompt": f"is the {word} good?", "completion": " yes"} for word in ("fox", "dog", "film", "lazy fox")]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cost")
    base = save_model(make_model("llama", num_hidden_layers=6), folder / "base")
    for seed, name in enumerate("ab"):
        fine_tuned(base, folder / name, seed=seed)
    write_rows(folder / "rows.jsonl", ROWS)
    return folder


def a_plan(world, **settings):
    entries = [{"name": name, "path": str(world / name)} for name in "ab"]
    data = {"base": str(world / "base"), "experts": entries, "method": "recall", "samples": {"path": str(world / "rows.jsonl"), "count": 2}}
    return make_plan(MergeRun.model_validate(data | {"threads": 1, "out": {"path": world / "out"}} | settings))


def block_of(plan, number: int) -> int:
    """Bytes of a block in float32, counted from the names alone."""
    return 4 * sum(spec.numel for name, spec in plan.specs.items() if f".layers.{number}." in name)


def test_weights_alone_take_a_block_and_not_a_model(world):
    plan = a_plan(world)
    states = weights_memory(plan) - 2 * block_of(plan, 0)
    hidden = plan.specs["model.norm.weight"].numel
    assert 0 < states <= 4 * 4 * hidden * sum(len(row["prompt"] + row["completion"]) for row in ROWS)
    assert weights_memory(plan) < whole_model_memory(plan)
    assert forward_memory(plan) < whole_model_memory(plan)


def test_more_threads_run_more_blocks_up_to_the_number_of_models(world):
    one, two, many = (weights_memory(a_plan(world, threads=threads)) for threads in (1, 2, 9))
    block = block_of(a_plan(world), 0)
    assert (two - one, many - one) == (2 * block, 2 * block)


def test_one_pass_holds_a_layer_of_every_model_beside_the_merge(world):
    plan = a_plan(world)
    assert peak_memory(plan) - merge_memory(plan) >= 4 * block_of(plan, 0)  # base, two experts, and the one that runs


def test_given_weights_cost_the_merge_alone(world):
    plan = a_plan(world, method="linear", samples=None)
    assert peak_memory(plan) == merge_memory(plan)
    assert estimate_time(plan).forward == 0 < estimate_time(plan).passes


def test_the_pool_is_named(world, monkeypatch):
    """Four rows, of which two are chosen: the newest of two models reads all of them, then each model reads the two."""
    monkeypatch.setattr("recall_merge.merging.cost._operations_per_second", lambda plan: 1e3)  # so slow that reading does not count
    estimate = estimate_time(a_plan(world))
    assert estimate.rows == 4 and estimate.pool == pytest.approx(estimate.forward / 2, rel=0.01)
    assert estimate_time(a_plan(world, samples={"path": str(world / "rows.jsonl"), "count": 2, "pool": 3})).rows == 3
    every = estimate_time(a_plan(world, samples={"path": str(world / "rows.jsonl"), "count": 4}))
    assert every.rows == every.pool == 0 < every.forward


def test_a_device_holds_a_block_and_states_or_one_tensor_of_all_models(world):
    plan = a_plan(world)
    assert device_memory(plan) == weights_memory(plan) - block_of(plan, 0)
    there = replace(a_plan(world, method="tsv", samples=None), device=torch.device("cuda:0"))
    assert device_memory(there) == 3 * 4 * 4 * max(spec.numel for name, spec in plan.specs.items() if ".layers." in name)


def test_spans_bound_the_merge(world, monkeypatch):
    plan = a_plan(world, method="linear", samples=None)
    whole = merge_memory(plan)
    monkeypatch.setattr("recall_merge.merging.cost.SPAN", 256)
    monkeypatch.setattr(spans, "SPAN", 256)
    assert merge_memory(plan) == 4 * (len(plan.experts) + 4) * 256 < whole


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "'b' once for the typical samples, then one pass over all models, layer by layer"),
        ({"method": "linear", "samples": None}, "one pass over all models"),
        ({"method": "lm_cocktail"}, "all models layer by layer for their losses"),
        ({"options": {"ablation": "permuted"}}, "the ablation needs all layers"),
    ],
)
def test_passes_are_told(world, settings, words):
    assert words in passes(a_plan(world, **settings))


def test_statistics_cost_the_pool_and_the_samples(world, monkeypatch):
    """On rows of one length: n rows of the pool, and `count` samples whose directions cost something too."""
    monkeypatch.setattr(cost, "_operations_per_second", lambda plan: 1e9)
    monkeypatch.setattr(cost, "_seconds_per_byte", lambda plan: 0.0)

    def estimated(rank: int = 24, **more):
        return estimate_statistics(a_plan(world, samples={"path": str(world / "rows.jsonl"), "count": 2, "space": "last"}), rank, **more)

    estimate = estimated()
    assert estimate.rows == 4 and estimate.seconds == estimate.forward > 1.5 * estimate.pool > 0  # two of four rows are samples
    assert estimated(100).seconds > estimate.seconds
    back = estimated(gradients=True)
    assert back.seconds - estimate.seconds == pytest.approx(estimate.pool)  # twice the forward pass of half the rows
    free = estimate_statistics(a_plan(world), 24)  # embeddings are read, and no block runs
    assert free.pool == 0 and free.seconds == pytest.approx(estimate.seconds - estimate.pool)
    every = estimate_statistics(a_plan(world, samples={"path": str(world / "rows.jsonl"), "count": 4}), 24)
    assert every.rows == every.pool == 0 < every.seconds


def test_statistics_hold_what_a_block_has_read_and_no_model(world):
    plan = a_plan(world)
    assert forward_memory(plan) < statistics_memory(plan) < whole_model_memory(plan) < statistics_memory(plan, gradients=True)
