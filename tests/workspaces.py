"""Tiny workspaces for the tests: three tasks of a few rows, settings for training in a second, and what two workspaces have in common."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from recall_merge.continual.places import KINDS
from recall_merge.continual.stages import Learned, learn
from recall_merge.continual.validation import Request
from recall_merge.continual.workspace import init
from recall_merge.files.ownership import MARKER
from recall_merge.runtime.sealed import read_sealed
from tiny import write_rows

SETTINGS = {
    "strategy": "one_shot",
    "training.rank": 2,
    "training.alpha": 4,
    "training.epochs": 1,
    "training.batch_size": 4,
    "training.learning_rate": 0.05,
    "samples.count": 3,
}


def write_tasks(folder: Path, names: str = "abc") -> Path:
    """NAME-train.jsonl and NAME-test.jsonl for tasks of one letter each; no two files share a row.

    The answer is y for every other task, and n for the others, so that experts can be told apart by their scores; a few test rows
    have the other answer, and another number of them for each task.
    """
    for number, name in enumerate(names):
        right, wrong = ("y", "n") if number % 2 else ("n", "y")
        answers = [right] * 12 + [right] * (8 - number - 1) + [wrong] * (number + 1)
        rows = [{"prompt": f"is {name} {i} ok?", "completion": answer, "choices": ["y", "n"]} for i, answer in enumerate(answers)]
        write_rows(folder / f"{name}-train.jsonl", rows[:12])
        write_rows(folder / f"{name}-test.jsonl", rows[12:])
    return folder


def make_workspace(folder: Path, base: Path, **settings: Any) -> Path:
    init(folder, str(base), SETTINGS | {key.replace("__", "."): value for key, value in settings.items()})
    return folder


def request(data: Path, name: str, **more: Any) -> Request:
    return Request(name, data / f"{name}-test.jsonl", more.pop("train", data / f"{name}-train.jsonl"), **more)


def teach(workspace: Path, data: Path, name: str, **more: Any) -> Learned:
    return learn(workspace, request(data, name, **more))


def make_taught(folder: Path, base: Path, data: Path, names: str) -> Path:
    """A workspace that has learnt tasks of these letters, in this order."""
    make_workspace(folder, base, method="linear")
    for name in names:
        teach(folder, data, name)
    return folder


def markers(workspace: Path) -> list[Path]:
    return [workspace / kind / MARKER for kind in KINDS]


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder, by its hash; but what a stopped command says of itself, and whose the folders of artefacts are."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "lock" and path not in markers(folder))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def essence(workspace: Path) -> dict[str, Any]:
    """What a workspace is, but for times: its state, the bytes of its tensors and of its scores, and the names of all else."""
    state = read_sealed(workspace / "workspace.json")
    for stage in state["stages"]:
        del stage["created"]
    files = tree(workspace)
    kept = {name: digest for name, digest in files.items() if name.endswith(".safetensors") or name.startswith("scores/")}
    return {"state": state, "bytes": kept, "names": sorted(files)}
