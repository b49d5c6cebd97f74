"""Progress of long work, in stages: each has a total in bytes, tokens, tensors or steps. Silent unless a listener is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

Advance = Callable[[int], None]


class Progress(Protocol):
    """A listener. `stage` yields a function to call with the amount done since the last call."""

    @contextmanager
    def stage(self, label: str, total: int, unit: str) -> Iterator[Advance]: ...


class Silent:
    """A listener that does nothing."""

    @contextmanager
    def stage(self, label: str, total: int, unit: str) -> Iterator[Advance]:
        yield lambda amount: None
