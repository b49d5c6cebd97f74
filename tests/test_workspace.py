"""A workspace: one readable state, replaced in one step; one command at a time; back to any stage, with nothing deleted."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from recall_merge.cli.app import app
from recall_merge.continual.page import make_page
from recall_merge.continual.stages import learn
from recall_merge.continual.state import (
    Model,
    Scores,
    Stage,
    StageSpec,
    State,
    Task,
    found_path,
    merge_of,
    opened,
    read_journal,
    read_state,
    write_state,
)
from recall_merge.continual.workspace import branch, init, rollback, status
from recall_merge.runtime.durable import append_line, write_whole
from recall_merge.runtime.errors import RecallError, WorkspaceError
from recall_merge.runtime.lock import holder
from recall_merge.runtime.progress import Silent
from recall_merge.runtime.sealed import read_sealed, sealed
from tiny import fine_tuned
from workspaces import essence, make_taught, make_workspace, teach, tree, write_tasks


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def taught(llama, data, tmp_path_factory) -> Path:
    """A workspace that has learnt `a`, then `b`. Read it, or copy it."""
    return make_taught(tmp_path_factory.mktemp("taught") / "ws", llama, data, "ab")


@pytest.fixture
def ws(taught, tmp_path) -> Path:
    return shutil.copytree(taught, tmp_path / "ws")


def words(error) -> list[str]:
    return [fault.what for fault in error.value.faults]


# ---- init


def test_a_new_workspace_says_all_that_it_will_do(llama, tmp_path):
    state = init(tmp_path / "ws", str(llama), {"training.epochs": 3, "method": "ties", "options.density": 0.3})
    kept = read_sealed(tmp_path / "ws" / "workspace.json")
    assert kept["format"] == 2
    assert kept["base"]["path"] == str(llama.resolve())
    assert kept["settings"]["training"]["epochs"] == 3
    assert kept["settings"]["training"]["rank"] == 16  # defaults too: another version's would change what the workspace does
    assert (kept["settings"]["method"], kept["settings"]["options"], kept["settings"]["strategy"]) == ("ties", {"density": 0.3}, "one_shot")
    assert not {"base", "experts"} & set(kept["settings"])
    assert (kept["stages"], kept["head"], kept["unfinished"]) == ([], 0, None)
    assert read_state(tmp_path / "ws") == state
    assert status(tmp_path / "ws").branches == ()


def test_a_base_given_by_a_relative_path_is_found_from_elsewhere(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(llama.parent)
    init(tmp_path / "ws", llama.name)
    monkeypatch.chdir(tmp_path)
    assert status(Path("ws")).missing == ()
    assert read_state(Path("ws")).base.path == str(llama.resolve())


def test_init_reports_all_faults_and_writes_nothing(tmp_path):
    (tmp_path / "ws").mkdir()
    (tmp_path / "ws" / "notes.txt").write_text("mine")
    with pytest.raises(RecallError) as error:
        init(tmp_path / "ws", str(tmp_path / "no model"), {"method": "linear", "trainin.epochs": 1, "out.path": "x", "samples": 3})
    found = "\n".join(words(error))
    assert "unknown key 'trainin'" in found
    assert "'out.path' is filled in by the workspace" in found
    assert "'samples'" in found
    assert "there is no such folder" in found
    assert "something else lies where the workspace is to be" in found
    assert tree(tmp_path) == {"ws/notes.txt": tree(tmp_path)["ws/notes.txt"]}


@pytest.mark.parametrize(
    ("settings", "what", "fix"),
    [
        ({"method": "lineer"}, "there is no method 'lineer'", "did you mean 'linear'"),
        ({"method": "linear", "options.scle": 2}, "has no option 'scle'", "did you mean 'scale'"),
        ({"options.temperature": 0}, "'temperature'", "0"),
        ({"strategy": "one"}, "'strategy'", "'one'"),
        ({"training.ranc": 2}, "unknown key 'training.ranc'", "did you mean 'rank'"),
        ({"training.template": False}, "filled in by the workspace", "`template`"),
        ({"experts": []}, "filled in by the workspace", "leave it out"),
    ],
)
def test_wrong_settings(llama, tmp_path, settings, what, fix):
    with pytest.raises(RecallError) as error:
        init(tmp_path / "ws", str(llama), settings)
    assert any(what in fault.what and fix in fault.fix for fault in error.value.faults), str(error.value)
    assert not (tmp_path / "ws").exists()


def test_a_workspace_is_not_made_twice_nor_inside_its_base_nor_on_an_adapter(llama, tmp_path, ws):
    before = tree(ws)
    with pytest.raises(WorkspaceError, match="there is a workspace already"):
        init(ws, str(llama))
    assert tree(ws) == before
    with pytest.raises(WorkspaceError, match="would lie in the folder of the base"):
        init(llama / "ws", str(llama))
    with pytest.raises(WorkspaceError, match="the base is an adapter"):
        init(tmp_path / "other", str(ws / "experts" / "1-a"))


def test_an_init_that_was_stopped_is_done_again(llama, tmp_path):
    folder = tmp_path / "ws"
    folder.mkdir()
    for name in ("lock", "journal.jsonl", "workspace.json.0a1b2c3d.partial"):
        (folder / name).write_text("{")
    init(folder, str(llama))
    assert read_state(folder).head == 0


# ---- the state


def broken(ws: Path, **changes) -> Path:
    state = read_sealed(ws / "workspace.json") | changes
    (ws / "workspace.json").write_text(json.dumps(state))
    return ws


@pytest.mark.parametrize("command", [status, learn, lambda folder: rollback(folder, 0)])
def test_a_folder_that_is_no_workspace(tmp_path, command):
    (tmp_path / "photos").mkdir()
    with pytest.raises(WorkspaceError, match="this is no workspace") as error:
        command(tmp_path / "photos")
    assert "recall init" in str(error.value)
    with pytest.raises(WorkspaceError, match="there is no such workspace"):
        command(tmp_path / "nowhere")
    assert list(tmp_path.rglob("*")) == [tmp_path / "photos"]


@pytest.mark.parametrize("command", [status, learn, lambda folder: rollback(folder, 0)])
def test_a_workspace_of_a_newer_version_is_left_alone(ws, command):
    before = tree(broken(ws, format=3, something="new"))
    with pytest.raises(WorkspaceError, match="newer version of recall-merge: its format is 3, this version knows 2") as error:
        command(ws)
    assert "install the version of recall-merge that wrote it, or a newer one" in str(error.value)
    assert tree(ws) == before


@pytest.mark.parametrize("command", [status, learn, lambda folder: rollback(folder, 0)])
def test_a_workspace_of_an_older_version_is_refused(ws, command):
    before = tree(broken(ws, format=1, cards={}))
    with pytest.raises(WorkspaceError, match="older version of recall-merge: its format is 1, this version knows 2") as error:
        command(ws)
    assert "learn its tasks again" in str(error.value)
    assert tree(ws) == before


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"head": "2"}, "head: "),
        ({"head": 3}, "there is no stage 3 to be the head"),
        ({"heads": 2}, "heads: "),
        ({"format": None}, "format: "),
        ({"stages": [{}]}, "stages.0.id: "),
    ],
)
def test_a_damaged_state(ws, changes, what):
    before = tree(broken(ws, **changes))
    with pytest.raises(WorkspaceError) as error:
        read_state(ws)
    assert any(f"the workspace's state is damaged: {what}" in fault for fault in words(error)), str(error.value)
    with pytest.raises(WorkspaceError):
        learn(ws)
    assert tree(ws) == before


def test_a_state_that_is_not_json(ws):
    (ws / "workspace.json").write_text("{")
    with pytest.raises(WorkspaceError, match="cannot be read"):
        status(ws)


def test_a_reader_never_sees_half_a_file(tmp_path):
    path, seen = tmp_path / "state", set()
    texts = ["a" * 100_000, "b" * 100_000]
    write_whole(path, texts[0])
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.add(path.read_text())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for number in range(100):
        write_whole(path, texts[number % 2])
    stop.set()
    watcher.join()
    assert seen <= set(texts)
    assert list(tmp_path.iterdir()) == [path]


def test_a_line_cut_short_does_not_swallow_the_next(tmp_path):
    journal = tmp_path / "journal.jsonl"
    append_line(journal, '{"n": 1}')
    with journal.open("a") as file:
        file.write('{"n": 2, "tex')  # killed here
    append_line(journal, '{"n": 3}')
    assert read_journal(tmp_path) == [{"n": 1}, {"n": 3}]


# ---- one command at a time

HOLD = """
import sys, time
from pathlib import Path
from recall_merge.continual.state import opened
with opened(Path(sys.argv[1]), "recall learn ws --task french"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_second_of_two_commands_is_told_who_is_first(ws, data):
    before = essence(ws)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(ws)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        for command in (lambda: teach(ws, data, "c"), lambda: rollback(ws, 1)):
            with pytest.raises(WorkspaceError, match=f"in use by process {other.pid}, `recall learn ws --task french`, since"):
                command()
        assert status(ws).holder == holder(ws)
        assert status(ws).holder.startswith(f"process {other.pid}, `recall learn ws --task french`, since 2")
        other.send_signal(signal.SIGKILL)
    assert essence(ws) == before
    assert status(ws).holder is None  # the system took the lock back
    assert rollback(ws, 1).head == 1


def test_the_lock_is_given_back_when_a_command_fails(ws):
    with pytest.raises(ZeroDivisionError), opened(ws, "x"):
        raise ZeroDivisionError
    with opened(ws, "y"):
        found = holder(ws)
        assert found is not None and found.startswith(f"process {os.getpid()}, `y`, since ")
    assert not (ws / "lock").exists()


# ---- R


def a_stage(number: int, parent: int, task: str, merged: dict, base: dict | None = None, before: dict | None = None, **more) -> Stage:
    model = Model(path=f"merges/{number}", fingerprint="")
    scores = Scores(file="", base=base or {}, before=before or {}, expert={task: 0.9}, merged=merged)
    facts = {"train": None, "start": "base", "expert": model, "merged": model, "samples": (), "created": ""}
    return Stage(id=number, parent=parent, task=Task(name=task), scores=scores, **facts | more)


def test_r_and_its_numbers_by_hand():
    #        a    b    c        u (unseen since stage 2)
    # base  .1   .2   .3       .5
    # 1     .8   .25   -       .4
    # 2     .6   .7   .35      .6
    # 3     .7   .5   .9       .45
    unseen = (Task(name="u"),)
    stages = (
        a_stage(1, 0, "a", {"a": 0.8}, base={"a": 0.1}),
        a_stage(2, 1, "b", {"a": 0.6, "b": 0.7, "u": 0.6}, base={"b": 0.2, "u": 0.5}, before={"b": 0.25, "u": 0.4}, unseen=unseen),
        a_stage(3, 2, "c", {"a": 0.7, "b": 0.5, "c": 0.9, "u": 0.45}, base={"c": 0.3}, before={"c": 0.35}, unseen=unseen),
        a_stage(4, 1, "d", {"a": 0.75, "d": 0.5}, base={"d": 0.5}, before={"d": 0.5}),
    )
    state = State(base=Model(path="base", fingerprint=""), settings={}, stages=stages, head=3)
    line = branch(state, 3)
    assert line.tasks == ("a", "b", "c")
    assert line.r == [[0.1, 0.2, 0.3], [0.8, 0.25, None], [0.6, 0.7, 0.35], [0.7, 0.5, 0.9]]
    assert (line.unseen, line.r_unseen) == (("u",), [[0.5], [0.4], [0.6], [0.45]])
    assert line.experts == [0.9, 0.9, 0.9]
    assert line.numbers == {
        "average_performance": pytest.approx((0.7 + 0.5 + 0.9) / 3),
        "learning_accuracy": pytest.approx((0.8 + 0.7 + 0.9) / 3),
        "backward_transfer": pytest.approx((-0.1 - 0.2) / 2),
        "forgetting": pytest.approx((0.1 + 0.2) / 2),
        "forward_transfer": pytest.approx((0.05 + 0.05) / 2),
        "retention": pytest.approx((0.6 / 0.8 + 0.3 / 0.7 + 0.6 / 0.6) / 3),
        "unseen_delta": pytest.approx(-0.05),
    }
    other = branch(state, 4)
    assert (other.tasks, other.unseen) == (("a", "d"), ())
    assert other.r == [[0.1, 0.5], [0.8, 0.5], [0.75, 0.5]]
    assert other.numbers["retention"] == pytest.approx((0.65 / 0.8 + 0) / 2)


def test_a_number_that_is_not_defined_is_none():
    state = State(base=Model(path="base", fingerprint=""), settings={}, stages=(a_stage(1, 0, "a", {"a": 0.8}, base={"a": 0.1}),), head=1)
    assert branch(state, 1).numbers["backward_transfer"] is None
    assert branch(state, 1).numbers["average_performance"] == pytest.approx(0.8)


# ---- back, and on from there


def test_rollback_then_learn_is_a_branch_and_nothing_is_deleted(ws, data):
    before, state = tree(ws), read_state(ws)
    rollback(ws, 1)
    learned = teach(ws, data, "c")
    assert (learned.stage.id, learned.stage.parent) == (3, 1)

    after, now = tree(ws), read_state(ws)
    kept = {name: digest for name, digest in before.items() if name not in {"workspace.json", "journal.jsonl"}}
    assert kept.items() <= after.items()
    assert now.stages[:2] == state.stages
    found = status(ws)
    assert [[stage.id for stage in line.stages] for line in found.branches] == [[1, 3], [1, 2]]
    assert [line.tasks for line in found.branches] == [("a", "c"), ("a", "b")]
    assert found.branches[1].r == branch(state, 2).r  # the other branch is as it was

    assert rollback(ws, 2).head == 2
    assert [[stage.id for stage in line.stages] for line in status(ws).branches] == [[1, 2], [1, 3]]
    assert [entry["event"] for entry in read_journal(ws)].count("rollback") == 2


def test_a_task_can_be_learnt_again_on_another_branch(ws, data):
    rollback(ws, 1)
    teach(ws, data, "b", sets={"training.epochs": 2})
    first, second = read_state(ws).stages[1:]
    assert (first.task, first.parent) == (second.task, second.parent)
    assert first.overrides == {}
    assert second.overrides == {"training.epochs": 2}
    assert first.expert.fingerprint != second.expert.fingerprint
    assert first.scores.base == second.scores.base


def test_back_to_the_base(ws, data):
    rollback(ws, 0)
    found = status(ws)
    assert found.state.head == 0
    assert [[stage.id for stage in line.stages] for line in found.branches] == [[1, 2]]
    assert teach(ws, data, "c").stage.parent == 0
    assert [[stage.id for stage in line.stages] for line in status(ws).branches] == [[3], [1, 2]]


@pytest.mark.parametrize(
    ("to", "what", "fix"),
    [(7, "there is no stage 7", "stages 0 to 2"), (-1, "there is no stage -1", "0 is the base"), (2, "at stage 2 already", "status")],
)
def test_no_way_back(ws, to, what, fix):
    before = tree(ws)
    with pytest.raises(WorkspaceError, match=what) as error:
        rollback(ws, to)
    assert re.search(fix, str(error.value))
    assert tree(ws) == before


def test_what_is_missing_is_said(ws):
    shutil.rmtree(ws / "merges" / "1")
    assert status(ws).missing == ("the merge of stage 1 is missing: merges/1",)
    with pytest.raises(WorkspaceError, match="the merge of stage 1 is missing"):
        rollback(ws, 1)


def test_a_workspace_can_be_moved(ws, data, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    moved = ws.rename(tmp_path / "elsewhere" / "other name")
    state = read_state(moved)
    assert not any(Path(stage.expert.path).is_absolute() or Path(stage.merged.path).is_absolute() for stage in state.stages)
    assert found_path(moved, state.stages[0].merged.path).is_dir()
    assert teach(moved, data, "c").stage.id == 3


# ---- the commands


def recall(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_status_shows_lineage_and_r(ws, data, monkeypatch):
    rollback(ws, 1)
    teach(ws, data, "c")
    monkeypatch.chdir(ws.parent)
    result = recall("status", "ws")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert "model: ws/merges/3" in lines
    tree_lines = [line for line in lines if "fine-tuned from" in line]
    assert ["<- now" in line for line in tree_lines] == [False, False, True]
    assert [re.search(r"\d \w", line)[0] for line in tree_lines] == ["1 a", "2 b", "3 c"]  # type: ignore[index]
    first, second = (result.output.index(f"R, the branch to stage {number}") for number in (3, 2))
    assert first < second
    scores = read_state(ws).stages[2].scores
    row = next(line.split() for line in lines if line.startswith(" 3 c"))
    assert row == ["3", "c", f"{scores.merged['a']:.3f}", f"{scores.merged['c']:.3f}"]
    assert "average performance: " in result.output
    assert "(mean over all T tasks of R[T, j])" in result.output
    assert "\x1b" not in result.output  # plain text, where it does not go to a terminal

    found = json.loads(recall("status", "ws", "--json").output)
    assert (found["head"], found["model"]) == (3, "ws/merges/3")
    assert [line["line"] for line in found["branches"]] == [[1, 3], [1, 2]]
    assert found["branches"][0]["R"][2] == [scores.merged["a"], scores.merged["c"]]
    assert found["branches"][0]["numbers"]["average_performance"] == pytest.approx((scores.merged["a"] + scores.merged["c"]) / 2)
    assert set(found["branches"][0]["numbers"]) <= set(found["formulas"])


def test_init_and_rollback_commands(ws, llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = recall("init", "new", "--base", llama, "--method", "ties", "--set", "training.epochs=1")
    assert result.exit_code == 0, result.output
    assert "made a workspace in new" in result.output
    assert json.loads(recall("status", "new", "--json").output)["settings"]["training"]["epochs"] == 1
    assert "0 base" in recall("status", "new").output
    assert "the model is ws/merges/1, of stage 1" in recall("rollback", "ws", "--to", 1).output
    assert json.loads(recall("rollback", "ws", "--to", 0, "--json").output) == {"path": "ws", "head": 0, "model": str(llama.resolve())}
    again = recall("init", "new", "--base", llama)
    assert again.exit_code == 1
    assert "there is a workspace already" in str(again.exception)


def test_an_unfinished_stage_and_a_running_command_are_shown(ws):
    state = read_state(ws)
    spec = StageSpec(**state.stages[1].model_dump(include=set(StageSpec.model_fields)) | {"id": 3, "parent": 2, "task": Task(name="c")})
    write_state(ws, state.model_copy(update={"unfinished": spec}), was=state)
    append_line(ws / "journal.jsonl", json.dumps({"stage": 3, "part": "merge", "event": "begun"}))
    shown = recall("status", ws).output
    assert f"unfinished: stage 3 (c), in part 'merge'; `recall learn {ws}` continues it, `recall rollback {ws} --to 2` gives it up" in shown
    assert json.loads(recall("status", ws, "--json").output)["unfinished"]["part"] == "merge"
    with opened(ws, "recall learn ws"):
        assert f"in progress: process {os.getpid()}, `recall learn ws`, since" in recall("status", ws).output


def test_evaluate_any_model_on_any_tasks(ws, data, llama, monkeypatch):
    monkeypatch.chdir(ws.parent)
    scores = read_state(ws).stages[1].scores
    tasks = f"a={data / 'a-test.jsonl'},b={data / 'b-test.jsonl'}"

    def scored(model: object, *more: object) -> dict[str, float]:
        result = recall("evaluate", model, "--tasks", tasks, "--json", *more)
        assert result.exit_code == 0, result.output
        return {found["task"]: found["score"] for found in json.loads(result.output)["scores"]}

    assert scored("ws") == scored("ws/merges/2") == scores.merged  # a workspace is its model of now
    assert scored("ws/experts/2-b")["b"] == scores.expert["b"]  # an adapter names its base
    assert scored("ws/experts/2-b", "--base", llama)["b"] == scores.expert["b"]
    assert scored(llama)["b"] == scores.base["b"]
    assert scored(llama) != scores.merged
    limited = recall("evaluate", llama, "--tasks", tasks, "--metric", "b=acc_norm", "--limit", 3)
    assert [line.split()[:2] + line.split()[-1:] for line in limited.output.splitlines()[1:]] == [["a", "acc", "3"], ["b", "acc_norm", "3"]]


def test_evaluate_reports_all_faults(ws, data):
    result = recall(
        "evaluate", ws / "scores", "--tasks", f"{data / 'no.jsonl'},a={data / 'a-test.jsonl'}", "--metric", "a=bleu", "--metric", "z=acc"
    )
    assert result.exit_code == 1
    found = str(result.exception)
    assert all(part in found for part in ("no config.json", "there is no such file", "'bleu' is not a metric of rows with choices", "'z'"))
    assert "leave out --base" in str(recall("evaluate", ws / "merges" / "1", "--tasks", data / "a-test.jsonl", "--base", "x").exception)
    assert "write --metric TASK=METRIC" in str(recall("evaluate", ws, "--tasks", "a", "--metric", "acc").exception)


def test_the_merges_of_a_workspace_are_told_by_it_and_nothing_is_written_among_them(ws, data):
    """Report, export and verify find the base and the experts, given the workspace or one of its merges."""
    before = tree(ws / "merges")
    for place in (ws, ws / "merges" / "2"):
        assert recall("verify", str(place)).exit_code == 0
        done = recall("export", str(place), "--to", "adapter", "--rank", "2", "--json")
        assert done.exit_code == 0, done.output
        written = Path(json.loads(done.stdout)["path"])
        assert written == ws.with_name(f"{ws.name}-2-adapter")
        shutil.rmtree(written)
    done = recall("export", str(ws / "merges" / "1"), "--to", "mergekit", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["path"] == str(ws.with_name(f"{ws.name}-1.mergekit.yaml"))
    done = recall("report", str(ws / "merges" / "2"), "--json")
    assert done.exit_code == 0, done.output
    page = Path(json.loads(done.stdout)["page"])
    assert page.parent == ws.with_name(f"{ws.name}-2-report") and "is not shown" not in page.read_text("utf-8")
    assert tree(ws / "merges") == before
    assert merge_of(ws.parent) == (ws.parent, {})


def test_a_base_that_was_moved_can_be_pointed_to(llama, data, tmp_path):
    shutil.copytree(llama, tmp_path / "base")
    workspace = make_workspace(tmp_path / "ws", tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(
        RecallError, match=r"the base is missing\n.*\n  fix: put it back; or say where it lies now: recall init WORKSPACE --base"
    ):
        teach(workspace, data, "a")
    fine_tuned(tmp_path / "moved", tmp_path / "other", seed=3)
    for base in (tmp_path / "other", tmp_path / "gone"):
        with pytest.raises(RecallError):
            init(workspace, str(base))
    assert init(workspace, str(tmp_path / "moved")).base.path == str(tmp_path / "moved")
    assert teach(workspace, data, "a").stage.id == 1


def test_scores_are_not_lost_with_the_card(ws, data, llama, monkeypatch):
    from recall_merge.evaluation import evaluate as module

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "add_scores", full)
    arguments = ["evaluate", str(ws), "--tasks", str(data / "a-test.jsonl"), "--card"]
    done = recall(*arguments)
    assert "a-test" in done.output and "acc" in done.output
    assert isinstance(done.exception, module.CardError)
    [score] = done.exception.scores
    [fault] = done.exception.faults
    assert fault.what == "the scores cannot be added to the model card: [Errno 28] No space left on device"
    assert fault.fix == f"they are: a-test acc {score.score:.4f}"
    done = recall(*arguments, "--json")
    assert json.loads(done.stdout)["scores"][0]["score"] == score.score


# ---- damage


@pytest.mark.parametrize("line", ["5", "[]", "null", '"x"', '{"stage": 2}', "[" * 100_000, '{"event": "rollback", "was": [1]}'])
def test_a_damaged_line_of_the_journal_is_passed_over(ws, line):
    state = read_sealed(ws / "workspace.json")
    last = state["stages"][-1]
    spec = {key: last[key] for key in ("task", "train", "start", "given", "unseen", "overrides")}
    state["unfinished"] = spec | {"id": len(state["stages"]) + 1, "parent": state["head"]}
    (ws / "workspace.json").write_text(sealed(state))
    with (ws / "journal.jsonl").open("a") as file:
        file.write(line.replace("2", str(state["unfinished"]["id"])) + "\n")
    assert status(ws).unfinished[1] == "begin"
    for words in (["status", ws], ["status", ws, "--json"]):
        assert recall(*words).exit_code == 0


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e308])
def test_scores_that_cannot_be_are_not_shown(ws, number):
    state = read_sealed(ws / "workspace.json")
    task = next(iter(state["stages"][-1]["scores"]["merged"]))
    state["stages"][-1]["scores"]["merged"][task] = number
    (ws / "workspace.json").write_text(sealed(state))
    assert recall("status", ws).exit_code == 0
    shown = json.loads(recall("status", ws, "--json").output, parse_constant=pytest.fail)
    assert None in shown["branches"][0]["R"][-1]


@pytest.mark.parametrize(
    "change", [{"score": float("nan")}, {"score": 1e308}, {"score": None}, {"items": None}, {"items": [{}]}, {"n": "x"}]
)
def test_a_report_names_damaged_scores(ws, change):
    file = ws / read_sealed(ws / "workspace.json")["stages"][-1]["scores"]["file"]
    scores = read_sealed(file)
    next(iter(scores["scores"]["merged"].values())).update(change)
    file.write_text(sealed(scores))
    with pytest.raises(WorkspaceError, match=r"the scores of stage \d are damaged"):
        make_page(ws, text=False, cache=ws, progress=Silent())
