"""Models of text and images, and with blocks that predict further tokens: loaded by transformers, a result answers as its expert does."""

import shutil

import pytest
import torch
import transformers
from safetensors.torch import save_file

from recall_merge import MergeRun, RecallError, make_plan, merge
from recall_merge.files.checkpoint import open_checkpoint
from tiny import edit_json, fine_tuned, load_tensors, lora, make_model, quiet, save_model, seeded, write_rows

TEXT = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
EYE = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32, "patch_size": 4}
ENCODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def qwen3_5():
    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 8}
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    text = TEXT | linear | {"layer_types": kinds, "rope_parameters": ROPE | {"partial_rotary_factor": 1.0}}
    return transformers.Qwen3_5ForConditionalGeneration(transformers.Qwen3_5Config(text_config=text, vision_config=EYE))


def qwen2_5_vl():
    config = transformers.Qwen2_5_VLConfig(text_config=TEXT | {"rope_parameters": ROPE}, vision_config=EYE | {"fullatt_block_indexes": [1]})
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def internvl():
    vision = ENCODER | {"image_size": [16, 16], "patch_size": [8, 8]}
    return transformers.InternVLForConditionalGeneration(
        transformers.InternVLConfig(text_config=TEXT | {"model_type": "qwen2"}, vision_config=vision)
    )


def smolvlm():
    config = transformers.SmolVLMConfig(text_config=TEXT | {"model_type": "llama"}, vision_config=ENCODER, scale_factor=2)
    return transformers.SmolVLMForConditionalGeneration(config)


def saved(make, folder):
    with quiet(), seeded(0):
        model = make().eval()
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        return save_model(model, folder), type(model)


def logits(model_class, folder):
    with quiet(), torch.inference_mode():
        model, info = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not info["missing_keys"]
        return model.eval()(input_ids=IDS).logits


def a_run(base, experts, folder, **settings):
    entries = [{"name": path.name, "path": str(path)} for path in experts]
    return MergeRun.model_validate({"base": str(base), "experts": entries, "method": "linear", "out": {"path": folder}} | settings)


def samples(tmp_path):
    return {
        "path": str(write_rows(tmp_path / "rows.jsonl", [{"prompt": f"is it {word}?", "completion": "yes"} for word in ("a", "b", "c")]))
    }


@pytest.mark.parametrize("make", [qwen3_5, qwen2_5_vl, internvl, smolvlm])
def test_a_whole_model_of_text_and_images(make, tmp_path):
    base, model_class = saved(make, tmp_path / "base")
    experts = [fine_tuned(base, tmp_path / f"e{seed}", seed=seed) for seed in (1, 2)]
    assert open_checkpoint(base).layers.towers
    merge(a_run(base, experts[:1], tmp_path / "one", out={"path": tmp_path / "one", "reload": True}))
    torch.testing.assert_close(logits(model_class, tmp_path / "one"), logits(model_class, experts[0]), rtol=1e-4, atol=1e-5)
    result = merge(a_run(base, experts, tmp_path / "two", weights={"recall": {}}, samples=samples(tmp_path)))
    assert any("tensors outside the text model count as layer 0" in note for note in result.notes)
    assert logits(model_class, tmp_path / "two").isfinite().all()


def test_a_model_that_transformers_cannot_build_is_refused_in_the_plan(llama, tmp_path):
    base = shutil.copytree(llama, tmp_path / "base")
    edit_json(base / "config.json", model_type="unheard_of")
    expert = fine_tuned(base, tmp_path / "e1", seed=1)
    assert make_plan(a_run(base, [expert], tmp_path / "out"))  # a merge of like with like asks nobody
    for settings in ({"out": {"path": tmp_path / "out", "reload": True}}, {"weights": {"recall": {}}, "samples": samples(tmp_path)}):
        with pytest.raises(RecallError, match="transformers cannot build this model"):
            make_plan(a_run(base, [expert], tmp_path / "out", **settings))


def test_a_block_that_predicts_further_tokens(tmp_path):
    """As DeepSeek-V3 and GLM-4.5 store it: one block more than the config counts, which transformers does not read."""
    base = save_model(make_model("llama"), tmp_path / "base")
    edit_json(base / "config.json", num_nextn_predict_layers=1)
    tensors = load_tensors(base)
    more = {name.replace("layers.1.", "layers.2."): tensor.clone() for name, tensor in tensors.items() if "layers.1." in name}
    save_file(
        tensors | more | {"model.layers.2.eh_proj.weight": torch.randn(32, 64)}, base / "model.safetensors", metadata={"format": "pt"}
    )
    experts = [fine_tuned(base, tmp_path / "e1", seed=1), lora(base, tmp_path / "e2", r=2, target_modules=["q_proj"])]
    assert open_checkpoint(base).layers.of("model.layers.2.eh_proj.weight") == 3
    merge(a_run(base, experts[:1], tmp_path / "one", out={"path": tmp_path / "one", "reload": True}))
    wanted = logits(transformers.LlamaForCausalLM, experts[0])
    torch.testing.assert_close(logits(transformers.LlamaForCausalLM, tmp_path / "one"), wanted, rtol=1e-4, atol=1e-5)
    for rule in ("recall", "losses"):
        merge(a_run(base, experts, tmp_path / rule, weights={rule: {}}, samples=samples(tmp_path)))
