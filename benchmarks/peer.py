"""mergekit inside one process of its own Python: a tiny merge loads all libraries first, then the job is timed.

.venv-mergekit/bin/python benchmarks/peer.py '{"run": "run.yaml", "out": "merged", "warm": "tiny.yaml"}'
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions


def merge(run: str, out: str) -> tuple[float, float]:
    """Merge as `mergekit-yaml RUN OUT` does with its defaults.    -> seconds, processor seconds"""
    text = Path(run).read_text()
    options = MergeOptions()
    options.apply_global_options()
    start, cpu = time.perf_counter(), time.process_time()
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), out, options, config_source=text)
    return time.perf_counter() - start, time.process_time() - cpu


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory() as warm, open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):  # noqa: PTH123
        merge(job["warm"], f"{warm}/out")
        seconds, cpu = merge(job["run"], job["out"])
    print(json.dumps({"seconds": seconds, "cpu": cpu}))
