"""A push to a hub on this machine: what arrives, what is refused before anything is sent, and what a stop leaves."""

from __future__ import annotations

import json
import logging
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard, close_session, constants
from typer.testing import CliRunner

from hub_server import Hub, serve
from hub_uploads import Account
from recall_merge import MergeRun, Pushed, RecallError, make_plan, merge, push, verify
from recall_merge.cli.app import app, main
from recall_merge.files.hashing import hash_file
from recall_merge.files.hub import locate
from recall_merge.files.record import versions, write_record
from recall_merge.merging.run import Samples
from recall_merge.merging.statistics import make_statistics
from recall_merge.runtime.errors import Fault
from recall_merge.runtime.progress import Advance
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
    """A base, and results of it: in many files (`many`), and in one (`one`)."""
    place = tmp_path_factory.mktemp("models")
    base = save_model(make_model("llama", hidden_size=64), place / "base")
    expert = {"name": "a", "path": str(fine_tuned(base, place / "expert", seed=1))}
    for name, method, size in (("many", "linear", 60_000), ("one", "task_arithmetic", "5GB")):
        out = {"path": place / name, "shard_size": size}
        merge(MergeRun.model_validate({"base": str(base), "experts": [expert], "method": method, "out": out}))
    return place


@dataclass
class Told:
    """A progress that keeps what it is told."""

    stages: list[tuple[str, int, str]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    @contextmanager
    def stage(self, label: str, total: int, unit: str) -> Iterator[Advance]:
        self.stages.append((label, total, unit))
        yield self.steps.append


def weights(files: Any) -> list[str]:
    return sorted(name for name in files if name.endswith(".safetensors"))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name[0] != "."}


def refused(*arguments: Any, **options: Any) -> list[Fault]:
    """The faults of a push. They must not tell the token, nor hold the request with it."""
    with pytest.raises(RecallError) as caught:
        push(*arguments, **options)
    assert TOKEN not in str(caught.value) and caught.value.__context__ is None
    return list(caught.value.faults)


def test_a_result_arrives_whole_private_and_in_one_commit(hub, models):
    before, folder, told = contents(models / "many"), models / "many", Told()
    pushed = push(folder, "me/merged", progress=told, **SAID)
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
    steps = [(folder / name).stat().st_size for name in weights(files)]
    assert told == Told([("uploading to me/merged", pushed.bytes, "bytes")], [*steps, pushed.bytes - sum(steps)])
    found = locate("me/merged")
    assert found.revision == pushed.commit
    assert verify(found.folder) == verify(folder)


def test_large_files_may_go_in_parts(hub, models):
    hub.part = 10_000
    push(models / "one", "me/merged", **SAID)
    assert hub.pushed["me/merged"].files()["model.safetensors"] == (models / "one" / "model.safetensors").read_bytes()
    assert len(hub.received) == -(-(models / "one" / "model.safetensors").stat().st_size // 10_000) > 2


def test_a_newer_merge_takes_the_place_of_an_older_one(hub, models, capfd):
    push(models / "many", "team/merged", **SAID)
    old = weights(hub.pushed["team/merged"].files())
    pushed = push(models / "one", "team/merged", message="better", **SAID)
    files = hub.pushed["team/merged"].files()
    assert pushed.deleted == tuple(sorted([*old, "model.safetensors.index.json"])) and not pushed.created
    assert set(pushed.files) == {"README.md", "record.json", "model.safetensors"}  # what is the same is not sent again
    assert capfd.readouterr().err == ""  # of the library's bars
    assert set(files) == {*contents(models / "one"), ".gitattributes"}
    assert hub.pushed["team/merged"].messages[2:] == ["better"]
    assert verify(locate("team/merged").folder)["models"] == verify(models / "one")["models"]


def test_where_nothing_changes_there_is_no_commit(hub, models):
    first = push(models / "many", "me/merged", **SAID)
    hub.received.clear()
    again = push(models / "many", "me/merged", **SAID)
    assert (again.commit, again.url) == (first.commit, first.url) and not again.changes and again.bytes == 0
    assert len(hub.pushed["me/merged"].messages) == 2 and not hub.received


def test_a_dry_run_changes_nothing(hub, models):
    new = push(models / "many", "me/merged", dry_run=True, public=True, **SAID)
    assert (new.commit, new.url, new.created, new.private) == (None, None, True, False)
    assert set(new.files) == set(contents(models / "many")) and not hub.pushed
    push(models / "many", "me/merged", **SAID)
    newer = push(models / "one", "me/merged", dry_run=True, revision="next", **SAID)
    assert newer.dry_run and newer.commit is None and not newer.created and len(newer.deleted) > 3
    there = hub.pushed["me/merged"]
    assert list(there.branches) == ["main"] and len(there.messages) == 2
    same = push(models / "many", "me/merged", dry_run=True, **SAID)
    assert same.commit == there.branches["main"] and not same.changes
    real = push(models / "one", "me/merged", revision="next", **SAID)
    assert (real.files, real.bytes, real.deleted) == (newer.files, newer.bytes, newer.deleted)


def test_a_branch_of_its_own(hub, models):
    push(models / "many", "me/merged", **SAID)
    there = hub.pushed["me/merged"]
    before = dict(there.branches)
    pushed = push(models / "one", "me/merged", revision="next/try", **SAID)
    assert there.branches == before | {"next/try": pushed.commit}
    assert weights(there.files("next/try")) == ["model.safetensors"] and len(weights(there.files())) > 2
    same = push(models / "many", "me/merged", revision="copy", **SAID)
    assert there.branches["copy"] == same.commit == before["main"]


def test_everything_wrong_is_told_at_once_before_anything_is_sent(hub, models, tmp_path, monkeypatch):
    folder = shutil.copytree(models / "many", tmp_path / "damaged")
    first = weights(contents(folder))[0]
    data = bytearray((folder / first).read_bytes())
    data[-1] ^= 1
    (folder / first).write_bytes(data)
    (folder / "extra.json").write_text("{}")
    hub.make("readers/merged", private=True)
    faults = refused(folder, "readers/merged")
    assert [fault.what for fault in faults] == [
        f"'{first}' has changed since the merge",
        "'extra.json' was not part of the result",
        "the model card does not say `license`",
        "the model card does not say `base_model`",
        "the account 'me' may only read in 'readers'",
    ]
    assert faults[2].fix == "give --license apache-2.0, or add `license: apache-2.0` to README.md"
    assert faults[4].fix == "ask the owners of 'readers', or push to me/merged"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    faults = refused(models / "base", "merged")
    assert [(fault.what, fault.fix) for fault in faults] == [
        ("there is no record.json", "give the folder of a result of `recall merge`"),
        ("'merged' is not a name of the form org/name", "give org/name; a branch goes to --revision"),
        ("offline mode is on: nothing can be pushed", "take HF_HUB_OFFLINE out of the environment"),
    ]
    assert not hub.requests and not hub.received


@pytest.mark.parametrize("name", ["merged", "a/b/c", "me/merged@v1", "me/mer ged", "me/mer--ged", "./merged", "me/"])
def test_names(hub, models, name):
    (fault,) = refused(models / "one", name, **SAID)
    assert fault.what == f"'{name}' is not a name of the form org/name"


def test_whose_token_it_is(hub, models, monkeypatch):
    def fault(repo: str = "me/merged") -> tuple[str, str]:
        (only,) = refused(models / "one", repo, **SAID)
        return only.what, only.fix

    assert fault("others/merged") == ("the account 'me' is no member of 'others'", "ask the owners of 'others', or push to me/merged")
    hub.accounts[TOKEN].role = "read"
    assert fault() == ("the token may only read", "give a token that may write: https://huggingface.co/settings/tokens")
    hub.accounts[TOKEN].role = "fineGrained"  # whose rights are the hub's to know
    assert fault()[0] == "the token may not write to 'me/merged'" and not hub.pushed
    hub.make("me/merged", private=True)
    (only,) = refused(models / "one", "me/merged", dry_run=True, **SAID)
    assert only.what == "the token may not write to 'me/merged'"
    hub.accounts.clear()
    assert fault() == ("the hub does not accept the token", "log in with `hf auth login`, or set HF_TOKEN")
    monkeypatch.delenv("HF_TOKEN")
    assert fault() == ("there is no token of the hub", "log in with `hf auth login`, or set HF_TOKEN")
    assert not hub.received


def test_a_name_that_is_taken(hub, models):
    hub.make("me/merged", private=True)
    hub.hidden.add("me/merged")
    (fault,) = refused(models / "one", "me/merged", **SAID)
    assert fault.what == "the name 'me/merged' is taken by a repository that this account may not see, or that has just been made"
    assert list(hub.pushed["me/merged"].files()) == [".gitattributes"] and not hub.received


def test_a_repository_that_was_renamed(hub, models):
    hub.make("me/old", private=True)
    hub.renamed["me/old"] = "me/new"
    (fault,) = refused(models / "one", "me/old", **SAID)
    assert (fault.what, fault.fix) == ("the repository's name is 'me/new'", "give me/new")


@pytest.mark.parametrize(
    ("card", "what"),
    [
        ("no metadata", "the model card cannot be read: it has no metadata between two lines of '---'"),
        ("---\nlicense: [mit\n---\n", "the model card cannot be read"),
        ("---\nbase_model: org/base\n---\n", "the model card does not say `license`"),
        ("---\nlicense: mit\n---\n", "the model card does not say `base_model`"),
        ("---\nlicense: nonsense\nbase_model: org/base\n---\n", 'the hub refuses the model card: "license" must be one of [mit]'),
        (
            f"---\nlicense: mit\nbase_model: org/base\n---\nsee {Path.home()}/models/x.",
            f"'README.md' holds a path of this machine: {Path.home()}/models/x",
        ),
    ],
)
def test_cards_that_are_refused(hub, models, tmp_path, card, what):
    folder = shutil.copytree(models / "one", tmp_path / "result")
    (folder / "README.md").write_text(card)
    (fault,) = refused(folder, "me/merged")
    assert fault.what.startswith(what) and fault.fix and not hub.pushed


def test_a_card_that_says_all_goes_out_as_it_is(hub, models, tmp_path):
    folder = shutil.copytree(models / "one", tmp_path / "result")
    card = "---\nlicense: mit\nbase_model:   [org/base]\n---\n\nWritten  by hand.\n"
    (folder / "README.md").write_text(card)
    push(folder, "me/merged")
    assert hub.pushed["me/merged"].files()["README.md"].decode() == card


def test_files_that_are_not_ours(hub, models):
    there = hub.make("me/merged", private=True)
    there.commit({"README.md": b"about", "notes.md": b"mine", "gguf/model.gguf": b"mine", "config.json": b"{}"}, "by hand")
    (fault,) = refused(models / "one", "me/merged", **SAID)
    assert fault.what == "there are files that no record of ours names: 'config.json', 'gguf/model.gguf', 'notes.md'"
    assert fault.fix.startswith("--overwrite keeps them")
    pushed = push(models / "one", "me/merged", overwrite=True, **SAID)
    assert pushed.deleted == () and pushed.notes == ("stays there, as no record of ours names it: 'gguf/model.gguf', 'notes.md'",)
    files = there.files()
    assert (
        files["notes.md"] == files["gguf/model.gguf"] == b"mine" and files["config.json"] == (models / "one" / "config.json").read_bytes()
    )
    again = push(models / "many", "me/merged", overwrite=True, **SAID)
    assert again.deleted == ("model.safetensors",) and there.files()["notes.md"] == b"mine"
    assert verify(locate("me/merged").folder)


def test_files_that_would_spoil_the_result(hub, models):
    there = hub.make("me/merged", private=True)
    there.commit({"added_tokens.json": b"{}", ".gitignore": b"*.safetensors", "model-00009-of-00009.safetensors": b""}, "by hand")
    (fault,) = refused(models / "one", "me/merged", overwrite=True, **SAID)
    assert fault.what.startswith("'.gitignore', 'added_tokens.json', 'model-00009-of-00009.safetensors' would spoil the result")
    assert fault.fix.endswith("me/merged .gitignore added_tokens.json model-00009-of-00009.safetensors --revision main")


def test_a_record_that_was_changed_names_nothing(hub, models):
    push(models / "many", "me/merged", **SAID)
    there = hub.pushed["me/merged"]
    there.commit({"record.json": there.files()["record.json"].replace(b"linear", b"limear")}, "by hand")
    (fault,) = refused(models / "one", "me/merged", **SAID)
    assert fault.what.startswith("there are files that no record of ours names: 'config.json', ")


def test_a_private_model_does_not_become_public_by_accident(hub, models):
    hub.make("me/open", private=False)
    (fault,) = refused(models / "one", "me/open", **SAID)
    assert fault.what == "'me/open' is public: everybody would see the result" and fault.fix.startswith("give --public")
    assert not push(models / "one", "me/open", public=True, **SAID).private
    hub.make("me/closed", private=True)
    pushed = push(models / "one", "me/closed", public=True, **SAID)
    assert pushed.private and pushed.notes == ("the repository stays private, as it was: its settings on the hub change that",)
    assert hub.pushed["me/closed"].private and not hub.pushed["me/open"].private
    assert push(models / "one", "me/new", public=True, **SAID).created and not hub.pushed["me/new"].private


def hang_up_from(number: int, hub: Hub) -> None:
    """Lose the network in the middle of the body of the given large file, and of every one after it."""
    arriving: list[str] = []

    def meddle(method: str, path: str) -> int | None:
        arriving.extend([path] if method == "PUT" and path not in arriving else [])
        return 0 if method == "PUT" and arriving.index(path) + 1 >= number else None

    hub.meddle = meddle


def test_a_push_that_lost_the_network_goes_on_where_it_was(hub, models):
    hang_up_from(2, hub)
    (fault,) = refused(models / "many", "me/merged", **SAID)
    assert fault.what == f"the network to the hub at {hub.url} is lost"
    assert re.fullmatch(r"me/merged@main \(model-00002-of-\d+.safetensors\)", fault.where)
    assert fault.fix == "run the same command again: what has arrived is not sent again"
    there = hub.pushed["me/merged"]
    assert there.private and list(there.files()) == [".gitattributes"] and len(hub.received) == 1
    hub.meddle = lambda method, path: None
    pushed = push(models / "many", "me/merged", **SAID)
    assert len(hub.received) == len(set(hub.received)) == len(weights(pushed.files))
    assert verify(locate("me/merged").folder) == verify(models / "many")


def test_with_hf_xet_pieces_that_have_arrived_are_not_sent_again(hub, models, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.storage = tmp_path / "storage"
    hub.objects = {hash_file(file): file.read_bytes() for file in (models / "many").glob("*.safetensors")}  # to show them after the commit
    hub.meddle = lambda method, path: 503 if "/commit/" in path else None
    (fault,) = refused(models / "many", "me/merged", **SAID)
    assert fault.what == "the hub answers with status 503"
    pieces = {file.name: file.stat().st_mtime_ns for file in hub.storage.rglob("xorbs/default.*")}
    assert pieces and not hub.received
    hub.meddle = lambda method, path: None
    assert push(models / "many", "me/merged", **SAID).changes
    assert {file.name: file.stat().st_mtime_ns for file in hub.storage.rglob("xorbs/default.*")} == pieces
    hub.accounts[TOKEN].role = "write"
    hub.meddle = lambda method, path: 403 if "xet-write-token" in path else None
    (fault,) = refused(models / "one", "me/merged", **SAID)
    assert fault.what == "the token may not write to 'me/merged'"


def test_somebody_else_pushes_meanwhile(hub, models):
    push(models / "one", "me/merged", **SAID)
    there = hub.pushed["me/merged"]
    hub.meddle = lambda method, path: None if "/commit/" not in path else there.commit({"record.json": b"theirs"}, "theirs") and None
    (fault,) = refused(models / "many", "me/merged", **SAID)
    assert fault.what == "somebody else has pushed there meanwhile" and "look at what is there" in fault.fix
    assert there.messages[-1] == "theirs" and weights(there.files()) == ["model.safetensors"]


@pytest.mark.parametrize(
    ("status", "where", "what"),
    [
        (401, "/preupload/", "the hub does not accept the token"),
        (403, "/preupload/", "the token may not write to 'me/merged'"),
        (404, "/commit/", "there is no 'me/merged@main' on the hub any more, or this account may not see it"),
        (400, "/commit/", "the hub refuses: meddled with"),
        (409, "/repos/create", "the name 'me/merged' is taken by a repository that this account may not see, or that has just been made"),
        (429, "/objects/batch", "the hub takes no more requests for now (status 429)"),
        (500, "/lfs/", "the hub answers with status 500"),
        (503, "/whoami", "the hub answers with status 503"),
        (0, "/validate-yaml", "the network to the hub at "),
    ],
)
def test_what_the_hub_may_answer(hub, models, capfd, monkeypatch, status, where, what):
    hub.meddle, told = lambda method, path: status if where in path else None, list[str]()
    listener = logging.Handler()
    monkeypatch.setattr(listener, "emit", lambda record: told.append(record.getMessage()))
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handlers", [listener])
    (fault,) = refused(models / "one", "me/merged", **SAID)
    assert fault.what.startswith(what) and "me/merged@main" in fault.where and fault.fix
    assert "me/merged" not in hub.pushed or list(hub.pushed["me/merged"].files()) == [".gitattributes"]
    assert capfd.readouterr().err == "" and told == []  # of the library's bars and warnings, and of its retries


def test_a_folder_that_changes_while_it_is_sent(hub, models, tmp_path):
    folder = shutil.copytree(models / "many", tmp_path / "result")

    def change(method: str, path: str) -> None:
        if method == "PUT":
            (folder / "config.json").write_text("{}")

    hub.meddle = change
    (fault,) = refused(folder, "me/merged", **SAID)
    assert fault.what == "the file changed while it was read" and fault.where == str(folder / "config.json")
    assert list(hub.pushed["me/merged"].files()) == [".gitattributes"]


def test_files_that_the_record_does_not_name_stay_here(hub, models, tmp_path):
    folder = shutil.copytree(models / "one", tmp_path / "result")
    (folder / "diary.md").write_text("private")
    (folder / ".env").write_text("private")
    pushed = push(folder, "me/merged", **SAID)
    assert pushed.notes == ("stays here, as the record does not name it: 'diary.md'",)
    assert not {"diary.md", ".env"} & set(hub.pushed["me/merged"].files())


@pytest.fixture(scope="module")
def expert(tmp_path_factory) -> Path:
    """An adapter that `recall learn` might have trained, with its record and input statistics."""
    place = tmp_path_factory.mktemp("expert")
    base = save_model(make_model("llama"), place / "base")
    folder = lora(base, place / "sentiment", r=2, target_modules=["q_proj"])
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(base))
    (folder / "README.md").unlink()
    write_record(folder, {"key": "0", "settings": {}, "training": {"steps": 1}, "versions": versions()})
    rows = [{"prompt": f"is the fox {word}?", "completion": " yes"} for word in ("quick", "lazy", "good")]
    samples = {"path": str(write_rows(place / "rows.jsonl", rows)), "count": 2}
    make_statistics(run_of(base, folder, place / "out").model_copy(update={"samples": Samples.model_validate(samples)}), rank=2)
    return folder


def run_of(base: Path, expert: Path | str, out: Path) -> MergeRun:
    entry = {"name": "sentiment", "path": str(expert), "same_base": True}
    return MergeRun.model_validate({"base": str(base), "experts": [entry], "method": "aligned", "out": {"path": str(out)}})


def test_an_expert_goes_out_with_the_public_name_of_its_base(hub, expert, tmp_path):
    before = contents(expert)
    assert [(fault.what, fault.fix) for fault in refused(expert, "me/sentiment")] == [
        (
            f"adapter_config.json names the base by a folder of this machine, {expert.parent / 'base'}",
            "give its name on the hub: --base-model org/name",
        ),
        ("the model card does not say `license`", "give --license apache-2.0, or add `license: apache-2.0` to README.md"),
        ("the model card does not say `base_model`", "give --base-model org/name, or add `base_model: org/name` to README.md"),
    ]
    for name in ("./base", "org/base@main"):
        (fault,) = refused(expert, "me/sentiment", base_model=name, license="mit")
        assert (fault.what, fault.where, fault.fix) == (f"the base model '{name}' is no name on the hub", "--base-model", "give org/name")
    pushed = push(expert, "me/sentiment", **SAID)
    assert contents(expert) == before
    files = hub.pushed["me/sentiment"].files()
    assert set(pushed.files) == {*before, "README.md"} and str(expert.parent).encode() not in b"".join(files.values())
    assert hub.pushed["me/sentiment"].messages[-1].startswith("Fine-tuned expert")
    card = ModelCard(files["README.md"].decode())
    assert card.data.to_dict()["base_model_relation"] == "adapter" and card.data.base_model == "org/base"
    found = locate("me/sentiment")
    assert json.loads((found.folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    assert verify(found.folder)["training"] == {"steps": 1}
    plan = make_plan(run_of(expert.parent / "base", "me/sentiment", tmp_path / "out"))  # statistics are those of the expert as it is there
    assert plan.statistics[0] is not None and plan.statistics[0].folder == found.folder


def test_a_base_in_the_hubs_cache_has_its_public_name(hub, expert, tmp_path):
    folder, commit = shutil.copytree(expert, tmp_path / "sentiment"), "0123456789" * 4
    record = verify(folder)
    edit_json(folder / "adapter_config.json", base_model_name_or_path=f"/home/me/hub/models--org--base/snapshots/{commit}")
    write_record(folder, {**record, "files": {}})
    push(folder, "me/sentiment", license="mit")
    files = hub.pushed["me/sentiment"].files()
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", commit)
    assert ModelCard(files["README.md"].decode()).data.base_model == "org/base"


def test_paths_of_this_machine_stay_here(hub, expert, models, tmp_path):
    folder = shutil.copytree(expert, tmp_path / "sentiment")
    record = verify(folder)
    write_record(folder, record | {"settings": {"arguments": {"logging_dir": "/data/runs/7", "note": f"see {tmp_path}/x, and a/b"}}})
    faults = refused(folder, "me/sentiment", **SAID)
    assert [fault.what for fault in faults] == [
        "'record.json' holds a path of this machine: /data/runs/7",
        f"'record.json' holds a path of this machine: {tmp_path}/x,",
    ]
    assert not hub.pushed


def test_the_command(hub, models, monkeypatch, capsys):
    def recall(*words: str) -> str:
        result = CliRunner().invoke(app, ["push", *words])
        assert result.exit_code == 0, result.output
        return result.stdout

    said = [str(models / "many"), "me/merged", "--license", "apache-2.0", "--base-model", "org/base"]
    dry = recall(*said, "--dry-run")
    assert re.search(
        r"^would make me/merged, branch main \(private\)\nwould upload \d+ files, [\d.]+ kB, to me/merged, .*: record.json, ", dry
    )
    assert dry.endswith("\nnothing was changed\n") and not hub.pushed
    done = recall(*said, "--message", "first")
    commit = hub.pushed["me/merged"].branches["main"]
    assert done.startswith("made me/merged, branch main (private)\nuploaded ") and done.endswith(
        f"\ncommit {commit}: {hub.url}/me/merged/commit/{commit}\n"
    )
    assert hub.pushed["me/merged"].messages[-1] == "first"
    assert recall(*said, "--quiet").startswith("me/merged, branch main (private) holds this result already\ncommit ")
    newer = [str(models / "one"), *said[1:]]
    assert "\ndeleted model-00001-of-" in recall(*newer, "--revision", "next")
    told = json.loads(recall(*newer, "--public", "--json"))
    assert told["repo"] == "me/merged" and told["private"] and told["commit"] == hub.pushed["me/merged"].branches["main"]
    assert told["notes"] == ["the repository stays private, as it was: its settings on the hub change that"]
    hub.make("me/other", private=True).commit({"notes.md": b""}, "by hand")
    monkeypatch.setattr(sys, "argv", ["recall", "push", newer[0], "me/other"])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert stopped.value.code == 1 and printed.out == "" and printed.err.count("error: ") == 3
    assert recall(str(models / "one"), "me/other", *said[2:], "--overwrite")


def test_commands_of_the_documents_run(hub, models, tmp_path, monkeypatch):
    shutil.copytree(models / "one", tmp_path / "merged")
    monkeypatch.chdir(tmp_path)
    pages = sorted((Path(__file__).parents[1] / "docs").rglob("*.md"))
    lines = [line for page in pages for line in re.findall(r"^(?: {4}|\$ )recall push (.*)$", page.read_text("utf-8"), re.MULTILINE)]
    assert len(lines) >= 2
    for line in lines:
        result = CliRunner().invoke(app, ["push", *shlex.split(line, comments=True)])
        assert result.exit_code == 0, f"{line}: {result.output} {result.exception}"
