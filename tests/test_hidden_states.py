"""Hidden states of blocks that pass several streams, lists or other layouts; the reference is transformers, with models cut off earlier."""

import pytest
import torch
import transformers

from recall_merge import MergeRun, RecallError, make_plan, merge
from recall_merge.files.checkpoint import open_checkpoint
from recall_merge.merging.layerwise import compute_weights
from recall_merge.models.hidden_states import pooled_hidden_states
from tiny import fine_tuned, quiet, save_model, seeded, write_rows

TOKENS = [[5, 6, 7, 8], [10, 11], [12, 13, 14, 15, 16, 17], [40]]
SIZE = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128}


def gemma3n(blocks):
    own = {"num_kv_shared_layers": 0, "laurel_rank": 4, "intermediate_size": [64] * blocks, "activation_sparsity_pattern": [0.0] * blocks}
    own |= {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8, "layer_types": ["full_attention"] * blocks}
    return transformers.Gemma3nForCausalLM(transformers.Gemma3nTextConfig(**(SIZE | IDS | own), num_hidden_layers=blocks))


def deepseek_v4(blocks):
    own = {"moe_intermediate_size": 16, "q_lora_rank": 16, "num_experts_per_tok": 2, "n_routed_experts": 4, "o_groups": 2, "o_lora_rank": 8}
    own |= {"mlp_layer_types": ["moe"] * blocks, "layer_types": ["sliding_attention"] * blocks, "qk_rope_head_dim": 8}
    own |= {"num_hidden_layers": blocks, "sliding_window": 16}
    return transformers.DeepseekV4ForCausalLM(transformers.DeepseekV4Config(**(SIZE | IDS | own)))


def openai_gpt(blocks):
    size = {"n_embd": 32, "n_layer": blocks, "n_head": 4, "n_positions": 128, "vocab_size": 96}
    return transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**size))


def fuyu(blocks):
    text = {**SIZE, **IDS, "model_type": "persimmon", "num_hidden_layers": blocks}
    return transformers.FuyuForCausalLM(transformers.FuyuConfig(text_config=text, image_size=16, patch_size=8))


def xlnet(blocks):
    return transformers.XLNetLMHeadModel(transformers.XLNetConfig(vocab_size=96, d_model=32, n_layer=blocks, n_head=4, d_inner=64))


def build(make, blocks):
    with quiet(), seeded(0):
        model = make(blocks).eval()
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def a_run(base, tmp_path, method="recall"):
    experts = [{"name": f"e{seed}", "path": str(fine_tuned(base, tmp_path / f"e{seed}", seed=seed))} for seed in (1, 2)]
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"prompt": f"is the fox {word}?", "completion": "yes"} for word in ("quick", "lazy", "good")]
    )
    run = {"base": str(base), "experts": experts, "method": method, "samples": {"path": str(rows)}, "out": {"path": tmp_path / "out"}}
    return MergeRun.model_validate(run)


@pytest.mark.parametrize("make", [gemma3n, deepseek_v4])
def test_several_streams_are_what_the_model_would_hand_to_its_head(make, tmp_path):
    whole, blocks = build(make, 3), 3
    base = open_checkpoint(save_model(whole, tmp_path / "base"))
    found = pooled_hidden_states(whole, TOKENS, base.layers, threads=2)
    state = whole.state_dict()
    for end in range(1, blocks + 1):
        cut = build(make, end)  # tables of all blocks side by side, as Gemma 3n's inputs per layer, begin with those of the first ones
        cut.load_state_dict({name: state[name][tuple(map(slice, tensor.shape))] for name, tensor in cut.state_dict().items()})
        with torch.inference_mode():
            wanted = [cut.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0].mean(0) for ids in TOKENS]
        torch.testing.assert_close(found[end], torch.stack(wanted), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], found[1])


@pytest.mark.parametrize("make", [gemma3n, deepseek_v4, openai_gpt, fuyu])
def test_recall_runs(make, tmp_path):
    """Streams, a list for a tuple, and blocks under other names in memory than in files."""
    base = save_model(build(make, 2), tmp_path / "base")
    plan = make_plan(a_run(base, tmp_path))
    weights = compute_weights(plan)
    assert weights.similarity is not None and weights.similarity.isfinite().all() and len(set(weights.similarity[:, 0].tolist())) > 2
    assert any("several streams" in note for note in weights.notes) == (make in (gemma3n, deepseek_v4))
    assert torch.equal(merge(plan.run).weights, weights.weights)


@pytest.mark.parametrize("make", [openai_gpt, fuyu])
def test_other_outputs_and_names_give_transformers_own_hidden_states(make, tmp_path):
    model = build(make, 3)
    base = open_checkpoint(save_model(model, tmp_path / "base"))
    found = pooled_hidden_states(model, TOKENS, base.layers)
    for row, ids in enumerate(TOKENS):
        with torch.inference_mode():
            wanted = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states
        for layer in range(3):  # the last one of transformers' is behind the final norm
            torch.testing.assert_close(found[layer, row], wanted[layer][0].mean(0), rtol=1e-4, atol=1e-5)


def test_a_layout_that_cannot_be_compared_is_refused_in_the_plan(tmp_path):
    base = save_model(build(xlnet, 2), tmp_path / "base")
    with pytest.raises(
        RecallError, match=r"hands them hidden states of shape \(3, 2, 32\) for 2 texts of 3 tokens\n.*\n  fix: .*`method: linear`"
    ):
        make_plan(a_run(base, tmp_path))
    assert not (tmp_path / "out").exists()
