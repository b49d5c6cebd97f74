"""How a row becomes text: the model's chat template where it has one, the plain words where it has none."""

from __future__ import annotations

from typing import Any, NamedTuple

from recall_merge.files.rows import Row


class Rendered(NamedTuple):
    """A row as the model reads it: `prompt + completion` is the whole text. No special tokens are to be added."""

    prompt: str
    completion: str


def render(row: Row, tokenizer: Any, *, template: bool = True) -> Rendered:
    """Render one row for training, scoring or representations; all three see the same text.

    With a chat template the completion ends as the template ends an assistant's turn; without one it ends with the
    tokenizer's end token, so that a model learns to stop. `template=False` leaves the template out.
    """
    if not (template and getattr(tokenizer, "chat_template", None)) or not row.prompt:
        return Rendered(_start(tokenizer) + row.plain, row.completion + (tokenizer.eos_token or ""))
    turns = [{"role": role, "content": content} for role, content in row.prompt]
    answer = {"role": "assistant", "content": row.completion.strip()}
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*turns, answer], tokenize=False)
    if not whole.startswith(prompt):  # subtle: some templates rewrite the last turn; then only the answer itself is scored
        return Rendered(prompt, row.completion.strip() + (tokenizer.eos_token or ""))
    return Rendered(prompt, whole[len(prompt) :])


def _start(tokenizer: Any) -> str:
    """The start token, if the tokenizer puts one before a text: told by trying, as its own flag does not always say so."""
    puts_it = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return tokenizer.bos_token if puts_it else ""
