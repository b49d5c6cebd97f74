"""Every method in `METHODS` keeps the same promises."""

import shutil
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from pydantic import ValidationError, create_model
from safetensors.torch import save_file
from torch import Tensor

from recall_merge import merge
from recall_merge.maths.deltas import LowRank
from recall_merge.maths.methods import ALIASES, METHODS, Draws, Method, method
from recall_merge.maths.moments import Moment
from recall_merge.runtime.errors import RecallError
from tiny import edit_json, fine_tuned, load_tensors, make_model, make_tokenizer, save_model

SHAPES = [(), (1,), (7,), (5, 8), (8, 5), (2, 3, 4), (0,), (0, 5), (5, 0)]
NAMES = ("french", "sentiment", "law")

# The options with which a method gives back the expert, if it merges one expert at weight 1. No entry: the defaults.
# None: its formula does not promise it (why is in the comment).
ONE: dict[str, dict[str, Any] | None] = {
    "aligned": {"ridge": 1e-9},
    "wise_ft": {"alpha": 1.0},
    "ties": {"density": 1.0},
    "dare_linear": {"density": 1.0},
    "dare_ties": {"density": 1.0},
    "breadcrumbs": {"density": 1.0},
    "breadcrumbs_ties": {"density": 1.0},
    "della": {"density": 1.0},
    "della_linear": {"density": 1.0},
    "pcb": None,  # the entry of lowest score is always dropped
    "isotropic": None,  # its singular values are made equal
}
# The same for several identical experts at uniform weights.
ALIKE: dict[str, dict[str, Any] | None] = ONE | {
    "task_arithmetic": None,  # a sum: k times the delta
    "null_space": None,  # what experts share leaves all of them
    "tsv": {"rank": 8},  # of each it keeps only rank / k otherwise
}
# Options beside the defaults with which the promises are checked too.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "aligned": [{"offdiagonal": 1.0, "ridge": 0.1}],
    "regmean": [{"offdiagonal": 1.0, "ridge": 0.1}],
    "ties": [{"elect": "unweighted", "mean": "count"}, {"elect": "count", "mean": "none"}, {"rescale": "l1"}, {"density": 1.0}],
    "dare_linear": [{"rescale": "l1"}, {"rescale": "none", "density": 0.9}],
    "dare_ties": [{"rescale": "l1"}],
    "breadcrumbs": [{"density": 0.5, "gamma": 0.2}, {"density": 0.9, "gamma": 0.3, "rescale": "l1"}],
    "della": [{"rescale": "l1"}, {"density": 0.1, "epsilon": 0.5}],
    "slerp": [{"vectors": "rows"}, {"vectors": "columns"}, {"sphere": "deltas"}],
    "nuslerp": [{"vectors": "rows"}, {"vectors": "columns"}, {"sphere": "weights"}],
    "karcher": [{"sphere": "deltas"}],
    "model_stock": [{"vectors": "rows"}],
    "sce": [{"density": 1.0}],
    "pcb": [{"density": 1.0}],
    "tsv": [{"rank": 1}],
    "isotropic": [{"common": 0.5}, {"common": 0.0}],
    "null_space": [{"share": 0.0}, {"share": 1.0, "scale": 0.5}],
    "opcm": [{"growth": "sqrt", "alpha": 1.0}, {"alpha": 0.0}],
}
CASES = [
    pytest.param(entry, options, id=f"{entry.name}-{i}" if i else entry.name)
    for entry in METHODS.values()
    for i, options in enumerate([{}, *VARIANTS.get(entry.name, [])])
]
every_method = pytest.mark.parametrize("entry", METHODS.values(), ids=lambda entry: entry.name)
every_case = pytest.mark.parametrize(("entry", "options"), CASES)


def count(entry: Method) -> int:
    fewest, most = entry.experts
    return max(fewest, min(3, most or 3))


def random_deltas(shape: tuple[int, ...], k: int, *, seed: int = 0, size: float = 0.1, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    base, *deltas = torch.randn(k + 1, *shape, generator=generator, dtype=dtype)
    return base, [delta * size for delta in deltas]


def uneven(k: int) -> list[float]:
    return [[1.0], [0.7, 0.3], [0.5, 0.3, 0.2]][k - 1]


def run(entry: Method, base: Tensor, deltas: list[Any], weights: list[float], options: dict[str, Any], *, seed=0, names=NAMES) -> Tensor:
    given: dict[str, Any] = {}
    if entry.random:
        given["draws"] = Draws(seed, "w", tuple(names[: len(deltas)]))
    if entry.informed and base.ndim == 2:
        given["moments"] = [moment(name, *base.shape) for name in names[: len(deltas)]]
    return entry.function(base, deltas, weights, **given, **options)


def moment(name: str, outputs: int, size: int) -> Moment:
    """What an expert's statistics says of a layer's inputs: of each expert something else."""
    generator = torch.Generator().manual_seed(NAMES.index(name))
    factor = torch.randn(size, 2, generator=generator, dtype=torch.float64)
    rest, gradient = 0.1 + torch.rand(size, generator=generator, dtype=torch.float64), torch.rand(outputs, generator=generator)
    return Moment(factor, rest, gradient)


def promised(exceptions: dict[str, dict[str, Any] | None], k: int) -> list[tuple[str, dict[str, Any]]]:
    """Every method of k experts that keeps a promise, with the options for it. A method without an entry keeps it with its defaults."""
    names = [name for name, entry in METHODS.items() if entry.experts[0] <= k <= (entry.experts[1] or k)]
    return [(name, options) for name in names if (options := exceptions.get(name, {})) is not None]


def test_the_tables_name_methods():
    assert set(ALIKE) | set(VARIANTS) <= set(METHODS)


@pytest.mark.parametrize("shape", SHAPES)
@every_case
def test_zero_deltas_give_the_base(entry, options, shape):
    base, deltas = random_deltas(shape, count(entry))
    merged = run(entry, base, [torch.zeros_like(delta) for delta in deltas], uneven(len(deltas)), options)
    # the sphere of weights goes through lengths and angles; elsewhere not one bit may change
    on_weights = entry.name == "karcher" or options.get("sphere") == "weights" or (entry.name == "slerp" and "sphere" not in options)
    torch.testing.assert_close(merged, base, rtol=1e-6 if on_weights else 0, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "options"), promised(ONE, 1))
def test_one_expert_at_weight_one_is_the_expert(name, options, shape):
    base, deltas = random_deltas(shape, 1)
    torch.testing.assert_close(run(METHODS[name], base, deltas, [1.0], options), base + deltas[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "options"), promised(ALIKE, 2))
def test_identical_experts_give_the_expert(name, options, shape):
    entry = METHODS[name]
    k = max(2, count(entry))
    base, deltas = random_deltas(shape, 1)
    torch.testing.assert_close(run(entry, base, deltas * k, [1 / k] * k, options), base + deltas[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(7,), (5, 8)])
@every_case
def test_the_order_of_experts_does_not_matter(entry, options, shape):
    k = count(entry)
    base, deltas = random_deltas(shape, k)
    forward, backward = (
        run(entry, base, deltas[::step], uneven(k)[::step], options, names=NAMES[:k][::step]) for step in (1, -1)
    )  # fmt: skip
    if entry.ordered and k > 1 and len(shape) == 2:
        assert not torch.allclose(forward, backward, rtol=1e-3)
    else:
        torch.testing.assert_close(forward, backward, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@every_case
def test_shape_and_dtype_are_kept_and_inputs_are_not_modified(entry, options, shape, dtype):
    base, deltas = random_deltas(shape, count(entry), dtype=dtype)
    before = [tensor.clone() for tensor in (base, *deltas)]
    merged = run(entry, base, deltas, uneven(len(deltas)), options)
    assert merged.shape == base.shape
    assert merged.dtype == dtype
    assert merged.isfinite().all()
    assert all(torch.equal(tensor, copy) for tensor, copy in zip((base, *deltas), before, strict=True))
    merged.fill_(9.0)  # the result is a tensor of its own
    assert torch.equal(base, before[0])


@every_method
def test_shapes_are_checked(entry):
    """By the hook that tests/conftest.py installs, for all annotations of the mathematics."""
    base, deltas = random_deltas((5, 8), 0)[0], random_deltas((5, 7), count(entry))[1]
    with pytest.raises(TypeCheckError, match="deltas"):
        run(entry, base, deltas, uneven(len(deltas)), {})


@every_case
def test_the_sign_of_a_zero_does_not_matter(entry, options):
    base, deltas = random_deltas((5, 8), count(entry))
    deltas = [torch.where(delta.abs() < 0.05, 0.0, delta) for delta in deltas]
    base[:, 0] = 0.0
    plain = run(entry, base, deltas, uneven(len(deltas)), options)
    negative = [torch.where(tensor == 0, -0.0, tensor) for tensor in (base, *deltas)]
    torch.testing.assert_close(run(entry, negative[0], negative[1:], uneven(len(deltas)), options), plain, rtol=0, atol=0)


@pytest.mark.parametrize("entry", [entry for entry in METHODS.values() if entry.experts[1] != 1], ids=lambda entry: entry.name)
def test_rows_that_an_expert_lacks_are_those_of_the_merge_without_it(entry, pair, tmp_path):
    k = entry.experts[1] or 3
    names = [*"ab"[: k - 1], "short"]
    weights = uneven(k)
    without = [weight / sum(weights[:-1]) for weight in weights[:-1]]
    method = entry.name if entry.experts[0] <= k - 1 else "linear"  # of one expert
    alone = merged_from(pair, tmp_path / "alone", method, names[:-1], without)
    merged = merged_from(pair, tmp_path / "merged", entry.name, names, weights)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        torch.testing.assert_close(merged[name][96:], alone[name][96:], rtol=1e-6, atol=1e-7)
        assert not torch.equal(merged[name][:96], alone[name][:96])


@every_method
def test_zeros_keep_their_sign_and_whole_numbers_and_empty_tensors_pass(entry, pair, tmp_path):
    k = count(entry)
    for name in ("base", *"abc"[:k]):
        folder = shutil.copytree(pair / name, tmp_path / name)
        tensors = load_tensors(folder) | {"model.layers.0.table": torch.arange(8), "model.layers.0.nothing": torch.zeros(0, 4)}
        tensors["model.norm.weight"][:4] = -0.0
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    merged = merged_from(tmp_path, tmp_path / "out", entry.name, "abc"[:k], uneven(k))
    assert merged["model.norm.weight"][:4].signbit().all() and not merged["model.norm.weight"][:4].any()
    assert torch.equal(merged["model.layers.0.table"], torch.arange(8))
    assert merged["model.layers.0.nothing"].shape == (0, 4)
    changed = load_tensors(tmp_path / "a") | {"model.layers.0.table": torch.arange(8) + 1}
    save_file(changed, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecallError, match=r"expert 'a' has other numbers in 'model\.layers\.0\.table'"):
        merged_from(tmp_path, tmp_path / "again", entry.name, "abc"[:k], uneven(k))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Base and experts 'a', 'b' and 'c' of 98 tokens, and 'short' of 96."""
    folder = tmp_path_factory.mktemp("pair")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>", "<tool>"])
    base = save_model(make_model("llama", vocab_size=98), folder / "base")
    tokenizer.save_pretrained(base)
    for seed, name in enumerate(("a", "b", "c", "short"), start=1):
        fine_tuned(base, folder / name, seed=seed)
    tensors = load_tensors(folder / "short")
    tensors |= {key: tensors[key][:96].clone() for key in ("model.embed_tokens.weight", "lm_head.weight")}
    save_file(tensors, folder / "short" / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "short" / "config.json", vocab_size=96)
    make_tokenizer().save_pretrained(folder / "short")
    return folder


def merged_from(folder, out, method, names, weights):
    experts = [{"name": name, "path": str(folder / name)} for name in names]
    run = {
        "base": str(folder / "base"),
        "experts": experts,
        "method": method,
        "weights": weights,
        "vocabulary": "base" if "short" in names else None,
    }
    merge(run | {"out": {"path": str(out), "reload": "short" in names}})
    return load_tensors(out)


@every_case
def test_something_is_merged(entry, options):
    base, deltas = random_deltas((5, 8), count(entry))
    assert not torch.equal(run(entry, base, deltas, uneven(len(deltas)), options), base)


@every_case
def test_the_same_seed_gives_the_same_bytes(entry, options):
    base, deltas = random_deltas((5, 8), count(entry))
    one, two, other = (run(entry, base, deltas, uneven(len(deltas)), options, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert entry.random != torch.equal(one, other)


@every_case
def test_layout_in_memory_does_not_matter(entry, options):
    base, deltas = random_deltas((5, 8), count(entry))
    strided = [tensor.T.contiguous().T for tensor in (base, *deltas)]
    plain = run(entry, base, deltas, uneven(len(deltas)), options)
    torch.testing.assert_close(run(entry, strided[0], strided[1:], uneven(len(deltas)), options), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cut", [1, 3, 17])
@pytest.mark.parametrize(("entry", "options"), [case for case in CASES if case.values[0].elementwise])
def test_elementwise_methods_merge_in_pieces(entry, options, cut):
    base, deltas = random_deltas((40,), count(entry))
    weights = uneven(len(deltas))
    whole = run(entry, base, deltas, weights, options)
    parts = [run(entry, base[part], [delta[part] for delta in deltas], weights, options) for part in (slice(0, cut), slice(cut, None))]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (16, 16)])
@pytest.mark.parametrize(("entry", "options"), [case for case in CASES if case.values[0].factors])
def test_factors_and_dense_deltas_give_the_same(entry, options, shape):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator)
    low = [LowRank(torch.randn(shape[0], r, generator=generator), torch.randn(r, shape[1], generator=generator)) for r in (2, 1, 3)]
    dense = [delta.dense() for delta in low]
    weights = uneven(3)
    expected = run(entry, base, dense, weights, options)
    torch.testing.assert_close(run(entry, base, low, weights, options), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(run(entry, base, [low[0], dense[1], low[2]], weights, options), expected, rtol=1e-3, atol=1e-4)


def hard_deltas(delta: Tensor, k: int) -> dict[str, list[Tensor]]:
    zero = torch.zeros_like(delta)
    return {
        "tiny": [delta * 1e-12] * k,
        "huge": [delta * 1e6, *[delta] * (k - 1)],
        "one of them zero": [delta, *[zero] * (k - 1)],
        "opposite": [delta, *[-delta] * (k - 1)],
        "cancelling": [delta, *[-delta / max(1, k - 1)] * (k - 1)],
        "constant": [torch.ones_like(delta)] * k,
        "one entry": [torch.where(delta == delta.max(), delta, zero)] * k,
    }


@pytest.mark.parametrize("kind", hard_deltas(torch.zeros(1), 2))
@every_case
def test_hard_cases_stay_finite(entry, options, kind):
    k = count(entry)
    for shape in [(), (7,), (5, 8)]:
        base, deltas = random_deltas(shape, 1)
        for weights in (uneven(k), [1.0, *[0.0] * (k - 1)], [0.0] * k):
            merged = run(entry, base, hard_deltas(deltas[0], k)[kind], weights, options)
            assert merged.isfinite().all(), f"shape {shape}, weights {weights}"


@every_method
def test_options_are_typed_ranged_and_explained(entry):
    fields: Any = {name: (option.annotation, option.default) for name, option in entry.options.items()}
    model = create_model("Options", __config__={"extra": "forbid", "validate_default": True}, **fields)
    model()
    for name, option in entry.options.items():
        assert f"\n    {name} = {option.default}: " in entry.doc
        assert len(entry.doc.split(f"\n    {name} = {option.default}: ")[1].split("\n")[0]) > 10
        with pytest.raises(ValidationError):
            model(**{name: "nonsense"})
        if getattr(option.annotation, "__metadata__", ()) and "in (0, 1]" in entry.doc.split(f"    {name} = ")[1].split("\n")[0]:
            with pytest.raises(ValidationError):
                model(**{name: 0.0})


@every_method
def test_the_docstring_gives_formula_and_source(entry):
    assert any(formula in entry.doc for formula in ("= theta_0 +", "= theta_0^i +")) or "theta = " in entry.doc
    assert "arXiv:" in entry.source or "doi:" in entry.source or "github.com" in entry.source
    assert entry.doc.splitlines()[0].endswith(".")


def test_aliases_are_names_of_their_own_for_methods():
    assert all(alias.method in METHODS and name not in METHODS and alias.name == name for name, alias in ALIASES.items())
    assert all(alias.doc.splitlines()[0].endswith(".") and "arXiv:" in alias.source for alias in ALIASES.values())


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match=r"'linear' is registered twice: recall_merge.maths.methods.averages.linear and .*again"):

        @method("linear", source="")
        def again(base, deltas, weights):
            return base


def test_draws_come_in_pieces_as_in_one():
    draws = Draws(3, "w", NAMES)
    stream = draws.stream(1)
    assert torch.equal(torch.cat([stream((n,)) for n in (1, 2, 7, 90)]), draws.stream(1)((100,)))
    assert not torch.equal(draws.stream(0)((9,)), draws.stream(1)((9,)))
    assert not torch.equal(Draws(3, "v", NAMES).stream(1)((9,)), draws.stream(1)((9,)))
