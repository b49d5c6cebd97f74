"""Each step is done once: what lies in its place is used again if the same bytes made it in the same way, and made anew otherwise."""

import pytest

from recall_merge.continual.steps import KeyedFile, key_of, merge_models, score_model, scores_key, take_statistics
from recall_merge.evaluation.tasks import TaskSpec
from recall_merge.files.rows import read_rows
from recall_merge.merging.run import MergeRun
from recall_merge.models.load import load_model
from tiny import lora, write_rows


@pytest.fixture
def run(llama, tmp_path):
    """A merge of one adapter, with rows."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"is {i} ok?", "completion": "y", "choices": ["y", "n"]} for i in range(6)])
    adapter = lora(llama, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    expert = {"name": "a", "path": str(adapter), "same_base": True}
    samples = {"path": str(rows), "count": 2}
    facts = {"base": str(llama), "experts": [expert], "method": "linear", "samples": samples}
    return MergeRun.model_validate(facts | {"out": {"path": tmp_path / "merged", "overwrite": True}})


def stamp(folder, name):
    return (folder / name).stat().st_mtime_ns


def test_statistics_are_taken_once(run, tmp_path):
    folder = tmp_path / "statistics"
    take_statistics(run, folder, rank=2)
    first = stamp(folder, "stats.safetensors")
    take_statistics(run, folder, rank=2)
    assert stamp(folder, "stats.safetensors") == first
    for change in ({"rank": 3}, {"rank": 2}):
        take_statistics(run, folder, **change)
        assert stamp(folder, "stats.safetensors") != first
        first = stamp(folder, "stats.safetensors")
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "other", "completion": "n"}] * 6)
    take_statistics(run, folder, rank=2)
    assert stamp(folder, "stats.safetensors") != first
    first = stamp(folder, "stats.safetensors")
    (folder / "key.json").write_text("{")
    take_statistics(run, folder, rank=2)
    assert stamp(folder, "stats.safetensors") != first


def test_a_merge_is_made_once(run):
    assert not merge_models(run).reused
    assert merge_models(run).reused
    weights = run.out.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert not merge_models(run).reused
    assert merge_models(run).reused


def test_a_model_is_loaded_for_missing_scores_only(run, llama, tmp_path):
    loads, kept = [], {}

    def load():
        loads.append(1)
        return load_model(llama)

    score_model(load, [], kept.__setitem__)
    assert loads == []
    rows = read_rows(tmp_path / "rows.jsonl")
    score_model(load, [TaskSpec("a", rows), TaskSpec("b", rows[:3])], kept.__setitem__)
    assert loads == [1]
    assert {task: (score["n"], len(score["items"])) for task, score in kept.items()} == {"a": (6, 6), "b": (3, 3)}


def test_the_key_of_scores_tells_models_tasks_and_options():
    keys = {
        scores_key({"base": model}, {"a": [rows, metric]}, {"limit": limit})
        for model in "xy"
        for rows in "12"
        for metric in (None, "acc")
        for limit in (None, 3)
    }
    assert len(keys) == 16
    assert scores_key({"base": "x"}, {"a": ["1", None]}, {"limit": 3}) in keys


def test_content_is_found_under_its_own_key(tmp_path):
    path = tmp_path / "made" / "scores.json"
    kept = KeyedFile(path, key_of({"seed": 0}))
    assert not kept.exists
    kept.content["scores"] = {"ü": 0.5}
    kept.write()
    again = KeyedFile(path, key_of({"seed": 0}))
    assert again.exists and again.content == {"scores": {"ü": 0.5}}
    other = KeyedFile(path, key_of({"seed": 1}))
    assert not other.exists and other.content == {}
    other.write()
    assert not KeyedFile(path, key_of({"seed": 0})).exists


def test_a_damaged_file_is_not_there(tmp_path):
    for text in ("{", "[]", "null", '{"scores": {}}'):
        (tmp_path / "k.json").write_text(text)
        kept = KeyedFile(tmp_path / "k.json", "k")
        assert not kept.exists and kept.content == {}


def test_the_order_of_facts_does_not_matter():
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1}) != key_of({"a": 2, "b": 1})
