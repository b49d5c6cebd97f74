"""Sound folders, as other tools and this one write them, with values of one document changed: each is used, or refused as an error of ours.

FUZZ_CASES=2000 python -m pytest tests/test_structured_fuzz.py    as many cases, over all documents (200 by default)
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from blake3 import blake3
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from corpus import MERGEKIT, SCENARIO
from recall_merge import MergeRun, make_plan, merge
from recall_merge.bench.scenario import load_scenario
from recall_merge.continual import branch_section
from recall_merge.continual.page import make_page
from recall_merge.continual.state import opened
from recall_merge.continual.validation import StageValidation, draft
from recall_merge.continual.workspace import status
from recall_merge.files.rows import read_rows
from recall_merge.files.statistics import OLDER
from recall_merge.files.vocabulary import read_vocabulary
from recall_merge.interop.export import export_mergekit
from recall_merge.interop.mergekit_run import load_any_run
from recall_merge.merging.merge import merge_in_memory
from recall_merge.merging.result import coefficients, open_result
from recall_merge.merging.run import load_run
from recall_merge.merging.statistics import make_statistics
from recall_merge.models.load import load_config, load_tokenizer
from recall_merge.models.tokens import encode_rows
from recall_merge.report.merge_page import result_page
from recall_merge.report.page import render as render_page
from recall_merge.runtime.errors import Faults, RecallError
from recall_merge.runtime.progress import Silent
from recall_merge.runtime.sealed import KEY
from tiny import edit_json, fine_tuned, lora, make_model, make_tokenizer, save_model, write_rows
from workspaces import make_workspace, request, teach, write_tasks

CASES = int(os.environ.get("FUZZ_CASES", "200"))
ROWS = [
    {"prompt": "is it good?", "completion": " yes"},
    {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
]

# ---- what is changed: JSON and YAML, at any place, by an edit that keeps the rest sound

NUMBERS = [0, -1, 1, 2, 7, 2**31, 2**63, 2**64, 10**30, 10**400, 0.5, 2.0, -0.0, 1e308, 1e-320, float("inf"), float("-inf"), float("nan")]
TEXTS = [
    "",
    " ",
    "a",
    "0",
    "1e5",
    "a\0b",
    "\ud800",
    "\x1b[31m",
    "%s {0} {{ 7 * 7 }}",
    "x" * 5000,
    ".",
    "..",
    "../../up",
    "/",
    "~",
    "base",
    "*",
]
NESTED: list[Any] = [[], {}, [[]], [None], {"": None}, [0], ["a"], {"a": 1}, [1, "a", None, {}], {"a": {"b": {"c": [1]}}}]
for _ in range(60):
    NESTED[0] = [NESTED[0]]
VALUES = [None, True, False, *NUMBERS, *TEXTS, *NESTED, [], {}]
EDITS = ("replace", "drop", "add", "rename", "retype", "double", "swap")


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value within a document."""
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*at, key)
        yield from places(part, (*at, key))


def retyped(value: Any) -> Any:
    """The same in another type."""
    match value:
        case bool() | None:
            return str(value)
        case int():
            return float(value) if abs(value) < 2**53 else str(value)
        case float():
            return str(value)
        case str():
            return [value]
        case list():
            return {str(key): part for key, part in enumerate(value)}
        case _:
            return list(value.values())


@st.composite
def edited(draw: st.DrawFn, sound: Any) -> Any:
    """A document with one to three values changed."""
    document = copy.deepcopy(sound)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        found = list(places(document))
        if not found:
            break
        depth = draw(st.integers(1, max(map(len, found))))  # first how deep, so that long lists do not hide the keys above them
        *way, key = draw(st.sampled_from([path for path in found if len(path) == depth]))
        holder = document
        for step in way:
            holder = holder[step]
        old, new = holder[key], copy.deepcopy(draw(st.sampled_from(VALUES)))
        match draw(st.sampled_from(EDITS)):
            case "drop":
                del holder[key]
            case "retype":
                holder[key] = retyped(old)
            case "rename" if isinstance(holder, dict):
                holder[draw(st.sampled_from(TEXTS))] = holder.pop(key)
            case "add" if isinstance(old, dict):
                old[draw(st.sampled_from(TEXTS))] = new
            case "add" if isinstance(old, list):
                old.append(new)
            case "double" if isinstance(holder, list):
                holder.append(copy.deepcopy(old))
            case "swap":
                holder[key] = copy.deepcopy(document)
            case _:
                holder[key] = new
    return document


# ---- how a document is read and written again


def of_json(data: bytes) -> Any:
    return {key: value for key, value in json.loads(data).items() if key != KEY}


def to_json(document: Any, old: bytes) -> bytes:
    return json.dumps(document).encode()


def to_sealed(document: Any, old: bytes) -> bytes:
    """With the hash that it now has, as whoever changes it can write it."""
    text = json.dumps({KEY: "", **document} if isinstance(document, dict) else document, indent=1)
    return text.replace('""', f'"{blake3(text.encode()).hexdigest()}"', 1).encode()


def to_unfit(document: Any, old: bytes) -> bytes:
    """With the hash that it had."""
    return json.dumps({KEY: json.loads(old)[KEY], **document} if isinstance(document, dict) else document).encode()


def of_header(data: bytes) -> Any:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def to_header(document: Any, old: bytes) -> bytes:
    text = json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text + old[8 + int.from_bytes(old[:8], "little") :]


def of_yaml(data: bytes) -> Any:
    return yaml.safe_load(data)


def to_yaml(document: Any, old: bytes) -> bytes:
    return yaml.safe_dump(document).encode()


def of_lines(data: bytes) -> Any:
    return list(map(json.loads, data.splitlines()))


def to_lines(document: Any, old: bytes) -> bytes:
    return "\n".join(json.dumps(line) for line in (document if isinstance(document, list) else [document])).encode()


JSON, SEALED, UNFIT, HEADER, YAML, LINES = (
    (of_json, to_json),
    (of_json, to_sealed),
    (of_json, to_unfit),
    (of_header, to_header),
    (of_yaml, to_yaml),
    (of_lines, to_lines),
)

# ---- how the folders are used


def a_run(world: Path, expert: str, method: str = "linear", **more: Any) -> MergeRun:
    entry = {"name": "a", "path": str(world / expert), "same_base": True}
    return MergeRun.model_validate(
        {"base": str(world / "base"), "experts": [entry], "method": method, "out": {"path": world / "new"}} | more
    )


def merged(expert: str, **more: Any) -> Callable[[Path], None]:
    def use(world: Path) -> None:
        merge(a_run(world, expert, **more))

    return use


def in_memory(expert: str, **more: Any) -> Callable[[Path], None]:
    def use(world: Path) -> None:
        merge_in_memory(make_plan(a_run(world, expert, **more), writes=False))

    return use


def read_model(world: Path) -> None:
    load_config(world / "base")
    read_vocabulary(world / "base")
    tokenizer = load_tokenizer(world / "base")
    encode_rows(read_rows(world / "rows.jsonl"), tokenizer)


def result(world: Path) -> None:
    opened_result = open_result(world / "out")
    assert coefficients(opened_result) is not opened_result.merge_weights
    render_page(result_page(world / "out", text=False, samples=None, models={}, cache=world / "cache.json", progress=Silent()))


def exported(world: Path) -> None:
    export_mergekit(world / "out", models={"base": str(world / "base"), "a": str(world / "full")})


def workspace(world: Path) -> None:
    status(world / "ws")
    render_page(make_page(world / "ws", text=True, cache=world / "cache.json", progress=Silent()))


def next_stage(world: Path) -> None:
    with opened(world / "ws", "recall learn") as state:
        asked = request(world, "b", train=None, expert=str(world / "part"), same_base=True, method="linear")
        StageValidation(
            world / "ws", state, state.unfinished or draft(world / "ws", state, asked), Faults(), same_base=True, allowed=()
        ).run()


Target = tuple[str, tuple[Callable[[bytes], Any], Callable[[Any, bytes], bytes]], Callable[[Path], None]]
TARGETS: dict[str, Target] = {
    "the base's config, read": ("base/config.json", JSON, read_model),
    "the base's config, merged": ("base/config.json", JSON, merged("full")),
    "an expert's config": ("full/config.json", JSON, merged("full")),
    "a generation config": ("full/generation_config.json", JSON, merged("full")),
    "an index": ("shards/model.safetensors.index.json", JSON, in_memory("shards")),
    "a model's header": ("full/model.safetensors", HEADER, in_memory("full")),
    "a tokenizer's config, read": ("base/tokenizer_config.json", JSON, read_model),
    "a tokenizer's config, merged": ("other/tokenizer_config.json", JSON, merged("other", vocabulary="union")),
    "a tokenizer, read": ("base/tokenizer.json", JSON, read_model),
    "a tokenizer, merged": ("other/tokenizer.json", JSON, merged("other", vocabulary="union")),
    "an adapter's config": ("part/adapter_config.json", JSON, in_memory("part")),
    "an adapter's header": ("part/adapter_model.safetensors", HEADER, in_memory("part")),
    "statistics, sealed": ("part/stats.json", SEALED, in_memory("part", method="aligned")),
    "statistics, not sealed": ("part/stats.json", UNFIT, in_memory("part", method="aligned")),
    "a statistics' header": ("older/stats.safetensors", HEADER, in_memory("older", method="aligned")),
    "a record, sealed": ("out/record.json", SEALED, result),
    "a record, exported": ("out/record.json", SEALED, exported),
    "a record, not sealed": ("out/record.json", UNFIT, result),
    "a workspace, sealed": ("ws/workspace.json", SEALED, workspace),
    "a workspace, not sealed": ("ws/workspace.json", UNFIT, workspace),
    "a workspace that goes on": ("ws/workspace.json", SEALED, next_stage),
    "a journal": ("ws/journal.jsonl", LINES, workspace),
    "scores": ("ws/scores/1.json", SEALED, workspace),
    "a merge's record in a workspace": ("ws/merges/1/record.json", SEALED, workspace),
    "a run": ("run.yaml", YAML, lambda world: make_plan(load_run(world / "run.yaml")) and None),
    "a run of mergekit": ("merge.yaml", YAML, lambda world: make_plan(load_any_run(world / "merge.yaml"), writes=False) and None),
    "a scenario": ("scenario.yaml", YAML, lambda world: load_scenario(world / "scenario.yaml") and None),
}

EACH = -(-CASES // len(TARGETS))


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branch_section, "DRAWS", 10)  # of the bootstrap, which takes most of a page's time


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a fine-tuned one, one in shards, one with tokens of its own, an adapter with statistics, a result, a workspace and runs."""
    return make_world(tmp_path_factory.mktemp("world"))


def make_world(world: Path) -> Path:
    model = make_model()
    base = save_model(model, world / "base", template=True)
    fine_tuned(base, world / "full", seed=1)
    save_model(make_model(seed=2), world / "shards", max_shard_size="20KB", template=True)
    tokenizer = make_tokenizer(template=True)
    tokenizer.add_tokens(["<new>"])
    save_model(make_model(seed=3, vocab_size=97), world / "other", tokenizer=tokenizer)
    lora(base, world / "part", r=2, lora_alpha=4, target_modules=["q_proj"])
    samples = {"path": str(write_rows(world / "rows.jsonl", ROWS)), "count": 2}
    make_statistics(a_run(world, "part", method="aligned", samples=samples), rank=2)
    shutil.copytree(world / "part", world / "older")
    edit_json(world / "older" / "stats.json", format=OLDER, **{"stats.safetensors": None})  # which does not hold the tensors' hash
    merge(a_run(world, "full", method="recall", samples=samples, out={"path": world / "out"}))
    write_tasks(world, "abc")
    make_workspace(world / "ws", base)
    teach(
        world / "ws",
        world,
        "a",
        train=None,
        expert=str(world / "part"),
        same_base=True,
        method="linear",
        unseen=[f"c={world / 'c-test.jsonl'}"],
    )
    entries = [{"name": name, "path": name, "same_base": True} for name in ("part", "full")]
    run = {"base": "base", "experts": entries, "method": "ties", "weights": {"by_layer": [[0.5, 0.5]] * 4}, "options": {"density": 0.5}}
    more = {"skip": ["*.norm.weight"], "seed": 3, "samples": {"path": "rows.jsonl", "count": 2}, "out": {"path": "new", "dtype": "float32"}}
    (world / "run.yaml").write_text(yaml.safe_dump(run | more))
    (world / "merge.yaml").write_bytes(MERGEKIT.replace(b"adapter", b"part"))
    (world / "scenario.yaml").write_bytes(SCENARIO)
    return world


def taken_or_refused(world: Path, place: Path, target: Target, document: Any) -> str:
    """Use the folders with one document changed. What the library says of it; any other error goes on."""
    file, (_, write), use = target
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(world, place, copy_function=os.link)
    old = (world / file).read_bytes()
    (place / file).unlink()  # the others keep theirs
    (place / file).write_bytes(write(document, old))
    try:
        use(place)
    except RecallError as error:
        assert all(fault.what for fault in error.faults)
        return str(error)
    return ""


@pytest.mark.parametrize("kind", TARGETS)
def test_what_is_sound_is_used(kind, world, tmp_path):
    """So what is refused below is refused for what is wrong with it."""
    file, (read, write), _ = TARGETS[kind]
    said = taken_or_refused(world, tmp_path / "used", TARGETS[kind], read((world / file).read_bytes()))
    assert said == "" or write is to_unfit


@pytest.mark.parametrize("kind", TARGETS)
@settings(max_examples=EACH, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_values(kind, world, tmp_path, data):
    file, (read, _), _ = TARGETS[kind]
    document = data.draw(edited(read((world / file).read_bytes())))
    note(repr(document))
    taken_or_refused(world, tmp_path / "used", TARGETS[kind], document)
