"""Text that a model writes by itself, drawn from its own distribution: what it was trained for, as far as it can tell without any data."""

from __future__ import annotations

from typing import Any

import torch

from recall_merge.models.load import running
from recall_merge.runtime.errors import RunError
from recall_merge.runtime.progress import Advance

TEXTS, TOKENS, BATCH = 64, 80, 16
WITHOUT = "give `protect.base: 0`: the base is then not protected on text of its own"


def own_texts(
    model: Any, tokenizer: Any, *, seed: int, count: int = TEXTS, tokens: int = TOKENS, advance: Advance = lambda _: None
) -> list[str]:
    """Texts of at most so many tokens, from the start token on, each token drawn at temperature 1. The global draws stay as they were.

    `advance` is called with the number of texts since the last call.

    Raises RunError where the tokenizer has no token to start from, or nothing is written.
    """
    from transformers import GenerationConfig

    start = start_token(tokenizer)
    ends = model.generation_config.eos_token_id
    pad = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, start) if token is not None)
    drawn = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens, eos_token_id=ends, pad_token_id=pad
    )
    ids = torch.full((BATCH, 1), start, device=model.device)
    texts: list[str] = []
    with torch.random.fork_rng(), running(model):
        torch.manual_seed(seed)
        for _ in range(0, count, BATCH):
            written = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=drawn)
            texts += tokenizer.batch_decode(written[:, 1:], skip_special_tokens=True)
            advance(BATCH)
    texts = [text for text in texts[:count] if text.strip()]
    if not texts:
        raise RunError("the base writes nothing by itself", fix=WITHOUT)
    return texts


def start_token(tokenizer: Any) -> int:
    """The token that a text of its own starts from. Raises RunError if there is none."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise RunError("the base has neither a start nor an end token, from which it would write", fix=WITHOUT)
    return start
