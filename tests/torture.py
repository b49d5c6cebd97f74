"""Faults of every kind, one after another, until the time is over; after each the result is asked for again and compared, byte by byte.

    make torture [MINUTES=10]            or: python tests/torture.py --minutes 10 --seed 0

A fault is survived if what went wrong was said in words of ours (or the process was killed), nothing looks finished that is not, what
stood in the output's place stands, and the same work asked for again gives the bytes of a run that nothing disturbed. Data lost: what
stood before is damaged or gone. Wrong results: something that verifies, and has other bytes. Every line can be had again by its seed.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import itertools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "src")]

from disturbed import LONG, MERGED, MERGES, SECONDS, STAGE, WALKED, WORK, Outcome, World, judge, make_world, prepare, weights  # noqa: E402
from recall_merge.continual.places import KINDS  # noqa: E402
from recall_merge.runtime.lock import HOLDER  # noqa: E402

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


def on_reads(under: Path, heard: Callable[[], None]) -> None:
    """The same for each file below a place that is opened to be read."""

    def listen(event: str, given: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(given[0], str) and given[0].startswith(str(under)) and not int(given[2] or 0) & os.O_CREAT:
            heard()

    sys.addaudithook(listen)


def without_rights() -> None:
    """Root is bound by the permissions of files no less than others from now on: it gives its capabilities up."""
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() == 0 and libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)):
        raise OSError(ctypes.get_errno(), "the capabilities cannot be given up")


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

    from recall_merge.runtime.errors import RecallError, is_out_of_memory

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
        case "killed at any time" | "two at once" | "two at once, the lock deleted" | "a folder is a link" | "the output is a mount point":
            injected[0] = True
        case "a folder may not be written to":
            without_rights()
            injected[0] = True
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
        case "a file cannot be opened":
            on_reads(world.folder, failing(lambda: None, draws.randrange(60)))
        case "the clock runs backwards":
            start = real_time()
            time.time = lambda: 2 * start - real_time() - 1000
            injected[0] = True
        case "little memory":
            taken = resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (taken + draws.randrange(10**6, 10**8), resource.RLIM_INFINITY))
            injected[0] = True
        case (
            "an input is replaced meanwhile"
            | "an input is cut short meanwhile"
            | "an input has a bit turned meanwhile"
            | "an input of rows is replaced meanwhile"
        ):
            place = sorted((world.folder / draws.choice(world.experts)).glob("*.safetensors"))[0]
            if "rows" in fault:
                place = world.folder / "rows.jsonl"

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
        case "something comes to stand in the output's place" | "a file comes into the output's place":

            def intrude(now: int) -> None:
                if now >= at and out.is_dir() and not injected[0]:
                    injected[0] = True
                    if "something" in fault:
                        out.rename(out.with_name("moved away by the user"))
                        out.mkdir()
                    (out / MINE).write_text(MINE)

            on_changes(out.parent, intrude)
    try:
        WORK[work](world, out)
    except RecallError as error:
        told.put((injected[0], "refused", str(error.faults[0].what)))
    except Exception as error:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        in_words = isinstance(error, OSError) and work in LONG  # by `recall`
        in_words |= fault == "little memory" and is_out_of_memory(error)
        told.put((injected[0], "refused" if in_words else "raw", repr(error)))
    else:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        told.put((injected[0], "done", ""))


ALL = (*MERGES, *LONG)
FAULTS = {
    "killed before a change of a file": ALL,
    "killed at any time": ALL,
    "disk full at a change of a file": ALL,
    "disk broken from a change on": ALL,
    "disk full in the middle of a write": ALL,
    "fsync fails": ALL,
    "a read fails": MERGES,
    "a file cannot be opened": MERGES,
    "the clock runs backwards": ALL,
    "an input is replaced meanwhile": MERGES,
    "an input is cut short meanwhile": MERGES,
    "an input has a bit turned meanwhile": MERGES,
    "an input of rows is replaced meanwhile": (WALKED,),
    "little memory": MERGES,
    "a folder may not be written to": (MERGED, STAGE),
    "two at once": (MERGED, STAGE),
    "two at once, the lock deleted": (STAGE,),
    "something comes to stand in the output's place": MERGES,
    "a file comes into the output's place": MERGES,
    "the output is a mount point": (MERGED,),
    "a folder is a link": (STAGE,),
}
MINE = "mine.partial"  # a file of the user's, and what is in it
AT_ONCE = ("two at once", "two at once, the lock deleted")
IN_USE = ("another process is writing this result", "the workspace is in use by")


def inject(processes: Any, world: World, work: str, fault: str, seed: int) -> Outcome:
    """One fault: in a world of its own where inputs are meddled with."""
    with tempfile.TemporaryDirectory(dir=world.folder, prefix="weird ünï 模型 ") as place:
        out, here = Path(place) / "out" / "result", world
        if "input" in fault:
            for name in ("base", *world.experts):
                shutil.copytree(world.folder / name, Path(place) / name)
            shutil.copy(world.folder / "rows.jsonl", place)
            here = World(Path(place), world.experts, world.wanted, world.changes)
        out.parent.mkdir()
        prepare(world, work, out)
        if fault == "a folder is a link":
            return _behind_a_link(processes, here, out, seed)
        if fault == "the output is a mount point":
            return _mounted(processes, here, out, seed)
        closed = out.parent if work in MERGES else out
        if "written to" in fault:
            closed.chmod(0o555)
        told = processes.Queue()
        started = [processes.Process(target=child, args=(here, work, out, fault, seed, told)) for _ in range(1 + (fault in AT_ONCE))]
        for process in started:
            process.start()
            deadline = time.monotonic() + 10
            while fault.endswith("lock deleted") and process is started[0] and time.monotonic() < deadline:
                with suppress(FileNotFoundError):
                    (out / HOLDER).unlink()
                    break
                time.sleep(0.001)
        if fault == "killed at any time":
            time.sleep(random.Random(seed).random() * SECONDS[work])
            started[0].kill()
        for process in started:
            process.join()
        closed.chmod(0o755)
        if started[0].exitcode == -signal.SIGKILL or (fault == "little memory" and started[0].exitcode == -signal.SIGABRT):
            return judge(world, work, out, injected=True, words="killed")
        if any(process.exitcode for process in started):
            return Outcome(True, survived=False, words=f"ended with status {[process.exitcode for process in started]}")
        ends = [told.get() for _ in started]
        injected, how, words = ends[0]
        if fault in AT_ONCE:
            both = [words.startswith(IN_USE) or how == "done" for _, how, words in ends]
            if not all(both) or not any(how == "done" for _, how, _ in ends):
                return Outcome(True, survived=False, words=str(ends))
        if "written to" in fault and how == "done":
            return Outcome(True, survived=False, words="it was written to")
        if how == "raw":
            return Outcome(injected, survived=False, words=words)
        if "output's place" in fault and injected:
            return _intruded(world, work, out, how, words)
        if "input" in fault and injected and how == "done":
            late = weights(out) == world.wanted[work]  # after everything was read, and compared with what it was
            return Outcome(True, survived=late, wrong=not late, words="the change went unnoticed")
        return judge(world, work, out, injected, words)


def _intruded(world: World, work: str, out: Path, how: str, words: str) -> Outcome:
    """The user's file must be there still, wherever; and so must be the old model, unless the new one was in its place before."""
    kept = [file for file in out.parent.rglob(MINE) if file.read_text() == MINE]
    models = [weights(folder) for folder in out.parent.iterdir()]
    for model in models:
        model.pop(MINE, None)
    old, new = weights(world.folder / "full1") in models, world.wanted[work] in models
    return Outcome(True, survived=old or new, lost=not kept or not (old or new), wrong=how == "done" and not new, words=words)


def _behind_a_link(processes: Any, world: World, out: Path, seed: int) -> Outcome:
    """A workspace's folder leads to one of the user's: that is refused, nothing there is touched, and without the link all goes on."""
    kind = random.Random(seed).choice([*KINDS, "lock", "journal.jsonl"])
    place, mine, old = out / kind, out.parent / "mine", out.parent / "old"
    mine.mkdir()
    (mine / MINE).write_text(MINE)
    if place.exists():
        place.rename(old)
    place.symlink_to(mine if kind in KINDS else mine / MINE)
    told = processes.Queue()
    process = processes.Process(target=child, args=(world, STAGE, out, "a folder is a link", seed, told))
    process.start()
    process.join()
    _, how, words = told.get()
    lost = [path.name for path in mine.iterdir()] != [MINE] or (mine / MINE).read_text() != MINE
    if kind == "lock":  # it is replaced by a file: nothing depends on it
        return Outcome(True, survived=how == "done", lost=lost, words=words)
    place.unlink()
    if old.exists():
        old.rename(place)
    outcome = judge(world, STAGE, out, injected=True, words=f"{kind}: {words}")
    return replace(outcome, survived=outcome.survived and how == "refused", lost=outcome.lost or lost)


def _mounted(processes: Any, world: World, out: Path, seed: int) -> Outcome:
    """A volume is mounted at the output: that is said before any work."""
    shutil.rmtree(out)
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", str(out)], capture_output=True, check=False).returncode:
        return Outcome(False)
    try:
        told = processes.Queue()
        process = processes.Process(target=child, args=(world, MERGED, out, "the output is a mount point", seed, told))
        process.start()
        process.join()
        _, how, words = told.get()
        left = [*out.iterdir(), *(path for path in out.parent.iterdir() if path != out)]
        return Outcome(True, survived=how == "refused" and "mounted" in words and not left, words=words)
    finally:
        subprocess.run(["umount", str(out)], check=True)


@contextmanager
def started(folder: Path, works: Sequence[str] = ALL) -> Iterator[tuple[Any, World]]:
    """Processes that have all imports behind them, and a world whose work is measured."""
    world = make_world(folder, works)
    processes = multiprocessing.get_context("forkserver")
    modules = ["torch", "transformers.models.llama.modeling_llama", "peft", "sklearn.cluster"]
    modules += [f"recall_merge.{name}" for name in ("models.layerwise", "merging.layerwise", "merging.merge", "continual.workspace")]
    long = ["trl.trainer.sft_trainer", "lm_eval.models.huggingface", "recall_merge.bench.bench"]
    processes.set_forkserver_preload([*modules, *(long if {*works} & {*LONG} else [])])
    for work in works:
        out = folder / f"count {work}" / "result"
        out.parent.mkdir()
        prepare(world, work, out)
        told = processes.Queue()
        process = processes.Process(target=child, args=(world, work, out, "count", 0, told))
        process.start()
        world.changes[work] = told.get()[1]
        process.join()
    yield processes, world


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
            outcome = inject(processes, world, work, fault, one)
            spent[fault, work] += time.monotonic() - begun  # type: ignore[assignment]
            for name, count in (("faults", outcome.injected), ("survived", outcome.injected and outcome.survived)):
                rows[fault, work, name] += count
            rows[fault, work, "lost"] += outcome.lost
            rows[fault, work, "wrong"] += outcome.wrong
            if outcome.lost or outcome.wrong or not outcome.survived:
                bad.append(f"seed {one}, {fault}, {work}: {outcome.words}")
        print(f"{'fault':40} {'during':26} {'injected':>8} {'survived':>8} {'data lost':>9} {'wrong results':>13} {'seconds':>8}")
        for fault, work in kinds:
            jobs = [rows[fault, work, name] for name in ("faults", "survived", "lost", "wrong")]
            print(f"{fault:40} {work:26} {jobs[0]:8} {jobs[1]:8} {jobs[2]:9} {jobs[3]:13} {spent[fault, work]:8.0f}")
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
