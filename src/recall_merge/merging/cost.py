"""What a plan will cost: memory from its tensors' sizes, and time from a probe of this machine. Both are estimates, and called so."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

import torch

from recall_merge.maths.moments import HELD, OVERSAMPLED, ROUNDS
from recall_merge.merging.placement import takes
from recall_merge.merging.plan import Plan
from recall_merge.merging.run import STATISTICS_SPACE, LossWeights, RecallWeights, SampleWeights
from recall_merge.merging.samples import clustered_layers
from recall_merge.merging.spans import SPAN, TWICE, in_spans

CHARACTERS_PER_TOKEN = 4  # of English prose under byte-level tokenizers
PROBE = 1 << 24  # bytes that are read and hashed; enough to get past the first page faults


def passes(plan: Plan) -> str:
    """How often the models are read, and why."""
    if not isinstance(plan.weights, SampleWeights):
        return "one pass over all models" + (f", tensors of more than {TWICE:,} numbers twice" if plan.method.find_threshold else "")
    newest = f"'{plan.experts[-1].name}' once for the typical samples"
    if plan.single_pass:
        return f"{newest}, then one pass over all models, layer by layer"
    if isinstance(plan.weights, LossWeights):
        return f"{newest}, all models layer by layer for their losses, then one pass over all models"
    return f"{newest}, all models layer by layer for the weights (the ablation needs all layers), then one pass over all models"


def peak_memory(plan: Plan) -> int:
    """Maximum bytes that a merge holds, beside the interpreter's own."""
    if plan.single_pass:  # one layer of base and experts too, the blocks that run, and the samples' hidden states
        return merge_memory(plan) + _block(plan) * (len(plan.experts) + 2) + _states(plan, len(plan.compared))
    return max(merge_memory(plan), weights_memory(plan)) if isinstance(plan.weights, SampleWeights) else merge_memory(plan)


def weights_memory(plan: Plan) -> int:
    """Maximum bytes that the weights alone take: the blocks that run, as read and as bound, and for losses the head."""
    if isinstance(plan.weights, LossWeights):  # a tied head needs the whole table of tokens
        table = 4 * plan.specs[plan.base.embedding].numel if plan.base.is_tied else 0
        return 2 * _block(plan) + table + _states(plan, 1)
    return 2 * min(plan.threads, len(plan.compared)) * _block(plan) + _states(plan, len(plan.compared))


def forward_memory(plan: Plan) -> int:
    """Bytes of one model's forward pass block by block: a block as it is read and as it runs, and the hidden states."""
    return 2 * _block(plan) + _states(plan, 1)


def whole_model_memory(plan: Plan) -> int:
    """Bytes of one model's forward pass as a whole: the model, twice for a moment while it is built."""
    return 2 * _width(plan) * sum(spec.numel for spec in plan.specs.values())


def merge_memory(plan: Plan) -> int:
    """Bytes of the pass over the parameters: per thread one tensor or span of all models in float32, and results not yet written."""
    sizes = [SPAN if in_spans(plan, name) else spec.numel for name, spec in plan.specs.items()]
    tensors = len(plan.experts) + 3 + (len(plan.experts) + 1 if plan.run.prune is not None else 0)
    return 4 * (tensors + 1) * sum(sorted(sizes)[-plan.threads :])


def device_memory(plan: Plan) -> int:
    """Maximum bytes on an accelerator: a block and the hidden states, or one tensor of all models in float32 with twice that at work."""
    passes = _block(plan) + _states(plan, len(plan.compared)) if isinstance(plan.weights, SampleWeights) else 0
    largest = max((spec.numel for name, spec in plan.specs.items() if name not in plan.base.token_tensors), default=0)
    return max(passes, 12 * (len(plan.experts) + 2) * largest if takes(plan.device, plan.method) else 0)


@dataclass(frozen=True)
class Estimate:
    """Seconds for the pass over the parameters, and for the forward passes; of these, what the pool of rows takes, and how many it has."""

    passes: float
    forward: float = 0.0
    pool: float = 0.0
    rows: int = 0

    @property
    def seconds(self) -> float:
        return self.passes + self.forward


def estimate_time(plan: Plan) -> Estimate:
    """Time a read, a hash and a matrix product, and scale them to the plan's bytes and floating-point operations.

    A forward pass takes 2 operations per parameter and token (Kaplan et al. 2020, arXiv:2001.08361, section 2.1).
    """
    per_byte = _seconds_per_byte(plan)
    merging = per_byte * (plan.bytes_read + plan.bytes_written)
    if not isinstance(plan.weights, SampleWeights):
        return Estimate(merging)
    rows, per_row = _pool(plan), 1 / _rows_per_second(plan)
    pool = per_byte * plan.experts[-1].nbytes + per_row * rows if rows else 0.0
    reading = 0 if plan.single_pass else per_byte * plan.bytes_read
    samples = per_row * min(len(plan.rows), plan.samples.count) * len(plan.compared)
    return Estimate(merging, pool + reading + samples, pool, rows)


def estimate_statistics(plan: Plan, rank: int, *, gradients: bool = False) -> Estimate:
    """Time of the newest expert's input statistics, from the same probes: the pool of rows, and what linear maps read of the samples.

    The search for directions multiplies a map's inputs by rank + 8 columns, back and forth in 4 rounds, and by all of these once more. A
    pass back takes twice the time of a forward pass (Kaplan et al. 2020, as above).
    """
    per_byte, per_second, rows = _seconds_per_byte(plan), _rows_per_second(plan), _pool(plan)
    widths = sum(spec.shape[-1] for name, spec in plan.specs.items() if len(spec.shape) > 1 and name not in plan.base.token_tensors)
    directions = 3 * ROUNDS * (rank + OVERSAMPLED) * widths / _multiplied(plan)  # as a share of a forward pass
    reading = per_byte * (plan.base.nbytes + plan.experts[-1].nbytes)
    share = clustered_layers(plan.samples.space or STATISTICS_SPACE, plan.base.layers.blocks)[-1] / plan.base.layers.blocks
    pool = share * (reading + rows / per_second) if rows else 0.0
    samples = min(len(plan.rows), plan.samples.count) / per_second * (1 + directions + 2 * gradients)
    return Estimate(0.0, pool + reading + samples, pool, rows)


def statistics_memory(plan: Plan, *, gradients: bool = False) -> int:
    """Maximum bytes of input statistics: a forward pass, and what the maps of a block have read of at most `HELD` tokens."""
    widths = [0] * (plan.base.layers.last + 1)
    for name, spec in plan.specs.items():
        if len(spec.shape) == 2 and name not in plan.base.token_tensors:
            widths[plan.base.layers.of(name)] += spec.shape[1]
    tokens = min(HELD, _states(plan, 1) // (4 * _width(plan) * plan.base.tensors[plan.base.embedding].spec.shape[-1]))
    return (whole_model_memory(plan) if gradients else forward_memory(plan)) + 4 * tokens * max(widths)


def _pool(plan: Plan) -> int:
    """Rows that the typical samples are chosen from; 0 where all rows are samples."""
    return min(len(plan.rows), plan.samples.pool) if len(plan.rows) > plan.samples.count else 0


def _seconds_per_byte(plan: Plan) -> float:
    """To read and hash, on the plan's threads."""
    largest = max(plan.base.tensors.values(), key=lambda stored: stored.spec.nbytes)
    buffer = bytearray(min(PROBE, largest.spec.nbytes))
    start = time.perf_counter()
    largest.fill(memoryview(buffer))
    hashlib.sha256(buffer).digest()
    return (time.perf_counter() - start) / len(buffer) / plan.threads


def _rows_per_second(plan: Plan) -> float:
    """Of a forward pass of one model over the plan's rows, each of their mean length."""
    mean = sum(len(row.plain) + len(row.completion) for row in plan.rows) / len(plan.rows) / CHARACTERS_PER_TOKEN
    return _operations_per_second(plan) / (2 * mean * _multiplied(plan))


def _multiplied(plan: Plan) -> int:
    """Parameters that a token is multiplied by; it is looked up in the tables of tokens."""
    return sum(spec.numel for name, spec in plan.specs.items() if name not in plan.base.token_tensors)


def _width(plan: Plan) -> int:
    """Bytes per number in a forward pass."""
    return 2 if isinstance(plan.weights, RecallWeights) and plan.weights.precision == "bfloat16" else 4


def _block(plan: Plan) -> int:
    """Bytes of the largest layer in float32, without token tensors, which are never held."""
    layers = plan.base.layers
    sizes = [0] * (layers.last + 1)
    for name, spec in plan.specs.items():
        if name not in plan.base.token_tensors:
            sizes[layers.of(name)] += 4 * spec.numel
    return max(sizes)


def _states(plan: Plan, models: int) -> int:
    """Bytes of the hidden states at a layer, with a few times as many at work in a block; lengths are guessed from the rows' characters."""
    limit = plan.samples.max_tokens
    lengths = sorted(min(limit, len(row.plain + row.completion) // CHARACTERS_PER_TOKEN + 1) for row in plan.rows)
    tokens = max(sum(lengths[-plan.samples.pool :]), sum(lengths[-plan.samples.count :]) * models)
    return 4 * _width(plan) * tokens * plan.base.tensors[plan.base.embedding].spec.shape[-1]


def _operations_per_second(plan: Plan) -> float:
    """Of the plan's device, or of the processors that it may use."""
    here = plan.device.type == "cpu"
    n = 1024 if here else 4096
    matrix = torch.ones(n, n, device=plan.device)
    _ = float((matrix @ matrix)[0, 0])  # the first product also pays for setting up
    start = time.perf_counter()
    _ = float((matrix @ matrix)[0, 0])  # an accelerator is waited for where its number is read
    return 2 * n**3 / (time.perf_counter() - start) / 2 * (plan.threads / torch.get_num_threads() if here else 1)  # about half of the peak
