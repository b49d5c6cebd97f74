"""Run whole processes in turn and measure their time and peak anonymous memory, children included.

Anonymous memory is RssAnon of /proc/PID/status: what a process has allocated and touched, without the pages of files that it reads or
maps. It is summed over the process and its children every 10 ms, so a shorter peak can be missed.
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
INTERVAL = 0.01  # seconds between samples of the memory
GB = 1e9


@dataclass(frozen=True)
class Run:
    """One process that has ended.

    Attributes:
        wall, cpu: seconds; cpu includes the children.
        anonymous: bytes at the peak.
        output: the JSON object that it printed on stdout, if it did.
        err: what it printed on stderr.
    """

    wall: float
    cpu: float
    anonymous: int
    output: Mapping[str, Any] = field(default_factory=dict)
    err: str = ""

    @property
    def seconds(self) -> float:
        """Of the work itself, where the process printed them (after its imports); otherwise of the whole process."""
        return self.output.get("seconds", self.wall)

    @property
    def processor(self) -> float:
        """Processor seconds of the same, over all threads."""
        return self.output.get("cpu", self.cpu)


@dataclass(frozen=True)
class Side:
    """One of the commands that run in turn; `out` is the folder that it makes, removed before each run."""

    run: Callable[[], Run]
    out: Path | None = None


@dataclass(frozen=True)
class Bench:
    """The settings of all benchmarks.

    Attributes:
        work: folder for inputs and results; git ignores the default.
        rounds: pairs of runs, after one that warms up.
        quick: small shapes, one round and one process, to see that everything works; the figures mean nothing.
        peer: mergekit's Python, or None to leave it out.
        slow_peer: the same, for merges that take it minutes.
    """

    work: Path
    rounds: int
    quick: bool = False
    peer: Path | None = None
    slow_peer: Path | None = None

    def inside(self, module: str, job: Mapping[str, Any]) -> Run:
        """`do(job)` of a module of this package, in a process of its own that times itself after its imports."""
        if self.quick:
            return here(lambda: import_module(f"benchmarks.{module}").do(job))
        return run([sys.executable, "-m", f"benchmarks.{module}", json.dumps(job)])

    def recall(self, *words: str | Path) -> Run:
        """The command `recall` with these arguments, as a whole process."""
        if self.quick:
            return here(lambda: _command([str(word) for word in words]))
        return run([sys.executable, "-m", "recall_merge", *words])

    def inside_peer(self, job: Mapping[str, Any]) -> Run:
        """A merge in mergekit's Python, timed after its imports."""
        assert self.peer is not None
        return run([self.peer, ROOT / "benchmarks" / "peer.py", json.dumps(job)])

    def in_turn(self, sides: Mapping[str, Side | None], rounds: int | None = None) -> dict[str, list[Run]]:
        """Run every side once per round; the first round only warms up. Sides that are None are left out."""
        rounds = 1 if self.quick else rounds or self.rounds
        present = {name: side for name, side in sides.items() if side is not None}
        runs: dict[str, list[Run]] = {name: [] for name in present}
        for number in range(rounds if self.quick else rounds + 1):
            for name, side in present.items():
                remove(side.out)
                if not self.quick:
                    os.sync()  # so that no side waits for what the one before it wrote
                done = side.run()
                if self.quick or number:
                    runs[name].append(done)
                    figures = f"{done.seconds:.2f} s, {done.processor:.2f} processor s, {done.anonymous / GB:.2f} GB"
                    print(f"   {name}: {figures}", file=sys.stderr, flush=True)
        return runs


def run(command: Sequence[str | Path]) -> Run:
    """Run a command to its end.

    Raises:
        RuntimeError: if it fails, with what it printed.
    """
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # installed packages are compiled: so is ours
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        process = subprocess.Popen([str(word) for word in command], stdout=out, stderr=err, cwd=ROOT, env=env)
        with _watched(process.pid) as peak:
            _, status, usage = os.wait4(process.pid, 0)
            wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        for stream in (out, err):
            stream.seek(0)
        stdout, stderr = out.read().decode(errors="replace"), err.read().decode(errors="replace")
    if process.returncode:
        raise RuntimeError(
            f"{' '.join(map(str, command))[:500]} ended with status {process.returncode}\n{stdout[-2000:]}\n{stderr[-2000:]}"
        )
    output: Any = None
    with contextlib.suppress(ValueError):
        output = json.loads(stdout)
    return Run(wall, usage.ru_utime + usage.ru_stime, peak(), output if isinstance(output, dict) else {}, stderr)


def here(work: Callable[[], dict[str, Any]]) -> Run:
    """The same inside this process, where all libraries are loaded: for --quick."""
    with _watched(os.getpid()) as peak:
        start, cpu = time.perf_counter(), time.process_time()
        output = work()
        return Run(time.perf_counter() - start, time.process_time() - cpu, peak(), output)


def _command(words: list[str]) -> dict[str, Any]:
    from recall_merge.cli.app import app

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        app(words, prog_name="recall", standalone_mode=False)
    return json.loads(printed.getvalue()) if "--json" in words else {}


def ratios(one: Sequence[Run], other: Sequence[Run]) -> list[float]:
    """Time of one over that of the other, pair by pair."""
    return [a.seconds / b.seconds for a, b in zip(one, other, strict=True)]


def remove(folder: Path | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _watched(pid: int) -> Iterator[Callable[[], int]]:
    """Sample the memory of a process until the context ends; yields a function that returns the peak so far."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, _anonymous(pid))
            if done.wait(INTERVAL):
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: peak
    finally:
        done.set()
        watcher.join()


def _anonymous(pid: int) -> int:
    """Bytes of anonymous memory of a process and its children; a process that has just ended counts 0."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = [child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    except OSError:
        return 0
    own = next((int(row.split()[1]) * 1024 for row in status.splitlines() if row.startswith("RssAnon:")), 0)
    return own + sum(_anonymous(int(child)) for child in children)
