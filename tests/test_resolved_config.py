"""Settings of a config as transformers resolves them, beside its own logits: what computes alike is merged, what does not is refused."""

import json
import subprocess
import sys

import pytest
import torch
import transformers

from recall_merge import MergeRun, make_plan, merge
from recall_merge.files.resolved_config import resolved
from recall_merge.runtime.errors import CheckpointError
from tiny import fine_tuned, load_model, make_model, save_model

OUT = object()
LINEAR = {"rope_type": "linear", "factor": 8.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
TABLE = {  # family, settings of the base, of the expert (OUT: the key is left out), and the setting that is named; '' for equal ones
    "scaling of positions, null in the base": (
        "llama",
        {"rope_parameters": OUT, "rope_theta": 1e4, "rope_scaling": None},
        {"rope_parameters": OUT, "rope_theta": 1e4, "rope_scaling": LINEAR},
        "rope_parameters.rope_type 'linear'; the base has 'default'",
    ),
    "scaling of positions, as transformers 4 has it": (
        "llama",
        {},
        {"rope_parameters": OUT, "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 8.0}},
        "rope_parameters.factor 8.0; the base has None",
    ),
    "a part of the scaling that is left out": (
        "llama",
        {"rope_parameters": YARN},
        {"rope_parameters": YARN | {"attention_factor": 0.5}},
        "attention_factor 0.5",
    ),
    "theta by the old key and by the new": (
        "llama",
        {"rope_parameters": OUT, "rope_theta": 1e4},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        "rope_parameters.rope_theta 1000000.0; the base has 10000.0",
    ),
    "theta, left out in the base": ("llama", {"rope_parameters": OUT}, {"rope_parameters": OUT, "rope_theta": 1e6}, "rope_theta 1000000.0"),
    "a soft cap, null in the base": (
        "gemma2",
        {"final_logit_softcapping": None},
        {"final_logit_softcapping": 0.05},
        "final_logit_softcapping 0.05; the base has None",
    ),
    "a soft cap, left out in the expert": (
        "gemma2",
        {"final_logit_softcapping": 0.05},
        {"final_logit_softcapping": OUT},
        "final_logit_softcapping 30.0; the base has 0.05",
    ),
    "a window, left out in the base": (
        "gemma2",
        {"sliding_window": OUT},
        {"sliding_window": 4},
        "sliding_window 4; the base has 4096",
    ),
    "a window that is off": ("qwen2", {"use_sliding_window": False, "sliding_window": None}, {"sliding_window": 4}, ""),
    "the same by the old keys": ("llama", {}, {"rope_parameters": OUT, "rope_theta": 1e4, "rope_scaling": None}, ""),
    "a default that is written out": ("llama", {"attention_bias": OUT, "hidden_act": OUT}, {"hidden_act": "silu", "num_labels": 3}, ""),
    "a key that the architecture does not know": ("llama", {}, {"trained_by": "somebody", "fast_kernels": True}, ""),
}  # fmt: skip


def a_run(base, expert):
    run = {"base": str(base), "experts": [{"name": "math", "path": str(expert)}], "method": "linear", "out": {"path": base.parent / "out"}}
    return MergeRun.model_validate(run)


def set_config(folder, changes):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not OUT}))


def logits(folder):
    with torch.inference_mode():
        return load_model(folder)(input_ids=torch.arange(3, 60)[None]).logits


@pytest.mark.parametrize("case", TABLE)
def test_experts_that_compute_differently_are_refused_and_no_others(case, tmp_path):
    family, ours, theirs, named = TABLE[case]
    base = save_model(make_model(family), tmp_path / "base")
    expert = fine_tuned(base, tmp_path / "expert", seed=1, scale=0.05)
    set_config(base, ours)
    set_config(expert, ours | theirs)
    run = a_run(base, expert)
    if not named:
        merge(run)
        torch.testing.assert_close(logits(tmp_path / "out"), logits(expert))
        return
    with pytest.raises(CheckpointError) as error:
        make_plan(run)
    [fault] = [fault for fault in error.value.faults if named in fault.what]
    assert fault.where == str(expert / "config.json") and "the same architecture" in fault.fix
    right = logits(expert)
    (expert / "config.json").write_text((base / "config.json").read_text())  # what a merge would have given
    assert (logits(expert) - right).abs().max() > 1e-3


def test_an_architecture_that_transformers_does_not_know_is_compared_as_it_is_written(tmp_path):
    base = save_model(make_model("llama"), tmp_path / "base")
    expert = fine_tuned(base, tmp_path / "expert", seed=1)
    set_config(base, {"model_type": "own"})
    run = a_run(base, expert)
    set_config(expert, {"model_type": "own", "mlp_bias": OUT, "alibi": False, "window": None})
    make_plan(run)
    set_config(expert, {"soft_cap": 30.0})
    with pytest.raises(CheckpointError, match=r"expert 'math' has soft_cap 30\.0; the base has None"):
        make_plan(run)


def test_every_architecture_resolves_its_own_defaults():
    known = set(transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    without = {kind for kind in known if resolved({"model_type": kind}) is None}
    assert len(known) > 150 and len(without) < 0.1 * len(known), without
    assert resolved({"model_type": "no such"}) is None and resolved({}) is None


def test_models_whose_configs_are_alike_ask_nobody(tmp_path):
    base = save_model(make_model("llama"), tmp_path / "base")
    expert = fine_tuned(base, tmp_path / "expert", seed=1)
    set_config(expert, {"use_cache": False, "transformers_version": "4.9"})
    experts = [{"name": "math", "path": str(expert)}]
    code = (
        "import sys; from recall_merge import MergeRun, make_plan;"
        f"make_plan(MergeRun(base={str(base)!r}, experts={experts!r}, method='linear', out={{'path': {str(tmp_path / 'out')!r}}}));"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
