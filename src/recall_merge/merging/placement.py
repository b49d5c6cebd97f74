"""What of a merge runs on the run's device: forward passes, and methods whose work on a tensor takes longer than reading it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from recall_merge.maths.methods import Method
from recall_merge.merging.run import SampleWeights
from recall_merge.runtime.device import hardware, has_float64

if TYPE_CHECKING:
    import torch

BATCHES = (4096, 512, 1)
"""Padded tokens per batch on an accelerator: as many at first, fewer where its memory is too small; at last one text at a time."""


def takes(device: torch.device, method: Method) -> bool:
    """Whether a method's work is moved to a device. Methods that are bound by the disk stay on the processor."""
    return device.type != "cpu" and method.heavy and has_float64(device)


def work_on(device: torch.device, method: Method, rule: object) -> list[str]:
    """What of a merge runs on an accelerator; nothing does where there is none."""
    if device.type == "cpu":
        return []
    return [*([rule.compares] if isinstance(rule, SampleWeights) else []), *([f"`{method.name}`"] if takes(device, method) else [])]


def placement_notes(device: torch.device, method: Method, rule: object) -> Iterator[str]:
    """What a reader of the result should know of the device."""
    if work := work_on(device, method, rule):
        yield f"{' and '.join(work)} on {device}, {hardware(device)}: another device gives the same up to 1e-3, not the same bytes"
    if method.heavy and device.type != "cpu" and not has_float64(device):
        yield f"`{method.name}` computes in float64, which {device.type} has not: it stays on the processor"
