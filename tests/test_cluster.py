"""Engines: tasks on a real Ray cluster of several nodes on this machine give what they give here, whatever is lost on the way."""

from __future__ import annotations

import csv
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from typer.testing import CliRunner

from recall_merge import MergeRun, merge, verify
from recall_merge.bench.bench import bench, store_of
from recall_merge.bench.scenario import Scenario
from recall_merge.cli.app import app
from recall_merge.evaluation.evaluate import evaluate
from recall_merge.merging.distributed import ATTEMPT
from recall_merge.merging.run import load_run
from recall_merge.runtime.errors import CheckpointError, ExecutorError, MissingExtra, RunError
from recall_merge.runtime.executor import open_executor
from test_bench import ALL, questions, two_tasks
from test_distributed import a_run, files_of, spoilt
from test_docs import ROOT, blocks
from tiny import fine_tuned, lora, make_model, save_model, write_rows

NODE = {"num_cpus": 1, "object_store_memory": 10**8, "memory": 10**9}


@pytest.fixture(scope="module")
def started() -> Iterator[Any]:
    """A cluster of one node: real Ray processes."""
    pytest.importorskip("ray", reason="pip install 'recall-merge[cluster]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # 15 by default: beside other work they would hardly run
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")  # or workers are killed when something else fills the machine's memory
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # so that workers find `stay`
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
        patch.setenv("RAY_ADDRESS", str(made.address))  # which `auto` means
        yield made
        made.shutdown()


@pytest.fixture
def cluster(started: Any) -> Any:
    """A cluster of three nodes, one processor each, whatever an earlier test has done to it."""
    for _ in range(2 - len(started.worker_nodes)):
        started.add_node(**NODE)
    return started


def lose_a_node(cluster: Any, folder: Path) -> Path:
    """Wait until a shard is being written on a node other than the head, halt its writer, and end all processes of that node.

    Returns:
        The folder that the writer leaves, with its half of the shard.
    """
    nodes = {info.process.pid: node for node in cluster.worker_nodes for info in node.all_processes["raylet"]}
    limit = time.monotonic() + 300
    while time.monotonic() < limit:
        for attempt in folder.glob(f"{ATTEMPT}*"):
            writer = psutil.Process(int(attempt.name.removeprefix(ATTEMPT).partition("-")[0]))
            node = nodes.get(writer.ppid())
            if node is None:
                continue
            writer.suspend()
            wait_until(lambda writer=writer: writer.status() == psutil.STATUS_STOPPED)
            if attempt.exists():  # it had not finished, and never will
                cluster.remove_node(node, allow_graceful=False)
                writer.kill()
                return attempt
            writer.resume()
        time.sleep(0.001)
    raise AssertionError("no shard was ever seen in the making")


def lost_in_the_middle(cluster: Any, run: MergeRun) -> dict[str, bytes]:
    """Merge on the cluster, and lose a node while it writes a shard.    -> what was made"""
    assert run.out.path is not None
    partial = run.out.path.with_name(run.out.path.name + ".partial")
    left: list[Path] = []
    losing = threading.Thread(target=lambda: left.append(lose_a_node(cluster, partial)), daemon=True)
    losing.start()
    result = merge(run, executor=f"ray://{cluster.address}")
    losing.join()
    assert len(left) == 1
    assert len(cluster.worker_nodes) == 1
    verify(result.path)
    return files_of(result.path)


def test_a_merge_that_loses_a_node_makes_the_same_bytes(cluster: Any, tmp_path: Path) -> None:
    base = save_model(make_model(num_hidden_layers=6), tmp_path / "base")
    experts = {name: fine_tuned(base, tmp_path / name, seed=seed) for seed, name in enumerate("abc")}
    experts |= {name: lora(base, tmp_path / name, seed=seed, r=2, target_modules=["q_proj"]) for seed, name in enumerate("xy")}
    rows = write_rows(tmp_path / "rows.jsonl", questions("the", 9))

    def run(target: str) -> MergeRun:
        return a_run(base, experts, rows, tmp_path / target)

    here = files_of(merge(run("here")).path)
    assert sum(name.endswith(".safetensors") for name in here) > 20
    assert lost_in_the_middle(cluster, run("there")) == here


@pytest.mark.slow
def test_a_merge_of_the_real_model_that_loses_a_node_makes_the_same_bytes(cluster: Any, tmp_path: Path) -> None:
    from recall_merge.demo.smollm import unpack

    base = unpack(tmp_path / "base")
    experts = {name: fine_tuned(base, tmp_path / name, seed=seed, scale=0.001) for seed, name in enumerate("abcde")}
    rows = write_rows(tmp_path / "rows.jsonl", questions("the", 30))

    def run(target: str) -> MergeRun:
        return a_run(base, experts, rows, tmp_path / target, out={"shard_size": "60MB"})

    there = lost_in_the_middle(cluster, run("there"))
    assert sum(name.endswith(".safetensors") for name in there) >= 5
    assert there == files_of(merge(run("here")).path)


@pytest.mark.slow
def test_a_merge_that_fails_on_a_worker_leaves_nothing(cluster: Any, llama: Path, tmp_path: Path) -> None:
    """The shard that fails is in the middle of others, which are at work and go on until they are ended."""
    rows = write_rows(tmp_path / "rows.jsonl", questions("the", 9))
    experts = {"a": spoilt(llama, tmp_path / "a"), "b": fine_tuned(llama, tmp_path / "b", seed=1)}
    run = a_run(llama, experts, rows, tmp_path / "out", out={"shard_size": "5KB"})
    with pytest.raises(CheckpointError, match=r"^expert 'a' holds NaN or infinity in 'lm_head.weight'\n  where: .*/a\n  fix: the training"):
        merge(run, executor=f"ray://{cluster.address}")
    assert not [*tmp_path.glob("out*")]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cluster-data")
    for name, right in {"films": "the", "dogs": "no"}.items():
        write_rows(folder / f"{name}-train.jsonl", questions(right, 8))
        write_rows(folder / f"{name}-test.jsonl", questions(right, 6))
    write_rows(folder / "quick-test.jsonl", [*questions("the", 2, " quick"), *questions("no", 4, " lazy")])
    return folder


def made_by(scenario: Scenario) -> dict[str, bytes]:
    """The bytes of all that the jobs made, and of the tables: adapters, anchors, merges, scores, the numbers made of them."""
    out = Path(str(scenario.out))
    files = [file for file in out.rglob("*") if file.suffix in (".safetensors", ".csv") or file.name == "R.json"]
    return {str(file.relative_to(out)): without_seconds(file) if file.suffix == ".csv" else file.read_bytes() for file in files}


def without_seconds(table: Path) -> bytes:
    with table.open(encoding="utf-8", newline="") as file:
        return repr([{key: value for key, value in row.items() if not key.endswith("seconds")} for row in csv.DictReader(file)]).encode()


@pytest.fixture(scope="module")
def local(llama: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the bench makes on this machine."""
    scenario = Scenario.model_validate(two_tasks(llama, rows, tmp_path_factory.mktemp("local") / "out", methods=ALL))
    bench(scenario)
    return made_by(scenario)


@pytest.mark.slow
def test_a_bench_that_loses_a_node_makes_the_same_bytes(
    cluster: Any, local: dict[str, bytes], llama: Path, rows: Path, tmp_path: Path
) -> None:
    scenario = Scenario.model_validate(two_tasks(llama, rows, tmp_path / "out", methods=ALL))
    heard: list[Any] = []

    def lose(done: Any) -> None:
        heard.append(done)
        if len(heard) == 3:
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)  # in the middle of a task of its

    bench(scenario, executor=f"ray://{cluster.address}", listener=lose)
    assert len(heard) == heard[-1].number == heard[-1].total >= 12
    assert len(cluster.worker_nodes) == 1
    assert len(local) > 5
    assert made_by(scenario) == local


@pytest.mark.slow
def test_a_bench_whose_driver_is_killed_goes_on(cluster: Any, local: dict[str, bytes], llama: Path, rows: Path, tmp_path: Path) -> None:
    given = two_tasks(llama, rows, tmp_path / "out", methods=ALL)
    (tmp_path / "scenario.yaml").write_text(yaml.safe_dump(given))
    words = [sys.executable, "-m", "recall_merge", "bench", tmp_path / "scenario.yaml", "--executor", f"ray://{cluster.address}", "--quiet"]
    driver = subprocess.Popen(list(map(str, words)), stderr=subprocess.DEVNULL)
    scenario = Scenario.model_validate(given)
    wait_until(lambda: len(store_of(scenario).notes()) >= 3)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = len(store_of(scenario).notes())
    heard: list[Any] = []
    bench(scenario, executor=f"ray://{cluster.address}", listener=heard.append)
    assert heard[-1].number == heard[-1].total >= 12
    assert 0 < len(heard) <= heard[-1].total - before
    assert made_by(scenario) == local


@pytest.mark.slow
def test_scores_of_tasks_side_by_side_are_the_same(cluster: Any, llama: Path, rows: Path) -> None:
    tasks = [f"{name}={rows / f'{name}-test.jsonl'}" for name in ("films", "dogs", "quick")]
    there = evaluate(str(llama), tasks, executor=f"ray://{cluster.address}")
    assert [asdict(score) for score in there] == [asdict(score) for score in evaluate(str(llama), tasks)]


@pytest.mark.slow
def test_a_task_fails_with_its_own_message(cluster: Any, tmp_path: Path) -> None:
    with open_executor(f"ray://{cluster.address}", 1) as executor:
        assert executor.slots == 3
        assert executor.submit("a sum", divmod, 7, 2).result() == (3, 1)
        poisoned = executor.submit("a run", load_run, tmp_path / "none.yaml")
        with pytest.raises(RunError, match=r"^this run file does not exist\n  where: .*none.yaml"):
            poisoned.result()
        with pytest.raises(ZeroDivisionError):
            executor.submit("a division", divmod, 1, 0).result()
        with pytest.raises(ExecutorError, match="'an end' was given up"):  # it kills every worker that it is given to
            executor.submit("an end", os._exit, 3).result()
        with pytest.raises(
            ExecutorError, match=r"'much' needs up to 5,000,000,000 bytes of memory; the largest node of the cluster gives 1,000"
        ):
            executor.submit("much", divmod, 1, 1, memory=5 * 10**9)
        with pytest.raises(ExecutorError, match="'wide' needs up to 2 processors; the largest node of the cluster gives 1"):
            executor.submit("wide", divmod, 1, 1, threads=2)


@pytest.mark.slow
def test_no_more_is_in_flight_than_memory_allows(cluster: Any, tmp_path: Path) -> None:
    larger = cluster.add_node(**NODE | {"num_cpus": 3})
    with open_executor(f"ray://{cluster.address}", 1) as executor:
        assert executor.slots == 6
        halves = [executor.submit(f"{place}", stay, tmp_path / str(place), 0.5, memory=6 * 10**8) for place in range(6)]
        assert [half.result() for half in halves] == [None] * 6
        assert (
            max(map(int, (tmp_path / "0").parent.joinpath("most").read_text().split())) <= 4
        )  # one a node, as each takes more than half of its memory
    cluster.remove_node(larger)
    cluster.wait_for_nodes()


def stay(place: Path, seconds: float) -> None:
    """Be seen for a time, and note how many are seen at once."""
    place.touch()
    with (place.parent / "most").open("a") as file:
        file.write(f"{sum(one.name.isdecimal() for one in place.parent.iterdir())}\n")
    time.sleep(seconds)
    place.unlink()


@pytest.mark.slow
def test_the_documented_commands_work(cluster: Any, llama: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a folder with relative paths, which mean on the nodes what they mean here."""
    monkeypatch.chdir(tmp_path)
    for name, source in {"opinion": "films", "french": "dogs"}.items():
        shutil.copy(rows / f"{source}-test.jsonl", f"{name}.jsonl")
        fine_tuned(llama, tmp_path / name, seed=len(name))
    run = {"base": os.path.relpath(llama), "experts": [{"name": name, "path": name} for name in ("opinion", "french")]}
    run |= {"method": "recall", "samples": {"path": "french.jsonl", "count": 3}, "out": {"path": "merged", "shard_size": "20KB"}}
    Path("run.yaml").write_text(yaml.safe_dump(run))
    Path("scenario.yaml").write_text(yaml.safe_dump(two_tasks(llama, rows, Path("bench"))))
    lines = [line for block in blocks(ROOT / "docs" / "scale.md", "console") for line in block.splitlines()]
    given = [shlex.split(line.removeprefix("$ recall")) for line in lines if line.startswith("$ recall")]
    assert [words[0] for words in given] == ["merge", "evaluate", "bench"]
    for words in given:
        found = CliRunner().invoke(app, words)
        assert found.exit_code == 0, f"{words}: {found.output} {found.exception}"
    there = files_of(tmp_path / "merged")
    assert CliRunner().invoke(app, ["merge", "run.yaml", "--overwrite"]).exit_code == 0
    assert {name: there[name] for name in there if name != "record.json"} == {
        name: data for name, data in files_of(tmp_path / "merged").items() if name != "record.json"
    }


@pytest.mark.slow
def test_ray_on_this_machine(llama: Path, rows: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="pip install 'recall-merge[cluster]'")
    scenario = Scenario.model_validate(two_tasks(llama, rows, tmp_path / "out", methods=["linear"]))
    similarity_rows = Scenario.model_validate(two_tasks(llama, rows, tmp_path / "similarity_rows", methods=["linear"]))
    bench(scenario, executor="ray")
    bench(similarity_rows)
    assert made_by(scenario) == made_by(similarity_rows)


def test_what_is_no_engine() -> None:
    for words in ("rey", "ray:", "", "dask"):
        with pytest.raises(RunError, match=f"there is no executor '{words}'"), open_executor(words, 1):
            pass


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, llama: Path, rows: Path, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else find(name, *rest))
    with pytest.raises(MissingExtra, match=r"pip install 'recall-merge\[cluster\]'"):
        bench(Scenario.model_validate(two_tasks(llama, rows, tmp_path / "out")), executor="ray")
    with pytest.raises(MissingExtra, match=r"pip install 'recall-merge\[cluster\]'"):
        merge(a_run(llama, {"a": llama}, rows / "films-train.jsonl", tmp_path / "out"), executor="ray")
    assert not (tmp_path / "out").exists()


def test_local_tasks_raise_what_they_raise() -> None:
    with open_executor("local", 1) as executor:
        assert executor.submit("a sum", divmod, 7, 2).result() == (3, 1)
        assert isinstance(executor.submit("a division", divmod, 1, 0).exception(), ZeroDivisionError)


def wait_until(done: Callable[[], bool], seconds: float = 300) -> None:
    limit = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < limit
        time.sleep(0.2)
