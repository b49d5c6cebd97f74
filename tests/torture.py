"""Faults of every kind, one after another, until the time is over; after each the result is asked for again and compared, byte by byte.

    make torture [MINUTES=10]            or: python tests/torture.py --minutes 10 --seed 0

A fault is survived if what went wrong was said in words of ours (or the process was killed), nothing looks finished that is not, what
stood in the output's place stands, and the same work asked for again gives the bytes of a run that nothing disturbed. Data lost: what
stood before is damaged or gone. Wrong results: something that verifies, and has other bytes. Every line can be had again by its seed.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "src")]

MERGED, STAGE = "a merge of five experts", "a stage of a workspace"


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


# ---- the work


def make_world(folder: Path, *, workspace: bool = True) -> World:
    from tiny import fine_tuned, lora, make_model, save_model
    from workspaces import essence, make_workspace, teach, write_tasks

    folder.mkdir(parents=True, exist_ok=True)
    base = save_model(make_model("llama"), folder / "base", max_shard_size=40_000)
    experts = [fine_tuned(base, folder / f"full{seed}", seed).name for seed in (1, 2, 3)]
    experts += [
        lora(base, folder / f"part{seed}", seed=seed, r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"]).name for seed in (4, 5)
    ]
    world = World(folder, experts)
    merge_here(world, folder / "undisturbed")
    world.wanted[MERGED] = weights(folder / "undisturbed")
    if workspace:
        write_tasks(folder, "ab")
        teach(make_workspace(folder / "before", base, method="linear", scoring__batch_size=8), folder, "a")
        done = shutil.copytree(folder / "before", folder / "after")
        teach(done, folder, "b")
        world.wanted[STAGE] = essence(done)
    return world


def merge_here(world: World, out: Path, **changes: Any) -> None:
    from recall_merge import MergeRun, merge

    entries = [{"name": name, "path": str(world.folder / name), "same_base": True} for name in world.experts]
    told = {"path": str(out), "overwrite": True, "shard_size": 40_000, "reload": False} | changes
    merge(MergeRun.model_validate({"base": str(world.folder / "base"), "experts": entries, "method": "ties", "out": told, "threads": 1}))


def learn_here(world: World, out: Path) -> None:
    from recall_merge.files.workspace import read_state
    from workspaces import teach

    if len(read_state(out).stages) < 2:
        teach(out, world.folder, "b")


WORK: dict[str, Callable[[World, Path], None]] = {MERGED: merge_here, STAGE: learn_here}


def prepare(world: World, work: str, out: Path) -> None:
    """What stands in the place before the work begins."""
    shutil.copytree(world.folder / ("full1" if work == MERGED else "before"), out)


def weights(folder: Path) -> dict[str, str]:
    from workspaces import tree

    found = tree(folder)
    return {name: digest for name, digest in found.items() if name not in {"record.json", "README.md"}}  # which tell the time


def judge(world: World, work: str, out: Path, injected: bool, words: str = "") -> Outcome:
    """Look at what a fault left, ask for the work again, and look at that."""
    from recall_merge.errors import RecallError
    from recall_merge.recipes.verify import verify
    from recall_merge.recipes.workspace import status
    from workspaces import essence

    if work == MERGED:
        old, new = weights(world.folder / "full1"), world.wanted[MERGED]
        between = out.with_name(f"{out.name}.replaced.partial")  # a kill between two renames: the next run puts it back
        found = weights(out if out.exists() else between) if out.exists() or between.exists() else {}
        found.pop(".recall-unfinished", None)
        if found not in (new, old):
            return Outcome(injected, survived=False, lost=True, words=f"{words}: {sorted(found)}")
        WORK[work](world, out)
        with suppress(RecallError):
            verify(out)
            return Outcome(injected, wrong=weights(out) != new, survived=not list(out.parent.glob(f"{out.name}*.partial")), words=words)
        return Outcome(injected, survived=False, wrong=True, words=words)
    try:
        status(out)
        WORK[work](world, out)
    except RecallError as error:
        return Outcome(injected, survived=False, lost=True, words=str(error))
    return Outcome(injected, wrong=essence(out) != world.wanted[STAGE], words=words)


# ---- faults


def on_changes(under: Path, heard: Callable[[int], None]) -> None:
    """Call `heard` just before each change of a file or folder below a place; what it raises takes the place of the change."""
    numbers, start = itertools.count(), str(under)
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def listen(event: str, given: tuple[Any, ...]) -> None:
        change = event in {"os.rename", "os.remove", "os.mkdir", "os.rmdir"} or (event == "open" and int(given[2] or 0) & writing)
        if change and str(given[0]).startswith(start):
            heard(next(numbers))

    sys.addaudithook(listen)


def kill_at(number: int) -> Callable[[int], None]:
    return lambda now: os.kill(os.getpid(), signal.SIGKILL) if now == number else None


def fail_at(number: int, code: int, times: int = 1) -> Callable[[int], None]:
    def heard(now: int) -> None:
        if number <= now < number + times:
            raise OSError(code, os.strerror(code))

    return heard


def child(world: World, work: str, out: Path, fault: str, seed: int, told: Any) -> None:
    """In a process of its own: do the work under a fault, and tell how that ended."""
    import torch

    from recall_merge.errors import RecallError

    torch.set_num_threads(1)
    draws = random.Random(seed)
    at = draws.randrange(world.changes.get(work, 1))
    real_fsync, real_read, real_time = os.fsync, os.preadv, time.time
    calls = itertools.count()
    injected = [False]

    def failing(real: Callable[..., Any], every: int) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            if next(calls) == every:
                injected[0] = True
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*given)

        return call

    def noticed(heard: Callable[[int], None]) -> Callable[[int], None]:
        def call(now: int) -> None:
            try:
                heard(now)
            except OSError:
                injected[0] = True
                raise

        return call

    match fault:
        case "count":
            seen = [0]
            on_changes(out.parent, lambda now: seen.__setitem__(0, now + 1))
            WORK[work](world, out)
            told.put(("done", seen[0]))
            return
        case "killed before a change of a file":
            on_changes(out.parent, kill_at(at))
        case "killed at any time":
            pass
        case "disk full at a change of a file":
            on_changes(out.parent, noticed(fail_at(at, errno.ENOSPC)))
        case "disk broken from a change on":
            on_changes(out.parent, noticed(fail_at(at, errno.EIO, times=10**9)))
        case "disk full in the middle of a write":
            resource.setrlimit(resource.RLIMIT_FSIZE, (draws.randrange(1, 40_000), resource.RLIM_INFINITY))
            injected[0] = True
        case "fsync fails":
            os.fsync = failing(real_fsync, draws.randrange(12))
        case "a read fails":
            os.preadv = failing(real_read, draws.randrange(120))  # type: ignore[assignment]
        case "the clock runs backwards":
            start = real_time()
            time.time = lambda: 2 * start - real_time() - 1000
            injected[0] = True
        case "an input is replaced meanwhile" | "an input is cut short meanwhile" | "an input has a bit turned meanwhile":
            place = sorted((world.folder / draws.choice(world.experts)).glob("*.safetensors"))[0]

            def meddle(now: int) -> None:
                if now == max(1, at) and not injected[0]:
                    injected[0] = True
                    data = bytearray(place.read_bytes())
                    if "cut" in fault:
                        os.truncate(place, len(data) // 2)
                    elif "bit" in fault:
                        data[-1 - draws.randrange(100)] ^= 1
                        place.write_bytes(data)
                    else:
                        other = place.with_name("other")
                        other.write_bytes(bytes(data[:-100]) + bytes(100))
                        other.replace(place)

            on_changes(out.parent, meddle)
    try:
        WORK[work](world, out)
    except RecallError as error:
        told.put((injected[0], "refused", str(error.faults[0].what)))
    except OSError as error:
        told.put((injected[0], "refused" if work == STAGE else "raw", repr(error)))  # of a workspace's commands: `recall` puts it in words
    else:
        told.put((injected[0], "done", ""))


FAULTS = {
    "killed before a change of a file": (MERGED, STAGE),
    "killed at any time": (MERGED, STAGE),
    "disk full at a change of a file": (MERGED, STAGE),
    "disk broken from a change on": (MERGED, STAGE),
    "disk full in the middle of a write": (MERGED, STAGE),
    "fsync fails": (MERGED, STAGE),
    "a read fails": (MERGED,),
    "the clock runs backwards": (MERGED, STAGE),
    "an input is replaced meanwhile": (MERGED,),
    "an input is cut short meanwhile": (MERGED,),
    "an input has a bit turned meanwhile": (MERGED,),
}


def inject(processes: Any, world: World, work: str, fault: str, seed: int, seconds: float) -> Outcome:
    """One fault: in a world of its own where inputs are meddled with."""
    with tempfile.TemporaryDirectory(dir=world.folder, prefix="weird ünï 模型 ") as place:
        out, here = Path(place) / "out" / "result", world
        if "input" in fault:
            shutil.copytree(world.folder / "base", Path(place) / "base")
            for name in world.experts:
                shutil.copytree(world.folder / name, Path(place) / name)
            here = World(Path(place), world.experts, world.wanted, world.changes)
        out.parent.mkdir()
        prepare(world, work, out)
        told = processes.Queue()
        process = processes.Process(target=child, args=(here, work, out, fault, seed, told))
        process.start()
        if fault == "killed at any time":
            time.sleep(random.Random(seed).random() * seconds)
            process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            return judge(world, work, out, injected=True, words="killed")
        if process.exitcode:
            return Outcome(True, survived=False, words=f"ended with status {process.exitcode}")
        injected, how, words = told.get()
        if how == "raw":
            return Outcome(injected, survived=False, words=words)
        if "input" in fault and injected and how == "done":
            late = weights(out) == world.wanted[MERGED]  # after everything was read, and compared with what it was
            return Outcome(True, survived=late, wrong=not late, words="the change went unnoticed")
        return judge(world, work, out, injected, words)


@contextmanager
def started(folder: Path, *, workspace: bool = True) -> Iterator[tuple[Any, World]]:
    """Processes that have all imports behind them, and a world whose work is measured."""
    world = make_world(folder, workspace=workspace)
    processes = multiprocessing.get_context("forkserver")
    modules = ["torch", "transformers", "peft", "recall_merge.recipes.merge", "recall_merge.recipes.workspace"]
    processes.set_forkserver_preload([*modules, *(["trl.trainer.sft_trainer", "lm_eval.models.huggingface"] if workspace else [])])
    for work in world.wanted:
        out = folder / f"count-{len(work)}" / "result"
        out.parent.mkdir()
        prepare(world, work, out)
        told = processes.Queue()
        process = processes.Process(target=child, args=(world, work, out, "count", 0, told))
        process.start()
        world.changes[work] = told.get()[1]
        process.join()
    yield processes, world


def two_at_once(world: World, folder: Path) -> Outcome:
    """Two commands that write one result at the same time, started again and again by different lags: one does it, or both in turn."""
    code = "import sys; sys.path[:0] = sys.argv[1:3]; import torture, pathlib; w = torture.World(pathlib.Path(sys.argv[3]), sys.argv[5:])"
    code += "; torture.merge_here(w, pathlib.Path(sys.argv[4]))"
    out = folder / "result"
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "src")]
    command = [sys.executable, "-c", code, *paths, str(world.folder), str(out), *world.experts]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    ended = [process.returncode for process in both]
    refused = all(code == 0 or "another process is writing this result" in words for code, words in zip(ended, said, strict=True))
    whole = out.exists() and weights(out) == world.wanted[MERGED]
    return Outcome(True, survived=refused and 0 in ended, wrong=not whole, words=" | ".join(words[-200:] for words in said))


def torture(minutes: float, seed: int) -> int:
    end, rows = time.monotonic() + 60 * minutes, Counter[tuple[str, str, str]]()
    spent: Counter[tuple[str, str]] = Counter()
    draws = random.Random(seed)
    bad = []
    with tempfile.TemporaryDirectory() as place, started(Path(place) / "world") as (processes, world):
        kinds = [(fault, work) for fault, works in FAULTS.items() for work in works]
        for number in itertools.count():
            fault, work = kinds[number % len(kinds)]
            if time.monotonic() > end:
                break
            one, begun = draws.randrange(2**31), time.monotonic()
            outcome = inject(processes, world, work, fault, one, 0.4 if work == MERGED else 3.0)
            spent[fault, work] += time.monotonic() - begun  # type: ignore[assignment]
            for name, count in (("faults", outcome.injected), ("survived", outcome.injected and outcome.survived)):
                rows[fault, work, name] += count
            rows[fault, work, "lost"] += outcome.lost
            rows[fault, work, "wrong"] += outcome.wrong
            if outcome.lost or outcome.wrong or not outcome.survived:
                bad.append(f"seed {one}, {fault}, {work}: {outcome.words}")
        print(f"{'fault':40} {'during':26} {'injected':>8} {'survived':>8} {'data lost':>9} {'wrong results':>13} {'seconds':>8}")
        for fault, work in kinds:
            cells = [rows[fault, work, name] for name in ("faults", "survived", "lost", "wrong")]
            print(f"{fault:40} {work:26} {cells[0]:8} {cells[1]:8} {cells[2]:9} {cells[3]:13} {spent[fault, work]:8.0f}")
        total = [sum(count for (_, _, name), count in rows.items() if name == wanted) for wanted in ("faults", "survived", "lost", "wrong")]
        print(f"{'all':40} {f'seed {seed}':26} {total[0]:8} {total[1]:8} {total[2]:9} {total[3]:13} {sum(spent.values()):8.0f}")
    print(*bad, sep="\n", end="\n" if bad else "")
    return int(bool(bad))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {
            "HF_HOME": home,
            "XDG_CACHE_HOME": home,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
        }
        sys.exit(torture(given.minutes, given.seed))
