"""recall-merge inside one process: a tiny merge loads all libraries first, then the job is timed.

python -m benchmarks.ours '{"do": "merge", "run": "run.yaml", "out": "merged", "warm": "tiny.yaml", "sets": {}}'
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch


def do(job: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds, and bytes read as counted by the library and by the system (which counts all files, also those that checks read)."""
    from recall_merge.files.safetensors import READ
    from recall_merge.interop.mergekit_run import load_any_run

    work, sets = JOBS[job["do"]], job.get("sets", {})
    with tempfile.TemporaryDirectory() as warm:
        work(load_any_run(Path(job["warm"]), sets | {"out.path": f"{warm}/out"}))
    run = load_any_run(Path(job["run"]), sets | {"out.path": job["out"]})
    counted, by_system = READ.total, _bytes_read()
    start, cpu = time.perf_counter(), time.process_time()
    work(run)
    seconds, used = time.perf_counter() - start, time.process_time() - cpu
    return {"seconds": seconds, "cpu": used, "read": READ.total - counted, "read_by_system": _bytes_read() - by_system}


def merge(run: Any) -> None:
    """Everything: plan, pass, checks, hashes, record."""
    from recall_merge import merge

    merge(run)


def pass_alone(run: Any) -> None:
    """The plan, and the pass that reads, merges and writes the weights.

    Off: hashes of inputs and output, the search for numbers that are not finite or far too large, the check of the result, record and
    model card, and the wait until the disk has everything.
    """
    from recall_merge.files.hashing import ModelDigest
    from recall_merge.files.output import WeightWriter
    from recall_merge.merging.merge import merge_into
    from recall_merge.merging.plan import make_plan
    from recall_merge.runtime.progress import Silent

    plan = make_plan(run.model_copy(update={"change_limit": None}))
    plan.target.mkdir(parents=True)
    unchecked = patch("recall_merge.merging.tensors.is_finite", lambda _: True)
    read, written = (patch(f"recall_merge.files.{module}.blake3", NoHash) for module in ("hashing", "output"))
    with read, written, unchecked, WeightWriter(plan.target, plan.shards) as writer:
        merge_into(writer, plan, ModelDigest(), {}, Silent())


class NoHash:
    """Stands in for a hash that is off."""

    def __init__(self, *_: object) -> None: ...

    def update(self, data: object) -> None: ...

    def hexdigest(self) -> str:
        return ""


JOBS: dict[str, Callable[[Any], None]] = {"merge": merge, "pass": pass_alone}


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])  # rchar: through read calls, from the page cache or not


if __name__ == "__main__":
    print(json.dumps(do(json.loads(sys.argv[1]))))
