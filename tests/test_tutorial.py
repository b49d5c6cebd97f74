"""The tutorial, word for word, on a tiny model."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from recall_merge.cli.app import app
from recall_merge.continual.state import read_state
from test_docs import blocks
from tiny import lora, write_rows

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"
WORDS = ("quick", "lazy", "good", "bad", "brown", "big", "small", "other")


def write_task(folder: Path, task: str, answer: str) -> None:
    """Rows to train on, rows to choose by, and rows to score on; no two files share one."""
    for split in ("", "-valid", "-test"):
        rows = [{"prompt": f"{task}{split}: is the fox {word}?", "completion": answer, "choices": [" yes", " no"]} for word in WORDS]
        write_rows(folder / f"{task}{split}.jsonl", rows)


@pytest.fixture
def here(llama, tmp_path, monkeypatch):
    """What the page says that a reader has, of a tiny model."""
    (tmp_path / "base").symlink_to(llama)
    for seed, (task, answer) in enumerate((("sentiment", " yes"), ("french", " no"), ("desk", " yes"))):
        write_task(tmp_path, task, answer)
        if task != "desk":
            lora(llama, tmp_path / "adapters" / task, seed=seed, r=2, target_modules=["q_proj", "up_proj"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def play(folder: Path) -> list[str]:
    """Run all commands of the page in the current folder, after writing the file that it shows.    -> what each printed"""
    (run,) = blocks(PAGE, "yaml")
    (folder / re.search(r"Write `(\S+)`", PAGE.read_text("utf-8"))[1]).write_text(run)
    told = []
    for line in (line for block in blocks(PAGE, "console") for line in block.splitlines()):
        done = CliRunner().invoke(app, shlex.split(line.removeprefix("$ recall")))
        met = {0, 3} if "--require" in line or "--keep-if" in line else {0}  # 3: the page's bound is not met by these models
        assert done.exit_code in met, f"{line}: {done.output} {done.exception}"
        told.append(done.output)
    assert len(told) >= 14
    return told


def test_every_command_of_the_tutorial_works_in_its_order(here):
    told = "\n".join(play(here))
    (run,) = blocks(PAGE, "yaml")
    listed = {line.split()[0].rstrip("/") for line in re.search(r"```\n(base/.*?)```", PAGE.read_text("utf-8"), re.DOTALL)[1].splitlines()}
    assert all((here / name).exists() for name in listed)
    assert {entry["path"] for entry in yaml.safe_load(run)["experts"]} <= listed
    assert "kept: " in told and (here / "merged" / "record.json").is_file() and (here / "merged-report" / "index.html").is_file()
    state = read_state(here / "notes")
    assert [stage.task.name for stage in state.stages] == ["sentiment", "french", "desk"]
    assert (state.stages[2].start, state.stages[0].given is not None, state.head) == ("last", True, 2)
    assert re.search(r"training moved the answers of earlier tasks by: base \S+, sentiment \S+, french", told)
