"""The demo's procedure on a tiny model: it runs through, tells its figures, and a second run keeps what would come out the same."""

import json
import shutil

import pytest

from recall_merge.cli.app import app
from recall_merge.demo import demo as module
from recall_merge.demo.demo import DemoTask, demo, demo_tasks
from tiny import make_model, make_tokenizer, save_model, write_rows


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with a tiny base in place of the small model, and two tiny tasks."""
    from recall_merge.demo import smollm
    from recall_merge.files.record import write_record

    folder = tmp_path / "demo"
    save_model(make_model("llama-tied"), folder / "base", tokenizer=make_tokenizer(template=True))
    write_record(folder / "base", {})
    monkeypatch.setattr(smollm, "unpack", lambda place: place)
    monkeypatch.setattr(smollm, "is_unpacked", lambda place: True)
    tasks = []
    for name, metric in (("opinion", "acc"), ("french", "chrf")):
        rows = [{"prompt": f"is the {word} good?", "completion": answer} for word in ("fox", "dog", "film") for answer in ("yes", "no")]
        if metric == "acc":
            rows = [row | {"choices": ["yes", "no"]} for row in rows]
        files = [write_rows(tmp_path / f"{name}-{part}.jsonl", rows) for part in ("train", "test")]
        tasks.append(DemoTask(name, "a kind", metric, *files))
    return folder, tuple(tasks)


def test_it_runs_and_then_keeps_what_it_has(small):
    folder, tasks = small
    first = demo(folder, tasks=tasks)
    assert list(first.scores) == ["base", "opinion", "french", "uniform", "recall", "aligned"]
    assert all(set(row) == {"opinion", "french"} and row["opinion"].n == 6 for row in first.scores.values())
    assert first.reused == ("the base",)
    assert first.picture.read_bytes().startswith(b"\x89PNG")
    assert (first.merged.path / "model.safetensors").exists()
    assert set(first.merged.record["statistics"]["experts"]) == {"opinion", "french"}
    assert [set(answer.said) for answer in first.answers] == [{"base", f"expert {task.name}", "aligned"} for task in tasks]

    second = demo(folder, tasks=tasks)
    assert len(second.reused) == 1 + 2 + 3 + 6  # base, experts, merges, scores
    assert {m: {t: s.score for t, s in row.items()} for m, row in second.scores.items()} == {
        m: {t: s.score for t, s in row.items()} for m, row in first.scores.items()
    }

    weights = folder / "recall" / "model.safetensors"  # told by content: a changed file is made again
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    third = demo(folder, tasks=tasks)
    assert "the merge 'recall'" not in third.reused
    assert "the merge 'uniform'" in third.reused
    assert weights.read_bytes() != data


def test_the_small_demo_takes_the_first_rows_and_leaves_the_whole_one_alone(small, monkeypatch):
    folder, tasks = small
    monkeypatch.setattr(module, "SMALL", {"train": 4, "test": 2})
    shutil.copytree(folder / "base", folder / "small" / "base")
    before = set(folder.iterdir())
    found = demo(folder, tasks=tasks, small=True)
    assert set(folder.iterdir()) == before
    assert found.merged.path == folder / "small" / "aligned"
    assert {score.n for row in found.scores.values() for score in row.values()} == {2}
    for task in tasks:
        assert (folder / "small" / "rows" / task.name / "train.jsonl").read_text() == "".join(task.train.read_text().splitlines(True)[:4])


def test_the_rows_that_ship_are_there():
    tasks = demo_tasks()
    assert len(tasks) >= 3
    assert all(task.train.is_file() and task.test.is_file() for task in tasks)


@pytest.mark.slow
def test_the_real_demo(tmp_path):
    """What README claims: every expert is better than the base on its own task, and the merge better than the base on every task."""
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "demo"), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    scores = {model: {task: told["score"] for task, told in row.items()} for model, row in found["scores"].items()}
    for task in module.TASKS:
        assert scores[task][task] > scores["base"][task] + 0.2
        assert scores["recall"][task] > scores["base"][task]
        assert scores["aligned"][task] > scores["base"][task]
    shutil.rmtree(tmp_path / "demo")
