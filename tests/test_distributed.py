"""A merge as tasks makes what one pass over the models makes. The executor here does each task at once, from copies of what it needs."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Bases
from recall_merge import MergeRun, merge, verify
from recall_merge.files.ownership import MARKER
from recall_merge.maths.methods import METHODS
from recall_merge.merging import merge as recipe
from recall_merge.merging.distributed import ATTEMPT, plan_for_tasks, write_shard
from recall_merge.merging.layerwise import compute_weights
from recall_merge.merging.plan import make_plan
from recall_merge.models.layerwise import _Batch
from recall_merge.runtime.errors import CheckpointError, NotLayerwise, RecallError, ResultError
from recall_merge.runtime.executor import Executor
from recall_merge.runtime.processes import ThisProcess
from test_layerwise import ROWS
from tiny import fine_tuned, lora, make_model, save_model, write_rows


class Worker(ThisProcess):
    """This process, given and giving copies only."""

    slots = 2

    def __init__(self) -> None:
        self.labels: list[str] = []

    def submit(self, label: str, function: Callable[..., Any], *arguments: Any, memory: int = 0, threads: int = 1) -> Future[Any]:
        self.labels.append(label)
        assert memory > 0
        assert threads == 1
        function, arguments = pickle.loads(pickle.dumps((function, arguments)))
        return super().submit(label, function, *arguments)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    """What `executor="ray"` means in this test."""
    made = Worker()

    @contextmanager
    def opened(words: str, workers: int) -> Iterator[Executor]:
        yield made

    monkeypatch.setattr(recipe, "open_executor", opened)
    monkeypatch.setattr(recipe, "check_executor", lambda words: None)
    return made


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


def a_run(base: Path, experts: dict[str, Path], rows: Path, target: Path, **settings: Any) -> MergeRun:
    entries = [{"name": name, "path": str(path)} for name, path in experts.items()]
    given = {"base": str(base), "experts": entries, "method": "recall", "samples": {"path": str(rows), "count": 4}} | settings
    return MergeRun.model_validate(given | {"out": {"path": target, "shard_size": "9KB"} | settings.get("out", {})})


def files_of(folder: Path) -> dict[str, bytes]:
    """All files of a result, without what the record says of time, memory and bytes read."""
    found = {file.name: file.read_bytes() for file in folder.iterdir()}
    record = json.loads(found["record.json"])
    del record["blake3"]  # its own hash, of times too
    for key in ("seconds", "bytes", "peak_memory", "created"):
        del record[key]
    record["run"]["out"]["path"] = record["files"]["README.md"] = ""  # these name the folder
    return found | {"record.json": json.dumps(record).encode(), "README.md": b""}


def same(make: Callable[[Path], MergeRun], tmp_path: Path) -> dict[str, bytes]:
    """Merge here and apart, and compare all that was made."""
    here, apart = make(tmp_path / "here"), make(tmp_path / "apart")
    one, other = merge(here), merge(apart, executor="ray")
    assert files_of(one.path) == files_of(other.path)
    assert torch.equal(one.weights, other.weights)
    assert one.merge_weights.samples == other.merge_weights.samples
    verify(other.path)
    return files_of(other.path)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3-moe"])
def test_some_family(family: str, bases: Bases, worker: Worker, rows: Path, tmp_path: Path) -> None:
    base = bases(family)
    experts = {name: fine_tuned(base, tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
    found = same(lambda target: a_run(base, experts, rows, target), tmp_path)
    shards = sum(name.endswith(".safetensors") for name in found)
    assert shards > 3
    assert worker.labels[:3] == ["typical samples by b", "hidden states of a", "hidden states of b"]
    assert len(worker.labels) == 3 + shards


WAYS: dict[str, dict[str, Any]] = {
    "one expert, with the base": {"experts": "a"},
    "adapters": {"experts": "xy"},
    "both, in one shard": {"experts": "axb", "out": {"shard_size": "5GB"}},
    "given weights": {"experts": "abx", "method": "ties", "weights": [1.0, 2.0, 1.0], "samples": None},
    "random draws": {"experts": "ab", "method": "dare_ties", "options": {"density": 0.5}, "weights": {"recall": {}}},
    "an ablation that needs all layers": {"experts": "ab", "method": "linear", "weights": {"recall": {"ablation": "permuted"}}},
    "losses": {"experts": "ab", "method": "lm_cocktail"},
    "skipped": {"experts": "ab", "method": "linear", "skip": ["*layers.1.*"], "weights": {"recall": {"precision": "bfloat16"}}},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way(way: str, worker: Worker, rows: Path, tmp_path: Path) -> None:
    base = save_model(make_model("llama-tied", dtype="bfloat16"), tmp_path / "base")
    made = {name: fine_tuned(base, tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
    made |= {name: lora(base, tmp_path / name, seed=seed, r=2, target_modules=["q_proj", "embed_tokens"]) for seed, name in enumerate("xy")}
    settings = dict(WAYS[way])
    experts = {name: made[name] for name in settings.pop("experts")}
    same(lambda target: a_run(base, experts, rows, target, **settings), tmp_path)


def test_what_cannot_run_block_by_block_takes_whole_models_and_says_so(
    bases: Bases, worker: Worker, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwalkable(batch: _Batch) -> None:
        raise NotLayerwise("its forward pass needs numbers that it does not have", fix="none")

    monkeypatch.setattr(_Batch, "go_on", unwalkable)
    base = bases("llama")
    experts = {name: fine_tuned(base, tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
    found = same(lambda target: a_run(base, experts, rows, target), tmp_path)
    assert b"whole models were run" in found["record.json"]


def test_what_a_lost_attempt_leaves_is_no_part_of_the_result(bases: Bases, worker: Worker, rows: Path, tmp_path: Path) -> None:
    base = bases("llama")
    experts = {name: fine_tuned(base, tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
    submit = worker.submit

    def lost_once(label: str, function: Any, *arguments: Any, **needs: int) -> Future[Any]:
        if label.endswith(".safetensors"):  # the worker before was lost in the middle, and another one had finished and could not say so
            folder = tmp_path / "apart.partial"
            (folder / f"{ATTEMPT}1-x").mkdir(exist_ok=True)
            (folder / f"{ATTEMPT}1-x" / label).write_bytes(b"half")
            (folder / label).write_bytes(b"another")
        return submit(label, function, *arguments, **needs)

    worker.submit = lost_once  # type: ignore[method-assign]
    same(lambda target: a_run(base, experts, rows, target), tmp_path)


def spoilt(base: Path, folder: Path) -> Path:
    """An expert with a number in its head that is none."""
    from safetensors.torch import load_file, save_file

    file = fine_tuned(base, folder, seed=7) / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_a_merge_that_fails_apart_leaves_nothing(bases: Bases, worker: Worker, rows: Path, tmp_path: Path) -> None:
    base = bases("llama")
    experts = {"a": spoilt(base, tmp_path / "a"), "b": fine_tuned(base, tmp_path / "b", seed=1)}
    told = []
    for executor in ("local", "ray"):
        with pytest.raises(CheckpointError, match=r"expert 'a' holds NaN or infinity in 'lm_head.weight'") as refused:
            merge(a_run(base, experts, rows, tmp_path / "out"), executor=executor)
        told.append(str(refused.value))
        assert not [*tmp_path.glob("out*")]
    assert told[0] == told[1]


def test_a_result_that_is_the_base_is_refused_by_all_shards_together(bases: Bases, worker: Worker, rows: Path, tmp_path: Path) -> None:
    base = bases("llama")
    last = {"head": lora(base, tmp_path / "head", r=2, target_modules=["lm_head"])}  # the shards before hold nothing of it
    merge(a_run(base, last, rows, tmp_path / "one", method="linear", samples=None), executor="ray")
    with pytest.raises(ResultError, match="would be the base"):
        merge(a_run(base, last, rows, tmp_path / "none", method="linear", samples=None, options={"scale": 0.0}), executor="ray")
    assert not [*tmp_path.glob("none*")]


def test_a_machine_that_finds_other_files_says_so(bases: Bases, rows: Path, tmp_path: Path) -> None:
    base = bases("llama")
    experts = {name: fine_tuned(base, tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
    plan = plan_for_tasks(make_plan(a_run(base, experts, rows, tmp_path / "out", weights=[1.0, 1.0], method="linear")))
    folder = tmp_path / "out.partial"

    def refused() -> str:
        with pytest.raises(RecallError) as found:
            write_shard(plan, compute_weights(plan), folder, 0)
        return str(found.value)

    assert "does not find the folder that the result is written to" in refused()
    folder.mkdir()
    (folder / MARKER).touch()
    assert write_shard(plan, compute_weights(plan), folder, 0).lines[0].keys() == plan.shards[0].specs.keys()
    (tmp_path / "a" / "config.json").touch()
    assert refused().startswith("a machine of the cluster finds another file here, or none")
    assert str(tmp_path / "a" / "config.json") in refused()


def test_a_method_is_the_same_row_in_another_process() -> None:
    assert all(pickle.loads(pickle.dumps(method)) is method for method in METHODS.values())
