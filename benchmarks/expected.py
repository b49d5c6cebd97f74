"""Check results: compute them again with numpy and torch, from the files as the safetensors library reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks.inputs import all_tensors, weight_files

WORD = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}  # half a unit in the last place, relative


class WrongError(Exception):
    """A result is not what it should be."""


def check_mean(out: Path, models: Sequence[Path], weights: Sequence[float] | None = None) -> None:
    """Check that every tensor is the weighted mean of the models', rounded once.

    Raises:
        WrongError: if one is not.
    """
    shares = weights or [1 / len(models)] * len(models)
    parts = [{name: opened for file in weight_files(model) for name, opened in _named(file)} for model in models]
    seen = 0
    for name, merged in all_tensors(out):
        check_tensor(name, merged, [part[name].get_tensor(name) for part in parts], shares)
        seen += 1
    if seen != len(parts[0]):
        raise WrongError(f"{out.name} holds {seen} tensors")


def check_tensor(name: str, merged: Tensor, parts: Sequence[Tensor], shares: Sequence[float], slack: float = 1e-6) -> None:
    """Check that a tensor is the weighted mean of the parts, within the rounding of its dtype and of float32 in the sum."""
    exact = torch.zeros(merged.shape, dtype=torch.float64)
    largest = torch.zeros(merged.shape, dtype=torch.float64)
    for part, share in zip(parts, shares, strict=True):
        exact.add_(part.double(), alpha=share)
        torch.maximum(largest, part.double().abs(), out=largest)
    wrong = (merged.double() - exact).abs() > WORD[merged.dtype] * 1.001 * exact.abs() + slack * largest
    if wrong.any():
        raise WrongError(f"{int(wrong.sum())} of {wrong.numel()} numbers of '{name}' are not the mean")


def check_ties(out: Path, base: Path, experts: Sequence[Path], names: Sequence[str], density: float) -> float:
    """Check TIES on some tensors: base + the mean of the trimmed deltas that agree with the elected sign.

    Returns:
        the share of numbers that differ. Up to 1 in 1,000 may: where a vote is even except for rounding, either sign is right.

    Raises:
        WrongError: if more differ.
    """
    different = total = 0
    for name in names:
        stored = read(base, name)
        below = stored.float().numpy()
        deltas = []
        for expert in experts:
            delta = read(expert, name).float().numpy() - below
            size = np.abs(delta)
            rank = delta.size - max(1, int(density * delta.size))
            deltas.append(np.where(size >= np.partition(size.ravel(), rank)[rank], delta, 0))
        sign = np.where(np.sum(deltas, axis=0) >= 0, 1, -1)
        agree = [np.sign(delta) == sign for delta in deltas]
        mean = sum(delta * yes for delta, yes in zip(deltas, agree, strict=True)) / np.maximum(1, np.sum(agree, axis=0))
        exact = torch.from_numpy(below.astype(np.float64) + mean)
        wrong = (read(out, name).double() - exact).abs() > WORD[stored.dtype] * 1.001 * exact.abs() + 1e-6 * np.abs(below).max()
        different += int(wrong.sum())
        total += wrong.numel()
    if different > total / 1000:
        raise WrongError(f"{different} of {total} numbers are not what TIES gives")
    return different / total


def difference(one: Path, other: Path, names: Sequence[str]) -> float:
    """The share of numbers in which some tensors of two models differ by more than two units in the last place."""
    different = total = 0
    for name in names:
        ours, theirs = read(one, name), read(other, name)
        far = (ours.double() - theirs.double()).abs() > 4 * WORD[ours.dtype] * ours.double().abs() + 1e-9
        different, total = different + int(far.sum()), total + far.numel()
    return different / total


def recall_weights(states: Tensor, temperature: float = 1.0) -> Tensor:
    """RECALL's weights from pooled hidden states.    (L + 1, n, m, d), newest last -> (L + 2, n), float64"""
    rows = []
    for h in states.double():
        n = len(h)
        apart = torch.cat([(h[p] - h[q]).pow(2).sum(-1) for p in range(n) for q in range(p + 1, n)])
        similarity = torch.exp(-(h - h[-1]).pow(2).sum(-1) / (2 * apart.quantile(0.5))).mean(-1)
        rows.append(torch.softmax(similarity / temperature, 0))
    return torch.stack([*rows, rows[-1]])


def _named(file: Path) -> Iterator[tuple[str, Any]]:
    """The names of a file's tensors, each with the file, opened once: opening it takes as long as its header is."""
    opened = safe_open(file, framework="pt")
    yield from ((name, opened) for name in opened.keys())  # noqa: SIM118  it is no dict


def read(folder: Path, name: str) -> Tensor:
    """One tensor of a model."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            if name in opened.keys():  # noqa: SIM118  it is no dict
                return opened.get_tensor(name)
    raise WrongError(f"{folder.name} has no '{name}'")
