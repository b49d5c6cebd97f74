"""Names and dtypes of a model's files beside what transformers itself makes of them."""

from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import architectures
from recall_merge import MergeRun, RecallError, make_plan, merge
from recall_merge.files.names import unwrapped
from tiny import fine_tuned, load_model, load_tensors, lora, make_model, merged_by_peft, quiet, save_model, seeded

SIZE: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE |= {"num_key_value_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ROUTED = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 8, "head_dim": 8, "chunk_size": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # transformers' classes, and settings of the config
    "deepseek": ("DeepseekV3", SIZE | ROUTED | MLA),
    "glm": ("Glm4Moe", SIZE | ROUTED | {"head_dim": 8}),
    "gpt-oss": ("GptOss", SIZE | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "nemotron-h": ("NemotronH", SIZE | MAMBA | {"num_hidden_layers": 3, "layers_block_type": ["mamba", "attention", "mamba"]}),
    "llama": ("Llama", SIZE),
}


def make(kind: str) -> Any:
    name, settings = MODELS[kind]
    with seeded(0), quiet():
        model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**settings))
        for tensor in (*model.parameters(), *(buffer for key, buffer in model.named_buffers() if "bias" in key)):
            tensor.add_(0.05 * torch.randn(tensor.shape))
    return model.eval()


def a_run(base, expert, target, **out):
    experts = [{"name": "math", "path": str(expert)}]
    return MergeRun.model_validate({"base": str(base), "experts": experts, "method": "linear", "out": {"path": target} | out})


def logits(folder, dtype):
    with torch.inference_mode():
        return load_model(folder, dtype=dtype)(input_ids=torch.arange(3, 35)[None]).logits


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", MODELS)
def test_what_the_architecture_keeps_in_float32_is_kept(kind, dtype, tmp_path):
    base = save_model(make(kind), tmp_path / "base")
    expert = fine_tuned(base, tmp_path / "expert", seed=1, scale=0.05)
    merge(a_run(base, expert, tmp_path / "out", dtype=dtype))
    with quiet():
        load_model(expert, dtype=dtype).save_pretrained(tmp_path / "theirs")
    ours, theirs = load_tensors(tmp_path / "out"), load_tensors(tmp_path / "theirs")
    assert {name: tensor.dtype for name, tensor in ours.items()} == {name: tensor.dtype for name, tensor in theirs.items()}
    for name, tensor in ours.items():  # base + (expert - base) is one rounding of float32 away from the expert
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-2 if tensor.dtype == getattr(torch, dtype) else 1e-5, atol=1e-6)
    kept = {name for name, tensor in ours.items() if tensor.dtype == torch.float32}
    assert bool(kept) is (kind in ("deepseek", "glm") or (kind, dtype) == ("gpt-oss", "float16"))
    torch.testing.assert_close(logits(tmp_path / "out", dtype), logits(expert, dtype), rtol=2e-2, atol=2e-2)


def test_a_model_without_such_tensors_in_its_own_dtype_asks_nobody(tmp_path, monkeypatch):
    base = save_model(make("llama").to(torch.bfloat16), tmp_path / "base")
    expert = fine_tuned(base, tmp_path / "expert", seed=1)
    monkeypatch.setattr("recall_merge.merging.plan.in_memory", lambda *_: pytest.fail("it is asked"))
    merge(a_run(base, expert, tmp_path / "out", dtype="bfloat16"))


EYE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
QWEN_EYE = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32, "patch_size": 4}
TEXT = SIZE | {"vocab_size": 104}  # not three times the width: a fused map of the eye has as many rows


def seeing(kind: str) -> Any:
    """A tiny model that sees, by transformers' class of that name."""
    if kind == "Llava":
        eye = EYE | {"model_type": "clip_vision_model", "projection_dim": 32}
        settings = {"text_config": TEXT | {"model_type": "llama"}, "vision_config": eye}
    else:
        settings = {"text_config": TEXT | ROPE, "vision_config": QWEN_EYE | {"fullatt_block_indexes": [1]}}
    with seeded(0), quiet():
        config = getattr(transformers, f"{kind}Config")(**settings)
        return getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()


NEWER = {  # names in the files -> names in memory, as another version of transformers saves them
    "nemotron-h": lambda name: name.replace("backbone.", "model."),
    "Llava": lambda name: (
        name.removeprefix("language_model.")
        if "lm_head" in name
        else name.replace("language_model.model.", "model.language_model.")
        if name.startswith("language_model")
        else f"model.{name}"
    ),
    "Qwen2_5_VL": lambda name: (
        name if "lm_head" in name else f"model.{name}" if name.startswith("visual") else name.replace("model.", "model.language_model.", 1)
    ),
}


@pytest.mark.parametrize("kind", NEWER)
def test_an_expert_under_other_names_is_the_one_that_transformers_loads(kind, tmp_path):
    base = save_model(make(kind) if kind in MODELS else seeing(kind), tmp_path / "base")
    expert = fine_tuned(base, tmp_path / "expert", seed=1, scale=0.05)
    old = load_file(expert / "model.safetensors")
    merge(a_run(base, expert, tmp_path / "same"))
    save_file({NEWER[kind](name): tensor for name, tensor in old.items()}, expert / "model.safetensors", metadata={"format": "pt"})
    assert not set(load_tensors(expert)) & {name for name in old if "layers" in name}
    merge(a_run(base, expert, tmp_path / "out"))
    ours = load_tensors(tmp_path / "out")
    assert ours.keys() == old.keys() and all(torch.equal(ours[name], same) for name, same in load_tensors(tmp_path / "same").items())
    architecture: Any = getattr(transformers, f"{kind}ForConditionalGeneration", transformers.AutoModelForCausalLM)
    with quiet():
        theirs, info = architecture.from_pretrained(expert, output_loading_info=True)
        again = architecture.from_pretrained(tmp_path / "out")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


def test_two_tensors_for_one_place_are_refused(tmp_path):
    base = save_model(make("nemotron-h"), tmp_path / "base")
    expert = fine_tuned(base, tmp_path / "expert", seed=1)
    tensors = load_file(expert / "model.safetensors")
    tensors["model.norm_f.weight"] = tensors["backbone.norm_f.weight"] + 1
    save_file(tensors, expert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecallError, match=r"expert 'math' has the extra tensor 'model\.norm_f\.weight'"):
        make_plan(a_run(base, expert, tmp_path / "out"))


@pytest.mark.parametrize("kind", ["nemotron-h", "gpt-oss", "Qwen3_5"])
def test_an_adapter_by_names_in_memory_is_merged_as_peft_merges_it(kind, tmp_path):
    if kind == "Qwen3_5":  # a model that sees; the adapter is trained on its text model alone
        linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
        rope = {"rope_parameters": ROPE["rope_parameters"] | {"partial_rotary_factor": 1.0}}
        text = TEXT | linear | rope | {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
        with seeded(0), quiet():
            config = transformers.Qwen3_5Config(text_config=text, vision_config=QWEN_EYE | {"depth": 3})
            base = save_model(transformers.Qwen3_5ForConditionalGeneration(config).eval(), tmp_path / "base")
    else:
        base = save_model(make(kind), tmp_path / "base")
    adapter = lora(base, tmp_path / "adapter", r=2, target_modules=["q_proj", "v_proj"])
    plan = make_plan(a_run(base, adapter, tmp_path / "out"))
    with quiet():
        from peft import PeftModel

        merged = PeftModel.from_pretrained(load_model(base), adapter).merge_and_unload().state_dict()
    source: Any = plan.experts[0].source
    edits = source.edits
    assert len(edits) == len(load_tensors(adapter)) // 2
    for name, edit in edits.items():
        [theirs] = [
            tensor for key, tensor in merged.items() if key.split(".layers.")[-1] == name.split(".layers.")[-1] and "visual" not in key
        ]
        torch.testing.assert_close(edit.apply(plan.base.read(name)), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("before", "default"),
    [("", ""), ("_orig_mod.base_model.model.", ""), ("base_model.model._orig_mod.", ""), ("module.base_model.model.", ".default")],
)
def test_wrapped_adapters_scale_as_peft_scales_them(before, default, tmp_path):
    base = save_model(make_model("llama"), tmp_path / "base")
    pattern = {r"^model\.layers\.0\.self_attn\.q_proj": 64}
    adapter = lora(base, tmp_path / "adapter", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], alpha_pattern=pattern)
    theirs = load_tensors(merged_by_peft(base, adapter, tmp_path / "theirs"))
    file = adapter / "adapter_model.safetensors"
    names = {name: name.removeprefix("base_model.model.").replace("_A.", f"_A{default}.") for name in load_file(file)}
    save_file({(before or "base_model.model.") + names[name]: part for name, part in load_file(file).items()}, file)
    merge(a_run(base, adapter, tmp_path / "out"))
    for name, tensor in load_tensors(tmp_path / "out").items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)


def test_an_adapter_that_gives_a_factor_twice_is_refused(tmp_path):
    base = save_model(make_model("llama"), tmp_path / "base")
    adapter = lora(base, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    parts = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(parts | {f"module.{name}": parts[name].clone()}, adapter / "adapter_model.safetensors")
    make_plan(a_run(base, adapter, tmp_path / "out"))  # the same once more
    save_file(parts | {f"module.{name}": parts[name] + 1}, adapter / "adapter_model.safetensors")
    with pytest.raises(RecallError, match=r"the adapter gives 'model\.layers\.0\.self_attn\.q_proj\.weight' twice, with different values"):
        make_plan(a_run(base, adapter, tmp_path / "out"))


def test_an_adapter_that_changes_a_shared_block_twice_is_refused(tmp_path):
    """Zamba2 computes one block at several depths. PEFT gives each its own factors, and its merge adds them all to the one weight."""
    sizes = {"vocab_size": 104, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    mamba = {"n_mamba_heads": 8, "mamba_ngroups": 1, "mamba_d_state": 8, "mamba_headdim": 8, "num_mem_blocks": 1, "adapter_rank": 4}
    kinds = ["mamba", "mamba", "hybrid"] * 2
    config = transformers.Zamba2Config(**sizes, **mamba, num_hidden_layers=6, layers_block_type=kinds, use_shared_attention_adapter=False)
    with seeded(0), quiet():
        base = save_model(transformers.Zamba2ForCausalLM(config), tmp_path / "base")
    both = lora(base, tmp_path / "both", target_modules=["q_proj"])
    where = r"'model\.layers\.2\.shared_transformer\.self_attn\.q_proj' and 'model\.layers\.5\.shared_transformer\.self_attn\.q_proj'"
    with pytest.raises(RecallError, match=f"{where} apart, which are one tensor in the base"):
        make_plan(a_run(base, both, tmp_path / "out"))
    one = lora(base, tmp_path / "one", target_modules=["q_proj"], layers_to_transform=[2])
    theirs = load_tensors(merged_by_peft(base, one, tmp_path / "theirs"))
    merge(a_run(base, one, tmp_path / "out"))
    for name, tensor in load_tensors(tmp_path / "out").items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)


def test_names_that_are_no_wrappers_stay():
    for name in ("model.module.weight", "base_model.weight", "encoder.default.weight", "h.0.attn.c_attn.weight"):
        assert unwrapped(name) == name


@pytest.mark.parametrize("kind", ["deepseek_v4", "hy_v3", "laguna"])
def test_shared_experts_that_the_files_call_otherwise(kind, tmp_path):
    base = save_model(architectures.build(kind), tmp_path / "base")
    adapter = lora(base, tmp_path / "adapter", r=2, lora_alpha=8, target_modules="all-linear")
    parts = load_tensors(adapter)
    modules = {key.split(".lora_")[0].removeprefix("base_model.model.") for key in parts}
    assert not {f"{module}.weight" for module in modules} <= set(load_tensors(base))
    merge(a_run(base, adapter, tmp_path / "out"))
    theirs = load_tensors(merged_by_peft(base, adapter, tmp_path / "theirs"))
    if kind == "laguna":  # a pattern without escapes makes PEFT lose these on loading: their value by hand
        for word in ("down_proj", "gate_proj", "up_proj"):
            module = f"base_model.model.model.layers.1.mlp.shared_experts.{word}"
            product = parts[f"{module}.lora_B.weight"] @ parts[f"{module}.lora_A.weight"]
            theirs[f"model.layers.1.mlp.shared_expert.{word}.weight"] += 4 * product
    for name, tensor in load_tensors(tmp_path / "out").items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)
