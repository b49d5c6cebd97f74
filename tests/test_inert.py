"""Configs that make a library fetch, import or run something: they do nothing, or are refused, whatever a library's own gate says."""

import json
import shutil
import sys

import pytest
import torch
from transformers import AutoTokenizer

from recall_merge import RecallError, make_plan, merge
from recall_merge.files.checkpoint import open_checkpoint
from recall_merge.models.load import build_model, load_config, load_tokenizer, load_trainable
from tiny import edit_json, fine_tuned, lora, make_tokenizer, quiet
from tiny import load_model as load_by_transformers

IDS = torch.tensor([[3, 1, 4, 1, 5]])
KERNELS = [
    {"attn_implementation": "stranger/kernel"},
    {"_attn_implementation": "stranger/kernel"},
    {"_attn_implementation_internal": "stranger/kernel:layer"},
    {"attn_implementation": {"": "stranger/kernel"}},
    {"attn_implementation": "flash_attention_2"},
    {"attn_implementation": "kernels-community/flash-attn2"},
    {"experts_implementation": "stranger/kernel"},
    {"_experts_implementation": "sonicmoe"},
    {"use_kernels": True, "kernel_config": {"RMSNorm": "stranger/kernel:Norm"}},
    {"fusion_config": {"patch_embeddings": True}},
    {"distributed_config": {"tp_plan": "auto"}},
    {"use_kernels": True, "_attn_implementation": "paged|stranger/kernel"},
]


@pytest.fixture
def model(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "model")


@pytest.mark.parametrize("named", KERNELS, ids=lambda named: "-".join(f"{key}={value}" for key, value in named.items()))
def test_kernels_that_a_config_names_are_not_used(llama, model, named, tmp_path):
    edit_json(model / "config.json", **named)
    with torch.inference_mode():
        assert torch.equal(build_model(model)(IDS).logits, load_by_transformers(llama, dtype="float32")(IDS).logits)
    config = load_config(model)
    assert config.name_or_path == str(model)
    assert all("stranger" not in str(value) and "sonic" not in str(value) for value in vars(config).values())
    expert = fine_tuned(llama, tmp_path / "expert", seed=1)
    run = {"base": str(model), "experts": [{"name": "a", "path": str(expert)}], "method": "linear", "out": {"path": str(tmp_path / "out")}}
    merge(run | {"out": {"path": str(tmp_path / "out"), "reload": True}})
    assert "stranger" not in (tmp_path / "out/config.json").read_text()


def test_parts_of_a_config_name_no_kernels_or_checkpoints_either(bases):
    from recall_merge.runtime.inert import inert_config

    timm = {"model_type": "timm_wrapper", "architecture": "hf-hub:stranger/model", "model_args": {"checkpoint_path": "evil.pth"}}
    text = {"hidden_size": 32, "experts_implementation": {"": "eager"}}
    named = {"text_config": text | {"_attn_implementation": "stranger/kernel"}, "vision_config": timm, "towers": [timm | {"depth": 2}]}
    plain = {"model_type": "timm_wrapper"}
    assert inert_config(named) == {"text_config": text, "vision_config": plain, "towers": [plain | {"depth": 2}]}
    kept = {"attn_implementation": "flash_attention_2", "architecture": "resnet50", "model_args": {"global_pool": "avg"}}
    assert inert_config(kept, local=True) == kept


def test_other_weights_and_adapters_beside_a_model_are_refused(llama, model, tmp_path):
    """transformers reads the file that `transformers_weights` names, and fetches the base of an adapter beside a model."""
    shutil.copyfile(model / "model.safetensors", model / "other.safetensors")
    edit_json(model / "config.json", transformers_weights="other.safetensors")
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "stranger/model"}))
    with pytest.raises(RecallError, match=r"holds an adapter as well as a model(.|\n)*takes its weights from 'other.safetensors'"):
        open_checkpoint(model)


@pytest.mark.parametrize(
    "named",
    [
        {"fast_tokenizer_files": ["../outside/tokenizer.4.0.json"]},
        {"tokenizer_file": "OUTSIDE", "vocab_file": "OUTSIDE", "merges_file": "OUTSIDE"},
        {"init_inputs": ["OUTSIDE"]},
        {"gguf_file": "OUTSIDE"},
        {"tokenizer_object": "OUTSIDE"},
        {"special_tokens_map_file": "/root/.cache/special_tokens_map.json"},
    ],
    ids=lambda named: next(iter(named)),
)
def test_files_that_a_tokenizers_config_names_outside_are_not_opened(llama, model, named, tmp_path):
    outside = tmp_path / "outside/tokenizer.4.0.json"
    outside.parent.mkdir()
    other = make_tokenizer()
    other.add_tokens(["secret"])
    other.save_pretrained(outside.parent)
    (outside.parent / "tokenizer.json").rename(outside)
    edit_json(model / "tokenizer_config.json", **json.loads(json.dumps(named).replace("OUTSIDE", str(outside))))
    with quiet():
        expected = AutoTokenizer.from_pretrained(llama)
    ours = load_tokenizer(model)
    assert (ours.get_vocab(), ours.name_or_path) == (expected.get_vocab(), str(model))
    ours.save_pretrained(tmp_path / "saved")
    with quiet():
        assert AutoTokenizer.from_pretrained(tmp_path / "saved").get_vocab() == expected.get_vocab()
    assert str(outside.parent) not in (tmp_path / "saved/tokenizer_config.json").read_text()


def test_an_adapter_imports_nothing(llama, tmp_path, monkeypatch):
    """PEFT imports the module that `megatron_core` names."""
    (tmp_path / "stranger_module.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    adapter = lora(llama, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    edit_json(adapter / "adapter_config.json", megatron_core="stranger_module", megatron_config={"a": 1})
    with pytest.raises(RecallError, match="megatron_config"):
        load_trainable(adapter, llama)
    assert "stranger_module" not in sys.modules


ODD = [
    ("bos_token_id", []),
    ("text_config", {"a": 1}),
    ("layer_types", 0),
    ("architectures", True),
    ("id2label", -1),
    ("dtype", ["x"]),
]


@pytest.mark.parametrize(("key", "value"), ODD, ids=[key for key, _ in ODD])
def test_whatever_transformers_raises_about_a_config_is_told_in_the_plan(llama, model, key, value, tmp_path):
    edit_json(model / "config.json", **{key: value})
    expert = fine_tuned(llama, tmp_path / "expert", seed=1)
    out = {"path": str(tmp_path / "out"), "reload": True}
    with pytest.raises(RecallError, match="transformers cannot build this model"):
        make_plan({"base": str(model), "experts": [{"name": "a", "path": str(expert)}], "method": "linear", "out": out})


@pytest.mark.parametrize(
    ("key", "value"), [("model_max_length", "x"), ("added_tokens_decoder", [1]), ("extra_special_tokens", 3), ("auto_map", 1)]
)
def test_whatever_transformers_raises_about_a_tokenizer_is_told(model, key, value):
    edit_json(model / "tokenizer_config.json", **{key: value})
    with pytest.raises(RecallError, match="there is no usable tokenizer"):
        load_tokenizer(model)
