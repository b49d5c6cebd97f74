"""A forward pass block by block: the very numbers of the whole model, in every family, and no more than a block in memory."""

import threading
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch

from recall_merge.files.checkpoint import open_checkpoint
from recall_merge.models.hidden_states import pooled_hidden_states
from recall_merge.models.layerwise import LayerwiseForward, _Batch, step
from recall_merge.models.load import build_model
from recall_merge.runtime.errors import CheckpointError
from recall_merge.runtime.memory import zeros
from tiny import FAMILIES

TOKENS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31], [40]]


def parameters(base):
    def of(layer):
        return {name: base.read(name) for name in base.tensors if base.layers.of(name) == layer}

    return of


def steps(walk, base, last):
    return [walk.step(parameters(base)(layer)) for layer in range(last + 1)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_numbers_of_the_whole_model(family, dtype, bases, monkeypatch):
    from recall_merge.models import hidden_states as hidden

    monkeypatch.setattr(hidden.make_batches, "__defaults__", (24,))  # several batches
    base = open_checkpoint(bases(family))
    model = build_model(base.folder, {name: base.read(name) for name in base.tensors}, dtype=dtype)
    wanted = pooled_hidden_states(model, TOKENS, base.layers)
    for threads in (1, 2):
        with LayerwiseForward(base.folder, TOKENS, base.layers, dtype=dtype, threads=threads) as walk:
            found = steps(walk, base, base.layers.blocks)
        assert torch.equal(torch.stack(found), wanted)
    with LayerwiseForward(base.folder, TOKENS, base.layers, dtype=dtype, pooling="last") as walk:
        found = steps(walk, base, 1)[1:]
    assert torch.equal(torch.stack(found), pooled_hidden_states(model, TOKENS, base.layers, at=[1], pooling="last"))


def test_no_more_than_a_block_is_there(llama):
    base = open_checkpoint(llama)
    with LayerwiseForward(base.folder, TOKENS, base.layers) as walk:
        for layer in range(base.layers.blocks + 1):
            walk.step(parameters(base)(layer))
            blocks = [p for name, p in walk._model.named_parameters() if ".layers." in name]
            assert all(parameter.is_meta for parameter in blocks)


@pytest.mark.parametrize("threads", [1, 2])
def test_of_no_more_models_than_threads_is_a_block_there(llama, monkeypatch, threads):
    """Six models of one batch each, which all lie in wait on the threads at once."""
    base, most = open_checkpoint(llama), 0

    def bound():
        return sum(any(not p.is_meta for block in walk._blocks for p in block.parameters()) for walk in walks)

    def go_on(batch, real=_Batch.go_on):
        nonlocal most
        most = max(most, bound())
        return real(batch)

    monkeypatch.setattr(_Batch, "go_on", go_on)
    with ExitStack() as stack:
        walks = [stack.enter_context(LayerwiseForward(base.folder, TOKENS[:2], base.layers, threads=threads)) for _ in range(6)]
        for layer in range(base.layers.blocks + 1):
            states = step(walks, [partial(parameters(base), layer)] * 6)
            assert bound() == 0 and all(torch.equal(state, states[0]) for state in states)
    assert 0 < most <= threads


def test_stopped_early_it_leaves_no_thread(llama):
    base, threads = open_checkpoint(llama), threading.active_count()
    with pytest.raises(KeyError), LayerwiseForward(base.folder, TOKENS, base.layers) as walk:
        walk.step(parameters(base)(0))
        raise KeyError
    assert threading.active_count() == threads


def test_a_block_without_its_numbers_is_an_error(llama):
    base = open_checkpoint(llama)
    with LayerwiseForward(base.folder, TOKENS, base.layers) as walk:
        walk.step(parameters(base)(0))
        with pytest.raises(CheckpointError, match="needs numbers that it does not have"):
            walk.step({})
    with LayerwiseForward(base.folder, TOKENS, base.layers) as walk, pytest.raises(CheckpointError, match="unexpected keys"):
        walk.step({"stray.weight": torch.zeros(2)})


def test_zeros_take_no_memory_until_they_are_written_to():
    def anonymous():
        return next(
            int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")
        )

    before = anonymous()
    table = zeros((1 << 14, 1 << 12), torch.float32)  # 256 MB
    table[5] = torch.arange(1 << 12)
    assert table[5, 7] == 7 and not table[4].any() and not table[6].any()
    assert anonymous() - before < 1 << 25
    assert zeros((0, 3), torch.bfloat16).shape == (0, 3)
