"""Fuzzing guided by coverage: inputs that reach code which none before has reached are kept and changed further.

    make fuzz [SECONDS=300]              or: python tests/fuzz_atheris.py KIND/FILE ... [-max_total_time=300] [options of libFuzzer]

Needs atheris, which `make fuzz` installs in an environment of its own. Each input is one file of a sound input of `tests/corpus.py` (all
of them, or those named), given to the library as a command would. What is no error of ours, takes over 10 seconds or over 2 GB, is a find:
it is written to `crash-*`, and belongs into the corpus once it is mended.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "src")]
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
warnings.simplefilter("ignore")

with atheris.instrument_imports(include=["recall_merge"]):
    from recall_merge.runtime.errors import RecallError

from corpus import SOUND, Case, cases, use  # noqa: E402  after what is instrumented

TARGETS = [f"{kind}/{name}" for kind, files in SOUND.items() for name in files]


def one_input(data: bytes) -> None:
    """The first byte chooses which file the others are."""
    if not data:
        return
    kind, _, name = chosen[data[0] % len(chosen)].partition("/")
    folder = Path(tempfile.mkdtemp(dir=place))
    try:
        with contextlib.suppress(RecallError):
            use(kind, Case(kind, "fuzzed", {name: data[1:]}).write(folder))
    finally:
        shutil.rmtree(folder)


def seeds(folder: Path) -> Path:
    """The sound inputs, and the malformed ones that are known, as what to start from."""
    for number, target in enumerate(chosen):
        kind, _, name = target.partition("/")
        known = [SOUND[kind][name], *(case.files.get(name) for case in cases() if case.kind == kind)]
        for count, data in enumerate(data for data in known if data is not None and len(data) < 10_000):
            (folder / f"{number}-{count}").write_bytes(bytes([number]) + data)
    return folder


if __name__ == "__main__":
    chosen = [word for word in sys.argv[1:] if not word.startswith("-")] or TARGETS
    if unknown := set(chosen) - set(TARGETS):
        sys.exit(f"no such file: {', '.join(unknown)}; known: {', '.join(TARGETS)}")
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = os.environ["HF_HOME"] = place
        (corpus := Path(place) / "corpus").mkdir()
        limits = ["-timeout=10", "-rss_limit_mb=2048", "-max_len=20000", *(word for word in sys.argv[1:] if word.startswith("-"))]
        atheris.Setup([sys.argv[0], str(seeds(corpus)), *limits], one_input)
        atheris.Fuzz()
