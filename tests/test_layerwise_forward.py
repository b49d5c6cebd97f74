"""A forward pass block by block: the very numbers of the whole model, in every family, and no more than a block in memory."""

import threading
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers

from recall_merge.files.checkpoint import open_checkpoint
from recall_merge.models.hidden_states import pooled_hidden_states
from recall_merge.models.layerwise import LayerwiseForward, _Batch, step
from recall_merge.models.load import build_model
from recall_merge.runtime.errors import CheckpointError, NotLayerwise
from recall_merge.runtime.memory import zeros
from tiny import FAMILIES, save_model, seeded

TOKENS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31], [40]]


def parameters(base):
    def read(layer):
        return {name: base.read(name) for name in base.tensors if base.layers.of(name) == layer}

    return read


def steps(forward, base, last):
    return [forward.step(parameters(base)(layer)) for layer in range(last + 1)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_numbers_of_the_whole_model(family, dtype, bases, monkeypatch):
    from recall_merge.models import hidden_states as hidden

    monkeypatch.setattr(hidden.make_batches, "__defaults__", (24,))  # several batches
    base = open_checkpoint(bases(family))
    model = build_model(base.folder, {name: base.read(name) for name in base.tensors}, dtype=dtype)
    expected = pooled_hidden_states(model, TOKENS, base.layers)
    for threads in (1, 2):
        with LayerwiseForward(base.folder, TOKENS, base.layers, dtype=dtype, threads=threads) as forward:
            states = steps(forward, base, base.layers.blocks)
        assert torch.equal(torch.stack(states), expected)
    with LayerwiseForward(base.folder, TOKENS, base.layers, dtype=dtype, pooling="last") as forward:
        states = steps(forward, base, 1)[1:]
    assert torch.equal(torch.stack(states), pooled_hidden_states(model, TOKENS, base.layers, at=[1], pooling="last"))


def test_a_map_whose_numbers_are_missing_is_told_and_does_not_compute_with_whatever_is_in_memory(tmp_path):
    """OPT's map before its blocks counts as one behind them, by its name. It has no bias: torch multiplies by empty weights then."""
    settings = {"hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    with seeded(0):
        model = transformers.OPTForCausalLM(transformers.OPTConfig(vocab_size=96, max_position_embeddings=130, **settings))
    base = open_checkpoint(save_model(model, tmp_path / "opt"))
    with (
        LayerwiseForward(base.folder, TOKENS, base.layers) as forward,
        pytest.raises(NotLayerwise, match="does not have at that layer: the weights of Linear"),
    ):
        forward.step(parameters(base)(0))


def test_no_parameters_of_blocks_stay_in_memory(llama):
    base = open_checkpoint(llama)
    with LayerwiseForward(base.folder, TOKENS, base.layers) as forward:
        for layer in range(base.layers.blocks + 1):
            forward.step(parameters(base)(layer))
            blocks = [p for name, p in forward._model.named_parameters() if ".layers." in name]
            assert all(parameter.is_meta for parameter in blocks)


@pytest.mark.parametrize("threads", [1, 2])
def test_at_most_as_many_models_as_threads_have_a_block_in_memory(llama, monkeypatch, threads):
    """Six models of one batch each, all ready at once."""
    base, most = open_checkpoint(llama), 0

    def count_loaded():
        return sum(any(not p.is_meta for block in forward._blocks for p in block.parameters()) for forward in passes)

    def go_on(batch, real=_Batch.go_on):
        nonlocal most
        most = max(most, count_loaded())
        return real(batch)

    monkeypatch.setattr(_Batch, "go_on", go_on)
    with ExitStack() as stack:
        passes = [stack.enter_context(LayerwiseForward(base.folder, TOKENS[:2], base.layers, threads=threads)) for _ in range(6)]
        for layer in range(base.layers.blocks + 1):
            states = step(passes, [partial(parameters(base), layer)] * 6)
            assert count_loaded() == 0 and all(torch.equal(state, states[0]) for state in states)
    assert 0 < most <= threads


def test_stopped_early_it_leaves_no_thread(llama):
    base, threads = open_checkpoint(llama), threading.active_count()
    with pytest.raises(KeyError), LayerwiseForward(base.folder, TOKENS, base.layers) as forward:
        forward.step(parameters(base)(0))
        raise KeyError
    assert threading.active_count() == threads


def test_a_block_without_its_parameters_is_an_error(llama):
    base = open_checkpoint(llama)
    with LayerwiseForward(base.folder, TOKENS, base.layers) as forward:
        forward.step(parameters(base)(0))
        with pytest.raises(CheckpointError, match="needs numbers that it does not have"):
            forward.step({})
    with LayerwiseForward(base.folder, TOKENS, base.layers) as forward, pytest.raises(CheckpointError, match="unexpected keys"):
        forward.step({"stray.weight": torch.zeros(2)})


def test_threads_build_models_at_the_same_time_and_others_use_modules_as_ever(llama, monkeypatch):
    """While one thread is inside the building of a model, another one makes an ordinary module, and a third starts a second model."""
    from torch import nn
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    base, inside, go_on = open_checkpoint(llama), threading.Event(), threading.Event()
    register, make_norm = nn.Module.register_parameter, LlamaRMSNorm.__init__

    def pause(*args, **kwargs):
        inside.set()
        assert go_on.wait(60)
        make_norm(*args, **kwargs)

    monkeypatch.setattr(LlamaRMSNorm, "__init__", pause)
    models = {}

    def build(dtype):
        models[dtype] = LayerwiseForward(base.folder, TOKENS, base.layers, dtype=dtype)

    threads = [threading.Thread(target=build, args=[dtype]) for dtype in ("float32", "bfloat16")]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    try:
        plain = nn.Linear(2, 3)
        assert not plain.weight.is_meta and plain(torch.ones(2)).shape == (3,)
        assert nn.Module.register_parameter is register and not torch.empty(1).is_meta
    finally:
        go_on.set()
        for thread in threads:
            thread.join()
    assert torch.get_default_dtype() == torch.float32
    for dtype, forward in models.items():
        with forward:
            assert {str(p.dtype) for p in forward._model.parameters()} == {f"torch.{dtype}"}
            assert steps(forward, base, base.layers.blocks)[-1].isfinite().all()


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
