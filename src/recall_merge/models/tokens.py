"""From rows to tokens: the model's chat template where it has one, the plain words where it has none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

from recall_merge.files.rows import Row
from recall_merge.runtime.errors import DataError, Faults

NO_LABEL = -100  # torch's `ignore_index`: the loss leaves these positions out


class Rendered(NamedTuple):
    """A row as the model reads it: `prompt + completion` is the whole text. It needs no further special tokens."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class EncodedRow:
    """A row as tokens. Labels are the tokens of the completion, and `NO_LABEL` before it."""

    input_ids: list[int]
    labels: list[int]


def render(row: Row, tokenizer: Any, *, template: bool = True) -> Rendered:
    """Render one row for training, scoring or hidden states; all three see the same text.

    With a chat template the completion ends as the template ends an assistant's turn; without one it ends with the
    tokenizer's end token, so that a model learns to stop. `template=False` leaves the template out.
    """
    if not (template and getattr(tokenizer, "chat_template", None)) or not row.prompt:
        return Rendered(_start_token(tokenizer) + row.plain, row.completion + (tokenizer.eos_token or ""))
    turns = [{"role": role, "content": content} for role, content in row.prompt]
    answer = {"role": "assistant", "content": row.completion.strip()}
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*turns, answer], tokenize=False)
    if not whole.startswith(prompt):  # subtle: some templates rewrite the last turn; then only the answer itself is scored
        return Rendered(prompt, row.completion.strip() + (tokenizer.eos_token or ""))
    return Rendered(prompt, whole[len(prompt) :])


def encode_rows(
    rows: Sequence[Row], tokenizer: Any, *, template: bool = True, max_length: int | None = None, label_prompt: bool = False
) -> list[EncodedRow]:
    """Tokens and labels of rows, rendered as for scoring. Special tokens come from the rendering alone, so none is doubled.

    Longer rows are cut to `max_length` tokens; with `label_prompt` the tokens of the prompt get labels too.

    Raises DataError with every row that has nothing to learn from.
    """
    encoded: list[EncodedRow] = []
    faults = Faults()
    for row in rows:
        rendered = render(row, tokenizer, template=template)
        prompt, ids = tokenizer([rendered.prompt, rendered.prompt + rendered.completion], add_special_tokens=False)["input_ids"]
        # subtle: a token may reach over the end of the prompt; what is learnt then begins with that token
        common = takewhile(lambda pair: pair[0] == pair[1], zip(prompt, ids, strict=False))
        start = 0 if label_prompt else len(list(common))
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


def _start_token(tokenizer: Any) -> str:
    """The start token, if the tokenizer puts one before a text. We try it out: the tokenizer's own flag is not reliable."""
    puts_it = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return tokenizer.bos_token if puts_it else ""
