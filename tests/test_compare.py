"""Several merges of the same experts on validation rows: halving, paired differences, and what is kept."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from recall_merge import compare, merge
from recall_merge.bench import compare as module
from recall_merge.bench.compare import rounds
from recall_merge.cli.app import app
from recall_merge.evaluation.evaluate import evaluate
from recall_merge.runtime.errors import RecallError
from tiny import load_tensors, lora, write_rows

ANSWERS = [" yes", " no", " over"]


def rows(first, count):
    prompts = (f"the {word} fox {number} jumps" for number in range(first, first + count) for word in ("quick", "brown"))
    return [{"prompt": prompt, "completion": ANSWERS[number % 3], "choices": ANSWERS} for number, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def world(bases, tmp_path_factory):
    """Base, two experts that differ much, rows of the newest and validation rows."""
    folder, base = tmp_path_factory.mktemp("compare"), bases("llama")
    experts = [{"name": name, "path": str(lora(base, folder / name, seed=seed, r=4))} for seed, name in enumerate("ab")]
    write_rows(folder / "samples.jsonl", rows(0, 6))
    write_rows(folder / "valid.jsonl", rows(100, 40))
    return folder, {"base": str(base), "experts": experts}


def test_finalists_are_scored_on_all_rows_and_the_rest_leave_early(world):
    folder, run = world
    found = compare(run, [f"v={folder / 'valid.jsonl'}"], methods=["linear", "ties", "tsv"], grid={"scale": [0.5, 1.0, 3.0]})
    assert {each.name for each in found.candidates} == {f"{m}, scale {s}" for m in ("linear", "ties", "tsv") for s in (0.5, 1.0, 3.0)}
    assert [each.rows for each in found.candidates] == [80, 80, 20] + [8] * 6
    assert found.finalists == 2 and found.chosen in found.candidates[:2]
    best, second = found.candidates[:2]
    assert best.score >= second.score and all(each.score == each.scores["v"] for each in found.candidates)
    behind = found.behind(second)
    pairs = [second.items["v"][row] - best.items["v"][row] for row in best.items["v"]]
    assert behind.estimate == pytest.approx(np.mean(pairs)) and behind.low <= behind.estimate <= behind.high
    assert found.behind(best) == (0.0, 0.0, 0.0)


def test_what_is_kept_is_what_was_scored(world, tmp_path):
    folder, run = world
    found = compare({**run, "out": {"path": str(tmp_path / "kept")}}, [f"v={folder / 'valid.jsonl'}"], methods=["linear", "null_space"])
    assert not (tmp_path / "kept").exists()
    merge(found.chosen.plan.run)
    (score,) = evaluate(str(tmp_path / "kept"), [f"v={folder / 'valid.jsonl'}"])
    assert {item.id: item.score for item in score.items} == found.chosen.items["v"]
    assert score.score == pytest.approx(found.chosen.score)
    merge({**run, "method": found.chosen.plan.name, "out": {"path": str(tmp_path / "plain")}})
    for name, tensor in load_tensors(tmp_path / "plain").items():
        assert torch.equal(tensor, load_tensors(tmp_path / "kept")[name])


def test_of_level_candidates_the_simplest_is_kept(world):
    """Two experts at scale 0 are the base, whatever merges them."""
    folder, run = world
    found = compare(run, [f"v={folder / 'valid.jsonl'}"], methods=["tsv", "linear"], grid={"scale": [0.0]})
    assert [each.name for each in found.candidates] == ["tsv, scale 0.0", "linear, scale 0.0"]  # equal: as they came
    assert found.is_level(found.candidates[1]) and found.chosen.name == "linear, scale 0.0"


def test_hidden_states_are_compared_once_for_all_temperatures(world, monkeypatch):
    folder, run = world
    calls, compute = [], module.compute_weights
    monkeypatch.setattr(module, "compute_weights", lambda plan, *rest: calls.append(plan.name) or compute(plan, *rest))
    samples = {"samples": {"path": str(folder / "samples.jsonl"), "count": 4}}
    found = compare(run | samples, [f"v={folder / 'valid.jsonl'}"], methods=["recall"], grid={"temperature": [0.01, 1.0]})
    assert calls == ["recall"] and len(found.candidates) == 2
    for candidate in found.candidates:
        weights = compute(candidate.plan).weights
        torch.testing.assert_close(module._Weights(module.Silent()).of(candidate.plan).weights, weights)
    assert found.candidates[0].items != found.candidates[1].items or found.is_level(found.candidates[1])


def test_without_methods_all_that_fit_are_tried(world):
    folder, run = world
    names = {each.name for each in compare(run, [f"v={folder / 'valid.jsonl'}"], limit=8).candidates}
    assert names == {"linear", "ties", "tsv", "null_space"}
    samples = {"samples": {"path": str(folder / "samples.jsonl"), "count": 4}}
    names = {each.name for each in compare({**run, **samples, "method": "magmax"}, [f"v={folder / 'valid.jsonl'}"], limit=8).candidates}
    assert names == {"linear", "ties", "tsv", "null_space", "recall", "magmax"}


def test_all_faults_come_before_any_work(world, tmp_path, monkeypatch):
    folder, run = world
    monkeypatch.setattr(module, "score_tasks", lambda *_, **__: pytest.fail("work began"))
    shared = write_rows(tmp_path / "shared.jsonl", rows(0, 3) + rows(200, 1))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("mine")
    samples = {"samples": {"path": str(folder / "samples.jsonl")}, "out": {"path": str(tmp_path / "taken")}}
    with pytest.raises(RecallError) as error:
        compare(
            run | samples,
            [f"v={shared}", "hellaswag"],
            methods=["tvs", "linear"],
            grid={"sclae": [1], "scale": ["big"]},
            metrics={"w": "acc"},
        )
    told = str(error.value)
    for words in (
        "no method 'tvs'",
        "did you mean 'tsv'",
        "has an option 'sclae'",
        "did you mean 'scale'",
        "6 of the 8 validation rows of 'v'",
        "no file of rows",
        "none of the tasks",
    ):
        assert words in told, words
    with pytest.raises(RecallError, match="'scale' has no values to try"):
        compare(run, [f"v={folder / 'valid.jsonl'}"], methods=["linear"], grid={"scale": []})
    with pytest.raises(RecallError, match="scale"):
        compare(run, [f"v={folder / 'valid.jsonl'}"], methods=["linear"], grid={"scale": ["big"]})
    with pytest.raises(RecallError, match="taken"):
        compare(run | samples, [f"v={folder / 'valid.jsonl'}"], methods=["linear"])


def test_rounds_grow_and_end_with_all_rows():
    for count in range(1, 40):
        for size in (1, 5, 8, 30, 1000):
            found = [*rounds(count, size)]
            assert found[0][0] == count and found[-1][1] == 1.0
            assert [share for _, share in found] == sorted({share for _, share in found})
            assert sum(number * (share - before) for (number, share), (_, before) in zip(found, [(0, 0.0), *found], strict=False)) <= count


def run_command(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_prints_a_table_and_writes_the_best(world, tmp_path):
    folder, run = world
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    words = (
        "compare",
        tmp_path / "run.yaml",
        "--tasks",
        f"v={folder / 'valid.jsonl'}",
        "--methods",
        "linear,tsv",
        "--set-grid",
        "scale=0,1",
    )
    shown = run_command(*words, "--out", tmp_path / "best")
    assert shown.exit_code == 0, shown.output
    assert "left early" in shown.output and "kept: " in shown.output and (tmp_path / "best" / "record.json").is_file()
    data = json.loads(run_command(*words, "--json").stdout)
    assert data["path"] is None and data["chosen"] in {each["name"] for each in data["candidates"]} and len(data["candidates"]) == 4
    assert data["candidates"][0]["behind"] == {"estimate": 0.0, "low": 0.0, "high": 0.0}
    record = json.loads((Path(tmp_path) / "best" / "record.json").read_text())
    assert data["chosen"].startswith(record["method"]["name"])
