"""How long a merge will take, from a probe of this machine; a guess, and called so."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

from recall_merge.files.safetensors import Stored
from recall_merge.merging.plan import CHARACTERS_PER_TOKEN, Plan
from recall_merge.merging.run import FromSamples

PROBE = 1 << 24  # bytes that are read and hashed; enough to be past the first page faults


@dataclass(frozen=True)
class Estimate:
    """Seconds for the pass over the parameters, and for the forward passes."""

    passes: float
    forward: float

    @property
    def seconds(self) -> float:
        return self.passes + self.forward


def estimate(plan: Plan) -> Estimate:
    """Time a read, a hash and a matrix product, and scale them to the plan's bytes and floating-point operations.

    A forward pass takes 2 operations a parameter and token (Kaplan et al. 2020, arXiv:2001.08361, section 2.1).
    """
    largest = max(plan.base.tensors.values(), key=lambda stored: stored.spec.nbytes)
    a_byte = _seconds_a_byte(largest) / plan.threads
    passes = a_byte * (plan.bytes_read + plan.bytes_written)
    if not isinstance(plan.weights, FromSamples):
        return Estimate(passes, 0.0)
    lengths = sorted(len(row.plain) + len(row.completion) for row in plan.rows)
    mean = sum(lengths) / len(lengths) / CHARACTERS_PER_TOKEN
    tokens = mean * (min(len(lengths), plan.samples.pool) + plan.samples.count * len(plan.experts))
    operations = 2 * tokens * sum(spec.numel for spec in plan.specs.values())
    building = a_byte * (plan.experts[-1].nbytes if plan.by_layer else plan.bytes_read)  # read once more, for the forward pass
    return Estimate(passes, building + operations / (_operations_a_second() * plan.threads))


def _seconds_a_byte(stored: Stored) -> float:
    buffer = bytearray(min(PROBE, stored.spec.nbytes))
    start = time.perf_counter()
    stored.fill(memoryview(buffer))
    hashlib.sha256(buffer).digest()
    return (time.perf_counter() - start) / len(buffer)


def _operations_a_second() -> float:
    import torch

    n = 1024
    matrix = torch.ones(n, n)
    _ = matrix @ matrix  # the first product also pays for setting up
    start = time.perf_counter()
    _ = matrix @ matrix
    return 2 * n**3 / (time.perf_counter() - start) / torch.get_num_threads() / 2  # half of the peak is what models reach
