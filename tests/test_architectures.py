"""Each architecture that can be built tiny does what docs/architectures.md says: right beside transformers and PEFT, or refused by name."""

from __future__ import annotations

import pytest

import architectures

ROWS = dict(architectures.rows_of(architectures.PAGE.read_text("utf-8")))
ALWAYS = frozenset(  # one or two of a family; the others are slow tests
    """
    afmoe apertus arcee aria bamba bart bert biogpt bitnet blenderbot bloom codegen cohere2 cpmant ctrl cwm deepseek_v3
    deepseek_vl doge dots1 electra ernie4_5_moe exaone4 falcon falcon_mamba fuyu gemma3_text gemma3n_text gemma4_text git
    glm4_moe gpt2 gpt_bigcode gpt_neox gpt_oss gptj granitemoe helium idefics3 jamba jetmoe lfm2 llama llama4_text llava mamba2
    minimax_m2 mistral mistral3 mixtral mllama mpt nemotron olmoe opt persimmon phi3 qwen2_moe qwen3_5_text qwen3_next qwen3_vl
    recurrent_gemma rwkv smolvlm stablelm starcoder2 whisper xlnet
    """.split()  # noqa: SIM905
)
TYPES = [pytest.param(model_type, marks=[] if model_type in ALWAYS else pytest.mark.slow) for model_type in sorted(ROWS)]


@pytest.mark.parametrize("model_type", TYPES)
def test_an_architecture_does_what_the_page_says(model_type, tmp_path):
    assert architectures.outcomes(model_type, tmp_path) == ROWS[model_type]


def test_most_architectures_merge_exactly():
    exact = {model_type for model_type, row in ROWS.items() if set(row.values()) == {architectures.YES}}
    assert set(ROWS) >= ALWAYS
    assert len(exact) >= 120
    assert len(exact & ALWAYS) >= 60
    assert not any(reason.startswith("CRASH") for row in ROWS.values() for reason in row.values())


def test_multimodal_models_merge_whole_and_as_their_text_models():
    """Results load with `from_pretrained` of the class that the config names, with the expert's logits: what "yes" under merge means."""
    exact = {model_type for model_type, row in ROWS.items() if row["merge"] == architectures.YES}
    whole = {model_type for model_type in exact if architectures.classes().get(model_type, "").endswith("ForConditionalGeneration")}
    assert whole >= {"aria", "idefics2", "llava", "mistral3", "paligemma", "qwen3_vl", "smolvlm", "voxtral"}
    assert exact >= {"aria_text", "gemma3_text", "gemma3n_text", "gemma4_text", "llama4_text", "minimax_m3_vl_text", "qwen3_5_text"}
