"""Results in other tools' forms: PEFT loads the adapters, mergekit runs the files, and both give what we gave."""

import json
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from recall_merge import MergeRun, RecallError, merge
from recall_merge.cli.app import app
from recall_merge.interop.export import export_adapter, export_mergekit
from tiny import edit_json, fine_tuned, load_model, load_tensors, lora, make_model, merged_by_peft, save_model, write_rows

ROOT = Path(__file__).parents[1]
MERGEKIT = ROOT / ".venv-mergekit" / "bin" / "mergekit-yaml"
MAPS = {"llama": ["q_proj", "down_proj"], "llama-tied": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}
ROWS = [{"prompt": f"is the {word}?", "completion": " yes"} for word in ("fox", "dog", "film", "dog quick", "fox lazy")]


def merged(folder, base, experts, **settings):
    entries = [{"name": name, "path": str(path), "same_base": True} for name, path in experts.items()]
    run = {"base": str(base), "experts": entries, "method": "linear", "out": {"path": folder / "merged"}} | settings
    merge(MergeRun.model_validate(run))
    return folder / "merged"


def places(base, experts=None):
    """Where the models of a result are, by name."""
    return {name: str(path) for name, path in {"base": base, **(experts or {})}.items()}


@pytest.fixture(params=["llama", "llama-tied", "gpt2"])
def full(request, tmp_path):
    """A result of two whole checkpoints, in which every tensor changed: family, result, base."""
    base = save_model(make_model(request.param), tmp_path / "base")
    experts = {name: fine_tuned(base, tmp_path / name, seed=seed) for seed, name in enumerate("ab", 1)}
    return request.param, merged(tmp_path, base, experts, weights=[1, 3]), base


@pytest.fixture(params=["llama", "gpt2"])
def adapters(request, tmp_path):
    """Two adapters of different ranks, one of them on fewer maps: base, experts."""
    base = save_model(make_model(request.param), tmp_path / "base")
    first, second = MAPS[request.param]
    one = lora(base, tmp_path / "a", seed=1, r=2, lora_alpha=8, target_modules=[first, second])
    return base, {"a": one, "b": lora(base, tmp_path / "b", seed=2, r=3, lora_alpha=3, target_modules=[first])}


def relative(found, wanted):
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


def test_exact_adapter_of_whole_checkpoints(full, tmp_path):
    family, result, base = full
    made = export_adapter(result, models=places(base))
    assert made.path == tmp_path / "merged-adapter"
    again = load_tensors(merged_by_peft(base, made.path, tmp_path / "again"))
    assert relative(again, load_tensors(result)) < 1e-6
    assert made.error < 1e-6
    assert all(rank == min(load_tensors(base)[name].shape) for name, rank in made.ranks.items())
    assert len(made.ranks) == {"llama": 15, "llama-tied": 14, "gpt2": 8}[family]


def test_peft_loads_it_without_a_warning(full):
    from peft import PeftModel

    _, result, base = full
    made = export_adapter(result, models=places(base), rank=2)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(load_model(base), made.path)
    assert [str(one.message) for one in told if not issubclass(one.category, FutureWarning)] == []  # of transformers' own, not ours
    scales = [module.scaling["default"] for module in model.modules() if hasattr(module, "lora_A")]
    assert len(scales) == len(made.ranks)
    assert set(scales) == {1.0}


def test_our_own_merge_reads_the_adapter(full, tmp_path):
    _, result, base = full
    made = export_adapter(result, models=places(base), out=tmp_path / "adapter")
    again = merged(tmp_path / "again", base, {"back": made.path})
    assert relative(load_tensors(again), load_tensors(result)) < 1e-6


def test_error_of_a_lower_rank_is_that_of_a_plain_svd(full, tmp_path):
    family, result, base = full
    made = export_adapter(result, models=places(base), rank=4, out=tmp_path / "adapter")
    ours, theirs = load_tensors(result), load_tensors(base)
    missed, sizes = np.zeros(4), np.zeros(4)
    for name in ours:
        delta = ours[name].double().numpy() - theirs[name].double().numpy()
        block = "h." if family == "gpt2" else "layers."
        layer = 1 + int(name.split(block)[1][0]) if block in name else 0 if "emb" in name or "wte" in name or "wpe" in name else 3
        sizes[layer] += (delta**2).sum()
        if name in made.ranks:
            missed[layer] += (np.linalg.svd(delta, compute_uv=False)[4:] ** 2).sum()
    assert set(made.ranks.values()) == {4}
    np.testing.assert_allclose(made.errors, np.sqrt(missed / sizes), rtol=1e-6)
    np.testing.assert_allclose(made.error, np.sqrt(missed.sum() / sizes.sum()), rtol=1e-6)
    again = load_tensors(merged_by_peft(base, made.path, tmp_path / "again"))
    difference = sum(((again[name] - ours[name]).double() ** 2).sum().item() for name in ours)
    assert np.sqrt(difference / sizes.sum()) == pytest.approx(made.error, rel=1e-4)
    assert made.errors[1] > 0.1  # of random deltas a low rank keeps little, and says so


def test_adapters_are_put_side_by_side(adapters, tmp_path):
    base, experts = adapters
    result = merged(tmp_path, base, experts, weights=[1, 2], options={"scale": 1.5})
    made = export_adapter(result, models=places(base, experts))
    assert set(made.ranks.values()) == {2, 5}  # what one expert changed, and what both did
    assert made.whole == ()
    assert made.error < 1e-5  # the result's own rounding to float32, beside its small deltas
    assert relative(load_tensors(merged_by_peft(base, made.path, tmp_path / "again")), load_tensors(result)) < 1e-6
    config = json.loads((made.path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] != {}


def test_factors_are_exact_where_the_result_is_rounded(adapters, tmp_path):
    base, experts = adapters
    result = merged(tmp_path, base, experts, out={"path": tmp_path / "merged", "dtype": "bfloat16"})
    exact = merged(tmp_path / "exact", base, experts)
    made = export_adapter(result, models=places(base, experts))
    assert relative(load_tensors(merged_by_peft(base, made.path, tmp_path / "again")), load_tensors(exact)) < 1e-6
    assert made.error > 1e-3
    assert any("rounded to bfloat16" in note for note in made.notes)


def test_weights_by_layer_reach_the_factors(adapters, tmp_path):
    base, experts = adapters
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    settings = {"method": "recall", "options": {"temperature": 0.05, "base_in_pool": "always"}, "samples": {"path": str(rows), "count": 3}}
    result = merged(tmp_path, base, experts, **settings)
    made = export_adapter(result, models=places(base, experts))
    assert relative(load_tensors(merged_by_peft(base, made.path, tmp_path / "again")), load_tensors(result)) < 1e-6


def test_a_scale_by_layer_reaches_the_factors(adapters, tmp_path):
    base, experts = adapters
    result = merged(tmp_path, base, experts, scale_by_layer={"alpha": 0.5, "beta": 1})
    made = export_adapter(result, models=places(base, experts))
    assert set(made.ranks.values()) == {2, 5}
    assert relative(load_tensors(merged_by_peft(base, made.path, tmp_path / "again")), load_tensors(result)) < 1e-6


def test_what_is_pruned_has_no_factors(adapters, tmp_path):
    base, experts = adapters
    result = merged(tmp_path, base, experts, prune={"density": 0.5, "saliency": "magnitude"})
    made = export_adapter(result, models=places(base))
    assert set(made.ranks.values()) == {32}
    assert relative(load_tensors(merged_by_peft(base, made.path, tmp_path / "again")), load_tensors(result)) < 1e-6
    with pytest.raises(RecallError, match="not pruned"):
        export_mergekit(result, models=places(base, experts))


def test_expert_with_more_than_factors(tmp_path):
    base = save_model(make_model("llama"), tmp_path / "base")
    one = lora(base, tmp_path / "a", seed=1, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], use_dora=True)
    experts = {"a": one, "b": lora(base, tmp_path / "b", seed=2, r=3, target_modules=["q_proj", "k_proj"])}
    result = merged(tmp_path, base, experts)
    made = export_adapter(result, models=places(base, experts))
    ranks = {name.split(".")[-2]: rank for name, rank in made.ranks.items()}
    assert ranks == {"q_proj": 32, "k_proj": 3, "lm_head": 32}
    assert relative(load_tensors(merged_by_peft(base, made.path, tmp_path / "again")), load_tensors(result)) < 1e-6


def test_faults_of_an_adapter(tmp_path, monkeypatch):
    base = save_model(make_model("llama"), tmp_path / "base")
    experts = {"a": lora(base, tmp_path / "a", seed=1, r=2, target_modules=["q_proj"])}
    result = merged(tmp_path, base, experts)
    with pytest.raises(RecallError, match="only by the name of its folder, 'base'") as caught:
        export_adapter(result)
    assert [fault.fix for fault in caught.value.faults] == ["give --base FOLDER", "give --expert a=FOLDER"]
    with pytest.raises(RecallError, match="no expert 'c'"):
        export_adapter(result, models=places(base, {"c": "a"}))
    other = fine_tuned(base, tmp_path / "other", seed=9)
    changed = lora(base, tmp_path / "changed", seed=2, r=2, target_modules=["q_proj"])
    with pytest.raises(RecallError) as caught:
        export_adapter(result, models=places(other, {"a": changed}))
    assert [fault.what.split(" that ")[0] for fault in caught.value.faults] == ["this is not the base", "this is not the expert 'a'"]
    monkeypatch.chdir(tmp_path)  # where folders of these names are
    export_adapter(result)
    with pytest.raises(RecallError, match="not empty"):
        export_adapter(result)
    edit_json(result / "config.json", rope_theta=1)
    with pytest.raises(RecallError, match="changed"):
        export_adapter(result, out=tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_a_tensor_without_a_place_is_refused(tmp_path):
    base = save_model(make_model("mixtral"), tmp_path / "base")
    result = merged(tmp_path, base, {"a": fine_tuned(base, tmp_path / "a", seed=1)})
    with pytest.raises(RecallError, match="no place for it"):
        export_adapter(result, models=places(base))


def test_run_file(tmp_path):
    base = save_model(make_model("llama"), tmp_path / "base")
    experts = {"a": fine_tuned(base, tmp_path / "a", seed=1), "b": lora(base, tmp_path / "b", seed=2, r=2, target_modules=["q_proj"])}
    result = merged(tmp_path, base, experts, weights=[1, 3], options={"scale": 1.5}, skip=["*.up_proj.weight"])
    made = export_mergekit(result, models=places(base, experts))
    assert made.path == tmp_path / "merged.mergekit.yaml"
    run = yaml.safe_load(made.path.read_text())
    assert [model["model"] for model in run["models"]] == [str(base), str(tmp_path / "a"), f"{base}+{tmp_path / 'b'}"]
    assert run["parameters"] == {"normalize": False}
    weights = [{entry.get("filter"): entry["value"] for entry in model["parameters"]["weight"]} for model in run["models"]]
    assert [weight[None] for weight in weights] == [-0.5, 0.375, 1.125]
    assert [weight["model.norm.weight"] for weight in weights] == [-0.5, 0.375, 1.125]
    assert [weight["model.layers.1.mlp.up_proj.weight"] for weight in weights] == [1, 0, 0]


def test_faults_of_a_run_file(tmp_path):
    base = save_model(make_model("llama"), tmp_path / "base")
    experts = {name: fine_tuned(base, tmp_path / name, seed=seed) for seed, name in enumerate("ab", 1)}
    result = merged(tmp_path, base, experts, method="ties")
    (tmp_path / "there.yaml").touch()
    with pytest.raises(RecallError) as caught:
        export_mergekit(result, models=places(base, {"a": experts["b"]}), out=tmp_path / "there.yaml")
    told = "\n".join(fault.what for fault in caught.value.faults)
    assert "made by `ties`" in told
    assert "the file already exists" in told
    assert "expert 'b' only by the name of its folder" in told


def test_command(adapters, tmp_path):
    base, experts = adapters
    result = merged(tmp_path, base, experts)
    words = ["--base", str(base), *(word for name, path in experts.items() for word in ("-e", f"{name}={path}"))]
    ran = CliRunner().invoke(app, ["export", str(result), "--to", "adapter", *words])
    assert ran.exit_code == 0, ran.output
    assert "linear layers of rank 2 to 5" in ran.stdout
    assert "relative error" in ran.stdout
    ran = CliRunner().invoke(app, ["export", str(result), "--to", "adapter", "--rank", "1", *words, "-o", str(tmp_path / "x"), "--json"])
    assert 0 < json.loads(ran.stdout)["error"] < 1
    ran = CliRunner().invoke(app, ["export", str(result), "--to", "mergekit", *words])
    assert ran.exit_code == 0, ran.output
    assert "mergekit-yaml merged.mergekit.yaml FOLDER --lora-merge-dtype float32" in ran.stdout
    ran = CliRunner().invoke(app, ["export", str(result), "--to", "mergekit", "--rank", "1"])
    assert "--rank is only for adapters" in str(ran.exception)


@pytest.mark.slow
@pytest.mark.mergekit
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "adapters", "base in pool"])
def test_mergekit_gives_the_same(family, kind, tmp_path):
    if not MERGEKIT.exists():
        pytest.skip("mergekit is not there: scripts/mergekit_venv.sh")
    dtype = "bfloat16" if kind == "bfloat16" else "float32"
    base = save_model(make_model(family, dtype=dtype), tmp_path / "base")
    experts = {name: fine_tuned(base, tmp_path / name, seed=seed, scale=0.05) for seed, name in enumerate("abc", 1)}
    if kind == "adapters":
        experts |= {"b": lora(base, tmp_path / "lora", seed=2, r=3, target_modules=MAPS[family])}
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    options = {"temperature": 0.05, "outside_blocks": "newest", "base_in_pool": "always" if kind == "base in pool" else "single"}
    settings = {"method": "recall", "samples": {"path": str(rows), "count": 3}, "options": options}
    result = merged(tmp_path, base, experts, skip=["*.0.*c_proj*" if family == "gpt2" else "*.0.*o_proj*"], **settings)
    made = export_mergekit(result, models=places(base, experts))
    weights = [model["parameters"]["weight"] for model in yaml.safe_load(made.text)["models"]]
    shares = [entry["value"] for entries in weights for entry in entries if "filter" not in entry]
    assert any(isinstance(share, list) and len(set(share)) > 1 for share in shares)
    words = [MERGEKIT, made.path, tmp_path / "theirs", "--quiet", "--lora-merge-cache", tmp_path / "cache", "--lora-merge-dtype", "float32"]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    ours, theirs = load_tensors(result), load_tensors(tmp_path / "theirs")
    if "lm_head.weight" not in ours:
        theirs.pop("lm_head.weight", None)  # mergekit may store a tied head beside the embedding
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        if dtype == "float32":
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-6, atol=1e-7)
        else:  # at most one step of bfloat16, and that rarely
            torch.testing.assert_close(theirs[name], tensor, rtol=2**-7, atol=1e-7)
            assert (theirs[name] != tensor).float().mean() < 0.02
