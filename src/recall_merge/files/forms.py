"""Forms of record: how the fields of a record become a `Row`. To add one, write the function that reads it and enter it in `FORMS`."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, NamedTuple

from recall_merge.runtime.errors import did_you_mean

Turns = tuple[tuple[str, str], ...]

OF_TURNS = ("tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking")  # beside role and content
SYSTEM_ROLES = ("system", "developer")
SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system"}  # of ShareGPT
CHANGES = (
    "label",
    "labels",
    "tools",
    "functions",
    "history",
    "system",
    "system_prompt",
    "image",
    "images",
    "video",
    "videos",
    "audio",
    "audios",
)
"""Fields that change what a record says: one that its form does not read is refused. Others are left unread, and named."""
PROMPTS = ("question", "query", "instruction", "input", "source", "sentence", "user", "text")
COMPLETIONS = ("answer", "response", "reply", "solution", "output", "target", "assistant", "label")


@dataclass(frozen=True)
class Row:
    """One example. `prompt` is a conversation of (role, content) turns, empty for plain text; `completion` is the answer."""

    index: int
    """Position in its file, from 0; in a file of lines, its line's."""
    prompt: Turns
    completion: str
    choices: tuple[str, ...] = ()
    details: str = ""
    """JSON of what only a chat template reads: `tools`, and under `turns` the further fields of each turn, the answer's last."""
    unread: tuple[str, ...] = field(default=(), compare=False)
    """Fields of its record that no form reads."""
    roles: bool = field(default=False, compare=False)
    """The prompt is a conversation or an instruction, which only a chat template can write; not a text that is complete in itself."""
    template: bool | str | None = None
    """What writes this row, as its source has it: the model's chat template, none, or the text of another; None: what else is asked for."""
    has_system: bool = field(default=False, compare=False)
    """The first turn is the system text of the row's source, which all its rows share."""

    @property
    def plain(self) -> str:
        """The prompt without roles, for models that have no chat template."""
        return "\n".join(content for _, content in self.prompt)

    @property
    def content(self) -> tuple[Any, ...]:
        """What the row asks and answers, to tell whether two rows are the same one."""
        own = self.prompt[1:] if self.has_system else self.prompt
        return (*((role, composed(content.strip())) for role, content in own), composed(self.completion.strip()))

    @property
    def turns(self) -> list[dict[str, Any]]:
        """The conversation as a chat template reads it, the answer last."""
        turns = [*self.prompt, ("assistant", self.completion.strip())]
        further = json.loads(self.details)["turns"] if self.details else [{}] * len(turns)
        return [{"role": role, "content": content, **more} for (role, content), more in zip(turns, further, strict=True)]

    def until(self, turn: int) -> Row:
        """The row as if it ended with this turn of its prompt."""
        details = json.loads(self.details) if self.details else None
        less = json.dumps(details | {"turns": details["turns"][: turn + 1]}) if details else ""
        return replace(self, prompt=self.prompt[:turn], completion=self.prompt[turn][1], details=less)

    def under_system(self, text: str) -> Row:
        """The row with a system turn before its conversation, if it has none of its own."""
        if self.prompt[0][0] in SYSTEM_ROLES:
            return self
        details = json.loads(self.details) if self.details else None
        more = json.dumps(details | {"turns": [{}, *details["turns"]]}) if details else ""
        return replace(self, prompt=(("system", text), *self.prompt), details=more, roles=True, has_system=True)

    @property
    def tools(self) -> Any:
        """The tools that a chat template describes; None without any."""
        return json.loads(self.details)["tools"] if self.details else None


def composed(text: str) -> str:
    """A text in one form of Unicode (NFC), for comparisons: an accent may be written as part of its letter, or after it."""
    return unicodedata.normalize("NFC", text)


class Example(NamedTuple):
    """What a record says, as in `Row`."""

    prompt: Turns
    completion: str
    choices: tuple[str, ...] = ()
    details: str = ""


class Unfit(ValueError):
    """A record has a field that its form does not read, or none of the forms; `fix` says how to name its fields."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.fix = fix


def make_row(index: int, record: Any, columns: Mapping[str, str] | None = None) -> Row:
    """A record as a row. Raises ValueError if it has none of the forms, or `Unfit`.

    Args:
        columns: the fields of a form and what the record calls them; then no other field counts.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"a row must be an object, this is {type(record).__name__}")
    given = {str(key): value for key, value in record.items() if value is not None}
    if columns:
        known = {name for form in FORMS.values() for name in form.fields}
        if strange := [key for key in columns if key not in known]:
            raise Unfit(f"`columns` gives `{strange[0]}`, which no form has", did_you_mean(strange[0], sorted(known)))
        if absent := [column for column in columns.values() if column not in given]:
            raise Unfit(f"a row has no column '{absent[0]}', which `columns` names", f"its columns are {', '.join(sorted(given))}")
        said = {key: given[column] for key, column in columns.items()}
    else:
        said = given
    form = next((form for key, form in FORMS.items() if key in said), None)
    if form is None:
        raise _no_form(said)
    left = [key for key in said if key not in form.fields]
    absent = [name for name in form.fields if name not in said and not (name == "answer" and "completion" in said)]
    for key in left:
        if near := get_close_matches(key, absent, n=1, cutoff=0.8):
            raise Unfit(f"a row's field `{key}` is not read", f"did you mean `{near[0]}`?")
        answers = "text" in form.fields and key in ("completion", *COMPLETIONS)
        if answers or key in CHANGES:
            first = form.fields[0]
            names = f"{{prompt: text, completion: {key}}}" if answers else f"{{{first}: {first}, ...}}"
            raise Unfit(
                f"a row's field `{key}` is not read beside `{first}`",
                f"take `{key}` out, or say what to read by `columns: {names}`",
            )
    unread = [key for key in given if key not in columns.values()] if columns else left
    example = form.read(said)
    roles = len(example.prompt) > 1 or not isinstance(said.get("prompt"), str)
    return Row(index, *example, unread=tuple(sorted(unread)), roles=roles)


def _no_form(record: Mapping[str, Any]) -> ValueError:
    names = {key.lower(): key for key in record}
    prompt, completion = (next((names[word] for word in words if word in names), None) for words in (("prompt", *PROMPTS), COMPLETIONS))
    what = f"a row has none of the accepted forms; its fields are {sorted(record)}"
    if prompt is not None and completion is not None:
        return Unfit(what, f"rename them, or say which is which by `columns: {{prompt: {prompt}, completion: {completion}}}`")
    return ValueError(what)


def _messages(record: Mapping[str, Any]) -> Example:
    return _conversation(record, _list(record, "messages"))


def _sharegpt(record: Mapping[str, Any]) -> Example:
    turns = _list(record, "conversations")
    if all(isinstance(turn, Mapping) and "from" in turn for turn in turns):
        for turn in turns:
            if turn["from"] not in SPEAKERS:
                raise Unfit(f"a turn from `{turn['from']}` is not read", "give calls and results of tools as `messages`")
        turns = [{"role": SPEAKERS[turn["from"]], "content": turn.get("value")} for turn in turns]
    return _conversation(record, turns)


def _instruction(record: Mapping[str, Any]) -> Example:
    parts = [_text(record, "instruction"), _text(record, "input") if record.get("input") else ""]
    turns: list[tuple[str, str]] = []
    for pair in _list(record, "history") if record.get("history") else ():
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise ValueError("`history` must be a list of pairs of texts: instruction and answer")
        turns += [("user", pair[0]), ("assistant", pair[1])]
    return Example((*_system(record), *turns, ("user", "\n".join(filter(None, parts)))), _text(record, "output"))


def _prompt(record: Mapping[str, Any]) -> Example:
    field = "answer" if "answer" in record and "completion" not in record else "completion"
    if isinstance(record["prompt"], list | tuple):  # conversational, as trl has it
        answer = record.get(field)
        turns = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else _list(record, field)
        if len(turns) != 1:
            raise ValueError(f"the conversation in `{field}` must be one turn of the assistant's")
        example = _conversation(record, [*record["prompt"], *turns])
    elif record.get("tools"):
        raise Unfit("a row's field `tools` is not read with a prompt of plain text", "give the prompt as a list of turns")
    else:
        example = Example((*_system(record), ("user", _text(record, "prompt"))), _text(record, field))
    choices = record.get("choices") or []
    if isinstance(choices, str) and choices.startswith("["):  # a cell of a table
        choices = _parsed(choices, "choices")
    if not isinstance(choices, list | tuple) or not all(isinstance(choice, str | int | float) for choice in choices):
        raise ValueError("`choices` must be a list of texts")
    choices = tuple(map(str, choices))
    if choices and example.completion not in choices:
        same = [choice for choice in choices if composed(choice) == composed(example.completion)]
        if not same:
            raise ValueError(f"the {field} {example.completion!r} is not among its choices {list(choices)}")
        example = example._replace(completion=same[0])
    return example._replace(choices=choices)


def _conversation(record: Mapping[str, Any], messages: list[Any]) -> Example:
    """A list of turns, the last of which is the assistant's, and the tools that it may call."""
    turns, further = [*_system(record)], list[Any]([{}] * len(_system(record)))
    for message in messages:
        more = {key: _present(message[key]) for key in OF_TURNS if message.get(key)} if isinstance(message, Mapping) else {}
        silent = "tool_calls" in more and message.get("content") is None
        turns.append((_text(message, "role"), "" if silent else _text(message, "content")))
        further.append(more)
        if old := sorted({"function_call", "weight", "train"} & {key for key, value in message.items() if value is not None}):
            raise Unfit(f"a turn's field `{old[0]}` is not read", f"give calls as `tool_calls`, and take `{old[0]}` out")
    if [role for role, _ in turns].count("system") > 1 and _system(record):
        raise ValueError("`system` and the first turn both hold a system's message")
    if not turns or turns[-1][0] != "assistant":
        raise ValueError("the last of the turns must be the assistant's")
    tools = record.get("tools") or None
    tools = _parsed(tools, "tools") if isinstance(tools, str) else tools
    details = {"turns": further, "tools": _present(tools)}
    has_details = tools or any(further)
    return Example(tuple(turns[:-1]), turns[-1][1], (), json.dumps(details, default=str) if has_details else "")


def _system(record: Mapping[str, Any]) -> Turns:
    return (("system", _text(record, "system")),) if record.get("system") else ()


def _present(value: Any) -> Any:
    """A value without its nulls, with which tables fill up what a record does not have."""
    if isinstance(value, Mapping):
        return {key: _present(item) for key, item in value.items() if item is not None}
    return [_present(item) for item in value] if isinstance(value, list | tuple) else value


def _list(record: Mapping[str, Any], field: str) -> list[Any]:
    if not isinstance(record.get(field), list | tuple):
        raise ValueError(f"field `{field}` must be a list of turns, it is {type(record.get(field)).__name__}")
    return list(record[field])


def _parsed(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"`{field}` is text that is not JSON") from None


def _text(record: Any, field: str) -> str:
    value = record.get(field) if isinstance(record, Mapping) else None
    if not isinstance(value, str):
        raise ValueError(f"field `{field}` must be text, it is {'missing' if value is None else type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"field `{field}` holds half of a character (a lone surrogate)") from None
    return value


class Form(NamedTuple):
    """A form of record: its fields in words, all that it reads (first the one that tells it), and the function that reads it."""

    words: str
    fields: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Example]


FORMS: dict[str, Form] = {
    "messages": Form("messages (+ tools)", ("messages", "tools", "system"), _messages),
    "conversations": Form("conversations, as ShareGPT has them", ("conversations", "tools", "system"), _sharegpt),
    "instruction": Form("instruction (+ input, history) + output", ("instruction", "input", "output", "system", "history"), _instruction),
    "prompt": Form("prompt + completion or answer (+ choices)", ("prompt", "completion", "answer", "choices", "tools", "system"), _prompt),
    "text": Form("text", ("text",), lambda record: Example((), _text(record, "text"))),
}
"""Forms of record, by the field that tells them; the first one in the record decides."""
