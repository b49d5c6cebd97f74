"""The commands as a user types them: a table of arguments, what is printed, and the exit status."""

import inspect
import json
import shutil
import subprocess
import sys

import pytest
import yaml
from typer.testing import CliRunner

from recall_merge import load_run, make_plan, merge
from recall_merge.cli.app import app, main
from recall_merge.maths.methods import ALIASES, METHODS
from recall_merge.runtime.errors import RecallError, RunError
from tiny import fine_tuned, write_rows

ROWS = [{"prompt": f"is the fox {word}?", "completion": " yes"} for word in ("quick", "lazy", "good", "bad")]
RUN = """\
# recall merge run.yaml
base: base
experts:
  - {name: a, path: a}
  - {name: b, path: b}
method: recall
samples: {path: rows.jsonl, count: 2}
out: {path: merged}
"""


@pytest.fixture
def here(llama, tmp_path, monkeypatch):
    """A folder with all that `RUN` names, and the current one."""
    shutil.copytree(llama, tmp_path / "base")
    for seed, name in enumerate("ab"):
        fine_tuned(tmp_path / "base", tmp_path / name, seed=seed + 1)
    write_rows(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "run.yaml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recall(*arguments: str):
    """Run the command; errors come back as the exit status and words that `main` would print."""
    return CliRunner().invoke(app, list(arguments))


FLAGS = ["--base", "base", "-e", "a=a", "-e", "b=b", "-m", "linear"]


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (["merge", "run.yaml"], ["layer", "w a", "w b", "S a", "merged by recall into merged"]),
        (["merge", *FLAGS, "-o", "flags"], ["merged by linear into flags"]),
        (["merge", "run.yaml", "--set", "method=linear", "--set", "out.path=other", "--quiet"], ["merged by linear into other"]),
        (["plan", "run.yaml"], ["bytes read", "kernel: rbf", "nothing was written"]),
        (["plan", *FLAGS, "--out", "x"], ["linear", "0.5, 0.5"]),
        (["weights", "run.yaml"], ["layer", "S a"]),
        (["methods"], ["recall", "linear", "task_arithmetic"]),
        (["methods", "recall"], ["arXiv:2510.20479", "as reconstructed", "temperature = 1.0", "bandwidth = median", "cka: Linear"]),
        (["methods", "linear"], ["scale", "arXiv:2203.05482"]),
    ],
)
def test_commands(here, arguments, printed):
    result = recall(*arguments)
    assert result.exit_code == 0, result.output
    for part in printed:
        assert part in result.output


@pytest.mark.parametrize(
    ("arguments", "what", "fix"),
    [
        (["merge"], "no run was given", "--base"),
        (["merge", "nothing.yaml"], "this run file does not exist", "YAML"),
        (["merge", "run.yaml", "--set", "options.temprature=2"], "no option 'temprature'", "did you mean 'temperature'"),
        (["merge", "run.yaml", "--set", "metod=linear"], "unknown key 'metod'", "did you mean 'method'"),
        (["merge", "run.yaml", "--set", "seed"], "not of the form KEY=VALUE", "--set"),
        (["plan", "--base", "base", "-e", "a"], "--expert a: not of the form NAME=PATH", "NAME=PATH"),
        (["plan", *FLAGS], "does not say where the result goes", "--out"),
        (["methods", "lineer"], "there is no method 'lineer'", "did you mean 'linear'"),
        (["verify", "base"], "there is no record.json", "result of `recall merge`"),
        (["verify", "nowhere"], "there is no such folder", ""),
        (["weights", "run.yaml", "--picture", "weights.bmp"], "a picture cannot be saved as '.bmp'", ".png"),
    ],
)
def test_faults(here, arguments, what, fix):
    result = recall(*arguments)
    assert isinstance(result.exception, RecallError), result.output
    assert any(what in fault.what and fix in fault.fix for fault in result.exception.faults), str(result.exception)


def test_main_prints_faults_and_exits_with_one(here, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recall", "plan", "run.yaml", "--set", "method=recal", "--set", "base=gone"])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert stopped.value.code == 1
    assert printed.out == ""
    assert "1. error: there is no method 'recal'" in printed.err
    assert "2. error: " in printed.err
    assert "gone" in printed.err


def test_json_is_json_and_nothing_else(here):
    merged = json.loads(recall("merge", "run.yaml", "--json").stdout)
    assert merged["path"] == "merged"
    assert merged["record"]["weights"]["experts"] == ["a", "b"]
    weights = json.loads(recall("weights", "run.yaml", "--json").stdout)
    assert weights["weights"] == merged["record"]["weights"]
    assert [sample["cluster"] for sample in weights["samples"]] and sum(s["cluster"] for s in weights["samples"]) == len(ROWS)
    plan = json.loads(recall("plan", "run.yaml", "--json", "--overwrite").stdout)
    assert plan["weights"] == "hidden states"
    assert 0 < plan["memory_of_weights"] < plan["memory"]
    assert set(json.loads(recall("methods", "--json").stdout)) == set(METHODS) | set(ALIASES)
    assert json.loads(recall("verify", "merged", "--json").stdout)["matches"] is True


@pytest.mark.parametrize("suffix", ["png", "svg", "html"])
def test_pictures(here, suffix):
    result = recall("weights", "run.yaml", "--picture", f"weights.{suffix}")
    assert result.exit_code == 0, result.output
    data = (here / f"weights.{suffix}").read_bytes()
    starts = {"png": b"\x89PNG", "svg": b"<svg", "html": b"<!DOCTYPE html>"}
    assert data.lstrip().startswith(starts[suffix])
    if suffix == "svg":
        assert b"similarity to the newest" in data


def test_the_installed_command_runs_in_a_process_of_its_own(here):
    run = subprocess.run([sys.executable, "-m", "recall_merge", "plan", "run.yaml", "--json"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["method"] == "recall"
    run = subprocess.run([sys.executable, "-m", "recall_merge", "verify", "base"], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.startswith("error: there is no record.json")


def test_command_workspace_and_library_keep_as_many_directions():
    from recall_merge.cli.merge import stats
    from recall_merge.continual.settings import Settings
    from recall_merge.merging.statistics import RANK

    assert inspect.signature(stats).parameters["rank"].default == Settings.model_fields["stats_rank"].default == RANK


def test_version():
    import recall_merge

    result = recall("--version")
    assert (result.exit_code, result.output) == (0, f"recall-merge {recall_merge.__version__}\n")


def test_all_faults_at_once_also_where_a_key_is_unknown(here):
    """From a file, from options and from Python; what is under a misspelt key counts as under the right one."""
    text = RUN.replace("samples:", "sampels:").replace("path: b}", "path: a/gone}") + "seeds: 3\n"
    (here / "wrong.yaml").write_text(text)
    flags = ["--base", "a/gone", "-e", "a=a", "-m", "linear", "--out", "x"]
    for attempt, unknown in (
        (lambda: recall("merge", "wrong.yaml"), 2),
        (lambda: recall("plan", "wrong.yaml"), 2),
        (lambda: recall("plan", *flags, "--set", "seeds=3"), 1),
    ):
        error = attempt().exception
        assert isinstance(error, RunError)
        whats = [fault.what for fault in error.faults]
        assert [what.partition(" '")[0] for what in whats] == ["unknown key"] * unknown + ["there is no such folder"], whats
    for run in ("wrong.yaml", yaml.safe_load(text)):
        with pytest.raises(RunError) as caught:
            merge(run)
        assert [fault.what for fault in caught.value.faults] == [
            "unknown key 'sampels'",
            "unknown key 'seeds'",
            "there is no such folder",
        ]
    assert not (here / "merged").exists()


def test_a_run_is_a_file_or_a_mapping(here):
    for run in ("run.yaml", here / "run.yaml", yaml.safe_load(RUN)):
        result = merge(run)
        assert result.path.resolve() == here / "merged"
        shutil.rmtree(here / "merged")
    names = [make_plan(run).name for run in ("run.yaml", here / "run.yaml", yaml.safe_load(RUN), load_run(here / "run.yaml"))]
    assert names == ["recall"] * 4
    for call in (make_plan, merge):  # all faults, also where an unknown key resembles one that its value does not fit
        with pytest.raises(RunError, match=r"(?s)unknown key 'outt'.*there is no method 'lin'.*no such folder\n  where: \./none/base"):
            call({"base": "./none/base", "experts": [{"name": "a", "path": "a"}], "method": "lin", "outt": 1})
    with pytest.raises(RunError, match="this run file does not exist"):
        merge("gone.yaml")
    for wrong in (3, None, ["base"]):
        with pytest.raises(RunError, match="a run is no "):
            merge(wrong)  # type: ignore[arg-type]


def test_a_misspelt_folder_is_no_network_problem(here):
    for base, fix in (
        ("bsae", "did you mean 'base'?"),
        ("./a/base", "check the path"),
        ("a/x", "check the path, or give a name on the hub"),
    ):
        error = recall("plan", *["--base", base, "-e", "b=b", "-m", "linear", "-o", "x"]).exception
        assert isinstance(error, RecallError)
        assert [(fault.what, fix in fault.fix) for fault in error.faults] == [("there is no such folder", True)]


STOPS = {
    "merge": ("merging.merge.merge", "run.yaml", "the same command begins again"),
    "learn": ("continual.stages.learn", "ws", "`recall learn WORKSPACE` goes on from there"),
    "verify": ("merging.verify.verify", "base", "nothing was written"),
}


@pytest.mark.parametrize("command", STOPS)
def test_ctrl_c_says_what_is_kept_and_how_to_go_on(command, here, monkeypatch, capsys):
    place, argument, words = STOPS[command]

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"recall_merge.{place}", interrupt)
    monkeypatch.setattr(sys, "argv", ["recall", command, argument])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 130
    told = " ".join(capsys.readouterr().err.split())
    assert told.startswith("error: stopped; ") and told.endswith(words)
