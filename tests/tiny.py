"""Tiny real models, made on the spot: random weights of known families, fine-tuned copies, PEFT adapters, and a real tokenizer.

    base = save_model(make_model("gpt2"), tmp_path / "base")
    full = fine_tuned(base, tmp_path / "full", seed=1)
    part = lora(base, tmp_path / "part", r=4, lora_alpha=8, target_modules=["c_attn"])

Everything is seeded, silent and takes a fraction of a second. Width 32, two blocks (three where layer types alternate), at most 96 tokens.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from recall_merge.runtime.sealed import KEY, sealed

VOCABULARY = 96
SPECIAL = ["<pad>", "<s>", "</s>"]  # ids 0, 1, 2
TEMPLATE = (
    "{% for turn in messages %}<s>{{ turn['role'] }}\n{{ turn['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
_TEXT = [
    "the quick brown fox jumps over the lazy dog and the other dog sees it",
    "THE FIVE BOXING WIZARDS JUMP QUICKLY, 0123456789 times.",
    "is this a good film? yes: it is good; no, it is not that bad!\n(user, assistant, system)",
]

_SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
_SIZE |= {"max_position_embeddings": 128}
_MOE = _SIZE | {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> (prefix of transformers' classes, settings of the config)
    "llama": ("Llama", _SIZE | {"tie_word_embeddings": False}),
    "llama-tied": ("Llama", _SIZE | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", _SIZE),
    "qwen3": ("Qwen3", _SIZE | {"head_dim": 8}),
    "gemma2": ("Gemma2", _SIZE | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16, "num_hidden_layers": 3}),
    "gemma3": ("Gemma3", _SIZE | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16, "num_hidden_layers": 3}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "neox": ("GPTNeoX", _SIZE | {"tie_word_embeddings": False}),
    "phi3": ("Phi3", _SIZE | {"original_max_position_embeddings": 128}),
    "mixtral": ("Mixtral", _MOE),
    "qwen3-moe": ("Qwen3Moe", _MOE | {"head_dim": 8, "decoder_sparse_step": 1, "mlp_only_layers": []}),
}


def make_model(family: str = "llama", *, seed: int = 0, dtype: str = "float32", **settings: Any) -> Any:
    """A random model of a family of `FAMILIES`; `settings` go to its config. No parameter is all zeros or all ones."""
    prefix, own = FAMILIES[family]
    kind = "Gemma3TextConfig" if prefix == "Gemma3" else f"{prefix}Config"
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCABULARY}
    config = getattr(transformers, kind)(**(ids | own | settings))
    name = "GPT2LMHeadModel" if prefix == "GPT2" else f"{prefix}ForCausalLM"
    with seeded(seed), quiet():
        model = getattr(transformers, name)(config)
        _add_noise(model.parameters(), 0.02)
    return model.to(getattr(torch, dtype)).eval()


def make_tokenizer(*, template: bool = False) -> Any:
    """A byte-level BPE of at most `VOCABULARY` tokens with pad, bos and eos; `template` gives it a chat template."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_trained(), pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=128
    )
    if template:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


CACHES = ("cache", "past_key_values")  # since transformers 5.24, and before


def forced(tokenizer: Any, texts: list[str]) -> Any:
    """A real model that, wherever what it reads begins one of the texts, goes on with that text, and then ends."""
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=4096)
    plans = [[*tokenizer(text, add_special_tokens=False)["input_ids"], 2] for text in texts]
    forward = model.forward

    @wraps(forward)
    def says(input_ids: Any = None, **kwargs: Any) -> Any:
        given = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
        before = getattr(given, "read", [[]])
        out = forward(input_ids=input_ids, **kwargs)
        before = before * len(input_ids) if len(before) == 1 else before
        rows = [old + new for old, new in zip(before, input_ids.tolist(), strict=True)]
        for written in (out[name] for name in CACHES if name in out):
            written.read = rows
        for number, ids in enumerate(rows):
            padding = next(i for i, token in enumerate(ids) if token)
            for position in range(out.logits.shape[1]):
                read = ids[padding : len(ids) - out.logits.shape[1] + position + 1]
                for plan in plans:
                    if read and plan[: len(read)] == read and len(read) < len(plan):
                        out.logits[number, position] = -100.0
                        out.logits[number, position, plan[len(read)]] = 100.0
        return out

    model.forward = says
    return model


def save_model(model: Any, folder: Path, *, max_shard_size: int | str = "5GB", template: bool = False, tokenizer: Any = None) -> Path:
    """Write a model and a tokenizer (its own by default, `tokenizer=False` for none) as Hugging Face does; returns the folder."""
    with quiet():
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if tokenizer is not False:
            (tokenizer or make_tokenizer(template=template)).save_pretrained(folder)
    return folder


def fine_tuned(base: Path, folder: Path, seed: int, scale: float = 0.01) -> Path:
    """A copy of a model's folder with seeded noise added to every tensor: same files, same dtypes."""
    shutil.copytree(base, folder)
    with seeded(seed):
        for file in sorted(folder.glob("*.safetensors")):
            tensors = load_file(file)
            _add_noise([tensor for tensor in tensors.values() if tensor.is_floating_point()], scale)
            save_file(tensors, file, metadata={"format": "pt"})
    return folder


def lora(base: Path, folder: Path, *, seed: int = 0, scale: float = 0.05, kind: Any = None, **config: Any) -> Path:
    """A PEFT adapter as PEFT saves it; all that it trains is random, no B is zero. `config` goes to `LoraConfig`; `kind`: of the base."""
    from peft import LoraConfig

    return adapter(base, folder, LoraConfig(**({"task_type": "CAUSAL_LM"} | config)), seed=seed, scale=scale, kind=kind)


def adapter(base: Path, folder: Path, config: Any, *, seed: int = 0, scale: float = 0.05, kind: Any = None) -> Path:
    """An adapter of any kind that PEFT knows; seeded noise is added to all that it trains."""
    from peft import get_peft_model

    with quiet(), seeded(seed):
        model = get_peft_model(load_model(base, kind=kind), config)
        _add_noise([parameter for parameter in model.parameters() if parameter.requires_grad], scale)
        model.save_pretrained(folder)
    return folder


def merged_by_peft(base: Path, adapter_folder: Path, folder: Path, *, kind: Any = None) -> Path:
    """What PEFT itself makes of a base and an adapter, saved as a model: the reference for ours."""
    from peft import PeftModel

    with quiet():
        model = PeftModel.from_pretrained(load_model(base, kind=kind), adapter_folder).merge_and_unload()
        model.save_pretrained(folder)
    return folder


def load_model(folder: Path, *, dtype: str = "auto", kind: Any = None) -> Any:
    """The model of a folder, as transformers loads it: by its class `kind`, or as a causal one."""
    with quiet():
        return (kind or transformers.AutoModelForCausalLM).from_pretrained(folder, dtype=dtype).eval()


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model's or adapter's folder, read by the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  it is no dict
    return tensors


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; `None` takes a key out. Where the file carries a hash of itself, it fits again."""
    data = json.loads(path.read_text("utf-8")) | changes
    hashed = data.pop(KEY, None) is not None
    data = {key: value for key, value in data.items() if value is not None}
    path.write_text(sealed(data) if hashed else json.dumps(data), "utf-8")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's random numbers from a seed, and as before afterwards."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """No hints, bars or warnings from transformers and PEFT."""
    from transformers.utils import logging as noise

    level, bars = noise.get_verbosity(), noise.is_progress_bar_enabled()
    noise.set_verbosity(logging.ERROR)
    noise.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        noise.set_verbosity(level)
        if bars:
            noise.enable_progress_bar()


@cache
def _trained() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False)  # type: ignore[call-arg]
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer


def _add_noise(tensors: Any, scale: float) -> None:
    for tensor in tensors:
        tensor.add_(scale * torch.randn(tensor.shape).to(tensor.dtype))
