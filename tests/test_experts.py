"""Experts: checkpoints and adapters with one face; an expert of another architecture is refused with every difference."""

import hashlib
import shutil

import pytest
import torch
from blake3 import blake3
from safetensors.torch import save_file

from recall_merge.files.adapter import open_adapter
from recall_merge.files.checkpoint import open_checkpoint
from recall_merge.files.experts import AdapterExpert, BaseExpert, FullExpert, hash_expert, own_tensors
from recall_merge.files.hashing import ModelDigest, hash_file, hash_model
from recall_merge.files.same_architecture import check_checkpoint
from recall_merge.maths.deltas import dense
from recall_merge.runtime.errors import CheckpointError
from tiny import edit_json, fine_tuned, load_tensors, lora, make_model, make_tokenizer, merged_by_peft, save_model


@pytest.fixture
def base(llama):
    return open_checkpoint(llama)


@pytest.fixture
def tuned(llama, tmp_path):
    return fine_tuned(llama, tmp_path / "tuned", seed=1)


@pytest.fixture
def adapter(llama, tmp_path):
    return lora(llama, tmp_path / "adapter", r=4, target_modules=["q_proj"], modules_to_save=["norm"])


def merges_all(_):
    return True


def test_a_checkpoint_differs_everywhere(base, tuned):
    expert, theirs = FullExpert("math", open_checkpoint(tuned)), load_tensors(tuned)
    assert (expert.folder, expert.nbytes) == (tuned, base.nbytes)
    for name in base.tensors:
        own = base.read(name)
        assert torch.equal(expert.delta(name, own.clone()), theirs[name] - own)
        assert torch.equal(expert.own(name, own), theirs[name]) and expert.spec(name) == base.tensors[name].spec
    expected = ModelDigest()
    for name in sorted(theirs, reverse=True):
        expected.add(name, theirs[name])
    assert expert.hashes() == {"tensors": expected.hexdigest()}


def test_a_delta_leaves_the_file_and_the_base_as_they_are(base, tuned):
    expert, name = FullExpert("math", open_checkpoint(tuned)), "model.norm.weight"
    own = base.read(name)
    before, first = own.clone(), expert.delta(name, own)
    assert torch.equal(own, before) and torch.equal(expert.delta(name, own), first)


def test_a_checkpoint_of_half_precision_is_widened(llama, tmp_path):
    half = open_checkpoint(save_model(make_model(dtype="bfloat16"), tmp_path / "half"))
    name = "model.embed_tokens.weight"
    delta = FullExpert("math", half).delta(name, torch.zeros(96, 32))
    assert delta.dtype == torch.float32 and torch.equal(delta, load_tensors(tmp_path / "half")[name].float())


def test_an_adapter_differs_where_it_edits(base, adapter, tmp_path):
    expert = AdapterExpert("math", open_adapter(adapter, base))
    theirs = load_tensors(merged_by_peft(base.folder, adapter, tmp_path / "merged"))
    own = own_tensors(expert, base, merges_all)
    for name, tensor in own.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-7)
        delta = expert.delta(name, base.read(name))
        assert (delta is None) == (name not in expert.source.edits)
        if delta is not None:
            torch.testing.assert_close(dense(delta), theirs[name] - base.read(name), rtol=1e-4, atol=1e-6)
    assert set(expert.source.edits) == {name for name in theirs if not torch.equal(theirs[name], base.read(name))}
    assert expert.spec("model.norm.weight") == base.tensors["model.norm.weight"].spec
    assert expert.spec("model.layers.0.self_attn.q_proj.weight") is None and expert.spec("lm_head.weight") is None
    files = ("adapter_config.json", "adapter_model.safetensors")
    assert expert.hashes() == {file: hashlib.sha256((adapter / file).read_bytes()).hexdigest() for file in files}
    assert expert.folder == adapter and 0 < expert.nbytes < (adapter / files[1]).stat().st_size


def test_the_base_as_an_expert_changes_nothing(base):
    expert = BaseExpert("base", base)
    own = own_tensors(expert, base, merges_all)
    assert all(torch.equal(own[name], base.read(name)) for name in base.tensors)
    assert expert.delta("lm_head.weight", own["lm_head.weight"]) is None and expert.spec("lm_head.weight") is None
    assert (expert.folder, expert.nbytes, expert.hashes()) == (base.folder, 0, {})


def test_a_whole_model_of_an_expert_keeps_the_base_where_it_is_not_merged(base, tuned):
    own = own_tensors(FullExpert("math", open_checkpoint(tuned)), base, lambda name: "layers" in name)
    theirs = load_tensors(tuned)
    assert all(torch.equal(tensor, theirs[name] if "layers" in name else base.read(name)) for name, tensor in own.items())


def test_a_digest_knows_content_and_not_order(tmp_path):
    a, b = torch.arange(4.0), torch.ones(2, 2)

    def digest(*pairs):
        found = ModelDigest()
        for name, tensor in pairs:
            found.add(name, tensor)
        return found.hexdigest()

    first = digest(("a", a), ("b", b))
    assert first == digest(("b", b), ("a", a)) == digest(("a", a), ("b", b.T.contiguous().T))
    different = [digest(("a", a)), digest(("a", b), ("b", a)), digest(("a", a), ("b", b.view(4))), digest(("a", a), ("b", b.half()))]
    assert len({first, *different, digest(("a", a), ("b", b + 1))}) == 6
    found = ModelDigest()
    found.add("a", a)
    assert found.lines["a"].endswith(f" {blake3(a.numpy().tobytes()).hexdigest()}")
    (tmp_path / "file").write_bytes(b"abc")
    assert hash_file(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest()


def test_an_experts_state(base, tuned, adapter, llama, tmp_path):
    full, part = FullExpert("math", open_checkpoint(tuned)), AdapterExpert("math", open_adapter(adapter, base))
    again = AdapterExpert("other name", open_adapter(shutil.copytree(adapter, tmp_path / "copy"), base))
    assert hash_expert(full) == hash_model(open_checkpoint(tuned))
    assert hash_expert(part) == hash_expert(again) != hash_expert(full)
    lora(llama, tmp_path / "other", r=4, target_modules=["q_proj"], modules_to_save=["norm"], seed=1)
    assert hash_expert(AdapterExpert("math", open_adapter(tmp_path / "other", base))) != hash_expert(part)


class TestACheckpointMustFit:
    def refusal(self, folder, base, *expected, skipped=lambda _: False):
        """Each pair of (what, fix) is among the faults, which all stand in the expert's folder."""
        with pytest.raises(CheckpointError) as error:
            check_checkpoint("math", open_checkpoint(folder), base, skipped)
        for what, fix in expected:
            [fault] = [fault for fault in error.value.faults if what in fault.what]
            assert fix in fault.fix and fault.where.startswith(str(folder))
        return error.value.faults

    def test_and_does(self, base, tuned):
        check_checkpoint("math", open_checkpoint(tuned), base)

    def test_and_is_not_the_base_itself(self, base, llama, tmp_path):
        fix = "list only models that were fine-tuned from the base"
        self.refusal(llama, base, ("expert 'math' is the base itself", fix))
        self.refusal(shutil.copytree(llama, tmp_path / "copy"), base, ("expert 'math' is the base itself", fix))

    def test_in_its_architecture(self, base, bases):
        faults = self.refusal(
            bases("gpt2"),
            base,
            ("expert 'math' has model_type 'gpt2'; the base has 'llama'", "with the same architecture"),
            ("expert 'math' lacks tensor 'lm_head.weight' (and 20 more)", "fine-tune it from this base"),
            ("expert 'math' has the extra tensor 'transformer.h.0.attn.c_attn.bias' (and 27 more)", "fine-tune it from this base"),
        )
        assert len(faults) < 15  # the first few of each kind

    def test_in_its_depth(self, base, tmp_path):
        deep = save_model(make_model("llama", num_hidden_layers=3), tmp_path / "deep")
        self.refusal(
            deep,
            base,
            ("expert 'math' has num_hidden_layers 3; the base has 2", "with the same architecture"),
            ("expert 'math' has the extra tensor 'model.layers.2.input_layernorm.weight' (and 8 more)", "fine-tune it from this base"),
        )

    def test_in_its_width(self, base, tmp_path):
        wide = save_model(make_model("llama", hidden_size=64), tmp_path / "wide")
        self.refusal(
            wide,
            base,
            ("expert 'math' has hidden_size 64; the base has 32", "with the same architecture"),
            ("'lm_head.weight' of shape (96, 64); the base has (96, 32) (and 20 more)", "fine-tune it from this base"),
        )

    def test_in_its_settings(self, base, tuned):
        edit_json(tuned / "config.json", rms_norm_eps=0.1, rope_parameters={"rope_theta": 5.0, "rope_type": "default"})
        self.refusal(
            tuned,
            base,
            ("expert 'math' has rms_norm_eps 0.1; the base has 1e-06", "with the same architecture"),
            ("expert 'math' has rope_parameters.rope_theta 5.0; the base has 10000.0", "with the same architecture"),
        )

    def test_but_not_in_settings_that_do_not_matter(self, base, tuned):
        edit_json(tuned / "config.json", use_cache=False, dtype="bfloat16", eos_token_id=1, transformers_version="4.0", rms_norm_eps=None)
        check_checkpoint("math", open_checkpoint(tuned), base)

    def test_but_may_have_other_tokens(self, base, tmp_path):
        grown = save_model(make_model("llama", vocab_size=100), tmp_path / "grown", tokenizer=make_tokenizer())
        check_checkpoint("math", open_checkpoint(grown), base)

    def test_in_the_tensors_that_are_merged(self, base, tuned):
        tensors = load_tensors(tuned)
        del tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(8, 32)
        save_file(tensors | {"model.extra.weight": torch.zeros(3)}, tuned / "model.safetensors")
        fix = "fine-tune it from this base, or name the tensor under `skip:` to keep the base's"
        self.refusal(
            tuned,
            base,
            ("expert 'math' lacks tensor 'model.norm.weight'", fix),
            ("expert 'math' has the extra tensor 'model.extra.weight'", fix),
            ("expert 'math' has 'model.layers.0.mlp.up_proj.weight' of shape (8, 32); the base has (64, 32)", fix),
        )
        wrong = {"model.norm.weight", "model.extra.weight", "model.layers.0.mlp.up_proj.weight"}
        check_checkpoint("math", open_checkpoint(tuned), base, lambda name: name in wrong)
