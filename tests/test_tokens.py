"""A row as the model reads it: rendered, then as tokens."""

import pytest
from tokenizers.processors import TemplateProcessing

from recall_merge.files.rows import parse_rows
from recall_merge.models.tokens import encode_rows, render
from recall_merge.runtime.errors import DataError
from tiny import make_tokenizer

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


def test_instructions_and_answers(tokenizer):
    assert render(row(instruction="Translate.", input="dog", output="chien"), tokenizer).prompt == "Translate.\ndog"
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
