"""A forward pass that pauses after each block, so that a block's parameters need to be in memory only while it runs.

The model is the architecture's own, with empty parameters. Each batch goes through the model's forward pass on a thread of its own, which
sleeps wherever the pass enters a block, and at the end of the last one. What a block receives (masks, rotary embeddings, attention types)
is therefore exactly what transformers gives it. `LayerwiseForward.step` loads the parameters of the next layer, lets every batch run to
its next stop, and discards the parameters of the block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recall_merge.maths.layers import Layers
from recall_merge.models.architecture import discard_parameters, empty_model
from recall_merge.models.hidden_states import Pooling, after_block, before_first, find_blocks, make_batches, padded, pool
from recall_merge.models.load import running
from recall_merge.models.reads import Read, record_reads
from recall_merge.models.transformers_private import TensorLoader
from recall_merge.runtime import memory
from recall_merge.runtime.errors import NotLayerwise
from recall_merge.runtime.parallel import in_order

BATCHES_A_TRIM = 4  # batches after which free memory is returned: after each, a pass takes a fifth longer


class LayerwiseForward:
    """One model on its way through given texts. Use it as a context, which ends its threads.

    Args:
        folder: gives the config.
        tokens: m lists of token ids.
        dtype: of the parameters, 'float32' or 'bfloat16'.
        vocabulary_size: rows of the token tensors, where they are not those of the config.
        threads: batches that run at a time. The numbers do not depend on it, and equal those of `pooled_hidden_states`. On an accelerator
            one: it works while the next block is read, and holds one block at a time.
        one_by_one: run every text on its own, without padding.
        device: where the blocks run and hidden states lie; the processor by default.
        batch_tokens: padded tokens per batch, `BATCH_TOKENS` by default.
    """

    def __init__(
        self,
        folder: Path,
        tokens: Sequence[Sequence[int]],
        layers: Layers,
        *,
        dtype: str = "float32",
        vocabulary_size: int | None = None,
        pooling: Pooling = "mean",
        threads: int = 1,
        one_by_one: bool = False,
        device: torch.device | None = None,
        batch_tokens: int | None = None,
    ) -> None:
        memory.one_heap()
        device = device or torch.device("cpu")
        self.layer = 0
        self._threads, self._rows = threads if device.type == "cpu" else 1, len(tokens)
        self._model = empty_model(folder, dtype=dtype, vocabulary_size=vocabulary_size, device=device)
        self._blocks = find_blocks(self._model, layers)
        self._loader = TensorLoader(self._model, folder, getattr(torch, dtype), device)
        batches = [[row] for row in range(len(tokens))] if one_by_one else make_batches([*map(len, tokens)], batch_tokens)
        self._batches = [_Batch(self._model, rows, padded([tokens[row] for row in rows], device), pooling) for rows in batches]
        # a pass pauses where it enters the next block, not where it leaves one: there it no longer holds the input of the last block
        self._hooks = [self._blocks[0].register_forward_pre_hook(_before_first, with_kwargs=True)]
        self._hooks += [block.register_forward_hook(_after) for block in self._blocks]
        self._hooks += [block.register_forward_pre_hook(_pause) for block in self._blocks[1:]]
        self._hooks += [self._blocks[-1].register_forward_hook(_pause)]
        self._hooks += [module.register_forward_pre_hook(_has_numbers) for module in self._model.modules() if module._parameters]
        self._visit: Callable[[list[Read], Tensor], None] | None = None

    @property
    def model(self) -> nn.Module:
        """The architecture, of which at most one block has its numbers."""
        return self._model

    def watch(self, parameters: Collection[str], visit: Callable[[list[Read], Tensor], None]) -> None:
        """From now on, each step calls `visit` with what these linear maps have read in one batch after another, in their order.

        `visit` also gets where in the batch there are tokens, (b, t): the rest is padding. What was read is gone after the call.
        """
        self._visit = visit
        self._hooks += record_reads(self._model, parameters, lambda read, _: _current.batch.reads.append(read))

    def step(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Pooled hidden states at the next layer, from 0 on, given its parameters under the names of the files.    -> (m, d), float32

        They lie on the device, which may still be at work on them.
        Raises CheckpointError if transformers does not take these parameters.
        """
        return step([self], [lambda: tensors])[0]

    def finish(self, tensors: Mapping[str, Tensor], reduce: Callable[[Tensor, list[int]], Tensor]) -> list[Tensor]:
        """Run from the last block to the logits; returns what `reduce` gives for each batch. Raises as `step`.

        Args:
            tensors: the parameters of final norm and head; of a tied head, the embedding.
            reduce: logits (b, t, vocabulary) and the rows of a batch -> what to keep of them.
        """
        self._loader.load(tensors)
        self._model.tie_weights()
        for batch in self._batches:
            batch.reduce = reduce
        return list(in_order(lambda batch: batch.go_on(), self._batches, self._threads))

    def __enter__(self) -> LayerwiseForward:
        return self

    def __exit__(self, *_: object) -> None:
        for batch in self._batches:
            batch.end()
        for hook in self._hooks:
            hook.remove()

    def _join(self, parts: Iterator[Tensor]) -> Tensor:
        """The states that the batches have reached, in the order of the texts."""
        reached: list[Tensor] = []
        for number, (batch, part) in enumerate(zip(self._batches, parts, strict=True), start=1):
            reached.append(part)
            if number % BATCHES_A_TRIM == 0:
                memory.give_back()  # else what batches free lies scattered between what they keep: a third of the memory of many texts
            if self._visit is not None:
                self._visit(batch.reads, batch.present)
                batch.reads.clear()
        self.layer += 1
        states = reached[0].new_empty(self._rows, reached[0].shape[-1])
        for batch, part in zip(self._batches, reached, strict=True):
            states[batch.rows] = part
        return states


def step(models: Sequence[LayerwiseForward], tensors: Sequence[Callable[[], Mapping[str, Tensor]]]) -> list[Tensor]:
    """`LayerwiseForward.step` of several models, on the threads of the first one. No thread idles while a model's last batch runs.

    The parameters of a model are read and loaded when its first batch begins, and discarded when its last one has ended. So at most as
    many models as there are threads have a block in memory.
    """
    loading, counting = threading.Lock(), threading.Lock()
    unfinished = [len(model._batches) for model in models]
    loaded: set[int] = set()

    def go_on(number: int, batch: _Batch) -> Tensor:
        with loading:
            if number not in loaded:
                models[number]._loader.load(tensors[number]())
                loaded.add(number)
        part = batch.go_on()
        with counting:
            unfinished[number] -= 1
            is_last = not unfinished[number]
        if is_last and (layer := models[number].layer):  # what lies before the blocks may be needed again; it is small, of few tokens
            discard_parameters(models[number]._blocks[layer - 1])
        return part

    batches = ((number, batch) for number, model in enumerate(models) for batch in model._batches)
    with closing(in_order(lambda numbered: go_on(*numbered), batches, models[0]._threads)) as parts:  # puts torch's threads back
        states = [model._join(islice(parts, len(model._batches))) for model in models]
    memory.give_back()
    return states


class _Batch:
    """One batch and its thread, which runs only between `go_on` and the next stop."""

    def __init__(self, model: nn.Module, rows: list[int], texts: tuple[Tensor, Tensor, Tensor], pooling: Pooling) -> None:
        self.rows = rows
        self.reduce: Callable[[Tensor, list[int]], Tensor] | None = None  # of the logits, where the pass goes on to them
        self._model = model
        self._pooling: Pooling = pooling
        self._ids, self._mask, self._lengths = texts  # as `padded` gives them
        self.reads: list[Read] = []
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._state: Tensor | None = None
        self._error: BaseException | None = None
        self._ending = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def present(self) -> Tensor:
        """(b, t), True where there is a token."""
        return self._mask.bool()

    def go_on(self) -> Tensor:
        """Run to the next stop.    -> (b, d), the pooled hidden states there"""
        if self._thread.ident is None:
            self._thread.start()
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error
        assert self._state is not None
        return self._state

    def end(self) -> None:
        self._ending = True
        if self._thread.ident is not None:
            self._go.release()
            self._thread.join()

    def keep(self, hidden: Tensor) -> None:
        """Keep the pooled hidden states for `go_on`. Called on this batch's own thread, as `pause` is."""
        if hidden.ndim != 3:
            raise NotLayerwise(
                f"its blocks pass several streams a token, {tuple(hidden.shape)}, which only the whole model brings together"
            )
        self._state = pool(hidden, self._lengths, self._pooling)

    def pause(self) -> None:
        """Let `go_on` return, and sleep until it is called again."""
        memory.free_mkl_buffers()
        self._stopped.release()
        self._go.acquire()
        if self._ending:
            raise _Ended

    def _run(self) -> None:
        torch.set_num_threads(1)
        _current.batch = self
        self._go.acquire()
        try:
            with torch.inference_mode(), running(self._model), suppress(_Ended):
                logits = self._model(input_ids=self._ids, attention_mask=self._mask, use_cache=False).logits
                assert self.reduce is not None
                self._state = self.reduce(logits, self.rows)
        except (NotImplementedError, RuntimeError) as error:
            self._error = _explain(error)
        except BaseException as error:
            self._error = error
        self._stopped.release()


_current: Any = threading.local()  # .batch: the batch whose thread this is


class _Ended(Exception):
    """Raised inside a forward pass that is not needed any further."""


def _has_numbers(module: nn.Module, _: Any) -> None:
    """Subtle: a linear map without a bias does not raise on empty weights, but gives whatever is in memory."""
    if any(parameter is not None and parameter.is_meta for parameter in module._parameters.values()):
        raise _lacking(f"the weights of {type(module).__name__}")


def _before_first(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _current.batch.keep(before_first(args, kwargs))
    _current.batch.pause()


def _after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
    _current.batch.keep(after_block(output))


def _pause(*_: Any) -> None:
    _current.batch.pause()


def _explain(error: Exception) -> Exception:
    """What a forward pass raises when it meets empty parameters, in our words."""
    if "meta" not in str(error).lower():
        return error
    return _lacking(str(error).splitlines()[0])


def _lacking(what: str) -> NotLayerwise:
    what = f"its forward pass needs numbers that it does not have at that layer: {what}"
    return NotLayerwise(what, fix="report the architecture: its blocks are not run one after another")
