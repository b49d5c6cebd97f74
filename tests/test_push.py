"""A push to a hub on this machine: what arrives, what is refused before anything is sent, and what a stop leaves."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard, close_session, constants
from typer.testing import CliRunner

from hub_server import Hub, serve
from hub_uploads import Account
from recall_merge import MergeRun, Pushed, RecallError, merge, push, verify
from recall_merge.cli.app import app, main
from recall_merge.files.hub import locate
from tiny import edit_json, fine_tuned, lora, make_model, save_model, write_rows

TOKEN = "hf_SecretTokenThatNobodyMaySee"
SAID = {"license": "apache-2.0", "base_model": "org/base"}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """A hub with the account `me`, that this process takes for the hub."""
    with serve() as running:
        running.place = tmp_path / "hub"
        running.accounts = {TOKEN: Account("me", orgs={"team": "write", "readers": "read"})}
        settings = {"ENDPOINT": running.url, "HUGGINGFACE_CO_URL_TEMPLATE": running.url + "/{repo_id}/resolve/{revision}/{filename}"}
        settings |= {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(tmp_path / "cache")}
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))  # between its retries
        yield running
        close_session()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A base; results of it in many files (`many`), and in one (`one`); an adapter (`adapter`)."""
    place = tmp_path_factory.mktemp("models")
    base = save_model(make_model("llama", hidden_size=64), place / "base")
    for name, seed, size in (("many", 1, 60_000), ("one", 2, "5GB")):
        expert = {"name": "a", "path": str(fine_tuned(base, place / f"expert-{name}", seed=seed))}
        merge(MergeRun.model_validate({"base": str(base), "experts": [expert], "method": "linear", "out": {"path": place / name, "shard_size": size}}))
    return place


def weights(files: Any) -> list[str]:
    return sorted(name for name in files if name.endswith(".safetensors"))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name[0] != "."}


def refused(*arguments: Any, **options: Any) -> list[Any]:
    """The faults of a push, which must have sent nothing."""
    with pytest.raises(RecallError) as caught:
        push(*arguments, **options)
    assert TOKEN not in str(caught.value) and caught.value.__context__ is None
    return list(caught.value.faults)


def test_a_result_arrives_whole_private_and_in_one_commit(hub, models):
    before, folder = contents(models / "many"), models / "many"
    pushed = push(folder, "me/merged", **SAID)
    there = hub.pushed["me/merged"]
    files = there.files()
    assert there.private and there.messages[0] == "initial commit" and len(there.messages) == 2
    assert re.fullmatch(r"Merge by linear \(recall-merge [\w.]+\)", there.messages[1])
    assert files.pop(".gitattributes") and set(files) == set(before) and len(weights(files)) > 2
    assert {name for name in files if files[name] != before[name]} == {"README.md"}
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.base_model) == ("apache-2.0", "org/base")
    assert card.text.strip() == ModelCard(before["README.md"].decode()).text.strip()
    assert contents(folder) == before
    assert pushed == Pushed(
        *("me/merged", "main", there.branches["main"], f"{hub.url}/me/merged/commit/{there.branches['main']}"),
        files=tuple(pushed.files),
        bytes=sum(map(len, files.values())),
        deleted=(),
        private=True,
        created=True,
        dry_run=False,
        notes=(),
    )
    assert set(pushed.files) == set(files)
    found = locate("me/merged")
    assert found.revision == pushed.commit
    assert verify(found.folder) == verify(folder)
