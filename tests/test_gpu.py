"""The real thing: `make test-gpu` on a machine with an accelerator. Elsewhere all of it is skipped; `on_device.py` proves placement."""

import pytest
import torch

from recall_merge import MergeRun, make_plan, merge
from recall_merge.evaluation.evaluate import evaluate
from recall_merge.files.rows import read_rows
from recall_merge.maths.methods import METHODS
from recall_merge.merging.layerwise import compute_weights
from recall_merge.merging.merge import reuse
from recall_merge.merging.statistics import make_statistics
from recall_merge.models.load import load_model
from recall_merge.training.ewc import fisher
from recall_merge.training.fine_tuning import train
from recall_merge.training.settings import TrainSettings
from tiny import FAMILIES, fine_tuned, load_tensors, lora, make_model, save_model, write_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="torch knows no accelerator here: the processor alone"),
]
ROWS = [
    {"prompt": f"is the {word} {verb}?", "completion": " yes", "choices": [" yes", " no"]}
    for word in ("fox", "dog", "film", "box")
    for verb in ("quick", "lazy", "good", "bad")
]
NEAR = {"rtol": 1e-3, "atol": 1e-3}


@pytest.fixture(scope="module", params=["llama", "gemma2", "qwen3-moe"])
def world(request, tmp_path_factory):
    """A base, a checkpoint and an adapter on it, rows, and statistics of both."""
    folder = tmp_path_factory.mktemp(request.param)
    base = save_model(make_model(request.param), folder / "base")
    fine_tuned(base, folder / "a", seed=1)
    lora(base, folder / "b", seed=2, r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"])
    write_rows(folder / "rows.jsonl", ROWS)
    for name in "ab":
        make_statistics(a_run(folder, "aligned", "none", experts=name, device="cpu", samples=samples(folder)), rank=4)
    return folder


def samples(world):
    return {"path": str(world / "rows.jsonl"), "count": len(ROWS)}  # all of them: rounding must not choose


def a_run(world, method, out, *, experts="ab", **settings):
    entries = [{"name": name, "path": str(world / name)} for name in experts]
    run = {"base": str(world / "base"), "experts": entries, "method": method, "out": {"path": world / out, "overwrite": True}}
    return MergeRun.model_validate(run | settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_of_the_processor(family, tmp_path):
    base = save_model(make_model(family), tmp_path / "base")
    for seed, name in enumerate("ab"):
        fine_tuned(base, tmp_path / name, seed=seed + 1)
    write_rows(tmp_path / "rows.jsonl", ROWS)
    for method in ("recall", "lm_cocktail"):
        runs = [a_run(tmp_path, method, "none", device=device, samples=samples(tmp_path)) for device in ("auto", "cpu")]
        there, here = (compute_weights(make_plan(run, writes=False)) for run in runs)
        torch.testing.assert_close(there.weights, here.weights, **NEAR)


@pytest.mark.parametrize("method", [name for name, entry in METHODS.items() if entry.heavy])
def test_merges_are_those_of_the_processor_and_repeat_their_bytes(method, world, tmp_path):
    there, again, here = (merge(a_run(world, method, tmp_path / out, device=out[:-1])) for out in ("auto1", "auto2", "cpu1"))
    assert there.record["device"] != here.record["device"] == "cpu"
    first, second, processor = (load_tensors(result.path) for result in (there, again, here))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        torch.testing.assert_close(tensor, processor[name], **NEAR)
    assert reuse(a_run(world, method, tmp_path / "auto1")) is not None


def test_hidden_states_repeat_their_bytes(world, tmp_path):
    first, second = (merge(a_run(world, "recall", tmp_path / out, samples=samples(world))) for out in ("one", "two"))
    one, two = load_tensors(first.path), load_tensors(second.path)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_statistics_are_those_of_the_processor(world, tmp_path):
    found = []
    for device in ("auto", "cpu"):
        run = a_run(world, "aligned", "none", experts="b", device=device, samples=samples(world))
        found.append(make_statistics(run, rank=8, folder=tmp_path / device))
    there, here = found
    assert there.facts["device"] != here.facts["device"] == "cpu"
    for name in here.facts["tensors"]:
        (one, _), (other, _) = there.moment(name), here.moment(name)
        scale = other.dense().abs().max()
        torch.testing.assert_close(one.dense() / scale, other.dense() / scale, rtol=0, atol=1e-2)  # they are stored in bfloat16


def test_scores_are_those_of_the_processor(world):
    there, here = (evaluate(str(world / "a"), [str(world / "rows.jsonl")], device=device, dtype="float32") for device in ("auto", "cpu"))
    assert [score.score for score in there] == [score.score for score in here]


def test_training_learns(world, tmp_path):
    settings = TrainSettings(rank=4, alpha=8, epochs=8, batch_size=4, learning_rate=0.01)
    result = train(world / "base", read_rows(world / "rows.jsonl"), tmp_path / "expert", settings)
    assert result.losses[-1] < 0.8 * result.losses[0]
    assert train(world / "base", read_rows(world / "rows.jsonl"), tmp_path / "expert", settings).reused


def test_fisher_information_is_that_of_the_processor(world):
    rows = [([3, 4, 5], [-100, 4, 5])]
    there, here = (fisher(load_model(world / "base", device=device, dtype="float32")[0], rows) for device in ("auto", "cpu"))
    for name, values in here.items():
        torch.testing.assert_close(there[name], values, **NEAR)
