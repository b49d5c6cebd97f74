"""The check of a result: by its headers where its structure is the base's, by transformers where it is not or the run asks for it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from recall_merge import MergeRun, RecallError, merge
from recall_merge.merging import verify
from recall_merge.merging.plan import make_plan
from recall_merge.merging.verify import runs_finite
from recall_merge.runtime.errors import CheckpointError, ResultError
from tiny import FAMILIES, fine_tuned, load_tensors, make_model, make_tokenizer, save_model


def with_tensors(model: Path, folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    shutil.copytree(model, folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def a_run(base: Path, expert: Path, out: Path, vocabulary: str | None = None, **settings) -> MergeRun:
    data = {"base": str(base), "experts": [{"name": "a", "path": str(expert)}], "method": "linear", "vocabulary": vocabulary}
    return MergeRun.model_validate(data | {"out": {"path": out} | settings})


@pytest.fixture
def loaded(monkeypatch) -> list[Path]:
    """The folders that are loaded and run."""
    folders: list[Path] = []

    def runs(folder: Path, tokens: int) -> bool:
        folders.append(folder)
        return runs_finite(folder, tokens)

    monkeypatch.setattr(verify, "runs_finite", runs)
    return folders


def test_a_result_like_its_base_is_not_loaded(llama, tmp_path, loaded):
    expert = fine_tuned(llama, tmp_path / "expert", seed=1)
    merge(a_run(llama, expert, tmp_path / "out"))
    assert loaded == []


def test_a_plain_merge_imports_no_transformers(llama, tmp_path):
    expert = fine_tuned(llama, tmp_path / "expert", seed=1)
    program = f"""
import sys
from recall_merge import MergeRun, merge
run = {{"base": {str(llama)!r}, "experts": [{{"name": "a", "path": {str(expert)!r}}}], "method": "linear", "weights": [1.0]}}
merge(MergeRun.model_validate(run | {{"out": {{"path": {str(tmp_path / "out")!r}}}}}))
assert "torch" in sys.modules and "transformers" not in sys.modules
"""
    ended = subprocess.run([sys.executable, "-W", "error", "-c", program], check=False, env=os.environ, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_reload_asks_for_it(llama, tmp_path, loaded):
    expert = fine_tuned(llama, tmp_path / "expert", seed=1)
    merge(a_run(llama, expert, tmp_path / "out", reload=True))
    assert len(loaded) == 1


def test_another_dtype_is_loaded(llama, tmp_path, loaded):
    expert = fine_tuned(llama, tmp_path / "expert", seed=1)
    run = a_run(llama, expert, tmp_path / "out", dtype="bfloat16")
    assert not make_plan(run).keeps_structure
    merge(run)
    assert len(loaded) == 1


def test_another_vocabulary_is_loaded(tmp_path, loaded):
    base = save_model(make_model("llama", vocab_size=96), tmp_path / "base", tokenizer=make_tokenizer())
    expert = fine_tuned(base, tmp_path / "expert", seed=1)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(expert)
    run = a_run(base, expert, tmp_path / "out", vocabulary="union")
    assert make_plan(run).vocabulary is not None
    merge(run)
    assert len(loaded) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_loaded(family, bases):
    assert runs_finite(bases(family), 8)


def test_numbers_that_are_not_finite_and_missing_tensors(llama, tmp_path):
    tensors = load_tensors(llama)
    norm = "model.norm.weight"
    broken = with_tensors(llama, tmp_path / "nan", tensors | {norm: torch.full_like(tensors[norm], torch.nan)})
    assert not runs_finite(broken, 8)
    lacking = with_tensors(llama, tmp_path / "lacking", {name: tensor for name, tensor in tensors.items() if name != norm})
    with pytest.raises(CheckpointError, match="missing keys"):
        runs_finite(lacking, 8)


def test_a_result_that_cannot_be_loaded_leaves_nothing(llama, tmp_path, monkeypatch):
    def refuse(folder: Path, tokens: int) -> bool:
        raise CheckpointError("no architecture of that name", where=folder)

    expert = fine_tuned(llama, tmp_path / "expert", seed=1)
    monkeypatch.setattr(verify, "runs_finite", refuse)
    with pytest.raises(ResultError, match="cannot be loaded: no architecture of that name"):
        merge(a_run(llama, expert, tmp_path / "out", reload=True))
    monkeypatch.setattr(verify, "runs_finite", lambda folder, tokens: False)
    with pytest.raises(ResultError, match="not finite"):
        merge(a_run(llama, expert, tmp_path / "out", reload=True))
    assert not (tmp_path / "out").exists()


def test_headers_must_be_those_of_the_plan(llama, tmp_path, monkeypatch):
    expert = fine_tuned(llama, tmp_path / "expert", seed=1)
    monkeypatch.setattr("recall_merge.merging.merge.write_companions", lambda folder, *_: (folder / "model.safetensors").unlink())
    with pytest.raises(RecallError):
        merge(a_run(llama, expert, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_result_that_is_the_base_is_refused(llama, tmp_path):
    run = a_run(llama, fine_tuned(llama, tmp_path / "expert", seed=1), tmp_path / "out").model_copy(update={"options": {"scale": 0.0}})
    with pytest.raises(ResultError, match=r"would be the base: .* nothing that 'a' learnt is in it\n  where: .*out\n  fix: check that"):
        merge(run)
    assert not (tmp_path / "out").exists()


def test_learning_that_the_dtype_rounds_away_is_refused(llama, tmp_path):
    tensors = load_tensors(llama)
    expert = with_tensors(llama, tmp_path / "expert", tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1e-6})
    merge(a_run(llama, expert, tmp_path / "exact"))
    with pytest.raises(ResultError, match=r"(?s)would be the base.*give `out.dtype: float32`"):
        merge(a_run(llama, expert, tmp_path / "rounded", dtype="bfloat16"))
