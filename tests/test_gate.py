"""Conditions on scores: how they are read, how they are decided, and what a command and a workspace do when one fails."""

import json
import math

import pytest
from typer.testing import CliRunner

from recall_merge.cli.app import app
from recall_merge.continual.workspace import rollback, status
from recall_merge.evaluation.gate import Condition, decide, read_conditions
from recall_merge.runtime.errors import RecallError, RunError
from tiny import write_rows
from workspaces import make_workspace, teach, tree, write_tasks

TASKS = ["french", "desk"]


def score(*items):
    known = [item for item in items if item is not None]
    return {"score": sum(known) / len(known), "items": [{"id": number, "score": item} for number, item in enumerate(items)]}


def test_a_sign_makes_a_bound_one_of_a_change():
    found = read_conditions(["french>=0.6", " all >= -0.02", "desk>=+.1"], TASKS, where="--keep-if", before=TASKS)
    assert found == [Condition("french", 0.6, False), Condition("all", -0.02, True), Condition("desk", 0.1, True)]
    assert [*map(str, found)] == ["french>=0.6", "all>=-0.02", "desk>=+0.1"]
    assert read_conditions(["french>=0.6", "french>=0.60"], TASKS, where="") == [Condition("french", 0.6, False)]


@pytest.mark.parametrize(
    ("words", "before", "what", "fix"),
    [
        (["french>0.6"], None, "no condition", "TASK>=0.6"),
        (["french>=much"], None, "no condition", "TASK>=0.6"),
        (["frnch>=0.6"], None, "no such task", "did you mean 'french'"),
        (["french>=60"], None, "between -1 and 1", "0.6 for 60 %"),
        (["french>=-0.1"], None, "no model before", "without a sign"),
        (["french>=-0.1"], ["desk"], "not scored on this task", "without a sign"),
        (["french>=0.6", "french>=0.7"], None, "french>=0.6 and french>=0.7 are two bounds", "keep one"),
    ],
)
def test_conditions_that_cannot_be_decided_are_refused(words, before, what, fix):
    with pytest.raises(RunError) as error:
        read_conditions(words, TASKS, where="--require", before=before)
    (fault,) = error.value.faults
    assert what in fault.what and fix in fault.fix and fault.where == "--require"


def test_all_faults_come_at_once():
    with pytest.raises(RunError) as error:
        read_conditions(["what", "frnch>=2", "all>=0.1"], [*TASKS, "all"], where="")
    assert len(error.value.faults) == 4


def test_the_score_decides_and_the_interval_says_how_surely():
    now, before = {"french": score(1, 1, 0, 0), "desk": score(*[1.0] * 40)}, {"french": score(1, 1, 1, 0)}
    held, lost, all_held, kept = decide(
        [Condition("french", 0.5, False), Condition("french", -0.2, True), Condition("all", 0.4, False)], now, before
    )
    assert held.holds and held.value == 0.5 and 0 <= held.low < 0.5 < held.high <= 1
    assert not lost.holds and lost.value == -0.25 and lost.low < -0.25 < lost.high == 0.0  # pairs: nothing was won
    assert all_held.task == "french" and kept.task == "desk" and (kept.low, kept.high) == (1.0, 1.0)
    assert lost.words == "french -0.250 is below -0.2 [-0.750, 0.000], within the error over test items"
    assert kept.words == "desk 1.000 >= 0.4 [1.000, 1.000]"


def test_a_change_of_all_is_of_what_both_are_scored_on():
    now, before = {"french": score(1, 1), "desk": score(0, 0)}, {"french": score(1, 0)}
    assert [each.task for each in decide([Condition("all", -0.02, True)], now, before)] == ["french"]


def test_items_without_scores_have_no_interval():
    (decision,) = decide([Condition("french", 0.6, False)], {"french": {"score": 0.5, "items": [{"id": 0, "score": None}] * 3}}, {})
    assert math.isnan(decision.low) and decision.words == "french 0.500 is below 0.6"


# --- evaluate -------------------------------------------------------------------------------------------------------------------------


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_evaluate_leaves_with_status_3_where_a_score_is_too_low(llama, tmp_path):
    rows = [{"prompt": f"is it {i}?", "completion": "y" if i % 2 else "n", "choices": ["y", "n"]} for i in range(6)]
    file = write_rows(tmp_path / "t.jsonl", rows)
    good = run("evaluate", llama, "--tasks", f"t={file}", "--require", "t>=0", "--require", "all>=0.0")
    assert good.exit_code == 0 and "holds: t 0." in good.output
    bad = run("evaluate", llama, "--tasks", f"t={file}", "--require", "t>=1.0", "--json")
    assert bad.exit_code == 3
    (decision,) = json.loads(bad.stdout)["conditions"]
    assert decision["holds"] is False and decision["low"] <= decision["value"] <= decision["high"]
    with pytest.raises(RecallError) as error:
        raise run("evaluate", llama, "--tasks", f"t={file},u=none.jsonl", "--require", "s>=1").exception
    assert "no such task" in str(error.value) and "none.jsonl" in str(error.value)


# --- learn ----------------------------------------------------------------------------------------------------------------------------


def test_a_stage_that_fails_a_condition_is_kept_aside(llama, tmp_path):
    data, space = write_tasks(tmp_path), tmp_path / "ws"
    make_workspace(space, llama, method="linear")
    assert teach(space, data, "a", keep_if=["a>=0", "all>=-1.0"]).stage.refused == ()
    learned = teach(space, data, "b", keep_if=["all>=-1.0", "b>=1"])
    assert learned.state.head == 1 and learned.stage.id == 2 and (space / "merges" / "2").is_dir()
    (refused,) = learned.stage.refused
    assert refused.startswith("b 0.") and "is below 1" in refused
    assert [(decision.task, decision.holds) for decision in learned.decisions] == [("a", True), ("b", True), ("b", False)]
    assert status(space).state.stages[1].refused == (refused,)
    shown = run("status", space).output
    assert f"not kept: {refused}" in shown
    third = teach(space, data, "c")  # goes on from the first
    assert third.stage.parent == 1 and {*third.stage.scores.merged} == {"a", "c"}
    assert rollback(space, 2).head == 2  # nevertheless


def test_learn_tells_what_failed_and_leaves_with_status_3(llama, tmp_path):
    data, space = write_tasks(tmp_path), tmp_path / "ws"
    make_workspace(space, llama, method="linear")
    words = ("learn", space, "--task", "a", "--train", data / "a-train.jsonl", "--test", data / "a-test.jsonl", "--keep-if")
    found = run(*words, "a>=1")
    assert found.exit_code == 3
    assert "fails: a 0." in found.output and "was not kept: the model is still" in found.output and "--to 1" in found.output


def test_conditions_are_checked_before_any_work(llama, tmp_path):
    data, space = write_tasks(tmp_path), tmp_path / "ws"
    make_workspace(space, llama, method="linear")
    before = tree(space)
    with pytest.raises(RecallError) as error:
        teach(space, data, "a", keep_if=["b>=0.5", "a>=0.5", "a>=0.6"])
    assert len(error.value.faults) == 2 and tree(space) == before
