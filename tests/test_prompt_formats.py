"""What writes a task's rows: its own template and system text, at every door; kept with the task, whatever other tasks have."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from recall_merge.bench.bench import bench, store_of
from recall_merge.bench.design import make_design
from recall_merge.bench.jobs import Job, with_needs
from recall_merge.bench.scenario import load_scenario
from recall_merge.cli.app import app
from recall_merge.continual.state import found_path, read_state
from recall_merge.continual.steps import take_statistics
from recall_merge.continual.workspace import init
from recall_merge.evaluation.evaluate import evaluate
from recall_merge.files.row_sources import RowSource
from recall_merge.files.rows import Row
from recall_merge.files.statistics import STATS
from recall_merge.merging.run import MergeRun
from recall_merge.models.load import load_tokenizer
from recall_merge.models.tokens import render, template_of
from recall_merge.runtime.errors import DataError, RecallError, RunError
from tiny import write_rows
from workspaces import SETTINGS, write_tasks

ALPACA = (
    "{% for turn in messages %}### {{ turn['role'] }}:\n{{ turn['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
SYSTEM = "Answer y or n."


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_tasks(tmp_path_factory.mktemp("data"), "ab")
    (folder / "alpaca.jinja").write_text(ALPACA)
    return folder


def run_command(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert isinstance(done.exception, RecallError)
    return str(done.exception)


def test_a_source_gives_each_row_a_system_turn_unless_it_has_one(data, tmp_path):
    own = {"messages": [{"role": "system", "content": "Own."}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    call = {"messages": [{"role": "user", "content": "q", "name": "me"}, {"role": "assistant", "content": "a"}], "tools": [{"name": "f"}]}
    rows = RowSource(path=str(write_rows(tmp_path / "rows.jsonl", [{"prompt": "q", "completion": "a"}, own, call])), system=SYSTEM).read()
    assert [row.prompt[0] for row in rows] == [("system", SYSTEM), ("system", "Own."), ("system", SYSTEM)]
    assert rows[2].turns[1] == {"role": "user", "content": "q", "name": "me"} and rows[2].tools == [{"name": "f"}]
    assert rows[0].content == (("user", "q"), "a")  # the same row as without: a test row may not hide behind another system text
    assert rows[1].content == (("system", "Own."), ("user", "q"), "a")
    texts = write_rows(tmp_path / "texts.jsonl", [{"prompt": "q", "completion": "a"}, {"text": "words"}])
    with pytest.raises(
        DataError, match=r"no turns that a system text could precede\n  where: .*texts.jsonl, row 2\n  fix: leave `system` out"
    ):
        RowSource(path=str(texts), system=SYSTEM).read()


def test_a_row_is_written_by_its_own_template_whatever_else_is_asked_for(llama):
    tokenizer, row = load_tokenizer(llama), Row(0, (("user", "q"),), "a", template=ALPACA)
    for asked in (True, False, "{{ messages }}"):
        assert "".join(render(row, tokenizer, template=asked)) == "### user:\nq\n### assistant:\na\n"
    assert template_of([row, row], False) == ALPACA
    assert template_of([row, Row(1, (), "text")], False) is False


def test_a_workspace_keeps_each_tasks_format_in_training_statistics_and_scores(llama, data, tmp_path):
    ws = tmp_path / "ws"
    init(ws, str(llama), SETTINGS | {"method": "linear"})
    rows = {name: ["--train", data / f"{name}-train.jsonl", "--test", data / f"{name}-test.jsonl"] for name in "ab"}
    run_command("learn", ws, "--task", "a", *rows["a"], "--system", SYSTEM, "--template", data / "alpaca.jinja")
    run_command("learn", ws, "--task", "b", *rows["b"], "--no-template")
    first, second = read_state(ws).stages
    for file in (first.train, first.task.test):
        assert (file.system, file.template) == (SYSTEM, ALPACA)
    for file in (second.train, second.task.test):
        assert (file.system, file.template) == (None, False)
    experts = [found_path(ws, stage.expert.path) for stage in (first, second)]
    assert [(expert / "chat_template.jinja").exists() for expert in experts] == [True, False]
    written = [{"system": SYSTEM, "template": ALPACA}, {"template": False}]
    for stage, expert, how in zip((first, second), experts, written, strict=True):
        name, made = stage.task.name, tmp_path / f"stats-{stage.task.name}"
        entry, samples = (
            {"name": name, "path": str(expert), "same_base": True},
            {"path": str(data / f"{name}-train.jsonl"), "count": 3, **how},
        )
        take_statistics(MergeRun.model_validate({"base": str(llama), "experts": [entry], "samples": samples}), made)
        assert (made / STATS).read_bytes() == (found_path(ws, stage.stats) / STATS).read_bytes()
        test = {"path": str(data / f"{name}-test.jsonl"), **how}
        [score] = evaluate(str(found_path(ws, second.merged.path)), [f"{name}={json.dumps(test)}"])
        kept = json.loads((ws / second.scores.file).read_text())["scores"]["merged"][name]
        assert [item["score"] for item in kept["items"]] == [item.score for item in score.items]


def test_another_format_is_another_task(llama, data, tmp_path):
    init(tmp_path / "ws", str(llama), SETTINGS | {"method": "linear"})
    rows = {name: ["--train", data / f"{name}-train.jsonl", "--test", data / f"{name}-test.jsonl"] for name in "ab"}
    run_command("learn", tmp_path / "ws", "--task", "a", *rows["a"], "--unseen", f"b={data / 'b-test.jsonl'}")
    said = refused("learn", tmp_path / "ws", "--task", "b", *rows["b"], "--template", data / "alpaca.jinja")
    assert "'b' was scored before with another file, format or metric" in said


def test_formats_that_contradict_or_cannot_be_read_are_refused(llama, data, tmp_path):
    init(tmp_path / "ws", str(llama), SETTINGS)
    rows = ["--task", "a", "--train", data / "a-train.jsonl", "--test", data / "a-test.jsonl"]
    template = ["--template", data / "alpaca.jinja"]
    assert "--template and --no-template are both given" in refused("learn", tmp_path / "ws", *rows, *template, "--no-template")
    assert "--template and --no-template are both given" in refused("evaluate", llama, "--tasks", "x", *template, "--no-template")
    assert "the chat template cannot be read" in refused("learn", tmp_path / "ws", *rows, "--template", tmp_path / "none.jinja")
    assert "a new task needs --task and --test" in refused("learn", tmp_path / "ws", "--no-template")
    assert "needs a chat template" in refused("learn", tmp_path / "ws", *rows, "--system", SYSTEM)  # the tiny model has none
    assert not read_state(tmp_path / "ws").unfinished
    with pytest.raises(RunError, match=r"(?s)unknown key 'sytem'.*did you mean 'system'"):
        RowSource.of("{path: rows.jsonl, sytem: words}")


def test_a_description_in_a_file_finds_its_template_beside_it(data, tmp_path):
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump({"path": str(data / "a-train.jsonl"), "template": "own.jinja"}))
    (tmp_path / "own.jinja").write_text(ALPACA)
    assert RowSource.of(tmp_path / "rows.yaml").template == ALPACA


def test_a_benchs_tasks_have_formats_of_their_own(llama, data, tmp_path):
    def scenario(**how: object) -> Path:
        tasks = [
            {"name": name, **{kind: {"path": f"{name}-{kind}.jsonl", **(how if name == "a" else {})} for kind in ("train", "test")}}
            for name in "ab"
        ]
        content = {"model": str(llama), "data": str(data), "tasks": tasks, "methods": ["aligned"], "kinds": ["multi-model"]}
        content |= {
            "orders": {"count": 1},
            "training": {"rank": 2, "alpha": 4, "epochs": 1},
            "samples": {"count": 3},
            "out": str(tmp_path / "run"),
        }
        (tmp_path / "scenario.yaml").write_text(yaml.safe_dump(content))
        return tmp_path / "scenario.yaml"

    def jobs(**how: object) -> dict[str, Job]:
        design = make_design(load_scenario(scenario(**how)))
        return {job.label: job for job in with_needs([job for trial in design.trials for job in trial.jobs])}

    plain, own = jobs(), jobs(system=SYSTEM, template=ALPACA)
    same = {label for label, job in plain.items() if own[label].key == job.key}
    assert {label for label in same if "seed" in label} == {"the expert of b, seed 0", "the input statistics of b, seed 0"}
    loaded = load_scenario(scenario(system=SYSTEM, template=ALPACA))
    bench(loaded)
    expert, statistics = (store_of(loaded).path_of(own[f"the {what} of a, seed 0"]) for what in ("expert", "input statistics"))
    assert (expert / "chat_template.jinja").read_text() == ALPACA
    samples = {"path": str(data / "a-train.jsonl"), "count": 3, "system": SYSTEM, "template": ALPACA}
    run = {"base": str(llama), "experts": [{"name": "a", "path": str(expert), "same_base": True}], "samples": samples}
    take_statistics(MergeRun.model_validate(run), tmp_path / "stats")
    assert (tmp_path / "stats" / STATS).read_bytes() == (statistics / STATS).read_bytes()
