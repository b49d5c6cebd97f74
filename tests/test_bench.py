"""The bench on tiny models: what it runs, what it shares, what a stop leaves, and its baselines by hand."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from recall_merge.bench import run_job
from recall_merge.bench.bench import bench, make_agenda, seconds_left, store_of, write_results
from recall_merge.bench.design import make_design
from recall_merge.bench.jobs import Base, Merged, Scores, Store, Trained, hash_rows
from recall_merge.bench.results import NUMBERS, SCORES, MethodResults, Results, Spread, read_results
from recall_merge.bench.scenario import Scenario, load_scenario, narrowed
from recall_merge.files.rows import parse_rows, read_rows
from recall_merge.runtime.errors import RecallError, RunError
from recall_merge.training.ewc import Anchor, Consolidation, Pull, anchored, fisher
from tiny import write_rows

WORDS = ("the", "no")  # a token each


def questions(right: str, count: int, place: str = "") -> list[dict[str, Any]]:
    """Rows with two choices, of which one is always right."""
    choices = [f" {word}" for word in WORDS]
    return [{"prompt": f"{number}{place} the or no?", "completion": f" {right}", "choices": choices} for number in range(count)]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks that ask the same and want the opposite, so that learning one is forgetting the other; and one that is not learnt."""
    folder = tmp_path_factory.mktemp("bench-data")
    for name, right in {"films": "the", "dogs": "no"}.items():
        write_rows(folder / f"{name}-train.jsonl", questions(right, 8))
        write_rows(folder / f"{name}-test.jsonl", questions(right, 6))
    write_rows(folder / "quick-test.jsonl", [*questions("the", 2, " quick"), *questions("no", 4, " lazy")])
    return folder


def two_tasks(llama: Path, data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """A scenario of two tasks, as YAML would give it."""
    return {
        "model": str(llama),
        "data": str(data),
        "tasks": [{"name": name, "train": f"{name}-train.jsonl", "test": f"{name}-test.jsonl"} for name in ("films", "dogs")],
        "unseen": [{"name": "quick", "test": "quick-test.jsonl"}],
        "orders": {"count": 2},
        "methods": ["experts", "linear"],
        "training": {"rank": 4, "alpha": 8, "epochs": 4, "batch_size": 4, "learning_rate": 0.03},
        "samples": {"count": 3},
        "out": str(out),
    } | changes


ALL = [
    "experts",
    {"method": "linear", "name": "uniform"},
    "recall",
    "sequential",
    {"method": "ewc", "options": {"strength": 10.0, "rows": 3}},
    {"method": "replay", "options": {"share": 0.25}},
    "joint",
]


@pytest.fixture(scope="session")
def finished(llama: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Scenario, Results]:
    """A bench with every baseline, run once without a stop."""
    torch.set_num_threads(1)
    scenario = Scenario.model_validate(two_tasks(llama, data, tmp_path_factory.mktemp("bench") / "out", methods=ALL))
    return scenario, bench(scenario, command="recall bench two.yaml")


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_arguments_that_a_scenario_brings_need_a_word_from_the_keyboard(llama, data, tmp_path):
    """Of the training that all share, even where every method has arguments of its own."""
    own = [{"method": "sequential", "training": {"arguments": {"max_steps": 1}}}]
    wanted = two_tasks(llama, data, tmp_path / "out", methods=own)
    wanted["training"] = wanted["training"] | {"arguments": {"report_to": "wandb"}}
    scenario = Scenario.model_validate(wanted)
    with pytest.raises(RunError, match="--allow-argument report_to"):
        bench(scenario)
    assert not (tmp_path / "out").exists()
    assert make_design(scenario, ["report_to"]).trials


def test_statistics_are_taken_once_with_gradients_where_any_method_takes_them(llama: Path, data: Path, tmp_path: Path) -> None:
    def statistics(*methods: str) -> set[Any]:
        scenario = Scenario.model_validate(two_tasks(llama, data, tmp_path / "out", methods=list(methods)))
        merges = [scores.model for trial in make_design(scenario).trials for scores in trial.scores.values()]
        return {(job.key, job.gradients) for merge in merges if isinstance(merge, Merged) for _, job in merge.statistics}

    plain, both = statistics("aligned"), statistics("aligned", "fisher")
    assert {gradients for _, gradients in plain} == {False}
    assert {gradients for _, gradients in both} == {True}
    assert len(plain) == len(both) == len(plain | both) / 2 == 2


def test_every_method_has_its_trials_and_numbers(finished: tuple[Scenario, Results]) -> None:
    _, results = finished
    assert not results.unfinished
    trials = {row.method: row.trials for row in results.methods}
    assert trials == {"experts": 1, "uniform": 2, "recall": 2, "sequential": 2, "ewc": 2, "replay": 2, "joint": 1}
    for row in results.methods:
        staged = row.method not in {"experts", "joint"}
        assert 0 <= row.numbers["average_performance"].mean <= 1
        assert math.isnan(row.numbers["backward_transfer"].mean) != staged
        assert math.isnan(row.numbers["average_performance"].deviation) != staged  # one trial has no spread
        assert math.isnan(row.numbers["unseen_delta"].mean) == (row.method == "experts")
        assert set(row.final) == ({"films", "dogs"} if row.method == "experts" else {"films", "dogs", "quick"})


def test_one_task_after_another_forgets_and_an_expert_does_not(finished: tuple[Scenario, Results]) -> None:
    _, results = finished
    assert results.experts == {"films": 1.0, "dogs": 1.0}
    for trial in (trial for trial in results.matrices() if trial["method"] == "sequential"):
        assert trial["R"][1][0] == trial["R"][2][1] == 1  # each task just after it was learnt
        assert trial["R"][2][0] == 0
    assert set(results.numbers["backward_transfer"][results.numbers["method"] == "sequential"]) == {-1}
    mean = {row.method: row.numbers["average_performance"].mean for row in results.methods}
    assert mean["experts"] == 1 and mean["sequential"] == 0.5  # no single model can have both


def test_experts_are_trained_once_for_all_orders_and_methods(finished: tuple[Scenario, Results]) -> None:
    scenario, _ = finished
    kinds = Counter(note["kind"] for note in store_of(scenario).notes())
    # two experts; the second stage of sequential, ewc and replay in two orders; joint. Their first stages are the experts
    assert kinds["trained"] == 2 + 3 * 2 + 1
    assert kinds["anchor"] == 2


def test_an_order_does_not_matter_to_a_plain_average(finished: tuple[Scenario, Results]) -> None:
    scenario, results = finished
    first, second = (trial for trial in results.matrices() if trial["method"] == "uniform")
    assert first["order"] == second["order"][::-1]
    assert first["R"][-1] == second["R"][-1][::-1]
    trials = [trial for trial in make_design(scenario).trials if trial.method == "uniform"]
    assert len({trial.jobs[-1].key for trial in trials}) == 1  # one job, so one merge


def test_tables_and_page_say_the_same(finished: tuple[Scenario, Results]) -> None:
    from pyarrow import parquet

    scenario, results = finished
    rows = read_csv(results.folder / "scores.csv")
    assert parquet.read_table(results.folder / "scores.parquet").num_rows == len(rows) == len(results.scores)
    # films > dogs, uniform: base on three tasks, the expert on one, the merge on three
    assert sum(row["method"] == "uniform" and row["order"] == "films > dogs" for row in rows) == 3 + 1 + 3
    matrices = json.loads((results.folder / "R.json").read_text("utf-8"))
    uniform = next(matrix for matrix in matrices if matrix["method"] == "uniform")
    assert uniform["stages"] == ["base", "films", "dogs"] and len(uniform["R"]) == 3
    assert uniform["R"][1][1] is None  # dogs were not learnt yet
    final = float(next(row["score"] for row in rows if (row["method"], row["stage"], row["task"]) == ("uniform", "2", "films")))
    assert uniform["R"][2][0] == pytest.approx(final, abs=1e-6)
    page = (results.folder / "summary.md").read_text("utf-8")
    assert "recall bench two.yaml" in page and "not data-free" in page and "divided by T - 1" in page
    assert str(results.folder) not in page and scenario.model not in page  # no paths of a machine
    for picture in ("numbers.png", "R.png"):
        assert (results.folder / picture).read_bytes().startswith(b"\x89PNG")


def test_a_bench_that_was_stopped_ends_with_the_same_table(
    finished: tuple[Scenario, Results], llama: Path, data: Path, tmp_path: Path
) -> None:
    _, whole = finished
    scenario = Scenario.model_validate(two_tasks(llama, data, tmp_path / "out", methods=ALL))

    def stop(done: Any) -> None:
        if done.number == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(scenario, listener=stop)
    store = store_of(scenario)
    partly = write_results(make_design(scenario), store)
    assert partly.unfinished and 0 < len(partly.numbers) < len(whole.numbers)
    before = len(store.notes())
    heard: list[Any] = []
    bench(scenario, listener=heard.append)
    assert len(heard) == len(store.notes()) - before  # nothing is done twice
    assert heard[-1].number == heard[-1].total and heard[-1].seconds_left == 0
    assert (tmp_path / "out" / "scores.csv").read_bytes() == (whole.folder / "scores.csv").read_bytes()
    bench(scenario, listener=heard.append)
    assert len(heard) == len(store.notes()) - before  # and a third time there is nothing to do


def test_a_stop_after_the_last_score_of_a_job_and_before_its_note(llama: Path, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    changes = {"methods": ["linear"], "orders": [["films", "dogs"]], "scoring": {"stages": "last"}}
    scenario = Scenario.model_validate(two_tasks(llama, data, tmp_path / "out", **changes))
    write = Store.write

    def broken(store: Store, kind: str, key: str, content: Any) -> None:
        if kind == "notes" and content["kind"] == "scores":
            raise OSError(5, "Input/output error")
        write(store, kind, key, content)

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(Store, "write", broken)
        bench(scenario)
    store = store_of(scenario)
    for left in (store.folder / "scores" / "1.json.0123abcd.partial", tmp_path / "out" / "R.json.0123abcd.partial"):
        left.touch()  # as by a kill in the middle of a write
    bench(scenario)
    jobs = make_agenda(make_design(scenario), store).jobs
    assert sorted(note["label"] for note in store.notes()) == sorted(job.label for job in jobs)
    assert not [*(tmp_path / "out").rglob("*.partial")]


def test_scores_of_a_base_that_changed_meanwhile_are_not_kept(llama: Path, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    base = shutil.copytree(llama, tmp_path / "base")
    changes = {"methods": ["linear"], "orders": [["films", "dogs"]], "scoring": {"stages": "last"}}
    scenario = Scenario.model_validate(two_tasks(base, data, tmp_path / "out", **changes))
    file, load = base / "model.safetensors", run_job.load_model
    whole = file.read_bytes()

    def changed(folder: Path, *given: Any, **options: Any) -> Any:
        file.write_bytes(whole[:-64] + bytes(64))
        return load(folder, *given, **options)

    with monkeypatch.context() as patch, pytest.raises(RecallError, match="the base has changed since the bench began"):
        patch.setattr(run_job, "load_model", changed)
        bench(scenario)
    file.write_bytes(whole)
    assert not [*store_of(scenario).folder.glob("scores/*")]


def test_a_method_that_is_added_uses_what_is_there(finished: tuple[Scenario, Results]) -> None:
    scenario, _ = finished
    more = Scenario.model_validate(scenario.model_dump(exclude_unset=True) | {"methods": ["ties"]})
    agenda = make_agenda(make_design(more), store_of(more))
    assert [type(job).__name__ for job in agenda.left] == ["Scores"]  # both orders end in the same merge
    assert seconds_left(agenda.left, store_of(more), workers=1) > 0


def models(scenario: Scenario, method: str) -> list[Any]:
    """The models of a method's first trial, stage by stage, without the base."""
    trial = next(trial for trial in make_design(scenario).trials if trial.method == method)
    return [job.model for job in trial.jobs[1:]]


def test_replay_mixes_in_a_share_and_joint_takes_all(finished: tuple[Scenario, Results]) -> None:
    scenario, _ = finished
    first, second = models(scenario, "replay")
    assert (len(first.rows), len(second.rows)) == (8, 8 + 2)  # a quarter of the eight rows of the task before
    assert [row.completion for row in second.rows] == [" no"] * 8 + [" the"] * 2
    (joint,) = models(scenario, "joint")
    assert len(joint.rows) == 16 and len({row.index for row in joint.rows}) == 16
    assert joint.start is None and second.start is not None


def test_a_key_knows_what_a_job_depends_on_and_nothing_else(finished: tuple[Scenario, Results]) -> None:
    scenario, _ = finished
    one, two = models(scenario, "sequential")
    again = Trained("another name", one.base, one.rows, one.settings)
    assert again.key == one.key != two.key
    assert Trained("", one.base, one.rows[:-1], one.settings).key != one.key
    assert Trained("", one.base, one.rows, one.settings.model_copy(update={"seed": 1})).key != one.key
    assert Trained("", one.base, one.rows, one.settings, start=one).key != one.key


@pytest.mark.parametrize("start", ["base", "merge"])
def test_sequential_and_single_model_scenarios(start: str, llama: Path, data: Path, tmp_path: Path) -> None:
    changes = {"kinds": ["sequential", "single-model"], "methods": ["experts", "linear"], "orders": [["films", "dogs"]]}
    scenario = Scenario.model_validate(two_tasks(llama, data, tmp_path / "out", sequential={"start": start}, **changes))
    results = bench(scenario)
    assert not results.unfinished
    found = {(row.kind, row.method): row for row in results.methods}
    assert set(found) == {(kind, method) for kind in ("sequential", "single-model") for method in ("experts", "linear")}
    assert not math.isnan(found["sequential", "linear"].numbers["backward_transfer"].mean)
    alone = found["single-model", "linear"]
    assert alone.trials == 2 and not math.isnan(alone.numbers["unseen_delta"].mean)
    # an average of a single expert is that expert
    assert alone.numbers["average_performance"] == found["single-model", "experts"].numbers["average_performance"]
    trained = Counter(note["kind"] for note in store_of(scenario).notes())["trained"]
    assert trained == (2 if start == "base" else 3)  # from the last merge, the second expert is another


def test_scores_before_learning_give_forward_transfer(llama: Path, data: Path, tmp_path: Path) -> None:
    changes = {"methods": ["linear"], "orders": [["films", "dogs"]], "scoring": {"unlearnt": True}}
    (row,) = bench(Scenario.model_validate(two_tasks(llama, data, tmp_path / "out", **changes))).methods
    assert not math.isnan(row.numbers["forward_transfer"].mean)


def test_fisher_is_the_mean_of_squared_gradients() -> None:
    class Line(nn.Module):
        """Loss w * (sum of the ids), so its gradient is that sum."""

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([2.0]))

        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            return SimpleNamespace(loss=(self.w * input_ids.sum()).sum())

    model, rows_done = Line(), []
    assert fisher(model, [([1, 2], [1, 2]), ([4], [4])], rows_done.append)["w"].item() == (3**2 + 4**2) / 2
    assert sum(rows_done) == 2 and model.w.grad is None


def penalty(anchor: Anchor, values: dict[str, torch.Tensor], strength: float) -> float:
    """lambda / 2 * sum A (theta - m)^2."""
    return strength / 2 * sum(float((pull.importance * (values[name] - pull.centre) ** 2).sum()) for name, pull in anchor.items())


def test_the_anchor_of_two_tasks_pulls_as_both_do() -> None:
    f, theta = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1.0, 5.0, 0.0])
    g, phi = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([-1.0, 6.0, 9.0])
    both = anchored({"w": g}, {"w": phi}, anchored({"w": f}, {"w": theta}))
    layer = nn.ParameterDict({"w": nn.Parameter(torch.tensor([2.0, 7.0, 4.0]))})
    Consolidation(both, strength=0.5).on_step_begin(None, None, None, model=layer)
    # .5 * (1 (2 - 1) + 3 (2 + 1)), nothing where nothing matters, .5 * 2 (4 - 0)
    assert layer["w"].grad is not None and layer["w"].grad.tolist() == [5.0, 0.0, 4.0]
    w = layer["w"].detach()
    separate = [penalty({"w": Pull(a, m)}, {"w": w}, 0.5) for a, m in ((f, theta), (g, phi))]
    moved = [penalty({"w": Pull(a, m)}, {"w": w + 1}, 0.5) for a, m in ((f, theta), (g, phi))]
    difference = penalty(both, {"w": w + 1}, 0.5) - penalty(both, {"w": w}, 0.5)
    assert difference == pytest.approx(sum(moved) - sum(separate))  # they differ by a constant


def test_a_strong_penalty_holds_the_weights(llama: Path, data: Path, tmp_path: Path) -> None:
    methods = ["sequential", {"method": "ewc", "options": {"strength": 1e9}}]
    changes = {"methods": methods, "orders": [["films", "dogs"]], "scoring": {"stages": "last"}, "unseen": []}
    scenario = Scenario.model_validate(two_tasks(llama, data, tmp_path / "out", **changes))
    bench(scenario)
    store = store_of(scenario)
    design = make_design(scenario)

    def moved(method: str) -> float:
        model = next(trial for trial in design.trials if trial.method == method).jobs[-1].model
        assert isinstance(model, Trained) and model.start is not None
        start, end = (load_file(store.path_of(one) / "adapter_model.safetensors") for one in (model.start, model))
        anchor = load_file(store.path_of(ewc.anchor))
        return sum(
            float((anchor[f"{name.replace('.weight', '.default.weight')}.importance"] * (end[name] - start[name]) ** 2).sum())
            for name in end
        )

    ewc: Any = next(trial for trial in design.trials if trial.method == "ewc").jobs[-1].model
    assert moved("ewc") < moved("sequential") / 2


@pytest.mark.parametrize("start", ["adapter", "last", "base"])
def test_a_protected_task_is_trained_with_the_statistics_of_all_before_it(llama: Path, data: Path, tmp_path: Path, start: str) -> None:
    protected = {"method": "protected", "options": {"start": start}, "training": {"protect": {"strength": 1e3, "base": 0}}}
    changes = {"methods": [protected, "aligned"], "orders": [["films", "dogs"]], "scoring": {"stages": "last"}, "unseen": []}
    scenario = Scenario.model_validate(two_tasks(llama, data, tmp_path / "out", **changes))
    bench(scenario)
    design, store = make_design(scenario), store_of(scenario)
    model: Any = next(trial for trial in design.trials if trial.method == "protected").jobs[-1].model
    newest = model.experts[-1][1] if start == "base" else model
    assert [task for task, _ in newest.earlier] == ["films"]
    assert [type(newest.base), newest.start is None] == [Merged if start == "last" else Base, start != "adapter"]
    record = json.loads((store.path_of(newest) / "record.json").read_text())
    assert [*record["protection"]["answers"]] == ["films"] and record["protection"]["strength"] == 1e3
    if start == "base":
        assert [name for name, _ in model.experts] == ["films", "dogs"] and model.run["method"] == "aligned"


def test_all_faults_of_a_scenario_file_are_reported_at_once(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(
        yaml.safe_dump({"modle": "x", "tasks": [{"name": "a"}], "methods": ["linear"], "orders": {"count": 0}, "workers": 0}), "utf-8"
    )
    with pytest.raises(RunError) as caught:
        load_scenario(file)
    words = str(caught.value)
    assert "did you mean 'model'?" in words
    for place in ("'model' is missing", "tasks.0.train", "tasks.0.test", "orders", "workers"):
        assert place in words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"orders": [["films"]]}, "an order names every task once"),
        ({"orders": {"count": 3}}, "2 tasks have only 2 orders"),
        ({"methods": ["linear", "linear"]}, "taken twice"),
        ({"training": {"template": False}}, "`template` is given once"),
        ({"unseen": [{"name": "films", "test": "films-test.jsonl"}]}, "films"),
        ({"unseen": [{"name": "films > dogs", "test": "films-test.jsonl"}]}, "not allowed: films > dogs"),  # ' > ' is for orders
    ],
)
def test_what_a_scenario_does_not_allow(changes: dict[str, Any], words: str, llama: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "scenario.yaml"
    file.write_text(yaml.safe_dump(two_tasks(llama, data, tmp_path / "out", **changes)), "utf-8")
    with pytest.raises(RunError, match=words):
        load_scenario(file)


def test_all_faults_of_methods_and_files_are_reported_before_any_work(llama: Path, data: Path, tmp_path: Path) -> None:
    methods = ["tiess", {"method": "linear", "options": {"scal": 2}}, {"method": "ewc", "options": {"strength": -1}}, "wise_ft"]
    tasks = [{"name": "films", "train": "none.jsonl", "test": "films-test.jsonl", "metric": "f2"}]
    tasks += [{"name": "dogs", "train": "dogs-train.jsonl", "test": "dogs-test.jsonl"}]
    changes = {"methods": methods, "tasks": tasks, "samples": {"cout": 3}}
    scenario = Scenario.model_validate(two_tasks(llama, data, tmp_path / "out", **changes))
    with pytest.raises(RecallError) as caught:
        bench(scenario)
    words = str(caught.value)
    for fault in ("did you mean 'ties'?", "no option 'scal'", "strength", "merges 1 experts", "no such file", "f2", "'cout'"):
        assert fault in words, fault
    assert not (tmp_path / "out").exists()


def test_rows_that_the_base_cannot_read_are_reported_before_any_work(llama: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    for kind in ("train", "test"):
        file = tmp_path / "data" / f"films-{kind}.jsonl"
        line = json.loads(file.read_text().splitlines()[0])
        file.write_text(file.read_text() + json.dumps(line | {"prompt": line["prompt"] + " very" * 60}) + "\n")
    with pytest.raises(RecallError) as caught:
        bench(Scenario.model_validate(two_tasks(llama, tmp_path / "data", tmp_path / "out")))
    words = str(caught.value)
    assert "1 of 9 training rows are longer than the 128 tokens that the model can read\n  where: task 'films', row 9" in words, words
    assert "1 of 7 rows of 'films' are longer than the 128 tokens that the model can read\n  where: task 'films', row 7" in words, words
    assert not (tmp_path / "out").exists()


def test_rows_are_kept_with_all_that_they_say(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    asked = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "is it?"}]
    records = [
        {"text": "the dog"},
        {"prompt": "is it?", "completion": " yes", "choices": [" yes", " no"]},
        {"prompt": asked, "completion": "yes", "choices": ["yes", "no"]},
        {"messages": [*asked, {"role": "assistant", "content": "yes", "reasoning_content": "sure"}]},
        {"messages": [*asked, call], "tools": [{"type": "function", "function": {"name": "f"}}]},
    ]
    rows = parse_rows(records, where="rows")
    assert read_rows(Store(tmp_path).keep_rows(rows)) == rows
    without = parse_rows([{**records[4], "tools": None}], where="rows")
    assert hash_rows(without) != hash_rows(rows[4:])


def test_one_bench_at_a_time(tmp_path: Path) -> None:
    with Store(tmp_path).locked(), pytest.raises(RecallError, match="the bench is in use by process"), Store(tmp_path).locked():
        pass


@pytest.mark.slow
def test_processes_give_the_same_table(finished: tuple[Scenario, Results], llama: Path, data: Path, tmp_path: Path) -> None:
    _, whole = finished
    bench(Scenario.model_validate(two_tasks(llama, data, tmp_path / "out", methods=ALL, workers=2)))
    assert (tmp_path / "out" / "scores.csv").read_bytes() == (whole.folder / "scores.csv").read_bytes()


def test_tables_are_read_back_as_they_were_written(finished: tuple[Scenario, Results], tmp_path: Path) -> None:
    _, whole = finished
    again = read_results(whole.folder)
    assert again.to_json()["methods"] == whole.to_json()["methods"] and again.matrices() == whole.matrices()
    odd = whole.scores.head(2).assign(method=["nan", "1"], task=["NA", "null"])
    Results(tmp_path, odd, whole.numbers).write()
    assert list(read_results(tmp_path).scores["method"]) == ["nan", "1"]
    assert list(read_results(tmp_path).scores["task"]) == ["NA", "null"]


def test_mean_and_spread_by_hand(tmp_path: Path) -> None:
    from pandas import DataFrame

    named = {"kind": "multi-model", "method": "tsv", "seed": 0}
    numbers = [
        named | {"order": "a > b", "average_performance": 0.5, "retention": 0.25, "backward_transfer": -0.5},
        named | {"order": "b > a", "average_performance": 0.75, "backward_transfer": -0.25},
    ]
    scores = [
        named | {"order": order, "stage": stage, "task": task, "seen": stage > 0, "score": score}
        for order, shift in (("a > b", 0.0), ("b > a", 0.5))
        for stage, task, score in ((0, "a", 0.125), (1, "a", 1.0), (2, "a", 0.25 + shift), (2, "b", 0.5))
    ]
    results = Results(tmp_path, DataFrame(scores).reindex(columns=list(SCORES)), DataFrame(numbers).reindex(columns=list(NUMBERS)))
    (row,) = results.methods
    assert isinstance(row, MethodResults) and row.trials == 2
    assert row.numbers["average_performance"] == Spread(0.625, pytest.approx(0.125 * 2**0.5), 2)
    assert row.numbers["retention"].mean == 0.25 and row.numbers["retention"].trials == 1  # of the trials that have it
    assert row.final["a"].mean == 0.5 and row.final["b"].mean == 0.5  # at the end, not after the first stage
    assert results.numbers_table("multi-model").head == ["method", "trials", "AP", "BWT", "retention"]
    assert list(map(str, results.numbers_table("multi-model").rows[0])) == ["tsv", "2", "0.625 ± 0.177", "-0.375 ± 0.177", "0.250"]
    assert [list(map(str, row)) for row in results.final_table("multi-model").rows] == [
        ["the base", "0.125", "-"],
        ["tsv", "0.500 ± 0.354", "0.500 ± 0.000"],
    ]


def test_scores_share_questions_between_trials(finished: tuple[Scenario, Results]) -> None:
    scenario, _ = finished
    design = make_design(scenario)
    base = {trial.jobs[0].key for trial in design.trials}
    assert len(base) == 1 and all(isinstance(job, Scores) for trial in design.trials for job in trial.jobs)


def test_the_command_plans_runs_and_prints(finished: tuple[Scenario, Results], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from recall_merge.cli.app import app

    scenario, _ = finished
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(json.loads(scenario.model_dump_json(exclude_unset=True))), "utf-8")
    planned = CliRunner().invoke(app, ["bench", str(file), "--plan", "--json"])
    assert json.loads(planned.stdout) == {"trials": 12, "jobs": 24, "left": {}, "seconds_left": 0}
    words = CliRunner().invoke(app, ["bench", str(file), "--plan", "--set", "methods=[ties]", "--set", "orders.count=1"])
    assert "left: scores 1" in " ".join(words.stdout.split()), words.output
    shown = CliRunner().invoke(app, ["bench", str(file), "--summary"])
    assert shown.exit_code == 0 and "sequential" in shown.stdout and "summary.md" in shown.stdout
    run = CliRunner().invoke(app, ["bench", str(file), "--json"])  # all is done already
    assert {row["method"] for row in json.loads(run.stdout)["methods"]} == {row.method for row in finished[1].methods}


def test_a_scenario_of_some_of_its_methods(llama: Path, data: Path, tmp_path: Path) -> None:
    whole = Scenario.model_validate(two_tasks(llama, data, tmp_path / "out", methods=["experts", "linear", "sequential"]))
    assert [entry.name for entry in narrowed(whole, ["sequential", "experts"]).methods] == ["experts", "sequential"]
    assert narrowed(whole, []) == whole
    with pytest.raises(RunError, match="the scenario has no method 'sequentail'") as raised:
        narrowed(whole, ["sequentail", "experts", "joint"])
    assert len(raised.value.faults) == 2 and "sequential" in str(raised.value)


def test_options_of_a_baseline_that_do_not_fit_its_training_are_each_said_once(llama: Path, data: Path, tmp_path: Path) -> None:
    methods = [
        {"method": "o_lora", "training": {"kind": "full"}},
        {"method": "protected", "options": {"start": "adapter", "merge": "alinged"}, "training": {"protect": {"rows_of_a": "isolated"}}},
        {"method": "sequential", "training": {"kind": "none"}},
    ]
    wanted = two_tasks(llama, data, tmp_path / "out", methods=methods) | {"training": {"epochs": 1}}
    with pytest.raises(RunError) as raised:
        make_design(Scenario.model_validate(wanted))
    said = [str(fault.what) for fault in raised.value.faults]
    assert len(said) == len(set(said)) == 4
    for words in ("O-LoRA trains adapters", "has its rows of A already", "there is no merge method 'alinged'"):
        assert sum(words in one for one in said) == 1


def test_a_trial_says_what_a_stage_took(finished: tuple[Scenario, Results]) -> None:
    """Trainings and statistics of both stages, without scores; the uniform average shares the experts."""
    store, numbers = store_of(finished[0]), finished[1].numbers
    sequential = numbers[numbers["method"] == "sequential"].iloc[0]
    trial = next(trial for trial in make_design(finished[0]).trials if trial.method == "sequential")
    last: Any = trial.jobs[-1].model
    seconds = [store.read("notes", model.key)["seconds"] for model in (last, last.start)]
    assert sequential["stage_seconds"] == pytest.approx(sum(seconds) / 2)
    assert 1e8 < sequential["peak_bytes"] < 1e11


def test_o_lora_adds_the_gradient_of_its_penalty(llama: Path, data: Path, tmp_path: Path) -> None:
    """By autograd, on real adapters, whose names in files differ from those in models."""
    from recall_merge.models.load import load_trainable
    from recall_merge.training.o_lora import Orthogonality

    scenario = Scenario.model_validate(two_tasks(llama, data, tmp_path / "out", methods=["o_lora"], orders=[["films", "dogs"]]))
    bench(scenario)
    second: Any = make_design(scenario).trials[0].jobs[-1].model
    store, [first] = store_of(scenario), second.apart
    assert isinstance(second.base, Merged) and second.strength == 0.5
    model = load_trainable(store.path_of(second), store.path_of(second.base), dtype="float32")
    Orthogonality([store.path_of(first)], 0.5).on_step_begin(None, None, None, model=model)
    rows = load_file(store.path_of(first) / "adapter_model.safetensors")
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            wanted = parameter.detach().clone().requires_grad_()
            (0.5 * (wanted @ rows[name.replace(".default", "")].mT).abs().sum()).backward()
            assert wanted.grad is not None and parameter.grad is not None
            torch.testing.assert_close(parameter.grad, wanted.grad)
        elif parameter.requires_grad:
            assert parameter.grad is None


def test_o_lora_holds_adapters_at_right_angles(llama: Path, data: Path, tmp_path: Path) -> None:
    def overlap(strength: float) -> float:
        methods = [{"method": "o_lora", "options": {"strength": strength}}]
        scenario = Scenario.model_validate(two_tasks(llama, data, tmp_path / "out", methods=methods, orders=[["films", "dogs"]]))
        bench(scenario)
        second: Any = make_design(scenario).trials[0].jobs[-1].model
        old, new = (load_file(store_of(scenario).path_of(one) / "adapter_model.safetensors") for one in (*second.apart, second))
        return sum(float((old[name] @ new[name].mT).abs().sum()) for name in old if "lora_A" in name)

    assert overlap(10.0) < overlap(0.0) / 2
