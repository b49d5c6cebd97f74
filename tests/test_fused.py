"""Adapters on parameters that hold all experts of a block, beside what PEFT's own merge makes of them, tensor by tensor of the files."""

import json
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from recall_merge import MergeRun, make_plan, merge
from recall_merge.files.adapter import open_adapter
from recall_merge.files.checkpoint import open_checkpoint
from recall_merge.maths.deltas import LowRank, dense
from recall_merge.runtime.errors import CheckpointError
from tiny import edit_json, load_tensors, lora, make_model, merged_by_peft, quiet, save_model, seeded

EXPERTS: dict[str, Any] = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
KINDS: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "experts alone, with patterns": EXPERTS | {"alpha_pattern": {r".*experts\.down_proj": 3}, "rank_pattern": {r".*gate_up_proj": 3}},
    "one parameter, rsLoRA": {"target_modules": [], "target_parameters": ["experts.down_proj"], "use_rslora": True},
    "a router, and the map of a linear layer": {"target_modules": [], "target_parameters": ["gate.weight", "q_proj.weight"]},
}
HELD_APART = ("qwen3_next", "deepseek_v3", "glm4_moe", "mixtral", "minimax_m2")  # one tensor an expert in the files
HELD_WHOLE = ("gpt_oss", "llama4_text", "granitemoe")
CASES = [(kind, case) for kind in (*HELD_APART, *HELD_WHOLE) for case in KINDS if kind in HELD_APART or "router" not in case]


def assert_is_pefts(base, adapter, merged):
    """The base's tensors and the adapter's deltas give the tensors of PEFT's merge, and nothing else is changed."""
    base, theirs = open_checkpoint(base), load_tensors(merged)
    edits = open_adapter(adapter, base).edits
    for name in base.tensors:
        own, edit = base.read(name), edits.get(name)
        torch.testing.assert_close(own if edit is None else own + dense(edit.delta(own)), theirs[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(own, theirs[name]) is (edit is None), name
    return edits


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_every_expert_gets_what_peft_gives_it(base_of, tmp_path, kind, case):
    base = base_of(kind)
    adapter = lora(base, tmp_path / "adapter", **{"r": 2, "lora_alpha": 5} | KINDS[case])
    assert bool(json.loads((adapter / "adapter_config.json").read_text())["target_parameters"]) or kind in HELD_WHOLE
    edits = assert_is_pefts(base, adapter, merged_by_peft(base, adapter, tmp_path / "theirs"))
    if kind in HELD_APART:  # in factors, for the methods that know them
        assert all(isinstance(edit.delta(torch.zeros(1)), LowRank) for edit in edits.values())


def test_the_merge_is_the_same(base_of, tmp_path):
    base = base_of("deepseek_v3")
    adapter = lora(base, tmp_path / "adapter", r=2, target_modules="all-linear")
    run = {"base": str(base), "experts": [{"name": "a", "path": str(adapter)}], "method": "linear", "out": {"path": tmp_path / "out"}}
    merge(MergeRun.model_validate(run))
    theirs = load_tensors(merged_by_peft(base, adapter, tmp_path / "theirs"))
    for name, tensor in load_tensors(tmp_path / "out").items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)


def test_files_that_hold_the_experts_as_memory_does(bases, tmp_path):
    model = make_model("mixtral")
    base = save_model(model, tmp_path / "base")
    adapter = lora(base, tmp_path / "adapter", r=2, **EXPERTS)
    theirs = load_tensors(merged_by_peft(base, adapter, tmp_path / "theirs"))
    save_file(model.state_dict(), base / "model.safetensors", metadata={"format": "pt"})
    edit = open_adapter(adapter, open_checkpoint(base)).edits["model.layers.1.mlp.experts.down_proj"]
    delta = dense(edit.delta(torch.zeros(4, 32, 64)))
    for expert in range(4):
        name = f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"
        own = model.state_dict()["model.layers.1.mlp.experts.down_proj"][expert]
        torch.testing.assert_close(own + delta[expert], theirs[name], rtol=1e-5, atol=1e-6)


def test_square_experts_that_are_stored_turned(tmp_path):
    """Where the shapes do not tell (in, out) from (out, in), transformers' module does."""
    import transformers

    settings: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    settings |= {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 96,
        "pad_token_id": 0,
    }
    base = save_model(transformers.GptOssForCausalLM(transformers.GptOssConfig(**settings)).eval(), tmp_path / "base")
    adapter = lora(base, tmp_path / "adapter", r=2, **EXPERTS)
    assert_is_pefts(base, adapter, merged_by_peft(base, adapter, tmp_path / "theirs"))


DAMAGE: dict[str, tuple[Any, dict[str, Any], str]] = {  # a change of the stored tensors or of the config -> what is said
    "a factor is missing": (lambda t, e: t.pop(f"{e}.lora_B.weight"), {}, "lacks 'lora_B' of 'model.layers.1.mlp.experts.down_proj'"),
    "a parameter is missing": (
        lambda t, e: [t.pop(f"{e}.base_layer.lora_{factor}.weight") for factor in "AB"],
        {},
        "lacks 'lora_A' of 'model.layers.1.mlp.experts.gate_up_proj', which its config says it changes",
    ),
    "ranks of no experts": (
        lambda t, e: t.update({f"{e}.lora_A.weight": torch.ones(7, 64), f"{e}.lora_B.weight": torch.ones(32, 7)}),
        {},
        "'model.layers.1.mlp.experts.down_proj', (4, 32, 64) in the base, by factors of shapes (32, 7) and (7, 64)",
    ),
    "another width": (
        lambda t, e: t.update({f"{e}.lora_B.weight": torch.ones(30, 8)}),
        {},
        "'model.layers.1.mlp.experts.down_proj', (4, 32, 64) in the base, by factors of shapes (30, 8) and (8, 64)",
    ),
    "flat": (lambda t, e: t.update({f"{e}.lora_A.weight": torch.ones(8)}), {}, "by factors of shapes (32, 8) and (8,)"),
    "too many": (
        lambda t, e: t.update({f"{e}.base_layer.base_layer.lora_{each}.weight": torch.ones(8, 8) for each in "AB"}),
        {},
        "has factors of more than the 2 parameters of 'model.layers.1.mlp.experts' that its config targets",
    ),
    "not named": (lambda t, e: None, {"target_parameters": None}, "changes 'model.layers.0.mlp.experts.weight', which the base"),
    "named otherwise": (lambda t, e: None, {"target_parameters": ["experts.w1"]}, "changes 'model.layers.0.mlp.experts.weight', which"),
    "no list": (lambda t, e: None, {"target_parameters": 5}, "`target_parameters` of the adapter is 5, not a list of names"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_parts_that_do_not_fit(base_of, tmp_path, case):
    change, config, what = DAMAGE[case]
    adapter = lora(base_of("mixtral"), tmp_path / "adapter", r=2, **EXPERTS)
    tensors = load_tensors(adapter)
    change(tensors, "base_model.model.model.layers.1.mlp.experts")
    save_file(tensors, adapter / "adapter_model.safetensors")
    edit_json(adapter / "adapter_config.json", **config)
    with pytest.raises(CheckpointError) as error:
        open_adapter(adapter, open_checkpoint(base_of("mixtral")))
    assert what in str(error.value)


def test_targets_that_the_base_does_not_have(base_of, tmp_path):
    """PEFT's config of a kind of model names experts, and warns where a model has none; without transformers' word nobody knows."""
    base = shutil.copytree(base_of("mixtral"), tmp_path / "base")
    adapter = lora(base, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    edit_json(adapter / "adapter_config.json", target_parameters=["experts.w1"])
    assert_is_pefts(base, adapter, merged_by_peft(base, adapter, tmp_path / "theirs"))
    edit_json(base / "config.json", model_type="unheard-of", architectures=None)
    what = r"parameters of 'experts\.w1' that its config does not target, or transformers does not know"
    with pytest.raises(CheckpointError, match=what):
        open_adapter(adapter, open_checkpoint(base))


def test_experts_that_are_made_in_a_way_that_is_not_known_are_refused_by_name(base_of, tmp_path):
    pytest.importorskip("transformers.models.inkling2", reason="transformers has it from 5.23 on")
    base = base_of("inkling2_text")
    adapter = lora(base, tmp_path / "adapter", r=2, **EXPERTS)
    run = {"base": str(base), "experts": [{"name": "a", "path": str(adapter)}], "method": "linear", "out": {"path": tmp_path / "out"}}
    what = r"changes 'model\.layers\.1\.mlp\.experts\.gate_up_proj', which transformers makes of other tensors by Interleave"
    with pytest.raises(CheckpointError, match=what) as error:
        make_plan(MergeRun.model_validate(run))
    assert {fault.fix for fault in error.value.faults} == {"merge it into its base with PEFT (merge_and_unload), and give that folder"}


def test_experts_that_transformers_turns(base_of, tmp_path):
    """A model that sees, whose files hold (E, in, out) and whose memory holds (E, out, in)."""
    import peft
    import transformers

    base = base_of("qwen3_vl_moe")
    load = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained
    with quiet(), seeded(0):
        model = peft.get_peft_model(load(base), peft.LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS["target_parameters"]))
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape) if parameter.requires_grad else 0)
        model.save_pretrained(tmp_path / "adapter")
        peft.PeftModel.from_pretrained(load(base), tmp_path / "adapter").merge_and_unload().save_pretrained(tmp_path / "theirs")
    name = "language_model.layers.1.mlp.experts.gate_up_proj"
    assert load_tensors(base)[f"model.{name}"].shape == load(base).model.get_parameter(name).mT.shape
    assert_is_pefts(base, tmp_path / "adapter", tmp_path / "theirs")
