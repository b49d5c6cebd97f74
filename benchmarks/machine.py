"""How fast one core of this machine reads and writes a file in the page cache, hashes, and does the arithmetic of a merge."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import torch
from blake3 import blake3

from benchmarks.bars import Figure
from benchmarks.measure import Bench

SPAN = 1 << 19  # numbers at a time, as in a merge
PIECE = 1 << 20  # bytes at a time


def measure(bench: Bench) -> Iterator[Figure]:
    size = PIECE * (4 if bench.quick else 512)
    path, piece = bench.work / "machine.bytes", os.urandom(PIECE)
    buffer = bytearray(PIECE)

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            for _ in range(size // PIECE):
                file.write(piece)

    def read() -> None:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    def digest() -> None:
        hashed = blake3()
        for _ in range(size // PIECE):
            hashed.update(buffer)

    stored = [torch.randn(SPAN).bfloat16() for _ in range(2)]
    base, total = stored[0].float(), torch.zeros(SPAN)

    def arithmetic() -> None:
        for _ in range(size // PIECE):
            total.add_(stored[1].float().sub_(base), alpha=0.5)

    for work, job in {"written": write, "read": read, "hashed by BLAKE3": digest}.items():
        speeds = [size / 1e9 / seconds for seconds in times(job, bench)]
        yield Figure(None, f"{size / 1e6:.0f} MB", speeds, work=f"{work}, page cache, one core", unit="GB/s")
    if buffer != piece:
        raise AssertionError("the bytes read are not those written")
    each = [seconds / (size // PIECE) / SPAN * 1e9 for seconds in times(arithmetic, bench)]
    yield Figure(None, "one expert, bfloat16", each, work="widened, subtracted, weighted and added, one core", unit="ns per number")
    path.unlink()


def times(job: Callable[[], None], bench: Bench) -> list[float]:
    """Processor seconds of each round, without the first, which warms up."""
    seconds = []
    for _ in range(2 if bench.quick else bench.rounds + 1):
        start = time.thread_time()
        job()
        seconds.append(time.thread_time() - start)
    return seconds[1:]
