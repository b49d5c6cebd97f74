"""Random numbers keyed by (seed, expert, tensor), so that order, shards and restarts cannot change them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

Stream = Callable[[Sequence[int]], Tensor]
"""shape -> the next numbers of one expert's stream, uniform in [0, 1), float32."""
Start = Callable[[], Stream]
"""Begins one expert's stream, from its first number every time."""


@dataclass(frozen=True)
class Draws:
    """The random numbers of one tensor: one stream per expert, Philox keyed by SHA-256 of seed, expert name and tensor name.

    >>> draws = Draws(seed=0, tensor="w", experts=("a", "b"))
    >>> bool((draws.stream(0)((3,)) == draws.stream(0)((3,))).all())
    True
    """

    seed: int
    tensor: str
    experts: tuple[str, ...]

    @property
    def streams(self) -> list[Start]:
        return [partial(self.stream, expert) for expert in range(len(self.experts))]

    def stream(self, expert: int) -> Stream:
        words = f"{self.seed}\0{self.experts[expert]}\0{self.tensor}".encode()
        key = int.from_bytes(hashlib.sha256(words).digest()[:16], "little")
        generator = np.random.Generator(np.random.Philox(key=key))
        return lambda shape: torch.from_numpy(generator.random(tuple(shape), dtype=np.float32))
