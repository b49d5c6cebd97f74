"""Plain transformers: every expert's forward pass over given texts, timed after loading, and its pooled hidden states, to check ours.

python -m benchmarks.plain '{"experts": [...], "rows": "rows.jsonl", "samples": [3, 7], "states": "states.pt"}'
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TOKENS = 512  # padded tokens per batch, as ours


def do(job: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of all experts on the samples, and of the newest on all rows; float32, no logits, batches of similar lengths."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    texts = [json.loads(row)["text"] for row in Path(job["rows"]).read_text("utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(job["experts"][-1])
    tokens = [ids[:512] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    samples = [tokens[row] for row in job["samples"]]
    forward, states, pool = 0.0, [], 0.0
    for folder in job["experts"]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        _states(model, samples[:1])  # the first pass also pays for setting up
        start = time.perf_counter()
        states.append(_states(model, samples))
        forward += time.perf_counter() - start
        if folder == job["experts"][-1]:
            start = time.perf_counter()
            _states(model, tokens)
            pool = time.perf_counter() - start
        del model
    torch.save(torch.stack(states, dim=1), job["states"])
    return {"seconds": forward, "pool": pool, "sample_tokens": sum(map(len, samples)), "pool_tokens": sum(map(len, tokens))}


def _states(model: Any, tokens: Sequence[Sequence[int]]) -> Any:
    """Mean over each text's tokens of what enters the first block and leaves each.    -> (L + 1, m, d)"""
    import torch

    rows = sorted(range(len(tokens)), key=lambda row: -len(tokens[row]))
    blocks = model.config.num_hidden_layers
    states = torch.empty(blocks + 1, len(tokens), model.config.hidden_size)
    kept: list[torch.Tensor] = []
    hook = model.model.layers[-1].register_forward_hook(lambda *call: kept.append(call[-1]))  # before the norm, unlike `hidden_states`
    with torch.inference_mode():
        while rows:
            count = max(1, TOKENS // len(tokens[rows[0]]))
            batch, rows = rows[:count], rows[count:]
            width = len(tokens[batch[0]])
            ids = torch.tensor([list(tokens[row]) + [0] * (width - len(tokens[row])) for row in batch])
            mask = torch.tensor([[1] * len(tokens[row]) + [0] * (width - len(tokens[row])) for row in batch])
            hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True).hidden_states
            last = kept.pop()
            for layer, h in enumerate([*hidden[:blocks], last[0] if isinstance(last, tuple) else last]):
                states[layer, batch] = (h * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    hook.remove()
    return states


if __name__ == "__main__":
    print(json.dumps(do(json.loads(sys.argv[1]))))
