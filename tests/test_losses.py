"""Weights from losses: the loss of each expert, layer by layer, is that of the whole model, to the bit."""

import math

import pytest

from recall_merge import MergeRun, merge
from recall_merge.merging import weights as merge_weights
from recall_merge.merging.forward import expert_tokenizer, load_expert
from recall_merge.merging.layerwise import compute_weights
from recall_merge.merging.plan import make_plan
from recall_merge.merging.run import DEFAULT_RECALL
from recall_merge.merging.samples import encode_samples
from recall_merge.merging.weights import mean_loss
from recall_merge.runtime.errors import NotLayerwise
from test_layerwise import ROWS
from tiny import FAMILIES, fine_tuned, lora, make_model, save_model, write_rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


def a_plan(base, experts, rows, target, **settings):
    entries = [{"name": name, "path": str(path)} for name, path in experts.items()]
    data = {"base": str(base), "experts": entries, "method": "lm_cocktail", "samples": {"path": str(rows), "count": 4}}
    return make_plan(MergeRun.model_validate(data | {"out": {"path": target}} | settings))


def whole(plan, samples) -> dict[str, float]:
    """The same losses from whole models."""
    return {
        expert.name: mean_loss(load_expert(plan, expert, DEFAULT_RECALL), encode_samples(plan, samples, expert_tokenizer(plan, expert)))
        for expert in plan.experts
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_by_layer_equals_whole_models(family, bases, rows, tmp_path):
    base = bases(family)
    experts = {name: fine_tuned(base, tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
    plan = a_plan(base, experts, rows, tmp_path / "out", threads=2)
    weights = compute_weights(plan)
    assert weights.losses == whole(plan, weights.samples)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tied_head_and_adapters_that_train_the_embedding(dtype, rows, tmp_path):
    base = save_model(make_model("llama-tied", dtype=dtype), tmp_path / "base")
    experts = {"a": fine_tuned(base, tmp_path / "a", seed=1)}
    experts["x"] = lora(base, tmp_path / "x", seed=2, r=2, target_modules=["q_proj", "embed_tokens"])
    plan = a_plan(base, experts, rows, tmp_path / "out")
    weights = compute_weights(plan)
    assert weights.losses == whole(plan, weights.samples)
    assert len(set(weights.losses.values())) == 2


def test_weights_are_the_softmax_of_negated_losses(bases, rows, tmp_path):
    experts = {name: fine_tuned(bases("llama"), tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
    result = merge(a_plan(bases("llama"), experts, rows, tmp_path / "out", options={"temperature": 0.5}).run)
    a, b = result.record["losses"].values()
    assert result.weights[0, 0].item() == pytest.approx(1 / (1 + math.exp((a - b) / 0.5)), rel=1e-12)
    assert (result.weights == result.weights[0]).all()


def test_what_cannot_be_run_block_by_block_is_run_whole(bases, rows, tmp_path, monkeypatch):
    def unwalkable(*_):
        raise NotLayerwise("its forward pass needs numbers that it does not have", fix="none")

    experts = {name: fine_tuned(bases("llama"), tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
    plan = a_plan(bases("llama"), experts, rows, tmp_path / "out")
    wanted = compute_weights(plan).losses
    monkeypatch.setattr(merge_weights, "_layerwise_loss", unwalkable)
    assert compute_weights(plan).losses == wanted
