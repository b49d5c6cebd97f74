"""Similarity of hidden states: an example on paper from S to theta, every kernel against loops in numpy, and its limits."""

import math

import numpy as np
import pytest
import torch

from recall_merge.maths.methods import METHODS
from recall_merge.maths.similarity import KERNELS, cka, cosine, kernel, rbf, sigma_squared, similarity
from recall_merge.maths.weights import outside_blocks, softmax_weights


def random_states(n, m=5, d=4, seed=0):
    return np.random.default_rng([n, m, d, seed]).normal(size=(n, m, d))


# --- the paper's letters, by hand --------------------------------------------------------------------------------------------------------


def test_an_example_on_paper_from_hidden_states_to_merged_parameters():
    """Three models, two typical samples, width 2, one block (L = 1). The newest is M_3.

    Layer 0: all models have the same embeddings, so S^0 = (1, 1, 1) and w^0 = (1/3, 1/3, 1/3).

    Layer 1:           x_1      x_2
        h_1          (0, 2)   (1, 3)
        h_2          (1, 1)   (1, 1)
        h_3          (0, 0)   (1, 1)

    Squared distances over x_1, x_2:   |h_1 - h_2|^2 = 1 + 1, 0 + 4 = 2, 4;   |h_1 - h_3|^2 = 4, 4;   |h_2 - h_3|^2 = 2, 0.
    In order 0 2 2 4 4 4; the median is (2 + 4) / 2, so sigma^2 = 3 and 2 sigma^2 = 6.

        S_1 = (e^(-4/6) + e^(-4/6)) / 2 = 0.5134        S_2 = (e^(-2/6) + e^0) / 2 = (0.7165 + 1) / 2 = 0.8583        S_3 = 1
        e^S = 1.6710, 2.3591, 2.7183; their sum is 6.7484
        w^1 = 0.2476, 0.3496, 0.4028

    The final norm and head, layer 2, have the weights of layer 1. With theta = 1, 2, 4 in the three models, whatever the base:
        theta^0 = (1 + 2 + 4) / 3 = 2.3333
        theta^1 = theta^2 = 0.2476 * 1 + 0.3496 * 2 + 0.4028 * 4 = 0.2476 + 0.6992 + 1.6112 = 2.5580
    """
    h = torch.tensor([
        [[[5.0, 7.0], [6.0, 8.0]]] * 3,
        [[[0.0, 2.0], [1.0, 3.0]], [[1.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [1.0, 1.0]]],
    ])  # fmt: skip
    s = torch.stack([similarity(layer) for layer in h])
    w = outside_blocks(softmax_weights(s, temperature=1.0))
    base, theta = torch.tensor([10.0]), [torch.tensor([value]) for value in (1.0, 2.0, 4.0)]
    deltas = [expert - base for expert in theta]
    merged = [float(METHODS["linear"].function(base, deltas, row.tolist())) for row in w]

    assert digits(s) == [["1.0000", "1.0000", "1.0000"], ["0.5134", "0.8583", "1.0000"]]
    assert digits(w) == [["0.3333", "0.3333", "0.3333"], ["0.2476", "0.3496", "0.4028"], ["0.2476", "0.3496", "0.4028"]]
    assert digits([merged]) == [["2.3333", "2.5580", "2.5580"]]


def digits(rows):
    return [[f"{float(value):.4f}" for value in row] for row in rows]


# --- every kernel against loops ----------------------------------------------------------------------------------------------------------


def squared_distance(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def sigma2_by_loops(h, bandwidth):
    if bandwidth == "dimension":
        return len(h[0][0]) / 2
    if bandwidth != "median":
        return bandwidth**2
    distances = sorted(squared_distance(h[p][x], h[q][x]) for q in range(len(h)) for p in range(q) for x in range(len(h[0])))
    k = len(distances)
    return (distances[(k - 1) // 2] + distances[k // 2]) / 2


def rbf_by_loops(h, bandwidth):
    n, m = len(h), len(h[0])
    two_sigma2 = 2 * sigma2_by_loops(h, bandwidth)
    return [sum(math.exp(-squared_distance(h[q][x], h[n - 1][x]) / two_sigma2) for x in range(m)) / m for q in range(n)]


def cosine_by_loops(h):
    def of(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    return [sum(of(a, b) for a, b in zip(model, h[-1], strict=True)) / len(model) for model in h]


def cka_by_loops(h):
    """|Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F), entry by entry, with the (d, d) products of the definition."""

    def centred(model):
        means = [sum(column) / len(model) for column in zip(*model, strict=True)]
        return [[x - mean for x, mean in zip(row, means, strict=True)] for row in model]

    def frobenius_squared(a, b):
        return sum(
            sum(row_a[i] * row_b[j] for row_a, row_b in zip(a, b, strict=True)) ** 2 for i in range(len(a[0])) for j in range(len(b[0]))
        )

    models = [centred(model) for model in h]
    own = [frobenius_squared(model, model) for model in models]
    return [frobenius_squared(models[-1], model) / math.sqrt(norm * own[-1]) for model, norm in zip(models, own, strict=True)]


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("bandwidth", ["median", "dimension", 0.7, 3])
def test_rbf_agrees_with_loops(n, bandwidth):
    h = random_states(n)
    found = similarity(torch.from_numpy(h), kernel="rbf", bandwidth=bandwidth)
    assert found.tolist() == pytest.approx(rbf_by_loops(h.tolist(), bandwidth), rel=1e-12)
    assert len(set(found.tolist())) == n, "random models all differ"


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize(("name", "by_loops"), [("cka", cka_by_loops), ("cosine", cosine_by_loops)])
def test_cka_and_cosine_agree_with_loops(n, name, by_loops):
    h = random_states(n)
    found = similarity(torch.from_numpy(h), kernel=name, bandwidth=0.1)  # which they ignore
    assert found.tolist() == pytest.approx(by_loops(h.tolist()), rel=1e-12)
    assert found[-1] == pytest.approx(1, abs=1e-15)


def test_the_default_is_rbf_with_the_median():
    h = torch.from_numpy(random_states(3))
    assert torch.equal(similarity(h), similarity(h, kernel="rbf", bandwidth="median"))
    assert torch.equal(rbf(h), rbf(h, "median"))


def test_a_single_sample():
    h = random_states(3, m=1)
    assert similarity(torch.from_numpy(h)).tolist() == pytest.approx(rbf_by_loops(h.tolist(), "median"), rel=1e-12)
    assert similarity(torch.from_numpy(h), kernel="cosine").tolist() == pytest.approx(cosine_by_loops(h.tolist()), rel=1e-12)
    assert similarity(torch.from_numpy(h), kernel="cka").tolist() == [1, 1, 1], "one sample, centred, is 0 in every model"


def test_everything_is_computed_in_float64():
    h = torch.tensor([[[4096.0, 1.0]], [[4096.0, 1.0 + 2**-20]], [[4096.0, 2.0]]])  # float32; squares of it would lose the small part
    for name in KERNELS:
        found = similarity(h, kernel=name)
        assert found.dtype == torch.float64
        assert found.tolist() == similarity(h.double(), kernel=name).tolist()
    assert similarity(h, kernel="cosine").tolist() == pytest.approx(cosine_by_loops(h.tolist()), rel=1e-15)


# --- what the kernels ignore, and what not -----------------------------------------------------------------------------------------------


def test_the_median_makes_rbf_independent_of_the_scale_of_hidden_states():
    h = torch.from_numpy(random_states(3))
    torch.testing.assert_close(similarity(1000 * h), similarity(h), rtol=1e-12, atol=0)
    assert similarity(1000 * h, bandwidth="dimension")[0] < 1e-100
    assert similarity(1000 * h, bandwidth=1000.0).tolist() == pytest.approx(similarity(h, bandwidth=1.0).tolist(), rel=1e-12)


def test_cka_ignores_rotation_scale_and_shift_and_cosine_only_scale():
    h = random_states(1)[0]
    rotation = np.linalg.qr(random_states(1, m=4, seed=1)[0])[0]
    h = torch.from_numpy(np.stack([3 * h @ rotation + 5, 3 * h, h]))
    assert cka(h).tolist() == pytest.approx([1, 1, 1], abs=1e-12)
    assert cosine(h)[1] == pytest.approx(1, abs=1e-12)
    assert cosine(h)[0] < 0.9
    assert cosine(-h[1:] * torch.tensor([[[1.0]], [[-1.0]]]))[0] == pytest.approx(-1, abs=1e-12)


# --- limits ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_identical_models_have_similarity_1(name, n):
    h = torch.from_numpy(np.repeat(random_states(1), n, axis=0))
    assert similarity(h, kernel=name).tolist() == pytest.approx([1.0] * n, abs=1e-15)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_models_whose_states_are_all_zero_have_similarity_1(name, n):
    assert similarity(torch.zeros(n, 3, 4), kernel=name).tolist() == [1.0] * n


def test_a_zero_model_is_unlike_another_one():
    h = torch.from_numpy(random_states(3))
    h[0] = 0
    for name in ("cka", "cosine"):
        assert similarity(h, kernel=name)[0] == 0, name
        assert similarity(h.flip(0), kernel=name).tolist() == [0, 0, 1], name


def test_cosine_treats_zero_vectors_sample_by_sample():
    h = torch.tensor([
        [[0.0, 0.0], [0.0, 0.0], [3.0, 4.0], [3.0, 4.0]],
        [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [4.0, 3.0]],
    ])  # fmt: skip
    assert cosine(h).tolist() == pytest.approx([(1 + 0 + 0 + 24 / 25) / 4, 1])


def test_a_median_of_zero_is_the_limit_of_small_bandwidths():
    """Two of three models are the same, on two of three samples so is the third: most distances are 0."""
    h = torch.zeros(3, 3, 2)
    h[0, 2] = 1.0
    assert similarity(h).tolist() == pytest.approx([2 / 3, 1, 1])
    assert similarity(h, bandwidth=1e-9).tolist() == pytest.approx([2 / 3, 1, 1])


# --- the table of kernels ----------------------------------------------------------------------------------------------------------------


def test_the_table_of_kernels():
    assert list(KERNELS)[:3] == ["rbf", "cka", "cosine"]
    assert [row.name for row in KERNELS.values()] == list(KERNELS)
    assert [KERNELS[name].has_bandwidth for name in ("rbf", "cka", "cosine")] == [True, False, False]
    assert KERNELS["cka"].summary.startswith("Linear centred kernel alignment")
    assert "arXiv:1905.00414" in KERNELS["cka"].source


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match=r"kernel 'rbf' is registered twice: recall_merge\.maths\.similarity\.rbf and .*another"):

        @kernel("rbf", source="none")
        def another(h):
            return h

    assert KERNELS["rbf"].function is rbf


def test_a_new_kernel_is_one_decorated_function(monkeypatch):
    monkeypatch.setattr("recall_merge.maths.similarity.KERNELS", KERNELS.copy())

    @kernel("laplace", source="here")
    def laplace(h, bandwidth="median"):
        """exp(-|h_q - h_N| / sigma)."""
        return torch.exp(-(h - h[-1]).norm(dim=-1) / sigma_squared(h, bandwidth).sqrt()).mean(-1)

    h = torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]]])
    assert similarity(h, kernel="laplace").tolist() == pytest.approx([math.exp(-1), 1]), "the median distance is 5"
    assert similarity(h, kernel="laplace", bandwidth=10.0).tolist() == pytest.approx([math.exp(-0.5), 1])
