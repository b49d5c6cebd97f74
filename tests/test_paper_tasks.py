"""The paper's five tasks, on records of the schema that the hub has; no network."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from recall_merge.evaluation import paper_tasks as hub_tasks
from recall_merge.evaluation.evaluate import evaluate
from recall_merge.evaluation.paper_tasks import HUB_TASKS, load_hub_task, write_hub_rows
from recall_merge.evaluation.tasks import check_tasks, define
from recall_merge.files.rows import read_rows
from recall_merge.runtime.errors import DataError, RunError

SQUAD = {"id": "1", "title": "Ann", "context": "Ann sings in Rome. ", "question": " Where does Ann sing?"}
RECORDS = {
    "sst2": [{"idx": 0, "sentence": "hide new secretions ", "label": 0}, {"idx": 1, "sentence": "a joy ", "label": 1}],
    "squad_v2": [
        SQUAD | {"answers": {"text": ["Rome", "in Rome", "Rome"], "answer_start": [13, 10, 13]}},
        SQUAD | {"answers": {"text": [], "answer_start": []}},
    ],
    "iwslt2017-en-fr": [{"translation": {"en": "Thank you.", "fr": "Merci."}}, {"translation": {"en": "Hello", "fr": "Bonjour "}}],
    "race": [
        {"example_id": "high1.txt", "article": "Ann sings.", "answer": "C", "question": "Who?", "options": ["Bo", "Cy", "Ann", "Di"]},
        {"example_id": "high2.txt", "article": "Bo dances.", "answer": "A", "question": "Who _ ?", "options": ["Bo", "Cy", "Ann", "Di"]},
    ],
    "medmcqa": [
        {"id": "e", "question": "Which vitamin?", "opa": "A", "opb": "B", "opc": "C", "opd": "D", "cop": 1, "choice_type": "single"},
        {"id": "f", "question": "Which nerve?", "opa": "I", "opb": "II", "opc": "III", "opd": "IV", "cop": 3, "choice_type": "multi"},
    ],
}
RECORDS["race-all"] = RECORDS["race"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Repositories as the hub has them, in a folder: Parquet files, and for a config its own folder."""
    tasks = {}
    for name, task in HUB_TASKS.items():
        folder = tmp_path / name
        for split in {task.train, task.test}:
            place = folder / (task.config or "data") / (f"{split}/0000.parquet" if task.parquet else f"{split}-00000-of-00001.parquet")
            place.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(RECORDS[name]).to_parquet(place)
        if task.config and not task.parquet:
            files = "\n".join(f"  - split: {split}\n    path: {task.config}/{split}-*" for split in (task.train, task.test))
            (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {task.config}\n  data_files:\n{files}\n---\n")
        tasks[name] = replace(task, hub=str(folder))
    monkeypatch.setattr(hub_tasks, "HUB_TASKS", tasks)
    datasets.disable_progress_bars()
    return tmp_path


def test_the_five_are_where_the_paper_took_them_from():
    assert {task.hub for task in HUB_TASKS.values()} == {
        "stanfordnlp/sst2", "rajpurkar/squad_v2", "IWSLT/iwslt2017", "ehovy/race", "openlifescienceai/medmcqa"
    }  # fmt: skip
    assert [(HUB_TASKS[name].config, HUB_TASKS[name].metric) for name in RECORDS] == [
        (None, "acc"), (None, "f1"), ("iwslt2017-en-fr", "bleu"), ("high", "acc"), (None, "acc"), ("all", "acc")
    ]  # fmt: skip


@pytest.mark.parametrize("name", HUB_TASKS)
def test_a_task_loads_and_can_be_scored(hub, name, tokenizer):
    task = load_hub_task(name)
    assert task.rows is not None
    assert not list(check_tasks([task]))
    assert len(define(task, tokenizer).documents) == 2
    for row in task.rows:
        assert row.plain == row.plain.strip()
        assert row.completion.startswith(" ")
        assert row.completion[1:] == row.completion.strip()
    assert len(load_hub_task(name, train=True, limit=1).rows or ()) == 1


def test_what_records_become(hub):
    rows = {name: list(load_hub_task(name).rows or ()) for name in RECORDS}
    assert [row.completion for row in rows["sst2"]] == [" negative", " positive"]
    assert rows["sst2"][0].plain == "Review: hide new secretions\nIs the sentiment positive or negative?\nAnswer:"
    assert [row.completion for row in rows["squad_v2"]] == [" Rome", " unanswerable"]
    assert load_hub_task("squad_v2").answers == {0: ("in Rome",)}
    assert rows["squad_v2"][0].plain.startswith("Passage: Ann sings in Rome.\nQuestion: Where does Ann sing?\n")
    assert [row.completion for row in rows["iwslt2017-en-fr"]] == [" Merci.", " Bonjour"]
    assert [row.completion for row in rows["race"]] == [" C", " A"]
    assert rows["race"][0].plain == "Article: Ann sings.\nQuestion: Who?\nA. Bo\nB. Cy\nC. Ann\nD. Di\nAnswer:"
    assert rows["race"][0].choices == (" A", " B", " C", " D")
    assert [row.completion for row in rows["medmcqa"]] == [" B", " D"]
    assert rows["medmcqa"][0].plain == "Question: Which vitamin?\nA. A\nB. B\nC. C\nD. D\nAnswer:"


def test_rows_can_be_written_for_training(hub, tmp_path):
    file = write_hub_rows("squad_v2", tmp_path / "out" / "train.jsonl", train=True)
    assert list(read_rows(file)) == list(load_hub_task("squad_v2", train=True).rows or ())
    assert json.loads(file.read_text().split("\n")[0])["answers"] == ["in Rome"]


def test_a_model_is_scored_on_them_by_name(hub, llama):
    """With the tiny model's own window; what is written may be nonsense, but is scored by the task's own metric."""
    found = evaluate(str(llama), ["paper:medmcqa", "paper:squad_v2"], metrics={"paper:squad_v2": "exact_match"}, device="cpu")
    assert [(score.task, score.metric, score.n) for score in found] == [("paper:medmcqa", "acc", 2), ("paper:squad_v2", "exact_match", 2)]
    with pytest.raises(RunError, match=r"the paper has no task 'sst'[^$]*did you mean 'sst2'"):
        evaluate(str(llama), ["paper:sst"], device="cpu")


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("sst2", {"label": -1}, "the label is -1"),  # hidden, as in the hub's test split
        ("medmcqa", {"cop": -1}, "the label is -1"),
        ("race", {"answer": ""}, "none of A, B, C, D"),
        ("race", {"options": ["Bo"]}, "cannot be a row"),
        ("squad_v2", {"answers": None}, "cannot be a row"),
    ],
)
def test_a_record_that_cannot_be_a_row_is_refused(hub, monkeypatch, name, change, expected):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [RECORDS[name][0], RECORDS[name][1] | change])
    with pytest.raises(DataError, match=rf"{expected}[^$]*row 2"):
        load_hub_task(name)


def test_what_cannot_be_had_is_said(hub, monkeypatch):
    with pytest.raises(RunError, match="did you mean 'race'"):
        load_hub_task("rice")
    monkeypatch.setattr(hub_tasks, "HUB_TASKS", {"sst2": replace(HUB_TASKS["sst2"], hub=str(hub / "nowhere"))})
    with pytest.raises(DataError, match="its rows cannot be loaded"):
        load_hub_task("sst2")
