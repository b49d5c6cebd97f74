"""Paths that people give: names in other bytes than UTF-8, and links that lead in a circle, are refused before any work."""

import os
import shutil
import sys

import pytest

from recall_merge import RecallError, make_plan
from recall_merge.bench.bench import out_of
from recall_merge.bench.scenario import Scenario
from recall_merge.cli.app import main
from recall_merge.continual.stages import learn
from recall_merge.files.hub import locate
from recall_merge.files.rows import read_rows
from recall_merge.runtime.paths import path_of
from tiny import fine_tuned, write_rows
from workspaces import make_workspace, request, write_tasks

BAD = os.fsdecode(b"m\xff")
NOT_TEXT, CIRCLE = "is not valid UTF-8", "links lead in a circle"
MODELS = ["-e", "a=a", "-m", "linear"]
COMMANDS = [
    "merge --base BAD/base -e a=a -m linear -o out",
    "merge --base base -e a=BAD/a -m linear -o out --json",
    "merge --base base -e BAD=a -m linear -o out",
    "merge --base base -e a=a -m linear -o BAD",
    "merge --base base -e a=a -m linear -o out --set options.BAD=1",
    "plan BAD/run.yaml",
    "weights --base base -e a=a -m recall -s BAD/rows.jsonl --json",
    "stats --base base -e a=a -s rows.jsonl -o BAD/stats",
    "verify BAD --json",
    "report BAD",
    "report result -o BAD",
    "export BAD --to mergekit",
    "evaluate BAD/base --tasks rows.jsonl",
    "evaluate base --tasks BAD=rows.jsonl --json",
    "init BAD --base base",
    "init ws --base BAD/base --json",
    "learn BAD --task a --train rows.jsonl --test rows.jsonl",
    "learn ws --task BAD --train rows.jsonl --test rows.jsonl",
    "status BAD/ws --json",
    "rollback BAD/ws --to 0",
    "bench BAD/bench.yaml",
    "demo -o BAD",
]


@pytest.fixture
def here(llama, tmp_path, monkeypatch):
    """A folder with models, rows and a workspace, the current one; below it, the same in a folder whose name is no text."""
    base = shutil.copytree(llama, tmp_path / "base")
    fine_tuned(base, tmp_path / "a", seed=1)
    write_rows(tmp_path / "rows.jsonl", [{"prompt": f"is the fox {word}?", "completion": " yes"} for word in ("quick", "lazy")])
    make_workspace(tmp_path / "ws", base)
    for name in ("base", "a", "ws"):
        shutil.copytree(tmp_path / name, tmp_path / BAD / name)
    shutil.copy(tmp_path / "rows.jsonl", tmp_path / BAD)
    (tmp_path / "circle").symlink_to("circle")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(words, monkeypatch, capsys):
    """What the command says on stderr when it refuses."""
    monkeypatch.setattr(sys, "argv", ["recall", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert (stopped.value.code, printed.out) == (1, ""), printed
    return printed.err


@pytest.mark.parametrize("words", COMMANDS)
def test_names_that_are_no_text_on_the_command_line(words, here, monkeypatch, capsys):
    before = sorted(here.rglob("*"))
    printed = told(words.replace("BAD", BAD).split(), monkeypatch, capsys)
    assert NOT_TEXT in printed and r"m\xff" in printed and "rename" in printed and "Traceback" not in printed
    assert sorted(here.rglob("*")) == before


def test_links_and_the_current_folder_may_lead_there_too(here, monkeypatch):
    for name in ("base", "a", "rows.jsonl", "ws"):
        (here / f"link-{name}").symlink_to(here / BAD / name)
    run = {"base": "base", "experts": [{"name": "a", "path": "a"}], "method": "linear", "out": {"path": "out"}}
    (here / "link-out").symlink_to(here / BAD / "out")
    changes = [{"base": "link-base"}, {"experts": [{"name": "a", "path": "link-a"}]}, {"out": {"path": "link-out"}}]
    for change in changes:
        with pytest.raises(RecallError, match=NOT_TEXT):
            make_plan(run | change)
    with pytest.raises(RecallError, match=NOT_TEXT):
        read_rows("link-rows.jsonl")
    write_tasks(here, "a")
    with pytest.raises(RecallError, match=NOT_TEXT):
        learn(here / "link-ws", request(here, "a"))
    with pytest.raises(RecallError, match=NOT_TEXT):
        out_of(Scenario.model_construct(out=here / "link-out"))
    monkeypatch.chdir(here / BAD)
    with pytest.raises(RecallError, match=NOT_TEXT):
        locate("base")


@pytest.mark.parametrize(
    "words",
    [
        "merge --base circle -e a=a -m linear -o out",
        "merge --base base -e a=circle -m linear -o out",
        "merge --base base -e a=a -m linear -o circle",
        "plan --base base -e a=a -m linear -o circle/out",
        "weights --base base -e a=a -m recall -s circle",
        "verify circle",
        "report circle",
        "report base -o circle",
        "export circle --to mergekit",
        "evaluate circle --tasks rows.jsonl",
        "evaluate base --tasks rows=circle",
        "init new --base circle",
        "learn ws --task a --train circle --test rows.jsonl",
        "learn ws --task a --expert circle --test rows.jsonl",
    ],
)
def test_links_that_lead_in_a_circle(words, here, monkeypatch, capsys):
    before = sorted(here.rglob("*"))
    printed = told(words.split(), monkeypatch, capsys)
    assert CIRCLE in printed and "circle" in printed, printed
    assert sorted(here.rglob("*")) == before


def test_paths_and_homes(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_of("~/a") == tmp_path / "a"
    assert str(path_of("~nobody-of-this-name/a")) == "~nobody-of-this-name/a"
    with pytest.raises(RecallError, match="NUL"):
        path_of("a\0b")
