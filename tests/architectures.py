"""Every architecture of transformers that can be built tiny, and what the product makes of it.

    python tests/architectures.py > docs/architectures.md

For each model type with a causal or a conditional-generation head: one expert at weight 1 gives the expert's logits; an adapter on all
linear layers gives those of PEFT's own merge; `recall` runs; each result loads with `from_pretrained`. What is refused is listed with its
reason. `tests/test_architectures.py` compares the page with what happens.
"""

from __future__ import annotations

import inspect
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import tiny
from recall_merge import MergeRun, merge
from recall_merge.runtime.errors import RecallError

LIMIT = 3_000_000  # parameters
CHECKS = ("merge", "adapter", "recall")
YES = "yes"
PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
SIZES: dict[int, str] = {  # value -> the keys of configs that get it, wherever a config has them with a whole number
    0: "pad_token_id",
    1: "bos_token_id n_shared_experts",
    2: "num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers depth num_key_value_heads num_experts_per_tok"
    " linear_num_key_heads eos_token_id moe_k",
    4: "num_attention_heads n_head num_heads n_heads decoder_attention_heads encoder_attention_heads num_experts n_routed_experts"
    " num_local_experts moe_num_experts time_step_rank mamba_n_heads mamba_num_heads linear_num_value_heads rotary_dim",
    8: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim patch_size state_size ssm_state_size mamba_d_state linear_key_head_dim"
    " linear_value_head_dim",
    16: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size q_lora_rank kv_lora_rank qk_head_dim"
    " image_size mamba_d_head mamba_head_dim sliding_window",
    32: "hidden_size n_embd d_model dim embed_dim embedding_size word_embed_proj_dim model_dim lru_width",
    64: "intermediate_size ffn_dim n_inner d_ff ffn_hidden_size dense_ffn_hidden_size encoder_ffn_dim decoder_ffn_dim",
    128: "vocab_size max_position_embeddings n_positions n_ctx max_seq_len vocab_size_per_layer_input",
}
HEAD = """# Architectures

Made by `python tests/architectures.py` with transformers {version}, from tiny random models. **merge**: one expert at weight 1 gives the
expert's logits. **adapter**: a LoRA on all linear layers gives the logits of PEFT's own merge. **recall**: hidden states are compared, and
the result loads. Types that cannot be built this small, or need more than text to run, are not in the table.

`laguna` differs where PEFT loads its own adapter without the shared experts, whose names differ in memory and in files; the
result has them.

| model type | merge | adapter | recall |
|---|---|---|---|"""
TINY = {key: size for size, keys in SIZES.items() for key in keys.split()}
LATENT = {"num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
HYBRID = {"num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"]}
GEMMA = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 8}
OWN: dict[str, dict[str, Any]] = {  # what a type needs besides, as a rule because its layers are not all of one kind
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "glm_moe_dsa", "minicpm3", "youtu"), LATENT),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), HYBRID),
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": GEMMA
    | {"num_kv_shared_layers": 2, "laurel_rank": 4, "intermediate_size": [64] * 4, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": GEMMA | {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16, "n_groups": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
}
MAMBA = ("falcon_mamba", "falcon_h1", "mamba", "mamba2")  # PEFT refuses their out_proj, whose weight they read themselves
IDS = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(0))


@cache
def classes() -> dict[str, str]:
    """Model type -> the class of its model with a head, causal ones first."""
    mappings = ("CAUSAL_LM", "MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT")
    names: dict[str, str] = {}
    for mapping in mappings:
        for model_type, name in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
            names.setdefault(model_type, name if isinstance(name, str) else name[0])
    return names


def build(model_type: str) -> Any:
    """A tiny random model of a type; None where none can be built, or where it does not run on text alone."""
    kind = CONFIG_MAPPING[model_type]
    keys = {key for parent in kind.__mro__ for key in getattr(parent, "__annotations__", {})} | set(inspect.signature(kind).parameters)
    own = OWN.get(model_type, {})
    try:
        try:
            config = kind(**{key: size for key, size in TINY.items() if key in keys} | own)
        except Exception:
            config = kind(**own)
        _shrink(config, own)
        model_class = getattr(transformers, classes()[model_type])
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in model_class(config).parameters())
        if size > LIMIT:
            return None
        with tiny.seeded(0), tiny.quiet():
            model = model_class(config).eval()
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
            return model if model(input_ids=IDS).logits.isfinite().all() else None
    except Exception:  # whatever a class of transformers raises for sizes that do not fit
        return None


def outcomes(model_type: str, folder: Path) -> dict[str, str] | None:
    """By check: "yes", or why not. None where the model cannot be built, saved and loaded by transformers alone."""
    model = build(model_type)
    if model is None:
        return None
    try:
        base = tiny.save_model(model, folder / "base")
        expert, other = (tiny.fine_tuned(base, folder / f"expert{seed}", seed) for seed in (1, 2))
        wanted = _logits(expert, type(model))
    except Exception:
        return None
    rows = [{"prompt": f"is this a {word} film?", "completion": "yes: it is good"} for word in ("good", "bad", "quick", "lazy", "brown")]
    samples = {"path": str(tiny.write_rows(folder / "rows.jsonl", rows)), "count": 3}
    return {
        "merge": _outcome(base, [expert], folder / "merged", wanted, type(model)),
        "adapter": _adapter_outcome(base, folder, type(model)),
        "recall": _outcome(base, [expert, other], folder / "recalled", None, type(model), method="recall", samples=samples),
    }


def page(only: Sequence[str] = ()) -> Iterator[str]:
    """The lines of the page of docs, or only its rows of some types."""
    if not only:
        yield HEAD.format(version=transformers.__version__)
    for model_type in only or sorted(classes()):
        with tempfile.TemporaryDirectory() as folder:
            row = outcomes(model_type, Path(folder))
        if row is not None:
            yield f"| `{model_type}` | {' | '.join(row[check] for check in CHECKS)} |"


def rows_of(page: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of the page: model type, and its outcomes."""
    for line in page.splitlines():
        if line.startswith("| `"):
            model_type, *cells = (cell.strip() for cell in line.strip("| ").split(" | "))
            yield model_type.strip("`"), dict(zip(CHECKS, cells, strict=True))


def _shrink(config: Any, own: dict[str, Any]) -> None:
    for key, value in vars(config).copy().items():
        if isinstance(value, transformers.PretrainedConfig):
            _shrink(value, {})
        elif key in TINY and key not in own and isinstance(value, int) and not isinstance(value, bool):
            setattr(config, key, TINY[key])


def _logits(folder: Path, model_class: Any) -> torch.Tensor:
    with tiny.quiet(), torch.no_grad():
        return model_class.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=IDS).logits


def _outcome(base: Path, experts: list[Path], out: Path, wanted: torch.Tensor | None, model_class: Any, **run: Any) -> str:
    entries = [{"name": path.name, "path": str(path), "same_base": path.name == "adapter"} for path in experts]
    run = {"method": "linear", "base": str(base), "experts": entries, "out": {"path": str(out)}} | run
    try:
        merge(MergeRun.model_validate(run))
    except RecallError as error:
        return error.faults[0].what
    except Exception as error:
        return f"CRASH: {type(error).__name__}: {error}"
    got = _logits(out, model_class)
    if not got.isfinite().all():
        return "the result's logits are not finite"
    if wanted is not None and (gap := float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1))) > 1e-3:
        return f"the result's logits differ by {gap:.2g}"
    return YES


def _adapter_outcome(base: Path, folder: Path, model_class: Any) -> str:
    try:
        without = ["out_proj"] if model_class.config_class.model_type in MAMBA else None
        adapter = tiny.lora(base, folder / "adapter", r=2, target_modules="all-linear", exclude_modules=without, kind=model_class)
        wanted = _logits(tiny.merged_by_peft(base, adapter, folder / "peft", kind=model_class), model_class)
    except Exception as error:
        return f"PEFT cannot: {' '.join(str(error).split())[:100]}"
    return _outcome(base, [adapter], folder / "adapted", wanted, model_class)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in page(sys.argv[1:]):
        print(line, flush=True)  # noqa: T201
