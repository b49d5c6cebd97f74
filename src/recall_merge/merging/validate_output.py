"""The check of a result: read again as a stranger would, by transformers' own loading and one pass.

What transformers imports takes longer than all else of the check, and than a small merge; on a thread it would take turns with the merge.
So where this process has no other use for it, another one imports it while the merge is at work, and then loads the result.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recall_merge.files.checkpoint import open_checkpoint
from recall_merge.files.durable import sync
from recall_merge.runtime.errors import CheckpointError, ResultError
from recall_merge.runtime.parallel import cores

if TYPE_CHECKING:
    from recall_merge.merging.plan import Plan
    from recall_merge.merging.run import MergeRun


def check_result(plan: Plan, folder: Path, other: Reader | None = None) -> None:
    """Hold the headers against the plan; then, unless the run says no, load the result and run it once.

    Args:
        other: the process that does so; None = this one.

    Raises:
        ResultError: if anything is not as planned.
    """
    tokens = min(8, plan.base.vocabulary_size)
    try:
        if open_checkpoint(folder).specs != dict(plan.specs):
            raise ResultError("the result's tensors are not those of the plan", where=plan.target)
        if not plan.run.out.reload:
            return
        with _on_its_way(folder):
            finite = _told(folder, tokens, plan.target, other)
    except CheckpointError as error:
        fix = "give `out.reload: false` if the architecture is not one of transformers' own"
        raise ResultError(f"the result cannot be loaded: {error.faults[0].what}", where=plan.target, fix=fix) from error
    if not finite:
        raise ResultError("the result's forward pass gives numbers that are not finite", where=plan.target, fix="give `out.dtype: float32`")


def _told(folder: Path, tokens: int, target: Path, other: Reader | None) -> bool:
    """What `is_sound` gives, there or here."""
    if other is not None:
        with suppress(CheckpointError):  # it has a part of transformers; what that cannot load, the whole of it may
            return other.is_sound(folder, tokens, target)
    return is_sound(folder, tokens)


@contextmanager
def _on_its_way(folder: Path) -> Iterator[None]:
    """Let the disk take what is written meanwhile: it must have all before the folder takes its place."""
    with ThreadPoolExecutor(1) as disk:
        taken = [disk.submit(sync, file) for file in folder.iterdir()]
        yield
    for one in taken:
        one.result()


def is_sound(folder: Path, tokens: int) -> bool:
    """Whether a forward pass over the first tokens of the vocabulary gives finite numbers.

    Raises:
        CheckpointError: if transformers cannot load the folder.
    """
    import torch

    from recall_merge.models.load import build_model

    model = build_model(folder, dtype="auto")
    with torch.inference_mode():
        return bool(model(input_ids=torch.arange(tokens).unsqueeze(0), use_cache=False).logits.isfinite().all())


@contextmanager
def reader(run: MergeRun) -> Iterator[Reader | None]:
    """Another process for the check of a run's result, where it saves time: where there is a core for it, and where this process neither
    has imported transformers nor will run models for the weights. It ends with the context."""
    other: Reader | None = None
    if run.out.reload and run.samples is None and "transformers" not in sys.modules and (run.threads or cores()) > 1 and sys.executable:
        with suppress(OSError):  # no room for a process: this one checks
            other = Reader()
    try:
        yield other
    finally:
        if other is not None:
            other.end()


class Reader:
    """A process that imports transformers, waits for a folder, and tells whether it is sound. It is told one line of JSON after another: a
    model of the same architecture, the folder. When nobody is left who could tell it anything, it ends."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            text=True,
            start_new_session=True,  # Ctrl-C is for the merge, which ends this one
        )

    def prepare(self, like: Path) -> None:
        """Have it import the architecture of a model."""
        self._tell(str(like))

    def is_sound(self, folder: Path, tokens: int, target: Path) -> bool:
        """What `is_sound` gives in that process.

        Args:
            target: where the folder will be, to be named in an error.

        Raises:
            CheckpointError: if transformers cannot load the folder.
            ResultError: if the process ends without an answer.
        """
        self._tell([str(folder), tokens])
        printed, said = self._process.communicate()
        if status := self._process.returncode:
            last = (said.strip().splitlines() or ["it said nothing"])[-1]
            what = f"the process that loads the result ended with status {status}: {last}"
            raise ResultError(what, where=target, fix="make room in memory, or give `out.reload: false`")
        answer = json.loads(printed.splitlines()[-1])
        if "fault" in answer:
            raise CheckpointError(answer["fault"], where=folder)
        return answer["finite"]

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _tell(self, what: Any) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has died; that is told when it is asked
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()


def _serve() -> None:
    """What the other process does."""
    gc.disable()  # imports make half a million objects that stay, and then this process ends
    from recall_merge.models.lean import import_transformers
    from recall_merge.models.load import import_architecture

    with suppress(Exception):  # what is missing now is missing again when the result is read
        import_transformers()
    if like := sys.stdin.readline():
        with suppress(Exception):
            import_architecture(Path(json.loads(like)))
    if asked := sys.stdin.readline():
        folder, tokens = json.loads(asked)
        try:
            answer: dict[str, Any] = {"finite": is_sound(Path(folder), tokens)}
        except Exception as error:  # of any kind: the other side asks again, of the whole of transformers
            answer = {"fault": error.faults[0].what if isinstance(error, CheckpointError) else repr(error)}
        sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    _serve()
