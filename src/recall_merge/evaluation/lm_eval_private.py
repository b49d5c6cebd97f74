"""lm-eval's wrapper of a Hugging Face model, with three changes: choices with the same prompt run it once, prompts are scored without
padding, and progress is reported instead of printed.

The one place that uses private parts of lm-eval. Checked with lm-eval 0.4.13 (tests/test_dependencies.py):

- `HFLM._loglikelihood_tokens` is overridden: it gets (request, context tokens, continuation tokens) and gives (log-likelihood, is greedy).
- `HFLM._model_call` and `_model_generate`, which run the model, are overridden, to say in words how that fails.
- `HFLM.cache_hook.add_partial` is called for each answer; `HFLM.backend`, `max_length`, `batch_size` and `add_bos_token` are attributes.
- `HFLM._DEFAULT_MAX_LENGTH` and `models.huggingface.resolve_max_length` give the number of tokens that a model reads.
- `tqdm` is a global of `api.task`, `api.model` and `models.huggingface`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
import torch
import tqdm
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from recall_merge.models.hidden_states import padded
from recall_merge.models.load import load_config, refused_by_transformers, running
from recall_merge.models.transformers_private import is_stateful
from recall_merge.runtime.parallel import process_wide
from recall_merge.runtime.progress import Progress
from recall_merge.runtime.quiet import quiet

Tokens = list[int]
Request = tuple[Any, Tokens, Tokens]  # lm-eval's request, the tokens of the context and of the continuation
Answer = tuple[float, bool]  # log-likelihood of the continuation, and whether greedy decoding would write it
CACHES = ("cache", "past_key_values")  # what a model calls its cache, from transformers 5.24 on and before; there it knows both
HFLM: Any = lm_eval.models.huggingface.HFLM


class LocalModel(HFLM):
    """A loaded model, as lm-eval sees it."""

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int, progress: Progress) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
        self._progress = progress
        # subtle: a state that is not kept by position (Mamba's) cannot be shared by continuations
        self._shares = isinstance(model, PreTrainedModel) and self.backend == "causal" and not is_stateful(model)
        self._can_skip_logits = self._shares and "logits_to_keep" in inspect.signature(model.forward).parameters

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Answer]:
        with self._report_answers("scoring choices", len(requests)):
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        with self._report_answers("writing answers", len(requests)):
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _model_call(self, *given: Any, **options: Any) -> Any:
        with running(self.model):
            return super()._model_call(*given, **options)

    def _model_generate(self, *given: Any, **options: Any) -> Any:
        with running(self.model):
            return super()._model_generate(*given, **options)

    def _forward(self, *given: Any, **options: Any) -> Any:
        with running(self.model):
            return self.model(*given, **options)

    @contextmanager
    def _report_answers(self, label: str, total: int) -> Iterator[None]:
        with self._progress.stage(label, total, "answers") as advance:
            # lm-eval's cache is called for every answer; what takes its place counts the answers
            before, self.cache_hook = self.cache_hook, SimpleNamespace(add_partial=lambda *_: advance(1))
            try:
                yield
            finally:
                self.cache_hook = before

    def _loglikelihood_tokens(self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None) -> list[Answer]:
        """The answer to each request, in their order.

        lm-eval runs context and continuation of every request, except that requests whose continuations are single tokens share one run.
        Here a context runs once, and its keys and values serve all of its continuations: with four choices after a long prompt, a
        quarter of the work. Contexts run together only with others of the same length, so none is padded. A context with continuations
        of several tokens runs alone, so that no shape depends on the batch size.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, _) in enumerate(requests):
            groups.setdefault(tuple(context), []).append(number)
        shared = [numbers for numbers in groups.values() if self._shares and all(self._fits(requests[n]) for n in numbers)]
        answers: dict[int, Answer] = {}
        for batch in _batches([_Group.of(requests, numbers) for numbers in shared], int(self.batch_size)):
            for number, answer in self._score(requests, batch):
                answers[number] = answer
                self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
        rest = [number for number in range(len(requests)) if number not in answers]
        if rest:
            own = super()._loglikelihood_tokens([requests[number] for number in rest], disable_tqdm=True, override_bs=override_bs)
            answers.update(zip(rest, own, strict=True))
        return [answers[number] for number in range(len(requests))]

    def _fits(self, request: Request) -> bool:
        """Whether the model's window holds a request; a longer one is cut, as lm-eval cuts it."""
        _, context, continuation = request
        return bool(context and continuation) and len(context) + len(continuation) - 1 <= self.max_length

    @torch.no_grad()
    def _score(self, requests: Sequence[Request], batch: Sequence[_Group]) -> Iterator[tuple[int, Answer]]:
        """The answers of groups that share equally many tokens, p; or of one group whose requests have tokens of their own.

        Position i predicts token i + 1: the shared tokens predict up to token p, each request's own tokens predict the rest.
        """
        p = len(batch[0].tokens)
        keep = p - min(group.context for group in batch) + 1  # positions that predict something of a continuation
        options = {"logits_to_keep": keep} if self._can_skip_logits else {}
        longer = [n for n in batch[0].numbers if batch[0].tails[n]]
        out = self._forward(torch.tensor([group.tokens for group in batch], device=self.device), use_cache=bool(longer), **options)
        shared = log_softmax(out.logits[:, -keep:].float(), dim=-1)  # (B, keep, V), of the positions p - keep .. p - 1
        own = shared[:0]
        if longer:
            name = next(name for name in CACHES if name in out)
            out[name].batch_repeat_interleave(len(longer))
            # padding is on the right, after all that is scored, so causal attention never sees it
            tails, _, _ = padded([batch[0].tails[n] for n in longer], self.device)
            logits = self._forward(tails, **{name: out[name]}).logits
            own = log_softmax(logits.float(), dim=-1)  # (R, t, V), from p on
        for row, group in enumerate(batch):
            for n in group.numbers:
                predicted = shared[row, group.context - 1 - (p - keep) :]
                if n in longer:
                    predicted = torch.cat([predicted, own[longer.index(n)]])
                continuation = torch.tensor(requests[n][2], device=self.device)
                predicted = predicted[: len(continuation)]
                total = predicted.gather(1, continuation.unsqueeze(1)).sum()
                yield n, (float(total), bool((predicted.argmax(1) == continuation).all()))


@dataclass(frozen=True)
class _Group:
    """Requests that share a context. The last token of each is only predicted; the others are read."""

    numbers: list[int]
    tokens: Tokens  # the longest common beginning of the tokens that they read
    context: int  # how many of `tokens` are the context; the others begin every continuation
    tails: dict[int, Tokens]  # what each request reads after `tokens`

    @classmethod
    def of(cls, requests: Sequence[Request], numbers: list[int]) -> _Group:
        read = {n: requests[n][1] + requests[n][2][:-1] for n in numbers}
        first = read[numbers[0]]
        common = min(map(len, read.values()))
        while any(tokens[:common] != first[:common] for tokens in read.values()):
            common -= 1
        return cls(numbers, first[:common], len(requests[numbers[0]][1]), {n: tokens[common:] for n, tokens in read.items()})


def _batches(groups: Iterable[_Group], size: int) -> Iterator[list[_Group]]:
    """Groups without tails, at most `size` at a time and all with equally many tokens; groups with tails alone. The longest come first."""
    batch: list[_Group] = []
    for group in sorted(groups, key=lambda group: (any(group.tails.values()), -len(group.tokens), group.tokens)):
        if batch and (len(batch) == size or any(group.tails.values()) or len(batch[0].tokens) != len(group.tokens)):
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def window_of(folder: Path, tokenizer: Any) -> int:
    """How many tokens the model of a folder reads at most, as lm-eval takes it from its config."""
    with silence(), refused_by_transformers(folder):
        return lm_eval.models.huggingface.resolve_max_length(load_config(folder), tokenizer, default=HFLM._DEFAULT_MAX_LENGTH)


class _NoBar(tqdm.tqdm):
    """A progress bar that never shows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


@process_wide
@contextmanager
def silence() -> Iterator[None]:
    """Keep the bars, hints and prints of lm-eval and transformers off the terminal; what matters is raised."""
    modules: list[Any] = [lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface, tqdm]
    bars = [module.tqdm for module in modules]
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    for module in modules:
        module.tqdm = _NoBar
    try:
        with quiet(), redirect_stdout(StringIO()):
            yield
    finally:
        log.setLevel(level)
        for module, bar in zip(modules, bars, strict=True):
            module.tqdm = bar
