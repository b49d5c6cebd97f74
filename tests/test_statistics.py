"""Statistics: the moments are those of the inputs, input statistics fits its expert and nothing else, and `aligned` merges by them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from recall_merge import MergeRun, RecallError, make_plan, merge
from recall_merge.files.statistics import open_statistics
from recall_merge.maths.methods.informed import aligned, condition, regmean
from recall_merge.maths.moments import compress
from recall_merge.merging.statistics import make_statistics
from recall_merge.models.input_moments import input_moments
from recall_merge.models.tokens import EncodedRow
from tiny import edit_json, load_model, load_tensors, lora, merged_by_peft, write_rows

ROWS = [{"prompt": f"is the {word} {verb}?", "completion": " yes"} for word in ("fox", "dog", "film") for verb in ("quick", "lazy", "good")]
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "mixtral": ["q_proj"]}


@pytest.fixture
def world(bases, tmp_path, request):
    """A base of the family that the test asks for, two adapters on it, and rows."""
    family = getattr(request, "param", "llama")
    base = shutil.copytree(bases(family), tmp_path / "base")
    for seed, name in enumerate("ab"):
        lora(base, tmp_path / name, seed=seed, r=4, lora_alpha=8, target_modules=TARGETS[family])
        write_rows(tmp_path / f"{name}.jsonl", ROWS[seed::2])
    return tmp_path


def a_run(world, experts="ab", **settings):
    entries = [{"name": entry, "path": str(world / entry)} if isinstance(entry, str) else entry for entry in experts]
    return MergeRun.model_validate(
        {"base": str(world / "base"), "experts": entries, "method": "aligned", "out": {"path": world / "out"}} | settings
    )


def statistics(world, rank=8):
    return [make_statistics(a_run(world, name, samples={"path": str(world / f"{name}.jsonl")}), rank=rank) for name in "ab"]


# --- mathematics ----------------------------------------------------------------------------------------------------------------------


def moment(seed, size=12, rows=40):
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) @ torch.randn(
        size, size, generator=torch.Generator().manual_seed(seed + 9)
    )
    return x.mT @ x / rows


def test_aligned_is_regmean_on_scaled_moments_solved_another_way():
    full = [moment(seed) for seed in range(3)]
    generator = torch.Generator().manual_seed(7)
    base, deltas = torch.randn(5, 12, generator=generator), [torch.randn(5, 12, generator=generator) for _ in full]
    weights = [0.2, 0.3, 0.5]
    found = aligned(base, deltas, weights, moments=[compress(one, 12) for one in full], offdiagonal=0.9, ridge=1e-9)
    scaled = [compress(one / one.diagonal().mean(), 12) for one in full]
    wanted = regmean(base, deltas, weights, moments=scaled, offdiagonal=0.9, ridge=1e-9)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_alike_inputs_give_the_mean_and_one_expert_gives_itself():
    same, generator = compress(moment(3), 4), torch.Generator().manual_seed(8)
    base, deltas = torch.randn(5, 12, generator=generator), [torch.randn(5, 12, generator=generator) for _ in range(2)]
    found = aligned(base, deltas, [0.5, 0.5], moments=[same, same], ridge=1e-9)
    torch.testing.assert_close(found, base + (deltas[0] + deltas[1]) / 2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(aligned(base, deltas[:1], [1.0], moments=[same], ridge=1e-9), base + deltas[0], rtol=1e-5, atol=1e-5)


def test_a_few_large_inputs_do_not_hide_what_the_others_tell():
    """Massive activations: one input is a thousand times as large as the rest, which then are a millionth of its square."""
    read = [torch.diag(torch.tensor([1e6, *numbers])) for numbers in ([1.0, 0.01], [0.01, 1.0])]
    deltas = [torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([[0.0, -1.0, -1.0]])]
    found = aligned(torch.zeros(1, 3), deltas, [0.5, 0.5], moments=[compress(one, 3) for one in read])
    # sum of the moments 0.505e-6 * 3, of the signed ones 0.495e-6 * 3, times 1e6 / 1e6; the ridge 1e-6 takes its part
    expected = 0.495 * 3 / (0.505 * 3 + 1)
    torch.testing.assert_close(found, torch.tensor([[0.0, expected, -expected]]), rtol=1e-3, atol=1e-6)


def test_condition_bounds_the_true_one():
    parts, weights = [compress(moment(seed), 3) for seed in range(2)], [0.5, 0.5]
    total = sum(0.5 * part.shrunk(0.9).dense() for part in parts) + 1e-6 * torch.eye(12)
    assert torch.linalg.cond(total) <= condition(parts, weights) * (1 + 1e-9)


# --- from a model ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "mixtral"])
def test_moments_are_those_of_the_inputs(bases, family):
    """Every map's own inputs, caught one by one and without padding, give the moment of its group."""
    model = load_model(bases(family))
    tokens = [[3, 4, 5, 6, 7], [8, 9], [10, 11, 12]]
    found = input_moments(model, [EncodedRow(ids, [-100, *ids[1:]]) for ids in tokens])
    caught = {}

    def catch(name):
        return lambda module, args: caught.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_pre_hook(catch(name)) for group in found for name in group.modules]
    for ids in tokens:
        with torch.inference_mode():
            model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    assert sum(len(group.modules) for group in found) == len(caught)
    for group in found:
        for name in group.modules:
            rows = torch.cat(caught[name]).double()
            torch.testing.assert_close(group.moment, rows.mT @ rows / len(rows), rtol=1e-4, atol=1e-6)
            assert modules[name].weight.shape[group.axis] == rows.shape[1]
    if family == "llama":  # q, k and v read one state, gate and up another
        assert sorted(len(group.modules) for group in found) == sorted([3, 1, 2, 1] * 2 + [1])


@pytest.mark.parametrize("world", ["llama", "gpt2", "mixtral"], indirect=True)
def test_merge_by_statistics_equals_least_squares_over_the_inputs(world):
    made = statistics(world, rank=1000)  # all directions: nothing is lost
    result = merge(a_run(world, options={"ridge": 1e-6}))
    assert set(result.record["statistics"]["experts"]) == {"a", "b"}
    assert all(1 <= number < 1e9 for number in result.record["statistics"]["condition"].values())
    base, found = load_tensors(world / "base"), load_tensors(world / "out")
    dense = [load_tensors(merged_by_peft(world / "base", world / name, world / f"{name}-full")) for name in "ab"]
    told = 0
    for name, start in base.items():
        deltas = [full[name] - start for full in dense]
        known = [stats.moment(name) for stats in made]
        wanted = start + sum(deltas) / 2
        if all(known) and any(delta.any() for delta in deltas):
            told += 1
            axis = known[0][1]
            turn = (lambda tensor: tensor.mT) if axis == 0 else (lambda tensor: tensor)
            moments = [one.dense().double() for one, _ in known]
            shrunk = [(0.9 * g + 0.1 * g.diagonal().diag()) / g.diagonal().mean() for g in moments]
            answered = sum(turn(delta).double() @ g for delta, g in zip(deltas, shrunk, strict=True)) / 2
            change = answered @ torch.linalg.inv(sum(shrunk) / 2 + 1e-6 * torch.eye(len(shrunk[0]), dtype=torch.float64))
            wanted = start + turn(change).float()
        torch.testing.assert_close(found[name], wanted, rtol=1e-3, atol=2e-4, msg=name)
    assert told >= 2


def test_statistics_are_small_and_hold_no_text(world):
    stats = statistics(world, rank=2)[0]
    text = (world / "a" / "stats.json").read_text()
    assert not any(word in text for row in ROWS for word in row["prompt"].split() if len(word) > 3)
    assert stats.nbytes < load_tensors(world / "base")["model.embed_tokens.weight"].nbytes * 2
    assert json.loads(text)["samples"] == 5


# --- what can be wrong ----------------------------------------------------------------------------------------------------------------


def test_missing_statistics_are_noted(world):
    make_statistics(a_run(world, "a", samples={"path": str(world / "a.jsonl")}))
    plan = make_plan(a_run(world))
    assert plan.notes == ["expert 'b' has no input statistics: all its inputs count alike"]
    merge(a_run(world))


def test_stale_and_damaged_statistics_are_refused(world):
    statistics(world)
    edit_json(world / "a" / "stats.json", expert="0" * 64)
    (world / "b" / "stats.json").write_text("{}")
    with pytest.raises(RecallError) as caught:
        make_plan(a_run(world))
    assert [fault.what for fault in caught.value.faults] == [
        "the input statistics of expert 'a' were made for another state of it",
        "the input statistics are in a format that this version does not know",
    ]
    assert all("recall stats" in fault.fix for fault in caught.value.faults)


def test_statistics_belong_to_every_bit_of_a_full_expert(world):
    merged_by_peft(world / "base", world / "a", world / "full")
    run = a_run(world, ["full"], samples={"path": str(world / "a.jsonl")})
    make_statistics(run)
    make_plan(run)
    with (world / "full" / "model.safetensors").open("r+b") as file:
        file.seek(-3000, 2)
        byte = file.read(1)[0]
        file.seek(-3000, 2)
        file.write(bytes([byte ^ 16]))
    with pytest.raises(RecallError, match="the input statistics of expert 'full' were made for another state of it"):
        make_plan(run)


def test_statistics_may_lie_elsewhere(world):
    run = a_run(world, "a", samples={"path": str(world / "a.jsonl")})
    make_statistics(run, folder=world / "statistics" / "a")
    assert open_statistics(world / "a") is None
    entries = [{"name": "a", "path": str(world / "a"), "stats": str(world / "statistics" / "a")}]
    assert make_plan(a_run(world, entries)).statistics[0] is not None
    merged = merge(a_run(world, entries, out={"path": world / "merged"})).path
    assert str(world) not in (merged / "record.json").read_text()
    entries[0]["stats"] = str(world / "nowhere")
    with pytest.raises(RecallError, match="this folder has no input statistics"):
        make_plan(a_run(world, entries))


def test_an_expert_whose_states_are_not_finite_leaves_no_statistics(world):
    tensors = load_tensors(world / "a")
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, world / "a" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecallError, match="the logits of expert 'a' are NaN or infinite"):
        statistics(world)
