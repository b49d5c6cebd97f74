"""Time of every method relative to `linear`, on one thread: python -m benchmarks.methods [--size 4096] [--experts 3] [--dense] [methods]

Methods that take low-rank factors get experts of rank 16 (and statistics of 24 directions, where they use them). With --dense they also get
dense deltas, which takes minutes at 4096 (singular value decompositions). Every result is checked to be finite. Times are processor
seconds, the best of three runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.bars import Figure
from benchmarks.measure import Bench
from recall_merge.maths.deltas import LowRank
from recall_merge.maths.methods import METHODS, Draws, Method
from recall_merge.maths.moments import Moment


def best(work: Callable[[], torch.Tensor], runs: int = 3) -> float:
    times = []
    for _ in range(runs):
        start = time.thread_time()
        merged = work()
        times.append(time.thread_time() - start)
        assert merged.isfinite().all()
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=list(METHODS))
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--dense", action="store_true")
    args = parser.parse_args()

    print(f"{args.size} x {args.size} float32, {args.experts} experts, 1 thread, torch {torch.__version__}")
    print(f"{'method':18} {'experts':>12} {'ms':>9} {'/ linear':>9}")
    for name, kind, seconds, relative in times(args.methods, size=args.size, experts=args.experts, dense=args.dense):
        print(f"{name:18} {kind:>12} {seconds * 1e3:9.1f} {relative:9.1f}", flush=True)


def measure(bench: Bench) -> Iterator[Figure]:
    size = 64 if bench.quick else 4096
    case = f"{size} x {size} float32, 1 thread"
    for name, kind, seconds, relative in times(list(METHODS), size=size):
        yield Figure(None, f"{case}, {kind}", [relative], [seconds], work=f"`{name}` against `linear`", unit="x the time")


def times(names: Sequence[str], *, size: int, experts: int = 3, dense: bool = False) -> Iterator[tuple[str, str, float, float]]:
    """Yield (method, experts, seconds, seconds over those of linear)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    n = size
    base = torch.randn(n, n, generator=generator)
    deltas = [torch.randn(n, n, generator=generator) * 0.01 for _ in range(experts)]
    moments = [Moment(torch.randn(n, 24, generator=generator), torch.rand(n, generator=generator)) for _ in range(experts)]
    low = [LowRank(torch.randn(n, 16, generator=generator), torch.randn(16, n, generator=generator) * 0.01) for _ in range(experts)]

    def timed(method: Method, experts: list) -> float:
        k = min(len(experts), method.experts[1] or len(experts))
        more: dict[str, Any] = {"draws": Draws(0, "w", tuple(map(str, range(k))))} if method.random else {}
        if method.informed:
            more["moments"] = moments[:k]
        return best(lambda: method.function(base, experts[:k], [1 / k] * k, **more), runs=1 if method.factors and experts is deltas else 3)

    linear = timed(METHODS["linear"], deltas)
    for name in names:
        method = METHODS[name]
        for kind, changes in [("rank 16", low), *([("dense", deltas)] if dense else [])] if method.factors else [("dense", deltas)]:
            seconds = timed(method, changes)
            yield name, f"{min(experts, method.experts[1] or experts)} {kind}", seconds, seconds / linear
    torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
