"""Experts whose numbers are finite and out of all proportion: refused by name, whatever way they are read, or merged if told to."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from recall_merge import MergeRun, RecallError, merge
from recall_merge.maths.deltas import LowRank, squared
from recall_merge.merging import spans
from tiny import fine_tuned, lora, make_model, save_model, write_rows

UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
WAYS = {
    "in spans": {"method": "linear", "threads": 3},
    "whole": {"method": "tsv"},
    "pruned": {"method": "linear", "prune": {"density": 0.5}},
    "layer by layer": {"method": "recall"},
}


@pytest.fixture
def world(tmp_path):
    base = save_model(make_model("llama"), tmp_path / "base", max_shard_size=40_000)
    for seed, name in enumerate(("good", "bad")):
        fine_tuned(base, tmp_path / name, seed)
    write_rows(tmp_path / "rows.jsonl", [{"prompt": f"is the {word} good?", "completion": "yes"} for word in ("fox", "dog", "film")])
    return tmp_path


def change(folder, name, how):
    file = next(file for file in folder.glob("*.safetensors") if name in load_file(file))
    tensors = load_file(file)
    tensors[name] = how(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})


def a_run(world, experts=("good", "bad"), **settings):
    settings = {"method": "linear", "out": {"path": str(world / "out"), "reload": False}} | settings
    if settings["method"] == "recall":
        settings["samples"] = {"path": str(world / "rows.jsonl"), "count": 2}
    entries = [{"name": name, "path": str(world / name)} for name in experts]
    return MergeRun.model_validate({"base": str(world / "base"), "experts": entries} | settings)


def refused(run):
    with pytest.raises(RecallError) as error:
        merge(run)
    assert not list(run.out.path.parent.glob(run.out.path.name + "*")), "nothing is left of it"
    return [fault.what for fault in error.value.faults]


@pytest.mark.parametrize("way", WAYS)
def test_an_expert_that_exploded_is_refused_by_name(world, way, monkeypatch):
    monkeypatch.setattr(spans, "SPAN", 512)
    change(world / "bad", UP, lambda tensor: tensor * 1e4)
    (what,) = refused(a_run(world, **WAYS[way]))
    assert what.startswith(f"expert 'bad' changes '{UP}' out of all proportion: by ")
    assert merge(a_run(world, change_limit=None, **WAYS[way])).path.exists()


def test_all_experts_are_told_and_of_each_the_worst(world):
    for name, more in (("good", 1e5), ("bad", 1e6)):
        change(world / name, NORM, lambda tensor, more=more: tensor + more)
    for block in range(2):
        for part in ("up_proj", "down_proj"):
            change(world / "bad", f"model.layers.{block}.mlp.{part}.weight", lambda tensor: tensor * 1e3)
    found = refused(a_run(world))
    assert [what.split()[1] for what in found] == ["'good'", "'bad'", "'bad'", "'bad'"]
    assert NORM in found[1] and "4 more tensors likewise" in found[1]


@pytest.mark.parametrize("config", [{"r": 2, "target_modules": ["q_proj"]}, {"r": 2, "target_modules": ["q_proj"], "use_dora": True}])
@pytest.mark.parametrize("method", ["linear", "tsv"])
def test_adapters(world, config, method):
    lora(world / "base", world / "adapter", scale=0.2, **config)
    assert merge(a_run(world, ("good", "adapter"), method=method, out={"path": str(world / "sound")})).path.exists()
    file = world / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    wrong = next(name for name in tensors if ("magnitude" if config.get("use_dora") else "lora_B") in name)
    save_file(tensors | {wrong: 1e4 * tensors[wrong]}, file, metadata={"format": "pt"})
    (what,) = refused(a_run(world, ("good", "adapter"), method=method))
    assert "expert 'adapter' changes 'model.layers.0.self_attn.q_proj.weight' out of all proportion" in what


def test_numbers_beyond_what_float32_can_square(world):
    change(world / "bad", NORM, lambda tensor: tensor + 1e30)
    (what,) = refused(a_run(world))
    assert f"'{NORM}' out of all proportion: by inf" in what


def test_what_sound_training_does_is_taken(world):
    """Zeros that are learnt, a tensor drawn anew from N(0, 1), and numbers that doubled and changed their sign."""
    change(world / "base", NORM, torch.zeros_like)
    change(world / "bad", NORM, lambda tensor: 0.9 + 0 * tensor)
    change(world / "bad", UP, lambda tensor: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)))
    change(world / "bad", "lm_head.weight", lambda tensor: -2 * tensor)
    merge(a_run(world))


def test_a_limit_of_ones_own(world):
    change(world / "bad", UP, lambda tensor: 5 * tensor)
    assert merge(a_run(world)).path.exists()
    (what,) = refused(a_run(world, change_limit=1, out={"path": str(world / "out2")}))
    assert f"expert 'bad' changes '{UP}'" in what


def test_a_product_is_measured_without_forming_it():
    draws = torch.Generator().manual_seed(0)
    delta = LowRank(torch.randn(40, 3, generator=draws), torch.randn(3, 30, generator=draws))
    assert squared(delta) == pytest.approx(squared(delta.dense()), rel=1e-5)
