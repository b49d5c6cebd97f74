"""python -m benchmarks [NAME ...] [--rounds 5] [--work runs/bench] [--quick] [--no-peer] [--no-slow-peer] [--resume]

Makes its inputs in the work folder, runs the benchmarks named (all by default), prints each figure beside its bar, and writes one JSON
file per benchmark into `results/` there, with machine and commit. `python -m benchmarks.page` makes tables of them for docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.bars import line
from benchmarks.measure import ROOT, Bench, run

NAMES = ("machine", "startup", "linear", "tensors", "recall", "ties", "large", "input_statistics", "cluster", "methods")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--rounds", type=int, default=5, help="pairs of runs, after one that warms up")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench", help="inputs, outputs and results; up to 40 GB")
    parser.add_argument("--quick", action="store_true", help="small shapes, one round, one process: only checks that everything works")
    parser.add_argument("--no-peer", action="store_true", help="leave mergekit out")
    parser.add_argument("--no-slow-peer", action="store_true", help="leave mergekit out where it takes minutes")
    parser.add_argument("--resume", action="store_true", help="skip benchmarks that have results of this commit")
    args = parser.parse_args()
    if wrong := set(args.names) - set(NAMES):
        parser.error(f"unknown: {', '.join(sorted(wrong))}; the benchmarks are {', '.join(NAMES)}")

    peer = ROOT / ".venv-mergekit" / "bin" / "python"
    if not args.no_peer and not peer.exists():
        print("mergekit is left out: scripts/mergekit_venv.sh installs it", file=sys.stderr)
    work = args.work.resolve()
    python = peer if peer.exists() and not args.no_peer else None
    bench = Bench(work, args.rounds, args.quick, python, None if args.no_slow_peer else python)
    (work / "results").mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # this process makes inputs and checks results; what is measured runs in processes of its own
    context = describe(bench)
    for name in args.names or NAMES:
        path = work / "results" / f"{name}.json"
        if args.resume and is_done(path, context["commit"]):
            print(f"== {name}: has results of {context['commit']}", flush=True)
            continue
        print(f"== {name}", flush=True)
        start, figures = time.perf_counter(), []
        for figure in import_module(f"benchmarks.{name}").measure(bench):
            figures.append(figure.as_json())
            print(line(figures[-1]), flush=True)
            write(path, {"benchmark": name, **context, "whole": False, "figures": figures})
        write(path, {"benchmark": name, **context, "whole": True, "seconds": time.perf_counter() - start, "figures": figures})


def write(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def is_done(path: Path, commit: str) -> bool:
    """Whether a benchmark has run to its end on this commit."""
    result = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return result.get("commit") == commit and result["whole"]


def describe(bench: Bench) -> dict[str, Any]:
    """What the figures depend on: commit, machine, versions."""
    from recall_merge.files.record import versions

    git = ("git", "-C", str(ROOT))
    commit, changed = (
        subprocess.run([*git, *words], capture_output=True, text=True, check=False).stdout.strip()
        for words in (("rev-parse", "--short=10", "HEAD"), ("status", "--porcelain", "src", "benchmarks"))
    )
    models = (row.partition(":")[2].strip() for row in Path("/proc/cpuinfo").read_text().splitlines() if row.startswith("model name"))
    machine = {"cores": len(os.sched_getaffinity(0)), "cpu": next(models, "")}
    machine |= {"memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "system": platform.release()}
    machine |= {"load": os.getloadavg()[0], "threads": os.environ.get("OMP_NUM_THREADS", "")}
    peer_versions = (
        "import json, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in ('mergekit', 'torch', 'transformers')}))"
    )
    return {
        "commit": f"{commit}{' and changes' if changed else ''}",
        "quick": bench.quick,
        "rounds": bench.rounds,
        "machine": machine,
        "versions": versions(),
        "peer": dict(run([bench.peer, "-c", peer_versions]).output) if bench.peer else {},
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


if __name__ == "__main__":
    main()
