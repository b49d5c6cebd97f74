"""Benchmarks run, their checks can fail, and the page of figures follows from their results. No time is asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from benchmarks.__main__ import NAMES
from benchmarks.bars import BARS, Figure, line
from benchmarks.expected import WrongError, check_mean, check_ties
from benchmarks.measure import run
from benchmarks.page import KEPT, PAGE, with_figures
from recall_merge import MergeRun, merge
from tiny import fine_tuned

ROOT = Path(__file__).parents[1]


def test_every_benchmark_runs(tmp_path):
    """Small shapes, without mergekit; each benchmark checks its own results. Ray takes a minute to start: it has a test of its own."""
    names = [name for name in NAMES if name != "cluster"]
    command = [sys.executable, "-m", "benchmarks", *names, "--quick", "--no-peer", "--work", str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    results = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()}
    assert set(results) == set(names)
    assert all(result["quick"] and result["commit"] and result["machine"]["cores"] for result in results.values())
    figures = [figure for result in results.values() for figure in result["figures"]]
    measured = {figure["work"] for figure in figures}
    without = {name for name, bar in BARS.items() if bar.work not in measured}
    assert without == {
        "linear.float32.whole",
        "linear.float32.processor",
        "linear.float32.inside",
        "linear.bfloat16.whole",
        "linear.bfloat16.inside",
        "ties.peer",
        "tensors.growth",
    }
    assert all(line(figure) in ran.stdout for figure in figures)


@pytest.mark.slow
def test_the_benchmark_of_ray_runs(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "cluster", "--quick", "--no-peer", "--work", str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    figures = json.loads((tmp_path / "results" / "cluster.json").read_text())["figures"]
    assert [figure["work"].split(",")[0] for figure in figures] == ["merge"] * 3 + ["bench"] * 3
    assert all(figure["median"] > 0 for figure in figures if figure["unit"] != "s")


@pytest.fixture
def models(llama, tmp_path):
    return [llama, *(fine_tuned(llama, tmp_path / f"expert{seed}", seed=seed) for seed in (1, 2))]


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_wrong_result_is_found(models, tmp_path, method):
    experts = [{"name": model.name, "path": str(model)} for model in models[1:]]
    merge(MergeRun(base=str(models[0]), experts=experts, method=method, out={"path": tmp_path / "merged"}))
    name = "model.layers.0.self_attn.q_proj.weight"

    def check():
        if method == "linear":
            return check_mean(tmp_path / "merged", models[1:])
        return check_ties(tmp_path / "merged", models[0], models[1:], [name], 0.2)

    check()
    file = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(file)
    tensors[name][:2] *= 1.01
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(WrongError, match="numbers"):
        check()


def test_memory_of_children_is_counted():
    child = "x = bytearray(b'1') * 200_000_000; import time; time.sleep(0.2)"
    process = run([sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"])
    assert 200e6 < process.anonymous < 260e6


def test_a_command_that_fails_is_no_figure():
    with pytest.raises(RuntimeError, match="status 3"):
        run([sys.executable, "-c", "import sys; sys.exit(3)"])


def test_a_figure_stands_beside_its_bar():
    figure = Figure("startup.help", "here", [0.3, 0.5, 0.35]).as_json()
    assert figure["met"]
    assert "0.35 s (0.3 to 0.5, 3 pairs); at most 0.4 s: met" in line(figure)
    assert not Figure("linear.float32.inside", "here", [2.9]).as_json()["met"]


def test_page_shows_the_results_that_are_kept():
    page = PAGE.read_text("utf-8")
    assert page == with_figures(page, json.loads(KEPT.read_text("utf-8")))
