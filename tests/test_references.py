"""Every method against an independent implementation: numpy in float64, peft's own functions, and the installed mergekit 0.1.5."""

import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dense import cut_moment
from recall_merge.maths.methods import METHODS, Draws
from recall_merge.maths.methods.informed import fisher, regmean
from recall_merge.maths.moments import Moment

ROOT = Path(__file__).parent.parent
NAMES = ("a", "b", "c")


def made(k: int, *, shape=(24, 40), seed: int = 0, size: float = 0.3) -> tuple[Tensor, list[Tensor]]:
    """A base and k deltas that share something, as deltas of real experts do."""
    generator = torch.Generator().manual_seed(seed)
    base, shared, *own = torch.randn(k + 2, *shape, generator=generator)
    return base, [(shared + delta) * size for delta in own]


def ours(name: str, base: Tensor, deltas: list[Tensor], weights: list[float], **options: Any) -> Tensor:
    draws = {"draws": Draws(0, "w", NAMES[: len(deltas)])} if METHODS[name].random else {}
    return METHODS[name].function(base, deltas, weights, **draws, **options)


# numpy, written from the formulas in the docstrings with whole arrays and full sorts


def np_trimmed(delta: np.ndarray, low: int, high: int) -> np.ndarray:
    """Entries number low..high-1 of the order by falling size."""
    flat = np.zeros(delta.size)
    kept = np.argsort(-np.abs(delta).ravel())[low:high]
    flat[kept] = delta.ravel()[kept]
    return flat.reshape(delta.shape)


def np_agreeing(v: np.ndarray, w: np.ndarray, divide: bool) -> np.ndarray:
    sign = np.where((v * w).sum(0) >= 0, 1, -1)
    agrees = np.sign(v) == sign
    total, weights = (w * v * agrees).sum(0), (w * agrees).sum(0)
    return total / np.where(weights == 0, 1, weights) if divide else total


def np_uniform(k: int, shape: tuple[int, ...]) -> np.ndarray:
    draws = Draws(0, "w", NAMES[:k])
    return np.stack([draws.stream(q)(shape).numpy() for q in range(k)]).astype(np.float64)


def np_ties(d: np.ndarray, w: np.ndarray, density=0.2) -> np.ndarray:
    return np_agreeing(np.stack([np_trimmed(x, 0, int(density * x.size)) for x in d]), w, divide=True)


def np_breadcrumbs(d: np.ndarray, w: np.ndarray, density=0.1, gamma=0.01) -> np.ndarray:
    n = d[0].size
    outliers = int(gamma * n)
    return (w * np.stack([np_trimmed(x, outliers, outliers + int(density * n)) for x in d])).sum(0)


def np_breadcrumbs_ties(d: np.ndarray, w: np.ndarray, density=0.1, gamma=0.01) -> np.ndarray:
    n = d[0].size
    outliers = int(gamma * n)
    return np_agreeing(np.stack([np_trimmed(x, outliers, outliers + int(density * n)) for x in d]), w, divide=False)


def np_dare(d: np.ndarray, density=0.5) -> np.ndarray:
    return d * (np_uniform(len(d), d[0].shape) < density) / density


def np_della(d: np.ndarray, density=0.5, epsilon=0.15) -> np.ndarray:
    ranks = np.abs(d).argsort(-1).argsort(-1)
    p = density + epsilon * (2 * ranks / (d.shape[-1] - 1) - 1)
    return d * (np_uniform(len(d), d[0].shape) < p) / p


def np_slerp(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    angle = np.arccos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def np_karcher(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Gradient steps of a half on the full vectors, until they vanish."""
    flat = x.reshape(len(x), -1)
    norms = np.linalg.norm(flat, axis=1)
    units, w = flat / norms[:, None], w.ravel()
    mean = units[0]
    for _ in range(2000):
        dots = np.clip(units @ mean, -1, 1)
        angles = np.arccos(dots)
        logs = (units - dots[:, None] * mean) * (angles / np.where(angles > 0, np.sin(angles), 1))[:, None]
        step = 0.5 * (w[:, None] * logs).sum(0)
        size = np.linalg.norm(step)
        if size < 1e-14:
            break
        mean = np.cos(size) * mean + np.sin(size) * step / size
        mean = mean / np.linalg.norm(mean)
    return ((w * norms).sum() * mean).reshape(x[0].shape)


def np_model_stock(d: np.ndarray, w: np.ndarray) -> np.ndarray:
    k = len(d)
    flat = d.reshape(k, -1)
    units = flat / np.linalg.norm(flat, axis=1)[:, None]
    cosines = units @ units.T
    c = (cosines.sum() - k) / (k * (k - 1))
    return k * c / (1 + (k - 1) * c) * (w * d).sum(0)


def np_magmax(d: np.ndarray, w: np.ndarray) -> np.ndarray:
    v = len(d) * w * d
    return np.take_along_axis(v, np.abs(v).argmax(0)[None], 0)[0]


def np_sce(d: np.ndarray, w: np.ndarray, density=0.1) -> np.ndarray:
    variance = d.var(0)
    threshold = np.sort(variance.ravel())[::-1][int(density * d[0].size) - 1]
    v = d * (variance >= threshold)
    eta = w * (v**2).sum((1, 2), keepdims=True)
    agrees = np.sign(v) == np.where(v.sum(0) >= 0, 1, -1)
    weights = (eta * agrees).sum(0)
    return (eta * agrees * v).sum(0) / np.where(weights == 0, 1, weights)


def np_pcb(d: np.ndarray, w: np.ndarray, density=0.1) -> np.ndarray:
    def norm(x: np.ndarray) -> np.ndarray:
        low, high = x.min((1, 2), keepdims=True), x.max((1, 2), keepdims=True)
        return (x - low) / (high - low)

    score = np.exp(len(d) * norm(np.abs(d)) ** 2) * np.tanh(d * d.sum(0))
    n = d[0].size
    floor = np.sort(score.reshape(len(d), -1))[:, int(n * (1 - density))][:, None, None]
    s = norm(np.maximum(score, floor))
    weights = (w * s).sum(0)
    return (w * s * d).sum(0) / np.where(weights == 0, 1, weights)


def np_polar(v: np.ndarray) -> np.ndarray:
    u, _, vt = np.linalg.svd(v, full_matrices=False)
    return u @ vt


def np_tsv(d: np.ndarray, w: np.ndarray, rank=0) -> np.ndarray:
    k = len(d)
    count = rank or min(d[0].shape) // k
    u, s, vt = np.linalg.svd(d)
    left = np_polar(np.concatenate([x[:, :count] for x in u], 1))
    right = np_polar(np.concatenate([x[:count].T for x in vt], 1))
    return left * (k * w[:, 0] * s[:, :count]).ravel() @ right.T


def np_isotropic(d: np.ndarray, w: np.ndarray, common=1.0) -> np.ndarray:
    k = len(d)
    v = k * w * d
    u, s, vt = np.linalg.svd(v.sum(0), full_matrices=False)
    n = int(common * len(s))
    left, values, right = [u[:, :n]], [s[:n]], [vt[:n].T]
    own = (len(s) - n) // k
    for x in v:
        uq, sq, vq = np.linalg.svd(x - u[:, :n] @ u[:, :n].T @ x, full_matrices=False)
        left, values, right = [*left, uq[:, :own]], [*values, sq[:own]], [*right, vq[:own].T]
    return np.concatenate(values).mean() * np_polar(np.concatenate(left, 1)) @ np_polar(np.concatenate(right, 1)).T


def np_null_space(d: np.ndarray, w: np.ndarray, share=0.6) -> np.ndarray:
    answers = [x.T @ x / np.square(x).sum() for x in d]
    merged = np.zeros_like(d[0])
    for q, x in enumerate(d):
        values, vectors = np.linalg.eigh(sum(answers[:q] + answers[q + 1 :]))
        values, vectors = values[::-1], vectors[:, ::-1]
        kept = vectors[:, : int((np.cumsum(values) < share * values.sum()).sum()) + 1]
        merged = merged + len(d) * w[q] * (x - x @ kept @ kept.T)
    return merged


def np_opcm(d: np.ndarray, w: np.ndarray, alpha=0.5, growth="norm") -> np.ndarray:
    v = len(d) * w * d
    merged, length, norms = v[0], 1.0, [np.linalg.norm(v[0])]
    for t, x in enumerate(v[1:], start=2):
        norms.append(np.linalg.norm(x))
        u, s, vt = np.linalg.svd(merged, full_matrices=False)
        inside = u.T @ x @ vt.T
        block = int((np.cumsum(s) / s.sum() <= alpha).sum())
        cleared = np.zeros_like(inside)
        cleared[:block, :block] = 1
        np.fill_diagonal(cleared, 1)
        total = length * merged + x - u @ (inside * cleared) @ vt
        length = t**0.5 if growth == "sqrt" else np.linalg.norm(total) / np.mean(norms)
        merged = total / length
    return merged


NUMPY = [
    ("linear", {}, lambda b, d, w: (w * d).sum(0)),
    ("task_arithmetic", {"scale": 0.4}, lambda b, d, w: 0.4 * 3 * (w * d).sum(0)),
    ("ties", {}, lambda b, d, w: np_ties(d, w)),
    ("ties", {"density": 0.77, "scale": 1.5}, lambda b, d, w: 1.5 * np_ties(d, w, 0.77)),
    ("breadcrumbs", {}, lambda b, d, w: np_breadcrumbs(d, w)),
    ("breadcrumbs", {"density": 0.6, "gamma": 0.2}, lambda b, d, w: np_breadcrumbs(d, w, 0.6, 0.2)),
    ("breadcrumbs_ties", {"density": 0.5}, lambda b, d, w: np_breadcrumbs_ties(d, w, 0.5)),
    ("dare_linear", {}, lambda b, d, w: (w * np_dare(d)).sum(0)),
    ("dare_ties", {"density": 0.3}, lambda b, d, w: np_agreeing(np_dare(d, 0.3), w, divide=False)),
    ("della", {}, lambda b, d, w: np_agreeing(np_della(d), w, divide=True)),
    ("della_linear", {"density": 0.4, "epsilon": 0.3}, lambda b, d, w: (w * np_della(d, 0.4, 0.3)).sum(0)),
    ("slerp", {}, lambda b, d, w: np_slerp(b + d[0], b + d[1], float(w[1, 0, 0])) - b),
    ("nuslerp", {}, lambda b, d, w: np_slerp(d[0], d[1], float(w[1, 0, 0]))),
    ("karcher", {}, lambda b, d, w: np_karcher(b + d, w) - b),
    ("karcher", {"sphere": "deltas"}, lambda b, d, w: np_karcher(d, w)),
    ("model_stock", {}, lambda b, d, w: np_model_stock(d, w)),
    ("magmax", {}, lambda b, d, w: np_magmax(d, w)),
    ("sce", {}, lambda b, d, w: np_sce(d, w)),
    ("sce", {"density": 0.5}, lambda b, d, w: np_sce(d, w, 0.5)),
    ("pcb", {}, lambda b, d, w: np_pcb(d, w)),
    ("pcb", {"density": 0.6}, lambda b, d, w: np_pcb(d, w, 0.6)),
    ("tsv", {}, lambda b, d, w: np_tsv(d, w)),
    ("tsv", {"rank": 3}, lambda b, d, w: np_tsv(d, w, 3)),
    ("null_space", {}, lambda b, d, w: np_null_space(d, w)),
    ("null_space", {"share": 0.3}, lambda b, d, w: np_null_space(d, w, 0.3)),
    ("isotropic", {}, lambda b, d, w: np_isotropic(d, w)),
    ("isotropic", {"common": 0.8}, lambda b, d, w: np_isotropic(d, w, 0.8)),
    ("opcm", {}, lambda b, d, w: np_opcm(d, w)),
    ("opcm", {"alpha": 0.2, "growth": "sqrt"}, lambda b, d, w: np_opcm(d, w, 0.2, "sqrt")),
]


@pytest.mark.parametrize("weights", ["uniform", "uneven"])
@pytest.mark.parametrize(("name", "options", "reference"), NUMPY, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(NUMPY)])
def test_numpy_agrees(name, options, reference, weights):
    k = METHODS[name].experts[1] or 3
    base, deltas = made(k)
    w = [1 / k] * k if weights == "uniform" else [[0.7, 0.3], [0.5, 0.3, 0.2]][k - 2]
    arrays = base.double().numpy(), np.stack([delta.double().numpy() for delta in deltas]), np.array(w)[:, None, None]
    expected = arrays[0] + reference(*arrays)
    np.testing.assert_allclose(ours(name, base, deltas, w, **options).numpy(), expected, rtol=1e-4, atol=2e-5)


def test_every_method_has_a_numpy_reference():
    others = {
        "wise_ft",
        "aligned",
        "fisher",
        "regmean",
    }  # linear by other names; with own tests, below
    assert {name for name, _, _ in NUMPY} | others == set(METHODS)


def test_numpy_agrees_on_aligned():
    base, deltas = made(3)
    d, w = torch.stack(deltas).double().numpy(), np.array([0.5, 0.3, 0.2])[:, None, None]
    generator = torch.Generator().manual_seed(5)
    moments = [Moment(torch.randn(40, 4, generator=generator), torch.rand(40, generator=generator)) for _ in deltas]
    g = torch.stack([moment.dense() for moment in moments]).double().numpy()
    g = g * (0.7 + 0.3 * np.eye(40)) / np.diagonal(g, axis1=1, axis2=2).mean(1)[:, None, None]
    expected = (w * d @ g).sum(0) @ np.linalg.inv((w * g).sum(0) + 0.01 * np.eye(40))
    merged = ours("aligned", base, deltas, [0.5, 0.3, 0.2], moments=moments, offdiagonal=0.7, ridge=0.01, scale=2.0)
    np.testing.assert_allclose(merged.numpy(), base.double().numpy() + 2 * expected, rtol=1e-4, atol=1e-5)


def test_numpy_agrees_on_fisher_and_regmean():
    base, deltas = made(3)
    d, w = torch.stack(deltas).double().numpy(), np.array([0.5, 0.3, 0.2])[:, None, None]
    generator = torch.Generator().manual_seed(5)
    reads, outputs = ([torch.rand(size, generator=generator) for _ in deltas] for size in (40, len(base)))
    known = [Moment(torch.zeros(40, 0), rest, gradient=gradient) for rest, gradient in zip(reads, outputs, strict=True)]
    f = np.stack([np.outer(one.gradient.double(), one.rest.double()) for one in known])
    expected = base.double().numpy() + (w * f * d).sum(0) / (w * f).sum(0)
    np.testing.assert_allclose(fisher(base, deltas, [0.5, 0.3, 0.2], moments=known, floor=0).numpy(), expected, rtol=1e-4, atol=1e-5)

    inputs = [torch.randn(100, 40, generator=generator) for _ in deltas]
    moments = [x.T @ x / 100 for x in inputs]
    g = np.stack([moment.double().numpy() for moment in moments])
    g = g * (0.9 + 0.1 * np.eye(40))
    full = base.double().numpy() + d  # the paper's form: (sum G)^-1 sum G W for W from the left
    expected = np.linalg.solve((w * g).sum(0), (w * g @ full.transpose(0, 2, 1)).sum(0)).T
    merged = regmean(base, deltas, [0.5, 0.3, 0.2], moments=[cut_moment(one, 40) for one in moments])
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("election", ["total", "frequency"])
def test_peft_agrees_on_its_ties(election):
    from peft.utils.merge_utils import ties

    _, deltas = made(3)
    weights = [0.5, 0.3, 0.2]
    expected = ties(deltas, torch.tensor(weights) * 3, density=0.4, majority_sign_method=election)
    elect = {"total": "unweighted", "frequency": "count"}[election]
    merged = ours("ties", torch.zeros_like(expected), deltas, weights, density=0.4, elect=elect, mean="count")
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)


# mergekit 0.1.5, in its own virtual environment (scripts/mergekit_venv.sh)


@dataclass(frozen=True)
class Same:
    """A case in which both give the same. `theirs` are mergekit's parameters beside the weights, `random` that numbers are drawn."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    base: bool = True
    weighted: bool = True
    k: int = 3
    random: bool = False


SAME = [
    Same("linear", base=False),
    Same("task_arithmetic", {"scale": 1 / 3}),  # their sum has no k
    Same("task_arithmetic", {"scale": 0.2}, {"lambda": 0.6}),
    Same("ties", theirs={"density": 0.2}),
    Same("ties", {"density": 0.55, "scale": 1.4}, {"density": 0.55, "lambda": 1.4}),
    Same("ties", {"density": 0.3, "mean": "none"}, {"density": 0.3, "normalize": False}),
    Same("ties", {"density": 0.3, "rescale": "l1"}, {"density": 0.3, "rescale": True}),
    Same("ties", {"density": 1.0}, {"density": 1.0}),
    Same("breadcrumbs", {"density": 0.6, "gamma": 0.05}, {"density": 0.6, "gamma": 0.05}),
    Same("breadcrumbs", {"density": 0.9, "gamma": 0.3}, {"density": 0.9, "gamma": 0.3}),
    Same("breadcrumbs_ties", {"density": 0.6, "gamma": 0.05}, {"density": 0.6, "gamma": 0.05}),
    Same("breadcrumbs_ties", {"density": 0.6, "rescale": "l1", "mean": "weights"}, {"density": 0.6, "rescale": True, "normalize": True}),
    Same("dare_linear", {"density": 0.4, "rescale": "l1"}, {"density": 0.4}, random=True),
    Same("dare_linear", {"density": 0.4, "rescale": "none"}, {"density": 0.4, "rescale": False}, random=True),
    Same("dare_ties", {"density": 0.7, "rescale": "l1"}, {"density": 0.7}, random=True),
    Same("dare_ties", {"density": 0.7, "rescale": "l1", "mean": "weights"}, {"density": 0.7, "normalize": True}, random=True),
    Same("della", {"density": 0.6, "rescale": "l1"}, {"density": 0.6}, random=True),
    Same("della", {"density": 0.5, "epsilon": 0.3, "rescale": "none"}, {"density": 0.5, "epsilon": 0.3, "rescale": False}, random=True),
    Same("della_linear", {"density": 0.6, "rescale": "l1", "scale": 2.0}, {"density": 0.6, "lambda": 2.0}, random=True),
    Same("slerp", base=False, k=2),
    Same("nuslerp", k=2),
    Same("nuslerp", {"sphere": "weights"}, base=False, k=2),
    Same("nuslerp", {"vectors": "rows"}, {"nuslerp_flatten": False}, k=2),
    Same("nuslerp", {"vectors": "columns"}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}, k=2),
    Same("karcher", {}, {"max_iter": 1000, "tol": 1e-9}, base=False, weighted=False),
    Same("model_stock", weighted=False),
    Same("model_stock", {"vectors": "rows"}, {"filter_wise": True}, weighted=False),
    Same("sce", {"density": 0.3}, {"select_topk": 0.3}, weighted=False),
    Same("sce", {"density": 1.0}, {"select_topk": 1.0}, weighted=False),
]
WEIGHTS = {"uniform": [[1 / 2] * 2, [1 / 3] * 3], "uneven": [[0.7, 0.3], [0.5, 0.3, 0.2]]}
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Different:
    """A case in which we mean to differ: what each gives for these deltas on a base of 0 (`theirs` None: it raises)."""

    why: str
    method: str
    deltas: list[Any]
    ours: list[Any]
    theirs: list[Any] | None
    options: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    weighted: bool = True
    numbers: list[Any] = field(default_factory=list)
    base: bool = True


ROOT_HALF = 0.5**0.5
DIFFERENT = {
    "ties stay": Different(
        "Entries of equal size are all kept or all dropped; mergekit keeps exactly the given share, whichever entries its sort puts "
        "first.",
        "ties", [[2.0, 1.0, 1.0, 1.0]], [2.0, 1.0, 1.0, 1.0], [2.0, 1.0, 0.0, 0.0], {"density": 0.5}, {"density": 0.5},
    ),
    "one entry stays": Different(
        "At least one entry of a tensor stays in Breadcrumbs too, as in TIES; mergekit keeps int(density * n), which may be none.",
        "breadcrumbs", [[3.0, 2.0, 1.0]], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0], {"density": 0.2}, {"density": 0.2},
    ),
    "rescale by the share": Different(
        "DARE and DELLA divide what stays by its probability of staying, as their papers do; mergekit restores the tensor's sum of "
        "sizes. With `rescale: l1` ours does the same.",
        "dare_linear", [[1.0, 3.0]], [0.0, 6.0], [0.0, 4.0], {"density": 0.5}, {"density": 0.5}, numbers=[[0.9, 0.1]],
    ),
    "epsilon narrows": Different(
        "DELLA's epsilon is narrowed where a probability would leave [0, 1]; mergekit stops in the middle of the merge.",
        "della_linear", [[1.0, 3.0]], [0.0, 3.0], None, {"density": 0.8, "epsilon": 0.5}, {"density": 0.8, "epsilon": 0.5},
        numbers=[[0.7, 0.99]],
    ),
    "a row of one": Different(
        "A single entry has no rank: it stays with probability density; mergekit divides 0 by 0.",
        "della_linear", [[[4.0], [4.0]]], [[8.0], [0.0]], None, {"density": 0.5}, {"density": 0.5}, numbers=[[[0.4], [0.6]]],
    ),
    "rows are the last axis": Different(
        "DELLA ranks along the last axis; mergekit along the second, which is a different one in a tensor with three axes.",
        "della_linear", [[[[1.0, 2.0], [4.0, 3.0]]]], [[[0.0, 2.0], [4.0, 0.0]]], [[[0.0, 0.0], [4.0, 3.0]]],
        {"density": 0.5, "epsilon": 0.3, "rescale": "none"}, {"density": 0.5, "epsilon": 0.3, "rescale": False},
        numbers=[[[[0.5, 0.5], [0.5, 0.5]]]],
    ),
    "opposed deltas": Different(
        "Model Stock with a negative mean cosine gives the base; mergekit extrapolates away from the average.",
        "model_stock", [[1.0, 0.0], [-0.6, 0.8]], [0.0, 0.0], [-0.6, -1.2], weighted=False,
    ),
    "tiny deltas": Different(
        "Angles do not depend on the size of deltas; mergekit's Model Stock treats products of norms below 1e-6 as 1e-6.",
        "model_stock", [[1e-4, 0.0], [1e-4, 0.0]], [1e-4, 0.0], [1.98e-6, 0.0], weighted=False,
    ),
    "tiny energies": Different(
        "SCE's weights do not depend on the size of deltas; in mergekit, mean squares that sum to less than 1e-6, as they usually "
        "do for fine-tuned language models, count as equal.",
        "sce", [[3e-4, 0.0], [1e-4, 0.0]], [2.8e-4, 0.0], [2e-4, 0.0], {"density": 1.0}, {"select_topk": 1.0}, weighted=False,
    ),
    "nothing varies": Different(
        "SCE on identical experts gives the expert; mergekit selects no entry and gives the base.",
        "sce", [[1.0, 2.0], [1.0, 2.0]], [1.0, 2.0], [0.0, 0.0], {"density": 0.5}, {"select_topk": 0.5}, weighted=False,
    ),
    "one varying entry stays": Different(
        "SCE selects at least one entry; mergekit selects int(share * varying), which may be none.",
        "sce", [[1.0, 2.0], [1.0, 4.0]], [0.0, 3.6], [0.0, 0.0], {"density": 0.1}, {"select_topk": 0.1}, weighted=False,
    ),
    "no direction": Different(
        "An expert that changes nothing has no direction: we interpolate in a straight line; mergekit assumes a right angle.",
        "nuslerp", [[2.0, 0.0], [0.0, 0.0]], [1.0, 0.0], [2 * ROOT_HALF, 0.0],
    ),
    "opposite directions": Different(
        "Opposite vectors have no Karcher mean: we take the plain mean; mergekit starts from one of them and stays there.",
        "karcher", [[1.0, 0.0], [-3.0, 0.0]], [-1.0, 0.0], [2.0, 0.0], weighted=False, base=False,
    ),
}  # fmt: skip


class GivenDraws(Draws):
    """Draws whose numbers are given."""

    def __init__(self, numbers: list[Tensor]) -> None:
        super().__init__(seed=0, tensor="w", experts=NAMES[: len(numbers)])
        self.__dict__["numbers"] = numbers

    def stream(self, expert: int):
        return lambda shape: self.__dict__["numbers"][expert].reshape(tuple(shape))


def same_inputs(case: Same, precision: str) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Base and experts as stored, (8, 40), and the numbers of our own draws for them. No two sizes in a delta are alike, which in
    bfloat16 takes choosing: what becomes of ties is a difference of its own."""
    wide, deltas = made(case.k, shape=(2000,), seed=3)
    base, *experts = (tensor.to(getattr(torch, precision)) for tensor in (wide, *(wide + delta for delta in deltas)))
    sizes = torch.stack([expert.float() - base.float() for expert in experts]).abs()
    chosen, seen = [], [set() for _ in experts]
    for entry, column in enumerate(sizes.T.tolist()):
        if all(size not in known for size, known in zip(column, seen, strict=True)) and len(chosen) < 320:
            chosen.append(entry)
            for size, known in zip(column, seen, strict=True):
                known.add(size)
    base, *experts = (tensor[chosen].reshape(8, 40) for tensor in (base, *experts))
    draws = Draws(0, "w", NAMES[: case.k])
    numbers = [draws.stream(q)(base.shape) for q in range(case.k)] if case.random else []
    return base, experts, numbers


def parameters(method: str, weights: list[float], weighted: bool) -> dict[str, Any]:
    if method == "slerp":
        return {"t": weights[1] / sum(weights)}
    return {"weight": weights} if weighted else {}


@pytest.fixture(scope="session")
def mergekit(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest):
    """What mergekit makes of all cases, in one process: (tensors, errors) by the name of the case."""
    python = ROOT / ".venv-mergekit" / "bin" / "python"
    if not python.exists():
        asked_for = "mergekit" in request.config.getoption("markexpr")
        (pytest.fail if asked_for else pytest.skip)("mergekit has no virtual environment yet: run scripts/mergekit_venv.sh")
    cases: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}

    def add(name: str, inputs: list[Tensor], numbers: list[Tensor], **case: Any) -> None:
        cases[name] = {"tensors": len(inputs), "numbers": len(numbers), "compute": "float32", "out": None} | case
        tensors.update({f"{name}/{i}": tensor.contiguous() for i, tensor in enumerate(inputs)})
        tensors.update({f"{name}/u/{i}": tensor.contiguous() for i, tensor in enumerate(numbers)})

    for number, case in enumerate(SAME):
        for precision in PRECISIONS:
            for kind, weights in WEIGHTS.items():
                base, experts, numbers = same_inputs(case, precision)
                inputs = [base, *experts] if case.base else experts
                index = 0 if case.base or case.method == "slerp" else None
                given = parameters(case.method, weights[case.k - 2], case.weighted) | case.theirs
                add(f"{number}/{precision}/{kind}", inputs, numbers, method=case.method, parameters=given, base_index=index, out=precision)
    for name, case in DIFFERENT.items():
        deltas = [torch.tensor(delta) for delta in case.deltas]
        inputs = [torch.zeros_like(deltas[0]), *deltas] if case.base else deltas
        given = parameters(case.method, [1 / len(deltas)] * len(deltas), case.weighted) | case.parameters
        numbers = [torch.tensor(row) for row in case.numbers]
        add(f"different/{name}", inputs, numbers, method=case.method, parameters=given, base_index=0 if case.base else None)

    folder = tmp_path_factory.mktemp("mergekit")
    paths = [folder / name for name in ("cases.json", "in.safetensors", "out.safetensors")]
    paths[0].write_text(json.dumps(cases))
    save_file(tensors, paths[1])
    command = [python, Path(__file__).with_name("mergekit_oracle.py"), *paths]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return load_file(paths[2]), json.loads(done.stdout)


@pytest.mark.mergekit
@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("number", "case", "kind"),
    [
        pytest.param(number, case, kind, id=f"{case.method}-{number}-{kind}")
        for number, case in enumerate(SAME)
        for kind in (WEIGHTS if case.weighted else ["uniform"])
    ],
)
def test_mergekit_gives_the_same(mergekit, number, case, kind, precision):
    theirs, errors = mergekit
    name = f"{number}/{precision}/{kind}"
    assert name not in errors, errors[name]
    base, experts, _ = same_inputs(case, precision)
    deltas = [expert.float() - base.float() for expert in experts]
    merged = ours(case.method, base.float(), deltas, WEIGHTS[kind][case.k - 2], **case.options).to(base.dtype)
    assert theirs[name].dtype == merged.dtype
    if precision == "float32":
        torch.testing.assert_close(merged, theirs[name], rtol=1e-5, atol=5e-6)
    else:  # what is the same before rounding is at most one rounding apart after it, and hardly ever that
        torch.testing.assert_close(merged, theirs[name], rtol=2**-7, atol=1e-5)
        assert float((merged == theirs[name]).float().mean()) > 0.97


@pytest.mark.mergekit
@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFERENT)
def test_mergekit_differs_where_we_mean_to(mergekit, name):
    theirs, errors = mergekit
    case = DIFFERENT[name]
    deltas = [torch.tensor(delta) for delta in case.deltas]
    draws: dict[str, Any] = {"draws": GivenDraws([torch.tensor(row) for row in case.numbers])} if case.numbers else {}
    weights = [1 / len(deltas)] * len(deltas)
    merged = METHODS[case.method].function(torch.zeros_like(deltas[0]), deltas, weights, **case.options, **draws)
    torch.testing.assert_close(merged, torch.tensor(case.ours), rtol=1e-4, atol=1e-9)
    if case.theirs is None:
        assert f"different/{name}" in errors
    else:
        torch.testing.assert_close(theirs[f"different/{name}"], torch.tensor(case.theirs), rtol=1e-4, atol=1e-9)


def test_every_method_that_both_have_is_compared():
    theirs = {"linear", "slerp", "nuslerp", "karcher", "model_stock", "sce", "task_arithmetic", "ties", "dare_ties", "dare_linear"}
    theirs |= {"breadcrumbs", "breadcrumbs_ties", "della", "della_linear"}
    assert {case.method for case in SAME} == theirs & set(METHODS)
    assert theirs <= set(METHODS)


def test_the_differences_are_documented():
    text = " ".join((ROOT / "docs" / "methods-vs-mergekit.md").read_text("utf-8").split())
    for name, case in DIFFERENT.items():
        assert f"| {name} | `{case.method}` | {case.why} |" in text
