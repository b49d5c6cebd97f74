"""One stage: fine-tune, merge, score, commit. What it makes is what its parts make by hand, and a stop at any instant changes nothing."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from recall_merge.cli.app import app
from recall_merge.continual import stages
from recall_merge.continual.stages import learn
from recall_merge.continual.state import read_journal, read_state
from recall_merge.continual.validation import Request
from recall_merge.continual.workspace import rollback, status
from recall_merge.evaluation.scores import score_tasks
from recall_merge.evaluation.tasks import TaskSpec
from recall_merge.files.ownership import MARKER
from recall_merge.files.rows import read_rows
from recall_merge.files.statistics import open_statistics
from recall_merge.merging.statistics import RANK
from recall_merge.models.load import load_model
from recall_merge.runtime.errors import RecallError
from recall_merge.runtime.sealed import read_sealed, sealed
from tiny import load_tensors, lora, make_model, merged_by_peft, save_model, write_rows
from workspaces import SETTINGS, essence, make_workspace, request, teach, tree, write_tasks


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("data"), "abcd")


@pytest.fixture(scope="module")
def made(llama, data, tmp_path_factory):
    """`made("recall")`: a workspace with settings of that name, that has learnt `a`. Copy it."""
    kinds = {"recall": {}, "linear": {"method": "linear"}, "sequential": {"method": "linear", "strategy": "sequential"}}
    kinds["fisher"] = {"method": "fisher"}
    done: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in done:
            done[kind] = make_workspace(tmp_path_factory.mktemp(kind) / "ws", llama, **kinds[kind])
            teach(done[kind], data, "a")
        return done[kind]

    return of


@pytest.fixture
def ws(made, tmp_path):
    """`ws("recall")`: a copy of such a workspace."""
    return lambda kind: shutil.copytree(made(kind), tmp_path / kind)


def dense(base: Path, expert: Path, folder: Path) -> dict[str, torch.Tensor]:
    return load_tensors(merged_by_peft(base, expert, folder))


def assert_close(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name] - tensor).norm() <= 1e-6 * tensor.norm(), name


# ---- what a stage makes


def test_one_shot_merges_all_experts_on_the_base(ws, data, llama, tmp_path):
    folder = ws("linear")
    learned = teach(folder, data, "b")
    first, second = (dense(llama, folder / "experts" / name, tmp_path / name) for name in ("1-a", "2-b"))
    base = load_tensors(llama)
    assert any(not torch.equal(first[name], base[name]) for name in base)
    assert_close(load_tensors(folder / "merges" / "1"), first)
    assert_close(load_tensors(folder / "merges" / "2"), {name: (first[name] + second[name]) / 2 for name in base})
    assert learned.stage.merged.path == "merges/2"
    assert not (folder / "scratch").exists()


def test_sequential_merges_the_merge_before_with_the_newest(ws, data, llama, tmp_path):
    folder = ws("sequential")
    for name in "bc":
        teach(folder, data, name)
    wanted = dense(llama, folder / "experts" / "1-a", tmp_path / "a")
    for name in ("2-b", "3-c"):
        newest = dense(llama, folder / "experts" / name, tmp_path / name)
        wanted = {key: (tensor + newest[key]) / 2 for key, tensor in wanted.items()}
    assert_close(load_tensors(folder / "merges" / "3"), wanted)


def test_from_last_fine_tunes_the_merge_before_and_the_expert_stays_an_adapter(ws, data, llama, tmp_path):
    folder = ws("linear")
    teach(folder, data, "b", start="last")
    config = json.loads((folder / "experts" / "2-b" / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == (folder / "merges" / "1").resolve()
    first = dense(llama, folder / "experts" / "1-a", tmp_path / "a")
    second = dense(folder / "merges" / "1", folder / "experts" / "2-b", tmp_path / "b")
    assert_close(load_tensors(folder / "merges" / "2"), {name: (first[name] + second[name]) / 2 for name in first})
    shutil.move(folder / "merges" / "1", tmp_path / "away")
    refused(folder, lambda: teach(folder, data, "c"), "the merge of stage 1 is missing")
    shutil.move(tmp_path / "away", folder / "merges" / "1")
    third = teach(folder, data, "c")  # an expert on a merge takes part in later merges, too
    wanted = [first, second, dense(llama, folder / "experts" / "3-c", tmp_path / "c")]
    assert_close(load_tensors(folder / "merges" / "3"), {name: sum(expert[name] for expert in wanted) / 3 for name in first})
    assert third.stage.start == "base"


def test_a_method_that_merges_two_takes_the_first_expert_as_it_is(data, llama, tmp_path):
    folder = make_workspace(tmp_path / "ws", llama, method="slerp", strategy="sequential", weights=[1, 3])
    refused(folder, lambda: teach(folder, data, "a", sets={"options.x": 1}), "has no option 'x'")
    first = teach(folder, data, "a")
    assert "`slerp` merges two experts or more: the first stage's model is its expert, as it is" in first.notes
    assert_close(load_tensors(folder / "merges" / "1"), dense(llama, folder / "experts" / "1-a", tmp_path / "whole"))
    second = teach(folder, data, "b")
    assert second.merge.record["method"]["name"] == "slerp" and second.merge.weights[0].tolist() == [0.25, 0.75]
    one_shot = make_workspace(tmp_path / "one_shot", llama, method="slerp")
    teach(one_shot, data, "a"), teach(one_shot, data, "b")
    refused(one_shot, lambda: teach(one_shot, data, "c"), "method 'slerp' merges 2 experts, the run lists 3")


def test_full_fine_tuning(ws, data, llama):
    folder = ws("linear")
    teach(folder, data, "b", sets={"training": {"kind": "full", "epochs": 1}}, start="last")
    first, second = (load_tensors(folder / name) for name in ("merges/1", "experts/2-b"))
    assert_close(load_tensors(folder / "merges" / "2"), {name: (first[name] + second[name]) / 2 for name in first})


def test_the_samples_are_rows_of_the_newest_experts_training_rows(ws, data):
    folder = ws("recall")
    learned = teach(folder, data, "b")
    record = json.loads((folder / "merges" / "2" / "record.json").read_text())
    assert list(learned.stage.samples) == [sample["row"] for sample in record["samples"]]
    assert len(learned.stage.samples) == SETTINGS["samples.count"]
    assert record["run"]["samples"]["path"] == "b-train.jsonl"
    assert learned.merge.merge_weights.models == ("a", "b")

    def holding_text() -> list[Path]:
        text = read_rows(data / "b-train.jsonl")[learned.stage.samples[0]].plain
        return [path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]

    assert holding_text() == []  # positions, never text
    rollback(folder, 1)
    learned = teach(folder, data, "b", sets={"keep_samples": True}, method="linear")
    assert holding_text() == [Path("samples/3-b.jsonl")]  # unless asked
    assert len(learned.stage.samples) == SETTINGS["samples.count"]  # of the input statistics, where the method compares no hidden states


def test_older_rows_are_never_read_again(ws, data, tmp_path):
    folder = ws("recall")
    state = read_sealed(folder / "workspace.json")
    state["stages"][0]["train"]["path"] = str(tmp_path / "deleted long ago.jsonl")
    (folder / "workspace.json").write_text(json.dumps(state))
    with opened_files() as paths:
        teach(folder, data, "b")
    assert str(data / "b-train.jsonl") in paths
    assert str(data / "a-test.jsonl") in paths
    assert str(data / "a-train.jsonl") not in paths
    assert read_state(folder).head == 2


@contextmanager
def opened_files():
    """The paths of all files that are opened from Python."""
    paths: set[str] = set()
    listening = True
    sys.addaudithook(lambda event, given: paths.add(str(given[0])) if listening and event == "open" else None)
    yield paths
    listening = False


def test_scores_are_those_of_the_models(ws, data):
    folder = ws("recall")
    teach(folder, data, "b")
    learned = teach(folder, data, "c", unseen=[f"strange={data / 'd-test.jsonl'}"])
    scores = learned.stage.scores
    specs = {name: TaskSpec(name, read_rows(data / f"{name}-test.jsonl")) for name in "abcd"}
    assert set(scores.merged) == {"a", "b", "c", "strange"}
    assert set(scores.base) == set(scores.before) == {"c", "strange"}
    assert set(scores.expert) == {"c"}
    again = score_tasks(*load_model(folder / "merges" / "3"), [specs[name] for name in "abcd"])
    assert [found.score for found in again] == [scores.merged[name] for name in ("a", "b", "c", "strange")]
    before = score_tasks(*load_model(folder / "merges" / "2"), [specs["c"], specs["d"]])
    assert [found.score for found in before] == [scores.before["c"], scores.before["strange"]]
    items = json.loads((folder / "scores" / "3.json").read_text())["scores"]["merged"]["a"]["items"]
    assert [item["score"] for item in items] == [item.score for item in again[0].items]
    assert {item["prediction"] for item in items} == {""}  # words are kept on request alone
    assert scores.base != scores.before != {name: scores.merged[name] for name in ("c", "strange")}  # so mixing them up would be seen

    line = status(folder).branches[0]
    assert line.unseen == ("strange",)
    assert line.r_unseen == [[scores.base["strange"]], [None], [scores.before["strange"]], [scores.merged["strange"]]]


def test_an_unseen_task_is_scored_on_and_may_be_learnt_later(ws, data):
    folder = ws("linear")
    teach(folder, data, "b", unseen=[str(data / "d-test.jsonl")])
    assert "d-test" in teach(folder, data, "c").stage.scores.merged
    learned = learn(folder, Request("d-test", data / "d-test.jsonl", data / "d-train.jsonl", sets={"scoring.words": True}))
    assert learned.stage.unseen == ()
    assert learned.stage.scores.base == learned.stage.scores.before == {}  # both are known since it was unseen
    line = status(folder).branches[0]
    assert line.tasks == ("a", "b", "c", "d-test")
    assert None not in [row[3] for row in line.r if row is not line.r[1]]
    assert {item["prediction"] for item in learned.scores["merged"]["a"]["items"]} <= {"y", "n"}  # words: they were asked for


def test_settings_of_one_stage_are_its_own(ws, data):
    folder = ws("recall")
    stage = teach(folder, data, "b", method="ties", sets={"options.density": 0.5}).stage
    assert stage.overrides == {"method": "ties", "options.density": 0.5}
    assert json.loads((folder / "merges" / "2" / "record.json").read_text())["method"]["name"] == "ties"
    assert teach(folder, data, "c").merge.record["method"]["name"] == "recall"


def test_every_expert_leaves_statistics_so_a_later_stage_may_merge_by_them(ws, data):
    folder = ws("linear")
    stage = teach(folder, data, "b", method="aligned", start="last").stage
    assert (read_state(folder).stages[0].stats, stage.stats) == ("statistics/1-a", "statistics/2-b")
    facts = json.loads((folder / "statistics" / "1-a" / "stats.json").read_text())
    assert (facts["samples"], facts["rank"]) == (SETTINGS["samples.count"], RANK)
    record = json.loads((folder / "merges" / "2" / "record.json").read_text())
    assert set(record["statistics"]["experts"]) == {"a", "b"}
    assert not [note for note in record["notes"] if "has no input statistics" in note]
    shutil.rmtree(folder / "statistics" / "2-b")
    refused(folder, lambda: teach(folder, data, "c", method="aligned"), "the input statistics of 'b' are missing")
    assert teach(folder, data, "c", sets={"stats_rank": 0}).stage.stats is None


def test_a_method_that_takes_gradients_gets_them_and_is_refused_before_the_training_where_there_are_none(ws, data):
    folder = ws("linear")
    refused(
        folder, lambda: teach(folder, data, "b", method="fisher"), "the input statistics of 'a' hold no gradients, which `fisher` takes"
    )
    folder = ws("fisher")
    assert open_statistics(folder / "statistics" / "1-a").has_gradients
    notes = teach(folder, data, "b").merge.record["notes"]
    assert not [note for note in notes if "has no input statistics" in note]


def test_an_old_merge_may_be_deleted_to_make_room(ws, data):
    folder = ws("linear")
    shutil.rmtree(folder / "merges" / "1")
    learned = teach(folder, data, "b")
    assert learned.notes[0] == "the merge of stage 1 is missing, so it was not scored on the new tasks"
    assert status(folder).branches[0].r[1] == [learned.state.stages[0].scores.merged["a"], None]


# ---- experts from elsewhere


def test_a_given_adapter_is_copied_and_a_given_checkpoint_stays(ws, data, llama, tmp_path):
    folder = ws("linear")
    adapter = lora(llama, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    (adapter / "optimizer.pt").write_bytes(b"pickle")
    stage = teach(folder, data, "b", expert=str(adapter), train=None).stage
    assert (stage.expert.path, stage.train) == ("experts/2-b", None)
    copied = sorted(path.name for path in (folder / "experts" / "2-b").iterdir())
    assert copied == [MARKER, "adapter_config.json", "adapter_model.safetensors"]
    shutil.rmtree(adapter)

    full = merged_by_peft(llama, folder / "experts" / "2-b", tmp_path / "full")
    stage = teach(folder, data, "c", expert=str(full), train=None).stage
    assert stage.expert.path == str(full.resolve())
    tensors = [dense(llama, folder / "experts" / "1-a", tmp_path / "a"), load_tensors(full), load_tensors(full)]
    assert_close(load_tensors(folder / "merges" / "3"), {name: sum(t[name] for t in tensors) / 3 for name in tensors[0]})
    shutil.rmtree(full)
    refused(folder, lambda: teach(folder, data, "d"), "the expert of 'c' is missing")


def test_an_expert_of_another_base(ws, data, tmp_path, llama):
    folder = ws("linear")
    other = save_model(make_model("llama", seed=5, hidden_size=48), tmp_path / "other")
    adapter = lora(other, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    refused(folder, lambda: teach(folder, data, "b", expert=str(adapter)), "q_proj")
    like = save_model(make_model("llama", seed=5), tmp_path / "like")
    adapter = lora(like, tmp_path / "stranger", r=2, target_modules=["q_proj"])
    refused(folder, lambda: teach(folder, data, "b", expert=str(adapter)), "another")
    assert teach(folder, data, "b", expert=str(adapter), same_base=True).stage.id == 2


# ---- refused before anything begins


def refused(folder: Path, command, *parts: str) -> list[str]:
    """A command that must be refused with these words and leave every file as it was. Returns all faults."""
    before = tree(folder)
    with pytest.raises(RecallError) as error:
        command()
    assert tree(folder) == before
    for part in parts:
        assert part in str(error.value), str(error.value)
    return [fault.what for fault in error.value.faults]


def test_a_name_used_twice(ws, data):
    folder = ws("linear")
    refused(folder, lambda: teach(folder, data, "a"), "a task named 'a' was learnt already", "stage 1", "--to 0")
    refused(folder, lambda: teach(folder, data, "b", unseen=[f"b={data / 'c-test.jsonl'}"]), "the name 'b' is given twice", "NAME=FILE")
    refused(folder, lambda: teach(folder, data, "b", unseen=[f"a={data / 'c-test.jsonl'}"]), "a task named 'a' was learnt already")
    for name in ("base", "../x", "two words", ""):
        asked = Request(name, data / "b-test.jsonl", data / "b-train.jsonl")
        refused(folder, lambda asked=asked: learn(folder, asked), "cannot be the name of a task", "letters, digits")


def test_a_test_that_was_trained_on(ws, data, tmp_path):
    folder = ws("linear")
    rows = [json.loads(line) for name in ("b-train", "b-test", "a-test") for line in (data / f"{name}.jsonl").read_text().splitlines()]
    own, old = rows[12:15], rows[20:22]
    train = write_rows(tmp_path / "train.jsonl", [*rows[:12], *own, *old])
    found = refused(folder, lambda: teach(folder, data, "b", train=train), "take them out of the training file")
    assert "the training file and its test file share rows: 3 of the 8 test rows are also trained on" in found
    assert "the training file and the test file of 'a' share rows: 2 of the 8 test rows are also trained on" in found
    found = refused(folder, lambda: teach(folder, data, "b", unseen=[f"x={data / 'b-train.jsonl'}"]))
    assert found == ["the training file and the test file of 'x' share rows: 12 of the 12 test rows are also trained on"]


def test_rows_that_the_base_cannot_read(ws, data, tmp_path):
    long = {"prompt": "is b 99 " + "very " * 60 + "ok?", "completion": "y", "choices": ["y", "n"]}
    rows = [json.loads(line) for line in (data / "b-train.jsonl").read_text().splitlines()]
    tests = [json.loads(line) for line in (data / "b-test.jsonl").read_text().splitlines()]
    train = write_rows(tmp_path / "train.jsonl", [*rows, long, long])
    test = write_rows(tmp_path / "test.jsonl", [tests[0], long | {"prompt": long["prompt"] + " no"}, *tests[1:]])
    folder = ws("linear")
    asked = Request("b", test, train)
    refused(
        folder,
        lambda: learn(folder, asked),
        "2 of 14 training rows are longer than the 128 tokens that the model can read\n  where: rows 13, 14\n  fix: leave them out",
        "1 of 9 rows of 'b' are longer than the 128 tokens that the model can read\n  where: task 'b', row 2\n  fix: leave them out",
    )
    cut = Request("b", data / "b-test.jsonl", train, sets={"training.max_length": 20})
    refused(folder, lambda: learn(folder, cut), "no token of the completion is left within `max_length`\n  where: row 13")


def test_an_old_test_file_that_changed_or_is_gone(ws, data, tmp_path):
    folder = ws("linear")
    state = read_sealed(folder / "workspace.json")
    moved = shutil.copy(data / "a-test.jsonl", tmp_path / "moved.jsonl")
    state["stages"][0]["task"]["test"]["path"] = str(moved)
    (folder / "workspace.json").write_text(json.dumps(state))
    Path(moved).write_text('{"prompt": "new", "completion": "rows"}\n')
    wanted = state["stages"][0]["task"]["test"]["sha256"]
    refused(folder, lambda: teach(folder, data, "b"), "the test file of 'a' has changed since stage 1", str(moved), wanted)
    Path(moved).unlink()
    refused(folder, lambda: teach(folder, data, "b"), "the test file of 'a' is missing", "write where it lies now into workspace.json")


def test_models_that_changed(ws, data, llama, tmp_path):
    folder = ws("linear")
    state = read_sealed(folder / "workspace.json")
    base = shutil.copytree(llama, tmp_path / "base")
    state["base"]["path"] = str(base)
    (folder / "workspace.json").write_text(json.dumps(state))
    for place in (base, folder / "merges" / "1", folder / "experts" / "1-a"):
        file = next(place.glob("*.safetensors"))
        data_of = bytearray(file.read_bytes())
        data_of[-5] ^= 1
        for tensor in range(len(data_of) - 4000, len(data_of)):
            data_of[tensor] ^= 1
        file.write_bytes(data_of)
    found = refused(folder, lambda: teach(folder, data, "b"), "put back what was there")
    assert "the expert of 'a' has changed since stage 1" in found
    shutil.rmtree(base)
    found = refused(folder, lambda: teach(folder, data, "b"))
    assert "the base is missing" in found


def test_all_faults_at_once(ws, data, tmp_path):
    folder = ws("linear")
    asked = Request(
        "a",
        tmp_path / "no test.jsonl",
        write_rows(tmp_path / "train.jsonl", [{"prompt": "p"}]),
        unseen=[f"u={tmp_path / 'no rows.jsonl'}"],
        metric="f2",
        sets={"training.ranc": 1, "options.scle": 2, "seed": "x"},
    )
    found = "\n".join(refused(folder, lambda: learn(folder, asked)))
    for part in (
        "a task named 'a' was learnt already",
        "field `completion` must be text",
        "the test file of 'a' is missing",
        "the test file of 'u' is missing",
        "unknown key 'training.ranc'",
        "'seed'",
    ):
        assert part in found, found
    elsewhere = "\n".join(refused(tmp_path, lambda: learn(tmp_path / "nowhere", asked)))
    assert "there is no such workspace" in elsewhere
    assert "the test file of 'a' is missing" in elsewhere


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"method": "lineer"}, "there is no method 'lineer'"),
        ({"method": "slerp", "sets": {"options.x": 1}}, "has no option 'x'"),
        ({"metric": "bleu"}, "'bleu' is not a metric of rows with choices"),
        ({"train": None}, "there is nothing to train on"),
        ({"sets": {"training.arguments": {"max_lenght": 3}}}, "no argument 'max_lenght'"),
        ({"sets": {"samples.path": "x"}}, "filled in by the workspace"),
        ({"expert": "no such/place/at all"}, "there is no such"),
        pytest.param({"unseen": ["helaswag"]}, "lm-eval has no task 'helaswag'", marks=pytest.mark.slow),  # reads ten thousand files
        ({"sets": {"scoring.limit": 3, "template": False}}, "'scoring.limit' is None in this workspace and cannot be 3 for one stage"),
        ({"sets": {"weights": [1, 2, 3]}}, "there are 3 weights for 2 experts"),
    ],
)
def test_wrong_requests(ws, data, more, what):
    folder = ws("linear")
    refused(folder, lambda: teach(folder, data, "b", **more), what)


def test_recall_needs_the_rows_of_a_given_expert(ws, data, llama, tmp_path):
    folder = ws("recall")
    adapter = lora(llama, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    refused(folder, lambda: teach(folder, data, "b", expert=str(adapter), train=None), "give its training rows: --train FILE")
    refused(folder, lambda: teach(folder, data, "b", expert=str(adapter), start="last"), "leave out --from, or --expert")


# ---- stopped, and on from there


@pytest.fixture(scope="module")
def processes():
    """Processes that have all imports behind them, and so can be stopped in the middle of a stage without a long wait."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "torch",
            "transformers",
            "peft",
            "trl.trainer.sft_trainer",
            "lm_eval.models.huggingface",
            "recall_merge.training.fine_tuning",
            __name__,
        ]
    )
    return context


class StopAt:
    """Kills its own process when a kind of work has come so far."""

    def __init__(self, label: str, amount: int) -> None:
        self.label, self.amount = label, amount

    @contextmanager
    def stage(self, label: str, total: int, unit: str):
        left = self.amount

        def advance(done: int) -> None:
            nonlocal left
            left -= done
            if label.startswith(self.label) and left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        advance(0)
        yield advance


def changes_below(folder: Path, heard: Callable[[int], None]) -> None:
    """Call `heard` just before every change of a file or folder below a place that this process makes, with its number from 0."""
    under, numbers = str(folder.resolve()), itertools.count()
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def listen(event: str, given: tuple) -> None:
        change = event in {"os.rename", "os.remove", "os.mkdir", "os.rmdir"} or (event == "open" and int(given[2] or 0) & writing)
        if change and str(given[0]).startswith(under):
            heard(next(numbers))

    sys.addaudithook(listen)


def learn_until(folder: Path, asked: Request, label: str | None, amount: int) -> None:
    """In a process of its own: learn, and be killed when work of this label has come so far, or before the n-th change of a file."""
    torch.set_num_threads(1)
    if label is None:
        changes_below(folder, lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == amount else None)
    learn(folder, asked, progress=StopAt(label, amount) if label else None)


def count_changes(folder: Path, asked: Request, queue: Any) -> None:
    """In a process of its own: learn, and tell how many changes of files that took."""
    torch.set_num_threads(1)
    numbers: list[int] = []
    changes_below(folder, numbers.append)
    learn(folder, asked)
    queue.put(len(numbers))


def killed(processes, *arguments) -> bool:
    process = processes.Process(target=learn_until, args=arguments)
    process.start()
    process.join()
    return process.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def undisturbed(processes, made, data, tmp_path_factory):
    """What a workspace is after a stage that nothing disturbed, and how many changes of files the stage took."""
    folder, queue = shutil.copytree(made("recall"), tmp_path_factory.mktemp("undisturbed") / "ws"), processes.Queue()
    process = processes.Process(target=count_changes, args=(folder, request(data, "b"), queue))
    process.start()
    changes = queue.get()
    process.join()
    return essence(folder), changes


PARTS = [("train", "training", 1), ("merge", "merging by", 1), ("score", "scoring choices", 8)]


@pytest.mark.parametrize(("part", "label", "amount"), PARTS, ids=[label for _, label, _ in PARTS])
def test_a_stop_while_working_changes_nothing(processes, ws, data, undisturbed, part, label, amount):
    folder = ws("recall")
    before = read_state(folder)
    assert killed(processes, folder, request(data, "b"), label, amount)
    found = status(folder)
    assert (found.state.stages, found.state.head) == (before.stages, before.head)  # not half there
    assert found.unfinished is not None
    assert (found.unfinished[0].task.name, found.unfinished[1], found.holder) == ("b", part, None)
    learn(folder)
    assert essence(folder) == undisturbed[0]


@pytest.mark.parametrize("from_end", [5, 4, 3, 2])
def test_a_stop_while_committing_changes_nothing(processes, ws, data, undisturbed, from_end):
    """The last changes are: the journal says that the commit begins, the new state is written, takes its place, the journal says so."""
    finish_after_stop(processes, ws("recall"), data, undisturbed, undisturbed[1] - from_end)


@pytest.mark.slow
def test_a_stop_before_any_change_of_a_file_changes_nothing(processes, ws, data, undisturbed, tmp_path):
    for number in range(undisturbed[1]):
        again = shutil.copytree(ws("recall"), tmp_path / str(number))
        finish_after_stop(processes, again, data, undisturbed, number)
        shutil.rmtree(again)
        shutil.rmtree(tmp_path / "recall")


def finish_after_stop(processes, folder: Path, data: Path, undisturbed, number: int) -> None:
    assert killed(processes, folder, request(data, "b"), None, number)
    found = status(folder)
    assert found.holder is None
    if found.state.head == 1:  # a stop before the state was replaced
        teach(folder, data, "b")
    assert essence(folder) == undisturbed[0], number


def test_while_a_stage_is_unfinished_another_is_refused_and_rollback_gives_it_up(processes, ws, data):
    folder = ws("recall")
    assert killed(processes, folder, request(data, "b"), "scoring choices", 0)
    refused(folder, lambda: teach(folder, data, "c"), "stage 2 ('b') was begun and is not finished", f"`recall learn {folder}`", "--to 1")
    refused(folder, lambda: teach(folder, data, "b", metric="acc_norm"), "not the same request")
    rollback(folder, 1)
    assert status(folder).unfinished is None
    assert (folder / "merges" / "2").is_dir()  # nothing is deleted before the number is used again
    stage = teach(folder, data, "c").stage
    assert (stage.id, stage.parent, stage.task.name) == (2, 1, "c")
    assert json.loads((folder / "merges" / "2" / "record.json").read_text())["run"]["experts"][1]["name"] == "c"
    assert [entry["given_up"] for entry in read_journal(folder) if "given_up" in entry] == [2]


def test_nothing_to_go_on_with(ws):
    folder = ws("linear")
    refused(folder, lambda: learn(folder), "nothing is unfinished", "--task")


def test_a_changed_file_stops_the_going_on(processes, ws, data, tmp_path):
    folder = ws("recall")
    train = shutil.copy(data / "b-train.jsonl", tmp_path / "train.jsonl")
    assert killed(processes, folder, request(data, "b", train=Path(train)), "training", 1)
    shutil.copy(data / "c-train.jsonl", train)
    refused(folder, lambda: learn(folder), "the training file has changed since it was given")


# ---- the command


def recall(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_learn_as_a_user_types_it(ws, data, monkeypatch, tmp_path):
    folder = ws("linear")
    files = ["--train", data / "b-train.jsonl", "--test", data / "b-test.jsonl"]
    more = ["--metric", "acc", "--from", "last", "--unseen", f"{data / 'c-test.jsonl'},other={data / 'd-test.jsonl'}", "-m", "ties"]
    result = recall("learn", folder, "--task", "b", *files, *more, "--set", "options.density=0.5")
    assert result.exit_code == 0, result.output
    for part in (
        "task",
        "its expert",
        "c-test (unseen)",
        "other (unseen)",
        "average performance: 0.",
        "(mean over all T tasks",
        "merges/2",
    ):
        assert part in result.output
    assert "\x1b" not in result.output
    stage = read_state(folder).stages[1]
    assert (stage.start, stage.task.metric, stage.overrides) == ("last", "acc", {"method": "ties", "options.density": 0.5})

    result = recall("learn", folder, "--task", "c", "--train", data / "c-train.jsonl", "--test", data / "d-test.jsonl", "--json")
    found = json.loads(result.output)
    assert (found["stage"]["id"], found["line"], found["tasks"]) == (3, [1, 2, 3], ["a", "b", "c"])
    assert found["R"][3] == [found["stage"]["scores"]["merged"][name] for name in "abc"]
    assert found["model"] == f"{folder}/merges/3"


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--task", "b"], "a new task needs --test"),
        (["--train", "x.jsonl"], "a new task needs --task and --test"),
        (["--from", "middle"], "--from middle: it must be base or last"),
        (["--task", "b", "--test", "no.jsonl"], "the test file of 'b' is missing"),
        (["--task", "b", "--test", "no.jsonl", "--set", "seed"], "not of the form KEY=VALUE"),
        ([], "nothing is unfinished"),
    ],
)
def test_learn_refused_as_a_user_types_it(ws, arguments, what):
    folder = ws("linear")
    result = recall("learn", folder, *arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, RecallError)
    assert what in str(result.exception)


def test_arguments_that_a_workspace_brings_need_a_word_from_the_keyboard(ws, data):
    """Push to a hub, from the settings of a stranger's workspace: nothing is trained until it is allowed, by name."""
    folder = ws("linear")
    state = read_sealed(folder / "workspace.json")
    state["settings"]["training"]["arguments"] = {"push_to_hub": True, "hub_model_id": "stranger/theirs"}
    (folder / "workspace.json").write_text(sealed(state))
    asked = ["--task", "b", "--train", data / "b-train.jsonl", "--test", data / "b-test.jsonl"]
    before = sorted(folder.rglob("*"))
    for allowed, left in (([], {"push_to_hub", "hub_model_id"}), (["--allow-argument", "hub_model_id"], {"push_to_hub"})):
        error = recall("learn", folder, *asked, *allowed).exception
        assert isinstance(error, RecallError)
        assert {name for name in ("push_to_hub", "hub_model_id") if f"--allow-argument {name}" in str(error)} == left
        assert sorted(path for path in folder.rglob("*") if path.name != "lock") == [path for path in before if path.name != "lock"]


@pytest.mark.slow
def test_a_real_command_that_is_killed_at_any_time_is_finished_by_the_next(made, data, tmp_path):
    """Not at chosen instants, but at times spread over the command, by a signal from outside."""
    files = ["--train", data / "b-train.jsonl", "--test", data / "b-test.jsonl"]
    command = [sys.executable, "-m", "recall_merge", "learn", "ws", "--task", "b", *map(str, files)]
    spent, wanted = 0.0, None
    for number in range(10):
        place = tmp_path / str(number)
        shutil.copytree(made("recall"), place / "ws")
        start = time.monotonic()
        with subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            if number:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(spent * number / 10)
                process.kill()
        spent = spent or time.monotonic() - start
        assert (
            "b" in {stage.task.name for stage in read_state(place / "ws").stages}
            or subprocess.run(command, cwd=place, check=False).returncode == 0
        )
        wanted = wanted or essence(place / "ws")
        assert essence(place / "ws") == wanted


# ---- inputs that change while a stage runs, and between stages


@pytest.mark.parametrize("part", ["train", "take_statistics", "merge_models", "score_model"])
@pytest.mark.parametrize("what", ["rows", "test", "base", "template"])
def test_inputs_that_change_while_a_stage_runs(llama, data, tmp_path, monkeypatch, part, what):
    """Written anew in place, with size and time as before: the stage stops before it goes on, and the state stays as it was."""
    if what in ("test", "template") and part in ("take_statistics", "merge_models"):
        return  # the same road
    base, rows = shutil.copytree(llama, tmp_path / "base"), shutil.copytree(data, tmp_path / "data")
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}\n")
    folder = make_workspace(tmp_path / "ws", base)
    places = {"rows": rows / "a-train.jsonl", "test": rows / "a-test.jsonl", "base": base / "model.safetensors"}
    file = places.get(what, base / "chat_template.jinja")
    real = getattr(stages, part)

    def busy(*given, **options):
        made = real(*given, **options)
        times, old = file.stat(), file.read_bytes()
        file.write_bytes(old[:-1] + bytes([old[-1] ^ 1]))
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        return made

    monkeypatch.setattr(stages, part, busy)
    with pytest.raises(RecallError, match="the file changed while it was read") as error:
        teach(folder, rows, "a")
    assert str(file) in str(error.value)
    assert read_state(folder).head == 0 and read_state(folder).unfinished is not None
    monkeypatch.setattr(stages, part, real)
    with pytest.raises(RecallError):
        learn(folder)
    data_of_file = file.read_bytes()
    file.write_bytes(data_of_file[:-1] + bytes([data_of_file[-1] ^ 1]))
    assert learn(folder).state.head == 1


def test_a_chat_template_or_tokenizer_that_changes_between_stages(llama, data, tmp_path):
    """R would hold scores of other prompts."""
    base = shutil.copytree(llama, tmp_path / "base")
    folder = make_workspace(tmp_path / "ws", base, method="linear")
    teach(folder, data, "a")
    for name in ("chat_template.jinja", "tokenizer_config.json", "generation_config.json", "additional_chat_templates/tool.jinja"):
        for place, words in ((base, "the base has changed"), (folder / "merges" / "1", "the merge of stage 1 has changed")):
            kept = shutil.copytree(place, tmp_path / "kept")
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_text('{"bos_token": "</s>"}')
            with pytest.raises(RecallError, match=words):
                teach(folder, data, "b")
            shutil.rmtree(place)
            shutil.move(kept, place)
    state = read_sealed(folder / "workspace.json")  # an earlier version knew the weights alone
    state["base"]["fingerprint"] = state["base"]["fingerprint"].partition(".")[0]
    (folder / "workspace.json").write_text(json.dumps(state))
    assert teach(folder, data, "b").state.head == 2
