"""Layers from names: by hand, in every tiny family, and (slow) in every causal language model of transformers, by order of computation."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from recall_merge.files.checkpoint import Checkpoint, block_count
from recall_merge.files.safetensors import CODES, StoredTensor, TensorSpec
from recall_merge.maths.layers import Layers, find_layers
from recall_merge.models.hidden_states import find_blocks
from recall_merge.runtime.errors import CheckpointError
from tiny import FAMILIES, load_model, load_tensors


def test_names_worked_by_hand():
    layers = Layers("transformer.h", 3)
    expected = {
        "transformer.wte.weight": 0,
        "transformer.wpe.weight": 0,
        "transformer.word_embeddings_layernorm.weight": 0,
        "transformer.h.0.ln_1.weight": 1,
        "transformer.h.2.mlp.embed.weight": 3,
        "transformer.ln_f.weight": 4,
        "lm_head.weight": 4,
        "embed_out.weight": 4,
        "transformer.h.extra.weight": 4,  # no block has this name
        "transformer.hh.0.weight": 4,
    }
    assert {name: layers.of(name) for name in expected} == expected
    assert layers.last == 4


def test_what_brings_other_inputs_to_the_text_model_comes_before_its_blocks():
    """Names of SmolVLM, Granite-speech and InternVL."""
    names = {
        "model.text_model.embed_tokens.weight": 0,
        "model.text_model.layers.0.mlp.weight": 1,
        "model.text_model.norm.weight": 3,
        "lm_head.weight": 3,
        "model.connector.modality_projection.proj.weight": 0,
        "model.vision_model.post_layernorm.weight": 0,
        "encoder.layers.0.attn.norm.weight": 0,
        "projector.qformer.layernorm.weight": 0,
        "mlp1.0.weight": 0,
        "resampler.proj": 0,
    }
    layers = Layers("model.text_model.layers", 2, towers=True)
    assert {name: layers.of(name) for name in names} == names
    plain = Layers("model.layers", 2)
    assert [plain.of(name) for name in ("model.connector.weight", "mtp.pre_fc_norm_embedding.weight", "model.layers.2.eh_proj.weight")] == [
        3
    ] * 3


def test_towers_of_equal_depth_are_told_apart_by_the_embedding():
    text = ["language_model.model.embed_tokens.weight", *(f"language_model.model.layers.{i}.{part}" for i in range(2) for part in "abc")]
    eye = [f"vision_tower.encoder.layers.{i}.{part}" for i in range(2) for part in "abc"]
    assert find_layers([*eye, *text], 2, embedding=text[0], towers=True) == Layers("language_model.model.layers", 2, towers=True)
    streams = [f"model.altup_projections.{i}.weight" for i in range(2)]
    blocks = [f"model.layers.{i}.{part}" for i in range(2) for part in "abc"]
    assert find_layers([*streams, *blocks], 2, embedding="model.embed_tokens.weight").prefix == "model.layers"
    with pytest.raises(ValueError, match=r"the config says 2 blocks; .*: layers \(2\), blocks \(2\)|blocks \(2\), layers \(2\)"):
        find_layers(
            [f"{name}.{i}.{part}" for name in ("blocks", "layers") for i in range(2) for part in "abc"], 2, embedding="embed.weight"
        )


def test_blocks_that_predict_further_tokens_follow_the_last_one():
    names = [f"model.layers.{i}.w" for i in range(3)]
    assert find_layers(names, 2, extra=1) == Layers("model.layers", 2)
    with pytest.raises(ValueError, match="the config says 2 blocks"):
        find_layers(names, 2)


KINDS = {
    "model.embed_tokens.weight": "embedding",
    "model.layers.0.self_attn.q_proj.weight": "attention",
    "model.layers.0.self_attn.q_norm.weight": "norm",
    "model.layers.0.input_layernorm.weight": "norm",
    "model.layers.0.post_attention_layernorm.weight": "norm",
    "model.layers.1.mlp.down_proj.weight": "mlp",
    "model.layers.1.block_sparse_moe.experts.0.w1.weight": "mlp",
    "model.layers.1.mlp.experts.gate_up_proj": "mlp",
    "model.layers.1.mixer.in_proj.weight": "other",
    "model.norm.weight": "norm",
    "lm_head.weight": "head",
}


def test_kinds_of_modules():
    layers = Layers("model.layers", 2)
    assert {name: layers.kind_of(name) for name in KINDS} == KINDS
    gpt2 = Layers("h", 1)
    names = ("wte.weight", "wpe.weight", "h.0.ln_1.weight", "h.0.attn.c_attn.bias", "h.0.mlp.c_fc.weight", "ln_f.weight")
    assert [gpt2.kind_of(name) for name in names] == ["embedding", "embedding", "norm", "attention", "mlp", "norm"]


def test_lists_inside_blocks_such_as_experts_are_not_blocks():
    names = [f"model.layers.{block}.experts.{expert}.w" for block in range(2) for expert in range(2)]
    assert find_layers([*names, "model.norm.weight"], 2) == Layers("model.layers", 2)
    assert find_layers(["0.w", "1.w", "x.0.w", "x.1.w"], 2) == Layers("x", 2)  # a list at the very top has no name


@pytest.mark.parametrize(
    ("names", "blocks", "what"),
    [
        ([], 1, "the config says 1 blocks; numbered lists among the tensor names: none"),
        (["h.0.w", "h.1.w"], 3, "the config says 3 blocks; .* names: h \\(2\\)"),
        (["h.0.w", "h.2.w"], 2, "the config says 2 blocks; .* names: h \\(2\\)"),
        (["h.0.w", "g.0.w"], 1, "the config says 1 blocks; .* names: g \\(1\\), h \\(1\\)"),
        (["h.0.w"], -1, "the config says -1 blocks"),
    ],
)
def test_blocks_that_cannot_be_found(names, blocks, what):
    with pytest.raises(ValueError, match=what):
        find_layers(names, blocks)


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_families_compute_in_the_order_of_their_layers(bases, family):
    model = load_model(bases(family))
    layers = find_layers(load_tensors(bases(family)), block_count(model.config.to_dict()))
    assert_order(model, layers, torch.tensor([[1, 5, 9]]))


def assert_order(model, layers, tokens):
    """Outside the blocks, what runs before the first block has layer 0, and what runs after it the last."""
    blocks = find_blocks(model, layers)
    inside = {id(parameter) for parameter in blocks.parameters()}
    begun: list[int] = []
    wrong: dict[str, tuple[int, int]] = {}
    seen: set[int] = set()  # a head that is tied to the embedding runs after the blocks, but is an embedding

    def note(name, module):
        def hook(*_):
            for own, parameter in module.named_parameters(recurse=False):
                full, wanted = f"{name}.{own}".removeprefix("."), layers.last if begun else 0
                if id(parameter) not in inside and id(parameter) not in seen and layers.of(full) != wanted:
                    wrong[full] = (layers.of(full), wanted)
                seen.add(id(parameter))

        return hook

    hooks = [block.register_forward_pre_hook(lambda *_: begun.append(1)) for block in blocks]
    hooks += [module.register_forward_pre_hook(note(name, module)) for name, module in model.named_modules()]
    try:
        with torch.inference_mode():
            model(input_ids=tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    assert wrong == {}
    assert begun and seen


# The rest needs transformers' whole table of architectures. The weights are on torch's meta device, so that sizes do not matter.

SETTINGS = {  # where transformers' defaults do not give a model
    "deepseek_v2": {"num_experts_per_tok": 2, "moe_intermediate_size": 1408},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"is_decoder": True},
    "xmod": {"default_language": "en_XX"},
}
UNKNOWN_COUNT = "the config does not say how many blocks its decoder has"
REFUSED = {  # architecture -> why it cannot be merged
    **dict.fromkeys(["bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus"], UNKNOWN_COUNT),
    **dict.fromkeys(["plbart", "prophetnet", "trocr", "whisper"], UNKNOWN_COUNT),
    "blt": "three stacks of blocks, of bytes and of patches",
    "cpmant": "its embedding has more rows than the config says: prompts",
    "ctrl": "its embedding is called 'w'",
    "hrm_text": "two stacks of blocks that take turns",
    "inkling2_text": "two more lists of as many tensors as there are blocks",
    "mllama": "its embedding has more rows than the config says: images",
    "moshi": "its embedding has more rows than the config says: audio",
    "musicgen": "its input is not text: it has an embedding for each codebook",
    "musicgen_melody": "its input is not text: it has an embedding for each codebook",
    "xlm": "attention, networks and norms are in separate lists",
}
NOT_BUILT = {  # architecture -> why there is no model to test
    "cohere_compass_text": "the defaults lack rope parameters",
    "dbrx": "the defaults are incomplete",
    "dots1": "the defaults are incomplete",
    "gemma3n": "its image tower needs packages that are not installed",
    "gemma4_assistant": "the defaults contradict each other",
    "gemma4_unified_assistant": "the defaults contradict each other",
    "qwen4_exp": "the defaults are incomplete",
    "qwen4_exp_text": "the defaults are incomplete",
}
NOT_RUN = {"jetmoe", "longcat_flash", "xlnet", "xmod"}  # their forward pass reads numbers, and the meta device has none


def architectures():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(kind):
    """A model from transformers' own defaults, without numbers."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    from tiny import quiet

    with quiet():
        config = CONFIG_MAPPING[kind](**SETTINGS.get(kind, {}))
        classes = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        architecture = classes[0] if isinstance(classes, tuple) else classes
        if not issubclass(architecture.config_class, type(config)):  # a text model whose config covers more than text
            config = config.get_text_config()
        config._attn_implementation = "eager"
        with torch.device("meta"):
            return architecture(config).to(torch.bfloat16).eval()


def as_checkpoint(model):
    """The checkpoint that the model would be saved as: names as in files, not as in memory."""
    from pathlib import Path

    from transformers.core_model_loading import revert_weight_conversion

    tensors = revert_weight_conversion(model, dict(model.state_dict()))
    config = model.config.to_dict()
    blocks = block_count(config)
    if blocks is None:
        raise ValueError("the config does not say how many blocks there are")
    stored = {
        name: StoredTensor(TensorSpec(CODES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape)), Path("model.safetensors"), 0)
        for name, tensor in tensors.items()
    }
    return Checkpoint(Path(), config, stored, find_layers(tensors, blocks))


@pytest.mark.slow
@pytest.mark.parametrize("kind", architectures())
def test_every_causal_language_model_of_transformers(kind, monkeypatch):
    if kind in NOT_BUILT:
        with pytest.raises((KeyError, AttributeError, TypeError, ValueError, ImportError, StrictDataclassError)):
            build(kind)
        return
    if kind in REFUSED:
        with pytest.raises((ValueError, CheckpointError, AttributeError)):
            _ = as_checkpoint(build(kind)).embedding
        return
    model = build(kind)
    checkpoint = as_checkpoint(model)
    layers = checkpoint.layers
    assert {layers.of(name) for name in checkpoint.tensors} >= set(range(layers.blocks + 2)) - {layers.last}
    embedding = model.get_input_embeddings().weight
    assert checkpoint.tensors[checkpoint.embedding].spec.shape == embedding.shape
    in_memory = find_layers(model.state_dict(), layers.blocks)

    def layers_of(parameter):
        return {in_memory.of(name) for name, own in model.named_parameters(remove_duplicate=False) if own is parameter}

    head = model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    assert layers_of(embedding) == ({0, in_memory.last} if tied else {0})
    assert head is None or tied or layers_of(head.weight) == {in_memory.last}
    if kind not in NOT_RUN:
        monkeypatch.setattr(torch.Tensor, "item", lambda tensor: 1)  # the meta device has no numbers; masks ask for some
        monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: False)
        monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
        assert_order(model, in_memory, torch.zeros(1, 4, dtype=torch.long, device="meta"))


@pytest.mark.slow
def test_the_tables_above_name_existing_architectures():
    assert not (set(SETTINGS) | set(REFUSED) | set(NOT_BUILT) | NOT_RUN) - set(architectures())
