"""What a terminal is sent: texts of files with escape sequences, in every command that prints them."""

import io
import json
import re
import sys

import pytest
from safetensors.torch import save_file

from recall_merge.cli.app import main
from recall_merge.cli.console import UNPRINTABLE, _console, printable
from recall_merge.runtime.sealed import read_sealed, sealed
from tiny import fine_tuned, load_tensors

ESCAPES = "\x1b]0;evil\x07\x1b[2J\x9b31m\r\u202e\x08"


@pytest.fixture
def said(monkeypatch, capsys):
    """What a command prints, after a look for what a terminal would obey."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["recall", *map(str, arguments)])
        with pytest.raises(SystemExit):
            main()
        printed = "".join(capsys.readouterr())
        assert printed and not UNPRINTABLE.search(printed), repr(printed)
        return printed

    return run


@pytest.fixture
def world(llama, tmp_path):
    """A base with an expert that holds a tensor with an odd name; and a merge of a sound one."""
    strange = fine_tuned(llama, tmp_path / "strange", seed=1)
    tensors = load_tensors(strange)
    tensors[f"model.{ESCAPES}\nfix: nothing"] = tensors["model.norm.weight"].clone()
    save_file(tensors, strange / "model.safetensors", metadata={"format": "pt"})
    fine_tuned(llama, tmp_path / "sound", seed=2)
    return tmp_path


def test_names_of_tensors_and_experts(world, llama, said):
    printed = said("plan", "--base", llama, "-e", f"a{ESCAPES}={world / 'strange'}", "--method", "linear", "--out", world / "out")
    assert "]0;evil" in printed and not re.search(r"^fix: nothing", printed, re.MULTILINE)


def test_run_files(world, llama, said):
    run = {"base": str(llama), f"bas{ESCAPES}": 1, "experts": [{"name": ESCAPES, "path": ESCAPES}], "method": ESCAPES, "out": {"path": "x"}}
    (world / "run.yaml").write_text(json.dumps(run))
    assert "evil" in said("plan", world / "run.yaml")


def test_records_and_configs(world, llama, said):
    said("merge", "--base", llama, "-e", f"a={world / 'sound'}", "--method", "linear", "--out", world / "out")
    record = read_sealed(world / "out/record.json")
    record["files"][f"{ESCAPES}.json"] = record["files"].pop("config.json")
    (world / "out/record.json").write_text(sealed(record))
    for command in ("verify", "report"):
        said(command, world / "out")
    config = json.loads((world / "sound/config.json").read_text())
    (world / "sound/config.json").write_text(json.dumps(config | {"model_type": ESCAPES, "hidden_act": ESCAPES}))
    said("plan", "--base", llama, "-e", f"a={world / 'sound'}", "--method", "linear", "--out", world / "new")


def test_workspaces(world, llama, said):
    said("init", world / "ws", "--base", llama)
    state = read_sealed(world / "ws/workspace.json")
    state["base"]["path"] = ESCAPES
    state["settings"]["method"] = ESCAPES
    (world / "ws/workspace.json").write_text(sealed(state))
    for arguments in (["status", world / "ws"], ["status", world / "ws", "--json"], ["learn", world / "ws"]):
        said(*arguments)


def test_an_error_that_nobody_foresaw(world, said, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError(ESCAPES)

    monkeypatch.setattr("recall_merge.continual.workspace.status", fail)
    assert "ZeroDivisionError: ·]0;evil" in said("status", world)


def test_tables_bars_and_colours():
    """Whatever is drawn passes: strings, texts, cells; what the console adds itself stays."""
    from rich.table import Table
    from rich.text import Text

    stream = io.StringIO()
    console = _console(stderr=True)
    console.file, console._force_terminal = stream, True
    table = Table(ESCAPES)
    table.add_row(Text(ESCAPES))
    console.print(table, Text(ESCAPES), ESCAPES, style="bold")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    assert not UNPRINTABLE.search(plain) and plain.count("evil") == 4
    assert printable("zwölf\n日本 🙂") == "zwölf\n日本 🙂"
