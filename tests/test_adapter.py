"""Adapters: base + delta is what PEFT's own merge makes of them, tensor by tensor; what cannot be kept is refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import IA3Config, PeftModel
from safetensors.torch import save_file

from recall_merge import MergeRun, make_plan
from recall_merge.files.adapter import Names, _Parts, is_adapter, open_adapter
from recall_merge.files.checkpoint import open_checkpoint
from recall_merge.maths.deltas import LowRank, dense
from recall_merge.merging.inputs import check_adapter_base
from recall_merge.runtime.errors import CheckpointError
from tiny import adapter as peft_adapter
from tiny import edit_json, fine_tuned, load_model, load_tensors, lora, make_model, merged_by_peft, quiet, save_model

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "llama-tied": ["q_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gemma2": ["q_proj", "o_proj", "gate_proj"],
    "neox": ["query_key_value", "dense"],
    "phi3": ["qkv_proj", "gate_up_proj"],
    "mixtral": ["q_proj", "o_proj"],
}
EMBEDDING = {"gpt2": "wte", "neox": "embed_in"}
NORM = {"gpt2": "ln_f", "neox": "final_layer_norm"}
TIED = {"llama-tied", "gpt2", "gemma2"}
WITH_BIASES = {"gpt2", "neox"}
KINDS = {
    "alpha over r": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 6, "use_dora": True},
    "rslora and dora": {"r": 4, "lora_alpha": 6, "use_dora": True, "use_rslora": True},
    "patterns": {"r": 4, "rank_pattern": {"TARGET0": 2, r"^.*\.1\..*TARGET1": 6}, "alpha_pattern": {r".*\.0\..*TARGET0": 3, "TARGET1": 5}},
    "patterns and rslora": {"r": 4, "use_rslora": True, "rank_pattern": {"TARGET0": 2}, "alpha_pattern": {"TARGET1": 5}},
    "one block": {"r": 4, "layers_to_transform": [1]},
    "norm saved whole": {"r": 4, "modules_to_save": ["NORM"]},
    "all biases": {"r": 4, "bias": "all"},
    "biases of targets": {"r": 4, "bias": "lora_only"},
    "all biases, norm saved whole": {"r": 4, "bias": "all", "modules_to_save": ["NORM"]},
    "single tokens": {"r": 4, "trainable_token_indices": [7, 3, 60]},
    "single tokens by module": {"r": 4, "trainable_token_indices": {"EMBEDDING": [7, 3, 60]}},
    "embedding": {"r": 4, "and": ["EMBEDDING"]},
    "embedding, dora": {"r": 4, "and": ["EMBEDDING"], "use_dora": True},
    "gaussian start": {"r": 4, "init_lora_weights": "gaussian"},
    "orthogonal start": {"r": 4, "init_lora_weights": "orthogonal"},
    "mica": {"r": 4, "init_lora_weights": "mica"},
    # untied bases only
    "head": {"r": 4, "and": ["lm_head"]},
    "head, dora": {"r": 4, "and": ["lm_head"], "use_dora": True},
    "head saved whole": {"r": 4, "modules_to_save": ["lm_head"]},
    "embedding saved whole": {"r": 4, "modules_to_save": ["EMBEDDING"]},
    "embedding and head": {"r": 4, "and": ["EMBEDDING", "lm_head"]},
    "embedding and head saved whole": {"r": 4, "modules_to_save": ["EMBEDDING", "lm_head"]},
    # bases with biases only
    "lora_bias": {"r": 4, "lora_alpha": 6, "lora_bias": True},
    "lora_bias, all biases": {"r": 4, "lora_alpha": 6, "lora_bias": True, "bias": "all"},
}
UNTIED = ("head", "head, dora", "head saved whole", "embedding saved whole", "embedding and head", "embedding and head saved whole")
CASES = [
    (family, kind)
    for family in TARGETS
    for kind in KINDS
    if not (family in TIED and kind in UNTIED) and not (family not in WITH_BIASES and kind.startswith("lora_bias"))
    if family not in {"llama-tied", "phi3", "mixtral"} or not kind.endswith(("start", "mica"))
]


def config_of(family, kind):
    """A kind's settings in the words of a family."""
    words = {"EMBEDDING": EMBEDDING.get(family, "embed_tokens"), "NORM": NORM.get(family, "norm")}
    words |= {f"TARGET{place}": target for place, target in enumerate(TARGETS[family])}
    text = json.dumps({"target_modules": TARGETS[family]} | KINDS[kind])
    for word, own in words.items():
        text = text.replace(word, own)
    config = json.loads(text)
    config["target_modules"] += config.pop("and", [])
    return config


def edited(base, adapter):
    """Every tensor of the base with the adapter's edit, in float32; `delta` must say the same as `apply`."""
    tensors = {}
    for name in base.tensors:
        own = base.read(name).float()
        edit = adapter.edits.get(name)
        tensors[name] = own if edit is None else edit.apply(own)
        if edit is not None:
            torch.testing.assert_close(own + dense(edit.delta(own)), tensors[name], rtol=1e-5, atol=1e-6)
    return tensors


def assert_equal(ours, theirs):
    assert ours.keys() <= theirs.keys()
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape, name
        assert (tensor - theirs[name]).norm() <= 1e-6 * theirs[name].norm(), name


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_base_and_delta_are_what_peft_merges(bases, tmp_path, family, kind):
    base = open_checkpoint(bases(family))
    folder = lora(base.folder, tmp_path / "adapter", **config_of(family, kind))
    adapter = open_adapter(folder, base)
    ours, theirs = edited(base, adapter), load_tensors(merged_by_peft(base.folder, folder, tmp_path / "merged"))
    assert_equal(ours, theirs)
    assert not theirs.keys() - ours.keys()
    assert adapter.edits and not any(torch.equal(ours[name], base.read(name)) for name in adapter.edits)
    untouched = base.tensors.keys() - adapter.edits.keys()
    assert all(torch.equal(theirs[name], base.read(name)) for name in untouched)


def test_a_plain_adapter_stays_in_factors(llama, tmp_path):
    base = open_checkpoint(llama)
    adapter = open_adapter(lora(llama, tmp_path / "a", r=4, target_modules=["q_proj", "embed_tokens"]), base)
    for name, edit in adapter.edits.items():
        delta = edit.delta(base.read(name))
        assert isinstance(delta, LowRank) and delta.rank == 4 and delta.shape == base.tensors[name].spec.shape
    stored = sum(tensor.numel() * 4 for key, tensor in load_tensors(tmp_path / "a").items() if "lora_" in key)
    assert adapter.nbytes == stored  # the base's embedding, which PEFT stores beside its factors, changes nothing
    dora = open_adapter(lora(llama, tmp_path / "b", r=4, use_dora=True, target_modules=["q_proj"]), base)
    assert all(isinstance(edit.delta(base.read(name)), torch.Tensor) for name, edit in dora.edits.items())


def test_of_conv1d_and_linear_each_is_read_its_own_way(tmp_path):
    base = save_model(make_model("gpt2", tie_word_embeddings=False), tmp_path / "base")
    folder = lora(base, tmp_path / "a", r=4, target_modules=["c_attn", "attn.c_proj", "lm_head"])
    assert json.loads((folder / "adapter_config.json").read_text())["fan_in_fan_out"] is False  # what the last module was
    checkpoint = open_checkpoint(base)
    theirs = load_tensors(merged_by_peft(base, folder, tmp_path / "merged"))
    assert_equal(edited(checkpoint, open_adapter(folder, checkpoint)), theirs)
    edit_json(folder / "adapter_config.json", fan_in_fan_out=True)
    assert_equal(edited(checkpoint, open_adapter(folder, checkpoint)), theirs)


def test_a_base_stored_without_leading_words(bases, tmp_path):
    short = shutil.copytree(bases("gpt2"), tmp_path / "short")
    save_file({name.removeprefix("transformer."): t for name, t in load_tensors(short).items()}, short / "model.safetensors")
    folder = lora(bases("gpt2"), tmp_path / "a", r=4, target_modules=["c_attn"], modules_to_save=["ln_f"])
    long, bare = open_checkpoint(bases("gpt2")), open_checkpoint(short)
    ours = edited(bare, open_adapter(folder, bare))
    assert {f"transformer.{name}" for name in ours} == long.tensors.keys()
    assert_equal({f"transformer.{name}": tensor for name, tensor in ours.items()}, edited(long, open_adapter(folder, long)))


def test_a_name_that_may_mean_two_tensors_means_none(llama, tmp_path):
    base = shutil.copytree(llama, tmp_path / "base")
    tensors = load_tensors(base)
    save_file(tensors | {f"{tower}.tower.0.q_proj.weight": torch.zeros(32, 32) for tower in ("left", "right")}, base / "model.safetensors")
    names = Names(open_checkpoint(base))
    assert names.find("tower.0.q_proj.weight") is None
    assert names.find("left.tower.0.q_proj.weight") == names.find("model.left.tower.0.q_proj.weight") == "left.tower.0.q_proj.weight"
    assert names.find("layers.0.self_attn.q_proj.weight") == "model.layers.0.self_attn.q_proj.weight"
    assert names.find("other.layers.0.self_attn.q_proj.weight") is None


def test_a_module_that_transformers_renamed(bases, tmp_path):
    base = open_checkpoint(bases("mixtral"))
    folder = lora(base.folder, tmp_path / "a", r=4, target_modules=["q_proj"], modules_to_save=["gate"])
    assert "base_model.model.model.layers.0.mlp.gate.weight" in load_tensors(folder)
    adapter = open_adapter(folder, base)
    assert "model.layers.0.block_sparse_moe.gate.weight" in adapter.edits
    assert_equal(edited(base, adapter), load_tensors(merged_by_peft(base.folder, folder, tmp_path / "merged")))


def test_an_adapter_of_single_experts_from_before_they_were_fused(bases, tmp_path):
    base = open_checkpoint(bases("mixtral"))
    folder = lora(base.folder, tmp_path / "a", r=4, target_modules=["q_proj"])
    module = "model.layers.0.block_sparse_moe.experts.1.w2"
    up, down = torch.randn(32, 4), torch.randn(4, 64)
    new = {f"base_model.model.{module}.lora_A.weight": down, f"base_model.model.{module}.lora_B.weight": up}
    save_file(load_tensors(folder) | new, folder / "adapter_model.safetensors")
    edit = open_adapter(folder, base).edits[f"{module}.weight"]
    torch.testing.assert_close(dense(edit.delta(torch.zeros(32, 64))), 2 * up @ down)  # lora_alpha 8 over r 4


def test_tied_factors_are_added_once(bases, tmp_path):
    """PEFT's merge adds them once for the embedding and once for the head, which is the same tensor; its model before that does not."""
    base = open_checkpoint(bases("llama-tied"))
    folder = lora(base.folder, tmp_path / "a", r=4, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    assert "base_model.model.lm_head.lora_A.weight" in load_tensors(folder)
    with quiet(), torch.no_grad():
        tokens = torch.arange(3, 20)[None]
        theirs = PeftModel.from_pretrained(load_model(base.folder), folder).eval()(tokens).logits
        model = load_model(base.folder)
        model.load_state_dict(edited(base, open_adapter(folder, base)), strict=False)
        torch.testing.assert_close(model(tokens).logits, theirs, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(load_model(base.folder)(tokens).logits, theirs, rtol=1e-2)


@pytest.mark.parametrize("modules", [["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_tied_modules_saved_whole(bases, tmp_path, modules):
    base = open_checkpoint(bases("llama-tied"))
    folder = lora(base.folder, tmp_path / "a", r=4, target_modules=["q_proj"], modules_to_save=modules, ensure_weight_tying=True)
    assert "base_model.model.lm_head.weight" in load_tensors(folder)
    assert_equal(edited(base, open_adapter(folder, base)), load_tensors(merged_by_peft(base.folder, folder, tmp_path / "merged")))


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
@pytest.mark.parametrize("kind", UNTIED)
def test_a_head_trained_apart_from_the_embedding_it_is_tied_to(bases, tmp_path, family, kind):
    base = open_checkpoint(bases(family))
    folder = lora(base.folder, tmp_path / "a", **config_of(family, kind))
    with pytest.raises(CheckpointError, match="the adapter trains the head apart from the embedding") as error:
        open_adapter(folder, base)
    assert f"'{base.embedding}', to which the base ties it\n  where: {folder}/adapter_model.safetensors" in str(error.value)
    assert "fix: train both with `ensure_weight_tying=True`, or untie the base first" in str(error.value)


def test_an_embedding_with_more_rows(llama, tmp_path):
    base = open_checkpoint(llama)
    folder = lora(llama, tmp_path / "a", r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    grown = {k: torch.cat([t, t[:4]]) if "embed_tokens" in k or "lm_head" in k else t for k, t in load_tensors(folder).items()}
    save_file(grown, folder / "adapter_model.safetensors")
    edit = open_adapter(folder, base).edits["model.embed_tokens.weight"]
    assert edit.apply(base.read("model.embed_tokens.weight")).shape == (100, 32)


REFUSED = {  # settings of the adapter -> what is said
    "pissa": ({"init_lora_weights": "pissa"}, "was initialised with pissa, which changes the base's own weights", "path_initial_model"),
    "olora": ({"init_lora_weights": "olora"}, "was initialised with olora", "path_initial_model_for_weight_conversion"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "uses `alora_invocation_tokens`, which is more than a change", "merge it into its base"),
    "lora_bias": (
        {"lora_bias": True},
        "adds a bias to 'model.layers.0.self_attn.q_proj', which has none in the base",
        "without `lora_bias`",
    ),
    "layers": ({"layer_replication": [[0, 2], [0, 2]]}, "uses `layer_replication`, which is more than a change", "merge it into its base"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_no_merge_of_tensors_can_keep(llama, tmp_path, case):
    config, what, fix = REFUSED[case]
    folder = lora(llama, tmp_path / "a", r=4, target_modules=["q_proj"], **config)
    refusal(folder, llama, what, fix, where="adapter_model.safetensors" if "bias" in case else "adapter_config.json")


def test_another_kind_of_adapter(llama, tmp_path):
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    folder = peft_adapter(llama, tmp_path / "a", config)
    refusal(folder, llama, "the adapter is of type IA3, not LORA", "merge it into its base with PEFT", where="adapter_config.json")


def test_an_adapter_for_another_width(llama, tmp_path):
    wide = save_model(make_model("llama", hidden_size=64), tmp_path / "wide")
    folder = lora(wide, tmp_path / "a", r=4, target_modules=["q_proj"], modules_to_save=["norm"])
    error = refusal(folder, llama, "layers.1.self_attn.q_proj.weight' in its shape (64, 64); the base has (32, 32)", "give the base it was")
    assert "the adapter changes 'model.norm.weight' in its shape (64,); the base has (32,)" in error
    assert error.count("the adapter changes") == 7  # q_proj of two blocks; every norm


def test_an_adapter_for_another_architecture_or_depth(llama, bases, tmp_path):
    folder = lora(bases("gpt2"), tmp_path / "a", r=4, target_modules=["c_attn"])
    refusal(folder, llama, "the adapter changes 'transformer.h.0.attn.c_attn.weight', which the base does not have", "trained on")
    deep = save_model(make_model("llama", num_hidden_layers=3), tmp_path / "deep")
    folder = lora(deep, tmp_path / "b", r=4, target_modules=["q_proj"])
    refusal(folder, llama, "the adapter changes 'model.layers.2.self_attn.q_proj.weight', which the base does not have", "trained on")


def test_pickled_missing_and_damaged_weights(llama, tmp_path):
    folder = lora(llama, tmp_path / "a", r=4, target_modules=["q_proj"])
    weights = folder / "adapter_model.safetensors"
    assert is_adapter(folder) and not is_adapter(llama)
    data = weights.read_bytes()
    weights.write_bytes(data[:-10])
    refusal(folder, llama, "the header describes", "copy or download it again")
    weights.rename(folder / "adapter_model.bin")
    refusal(folder, llama, "the adapter's weights are pickled; loading a pickle runs code", "with PEFT where you trust it", where="")
    (folder / "adapter_model.bin").unlink()
    refusal(folder, llama, "there is no adapter_model.safetensors", "copy the whole adapter folder", where="")
    (folder / "adapter_config.json").unlink()
    error = refusal(folder, llama, "there is no adapter_config.json", "give the folder of a Hugging Face model or adapter", where="")
    assert "there is no adapter_model.safetensors" in error  # both at once
    refusal(tmp_path / "nowhere", llama, "there is no adapter_config.json", "give the folder", where="")


def test_values_of_the_config_that_cannot_be(llama, tmp_path):
    folder = lora(llama, tmp_path / "a", r=4, target_modules=["q_proj"])
    edit_json(folder / "adapter_config.json", r="4", lora_alpha=-1, rank_pattern={"(": 2}, alpha_pattern={"q_proj": True})
    error = refusal(
        folder, llama, "`r` of the adapter is '4', not a number above 0", where="adapter_config.json", fix="copy the adapter again"
    )
    assert "`lora_alpha` of the adapter is -1" in error
    assert "`rank_pattern` of the adapter holds '(', which is not a pattern" in error
    assert "`alpha_pattern.q_proj` of the adapter is True" in error


DAMAGE = {  # a change of the stored tensors -> what is said
    "a factor is missing": (lambda t, q: t.pop(f"{q}.lora_A.weight"), "by one of two factors; the other is missing"),
    "ranks differ": (lambda t, q: t.update({f"{q}.lora_A.weight": torch.zeros(3, 32)}), "(32, 4) and (3, 32), which cannot be multiplied"),
    "a factor is flat": (lambda t, q: t.update({f"{q}.lora_A.weight": torch.zeros(4)}), "in its shape (32,); the base has (32, 32)"),
    "rank 0": (
        lambda t, q: t.update({f"{q}.lora_A.weight": torch.zeros(0, 32)}),
        "factors of 'model.layers.0.self_attn.q_proj' are of rank 0",
    ),
    "magnitudes": (lambda t, q: t.update({f"{q}.lora_magnitude_vector": torch.ones(3)}), "by magnitudes of shape (3,); it has 32 outputs"),
    "whole numbers": (lambda t, q: t.update({f"{q}.lora_A.weight": torch.ones(4, 32, dtype=torch.int8)}), "by numbers of dtype I8"),
    "another part": (lambda t, q: t.update({f"{q}.lora_C.weight": torch.ones(3)}), "lora_C.weight', which"),
    "twice": (
        lambda t, q: t.update({f"{q}.weight": torch.ones(32, 32), f"{q}.base_layer.weight": torch.zeros(32, 32)}),
        "gives 'model.layers.0.self_attn.q_proj.weight' twice, with different values",
    ),
    "tokens": (
        lambda t, q: t.update({"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 32)}),
        "`trainable_token_indices` of the adapter lists no tokens for 'model.embed_tokens'",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_parts_that_do_not_fit(llama, tmp_path, case):
    folder = lora(llama, tmp_path / "a", r=4, target_modules=["q_proj"])
    tensors = load_tensors(folder)
    change, what = DAMAGE[case]
    change(tensors, "base_model.model.model.layers.0.self_attn.q_proj")
    save_file(tensors, folder / "adapter_model.safetensors")
    refusal(folder, llama, what, "", where="adapter_config.json" if case == "tokens" else "adapter_model.safetensors")


def test_tokens_that_the_base_does_not_have(llama, tmp_path):
    folder = lora(llama, tmp_path / "a", r=4, target_modules=["q_proj"], trainable_token_indices=[5, 9])
    edit_json(folder / "adapter_config.json", trainable_token_indices=[5, 96])
    refusal(folder, llama, "'model.embed_tokens.weight' in row 96; the base has 96 rows", "give the base it was trained on")
    edit_json(folder / "adapter_config.json", trainable_token_indices=[5])
    refusal(folder, llama, "in rows of shape (2, 32); its config names 1 tokens", "the base it was trained on")


def refusal(folder, base, what, fix, *, where="adapter_model.safetensors"):
    """The text of the error that an adapter is refused with; one of its faults says this, of this place, with this fix."""
    with pytest.raises(CheckpointError) as error:
        open_adapter(folder, open_checkpoint(base))
    [fault] = [fault for fault in error.value.faults if what in fault.what]
    assert Path(fault.where) == folder / where
    assert fix in fault.fix
    return str(error.value)


class TestTheBaseThatAnAdapterNames:
    @pytest.fixture
    def check(self, llama, tmp_path):
        folder = lora(llama, tmp_path / "adapter", r=4, target_modules=["q_proj"])

        def run(reference, base=llama, same_base=False, **config):
            edit_json(folder / "adapter_config.json", **config)
            checkpoint = open_checkpoint(base)
            check_adapter_base("math", open_adapter(folder, checkpoint), checkpoint, str(reference), same_base)

        return run

    @pytest.fixture
    def cached(self, llama):
        """A model in the hub's cache, as the hub's library lays it out."""
        from huggingface_hub import constants

        commit = "0123456789" * 4
        repo = Path(constants.HF_HUB_CACHE, "models--org--tiny")
        shutil.copytree(llama, repo / "snapshots" / commit)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(commit)
        yield repo / "snapshots" / commit
        shutil.rmtree(repo)

    def test_may_be_the_same_folder(self, check, llama, monkeypatch):
        check(llama)
        monkeypatch.chdir(llama.parent)
        check(llama.name)

    def test_may_be_the_same_name_on_the_hub(self, check):
        check("org/tiny", base_model_name_or_path="org/tiny")
        check("org/tiny@v1", base_model_name_or_path="Org/Tiny")
        check("org/tiny", base_model_name_or_path="org/tiny", revision="v1")
        check("org/tiny@v1", base_model_name_or_path="org/tiny", revision="v1")
        check("org/tiny@" + "a" * 40, base_model_name_or_path=f"/gone/models--org--tiny/snapshots/{'a' * 40}")

    def test_may_be_another_place_with_the_same_weights(self, check, llama, tmp_path, cached):
        copy = shutil.copytree(llama, tmp_path / "copy")
        check(copy)
        check(llama, base_model_name_or_path=str(copy))
        check(llama, base_model_name_or_path="org/tiny")
        check("other/name", base_model_name_or_path="org/tiny")
        check(llama, base_model_name_or_path=str(cached))
        check("org/tiny", base_model_name_or_path=str(llama))

    def test_is_refused_if_it_is_another(self, check, llama, tmp_path, cached):
        other = fine_tuned(llama, tmp_path / "other", seed=1)
        with pytest.raises(CheckpointError) as error:
            check(llama, base_model_name_or_path=str(other))
        assert str(error.value) == (
            f"the adapter 'math' was trained on '{other}', the run's base is '{llama}'\n  where: {tmp_path}/adapter/adapter_config.json\n"
            "  fix: set `same_base: true` on the expert (`recall learn`: --same-base) if it is the same model under another name"
        )
        with pytest.raises(CheckpointError, match="was trained on 'org/tiny', the run's base is"):
            check(other, base=other, base_model_name_or_path="org/tiny")
        with pytest.raises(CheckpointError, match="'org/tiny', the run's base is 'org/tiny@v2', and the former is not here"):
            check("org/tiny@v2", base_model_name_or_path="org/tiny", revision="v1")

    def test_is_refused_if_it_is_not_known(self, check, llama):
        for named in ("org/elsewhere", "/gone/base", "a/b/c"):
            with pytest.raises(CheckpointError, match=f"was trained on '{named}', .* and the former is not here to be compared"):
                check(llama, base_model_name_or_path=named)
        with pytest.raises(CheckpointError, match="the adapter 'math' does not say which model it was trained on"):
            check(llama, base_model_name_or_path=None)

    def test_may_be_vouched_for(self, check, llama):
        check(llama, base_model_name_or_path="/gone/base", same_base=True)


def test_a_pattern_that_takes_for_ever_is_refused(llama, tmp_path):
    """PEFT hands the patterns of a config to a matcher that tries 2^150 ways here."""
    parts = _Parts(tmp_path, {"r": 4, "lora_alpha": 8, "rank_pattern": {"(?:a|aa)+(?=b)c": 2}}, open_checkpoint(llama))
    with pytest.raises(CheckpointError, match="takes too long to match"):
        parts.scale("model.layers." + "a" * 300 + "c", rank=None)


class TestWithoutItsWholeEffect:
    """What trainers and copies leave behind when something went wrong; a whole checkpoint like that is refused too."""

    @pytest.fixture
    def trained(self, llama, tmp_path):
        folder = lora(llama, tmp_path / "adapter", r=2, target_modules=["q_proj", "v_proj"])
        return folder, load_tensors(folder)

    def rewrite(self, folder, tensors):
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    def test_products_of_zeros(self, llama, trained):
        folder, tensors = trained
        for factor in ("lora_B", "lora_A"):
            self.rewrite(folder, {key: torch.zeros_like(part) if factor in key else part for key, part in tensors.items()})
            run = {"base": str(llama), "experts": [{"name": "a", "path": str(folder)}], "method": "linear", "out": {"path": folder / "out"}}
            with pytest.raises(CheckpointError, match="expert 'a' changes nothing: every product of its factors is zero"):
                make_plan(MergeRun.model_validate(run))
        assert open_adapter(folder, open_checkpoint(llama)).edits  # it may still be looked at

    def test_a_file_without_tensors(self, llama, trained):
        self.rewrite(trained[0], {})
        refusal(trained[0], llama, "the adapter's file holds no tensors", "save it again with all of its weights gathered")

    def test_a_block_that_the_config_promises(self, llama, trained):
        folder, tensors = trained
        base = open_checkpoint(llama)
        self.rewrite(folder, {key: part for key, part in tensors.items() if "layers.1.self_attn.q_proj" not in key})
        what = "the adapter lacks 'model.layers.1.self_attn.q_proj', which its config says it changes"
        refusal(folder, llama, what, "layers_to_transform")
        for own in (r".*\.self_attn\.(q|v)_proj", "all-linear"):
            edit_json(folder / "adapter_config.json", target_modules=own)
            refusal(folder, llama, what, "layers_to_transform")
        for own in (r".*\.v_proj|.*\.0\..*\.q_proj", ["v_proj", "layers.0.self_attn.q_proj"]):
            edit_json(folder / "adapter_config.json", target_modules=own)
            assert len(open_adapter(folder, base).edits) == 3
        edit_json(folder / "adapter_config.json", target_modules=["q_proj", "v_proj"], exclude_modules=["layers.1.self_attn.q_proj"])
        assert len(open_adapter(folder, base).edits) == 3

    def test_a_whole_model_in_the_same_folder(self, llama, trained):
        shutil.copy(llama / "model.safetensors", trained[0])
        what = "the folder holds a whole model and an adapter: which of them is meant?"
        refusal(trained[0], llama, what, "move one of the two to a folder of its own", where="")

    def test_empty_parts_and_convolutions_have_words_of_their_own(self, llama, trained):
        folder, tensors = trained
        key = next(key for key in tensors if "lora_B" in key)
        self.rewrite(folder, tensors | {key: torch.zeros(0)})
        refusal(folder, llama, f"the adapter's '{key}' is empty", "stage3_gather_16bit_weights_on_model_save")
        self.rewrite(folder, tensors | {key: tensors[key].reshape(*tensors[key].shape, 1, 1, 1)})
        refusal(
            folder,
            llama,
            "the adapter changes the convolution 'model.layers.0.self_attn.q_proj', by factors of 5",
            "merge it into its base",
        )
