"""Work that is disturbed: merges, a stage of a workspace, a bench; and how it is judged what a fault has left of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recall_merge.files.ownership import MARKER, claim, names_in

MERGED, WALKED = "a merge of five experts", "a merge layer by layer"
STAGE, BENCH = "a stage of a workspace", "a bench"
MERGES, LONG = (MERGED, WALKED), (STAGE, BENCH)
SECONDS = {MERGED: 0.4, WALKED: 0.8, STAGE: 3.0, BENCH: 8.0}
"""What each takes, about: within it a process is killed."""
ROWS = [f"is the {what} {how}?" for what in ("fox", "dog", "film") for how in ("quick", "lazy", "good")]


@dataclass
class World:
    """Tiny models, and what undisturbed work makes of them."""

    folder: Path
    experts: list[str]
    wanted: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict)
    """How many files and folders each kind of work opens for writing, makes, renames and removes."""


@dataclass(frozen=True)
class Outcome:
    """What became of one fault."""

    injected: bool
    survived: bool = True
    lost: bool = False
    wrong: bool = False
    words: str = ""


def make_world(folder: Path, works: Sequence[str]) -> World:
    from tiny import fine_tuned, lora, make_model, save_model, write_rows
    from workspaces import make_workspace, teach, write_tasks

    folder.mkdir(parents=True, exist_ok=True)
    base = save_model(make_model("llama"), folder / "base", max_shard_size=40_000)
    experts = [fine_tuned(base, folder / f"full{seed}", seed).name for seed in (1, 2, 3)]
    experts += [
        lora(base, folder / f"part{seed}", seed=seed, r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"]).name for seed in (4, 5)
    ]
    write_rows(folder / "rows.jsonl", [{"prompt": row, "completion": " yes"} for row in ROWS])
    write_tasks(folder, "ab")
    world = World(folder, experts)
    if STAGE in works:
        teach(make_workspace(folder / f"before {STAGE}", base, method="linear", scoring__batch_size=8), folder, "a")
    if BENCH in works:
        bench_here(world, folder / f"before {BENCH}", methods=("linear",))
    for work in works:
        out = folder / f"undisturbed {work}"
        prepare(world, work, out)
        WORK[work](world, out)
        world.wanted[work] = essence_of(work, out)
    return world


def merge_here(world: World, out: Path, **changes: Any) -> None:
    from recall_merge import MergeRun, merge

    entries = [{"name": name, "path": str(world.folder / name), "same_base": True} for name in world.experts]
    told = {"base": str(world.folder / "base"), "experts": entries, "method": "ties", "threads": 1}
    told["out"] = {"path": str(out), "overwrite": True, "shard_size": 40_000, "reload": False}
    merge(MergeRun.model_validate(told | changes))


def walk_here(world: World, out: Path) -> None:
    merge_here(world, out, method="recall", samples={"path": str(world.folder / "rows.jsonl"), "count": 3})


def learn_here(world: World, out: Path) -> None:
    from recall_merge.continual.state import read_state
    from workspaces import teach

    if len(read_state(out).stages) < 2:
        teach(out, world.folder, "b")


def bench_here(world: World, out: Path, methods: Sequence[str] = ("linear", "recall", "sequential")) -> None:
    from recall_merge.bench.bench import bench
    from recall_merge.bench.scenario import Scenario

    told = {
        "model": str(world.folder / "base"),
        "data": str(world.folder),
        "tasks": [{"name": name, "train": f"{name}-train.jsonl", "test": f"{name}-test.jsonl"} for name in "ab"],
        "orders": [["a", "b"]],
        "methods": list(methods),
        "training": {"rank": 2, "alpha": 4, "epochs": 1, "batch_size": 4, "learning_rate": 0.03},
        "samples": {"count": 3},
        "out": str(out),
    }
    bench(Scenario.model_validate(told))


WORK: dict[str, Callable[[World, Path], None]] = {MERGED: merge_here, WALKED: walk_here, STAGE: learn_here, BENCH: bench_here}


def prepare(world: World, work: str, out: Path) -> None:
    """What stands in the place before the work begins."""
    shutil.copytree(world.folder / ("full1" if work in MERGES else f"before {work}"), out)
    if work in MERGES:
        claim(out, "model", whole=True, files=names_in(out))  # it may be replaced


def weights(folder: Path) -> dict[str, str]:
    """A result, but for what tells the time."""
    from workspaces import tree

    return {
        name: digest for name, digest in tree(folder).items() if name not in {"record.json", "README.md"} and not name.startswith(MARKER)
    }


def benched(folder: Path) -> dict[str, str]:
    """A bench, but for what tells the time: jobs that are done, as bytes, and all other names."""
    from workspaces import tree

    timeless = (".safetensors", "scores.csv", "R.json")
    return {name: digest if name.endswith(timeless) or name.startswith("jobs/scores/") else "" for name, digest in tree(folder).items()}


def essence_of(work: str, out: Path) -> Any:
    from workspaces import essence

    return weights(out) if work in MERGES else essence(out) if work == STAGE else benched(out)


def judge(world: World, work: str, out: Path, injected: bool, words: str = "") -> Outcome:
    """Look at what a fault left, ask for the work again, and look at that."""
    from recall_merge.runtime.errors import RecallError

    if work in MERGES:
        return _judge_merge(world, work, out, injected, words)
    if work == STAGE:
        from recall_merge.continual.workspace import status

        with suppress(RecallError):
            status(out)
            WORK[work](world, out)
            return Outcome(injected, wrong=essence_of(work, out) != world.wanted[work], words=words)
        return Outcome(injected, survived=False, lost=True, words=words)
    before = {name: digest for name, digest in benched(world.folder / f"before {BENCH}").items() if digest and "/" in name}
    lost = before.items() - benched(out).items()
    WORK[work](world, out)
    found, wanted = benched(out), world.wanted[work]
    wrong = {name for name, digest in wanted.items() if found.get(name) != digest}
    left = found.keys() - wanted.keys()
    return Outcome(injected, not left, bool(lost), bool(wrong), f"{words} {sorted(wrong)} {sorted(left)}")


def _judge_merge(world: World, work: str, out: Path, injected: bool, words: str) -> Outcome:
    from recall_merge.merging.verify import verify
    from recall_merge.runtime.errors import RecallError

    old, new = weights(world.folder / "full1"), world.wanted[work]
    between = out.with_name(f"{out.name}.replaced.partial")  # a kill between two renames: the next run puts it back
    found = weights(out if out.exists() else between) if out.exists() or between.exists() else {}
    if found not in (new, old):
        return Outcome(injected, survived=False, lost=True, words=f"{words}: {sorted(found)}")
    WORK[work](world, out)
    with suppress(RecallError):
        verify(out)
        return Outcome(injected, wrong=weights(out) != new, survived=not list(out.parent.glob(f"{out.name}*.partial")), words=words)
    return Outcome(injected, survived=False, wrong=True, words=words)
