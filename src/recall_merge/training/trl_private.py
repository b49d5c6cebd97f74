"""trl's SFTTrainer with three changes: rows of similar length share batches, in an order that survives a restart; on a CPU only the
positions that count are scored; and progress is reported instead of printed.

The one place that uses private parts of trl and of transformers' Trainer. Checked with trl 1.16 (tests/test_dependencies.py):

- `Trainer._get_train_sampler(train_dataset)` is overridden, and reads `Trainer._train_batch_size`.
- `SFTTrainer.compute_loss` is overridden, and reads `SFTTrainer.aux_loss_enabled` and `padding_free`: with either, the loss is not plain.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.utils.data import Sampler
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.sft_trainer import SFTTrainer

from recall_merge.models.load import running
from recall_merge.models.tokens import NO_LABEL
from recall_merge.runtime.errors import RunError
from recall_merge.runtime.progress import Advance, Progress, Silent
from recall_merge.training.checkpoints import SUFFIX

POOL = 50  # batches whose rows are sorted by length together


class Trainer(SFTTrainer):
    """Trains on rows that are tokens already, so that trl adds neither template nor special tokens."""

    def __init__(self, *args: Any, callbacks: Sequence[TrainerCallback] = (), progress: Progress | None = None, **kwargs: Any) -> None:
        self._reporter = _Reporter(progress or Silent())
        super().__init__(*args, callbacks=[self._reporter, *callbacks], **kwargs)
        self.remove_callback(PrinterCallback)
        settings: Any = self.args
        model: Any = self.model
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model  # without what PEFT put around it
        plain = settings.loss_type == "nll" and not settings.label_smoothing_factor and not self.aux_loss_enabled
        alone = settings.device.type == "cpu" and settings.world_size == 1 and not self.padding_free
        self._skips_logits = plain and alone and "logits_to_keep" in inspect.signature(causal.forward).parameters

    def run(self, resume_from: Path | None = None) -> None:
        """Train, from a checkpoint on if one is given."""
        with self._reporter.open_stages:
            self.train(resume_from_checkpoint=str(resume_from) if resume_from else None)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One step. Raises RunError where its loss is NaN or infinite: nothing is learnt from there on."""
        loss = super().training_step(*args, **kwargs)
        if not loss.isfinite():
            self._refuse(f"the loss of step {self.state.global_step + 1} is {float(loss):g}")
        return loss

    def check_trained(self) -> None:
        """Raise RunError where the last step left NaN or infinity."""
        model: Any = self.model
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not parameter.isfinite().all():
                self._refuse(f"step {self.state.global_step} leaves NaN or infinity in '{name}'")

    def _refuse(self, what: str) -> NoReturn:
        where = str(self.args.output_dir).removesuffix(SUFFIX)
        raise RunError(f"the training has diverged: {what}", where=where, fix="lower `learning_rate`, or look at the rows and the base")

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Mean negative log-likelihood of the tokens that have a label.

        On a CPU trl runs the head over every position, which for a small model with a large vocabulary is a third of the work, though
        few of the tokens are labelled. Here the model computes logits only at positions that some row of the batch needs. Anything
        beyond the plain loss is left to trl.
        """
        with running(self.model):
            if self._skips_logits and model.training and not return_outputs:
                return self._plain_loss(model, inputs, num_items_in_batch)
            return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)

    def _plain_loss(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Any:
        following = inputs["labels"][:, 1:]  # (B, T - 1): position t predicts token t + 1
        keep = (following != NO_LABEL).any(dim=0).nonzero().squeeze(1)  # (K)
        logits = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False, logits_to_keep=keep
        ).logits.float()  # (B, K, V)
        labels = following[:, keep]
        total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL, reduction="sum")
        return total / ((labels != NO_LABEL).sum() if num_items_in_batch is None else num_items_in_batch)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(ids) for ids in dataset["input_ids"]]
        return SimilarLengths(lengths, self._train_batch_size, self.args.data_seed or self.args.seed)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """A checkpoint needs none."""


class SimilarLengths(Sampler[int]):
    """Rows in an order in which batches hold rows of about the same length: a function of seed and epoch alone.

    transformers' own order is drawn from torch's global state, so it cannot be repeated when training resumes within an epoch; and it goes
    from long to short. Here the batches of an epoch are shuffled once more; the incomplete one comes last.

    >>> first, second = SimilarLengths([5, 1, 5, 1], 2, seed=0), SimilarLengths([5, 1, 5, 1], 2, seed=0)
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
        pools = (order[start : min(start + POOL * self._size, whole)] for start in range(0, whole, POOL * self._size))
        rows = [row for pool in pools for row in sorted(pool, key=self._lengths.__getitem__)]
        for batch in torch.randperm(whole // self._size, generator=draws).tolist():
            yield from rows[batch * self._size : (batch + 1) * self._size]
        yield from order[whole:]


class _Reporter(TrainerCallback):
    """Reports every step to a progress listener. The caller closes `open_stages`, whatever happens."""

    def __init__(self, progress: Progress) -> None:
        self.open_stages = ExitStack()
        self._progress = progress
        self._advance: Advance = lambda _: None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance = self.open_stages.enter_context(self._progress.stage("training", state.max_steps, "steps"))
        self._advance(state.global_step)  # the steps before a restart

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance(1)
