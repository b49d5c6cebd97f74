"""A row as the model reads it: rendered, then as tokens."""

import warnings
from dataclasses import replace
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from recall_merge.files.rows import parse_rows
from recall_merge.models.tokens import encode_rows, render, token_ids
from recall_merge.runtime.errors import DataError
from tiny import make_model, make_tokenizer

ROWS = parse_rows(
    [{"prompt": f"is the {animal} good?", "completion": answer} for animal, answer in [("dog", "yes"), ("fox", "no")]], where="rows"
)


def row(**fields):
    return parse_rows([fields], where="here")[0]


def test_without_a_template(tokenizer):
    assert render(row(prompt="is it?", completion=" yes"), tokenizer) == ("is it?", " yes", "</s>")
    assert render(row(text="all of it"), tokenizer) == ("", "all of it", "</s>")


def test_with_a_template_the_turn_ends_as_the_template_ends_it(chat_tokenizer):
    found = render(row(prompt="is it?", completion=" yes"), chat_tokenizer)
    assert found == ("<s>user\nis it?</s>\n<s>assistant\n", "yes", "</s>\n")
    assert render(row(prompt="is it?", completion=" yes"), chat_tokenizer, template=False) == ("is it?", " yes", "</s>")


def test_messages_keep_their_turns(chat_tokenizer):
    turns = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    assert render(row(messages=turns), chat_tokenizer).prompt == "<s>system\na</s>\n<s>user\nb</s>\n<s>assistant\n"


def test_instructions_and_answers(tokenizer, chat_tokenizer):
    written = render(row(instruction="Translate.", input="dog", output="chien"), chat_tokenizer).prompt
    assert written == "<s>user\nTranslate.\ndog</s>\n<s>assistant\n"
    assert render(row(prompt="2 + 2", answer="4"), tokenizer).completion == "4</s>"


def test_a_start_token_is_there_once_where_the_tokenizer_puts_one(tokenizer):
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    found = render(row(prompt="is it?", completion=" yes"), tokenizer)
    assert found.prompt == "<s>is it?"
    assert tokenizer("".join(found), add_special_tokens=False)["input_ids"].count(1) == 1


def test_only_the_completion_is_learnt(chat_tokenizer):
    row = encode_rows(ROWS[:1], chat_tokenizer)[0]
    learnt = [token for token in row.labels if token != -100]
    assert chat_tokenizer.decode(learnt) == "yes</s>\n"
    assert row.labels == [-100] * (len(row.input_ids) - len(learnt)) + learnt
    assert (
        chat_tokenizer.decode(row.input_ids)
        == "".join(render(ROWS[0], chat_tokenizer))
        == "<s>user\nis the dog good?</s>\n<s>assistant\nyes</s>\n"
    )


def test_a_tokenizer_that_adds_special_tokens_does_not_double_them():
    tokenizer = make_tokenizer(template=True)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    assert tokenizer("dog")["input_ids"][0] == tokenizer.bos_token_id
    plain = encode_rows(ROWS[:1], make_tokenizer(template=True))
    assert encode_rows(ROWS[:1], tokenizer) == plain


def test_text_without_a_prompt_is_learnt_whole_and_so_is_everything_when_asked():
    tokenizer = make_tokenizer()
    text = parse_rows([{"text": "the lazy dog"}], where="rows")
    row = encode_rows(text, tokenizer)[0]
    assert row.labels == row.input_ids
    row = encode_rows(ROWS[:1], tokenizer, label_prompt=True)[0]
    assert row.labels == row.input_ids


def test_a_row_that_max_length_leaves_nothing_of_is_refused():
    long = parse_rows([{"prompt": "the " * 50, "completion": "dog"}], where="rows")
    with pytest.raises(DataError, match="no token of the completion is left within `max_length`\n  where: row 3"):
        encode_rows([*ROWS, *[row.__class__(2, row.prompt, row.completion) for row in long]], make_tokenizer(), max_length=30)


TOOL_TEMPLATE = (
    "{% if tools %}<s>tools{% for tool in tools %} {{ tool.function.name }}{% endfor %}</s>\n{% endif %}"
    "{% for m in messages %}<s>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{% if m.reasoning_content %}(thinks: {{ m.reasoning_content }}){% endif %}{{ m['content'] }}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}(calls {{ c.function.name }}){% endfor %}{% endif %}</s>\n{% endgeneration %}"
    "{% else %}{{ m['content'] }}</s>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {}}}]
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
ASK = {"role": "user", "content": "weather?"}
CALLED = [ASK, {"role": "assistant", "content": "", "tool_calls": CALL}, {"role": "tool", "content": "5"}]
CONVERSATIONS = {
    "two answers": {"messages": [ASK, {"role": "assistant", "content": "5"}, ASK, {"role": "assistant", "content": "6"}]},
    "a last call": {"messages": CALLED[:2], "tools": TOOLS},
    "a call in the middle": {"messages": [*CALLED, {"role": "assistant", "content": "5 degrees"}], "tools": TOOLS},
    "reasoning": {"messages": [ASK, {"role": "assistant", "content": "5", "reasoning_content": "it is cold"}]},
}


def labels_of_trl(records, tokenizer, folder, **settings):
    """Tokens and labels as trl's trainer makes them."""
    import datasets
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    data = datasets.Dataset.from_list(records)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = SFTConfig(output_dir=str(folder), report_to="none", max_length=None, bf16=False, use_cpu=True, **settings)
        trainer = SFTTrainer(model=make_model(), args=arguments, train_dataset=data, processing_class=tokenizer)
    rows: Any = trainer.train_dataset
    batch = [trainer.data_collator([row]) for row in rows]
    return [(row["input_ids"][0].tolist(), row["labels"][0].tolist()) for row in batch]


@pytest.mark.parametrize("turns", ["last", "all"])
@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_conversations_with_tools_are_learnt_as_trl_learns_them(kind, turns, tmp_path):
    """The last answer, as trl's conversational prompt and completion; or all of them, as its `assistant_only_loss`."""
    record, tokenizer = CONVERSATIONS[kind], make_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    settings = {"assistant_only_loss": True} if turns == "all" else {}
    given = dict(record)
    if turns == "last":
        *prompt, answer = given.pop("messages")
        given |= {"prompt": prompt, "completion": [answer]}
    [(ids, labels)] = labels_of_trl([given], tokenizer, tmp_path, **settings)
    [found] = encode_rows([row(**record)], tokenizer, turns=turns)
    assert (found.input_ids, found.labels) == (ids, labels)
    if turns == "last":
        assert encode_rows([row(**given)], tokenizer) == [found]


def test_what_a_template_leaves_out_is_refused(chat_tokenizer):
    rows = parse_rows(
        [
            *({"messages": ASK_AND, "tools": TOOLS} for ASK_AND in [[ASK, {"role": "assistant", "content": "5"}]]),
            *(CONVERSATIONS[kind] for kind in ("a call in the middle", "reasoning", "two answers")),
        ],
        where="rows",
    )
    with pytest.raises(DataError) as caught:
        encode_rows(rows, chat_tokenizer)
    assert [(fault.what.rpartition("`")[0].rpartition("`")[2], fault.where) for fault in caught.value.faults] == [
        ("tools", "row 1"),
        ("tool_calls", "row 2"),
        ("reasoning_content", "row 3"),
    ]
    for tokenizer, template in ((make_tokenizer(), True), (chat_tokenizer, False)):
        with pytest.raises(DataError, match="a row with tools, calls or reasoning needs a chat template"):
            encode_rows(rows[2:3], tokenizer, template=template)


def test_all_turns_where_the_template_writes_the_last_one_differently():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}(thinks){% endif %}"
        "{{ m['content'] }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    rows = [row(**CONVERSATIONS["two answers"])]
    assert encode_rows(rows, tokenizer)
    with pytest.raises(DataError, match=r"writes an earlier answer in another way.*\n  where: row 1, turn 2\n  fix: .*`turns: last`"):
        encode_rows(rows, tokenizer, turns="all")


def test_of_long_texts_only_a_beginning_is_tokenised(monkeypatch):
    """The same tokens as of the whole text, also where words run over the cut; and rows that are too long are found from it."""
    tokenizer, lengths = make_tokenizer(), []
    asked = type(tokenizer).__call__

    def listen(self, texts, **options):
        lengths.extend(map(len, texts))
        return asked(self, texts, **options)

    texts = ["the quick brown fox " * 500, "x" * 9000, " " * 9000, "", "dog", "ab" * 40, "quickly" * 900 + "\n"]
    whole = {limit: [ids[:limit] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] for limit in (1, 2, 7, 50)}
    monkeypatch.setattr(type(tokenizer), "__call__", listen)
    for limit, expected in whole.items():
        assert token_ids(texts, tokenizer, limit) == expected
        assert max(lengths) <= 2000
        lengths.clear()
    rows = parse_rows(
        [{"prompt": "the dog " * 100_000, "completion": "yes"}, {"prompt": "the", "completion": "dog " * 100_000}], where="rows"
    )
    with pytest.raises(DataError, match=r"^2 of 3 training rows are longer than the 64 tokens .*\n  where: rows 1, 2\n"):
        encode_rows([*rows, replace(ROWS[0], index=2)], tokenizer, window=64)
    assert max(lengths) <= 3000


def test_where_a_cut_leaves_no_completion_all_is_labelled_when_asked():
    tokenizer = make_tokenizer()
    rows = [*ROWS, row(prompt="the " * 50, completion="dog")]
    found = encode_rows(rows, tokenizer, max_length=30, label_cut=True)
    assert found[:-1] == encode_rows(ROWS, tokenizer, max_length=30)
    assert found[-1].labels == found[-1].input_ids and len(found[-1].labels) == 30
