"""The leaderboard: its order, its intervals, and that what is committed is what its tables say."""

from __future__ import annotations

import pytest
from pandas import DataFrame
from scipy.stats import ttest_rel

from benchmarks.leaderboard import BEGIN, END, FIRST, KEPT, PAGE, README, SCENARIO, forgetting, gains_kept, leaderboard, paired, with_table
from recall_merge.bench.results import NUMBERS, SCORES, Results, read_results
from recall_merge.bench.scenario import Scenario, load_scenario

TASKS = ("a", "b", "c")
AP = {"good": (0.7, 0.6), "better": (0.8, 0.7), "all at once": (0.9, 0.9), "own": (0.85, 0.6)}


def results() -> Results:
    scores, numbers = [], []
    for method, trials in AP.items():
        for seed, ap in enumerate(trials):
            order = TASKS if seed == 0 else TASKS[::-1]
            trial = {"kind": "multi-model", "method": method, "seed": seed, "order": " > ".join(order)}
            numbers.append(trial | {"average_performance": ap, "retention": ap, "stage_seconds": 60.0, "peak_bytes": 2e9})
            for stage in range(4):
                for number, task in enumerate(order):
                    at = {"stage": stage, "learnt": order[stage - 1] if stage else "", "task": task, "seen": number < stage}
                    score = ap + (0.1, 0.0, -0.1)[TASKS.index(task)] if stage else 0.1
                    scores.append(trial | at | {"metric": "acc", "score": score, "stderr": 0.0, "n": 9})
    return Results(KEPT, DataFrame(scores).reindex(columns=list(SCORES)), DataFrame(numbers).reindex(columns=list(NUMBERS)))


def scenario() -> Scenario:
    tasks = [{"name": name, "train": f"{name}.jsonl", "test": f"{name}.jsonl"} for name in TASKS]
    methods = [
        {"method": "sequential", "name": "good"},
        {"method": "protected", "name": "better"},
        {"method": "joint", "name": "all at once"},
        {"method": "experts", "name": "own"},
    ]
    return Scenario.model_validate({"model": "base", "tasks": tasks, "methods": methods})


def test_the_best_stands_first_and_differences_are_paired() -> None:
    table = leaderboard(results(), scenario()).splitlines()
    first = ["| *all at once: keeps all rows*", "| better", "| *own: as many models as tasks*", "| good"]
    assert [line.split(" | ")[0] for line in table[2:6]] == first
    cells = table[5].split(" | ")
    assert cells[2:4] == ["0.650 ± 0.071", "-0.100 [-0.100, -0.100]"] and cells[6] == "0.650 ± 0.071"
    assert cells[4:6] == ["0.900 ± 0.141", "0.800"]  # .6 of .75, and .5 of .5
    assert "60 s | 2.0 GB" in table[5] and table[3].split(" | ")[3] == ""
    assert sum("--only" in line for line in table) == 4
    assert len(leaderboard(results(), scenario(), rows=1).splitlines()) == 5  # head, rule, the first, and the references


def test_gains_kept_are_of_all_tasks_together() -> None:
    assert gains_kept(results(), "better", "own") == pytest.approx([0.7 / 0.75, 0.6 / 0.5])
    assert gains_kept(results(), "own", "own") == pytest.approx([1.0, 1.0])


def test_an_interval_is_students() -> None:
    ours, theirs = [0.5, 0.9, 0.7, 0.65], [0.4, 0.6, 0.75, 0.5]
    bounds = ttest_rel(ours, theirs).confidence_interval(0.95)
    assert paired(ours, theirs)[1:] == pytest.approx((bounds.low, bounds.high, 4), abs=1e-3)
    assert str(paired([0.5], [0.4])) == "+0.100"


def test_the_picture_shows_each_task_from_the_stage_that_learns_it() -> None:
    upper, _ = forgetting(results(), ("good", "better")).to_dict()["vconcat"]
    assert "0.700" in upper["title"]
    points = forgetting(results(), ("good",)).to_dict()["data"]["values"]
    assert sorted((row["at"], row["task"]) for row in points) == [(0, "a"), (1, "a"), (1, "b"), (2, "a"), (2, "b"), (2, "c")]


def test_what_is_committed_is_what_its_tables_say() -> None:
    kept, stream = read_results(KEPT), load_scenario(SCENARIO)
    for page, rows in ((PAGE, None), (README, FIRST)):
        text = page.read_text("utf-8")
        assert text.count(BEGIN) == text.count(END) == 1
        assert text == with_table(text, leaderboard(kept, stream, rows)), "make leaderboard"
