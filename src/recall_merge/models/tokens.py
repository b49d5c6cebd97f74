"""From rows to tokens: the model's chat template where it has one, the plain words where it has none."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import takewhile
from typing import Any, Literal, NamedTuple

from recall_merge.files.rows import Row, numbered
from recall_merge.runtime.errors import DataError, Faults

NO_LABEL = -100  # torch's `ignore_index`: the loss leaves these positions out
CHARACTERS = 16  # of a text, per token that is wanted: as many are tokenised at first
Turns = Literal["last", "all"]
MARK = "recall-puts-the-answer-here"
DATE = datetime(2024, 7, 26)  # that every chat template writes, so that the same run gives the same bytes on another day; Llama 3's own
FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f"|replace('%{part}', '{DATE.strftime('%' + part)}')" for part in [*"aAbBdDeFHIjmMpSTuUwWyY", "-d", "-m", "-I", "-H"])
    + " }}{% endmacro %}\n"
)
"""What comes before a template, in place of the function that transformers gives it."""


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


def render(row: Row, tokenizer: Any, *, template: bool | str = True) -> Rendered:
    """Render one row for training, scoring or hidden states; all three see the same text.

    With a chat template the completion ends as the template ends an assistant's turn; without one it ends with the
    tokenizer's end token, so that a model learns to stop. `template` is False to leave it out, or the text of another one; a row whose
    source says what writes it is written by that.

    Raises DataError if the template refuses the row, or leaves its words out.
    """
    template = template if row.template is None else row.template
    if not (template and (isinstance(template, str) or getattr(tokenizer, "chat_template", None))) or not row.prompt:
        if row.details:
            what, fix = "a row with tools, calls or reasoning needs a chat template", "give one, `template: FILE`, or leave the row out"
            raise DataError(what, where=f"row {row.index + 1}", fix=fix)
        if row.roles and row.prompt:
            what = "a conversation or an instruction needs a chat template, without which its turns would be one text"
            fix = "give a Jinja file, `template: FILE`, or rows of the form prompt + completion"
            raise DataError(what, where=f"row {row.index + 1}", fix=fix)
        answer = row.completion.rstrip()
        end = row.completion[len(answer) :] + (tokenizer.eos_token or "")
        return Rendered(_start_token(tokenizer) + row.plain, answer, end)
    *turns, answer = row.turns
    words = row.completion.strip()
    fill = partial(_fill, row, tokenizer, template)
    prompt = fill(turns, tools=row.tools, add_generation_prompt=True)
    whole, marked = (fill([*turns, answer | {"content": text}], tools=row.tools) for text in (words, MARK))
    if row.details:
        _check_details(row, fill, whole)
    if len(answer) > 2:  # calls and reasoning are the row's own words too
        start = _shared(prompt, whole)
        return Rendered(whole[:start], whole[start:], "")
    head, _, end = marked.rpartition(MARK)
    if whole != head + words + end:  # the template rewrites this answer, as its white space or a reasoning block in it
        start = _shared(prompt, whole)
        found = MARK in marked and re.search(r"\s+".join(map(re.escape, words.split())), whole[start:])
        if not found:
            what = "the chat template leaves out the answer, or changes it"
            raise DataError(what, where=f"row {row.index + 1}", fix="give it as the template writes it, or leave the template out")
        head, words, end = whole[: start + found.start()], found.group(), whole[start + found.end() :]
    # subtle: some templates write a system turn into the last user turn only, so it is gone once an answer follows
    if any(content.strip() in prompt and content.strip() not in head for _, content in row.prompt):
        head = prompt
    # subtle: a blank before the answer stays with it: it is read together with the first word, as one token
    kept = len(prompt) if head.startswith(prompt) else 0
    cut = max(len(head.rstrip(" ")), kept)
    return Rendered(head[:cut], head[cut:] + words, end)


def template_of(rows: Iterable[Row], template: bool | str) -> bool | str:
    """What writes all of these rows: their source's template, or else the one that is asked for."""
    own = {row.template for row in rows}
    only = own.pop() if len(own) == 1 else None
    return template if only is None else only


def render_rows(rows: Iterable[Row], tokenizer: Any, *, template: bool | str = True, where: str = "") -> list[Rendered]:
    """Render rows. Raises DataError with every row that the template refuses."""
    rendered, faults = [], _RowFaults()
    for row in rows:
        with faults.collect():
            rendered.append(render(row, tokenizer, template=template))
    faults.all(where).raise_any(DataError)
    return rendered


class _RowFaults:
    """The faults of many rows: one of each kind, with its rows."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], list[str]] = {}

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Keep the faults of a DataError raised inside the block, and go on after it."""
        try:
            yield
        except DataError as error:
            for fault in error.faults:
                self._rows.setdefault((fault.what, fault.fix), []).append(fault.where)

    def all(self, where: str = "", shown: int = 5) -> Faults:
        faults = Faults()
        for (what, fix), rows in self._rows.items():
            more = f" and {len(rows) - shown} more" if len(rows) > shown else ""
            faults.add(what, where=", ".join(filter(None, [where, *rows[:shown]])) + more, fix=fix)
        return faults


def writes_date(tokenizer: Any, template: bool | str = True) -> bool:
    """Whether the chat template writes the date of the day, in whose place ours stands."""
    return "strftime_now" in str(template if isinstance(template, str) else template and getattr(tokenizer, "chat_template", ""))


def _fill(row: Row, tokenizer: Any, template: bool | str, turns: Sequence[Mapping[str, Any]], *, tools: Any, **options: Any) -> str:
    """What the chat template makes of a conversation."""
    try:
        if isinstance(template, str):
            options["chat_template"] = template
        if writes_date(tokenizer, template):
            options["chat_template"] = FIXED_DATE + tokenizer.get_chat_template(options.get("chat_template"), tools=tools)
        text = tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, **options)
    except Exception as error:  # a template is a program, and raises what it likes
        what = f"the chat template refuses the row: {' '.join(str(error).split())}"
        raise DataError(
            what, where=f"row {row.index + 1}", fix="write the row as the template wants it, or leave the template out"
        ) from error
    return str(text)


def encode_rows(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    template: bool | str = True,
    max_length: int | None = None,
    window: int | None = None,
    turns: Turns = "last",
    label_prompt: bool = False,
    label_cut: bool = False,
) -> list[EncodedRow]:
    """Tokens and labels of rows, rendered as for scoring. Special tokens come from the rendering alone, so none is doubled.

    Args:
        max_length: cut longer rows to this many tokens.
        window: refuse rows of more tokens than this.
        turns: label the last answer of a conversation, or all turns of the assistant.
        label_prompt: label the tokens of the prompt too.
        label_cut: label all tokens of a row where the cut leaves none of its completion, instead of refusing it.

    Raises DataError with every row that has nothing to learn from, cannot be rendered, or is too long.
    """
    encoded: list[EncodedRow] = []
    refused, long = _RowFaults(), list[int]()
    limit = max_length if max_length is not None or window is None else window + 1
    for row in rows:
        with refused.collect():
            rendered = render(row, tokenizer, template=template)
            text = "".join(rendered)
            learnt = [(len(rendered.prompt), len(text))]
            if turns == "all" and rendered.prompt:
                learnt = [*_earlier_answers(row, text, tokenizer, template), *learnt]
            heads = token_ids([text[:end] for span in learnt for end in span], tokenizer, limit)
            ids = heads[-1]
            if window is not None and len(ids) > window:
                long.append(row.index)
                continue
            # subtle: a token may reach over the end of the prompt; what is learnt then begins with that token
            ends = [_shared(head, ids) for head in heads]
            spans = list(zip(ends[::2], ends[1::2], strict=True))
            if not any(max(first, 1) < last for first, last in spans):
                if not (label_cut and len(ids) == max_length):
                    what = "no token of the completion is left within `max_length`" if max_length else "the row has no text to learn"
                    fix = "raise `max_length`, or leave the row out" if max_length else ""
                    raise DataError(what, where=f"row {row.index + 1}", fix=fix)
                spans = [(0, len(ids))]
            labels = [NO_LABEL] * len(ids)
            for first, last in [(0, len(ids))] if label_prompt else spans:
                labels[first:last] = ids[first:last]
            encoded.append(EncodedRow(ids, labels))
    faults = refused.all()
    if not rows:
        faults.add("there are no rows to train on")
    if long:
        what = f"{len(long)} of {len(rows)} training rows are longer than the {window} tokens that the model can read"
        faults.add(what, where=numbered(long), fix="leave them out, or let the training cut them: `max_length`")
    faults.raise_any(DataError)
    return encoded


def token_ids(texts: Sequence[str], tokenizer: Any, limit: int | None = None) -> list[list[int]]:
    """Token ids of rendered texts, without further special tokens, cut to `limit`.

    Of a text far longer than that only a beginning is tokenised: one so long that twice as much begins with the same tokens.
    """
    found: list[list[int]] = [[]] * len(texts)
    waiting, size = range(len(texts)), None if limit is None else CHARACTERS * limit
    while waiting:
        heads = tokenizer([texts[n][: size and 2 * size] for n in waiting], add_special_tokens=False)["input_ids"]
        cut = [n for n in waiting if size is not None and len(texts[n]) > 2 * size]
        halves = dict(
            zip(cut, tokenizer([texts[n][:size] for n in cut], add_special_tokens=False)["input_ids"] if cut else [], strict=True)
        )
        for n, ids in zip(waiting, heads, strict=True):
            found[n] = ids[:limit]
        waiting = [n for n in cut if len(found[n]) < (limit or 0) or halves[n][:limit] != found[n]]
        size = size and 2 * size
    return found


def _earlier_answers(row: Row, text: str, tokenizer: Any, template: bool | str) -> Iterator[tuple[int, int]]:
    """Where the assistant's earlier turns stand in the text of a conversation. Raises DataError if they are not written as they were."""
    for at, (role, _) in enumerate(row.prompt):
        if role == "assistant":
            rendered = render(row.until(at), tokenizer, template=template)
            if not text.startswith("".join(rendered)):
                what = "the chat template writes an earlier answer in another way than the last one"
                raise DataError(what, where=f"row {row.index + 1}, turn {at + 1}", fix="learn the last answer: `turns: last`")
            yield len(rendered.prompt), len("".join(rendered))


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How much two texts, or two lists of tokens, have in common at their beginning."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))


def _start_token(tokenizer: Any) -> str:
    """The start token, if the tokenizer puts one before a text. We try it out: the tokenizer's own flag is not reliable."""
    puts_it = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return tokenizer.bos_token if puts_it else ""


def _check_details(row: Row, fill: Callable[..., str], text: str) -> None:
    """Refuse a row of which the chat template leaves something out: a text without it would be the same."""
    for name in sorted({key for turn in row.turns for key in turn} - {"role", "content", "name", "tool_call_id"} | {"tools"}):
        if name == "tools" and row.tools is None:
            continue
        turns = [{key: value for key, value in turn.items() if key != name} for turn in row.turns]
        try:
            same = text == fill(turns, tools=None if name == "tools" else row.tools)
        except DataError:  # a template that cannot do without it
            continue
        if same:
            what = f"the chat template does not write a row's `{name}`"
            raise DataError(what, where=f"row {row.index + 1}", fix=f"take `{name}` out, or give a template that does: `template: FILE`")
