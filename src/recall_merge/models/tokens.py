"""From rows to tokens: the model's chat template where it has one, the plain words where it has none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

from recall_merge.files.rows import Row
from recall_merge.runtime.errors import DataError, Faults

NO_LABEL = -100  # torch's `ignore_index`: the loss leaves these positions out
MARK = "recall-puts-the-answer-here"


class Rendered(NamedTuple):
    """A row as the model reads it: its three parts together are the whole text. It needs no further special tokens."""

    prompt: str  # all that comes before the row's own words, whatever the template opens an answer with included
    answer: str  # the row's own words
    end: str  # of the turn

    @property
    def completion(self) -> str:
        """What is learnt."""
        return self.answer + self.end


@dataclass(frozen=True)
class EncodedRow:
    """A row as tokens. Labels are the tokens of the completion, and `NO_LABEL` before it."""

    input_ids: list[int]
    labels: list[int]


def render(row: Row, tokenizer: Any, *, template: bool = True) -> Rendered:
    """Render one row for training, scoring or hidden states; all three see the same text.

    With a chat template the completion ends as the template ends an assistant's turn; without one it ends with the
    tokenizer's end token, so that a model learns to stop. `template=False` leaves the template out.

    Raises DataError if the template refuses the row, or leaves its words out.
    """
    if not (template and getattr(tokenizer, "chat_template", None)) or not row.prompt:
        answer = row.completion.rstrip()
        end = row.completion[len(answer) :] + (tokenizer.eos_token or "")
        return Rendered(_start_token(tokenizer) + row.plain, answer, end)
    turns = [{"role": role, "content": content} for role, content in row.prompt]
    words = row.completion.strip()
    prompt = _fill(row, tokenizer, turns, add_generation_prompt=True)
    whole, marked = (_fill(row, tokenizer, [*turns, {"role": "assistant", "content": text}]) for text in (words, MARK))
    head, _, end = marked.rpartition(MARK)
    if not head or whole != head + words + end:  # the template rewrites this answer, as its white space or a reasoning block in it
        start = _shared(prompt, whole)
        found = re.search(r"\s+".join(map(re.escape, words.split())), whole[start:])
        if found is None:
            what, fix = "the chat template leaves out the answer, or changes it", "give the answer as the template writes it, or"
            raise DataError(what, where=f"row {row.index + 1}", fix=f"{fix} leave the template out: `template: false`")
        head, words, end = whole[: start + found.start()], found.group(), whole[start + found.end() :]
    # subtle: some templates write a system turn into the last user turn only, so it is gone once an answer follows
    if any(content.strip() in prompt and content.strip() not in head for _, content in row.prompt):
        head = prompt
    # subtle: a blank before the answer stays with it: it is read together with the first word, as one token
    kept = len(prompt) if head.startswith(prompt) else 0
    cut = max(len(head.rstrip(" ")), kept)
    return Rendered(head[:cut], head[cut:] + words, end)


def render_rows(rows: Iterable[Row], tokenizer: Any, *, template: bool = True) -> list[Rendered]:
    """Render rows. Raises DataError with every row that the template refuses."""
    faults = Faults()
    rendered = [faults.attempt(render, row, tokenizer, template=template) for row in rows]
    faults.raise_any()
    return [text for text in rendered if text is not None]


def _fill(row: Row, tokenizer: Any, turns: Sequence[Mapping[str, str]], **options: Any) -> str:
    """What the chat template makes of a conversation."""
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except Exception as error:  # a template is a program, and raises what it likes
        fix = "write the row as the template wants it, or leave the template out: `template: false`"
        raise DataError(
            f"the chat template refuses the row: {' '.join(str(error).split())}", where=f"row {row.index + 1}", fix=fix
        ) from error
    return str(text)


def encode_rows(
    rows: Sequence[Row], tokenizer: Any, *, template: bool = True, max_length: int | None = None, label_prompt: bool = False
) -> list[EncodedRow]:
    """Tokens and labels of rows, rendered as for scoring. Special tokens come from the rendering alone, so none is doubled.

    Longer rows are cut to `max_length` tokens; with `label_prompt` the tokens of the prompt get labels too.

    Raises DataError with every row that has nothing to learn from.
    """
    encoded: list[EncodedRow] = []
    faults = Faults()
    for row, rendered in zip(rows, render_rows(rows, tokenizer, template=template), strict=True):
        prompt, ids = tokenizer([rendered.prompt, "".join(rendered)], add_special_tokens=False)["input_ids"]
        # subtle: a token may reach over the end of the prompt; what is learnt then begins with that token
        start = 0 if label_prompt else _shared(prompt, ids)
        ids = ids[:max_length]
        if len(ids) <= max(start, 1):
            what = "no token of the completion is left within `max_length`" if max_length else "the row has no text to learn"
            faults.add(what, where=f"row {row.index + 1}", fix="raise `max_length`, or leave the row out" if max_length else "")
        encoded.append(EncodedRow(ids, [NO_LABEL] * start + ids[start:]))
    if not rows:
        faults.add("there are no rows to train on")
    faults.raise_any(DataError)
    return encoded


def tokenize(texts: Sequence[str], tokenizer: Any, *, max_tokens: int) -> list[list[int]]:
    """Token ids of rendered texts, without further special tokens, cut to `max_tokens`."""
    return [ids[:max_tokens] for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]] if texts else []


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How much two texts, or two lists of tokens, have in common at their beginning."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))


def _start_token(tokenizer: Any) -> str:
    """The start token, if the tokenizer puts one before a text. We try it out: the tokenizer's own flag is not reliable."""
    puts_it = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return tokenizer.bos_token if puts_it else ""
