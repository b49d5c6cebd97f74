"""A forward pass that pauses after each block, so that a block's parameters need to be in memory only while it runs.

The model is the architecture's own, without numbers. Each batch goes through its forward pass on a thread of its own, which sleeps
wherever the pass enters a block, and at the end of the last; what a block is given (masks, rotary embeddings, attention types) is therefore
exactly what transformers gives it. `LayerwiseForward.step` binds the parameters of the next layer, lets every batch go on to its next stop, and
empties the block again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recall_merge.maths.layers import Layers
from recall_merge.models.hidden_states import Pooling, find_blocks, make_batches, padded, pool
from recall_merge.models.load import load_config, quiet
from recall_merge.runtime import memory
from recall_merge.runtime.errors import CheckpointError, Unwalkable
from recall_merge.runtime.parallel import in_order


class LayerwiseForward:
    """One model on its way through given texts; use as a context, which ends the threads.

    Args:
        folder: gives the config.
        tokens: m lists of token ids.
        dtype: of the parameters, 'float32' or 'bfloat16'.
        vocabulary_size: rows of the token tensors, where they are not those of the config.
        one_by_one: run every text on its own, without padding.
        threads: batches that run at a time. The numbers do not depend on it, and are those of `pooled_hidden_states`.
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
    ) -> None:
        memory.one_heap()
        self.layer = 0
        self._folder, self._threads, self._rows = folder, threads, len(tokens)
        self._model = _without_numbers(folder, dtype, vocabulary_size)
        self._blocks = find_blocks(self._model, layers)
        self._loader = _Loader(self._model, folder, getattr(torch, dtype))
        batches = [[row] for row in range(len(tokens))] if one_by_one else make_batches([*map(len, tokens)])
        self._batches = [_Batch(self._model, rows, [tokens[row] for row in rows], pooling) for rows in batches]
        # where the next block begins the input of the last one is given up, which at its end is still held
        self._hooks = [self._blocks[0].register_forward_pre_hook(_before_first, with_kwargs=True)]
        self._hooks += [block.register_forward_hook(_after) for block in self._blocks]
        self._hooks += [block.register_forward_pre_hook(_pause) for block in self._blocks[1:]]
        self._hooks += [self._blocks[-1].register_forward_hook(_pause)]

    def step(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Pooled hidden states at the next layer, from 0 on.    -> (m, d), float32

        Args:
            tensors: the parameters of that layer, under the names of the files.

        Raises:
            CheckpointError: if transformers does not take these parameters.
        """
        return step([self], [lambda: tensors])[0]

    def finish(self, tensors: Mapping[str, Tensor], reduce: Callable[[Tensor, list[int]], Tensor]) -> list[Tensor]:
        """Run from the last block to the logits.

        Args:
            tensors: the parameters of final norm and head; of a tied head, the embedding.
            reduce: logits (b, t, vocabulary) and the rows of a batch -> what to keep of them.

        Returns:
            What is kept of each batch.

        Raises:
            CheckpointError: if transformers does not take these parameters.
        """
        self._loader.bind(tensors)
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

    def _release(self) -> None:
        """Give up the numbers of the block that has run. What lies before the blocks may be needed again, and is small: few rows."""
        if self.layer:
            _empty(self._blocks[self.layer - 1])

    def _reached(self, parts: Sequence[Tensor]) -> Tensor:
        """What the batches have reached, put together."""
        self.layer += 1
        states = torch.empty(self._rows, parts[0].shape[-1])
        for batch, part in zip(self._batches, parts, strict=True):
            states[batch.rows] = part
        return states


def step(walks: Sequence[LayerwiseForward], tensors: Sequence[Callable[[], Mapping[str, Tensor]]]) -> list[Tensor]:
    """`LayerwiseForward.step` of several models, whose batches follow one another on the threads of the first: none of them has nothing to do while a
    model's last batch runs. A model's parameters are asked for and bound when the first of its batches begins, and released when the last
    has ended: of no more models than there are threads at a time."""
    binding, counting = threading.Lock(), threading.Lock()
    left = [len(walk._batches) for walk in walks]
    bound: set[int] = set()

    def go_on(place: int, batch: _Batch) -> Tensor:
        with binding:
            if place not in bound:
                walks[place]._loader.bind(tensors[place]())
                bound.add(place)
        part = batch.go_on()
        with counting:
            left[place] -= 1
            last = not left[place]
        if last:
            walks[place]._release()
        return part

    batches = ((place, batch) for place, walk in enumerate(walks) for batch in walk._batches)
    parts = in_order(lambda turn: go_on(*turn), batches, walks[0]._threads)
    states = [walk._reached(list(islice(parts, len(walk._batches)))) for walk in walks]
    assert next(parts, None) is None  # so it has come to its end, and to what it does there
    memory.give_back()
    return states


class _Batch:
    """One batch and its thread, which runs only between `go_on` and the next stop."""

    def __init__(self, model: nn.Module, rows: list[int], tokens: list[Sequence[int]], pooling: Pooling) -> None:
        self.rows = rows
        self._model = model
        self._pooling: Pooling = pooling
        self._ids, self._mask, self._lengths = padded(tokens)
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.reduce: Callable[[Tensor, list[int]], Tensor] | None = None  # of the logits, where the pass goes on to them
        self._state: Tensor | None = None
        self._error: BaseException | None = None
        self._ending = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def go_on(self) -> Tensor:
        """Run to the next stop.    -> (b, d), what is pooled there"""
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

    def reach(self, hidden: Tensor) -> None:
        """Called on this batch's own thread, as `stop` is: keep what is to be handed out."""
        self._state = pool(hidden, self._lengths, self._pooling)

    def stop(self) -> None:
        """Hand it out, and sleep."""
        memory.rest()
        self._stopped.release()
        self._go.acquire()
        if self._ending:
            raise _Ended

    def _run(self) -> None:
        torch.set_num_threads(1)
        _present.batch = self
        self._go.acquire()
        try:
            with torch.inference_mode():
                logits = self._model(input_ids=self._ids, attention_mask=self._mask, use_cache=False).logits
                assert self.reduce is not None
                self._state = self.reduce(logits, self.rows)
        except _Ended:
            return
        except (NotImplementedError, RuntimeError) as error:
            self._error = self._without_numbers(error)
        except BaseException as error:
            self._error = error
        self._stopped.release()

    def _without_numbers(self, error: Exception) -> Exception:
        """What a forward pass raises that met parameters which are not there, in our words."""
        if "meta" not in str(error).lower():
            return error
        what = f"its forward pass needs numbers that it does not have at that layer: {str(error).splitlines()[0]}"
        return Unwalkable(what, fix="report the architecture: its blocks are not run one after another")


_present: Any = threading.local()


class _Ended(Exception):
    """Raised inside a forward pass that is not needed any further."""


def _before_first(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _present.batch.reach(args[0] if args else kwargs["hidden_states"])
    _present.batch.stop()


def _after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
    _present.batch.reach(output[0] if isinstance(output, tuple) else output)


def _pause(*_: Any) -> None:
    _present.batch.stop()


class _Loader:
    """Puts tensors under the names of files into a model without numbers, renamed and fused as transformers does it on loading."""

    def __init__(self, model: Any, folder: Path, dtype: torch.dtype) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.modeling_utils import LoadStateDictConfig

        self._model, self._folder = model, folder
        mapping: Any = get_model_conversion_mapping(model)
        self._config = LoadStateDictConfig(dtype=dtype, dtype_plan=model._get_dtype_plan(dtype), weight_mapping=mapping)

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        with quiet():
            found, _ = convert_and_load_state_dict_in_model(self._model, dict(tensors), self._config)
        for kind in ("unexpected_keys", "mismatched_keys", "conversion_errors", "error_msgs"):
            if wrong := getattr(found, kind):
                raise CheckpointError(f"transformers finds {kind.replace('_', ' ')}: {sorted(map(str, wrong))[:5]}", where=self._folder)


def _without_numbers(folder: Path, dtype: str, vocabulary_size: int | None) -> Any:
    """The architecture of a folder in evaluation mode: parameters on the meta device, what it computes for itself in memory."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = load_config(folder)
    if vocabulary_size is not None:
        config.get_text_config().vocab_size = vocabulary_size
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with quiet(), _parameters_on_meta():
        return architecture._from_config(config, dtype=getattr(torch, dtype)).eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, None if param is None else _emptied(param))

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _empty(module: nn.Module) -> None:
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = _emptied(parameter)


def _emptied(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
