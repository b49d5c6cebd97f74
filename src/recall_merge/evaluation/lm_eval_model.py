"""lm-eval's wrapper of a Hugging Face model, with three changes: choices that share a prompt run it once, prompts are not padded to
score them, and it tells of its progress instead of printing."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
import torch
import tqdm
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from recall_merge.models.load import quiet
from recall_merge.runtime.progress import Progress

Tokens = list[int]
Request = tuple[Any, Tokens, Tokens]  # what was asked, the tokens of the context and of the continuation: as lm-eval has it
Answer = tuple[float, bool]  # log-likelihood of the continuation, and whether greedy decoding would have said it
HFLM: Any = lm_eval.models.huggingface.HFLM
resolve_max_length: Any = lm_eval.models.huggingface.resolve_max_length


class Engine(HFLM):
    """A loaded model, as lm-eval asks it questions."""

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int, progress: Progress) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
        self._progress = progress
        # subtle: a state that is not kept position by position (Mamba's) cannot be shared by continuations
        self._shares = isinstance(model, PreTrainedModel) and self.backend == "causal" and not model._is_stateful
        self._takes_few = self._shares and "logits_to_keep" in inspect.signature(model.forward).parameters

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Answer]:
        with self._telling("scoring choices", len(requests)):
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        with self._telling("writing answers", len(requests)):
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

    @contextmanager
    def _telling(self, label: str, total: int) -> Iterator[None]:
        with self._progress.stage(label, total, "answers") as advance:
            before, self.cache_hook = self.cache_hook, _Told(advance)
            try:
                yield
            finally:
                self.cache_hook = before

    def _loglikelihood_tokens(self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None) -> list[Answer]:
        """The answer to each request, in their order.

        lm-eval runs context and continuation of every request (or of one in place of all whose continuations are single tokens).
        Here a context runs once, and its keys and values serve all of its continuations: with four choices after a long prompt, a
        quarter of the work. Contexts run together only with others of their length, so none is padded; one whose continuations
        have several tokens runs alone, so that the shapes of what is computed do not depend on the batch size.
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
        """The model's window holds it; what is longer is cut as lm-eval cuts it."""
        _, context, continuation = request
        return bool(context and continuation) and len(context) + len(continuation) - 1 <= self.max_length

    @torch.no_grad()
    def _score(self, requests: Sequence[Request], batch: Sequence[_Group]) -> Iterator[tuple[int, Answer]]:
        """The answers of some groups with equally many shared tokens, p; or of one group whose requests have tokens of their own.

        Position i predicts token i + 1: the shared tokens predict up to token p, each request's own tokens predict the rest.
        """
        p = len(batch[0].tokens)
        keep = p - min(group.context for group in batch) + 1  # the positions that predict something of a continuation
        few = {"logits_to_keep": keep} if self._takes_few else {}
        longer = [n for n in batch[0].numbers if batch[0].tails[n]]
        out = self.model(torch.tensor([group.tokens for group in batch], device=self.device), use_cache=bool(longer), **few)
        shared = log_softmax(out.logits[:, -keep:].float(), dim=-1)  # (B, keep, V), of the positions p - keep .. p - 1
        own = shared[:0]
        if longer:
            out.past_key_values.batch_repeat_interleave(len(longer))
            tails = _pad([batch[0].tails[n] for n in longer], self.device)
            own = log_softmax(self.model(tails, past_key_values=out.past_key_values).logits.float(), dim=-1)  # (R, t, V), from p on
        for row, group in enumerate(batch):
            for n in group.numbers:
                predicted = shared[row, group.context - 1 - (p - keep) :]
                if n in longer:
                    predicted = torch.cat([predicted, own[longer.index(n)]])
                said = torch.tensor(requests[n][2], device=self.device)
                predicted = predicted[: len(said)]
                total = predicted.gather(1, said.unsqueeze(1)).sum()
                yield n, (float(total), bool((predicted.argmax(1) == said).all()))


@dataclass(frozen=True)
class _Group:
    """Requests that share a context. The last token of each is only predicted; the others are read."""

    numbers: list[int]
    tokens: Tokens
    """The longest beginning that all of them have in common, of the tokens that are read."""
    context: int
    """How many of `tokens` are the context; the others begin every continuation."""
    tails: dict[int, Tokens]
    """What each reads after `tokens`."""

    @classmethod
    def of(cls, requests: Sequence[Request], numbers: list[int]) -> _Group:
        read = {n: requests[n][1] + requests[n][2][:-1] for n in numbers}
        one = read[numbers[0]]
        common = min(map(len, read.values()))
        while any(tokens[:common] != one[:common] for tokens in read.values()):
            common -= 1
        return cls(numbers, one[:common], len(requests[numbers[0]][1]), {n: tokens[common:] for n, tokens in read.items()})


def _batches(groups: Iterable[_Group], size: int) -> Iterator[list[_Group]]:
    """Groups without tails, at most `size` at a time and all with equally many tokens; groups with tails alone. The longest first."""
    batch: list[_Group] = []
    for group in sorted(groups, key=lambda group: (any(group.tails.values()), -len(group.tokens), group.tokens)):
        if batch and (len(batch) == size or any(group.tails.values()) or len(batch[0].tokens) != len(group.tokens)):
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def _pad(rows: Sequence[Tokens], device: Any) -> Tensor:
    """(R, t), padded on the right: what stands there is after all that is asked for, so causal attention never sees it."""
    widest = max(map(len, rows))
    return torch.tensor([row + [0] * (widest - len(row)) for row in rows], device=device)


class _Told:
    """In the place of lm-eval's cache of answers, which hears of every answer: it tells how many there are."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance

    def add_partial(self, *_: Any) -> None:
        self._advance(1)


class _NoBar(tqdm.tqdm):
    """A progress bar that shows nothing, whatever it is told."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


@contextmanager
def silence() -> Iterator[None]:
    """Keep lm-eval's bars, hints and prints, and transformers', off the terminal; what matters is raised."""
    places: list[Any] = [lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface, tqdm]
    bars = [place.tqdm for place in places]
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    for place in places:
        place.tqdm = _NoBar
    try:
        with quiet(), redirect_stdout(StringIO()):
            yield
    finally:
        log.setLevel(level)
        for place, bar in zip(places, bars, strict=True):
            place.tqdm = bar
