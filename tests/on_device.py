"""What runs on an accelerator stays on it: on a pretended one, which refuses tensors of the processor and gives the processor's bytes.

`tests/test_device.py` runs this file in a process of its own, as the device stays for good once it is there.
"""

import time
import weakref

import pytest
import torch
from torch import Tensor

import architectures
import pretend
import test_contract as contract
from recall_merge import MergeRun, make_plan, merge
from recall_merge.evaluation.evaluate import evaluate
from recall_merge.files.checkpoint import open_checkpoint
from recall_merge.maths.deltas import LowRank
from recall_merge.maths.methods import METHODS
from recall_merge.maths.moments import Moment
from recall_merge.maths.similarity import KERNELS, similarity
from recall_merge.merging import statistics
from recall_merge.merging.cost import estimate_time
from recall_merge.merging.merge import reuse
from recall_merge.merging.run import DEFAULT_RECALL
from recall_merge.merging.samples import choose_samples
from recall_merge.merging.statistics import make_statistics
from recall_merge.models import layerwise
from recall_merge.models.hidden_states import pooled_hidden_states
from recall_merge.models.layerwise import LayerwiseForward
from recall_merge.models.load import load_model
from recall_merge.runtime.device import find_device, hardware
from recall_merge.runtime.errors import CheckpointError, NotLayerwise
from recall_merge.runtime.progress import Silent
from recall_merge.training.ewc import Consolidation, anchored
from test_layerwise_forward import TOKENS, parameters, steps
from tiny import FAMILIES, fine_tuned, load_tensors, lora, make_model, save_model, write_rows

ROWS = [{"prompt": f"is the {word} {verb}?", "completion": " yes"} for word in ("fox", "dog", "film") for verb in ("quick", "lazy", "good")]
HEAVY = [name for name, entry in METHODS.items() if entry.heavy]


@pytest.fixture(scope="session", autouse=True)
def _device():
    pretend.install()


@pytest.fixture(autouse=True)
def _all_the_memory():
    yield
    pretend.limits.clear()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, a checkpoint and an adapter on it, rows, and statistics of both, made on the processor."""
    folder = tmp_path_factory.mktemp("world")
    base = save_model(make_model("llama"), folder / "base")
    fine_tuned(base, folder / "a", seed=1)
    lora(base, folder / "b", seed=2, r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    write_rows(folder / "rows.jsonl", ROWS)
    for name in "ab":
        run = a_run(folder, "aligned", "none", device="cpu", experts=name)
        make_statistics(run.model_copy(update={"samples": a_run(folder, "recall", "none").samples}), rank=4)
    return folder


def a_run(world, method, out, *, experts="ab", **settings):
    entries = [{"name": name, "path": str(world / name)} for name in experts]
    samples = {"path": str(world / "rows.jsonl"), "count": 4} if method in ("recall", "lm_cocktail") else None
    run = {"base": str(world / "base"), "experts": entries, "method": method, "samples": samples, "out": {"path": world / out}}
    return MergeRun.model_validate(run | {"threads": 2} | settings)


def on_both(world, method, tmp_path, **settings):
    """The same merge on the device and on the processor."""
    return [merge(a_run(world, method, tmp_path / device, device=device, **settings)) for device in ("auto", "cpu")]


def assert_same_bytes(results):
    there, here = (load_tensors(result.path) for result in results)
    assert there.keys() == here.keys() and all(torch.equal(there[name], here[name]) for name in there)


def count(name):
    return pretend.calls[name]


# --- the device itself ------------------------------------------------------------------------------------------------------------------


def test_it_is_an_accelerator_to_torch_and_to_us():
    device = torch.device(pretend.NAME, 0)
    assert find_device("auto") == find_device() == device and find_device("cpu").type == "cpu"
    assert hardware(device) == pretend.NAME
    numbers = torch.arange(6.0).view(2, 3)
    there = numbers.to(device)
    assert there.device == device and torch.equal((there @ there.mT).cpu(), numbers @ numbers.mT)


def test_it_refuses_what_an_accelerator_refuses():
    there, here = torch.ones(2, device=pretend.NAME), torch.ones(2)
    for mixed in (
        lambda: there + here,
        lambda: torch.cat([there, here]),
        lambda: there.add_(here),
        lambda: torch.where(there > 0, there, here),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    with pytest.raises(TypeError, match="to numpy"):
        there.numpy()


# --- mathematics ------------------------------------------------------------------------------------------------------------------------


def moved(value):
    return value.to(torch.device(pretend.NAME)) if isinstance(value, Tensor | LowRank) else value


@pytest.mark.parametrize("shape", contract.SHAPES)
@contract.every_case
def test_every_method_stays_on_the_device(entry, options, shape, monkeypatch):
    base, deltas = contract.random_deltas(shape, contract.count(entry))
    weights = contract.uneven(len(deltas))
    expected = contract.run(entry, base, deltas, weights, options)
    made = contract.moment
    monkeypatch.setattr(contract, "moment", lambda *args: made(*args).to(torch.device(pretend.NAME)))
    with torch.inference_mode():
        merged = contract.run(entry, moved(base), [*map(moved, deltas)], weights, options)
    assert merged.device.type == pretend.NAME
    assert torch.equal(merged.cpu(), expected)


@pytest.mark.parametrize("name", [name for name, entry in METHODS.items() if entry.factors])
@pytest.mark.parametrize("known", ["all", "one", "nothing arrived"])
def test_factors_stay_on_the_device(name, known):
    """Also where some of the experts have no statistics, or inputs that are all 0."""
    base, _ = contract.random_deltas((5, 8), 0)
    generator = torch.Generator().manual_seed(0)
    deltas = [LowRank(torch.randn(5, r, generator=generator), torch.randn(r, 8, generator=generator)) for r in (2, 1, 3)]
    moments = [contract.moment(expert, 5, 8) if known != "one" or expert == "law" else None for expert in contract.NAMES]
    if known == "nothing arrived":
        moments[0] = Moment(torch.zeros(8, 2), torch.zeros(8))
    given = {"moments": moments} if METHODS[name].informed else {}
    there = {key: [each and each.to(torch.device(pretend.NAME)) for each in value] for key, value in given.items()}
    expected = METHODS[name].function(base, deltas, [0.5, 0.3, 0.2], **given)
    merged = METHODS[name].function(moved(base), [*map(moved, deltas)], [0.5, 0.3, 0.2], **there)
    assert merged.device.type == pretend.NAME and torch.equal(merged.cpu(), expected)


@pytest.mark.parametrize("bandwidth", ["median", "dimension", 0.5])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_stays_on_the_device(kernel, bandwidth):
    h = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    found = similarity(moved(h), kernel=kernel, bandwidth=bandwidth)
    assert found.device.type == pretend.NAME and torch.equal(found.cpu(), similarity(h, kernel=kernel, bandwidth=bandwidth))


# --- forward passes ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_and_whole(family, pooling, bases):
    base = open_checkpoint(bases(family))
    with LayerwiseForward(base.folder, TOKENS, base.layers, pooling=pooling) as forward:
        expected = torch.stack(steps(forward, base, base.layers.blocks))
    for dtype in ("float32", "bfloat16"):
        options = {"pooling": pooling, "dtype": dtype, "threads": 2, "device": torch.device(pretend.NAME), "batch_tokens": 24}
        with LayerwiseForward(base.folder, TOKENS, base.layers, **options) as forward:
            states = torch.stack(steps(forward, base, base.layers.blocks))
        assert states.device.type == pretend.NAME and states.dtype == torch.float32
        torch.testing.assert_close(
            states.cpu(), expected, rtol=1e-5 if dtype == "float32" else 0.1, atol=1e-5 if dtype == "float32" else 0.1
        )
    model = load_model(base.folder)[0]
    assert model.device.type == pretend.NAME
    whole = pooled_hidden_states(model.float(), TOKENS, base.layers, pooling=pooling)
    assert whole.device.type == "cpu"
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["gpt_neo", "xglm", "falcon_h1"])
def test_buffers_are_on_the_device_too(model_type, tmp_path):
    """Masks, positions and scales that no file holds."""
    base = open_checkpoint(save_model(architectures.build(model_type), tmp_path / "base"))
    found = []
    for device in ("cpu", pretend.NAME):
        with LayerwiseForward(base.folder, TOKENS, base.layers, device=torch.device(device)) as forward:
            found.append(torch.stack(steps(forward, base, base.layers.blocks)).cpu())
    assert torch.equal(*found)


def test_parameters_that_do_not_fit_once_they_are_fused(bases):
    """transformers keeps what goes wrong there as a text. The experts of a block have 4,096 numbers together."""
    base = open_checkpoint(bases("mixtral"))
    with LayerwiseForward(base.folder, TOKENS, base.layers, device=torch.device(pretend.NAME)) as forward:
        forward.step(parameters(base)(0))
        pretend.limits[:] = [3500]
        with pytest.raises(torch.OutOfMemoryError, match="moved to their device"):
            forward.step(parameters(base)(1))


def test_one_block_of_one_model_is_on_the_device(llama, monkeypatch):
    """Whatever the number of threads: six models of one batch each."""
    from contextlib import ExitStack
    from functools import partial

    base, most = open_checkpoint(llama), 0

    def go_on(batch, real=layerwise._Batch.go_on):
        nonlocal most
        held = [any(not p.is_meta for block in forward._blocks for p in block.parameters()) for forward in passes]
        most = max(most, sum(held))
        return real(batch)

    monkeypatch.setattr(layerwise._Batch, "go_on", go_on)
    with ExitStack() as stack:
        options = {"threads": 4, "device": torch.device(pretend.NAME)}
        passes = [stack.enter_context(LayerwiseForward(base.folder, TOKENS[:2], base.layers, **options)) for _ in range(6)]
        for layer in range(base.layers.blocks + 1):
            layerwise.step(passes, [partial(parameters(base), layer)] * 6)
    assert most == 1


# --- merges -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*HEAVY, "recall", "lm_cocktail"])
def test_a_merge_on_the_device(method, world, tmp_path):
    there, here = on_both(world, method, tmp_path)
    assert_same_bytes((there, here))
    assert there.merge_weights.weights.device.type == "cpu"
    assert (there.record["device"], here.record["device"]) == (pretend.NAME, "cpu")
    assert [note for note in there.notes if "pretend:0" in note] and not [note for note in here.notes if "pretend" in note]
    again = merge(a_run(world, method, tmp_path / "again", threads=1))
    assert_same_bytes((again, there))


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "karcher"])
def test_what_the_disk_bounds_stays_on_the_processor(method, world, tmp_path):
    pretend.calls.clear()
    there, _ = on_both(world, method, tmp_path)
    assert there.record["device"] == "cpu" and not pretend.calls


def test_one_tensor_at_a_time_is_on_the_device(world, tmp_path, monkeypatch):
    from recall_merge.merging import spans, tensors

    monkeypatch.setattr(spans, "SPAN", 500)  # else all these small tensors are one thread's
    inside, most, entry = 0, 0, METHODS["tsv"]

    def watched(base, *args, real=entry.function, **options):
        nonlocal inside, most
        inside += base.device.type == pretend.NAME
        most = max(most, inside)
        time.sleep(0.01)  # others could come in
        merged = real(base, *args, **options)
        inside -= base.device.type == pretend.NAME
        return merged

    monkeypatch.setitem(tensors.METHODS, "tsv", entry)
    object.__setattr__(entry, "function", watched)
    try:
        merge(a_run(world, "tsv", tmp_path / "out", threads=4))
    finally:
        object.__setattr__(entry, "function", watched.__kwdefaults__["real"])
    assert most == 1


def test_a_result_is_used_again_on_the_device_that_made_it(world, tmp_path):
    run = a_run(world, "tsv", tmp_path / "out")
    merge(run)
    assert reuse(run) is not None and reuse(run.model_copy(update={"device": "cpu"})) is None
    same = a_run(world, "linear", tmp_path / "linear", device="cpu")
    merge(same)
    assert reuse(same.model_copy(update={"device": "auto"})) is not None  # nothing of it ran on the device


def test_an_architecture_that_is_run_whole(world, tmp_path, monkeypatch):
    def refuse(*_):
        raise NotLayerwise("its forward pass needs numbers that it does not have", fix="none")

    monkeypatch.setattr(layerwise, "step", refuse)
    monkeypatch.setattr(LayerwiseForward, "step", refuse)
    for method in ("recall", "lm_cocktail"):
        assert_same_bytes(on_both(world, method, tmp_path / method))


def test_the_plan_says_what_runs_where(world):
    notes = make_plan(a_run(world, "recall", "none")).notes
    assert notes == ["hidden states on pretend:0, pretend: another device gives the same up to 1e-3, not the same bytes"]
    both = {"method": "aligned", "weights": {"recall": {}}, "samples": {"path": str(world / "rows.jsonl")}}
    plan = make_plan(
        a_run(world, "recall", "none").model_copy(update=dict(MergeRun.model_validate(a_run(world, "aligned", "none").model_dump() | both)))
    )
    assert plan.notes[0].startswith("hidden states and `aligned` on pretend:0")


def test_the_plan_measures_the_device(world):
    pretend.calls.clear()
    assert estimate_time(make_plan(a_run(world, "recall", "none"))).pool > 0 and count("mm") == 2


@pytest.mark.parametrize("precise", [True, False])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_statistics(family, precise, world, tmp_path, monkeypatch):
    """On the device, or where it has no float64 half on the processor: the same numbers."""
    monkeypatch.setattr(statistics, "has_float64", lambda device: precise)
    folder, found = world, []
    if family != "llama":
        folder = tmp_path / family
        lora(save_model(make_model(family), folder / "base"), folder / "b", r=4, target_modules=["q_proj"])
        write_rows(folder / "rows.jsonl", ROWS)
    for device in ("cpu", "auto"):
        run = a_run(folder, "recall", "none", experts="b", device=device, samples={"path": str(folder / "rows.jsonl"), "count": 20})
        pretend.calls.clear()
        found.append(make_statistics(run, rank=4, folder=tmp_path / device))
        assert bool(count("linear") + count("mm") + count("addmm")) == (device == "auto")
        assert bool(count("linalg_qr")) == (device == "auto" and precise)
    here, there = found
    assert there.stored.keys() == here.stored.keys() and there.facts["tensors"] == here.facts["tensors"]
    assert all(torch.equal(there.stored[name].read(), here.stored[name].read()) for name in here.stored)
    assert (there.facts["device"], here.facts["device"]) == (pretend.NAME, "cpu")


def test_statistics_of_too_little_memory(world, tmp_path):
    run = a_run(world, "recall", "none", experts="b", samples={"path": str(world / "rows.jsonl"), "count": 20})
    pretend.limits[:] = [1000]
    notes = make_statistics(run, rank=4, folder=tmp_path).facts["notes"]
    assert "pretend:0 has too little memory to run models in batches of 4,096 tokens: they ran on the processor" in notes


# --- too little memory ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "numbers", "how"),
    [
        ("recall", 5000, "in batches of 4,096 tokens: they ran in batches of 64 tokens"),
        ("recall", 3200, "in batches of 4,096 tokens: they ran text by text"),
        ("recall", 1000, "in batches of 4,096 tokens: they ran on the processor"),
        ("lm_cocktail", 1000, "text by text: they ran on the processor"),
    ],
)
def test_smaller_batches_then_the_processor(method, numbers, how, world, tmp_path, monkeypatch):
    """Tensors of more than `numbers` numbers do not fit. The embedding has 3,072; inside a block every token has 64, of 13 a text."""
    from recall_merge.merging import forward

    monkeypatch.setattr(forward.where_it_fits, "__kwdefaults__", {"batches": (4096, 64, 1)})
    samples = {"samples": {"path": str(world / "rows.jsonl"), "count": 20}}  # all of them: rounding must not choose
    here = merge(a_run(world, method, tmp_path / "here", device="cpu", **samples))
    pretend.limits[:] = [numbers]
    there = merge(a_run(world, method, tmp_path / "there", **samples))
    torch.testing.assert_close(load_tensors(there.path), load_tensors(here.path), rtol=1e-5, atol=1e-6)
    notes = [note for note in there.record["notes"] if "too little memory" in note]
    assert notes == [f"pretend:0 has too little memory to run models {how}"]


def test_what_did_not_fit_is_gone_before_the_next_attempt(world, monkeypatch):
    from recall_merge.merging import forward

    begun, real = [], forward.start_forward

    def start(*args, **options):
        assert not [each for each in begun if each() is not None]
        made = real(*args, **options)
        begun.append(weakref.ref(made))
        return made

    monkeypatch.setattr(forward, "start_forward", start)
    pretend.limits[:] = [1000]
    choose_samples(make_plan(a_run(world, "recall", "none")), DEFAULT_RECALL, Silent())
    assert len(begun) == 4


@pytest.mark.parametrize("method", HEAVY)
def test_a_tensor_that_does_not_fit_is_merged_on_the_processor(method, world, tmp_path):
    here = merge(a_run(world, method, tmp_path / "here", device="cpu"))
    pretend.limits[:] = [1500]  # the matrices of the attention fit
    there = merge(a_run(world, method, tmp_path / "there"))
    assert_same_bytes((there, here))
    note = f"pretend:0 has too little memory for `{method}` of the largest tensors: the processor merged them"
    assert there.record["notes"].count(note) == there.notes.count(note) == 1


# --- scores and Fisher information ------------------------------------------------------------------------------------------------------


def test_scores(world, tmp_path):
    tasks, asked = [str(world / "rows.jsonl")], {"metrics": {"rows": "chrf"}}
    here = evaluate(str(world / "a"), tasks, device="cpu", **asked)
    pretend.calls.clear()
    assert evaluate(str(world / "a"), tasks, **asked) == here and count("embedding")
    long = [str(write_rows(tmp_path / "rows.jsonl", [{"prompt": "is the fox quick? " * 8, "completion": " yes"}]))]
    here_too = evaluate(str(world / "a"), long, device="cpu", **asked)
    pretend.limits[:] = [3100]  # the model fits, with its embedding of 3,072 numbers; a block's 64 for each token of the prompt do not
    (score,) = evaluate(str(world / "a"), long, **asked)
    assert score.items == here_too[0].items and "too little memory for a prompt at a time: the processor scored" in score.notes[0]
    pretend.limits[:] = [100]  # not even a layer: accelerate finds room on the processor
    assert evaluate(str(world / "b"), tasks, base=str(world / "base"), **asked) == evaluate(
        str(world / "b"), tasks, base=str(world / "base"), device="cpu", **asked
    )


def test_a_spread_model_without_room_for_a_prompt_is_refused(world, monkeypatch):
    from recall_merge.evaluation import scores

    def full(model, *_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(scores, "_score_loaded", full)
    model, tokenizer = load_model(world / "a")
    model.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(CheckpointError, match="spread over") as error:
        scores.score_tasks(model, tokenizer, [])
    assert "--device cpu" in str(error.value)


def test_what_holds_earlier_tasks_moves_to_the_parameters(llama):
    """The gradients of elastic weight consolidation, from an anchor that was read from a file."""
    model = load_model(llama, device="cpu")[0]
    ones = {name: torch.full_like(parameter, 0.5) for name, parameter in model.named_parameters()}
    found = []
    for device in ("cpu", pretend.NAME):
        model = load_model(llama, device="cpu")[0].to(device)
        Consolidation(anchored(dict(ones), dict(ones)), 2.0).on_step_begin(None, None, None, model=model)
        found.append({name: parameter.grad.cpu() for name, parameter in model.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in ones)
