"""Whole processes, run in turn: their time, and the most anonymous memory that they and their children held at once.

Anonymous memory is RssAnon of /proc/PID/status: what a process has allocated and touched, without the pages of files that it reads or has
mapped. It is summed over the process and all below it every 10 ms, so a peak of less than that can be missed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
INTERVAL = 0.01  # seconds between looks at the memory
GB = 1e9


@dataclass(frozen=True)
class Run:
    """One process.

    Attributes:
        wall, cpu: seconds; cpu of the children too.
        anonymous: bytes at the peak.
        told: what it printed as JSON, if it did.
        err: what it said on the other stream.
    """

    wall: float
    cpu: float
    anonymous: int
    told: Mapping[str, Any] = field(default_factory=dict)
    err: str = ""

    @property
    def seconds(self) -> float:
        """Of the work itself, where the process told them (after its imports); else of the whole process."""
        return self.told.get("seconds", self.wall)

    @property
    def processor(self) -> float:
        """Seconds of processor time of the same, of all threads."""
        return self.told.get("cpu", self.cpu)


@dataclass(frozen=True)
class Side:
    """One of those that run in turn; `out` is what it makes, which is removed before each run."""

    run: Callable[[], Run]
    out: Path | None = None


@dataclass(frozen=True)
class Bench:
    """What all benchmarks are told.

    Attributes:
        work: folder for inputs and results; git ignores the default.
        rounds: pairs of runs, after one that warms up.
        quick: small shapes, one round and one process, to see that everything works; the figures mean nothing.
        peer: the peer's Python, or None to leave it out.
        slow_peer: the same, for what takes it minutes.
    """

    work: Path
    rounds: int
    quick: bool = False
    peer: Path | None = None
    slow_peer: Path | None = None

    def inside(self, module: str, job: Mapping[str, Any]) -> Run:
        """`do(job)` of a module here, in a process of its own that times itself after its imports."""
        if self.quick:
            return here(lambda: import_module(f"benchmarks.{module}").do(job))
        return run([sys.executable, "-m", f"benchmarks.{module}", json.dumps(job)])

    def recall(self, *words: str | Path) -> Run:
        """The command with these words, a whole process."""
        if self.quick:
            return here(lambda: _command([str(word) for word in words]))
        return run([sys.executable, "-m", "recall_merge", *words])

    def inside_peer(self, job: Mapping[str, Any]) -> Run:
        """The same in the peer's Python."""
        return run([self.peer, ROOT / "benchmarks" / "peer.py", json.dumps(job)])

    def in_turn(self, sides: Mapping[str, Side | None], rounds: int | None = None) -> dict[str, list[Run]]:
        """Every side once, again and again; the first round only warms up. Sides that are None are left out."""
        rounds = 1 if self.quick else rounds or self.rounds
        present = {name: side for name, side in sides.items() if side is not None}
        runs: dict[str, list[Run]] = {name: [] for name in present}
        for number in range(rounds if self.quick else rounds + 1):
            for name, side in present.items():
                remove(side.out)
                if not self.quick:
                    os.sync()  # what the one before has written is not left for this one to wait for
                found = side.run()
                if self.quick or number:
                    runs[name].append(found)
                    print(
                        f"   {name}: {found.seconds:.2f} s, {found.processor:.2f} of a processor, {found.anonymous / GB:.2f} GB",
                        file=sys.stderr,
                        flush=True,
                    )
        return runs


def run(command: Sequence[str | Path]) -> Run:
    """Run a command to its end.

    Raises:
        RuntimeError: if it fails; with what it said.
    """
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        process = subprocess.Popen([str(word) for word in command], stdout=out, stderr=err, cwd=ROOT, env=env)
        with _watched(process.pid) as peak:
            _, status, usage = os.wait4(process.pid, 0)
            wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), err.seek(0)
        printed, said = out.read().decode(errors="replace"), err.read().decode(errors="replace")
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))[:500]} ended with status {process.returncode}\n{printed[-2000:]}\n{said[-2000:]}")
    told: dict[str, Any] = {}
    with contextlib.suppress(ValueError):
        told = json.loads(printed)
    return Run(wall, usage.ru_utime + usage.ru_stime, peak(), told if isinstance(told, dict) else {}, said)


def here(work: Callable[[], dict[str, Any]]) -> Run:
    """The same inside this process, which has its libraries loaded: for --quick."""
    with _watched(os.getpid()) as peak:
        start, cpu = time.perf_counter(), time.process_time()
        told = work()
        return Run(time.perf_counter() - start, time.process_time() - cpu, peak(), told)


def _command(words: list[str]) -> dict[str, Any]:
    from recall_merge.cli.app import app

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        app(words, prog_name="recall", standalone_mode=False)
    return json.loads(printed.getvalue()) if "--json" in words else {}


def ratios(one: Sequence[Run], other: Sequence[Run]) -> list[float]:
    """Time of the one over that of the other, pair by pair."""
    return [a.seconds / b.seconds for a, b in zip(one, other, strict=True)]


def remove(place: Path | None) -> None:
    if place is not None:
        shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def _watched(pid: int) -> Iterator[Callable[[], int]]:
    """Looks at the memory of a process until the context ends; gives a function that tells the peak so far."""
    peak, done = 0, threading.Event()

    def threshold_finder() -> None:
        nonlocal peak
        while True:
            peak = max(peak, _anonymous(pid))
            if done.wait(INTERVAL):
                return

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield lambda: peak
    finally:
        done.set()
        watcher.join()


def _anonymous(pid: int) -> int:
    """Bytes of anonymous memory of a process and all below it; what has just ended counts 0."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = [child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    except OSError:
        return 0
    own = next((int(row.split()[1]) * 1024 for row in status.splitlines() if row.startswith("RssAnon:")), 0)
    return own + sum(_anonymous(int(child)) for child in children)
