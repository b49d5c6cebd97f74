"""Names and dtypes of a model's files beside what transformers itself makes of them."""

from typing import Any

import pytest
import torch
import transformers

from recall_merge import MergeRun, merge
from tiny import fine_tuned, load_model, load_tensors, quiet, save_model, seeded

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
