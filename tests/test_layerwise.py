"""One pass, layer by layer: what it weighs and writes is what weighing whole models and fusing afterwards gives, from half of the bytes."""

import json

import pytest
import torch

from recall_merge import MergeRun, merge
from recall_merge.files.hashing import ModelDigest
from recall_merge.merging.layerwise import compute_weights
from recall_merge.merging.plan import make_plan
from recall_merge.merging.tensors import TensorCollector, merge_tensors
from recall_merge.models.layerwise import _Batch
from recall_merge.runtime.errors import NotLayerwise
from tiny import FAMILIES, fine_tuned, load_tensors, lora, make_model, make_tokenizer, save_model, write_rows

ROWS = [
    {"prompt": f"is the {word} {verb}?", "completion": f" {answer}"}
    for word in ("fox", "dog", "film")
    for verb in ("quick", "lazy", "good")
    for answer in ("yes", "no")
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


def a_plan(base, experts, rows, target, **settings):
    entries = [{"name": name, "path": str(path)} for name, path in experts.items()]
    settings = {"method": "recall", "samples": {"path": str(rows), "count": 4}, "out": {"path": target}} | settings
    return make_plan(MergeRun.model_validate({"base": str(base), "experts": entries} | settings))


def same(plan):
    """Merge in one pass, and compare with weights that are computed first and tensors that are merged after."""
    assert plan.single_pass
    merge_weights = compute_weights(plan)
    collector = TensorCollector(plan)
    merge_tensors(plan, merge_weights, plan.specs, collector, ModelDigest())
    wanted = collector.tensors
    result = merge(plan.run)
    found = load_tensors(plan.target)
    assert torch.equal(result.weights, merge_weights.weights) and torch.equal(result.similarity, merge_weights.similarity)
    assert result.merge_weights.samples == merge_weights.samples
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, bases, rows, tmp_path):
    base = bases(family)
    experts = {name: fine_tuned(base, tmp_path / name, seed=seed) for seed, name in enumerate("abc")}
    same(a_plan(base, experts, rows, tmp_path / "out", threads=2))


WAYS = {
    "one expert": {"experts": "a"},
    "adapters": {"experts": "xy"},
    "both": {"experts": "axb", "threads": 3},
    "a matrix method": {"experts": "ab", "method": "tsv", "weights": {"recall": {}}},
    "ties in shards": {"experts": "abx", "method": "ties", "weights": {"recall": {}}, "out": {"shard_size": "9KB"}},
    "skipped": {"experts": "ab", "skip": ["*embed_tokens.weight", "*layers.1.*"]},
    "uniform": {"experts": "ab", "method": "linear", "weights": {"recall": {"ablation": "uniform", "outside_blocks": "newest"}}},
    "ends alike": {"experts": "ab", "method": "linear", "weights": {"recall": {"outside_blocks": "uniform", "kernel": "cka"}}},
    "bfloat16": {"experts": "ab", "method": "linear", "weights": {"recall": {"precision": "bfloat16", "pooling": "last"}}},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way(way, dtype, rows, tmp_path):
    base = save_model(make_model("llama-tied", dtype=dtype), tmp_path / "base")
    made = {name: fine_tuned(base, tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
    made |= {name: lora(base, tmp_path / name, seed=seed, r=2, target_modules=["q_proj", "embed_tokens"]) for seed, name in enumerate("xy")}
    settings = dict(WAYS[way])
    experts = {name: made[name] for name in settings.pop("experts")}
    out = {"path": tmp_path / "out"} | settings.pop("out", {})
    same(a_plan(base, experts, rows, tmp_path / "out", **settings, out=out))


def test_ablations_that_need_all_layers_take_a_pass_of_their_own(bases, rows, tmp_path):
    base = bases("llama")
    experts = {name: fine_tuned(base, tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
    for ablation in ("tilt", "ramp", "permuted"):
        plan = a_plan(base, experts, rows, tmp_path / ablation, method="linear", weights={"recall": {"ablation": ablation}})
        assert not plan.single_pass
        assert torch.equal(merge(plan.run).weights, compute_weights(plan).weights)


def test_every_model_is_read_once_and_the_newest_once_more(rows, tmp_path):
    """A large vocabulary, of which the rows use a part: the newest's pass for the typical samples reads no more of it than that."""
    base = save_model(make_model("llama", vocab_size=2000), tmp_path / "base", tokenizer=make_tokenizer())
    experts = {name: fine_tuned(base, tmp_path / name, seed=seed) for seed, name in enumerate("abc")}
    plan = a_plan(base, experts, rows, tmp_path / "out")
    result = merge(plan.run)
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    rows_read = 96 * 32 * 4  # bytes of the tokens' rows, at most, of one model
    blocks = sum(spec.nbytes for name, spec in plan.specs.items() if ".layers." in name)
    assert record["bytes"] == result.record["bytes"]
    assert 4 * plan.base.nbytes + blocks < record["bytes"]["read"] <= 4 * plan.base.nbytes + blocks + 4 * rows_read
    assert record["bytes"]["written"] == plan.base.nbytes


def test_what_cannot_run_block_by_block_takes_whole_models_and_says_so(bases, rows, tmp_path, monkeypatch):
    def unwalkable(batch):
        raise NotLayerwise("its forward pass needs numbers that it does not have", fix="none")

    base = bases("llama")
    experts = {name: fine_tuned(base, tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
    plan = a_plan(base, experts, rows, tmp_path / "out")
    wanted = same(a_plan(base, experts, rows, tmp_path / "walked"))
    monkeypatch.setattr(_Batch, "go_on", unwalkable)
    found = merge(plan.run)
    assert torch.equal(found.weights, wanted.weights)
    assert any("whole models were run" in note for note in found.notes)
