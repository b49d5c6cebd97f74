"""A row as the model reads it."""

from tokenizers.processors import TemplateProcessing

from recall_merge.files.rows import parse_rows
from recall_merge.models.tokens import render


def row(**fields):
    return parse_rows([fields], where="here")[0]


def test_without_a_template(tokenizer):
    assert render(row(prompt="is it?", completion=" yes"), tokenizer) == ("is it?", " yes</s>")
    assert render(row(text="all of it"), tokenizer) == ("", "all of it</s>")


def test_with_a_template_the_turn_ends_as_the_template_ends_it(chat_tokenizer):
    found = render(row(prompt="is it?", completion=" yes"), chat_tokenizer)
    assert found == ("<s>user\nis it?</s>\n<s>assistant\n", "yes</s>\n")
    assert render(row(prompt="is it?", completion=" yes"), chat_tokenizer, template=False) == ("is it?", " yes</s>")


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
