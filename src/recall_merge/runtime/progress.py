"""How long work tells of itself: stages, each with a total in bytes, tokens, tensors or steps. Silent unless a listener is given."""

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
    """Tells nobody."""

    @contextmanager
    def stage(self, label: str, total: int, unit: str) -> Iterator[Advance]:
        yield lambda amount: None
