"""What merges of others are known to get wrong without a word, numbered as in SECURITY.md: that we do not. Other tests show the rest."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from recall_merge import MergeRun, merge
from recall_merge.files.record import RECORD
from tiny import edit_json, fine_tuned, load_tensors, lora, make_model, save_model


@pytest.fixture
def world(llama, tmp_path):
    """A base, two full experts and an adapter."""
    base = shutil.copytree(llama, tmp_path / "base")
    fine_tuned(base, tmp_path / "a", 1), fine_tuned(base, tmp_path / "b", 2)
    lora(base, tmp_path / "part", seed=3, r=2, lora_alpha=4, target_modules=["q_proj"])
    return tmp_path


def merged(world, experts, **changes):
    entries = [{"name": name, "path": str(world / name), "same_base": True} for name in experts]
    told = {"base": str(world / "base"), "experts": entries, "method": "linear"} | changes
    told["out"] = {"path": str(world / "out"), "overwrite": True, "reload": False} | told.get("out", {})
    merge(MergeRun.model_validate(told))
    return load_tensors(world / "out")


def test_b2_an_adapter_that_was_written_anew_is_read_anew(world):
    first = merged(world, ["part"])
    shutil.rmtree(world / "part")
    lora(world / "base", world / "part", seed=4, r=2, lora_alpha=4, target_modules=["q_proj"])
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(first[name], merged(world, ["part"])[name])


def test_b4_a_model_that_was_replaced_is_read_anew_in_one_process(world):
    merged(world, ["a"])
    shutil.rmtree(world / "a")
    fine_tuned(world / "base", world / "a", 5)
    wanted = load_tensors(world / "a")
    for name, tensor in merged(world, ["a"]).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"]])
def test_b5_config_and_tokenizer_are_the_bases_whatever_the_order(world, order):
    for number, name in enumerate("ab"):
        edit_json(world / name / "config.json", initializer_range=0.5 + number)
        (world / name / "generation_config.json").write_text(json.dumps({"eos_token_id": [90 + number]}))
        edit_json(world / name / "tokenizer_config.json", chat_template=f"of {name}")
    merged(world, order)
    for file in ("tokenizer_config.json", "tokenizer.json", "generation_config.json"):
        assert (world / "out" / file).read_bytes() == (world / "base" / file).read_bytes()
    ours, theirs = (json.loads((world / name / "config.json").read_text()) for name in ("out", "base"))
    assert ours == {key: value for key, value in theirs.items() if key != "_name_or_path"}


def test_b12_half_precision_is_rounded_once(tmp_path):
    base = save_model(make_model(dtype="bfloat16"), tmp_path / "base")
    for seed, name in enumerate("ab", start=1):
        fine_tuned(base, tmp_path / name, seed, scale=0.5)
    found, sources = merged(tmp_path, ["a", "b"]), [load_tensors(tmp_path / name) for name in "ab"]
    wrong = total = 0
    for name, tensor in found.items():
        exact = (sources[0][name].double() + sources[1][name].double()) / 2
        wrong += int((tensor != exact.to(torch.bfloat16)).sum())
        total += tensor.numel()
    assert wrong / total < 0.01  # what float32 leaves at ties; sums in bfloat16 miss half of all


def test_b14_the_last_layers_weights_are_those_of_final_norm_and_head(world):
    rows = [[1.0, 0.0]] * 3 + [[0.0, 1.0]]
    found, a, b = merged(world, ["a", "b"], weights={"by_layer": rows}), load_tensors(world / "a"), load_tensors(world / "b")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (b if name in {"lm_head.weight", "model.norm.weight"} else a)[name], rtol=0, atol=1e-7)


def test_b16_a_relative_path_without_a_network_ends_with_card_and_record(world, monkeypatch):
    monkeypatch.chdir(world)
    told = {"base": "base", "experts": [{"name": "a", "path": "a"}], "method": "linear", "out": {"path": "out"}}
    merge(MergeRun.model_validate(told))
    assert {"README.md", RECORD, "config.json", "model.safetensors"} <= {path.name for path in (world / "out").iterdir()}


def test_b6_a_number_that_is_not_finite_in_one_input_is_no_number_of_the_result(world):
    tensors = load_file(world / "a" / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, world / "a" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"expert 'a' holds NaN or infinity in 'model\.norm\.weight'"):
        merged(world, ["a", "b"])
    assert not (world / "out").exists()
