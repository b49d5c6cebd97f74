"""What this process tells others and finds around it: no telemetry unless it is asked for, and a home where there is none."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

QUIET = {"HF_HUB_DISABLE_TELEMETRY": "1", "RAY_USAGE_STATS_ENABLED": "0", "USE_HUB_KERNELS": "0"}
"""Settings of other packages, where the environment has none: no telemetry (trl, transformers, Ray), no code from the hub."""


def settle() -> None:
    """Done once, before other packages are imported, which read these when they are."""
    hub = sys.modules.get("huggingface_hub.constants")
    if hub is not None and "HF_HUB_DISABLE_TELEMETRY" not in os.environ:  # it has read the environment already
        hub.HF_HUB_DISABLE_TELEMETRY = True  # type: ignore[attr-defined]
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        Path.home()
    except RuntimeError:  # a user without an entry in the list of users, as in containers: packages look for caches at home
        home = tempfile.mkdtemp(prefix="recall-home-")
        atexit.register(shutil.rmtree, home, ignore_errors=True)
        os.environ.update(HOME=home, USER=os.environ.get("USER", f"user-{os.getuid()}"))
