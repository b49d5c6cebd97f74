"""Second moments: what a sketch of inputs keeps, against numpy's eigenvectors of all of them, and shrinking by hand."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dense import cut_moment, spectral_error
from recall_merge.maths.moments import HELD, Moment, Sketch, identity
from recall_merge.maths.trimming import Draws


def inputs(seed, rows=40, size=12, decay=0.0):
    """Rows whose entries are correlated; their singular values fall as k^-decay."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(rows, size)) @ (rng.normal(size=(size, size)) * np.arange(1, size + 1)[:, None] ** -decay)
    return torch.from_numpy(mixed).float()


def draw(seed=0):
    return Draws(seed, "w", ("a",)).streams[0]


def sketch(x, rank, *, block=7, held=HELD, seed=0):
    made = Sketch(rank, draw(seed), held=held)
    for rows in x.split(block):
        made.add(rows)
    assert made.count == len(x)
    return made.moment()


@pytest.mark.parametrize("rows", [5, 40])
def test_the_diagonal_is_kept_and_at_full_rank_everything(rows):
    x = inputs(1, rows)
    wanted = (x.double().mT @ x.double() / rows).numpy()
    assert sketch(x, 12).dense().numpy() == pytest.approx(wanted, rel=1e-4, abs=1e-3)
    for rank in (0, 3):
        found = sketch(x, rank)
        assert found.factor.shape == (12, rank) and found.factor.dtype == found.rest.dtype == torch.float32
        assert found.diagonal.numpy() == pytest.approx(wanted.diagonal(), rel=1e-5)
        assert (found.rest >= 0).all()


@pytest.mark.parametrize("rank", [1, 4])
def test_the_leading_eigenvectors_are_kept(rank):
    x = inputs(2)
    wanted = cut_moment(x.double().mT @ x.double() / len(x), rank).factor.double()
    found = sketch(x, rank).factor.double()
    assert (found @ found.mT).numpy() == pytest.approx((wanted @ wanted.mT).numpy(), rel=1e-4, abs=1e-3)


def test_inputs_of_low_rank_need_no_more_and_a_larger_rank_than_their_number_is_their_number():
    x = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]])
    assert sketch(x, 2).dense().numpy() == pytest.approx((x.mT @ x / 2).numpy(), abs=1e-5)
    assert sketch(x, 99).factor.shape == (3, 2)
    assert not sketch(torch.zeros(4, 3), 2).dense().any()


@pytest.mark.parametrize(("rows", "size"), [(700, 300), (300, 700)])
@pytest.mark.parametrize("largest", [1.0, 1000.0])
def test_of_many_inputs_the_directions_are_good_to_a_thousandth(rows, size, largest):
    """Far more than the search spans (4 times 24 + 8). One input dwarfs the others, as models have it."""
    x = inputs(3, rows, size, decay=0.7)
    x[:, 5] *= largest
    assert spectral_error(sketch(x, 24, block=256), x) < 1e-3
    if largest > 1:  # and so are the others, beside it
        scale = torch.ones(size).index_fill(0, torch.tensor(5), 1 / largest)
        found = sketch(x, 24, block=256)
        beside = Moment(found.factor * scale[:, None], found.rest * scale**2).dense().double()
        wanted = cut_moment(x.double().mT @ x.double() / rows, 24)
        wanted = Moment(wanted.factor * scale[:, None], wanted.rest * scale**2).dense().double()
        assert torch.linalg.matrix_norm(beside - wanted, 2) < 3e-3 * torch.linalg.matrix_norm(wanted, 2)


def test_more_inputs_than_are_held_are_good_to_a_thousandth():
    x = inputs(4, 3000, 200, decay=0.7)
    found = sketch(x, 8, block=100, held=300)
    assert spectral_error(found, x) < 1e-3
    assert found.diagonal.double().numpy() == pytest.approx(x.double().square().mean(0).numpy(), rel=1e-5)


def test_the_same_blocks_and_seed_give_the_same_bytes():
    x = inputs(5, 400, 200, decay=0.7)
    one, again, other = (sketch(x, 8, block=50, held=150, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.factor, again.factor) and torch.equal(one.rest, again.rest)
    assert not torch.equal(one.factor, other.factor)
    torch.testing.assert_close(one.dense(), other.dense(), rtol=1e-2, atol=1e-2 * float(one.dense().max()))


class Largest(TorchDispatchMode):
    """The numbers of the largest tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor))])
        return made


def test_memory_does_not_grow_with_the_number_of_inputs_nor_with_the_square_of_their_width():
    largest = []
    for blocks in (4, 40):
        with Largest() as mode:
            made = Sketch(4, draw(), held=200)
            for block in range(blocks):
                made.add(inputs(block, 50, 10).repeat(1, 200))  # (50, 2000)
            made.moment()
        largest.append(mode.numbers)
    assert largest[0] == largest[1] <= 2000 * 250


def test_shrinking_by_hand():
    """G = [[5, 2], [2, 1]] has the mean diagonal 3: half of the off-diagonal entries, over 3."""
    moment = Moment(torch.tensor([[2.0], [1.0]]), torch.tensor([1.0, 0.0]))
    assert moment.dense().tolist() == [[5, 2], [2, 1]]
    assert moment.diagonal.tolist() == [5, 1]
    assert moment.shrunk(0.5, unit=False).dense().flatten().tolist() == pytest.approx([5, 1, 1, 1])
    assert moment.shrunk(0.5).dense().flatten().tolist() == pytest.approx([5 / 3, 1 / 3, 1 / 3, 1 / 3])
    assert moment.shrunk(0.5).factor.dtype == torch.float64
    assert moment.shrunk(0.0).dense().flatten().tolist() == pytest.approx([5 / 3, 0, 0, 1 / 3])


def test_zero_inputs_become_the_identity_only_where_a_unit_is_asked_for():
    zero = Moment(torch.zeros(3, 1), torch.zeros(3))
    assert torch.equal(zero.shrunk(0.9).dense(), torch.eye(3, dtype=torch.float64))
    assert torch.equal(identity(3).dense(), torch.eye(3, dtype=torch.float64))
    assert not zero.shrunk(0.9, unit=False).dense().any()
