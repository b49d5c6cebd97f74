"""Parts that an adapter's config names and its file does not hold: PEFT says nothing and takes the base's; here they are named."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from recall_merge.files.adapter import open_adapter
from recall_merge.files.checkpoint import open_checkpoint
from recall_merge.runtime.errors import CheckpointError
from tiny import edit_json, load_tensors, lora, merged_by_peft

Q = "model.layers.0.self_attn.q_proj"
BIAS = "transformer.h.1.attn.c_attn.bias"
BROKEN: dict[str, tuple[str, dict[str, Any], str, str]] = {  # family, settings, keys that are taken out -> what is said
    "a module, in all blocks": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"]},
        "v_proj",
        "lacks 'model.layers.0.self_attn.v_proj', which its config says it changes",
    ),
    "a module that an expression means": (
        "llama",
        {"target_modules": r".*\.(q|v)_proj"},
        "v_proj",
        "lacks 'model.layers.1.self_attn.v_proj', which its config says it changes",
    ),
    "a module that transformers renamed": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["gate.weight"]},
        "mlp.gate",
        "lacks 'lora_A' of 'model.layers.0.mlp.gate.weight', which its config says it changes",
    ),
    "the head": ("llama", {"target_modules": ["q_proj", "lm_head"]}, "lm_head", "lacks 'lm_head', which its config says it changes"),
    "the embedding": ("neox", {"target_modules": ["dense", "embed_in"]}, "embed_in", "lacks 'gpt_neox.embed_in', which its config says"),
    "a block of several": (
        "llama",
        {"target_modules": ["q_proj"]},
        "layers.1",
        "lacks 'model.layers.1.self_attn.q_proj', which its config",
    ),
    "magnitudes": (
        "llama",
        {"target_modules": ["q_proj"], "use_dora": True},
        "magnitude",
        f"lacks the lora_magnitude_vector of '{Q}.weight', though its config has `use_dora: true`",
    ),
    "one magnitude": (
        "llama",
        {"target_modules": ["q_proj"], "use_dora": True},
        "layers.1.self_attn.q_proj.lora_magnitude",
        "lacks the lora_magnitude_vector of 'model.layers.1.self_attn.q_proj.weight'",
    ),
    "biases of the factors": (
        "gpt2",
        {"target_modules": ["c_attn"], "lora_bias": True},
        "lora_B.bias",
        "lacks the lora_B.bias of 'transformer.h.0.attn.c_attn.weight', though its config has `lora_bias: true`",
    ),
    "trained biases of targets": (
        "gpt2",
        {"target_modules": ["c_attn"], "bias": "lora_only"},
        "h.1.attn.c_attn.base_layer.bias",
        f"lacks '{BIAS}', though its config has `bias: lora_only`",
    ),
    "all trained biases": (
        "gpt2",
        {"target_modules": ["c_attn"], "bias": "all"},
        "ln_f",
        "lacks 'transformer.ln_f.bias', though its config has `bias: all`",
    ),
    "modules saved whole": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["model.norm", "lm_head"]},
        "model.norm",
        "lacks 'model.norm.weight', which its config names under `modules_to_save`",
    ),
    "modules whose names end so": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
        "layers.1.input_layernorm",
        "lacks 'model.layers.1.input_layernorm.weight', which its config names under `modules_to_save`",
    ),
    "single tokens": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
        "token_adapter",
        "lacks the tokens that its config names under `trainable_token_indices`",
    ),
}


def refusal(adapter, base):
    with pytest.raises(CheckpointError) as error:
        open_adapter(adapter, open_checkpoint(base))
    return str(error.value)


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_promised_must_be_there(bases, tmp_path, case):
    family, settings, gone, what = BROKEN[case]
    adapter = lora(bases(family), tmp_path / "adapter", r=2, **settings)
    open_adapter(adapter, open_checkpoint(bases(family)))
    tensors = load_tensors(adapter)
    assert any(gone in key for key in tensors)
    save_file({key: part for key, part in tensors.items() if gone not in key}, adapter / "adapter_model.safetensors")
    assert f"the adapter {what}" in refusal(adapter, bases(family))
    if "whole" not in case and "end so" not in case and "tokens" not in case:  # PEFT merges it all the same; those it cannot load either
        merged_by_peft(bases(family), adapter, tmp_path / "theirs")


def test_what_is_not_promised_may_be_absent(bases, tmp_path):
    base = open_checkpoint(bases("llama"))
    adapter = lora(base.folder, tmp_path / "adapter", r=2, target_modules=["q_proj"], layers_to_transform=[1])
    for names in (["q_proj", "c_attn", "w1"], ["q_proj", "embed_tokens"], r"model\.layers\.1\.self_attn\.q_proj|v_proj|model\.norm"):
        edit_json(adapter / "adapter_config.json", target_modules=names)
        assert list(open_adapter(adapter, base).edits) == ["model.layers.1.self_attn.q_proj.weight"]
    edit_json(adapter / "adapter_config.json", target_modules=["q_proj", "o_proj"], modules_to_save=["score"], exclude_modules=["o_proj"])
    assert len(open_adapter(adapter, base).edits) == 1
    edit_json(adapter / "adapter_config.json", layers_to_transform=[], target_modules=["layers.1.self_attn.q_proj"])
    assert len(open_adapter(adapter, base).edits) == 1


def test_biases_that_the_base_does_not_have(bases, tmp_path):
    for bias in ("all", "lora_only"):
        adapter = lora(bases("qwen2"), tmp_path / bias, r=2, target_modules=["q_proj", "o_proj"], bias=bias)
        assert len(open_adapter(adapter, open_checkpoint(bases("qwen2"))).edits) == (10 if bias == "all" else 6)


def test_magnitudes_that_peft_would_pass_over(bases, tmp_path):
    adapter = lora(bases("llama"), tmp_path / "adapter", r=2, target_modules=["q_proj"], use_dora=True)
    edit_json(adapter / "adapter_config.json", use_dora=False)
    what = f"the adapter holds the lora_magnitude_vector of '{Q}.weight', though its config has `use_dora: false`"
    assert what in refusal(adapter, bases("llama"))


def test_two_tensors_for_one_place(bases, tmp_path):
    base, file = bases("llama"), "adapter_model.safetensors"
    adapter = lora(base, tmp_path / "adapter", r=2, target_modules=["embed_tokens"], modules_to_save=["model.norm"])
    tensors, embedding = load_tensors(adapter), "base_model.model.model.embed_tokens"
    twice = {
        f"{embedding}.lora_A.weight": ("lora_embedding_A", "model.embed_tokens.weight"),
        "base_model.model.model.norm.modules_to_save.default.weight": ("norm", "model.norm.weight"),
        f"{embedding}.weight": ("base_layer", "model.embed_tokens.weight"),
    }
    for key, (word, name) in twice.items():
        one = next(part for each, part in tensors.items() if word in each)
        save_file(tensors | {key: torch.full_like(one, 2.0)}, adapter / file)
        assert f"the adapter gives '{name}' twice, with different values" in refusal(adapter, base)
    kept = tensors | {"base_model.model.model.norm.original_module.weight": torch.full((32,), 2.0)}
    save_file(kept, adapter / file)  # the base's own, kept aside
    edit = open_adapter(adapter, open_checkpoint(base)).edits["model.norm.weight"]
    assert torch.equal(edit.apply(torch.zeros(32)), tensors["base_model.model.model.norm.weight"])


def test_names_that_are_no_lists(bases, tmp_path):
    adapter = lora(bases("llama"), tmp_path / "adapter", r=2, target_modules=["q_proj"])
    for key, value in (("target_modules", 5), ("modules_to_save", "norm"), ("exclude_modules", [1]), ("target_parameters", {"a": 1})):
        before = json.loads((adapter / "adapter_config.json").read_text())
        edit_json(adapter / "adapter_config.json", **{key: value})
        assert f"`{key}` of the adapter is {value!r}, not a list of names" in refusal(adapter, bases("llama"))
        (adapter / "adapter_config.json").write_text(json.dumps(before))
    edit_json(adapter / "adapter_config.json", target_modules="(")
    assert "the adapter's pattern '(' is none" in refusal(adapter, bases("llama"))
