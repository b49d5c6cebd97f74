"""One description of rows, and one template, at every door: runs, workspaces, scores and benches."""

import gzip
import hashlib
import json
from dataclasses import replace
from typing import Any

import datasets
import pytest
import yaml
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer
from typer.testing import CliRunner

from recall_merge.bench.design import make_design
from recall_merge.bench.scenario import load_scenario
from recall_merge.cli.app import app
from recall_merge.cli.options import words_of
from recall_merge.continual.branch_section import _changed_items
from recall_merge.continual.stages import learn
from recall_merge.continual.state import DataFile, read_state, unchanged_rows
from recall_merge.continual.validation import Request
from recall_merge.continual.workspace import init
from recall_merge.evaluation.evaluate import evaluate
from recall_merge.files.row_sources import RowSource
from recall_merge.files.rows import read_rows
from recall_merge.merging.plan import make_plan
from recall_merge.merging.run import load_run
from recall_merge.models.load import load_model, load_tokenizer
from recall_merge.models.tokens import encode_rows
from recall_merge.report.merge_page import result_page
from recall_merge.report.words import Words
from recall_merge.runtime.errors import DataError, RunError
from recall_merge.runtime.progress import Silent
from recall_merge.training.fine_tuning import train
from recall_merge.training.settings import TrainSettings
from tiny import TEMPLATE, lora, quiet
from tiny import load_model as load_by_transformers
from workspaces import SETTINGS

COLUMNS = {"prompt": "question", "completion": "reply", "choices": "of"}
SMALL = {"rank": 2, "alpha": 4, "epochs": 1, "batch_size": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The same rows by names of their own: a packed table, a folder of tables, and rows in plain form."""
    folder = tmp_path_factory.mktemp("data")
    for split, numbers in {"train": range(8), "test": range(8, 12)}.items():
        lines = [f'is it {i}?,y,"[""y"", ""n""]",{i}' for i in numbers]
        (folder / "tables").mkdir(exist_ok=True)
        table = "\n".join(["question,reply,of,number", *lines])
        (folder / "tables" / f"{split}.csv").write_text(table)
        (folder / f"{split}.csv.gz").write_bytes(gzip.compress(table.encode()))
        plain = [json.dumps({"prompt": f"is it {i}?", "completion": "y", "choices": ["y", "n"], "id": i}) for i in numbers]
        (folder / f"{split}.jsonl").write_text("\n" + "\n".join(plain))  # the first line holds no row, as in a table
    return folder


def described(data, name):
    return {"path": str(data / name), "columns": COLUMNS}


def test_a_description_is_a_path_keys_in_one_line_or_a_file_of_them(data, tmp_path):
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump({"path": "tables", "split": "train", "columns": COLUMNS}))
    (tmp_path / "tables").symlink_to(data / "tables")
    plain = read_rows(data / "train.jsonl")
    for given in (f"{{path: {data / 'train.csv.gz'}, columns: {json.dumps(COLUMNS)}}}", tmp_path / "rows.yaml"):
        assert [replace(row, unread=("id",)) for row in RowSource.of(given).read()] == plain
    assert RowSource.of(data / "tables", "test").split == "test"
    assert words_of(f"a,b={{path: c, columns: {json.dumps(COLUMNS)}}},d")[::2] == ["a", "d"]
    with pytest.raises(RunError, match=r"(?s)'path' is missing.*unknown key 'colums'.*did you mean 'columns'"):
        RowSource.of("{colums: {}}")
    with pytest.raises(RunError, match="not readable YAML"):
        RowSource.of("{path: a")


def test_a_folder_has_a_hash_of_its_rows(data, tmp_path):
    file, folder = RowSource.of(data / "train.jsonl"), RowSource.of(data / "tables").model_copy(update={"columns": COLUMNS})
    assert file.digest() == hashlib.sha256((data / "train.jsonl").read_bytes()).hexdigest()
    assert folder.digest() != folder.model_copy(update={"split": "test"}).digest()
    (tmp_path / "train.csv").write_bytes((data / "tables" / "train.csv").read_bytes())
    assert folder.model_copy(update={"path": str(tmp_path)}).digest() == folder.digest()  # wherever it lies


def test_a_merge_has_the_hash_of_its_folder_of_rows_and_a_report_reads_them(data, llama, tmp_path):
    from recall_merge import merge

    lora(llama, tmp_path / "a", r=2, target_modules=["q_proj"])
    run = {"base": str(llama), "experts": [{"name": "a", "path": str(tmp_path / "a")}], "method": "recall"}
    run |= {"samples": described(data, "tables") | {"count": 2}, "out": {"path": tmp_path / "merged"}}
    merge(run)
    record = json.loads((tmp_path / "merged" / "record.json").read_text())
    assert record["rows_sha256"] == RowSource.model_validate(described(data, "tables")).digest()
    made = {"models": {}, "cache": tmp_path / "cache", "progress": Silent()}
    page = result_page(tmp_path / "merged", text=True, samples=data / "tables", **made)
    [table] = next(section.blocks for section in page.sections if section.anchor == "samples")
    lines = (data / "tables" / "train.csv").read_text().splitlines()
    assert all(text.startswith(lines[int(row) - 1].partition(",")[0]) for row, *_, text in table.rows) and len(table.rows) == 2


def test_a_workspaces_page_numbers_items_as_the_lines_of_their_file_and_lm_evals_as_lm_eval():
    old, new = ({"items": [{"id": 1, "score": score, "prediction": "", "choices": 2}]} for score in (0.0, 1.0))
    for rows, name in ((dict[int, Any](), "2"), (None, "1")):
        assert [item.id for item in _changed_items("", "", old, new, rows, Words(False)).items] == [name]


def test_a_workspace_learns_and_scores_them(data, llama, tmp_path):
    init(tmp_path / "ws", str(llama), SETTINGS | {"stats_rank": 0})
    init(tmp_path / "plain", str(llama), SETTINGS | {"stats_rank": 0})
    arguments = [f"{{path: {data / name}, columns: {json.dumps(COLUMNS)}}}" for name in ("train.csv.gz", "tables")]
    unseen = ["--unseen", f"more={{path: {data / 'tables'}, columns: {json.dumps(COLUMNS)}}},same={data / 'test.jsonl'}"]
    done = CliRunner().invoke(app, ["learn", str(tmp_path / "ws"), "--task", "a", "--train", arguments[0], "--test", arguments[1], *unseen])
    assert done.exit_code == 0, done.output
    assert "note: test of a: columns of the rows that are not read: number" in done.output
    learnt = learn(tmp_path / "plain", Request("a", data / "test.jsonl", str(data / "train.jsonl")))
    stage = read_state(tmp_path / "ws").stages[0]
    assert stage.expert.fingerprint == learnt.stage.expert.fingerprint and stage.samples == learnt.stage.samples
    assert stage.scores.merged == {"a": learnt.stage.scores.merged["a"]} | dict.fromkeys(["more", "same"], learnt.stage.scores.merged["a"])
    assert [len(unchanged_rows(tmp_path / "ws", file)) for file in (stage.train, stage.task.test)] == [8, 4]
    assert unchanged_rows(tmp_path / "ws", DataFile(path=str(data / "none.csv"), sha256="")) is None
    with pytest.raises(DataError, match=r"none of the accepted forms.*\n.*\n.*`columns: \{prompt: question, completion: "):
        RowSource.of(data / "tables").read()


def test_scores_are_the_same_in_every_form(data, llama):
    [wanted, *found] = [
        score
        for word in (str(data / "test.jsonl"), *(json.dumps(described(data, name)) for name in ("test.csv.gz", "tables")))
        for score in evaluate(str(llama), [f"a={word}"])
    ]
    assert all(replace(score, notes=()) == replace(wanted, notes=()) for score in found)
    assert [score.notes for score in (wanted, *found)] == [
        (f"columns of the rows that are not read: {name}",) for name in ("id", "number", "number")
    ]


def test_a_set_on_the_hub_is_scored_and_learnt_by_its_name(llama, tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"question": f"is it {split} {i}?", "reply": "y"} for i in range(8)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    given = "{path: org/set, config: main, columns: {prompt: question, completion: reply}}"
    assert evaluate(str(llama), [f"a={given}"])[0].n == 8
    assert asked == [("org/set", "main", "test")]
    init(tmp_path / "ws", str(llama), SETTINGS | {"stats_rank": 0, "method": "linear"})
    stage = learn(tmp_path / "ws", Request("a", given, given)).stage
    assert {("org/set", "main", "train"), ("org/set", "main", "test")} == set(asked)
    assert (stage.train.path, len(unchanged_rows(tmp_path / "ws", stage.task.test))) == ("org/set", 8)
    assert stage.train.sha256 != stage.task.test.sha256


def test_a_bench_has_the_same_jobs(data, llama, tmp_path):
    def keys(train, test):
        task = {"name": "a", "train": train, "test": test}
        scenario = {"model": str(llama), "data": str(data), "tasks": [task], "methods": ["experts"], "orders": {"count": 1}}
        (tmp_path / "scenario.yaml").write_text(yaml.safe_dump(scenario))
        return {job.key for trial in make_design(load_scenario(tmp_path / "scenario.yaml")).trials for job in trial.jobs}

    tables = ({"path": "tables", "columns": COLUMNS}, {"path": "tables", "columns": COLUMNS})
    assert keys("train.jsonl", "test.jsonl") == keys(*tables) != keys("train.jsonl", "train.jsonl")


@pytest.fixture(scope="module")
def jinja(tmp_path_factory):
    file = tmp_path_factory.mktemp("template") / "chat.jinja"
    file.write_text(TEMPLATE)
    return file


TURNS = [{"role": "user", "content": "is it?"}, {"role": "assistant", "content": "y"}]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    file = tmp_path_factory.mktemp("chats") / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": [{"role": "user", "content": f"is it {i}?"}, TURNS[1]]}) + "\n" for i in range(6)))
    return file


def test_rows_with_roles_are_refused_in_the_plan_with_the_way_out_that_works(llama, chats, jinja, tmp_path):
    lora(llama, tmp_path / "a", r=2, target_modules=["q_proj"])
    run = {"base": str(llama), "experts": [{"name": "a", "path": str(tmp_path / "a")}], "method": "recall"}
    run |= {"samples": {"path": str(chats)}, "out": {"path": str(tmp_path / "merged")}}
    words = r"needs a chat template, .*\n  where: .*row 1, .*\n  fix: give a Jinja file, `template: FILE`"
    with pytest.raises(DataError, match=words):
        make_plan(run)
    with pytest.raises(DataError, match=words):
        evaluate(str(llama), [str(chats)])
    (tmp_path / "chat.jinja").write_text(jinja.read_text())
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run | {"samples": {"path": str(chats), "template": "chat.jinja"}}))
    tokenizer = load_tokenizer(llama)
    text = make_plan(load_run(tmp_path / "run.yaml")).texts[0]
    assert (
        text
        == tokenizer.apply_chat_template(
            [{"role": "user", "content": "is it 0?"}, TURNS[1]], chat_template=TEMPLATE, tokenize=False
        ).rstrip("\n")
        + "\n"
    )
    [score] = evaluate(str(llama), [str(chats)], template=jinja)
    assert score.n == 6
    done = CliRunner().invoke(app, ["evaluate", str(llama), "--tasks", str(chats), "--template", str(jinja), "--json"])
    assert json.loads(done.stdout)["scores"][0]["score"] == score.score


@pytest.mark.parametrize(
    ("given", "words"), [("none.jinja", "cannot be read: .*none.jinja.*\n  where: .*\n  fix: .*true for the model's own"), (3, "is true")]
)
def test_a_template_that_cannot_be_read_is_refused_with_all_else(given, words, llama, tmp_path):
    run = {"base": str(llama), "experts": [{"name": "a", "path": str(tmp_path / "a")}], "method": "recal"}
    with pytest.raises(RunError, match=f"(?s)'samples.template': the chat template {words}"):
        make_plan(run | {"samples": {"path": "rows.jsonl", "template": given}})
    with pytest.raises(RunError, match=f"(?s)'template': the chat template {words}"):
        init(tmp_path / "ws", str(llama), {"template": given})
    (tmp_path / "words.jinja").write_text("no template")
    with pytest.raises(RunError, match="holds no chat template"):
        evaluate(str(llama), ["a=rows.jsonl"], template=tmp_path / "words.jinja")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_expert_that_is_trained_with_a_template_has_it(kind, llama, chats, jinja, tmp_path):
    settings = TrainSettings.model_validate((SMALL if kind == "lora" else {"epochs": 1}) | {"kind": kind, "template": str(jinja)})
    rows = read_rows(chats)
    train(llama, rows, tmp_path / "expert", settings)
    tokenizer = load_tokenizer(tmp_path / "expert", llama)
    assert tokenizer.chat_template == TEMPLATE
    with quiet():  # trl's own tokenisation, with this template
        theirs = AutoTokenizer.from_pretrained(llama)
        theirs.chat_template = TEMPLATE
        data = [{"prompt": [{"role": r, "content": c} for r, c in row.prompt], "completion": [TURNS[1]]} for row in rows]
        arguments = SFTConfig(output_dir=str(tmp_path / "trl"), report_to="none", use_cpu=True)
        trainer = SFTTrainer(
            load_by_transformers(llama), arguments, train_dataset=datasets.Dataset.from_list(data), processing_class=theirs
        )
    assert [row.input_ids for row in encode_rows(rows, tokenizer)] == list(trainer.train_dataset["input_ids"])
    before = evaluate(str(tmp_path / "expert"), [str(chats)], base=None if kind == "full" else str(llama))
    assert before[0].n == 6  # without a word about templates: the expert has its own
    jinja_two = tmp_path / "two.jinja"
    jinja_two.write_text(TEMPLATE.replace("assistant", "ASSISTANT"))
    assert train(llama, rows, tmp_path / "expert", settings).reused
    other = settings.model_copy(update={"template": jinja_two.read_text()})
    assert not train(llama, rows, tmp_path / "expert", other, overwrite=True).reused


def test_a_workspace_with_a_template_keeps_it_and_so_do_its_models(llama, chats, jinja, tmp_path):
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps({"messages": [{"role": "user", "content": "is it so?"}, TURNS[1]]}) + "\n")
    init(tmp_path / "ws", str(llama), SETTINGS | {"stats_rank": 2, "template": str(jinja)})
    learn(tmp_path / "ws", Request("a", test, chats))
    merged = tmp_path / "ws" / "merges" / "1"
    assert load_model(merged)[1].chat_template == TEMPLATE
    assert evaluate(str(merged), [str(test)])[0].score == read_state(tmp_path / "ws").stages[0].scores.merged["a"]
