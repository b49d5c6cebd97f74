"""Devices by name: which there are, what they can do, and what is refused before any work. `tests/on_device.py` runs on a pretended one."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from recall_merge import MergeRun, make_plan, merge
from recall_merge.bench.design import make_design
from recall_merge.bench.jobs import Base
from recall_merge.bench.scenario import Scenario
from recall_merge.cli.app import app
from recall_merge.continual.settings import make_settings
from recall_merge.continual.stages import learn
from recall_merge.continual.steps import accelerator_facts
from recall_merge.evaluation.evaluate import evaluate
from recall_merge.maths.methods import METHODS
from recall_merge.merging.placement import placement_notes, takes, work_on
from recall_merge.merging.run import DEFAULT_RECALL
from recall_merge.runtime.device import find_device, hardware, has_float64, is_full, prefers_bfloat16
from recall_merge.runtime.errors import RecallError, RunError
from recall_merge.training.settings import arguments_on, training_device
from tiny import fine_tuned, write_rows
from workspaces import make_workspace, request, tree, write_tasks

ROWS = [{"prompt": f"is the fox {word}?", "completion": " yes"} for word in ("quick", "lazy", "good", "bad")]


@pytest.fixture(autouse=True)
def nothing_but_the_processor(monkeypatch):
    """Whatever this machine has."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)


@pytest.fixture
def accelerators(monkeypatch):
    """Let torch know accelerators of a kind, by number."""

    def know(kind, number):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device(kind))
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: number)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        module = SimpleNamespace(get_device_name=lambda device: f"{kind.upper()} model", get_device_capability=lambda device: (9, 0))
        monkeypatch.setattr(torch, "get_device_module", lambda device: module)
        monkeypatch.setattr(torch.cuda, "get_device_capability", module.get_device_capability)

    return know


def a_run(llama, tmp_path, **settings):
    path = tmp_path / "a"
    if not path.exists():
        fine_tuned(llama, path, seed=1)
    run = {"base": str(llama), "experts": [{"name": "a", "path": str(path)}], "method": "linear", "out": {"path": tmp_path / "out"}}
    return MergeRun.model_validate(run | settings)


# --- which there are --------------------------------------------------------------------------------------------------------------------


def test_auto_is_the_first_accelerator_or_the_processor(accelerators):
    assert find_device() == find_device("auto") == find_device("cpu") == torch.device("cpu")
    accelerators("cuda", 2)
    assert find_device() == find_device("auto") == find_device("cuda") == torch.device("cuda:0")
    assert (find_device("cuda:1"), find_device("cpu")) == (torch.device("cuda:1"), torch.device("cpu"))


@pytest.mark.parametrize(
    ("there", "name", "what", "fix"),
    [
        (None, "cuda", "there is no CUDA device", "known here: cpu"),
        (None, "cuda:3", "there is no CUDA device", "known here: cpu"),
        (None, "mps", "there is no MPS device", "known here: cpu"),
        ("cuda", "cuda:2", "there is no device 'cuda:2'", "known here: cpu, cuda:0, cuda:1"),
        ("cuda", "xpu:0", "there is no XPU device", "known here: cpu, cuda:0, cuda:1"),
        ("cuda", "gpu", "there is no device 'gpu'", "give auto, cpu, cuda, mps, xpu, or one of several by its number, such as cuda:1"),
        ("cuda", "cuda:x", "there is no device 'cuda:x'", "such as cuda:1"),
        ("cuda", "cpu:0", "there is no device 'cpu:0'", "such as cuda:1"),
        ("cuda", "", "there is no device ''", "such as cuda:1"),
    ],
)
def test_a_device_that_is_not_there(there, name, what, fix, accelerators):
    if there:
        accelerators(there, 2)
    with pytest.raises(RunError) as error:
        find_device(name)
    (fault,) = error.value.faults
    assert fault.what == what and fix in fault.fix and fault.where == "device"


def test_a_misspelt_device_is_a_fault_of_the_file():
    for section, data in ((MergeRun, {"device": "gpu"}), (Scenario, {"device": "cuda:1:2"})):
        with pytest.raises(ValueError, match="there is no device"):
            section.model_validate(data)
    with pytest.raises(RunError, match="there is no device 'gpu'"):
        make_settings({}, {"device": "gpu"})
    with pytest.raises(RunError, match=r"'scoring.device': there is no device 'gpu'"):
        make_settings({}, {"scoring.device": "gpu"})


# --- refused before any work, with all other faults -------------------------------------------------------------------------------------


def test_a_merge_is_refused_with_all_other_faults(llama, tmp_path):
    with pytest.raises(RecallError) as error:
        make_plan(a_run(llama, tmp_path, device="cuda", method="liner", skip=["nothing"]))
    assert [fault.what for fault in error.value.faults] == ["there is no method 'liner'", "there is no CUDA device"]
    with pytest.raises(RecallError, match="known here: cpu"):
        merge(a_run(llama, tmp_path, device="cuda:7"))
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


@pytest.mark.parametrize(
    "command",
    [
        *([name, "--base", "base", "-e", "a=a", "-m", "linear", "-o", "out"] for name in ("merge", "plan")),
        ["weights", "--base", "base", "-e", "a=a", "-m", "linear"],
        ["stats", "--base", "base", "-e", "a=a", "-s", "rows.jsonl"],
        ["evaluate", "base", "--tasks", "rows.jsonl"],
        ["learn", "ws", "--task", "a", "--train", "a-train.jsonl", "--test", "a-test.jsonl"],
        ["bench", "bench.yaml"],
    ],
    ids=lambda words: words[0],
)
def test_every_command(command, llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fine_tuned(llama, tmp_path / "a", seed=1)
    (tmp_path / "base").symlink_to(llama)
    write_rows(tmp_path / "rows.jsonl", ROWS)
    write_tasks(tmp_path, "a")
    make_workspace(tmp_path / "ws", llama)
    task = "{name: a, train: a-train.jsonl, test: a-test.jsonl}"
    (tmp_path / "bench.yaml").write_text(f"model: base\ntasks: [{task}]\nmethods: [linear]\norders: [[a]]\nout: results\n")
    before = tree(tmp_path)
    result = CliRunner().invoke(app, [*command, "--device", "cuda"])
    assert isinstance(result.exception, RecallError), result.output
    assert [(fault.what, fault.fix) for fault in result.exception.faults] == [("there is no CUDA device", "known here: cpu")]
    assert tree(tmp_path) == before


def test_scores_are_refused_with_all_other_faults(llama, tmp_path):
    with pytest.raises(RecallError) as error:
        evaluate(str(llama), [str(tmp_path / "none.jsonl")], device="cuda")
    assert error.value.faults[0].what == "there is no CUDA device" and len(error.value.faults) == 2


def test_a_cluster_works_on_processors(llama, tmp_path):
    what = "tasks of `--executor ray` run on processors, not on 'cuda'"
    with pytest.raises(RunError, match=what):
        merge(a_run(llama, tmp_path, device="cuda"), executor="ray")
    with pytest.raises(RunError, match=what):
        evaluate(str(llama), [str(write_rows(tmp_path / "rows.jsonl", ROWS))], device="cuda", executor="ray")


def test_training_takes_the_first_accelerator(accelerators, llama, tmp_path):
    accelerators("cuda", 2)
    assert training_device("cuda") == torch.device("cuda:0")
    data = write_tasks(tmp_path, "a")
    workspace = make_workspace(tmp_path / "ws", llama, device="cuda:1")
    before = tree(workspace)
    for work in (lambda: training_device("cuda:1"), lambda: learn(workspace, request(data, "a"))):
        with pytest.raises(RecallError, match="training runs on the first accelerator, not on cuda:1") as error:
            work()
        assert "`CUDA_VISIBLE_DEVICES=1`" in str(error.value)
    assert tree(workspace) == before


def test_a_device_for_scoring_alone_is_checked_too(llama, tmp_path):
    data = write_tasks(tmp_path, "a")
    workspace = make_workspace(tmp_path / "ws", llama, scoring__device="cuda")
    before = tree(workspace)
    with pytest.raises(RecallError, match="there is no CUDA device"):
        learn(workspace, request(data, "a"))
    assert tree(workspace) == before


# --- what they can do -------------------------------------------------------------------------------------------------------------------


def test_what_runs_where(accelerators):
    accelerators("cuda", 1)
    cpu, cuda, mps = map(torch.device, ("cpu", "cuda:0", "mps:0"))
    assert hardware(cpu) == "cpu" and hardware(cuda) == "cuda (CUDA model)"
    assert [has_float64(device) for device in (cpu, cuda, mps)] == [True, True, False]
    assert [prefers_bfloat16(device) for device in (cpu, cuda, mps)] == [False, True, True]
    assert {name for name, entry in METHODS.items() if entry.heavy} == {
        "tsv",
        "isotropic",
        "null_space",
        "opcm",
        "regmean",
        "aligned",
        "sce",
        "pcb",
    }
    for entry in METHODS.values():
        assert (takes(cpu, entry), takes(cuda, entry), takes(mps, entry)) == (False, entry.heavy, False)
    assert work_on(cpu, METHODS["tsv"], DEFAULT_RECALL) == [] and not [*placement_notes(cpu, METHODS["tsv"], DEFAULT_RECALL)]
    assert work_on(cuda, METHODS["ties"], DEFAULT_RECALL) == ["hidden states"]
    assert work_on(cuda, METHODS["tsv"], (0.5, 0.5)) == ["`tsv`"] and work_on(cuda, METHODS["ties"], (0.5, 0.5)) == []


def test_without_float64_the_method_stays_on_the_processor(accelerators):
    accelerators("mps", 1)
    notes = [*placement_notes(torch.device("mps:0"), METHODS["aligned"], DEFAULT_RECALL)]
    assert notes[0].startswith("hidden states on mps:0, mps (MPS model)")
    assert notes[1] == "`aligned` computes in float64, which mps has not: it stays on the processor"


def test_the_work_of_another_device_is_other_work(accelerators):
    key = Base(Path(), "f").key
    assert accelerator_facts("auto") == {} and Base(Path(), "f", "cpu", "cpu").key == key
    accelerators("cuda", 2)
    assert accelerator_facts("auto") == accelerator_facts("cuda:1") == {"hardware": "cuda (CUDA model)"}
    assert Base(Path(), "f", "cuda:0", "cuda (CUDA model)").key != key


def test_what_trl_is_told(accelerators):
    assert arguments_on(torch.device("cpu")) == {}  # where there is nothing else, nothing
    accelerators("cuda", 1)
    assert arguments_on(torch.device("cpu")) == {"use_cpu": True}
    assert arguments_on(torch.device("cuda:0")) == {"bf16": True}


def test_a_bench_runs_on_the_device_of_its_scenario(accelerators, llama, tmp_path):
    write_tasks(tmp_path, "a")
    task = {"name": "a", "train": "a-train.jsonl", "test": "a-test.jsonl"}
    scenario = Scenario.model_validate({"model": str(llama), "data": tmp_path, "tasks": [task], "methods": ["linear"], "orders": [["a"]]})
    assert make_design(scenario).base.device == "cpu"
    accelerators("cuda", 1)
    base = make_design(scenario).base
    assert (base.device, base.hardware) == ("cuda:0", "cuda (CUDA model)")


def test_memory_that_is_full():
    for error in (torch.OutOfMemoryError("x"), RuntimeError("MPS backend out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")):
        assert is_full(error)
    assert not is_full(RuntimeError("shapes differ")) and not is_full(ValueError("out of memory"))


def test_on_a_processor_the_plan_and_the_record_say_so(llama, tmp_path):
    plan = make_plan(a_run(llama, tmp_path))
    assert plan.device == torch.device("cpu") and plan.hardware == "cpu" and not plan.notes
    assert merge(a_run(llama, tmp_path)).record["device"] == "cpu"
    result = CliRunner().invoke(app, ["plan", "--base", str(llama), "-e", f"a={tmp_path / 'a'}", "-m", "tsv", "-o", str(tmp_path / "x")])
    assert "device" in result.output and "cpu" in result.output


# --- a pretended accelerator ------------------------------------------------------------------------------------------------------------


def test_what_runs_on_an_accelerator_stays_there():
    """`tests/on_device.py`, in a process of its own: every method, kernel and family, whole merges, scores, and too little memory."""
    tests = Path(__file__).with_name("on_device.py")
    options = ["-q", "-x", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tests)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tests.parent.parent,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
