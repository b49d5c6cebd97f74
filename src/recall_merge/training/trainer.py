"""trl's SFTTrainer with three changes: batches of rows of like length in an order that survives a restart, on a CPU only the positions
that count are scored, and it tells of its progress instead of printing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.sft_trainer import SFTTrainer

from recall_merge.runtime.progress import Advance, Progress

POOL = 50  # batches whose rows are sorted by length together

OnStep = Callable[[int, int, float], None]
"""Hears of every logged step: its number from 1, how many there are, and the mean loss since the last one heard of."""


class Trainer(SFTTrainer):
    """Trains on rows that are tokens already, so that trl adds neither template nor special tokens."""

    def __init__(self, *args: Any, callbacks: Sequence[TrainerCallback] = (), **kwargs: Any) -> None:
        super().__init__(*args, callbacks=list(callbacks), **kwargs)
        self.remove_callback(PrinterCallback)
        settings: Any = self.args
        plain = settings.loss_type == "nll" and not settings.label_smoothing_factor and not self.aux_loss_enabled
        alone = settings.device.type == "cpu" and settings.world_size == 1 and not self.padding_free
        self._few = plain and alone and "logits_to_keep" in inspect.signature(self._causal.forward).parameters

    @property
    def _causal(self) -> Any:
        """The model without what PEFT put around it."""
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Mean negative log-likelihood of the tokens that have a label.

        On a CPU trl runs the head over every position, which for a small model with a large vocabulary is a third of the work; the
        answers are often a few tokens of many. The model itself can leave out positions, so it is asked for those that some row of
        the batch needs. Anything beyond the plain loss is left to trl.
        """
        if not self._few or return_outputs or not model.training:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        following = inputs["labels"][:, 1:]  # (B, T - 1): position t predicts token t + 1
        keep = (following != -100).any(dim=0).nonzero().squeeze(1)  # (K)
        logits = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False, logits_to_keep=keep
        ).logits.float()  # (B, K, V)
        wanted = following[:, keep]
        total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="sum")
        return total / ((wanted != -100).sum() if num_items_in_batch is None else num_items_in_batch)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        return LikeLengths([len(ids) for ids in dataset["input_ids"]], self._train_batch_size, self.args.data_seed or self.args.seed)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """A checkpoint on the way needs none."""


class LikeLengths(Sampler[int]):
    """Rows in an order such that batches hold rows of about the same length: a function of seed and epoch alone.

    transformers' own draws from torch's global state, and so cannot be told again when training resumes in the middle of an epoch; and
    goes from long to short. Here the batches of an epoch are shuffled once more; the incomplete one comes last.

    >>> first, second = LikeLengths([5, 1, 5, 1], 2, seed=0), LikeLengths([5, 1, 5, 1], 2, seed=0)
    >>> list(first) == list(second), {*list(first)[:2]} in ({0, 2}, {1, 3})
    (True, True)
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = lengths
        self._size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        draws = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        order = torch.randperm(len(self), generator=draws).tolist()
        whole = len(order) - len(order) % self._size
        pool = POOL * self._size
        rows = [
            i for start in range(0, whole, pool) for i in sorted(order[start : min(start + pool, whole)], key=self._lengths.__getitem__)
        ]
        for batch in torch.randperm(whole // self._size, generator=draws).tolist():
            yield from rows[batch * self._size : (batch + 1) * self._size]
        yield from order[whole:]


class Teller(TrainerCallback):
    """Tells a progress listener of every step, and `on_step` of every loss. The caller closes `open_stages`, whatever happens."""

    def __init__(self, progress: Progress, on_step: OnStep | None) -> None:
        self.open_stages = ExitStack()
        self._progress = progress
        self._on_step = on_step
        self._advance: Advance = lambda amount: None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance = self.open_stages.enter_context(self._progress.stage("training", state.max_steps, "steps"))
        self._advance(state.global_step)  # those before a restart

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._on_step is not None and logs and "loss" in logs:
            self._on_step(state.global_step, state.max_steps, float(logs["loss"]))
