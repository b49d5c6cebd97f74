"""Models of the hub: fetched from a real HTTP server on this machine, by a process of its own as the library reads its settings once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from hub_server import Hub, serve
from recall_merge.files.checkpoint import open_checkpoint
from recall_merge.files.hub import Located, Reference, locate, parse_reference
from recall_merge.runtime.errors import CheckpointError
from tiny import fine_tuned, load_tensors, lora, make_model, save_model

SCRIPT = """
import json, sys
from contextlib import contextmanager
from recall_merge.runtime.errors import RecallError
from recall_merge.files.adapter import is_adapter, open_adapter
from recall_merge.files.checkpoint import open_checkpoint
from recall_merge.files.hub import locate

class Told:
    @contextmanager
    def stage(self, label, total, unit):
        self.label, self.total, self.unit, self.done = label, total, unit, 0
        def advance(amount):
            self.done += amount
        yield advance

for reference, weights in json.loads(sys.argv[1]):
    progress = Told()
    try:
        found = locate(reference, weights=weights, progress=progress)
        answer = {"folder": str(found.folder), "repo": found.repo, "revision": found.revision, "to_download": found.to_download}
        answer |= {"progress": vars(progress), "files": sorted(str(f.relative_to(found.folder)) for f in found.folder.rglob("*"))}
        answer |= {"repr": repr(found)}
        if not is_adapter(found.folder):
            base = open_checkpoint(found.folder, found.remote)
            answer |= {"nbytes": base.nbytes, "names": list(base.tensors), "fingerprint": base.fingerprint}
            try:
                base.tensors[base.embedding].fill(memoryview(bytearray(8)))
            except RecallError as error:
                answer |= {"read": str(error)}
        else:
            adapter = open_adapter(found.folder, base, found.remote)
            answer |= {"nbytes": adapter.nbytes, "names": list(adapter.edits)}
    except RecallError as error:
        answer = {"error": str(error), "context": repr(error.__context__)}
    print(json.dumps(answer))
"""
TOKEN = "hf_SecretTokenThatNobodyMaySee"
Ask = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as running:
        yield running


@pytest.fixture
def ask(hub: Hub, tmp_path: Path) -> Ask:
    """`ask("org/name", weights=False, HF_HUB_OFFLINE="1")`: locate each reference in one new process; the answers, in order."""

    def run(*references: str, weights: bool = True, **settings: str) -> list[dict[str, Any]]:
        own = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_ETAG_TIMEOUT": "5"}
        calls = json.dumps([(reference, weights) for reference in references])
        command = [sys.executable, "-W", "error", "-c", SCRIPT, calls]
        done = subprocess.run(command, env=os.environ | own | settings, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""  # no bars, no hints
        assert TOKEN not in done.stdout
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose header is small beside its weights, in shards."""
    model = make_model("llama", hidden_size=128, intermediate_size=512)
    return save_model(model, tmp_path_factory.mktemp("hub") / "wide", max_shard_size="1MB")


def test_a_folder_wins_over_the_hub(tmp_path, llama, monkeypatch):
    shutil.copytree(llama, tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert locate("org/name") == Located(Path("org/name"))
    assert locate(str(tmp_path / "org" / "name"), weights=False) == Located(tmp_path / "org" / "name")


def test_what_is_no_folder_and_no_name_is_refused_without_asking_anyone(tmp_path):
    (tmp_path / "model.safetensors").touch()
    for reference in (str(tmp_path / "nothing"), "./nothing", "a/b/c", "org/", "org/name@", "org/na me"):
        with pytest.raises(
            CheckpointError, match=r"there is no such folder\n  where: .*\n  fix: check the path, or give a name on the hub"
        ):
            locate(reference)
    with pytest.raises(CheckpointError, match="this is a file; a model is a folder"):
        locate(str(tmp_path / "model.safetensors"))


def test_references():
    assert parse_reference("gpt2") == Reference("gpt2")
    assert parse_reference("org/name@refs/pr/1") == Reference("org/name", "refs/pr/1")
    commit = "0123456789" * 4
    assert parse_reference(f"/home/me/hub/models--org--my--name/snapshots/{commit}") == Reference("org/my--name", commit)


def test_a_model_is_fetched_once_with_what_a_merge_needs_and_no_more(hub, ask, wide, tmp_path):
    repo = shutil.copytree(wide, tmp_path / "repo")
    for extra in (
        "pytorch_model.bin",
        "model.gguf",
        "onnx/model.onnx",
        "onnx/config.json",
        "consolidated.safetensors",
        "training_args.bin",
    ):
        (repo / extra).parent.mkdir(exist_ok=True)
        (repo / extra).write_bytes(b"unwanted")
    for extra in ("modeling_own.py", "merges.txt", "chat_template.jinja", "tokenizer.model", "README.md", "LICENSE"):
        (repo / extra).write_text("wanted")
    hub.repos["org/name"] = repo
    (first,) = ask("org/name", HF_TOKEN=TOKEN)
    shards = [name for name in first["files"] if name.endswith(".safetensors")]
    assert len(shards) == 3
    wanted = {file.name for file in wide.iterdir()} | {"modeling_own.py", "merges.txt", "chat_template.jinja", "tokenizer.model"}
    assert set(first["files"]) == wanted | {"README.md", "LICENSE"}
    assert first["revision"] == hub.commit("org/name") and first["folder"].endswith(first["revision"])
    size = sum((wide / name).stat().st_size for name in shards)
    assert first["progress"] == {"label": "downloading org/name", "total": size, "unit": "bytes", "done": size}
    assert first["fingerprint"] == open_checkpoint(wide).fingerprint
    assert not [request for request in hub.requests if request.host.startswith("localhost") and request.token]
    assert {request.token for request in hub.requests if request.host.startswith("127")} == {f"Bearer {TOKEN}"}

    hub.requests.clear()
    (second,) = ask("org/name")
    assert second["folder"] == first["folder"] and second["progress"] == {}
    assert [(request.method, request.path) for request in hub.requests] == [
        ("GET", "/api/models/org/name?blobs=true"),
        ("HEAD", "/org/name/resolve/main/config.json"),
    ]

    hub.requests.clear()
    (third,) = ask("org/name", HF_HUB_OFFLINE="1")
    assert third["folder"] == first["folder"] and third["revision"] == first["revision"] and not hub.requests


def test_a_revision_means_a_commit(hub, ask, llama):
    hub.repos["org/name"] = llama
    commit = hub.commit("org/name")
    by_tag, by_commit, by_path = ask("org/name@v1", f"org/name@{commit}", f"gone/models--org--name/snapshots/{commit}")
    assert by_tag["revision"] == by_commit["revision"] == by_path["revision"] == commit
    assert by_tag["repo"] == by_path["repo"] == "org/name"
    offline = ask("org/name@v1", f"org/name@{commit}", "org/name", HF_HUB_OFFLINE="1")
    assert [answer.get("revision") for answer in offline] == [commit, commit, None]  # nobody asked what main means
    assert "'org/name' is not in the hub's cache, and offline mode is on" in offline[2]["error"]


def test_a_plan_fetches_headers_only(hub, ask, wide, tmp_path):
    hub.repos["org/base"] = wide
    hub.repos["org/adapter"] = lora(wide, tmp_path / "adapter", r=64, target_modules="all-linear")
    base, adapter = ask("org/base", "org/adapter", weights=False)
    here = open_checkpoint(wide)
    assert (base["nbytes"], base["names"]) == (here.nbytes, list(here.tensors))
    assert base["to_download"] == sum(file.stat().st_size for file in wide.glob("*.safetensors")) > 2_000_000
    file = hub.repos["org/adapter"] / "adapter_model.safetensors"
    assert adapter["to_download"] == file.stat().st_size == adapter["nbytes"] + _header_size(file)
    assert not [name for name in base["files"] + adapter["files"] if name.endswith(".safetensors")]
    assert hub.sent(r"/cdn/.*safetensors") <= 4 * 100_000
    assert base["read"].startswith("the weights in this file are not downloaded, only their header is")
    assert "start=" not in base["repr"]

    hub.requests.clear()
    (later,) = ask("org/base")
    assert later["fingerprint"] == here.fingerprint != base["fingerprint"]
    hub.requests.clear()
    (cached,) = ask("org/base", weights=False)
    assert cached["to_download"] == 0 and not hub.asked("safetensors$") and "read" not in cached


def test_a_long_header_takes_a_second_request(hub, ask, tmp_path):
    model = make_model("llama", num_hidden_layers=120, hidden_size=8, intermediate_size=8, num_attention_heads=2, vocab_size=50_000)
    hub.repos["org/deep"] = save_model(model, tmp_path / "deep", tokenizer=False)
    assert _header_size(tmp_path / "deep" / "model.safetensors") > 100_000
    (deep,) = ask("org/deep", weights=False)
    assert deep["nbytes"] == open_checkpoint(tmp_path / "deep").nbytes
    assert len(hub.asked("/cdn/")) == 2 and hub.sent("/cdn/") < 120_000


@pytest.mark.parametrize("tied", [True, False])
def test_whether_a_head_is_tied_is_seen_from_its_start(hub, ask, tmp_path, tied):
    from safetensors.torch import load_file, save_file

    repo = save_model(make_model("llama", hidden_size=256), tmp_path / "repo")
    config = json.loads((repo / "config.json").read_text())
    config["tie_word_embeddings"] = tied
    (repo / "config.json").write_text(json.dumps(config))
    tensors = load_file(repo / "model.safetensors")
    if tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, repo / "model.safetensors", metadata={"format": "pt"})
    hub.repos["org/name"] = repo
    (found,) = ask("org/name", weights=False)
    assert ("lm_head.weight" in found["names"]) is not tied
    assert hub.sent("/cdn/") <= 100_000 + 2 * 65_536


def test_a_server_without_ranges_is_hung_up_on(hub, ask, tmp_path):
    model = make_model("llama", hidden_size=512, intermediate_size=2048)
    hub.repos["org/name"] = save_model(model, tmp_path / "repo")
    hub.knows_ranges = False
    (found,) = ask("org/name", weights=False)
    assert found["nbytes"] == open_checkpoint(tmp_path / "repo").nbytes
    assert not [name for name in found["files"] if name.endswith(".safetensors")]
    assert hub.asked("/cdn/") and hub.sent("/cdn/") == 0  # it did not get to the end of the file


def test_names_revisions_and_access_that_do_not_exist(hub, ask, llama):
    hub.repos["org/name"] = hub.repos["org/gated"] = llama
    hub.gated.add("org/gated")
    missing, revision, gated = ask("org/nothing", "org/name@v9", "org/gated")
    assert missing["error"] == (
        "there is no folder 'org/nothing' here and no model of that name on the hub, or it is private\n  where: org/nothing@main\n"
        "  fix: check the name; for a private model log in with `hf auth login`, or set HF_TOKEN"
    )
    assert revision["error"] == ("'org/name' has no revision 'v9'\n  where: org/name@v9\n  fix: give a branch, a tag or a commit of it")
    assert gated["error"].startswith("access to 'org/gated' is gated, and this account has none\n  where: org/gated@main (")
    assert f"accept its terms at {hub.url}/org/gated, and log in" in gated["error"] and ".json)" in gated["error"]
    (refused,) = ask("org/gated", HF_TOKEN=TOKEN)
    assert refused["error"] == gated["error"]
    assert {answer["context"] for answer in (missing, revision, gated, refused)} == {"None"}  # the request, and its token, are let go


def test_repositories_without_safetensors_are_refused_like_folders(hub, ask, tmp_path, llama):
    def repo(name: str, *files: str) -> None:
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text("{}")
        hub.repos[f"org/{name}"] = tmp_path / name

    repo("pickled", "config.json", "pytorch_model.bin", "training_args.bin")
    repo("gguf", "config.json", "model.Q4_K_M.gguf")
    repo("data", "README.md", "train.json")
    repo("adapter", "adapter_config.json", "adapter_model.bin")
    repo("twice", "config.json", "model.safetensors", "model.safetensors.index.json")
    answers = ask("org/pickled", "org/gguf", "org/data", "org/adapter", "org/twice")
    expected = [
        "the weights are pickled (pytorch_model.bin); loading a pickle runs code, so it is never done here\n  where: org/pickled@main\n",
        "the weights are not safetensors (model.Q4_K_M.gguf)\n  where: org/gguf@main\n",
        "'org/data' holds no config.json, so it is not a model\n  where: org/data@main\n",
        "the adapter's weights are pickled; loading a pickle runs code\n  where: org/adapter@main\n",
        "the folder holds two models, model.safetensors and model.safetensors.index.json",
    ]
    for answer, start in zip(answers, expected, strict=True):
        assert answer["error"].startswith(start)
    assert not hub.asked(r"\.(bin|gguf|safetensors)$")


def test_without_a_network_the_cache_answers_as_far_as_it_goes(hub, ask, llama, wide):
    hub.repos |= {"org/whole": llama, "org/planned": wide}
    ask("org/whole")
    ask("org/planned", weights=False)
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # nobody listens there
    for settings, reason in ((nowhere, "cannot be reached"), ({"HF_HUB_OFFLINE": "1"}, "offline mode is on")):
        whole, planned, unknown = ask("org/whole", "org/planned", "org/unknown", **settings)
        assert whole["revision"] == hub.commit("org/whole")
        assert (
            "its cache does not hold all weights of 'org/planned'" in planned["error"] and "run once with the network" in planned["error"]
        )
        assert (
            unknown["error"].startswith("there is no such folder, ")
            and reason in unknown["error"]
            and "'org/unknown'" in unknown["error"]
            and "where: org/unknown@main" in unknown["error"]
        )
    hub.broken = True
    whole, unknown = ask("org/whole", "org/unknown")
    assert whole["revision"] == hub.commit("org/whole")
    assert unknown["error"].startswith("the hub answers with status 503\n  where: org/unknown@main")


def test_a_fine_tuned_model_of_the_hub_differs_from_its_base_before_it_is_downloaded(hub, ask, llama, tmp_path):
    hub.repos |= {"org/base": llama, "org/same": llama, "org/other": fine_tuned(llama, tmp_path / "other", seed=1)}
    base, same, other = ask("org/base", "org/same", "org/other", weights=False)
    assert base["fingerprint"] == same["fingerprint"] != other["fingerprint"]


def _header_size(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_an_adapter_without_effect_is_refused_once_it_is_here(hub, llama, tmp_path):
    """A plan reads no factors that are still on the hub; a merge fetches them, and looks before any work."""
    adapter = lora(llama, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    file = adapter / "adapter_model.safetensors"
    save_file({key: part * ("lora_A" in key) for key, part in load_tensors(adapter).items()}, file)
    hub.repos["org/adapter"] = adapter
    expert = {"name": "a", "path": "org/adapter", "same_base": True}
    run = {"base": str(llama), "experts": [expert], "method": "linear", "out": {"path": str(tmp_path / "out")}}
    script = f"""
from recall_merge import MergeRun, make_plan, merge
run = MergeRun.model_validate({run!r})
print(make_plan(run, download=False).bytes_to_download)
try:
    merge(run)
except Exception as error:
    print(error)
"""
    own = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | own, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{file.stat().st_size}\nexpert 'a' changes nothing: every product of its factors is zero\n")
