"""Forms of record: what each says as a row, and what is refused instead of being thinned."""

import json

import pytest

from recall_merge.files.forms import FORMS, Row, make_row
from recall_merge.files.rows import parse_rows, unread_columns
from recall_merge.runtime.errors import DataError

ASK = {"role": "user", "content": "weather?"}
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "unit": None}}}]
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
SAYS = {"role": "assistant", "content": "5"}


def said(record, columns=None):
    with pytest.raises(DataError) as caught:
        parse_rows([record], where="rows.jsonl", columns=columns)
    [fault] = caught.value.faults
    assert fault.where == "rows.jsonl, row 1"
    return f"{fault.what}; {fault.fix}"


CHAT = (("system", "be brief"), ("user", "u"), ("assistant", "a"), ("user", "v"))
SAME = {  # four ways to say one thing
    "messages": {"messages": [*({"role": role, "content": content} for role, content in CHAT), {"role": "assistant", "content": "b"}]},
    "ShareGPT": {
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": content}
            for role, content in (*CHAT, ("assistant", "b"))
        ]
    },
    "ShareGPT, system apart": {
        "system": "be brief",
        "conversations": [
            {"from": "human", "value": "u"},
            {"from": "gpt", "value": "a"},
            {"from": "human", "value": "v"},
            {"from": "gpt", "value": "b"},
        ],
    },
    "trl's conversational prompt and completion": {
        "prompt": [{"role": role, "content": content} for role, content in CHAT],
        "completion": [{"role": "assistant", "content": "b"}],
    },
    "Alpaca with system and history": {"system": "be brief", "history": [["u", "a"]], "instruction": "v", "input": None, "output": "b"},
}


@pytest.mark.parametrize("form", SAME)
def test_one_conversation_in_every_form(form):
    assert make_row(0, SAME[form]) == Row(0, CHAT, "b")


def test_a_prompt_in_turns_may_have_choices_and_a_system_prompt_goes_before_a_plain_one():
    row = make_row(0, {"prompt": [ASK], "completion": [SAYS], "choices": ["5", "6"]})
    assert row == Row(0, (("user", "weather?"),), "5", ("5", "6"))
    assert make_row(0, {"prompt": "p", "answer": "a", "system": "s"}).prompt == (("system", "s"), ("user", "p"))
    assert make_row(0, {"prompt": "p", "answer": "a", "choices": '["a", "b"]', "system": ""}).choices == ("a", "b")


def test_tools_calls_and_reasoning_are_kept_as_a_template_reads_them():
    turns = [ASK, {"role": "assistant", "content": None, "tool_calls": CALL}, {"role": "tool", "content": "5", "name": "weather"}]
    row = make_row(0, {"messages": [*turns, SAYS | {"reasoning_content": "cold"}], "tools": json.dumps(TOOLS)})
    call = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]  # without the nulls of tables, as trl
    assert row.turns == [ASK, {"role": "assistant", "content": "", "tool_calls": call}, turns[2], SAYS | {"reasoning_content": "cold"}]
    assert row.tools == TOOLS
    assert row.until(1).turns == row.turns[:2] and row.until(1).tools == TOOLS
    assert row != make_row(0, {"messages": [*turns, SAYS | {"reasoning_content": "hot"}], "tools": TOOLS})


REFUSED = {
    "a misspelt field": ({"prompt": "p", "completion": "a", "choises": ["a", "b"]}, "`choises` is not read; did you mean `choices`?"),
    "text with a label": (
        {"text": "t", "label": "good"},
        "`label` is not read beside `text`; .*`columns: {prompt: text, completion: label}`",
    ),
    "text with a completion": ({"text": "t", "completion": "c"}, "`completion` is not read beside `text`; .*completion: completion}"),
    "liked and not": ({"prompt": "p", "completion": "a", "label": False}, "`label` is not read beside `prompt`"),
    "tools with plain text": (
        {"prompt": "p", "completion": "a", "tools": TOOLS},
        "`tools` is not read with a prompt of plain text; .*turns",
    ),
    "pictures": ({"messages": [ASK, SAYS], "images": ["x.png"]}, "`images` is not read beside `messages`"),
    "calls of another kind": ({"messages": [ASK, SAYS | {"function_call": {"name": "f"}}]}, "`function_call` is not read; .*`tool_calls`"),
    "calls in ShareGPT": (
        {"conversations": [{"from": "function_call", "value": "{}"}]},
        "a turn from `function_call` is not read; .*`messages`",
    ),
    "two answers": ({"prompt": [ASK], "completion": [SAYS, SAYS]}, "must be one turn of the assistant's"),
    "two systems": ({"system": "s", "messages": [{"role": "system", "content": "t"}, ASK, SAYS]}, "both hold a system's message"),
    "almost a form": (
        {"question": "q", "answer": "a", "id": 1},
        "none of the accepted forms.*`columns: {prompt: question, completion: answer}`",
    ),
    "capital letters": ({"Instruction": "q", "Response": "a"}, "`columns: {prompt: Instruction, completion: Response}`"),
    "tools that are not JSON": ({"messages": [ASK, SAYS], "tools": "weather"}, "`tools` is text that is not JSON"),
    "turns that are none": ({"messages": "hello"}, "field `messages` must be a list of turns, it is str"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_form_would_drop_is_refused(kind):
    import re

    record, words = REFUSED[kind]
    assert re.search(words, said(record))


def test_columns_say_what_to_read():
    record = {"text": "t", "label": "good", "id": 3}
    assert make_row(0, record, {"prompt": "text", "completion": "label"}) == Row(0, (("user", "t"),), "good")
    assert make_row(0, record, {"text": "text"}) == Row(0, (), "t")
    assert "no column 'words', which `columns` names; its columns are id, label, text" in said(record, {"text": "words"})
    assert "`columns` gives `promt`, which no form has; did you mean 'prompt'?" in said(record, {"promt": "text", "completion": "label"})


def test_columns_that_say_nothing_are_named():
    rows = parse_rows([{"prompt": "p", "answer": "a", "id": 1, "source": "web"}, {"prompt": "p", "answer": "a"}], where="rows")
    assert unread_columns(rows) == ["columns of the rows that are not read: id, source"]
    assert unread_columns(rows[1:]) == []
    assert {form.fields[0] for form in FORMS.values()} == set(FORMS)
