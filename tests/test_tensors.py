"""The pass over the parameters, span by span: the same bytes as whole tensors give, and no more memory than a span takes."""

import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from recall_merge import MergeRun, RecallError, merge
from recall_merge.files.experts import FullExpert
from recall_merge.files.hashing import ModelDigest
from recall_merge.files.output import WeightWriter
from recall_merge.files.safetensors import READ, StoredTensor, TensorSpec
from recall_merge.maths.methods import ALIASES, METHODS
from recall_merge.maths.trimming import prune_by_saliency
from recall_merge.merging import spans
from recall_merge.merging.layerwise import compute_weights
from recall_merge.merging.plan import make_plan
from recall_merge.merging.result import hashes_of
from recall_merge.merging.tensors import TensorCollector, merge_tensors
from tiny import fine_tuned, load_tensors, lora, make_model, save_model

SPAN = 1024  # numbers; the tiny models' largest tensor has three times as many


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = save_model(make_model("llama", dtype="bfloat16"), folder / "base")
    experts = {name: fine_tuned(base, folder / name, seed=seed) for seed, name in enumerate("ab")}
    return base, experts, lora(base, folder / "c", r=2, target_modules=["q_proj"])


def a_plan(models, target, method="linear", adapter=False, **settings):
    base, experts, low_rank = models
    entries = [{"name": name, "path": str(path)} for name, path in (experts | ({"c": low_rank} if adapter else {})).items()]
    most = METHODS[method].experts[1] or len(entries)
    settings = {"base": str(base), "experts": entries[:most], "method": method, "out": {"path": target}} | settings
    return make_plan(MergeRun.model_validate(settings))


def small_spans(monkeypatch, span=SPAN):
    monkeypatch.setattr(spans, "SPAN", span)
    monkeypatch.setattr(spans, "TWICE", span)


def written(plan, folder):
    """What a pass writes, and the hashes of all models."""
    folder.mkdir()
    digest = ModelDigest()
    with WeightWriter(folder, plan.shards) as writer:
        merge_tensors(plan, compute_weights(plan), plan.specs, writer, digest)
    return load_tensors(folder), [digest.hexdigest(), *(expert.hashes() for expert in plan.experts)]


def whole(plan):
    """The same from tensors that are merged whole, in memory."""
    digest, collector = ModelDigest(), TensorCollector(plan)
    with pytest.MonkeyPatch.context() as patch:
        small_spans(patch, 1 << 22)
        merge_tensors(plan, compute_weights(plan), plan.specs, collector, digest)
    return collector.tensors, [digest.hexdigest(), *(expert.hashes() for expert in plan.experts)]


VARIANTS = {
    "one thread": {"threads": 1},
    "an adapter": {"adapter": True},
    "a scale by layer": {"scale_by_layer": {"alpha": 0.5, "beta": 0.7}},
    "skipped": {"skip": ["*embed_tokens.weight"]},
    "pruned": {"prune": {"density": 0.5}},
    "float32": {"out": {"path": "merged", "dtype": "float32"}},
    "shards": {"out": {"path": "merged", "shard_size": "9KB"}},
}


# Those with weights that want data are `linear`.
@pytest.mark.parametrize(
    "method", [name for name, row in METHODS.items() if (row.elementwise or row.find_threshold) and name not in ALIASES]
)
def test_spans_give_the_bytes_of_whole_tensors(models, tmp_path, monkeypatch, method):
    small_spans(monkeypatch)

    def plan():
        return a_plan(models, tmp_path / "merged", method, adapter=METHODS[method].find_threshold is not None, threads=3)

    tensors, hashes = written(plan(), tmp_path / "spans")
    wanted, wanted_hashes = whole(plan())
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    assert hashes == wanted_hashes


@pytest.mark.parametrize("variant", VARIANTS)
def test_spans_give_the_bytes_of_whole_tensors_whatever_the_run(models, tmp_path, monkeypatch, variant):
    small_spans(monkeypatch)
    plan = a_plan(models, tmp_path / "merged", **{"threads": 3} | VARIANTS[variant])
    tensors, hashes = written(plan, tmp_path / "spans")
    wanted, wanted_hashes = whole(plan)
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    assert hashes == wanted_hashes


def test_no_read_is_longer_than_a_span(models, tmp_path, monkeypatch):
    lengths = []
    read = StoredTensor.read

    def counted(self, span=None):
        lengths.append(len(span) if span else self.spec.numel)
        return read(self, span)

    plan = a_plan(models, tmp_path / "merged", threads=2)
    small_spans(monkeypatch)
    monkeypatch.setattr(StoredTensor, "read", counted)
    written(plan, tmp_path / "spans")
    assert max(lengths) == SPAN
    assert sum(lengths) == 3 * sum(spec.numel for spec in plan.specs.values())  # each number of base and experts once


def test_threshold_searches_hold_no_tensor_whole(models, tmp_path, monkeypatch):
    """Large tensors are read by spans, also where a method needs a threshold of each whole delta."""
    lengths = []
    read = StoredTensor.read

    def counted(self, span=None):
        lengths.append(len(span) if span else self.spec.numel)
        return read(self, span)

    plan = a_plan(models, tmp_path / "merged", "ties", threads=2)
    small_spans(monkeypatch)
    monkeypatch.setattr(StoredTensor, "read", counted)
    written(plan, tmp_path / "spans")
    assert max(lengths) == SPAN


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_number_that_is_not_finite_stops_all_threads(models, tmp_path, monkeypatch, method):
    base, experts, _ = models
    bad = fine_tuned(base, tmp_path / "bad", seed=3)
    file = bad / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-2:] = b"\x80\x7f"  # infinity in bfloat16
    file.write_bytes(data)
    plan = a_plan((base, experts | {"bad": bad}, None), tmp_path / "merged", method, threads=3)
    small_spans(monkeypatch, 64)
    threads = threading.active_count()
    with pytest.raises(RecallError, match="expert 'bad' holds NaN or infinity"):
        written(plan, tmp_path / "spans")
    assert threading.active_count() == threads


def test_a_mask_of_infinities_is_kept_where_it_is_named(tmp_path):
    """All models hold the same infinities, as in a mask that was stored; whether they are meant, the user says."""
    base = save_model(make_model("llama"), tmp_path / "base")
    mask = {"model.layers.0.mask": torch.full((4, 4), -torch.inf).triu(1)}
    expert = fine_tuned(base, tmp_path / "expert", seed=1)
    for folder in (base, expert):
        save_file(load_tensors(folder) | mask, folder / "model.safetensors", metadata={"format": "pt"})
    run = {"base": str(base), "experts": [{"name": "a", "path": str(expert)}], "method": "linear", "out": {"path": tmp_path / "out"}}
    with pytest.raises(RecallError) as error:
        merge(MergeRun.model_validate(run))
    [fault] = error.value.faults
    assert fault.what == "the base holds NaN or infinity in 'model.layers.0.mask'"
    assert fault.fix.startswith("name it under `skip:` if infinity is meant, as in a mask: that keeps the base's")
    merge(MergeRun.model_validate(run | {"skip": ["model.layers.0.mask"]}))
    assert torch.equal(load_tensors(tmp_path / "out")["model.layers.0.mask"], mask["model.layers.0.mask"])


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.sums])
def test_deltas_that_are_zero_may_be_left_out_of_sums(method):
    base, delta = torch.randn(2, 50)
    zero = torch.zeros(50)
    merged = METHODS[method].function(base, [zero, delta, zero], [0.25, 0.5, 0.25])
    assert torch.equal(METHODS[method].function(base, [delta], [0.5]), merged)


def test_pruning_counts_deltas_that_are_zero(models, tmp_path):
    """An adapter leaves the tensor alone; what the others change is held against the mean of all three."""
    name = "model.layers.0.mlp.up_proj.weight"
    plan = a_plan(models, tmp_path / "merged", adapter=True, prune={"density": 0.5}, out={"path": tmp_path / "merged", "dtype": "float32"})
    base, *experts = (load_tensors(folder)[name].float() for folder in (models[0], *models[1].values()))
    pruned = prune_by_saliency([*(expert - base for expert in experts), torch.zeros_like(base)], density=0.5)
    assert torch.equal(whole(plan)[0][name], METHODS["linear"].function(base, pruned, [1 / 3] * 3))


class TestDigest:
    def test_takes_pieces_in_any_order_of_threads(self):
        tensor = torch.arange(12.0)
        spec = TensorSpec.of(tensor)
        one, other = ModelDigest(), ModelDigest()
        one.add("w", tensor)
        late = [threading.Thread(target=other.add_piece, args=("w", spec, start, tensor[start : start + 3])) for start in (9, 6, 3, 0)]
        for thread in late:
            thread.start()
        for thread in late:
            thread.join()
        assert other.hexdigest() == one.hexdigest()

    def test_does_not_wait_for_a_piece_that_will_not_come(self):
        digest = ModelDigest()
        digest.stop()
        with pytest.raises(RuntimeError, match="was not read"):
            digest.add_piece("w", TensorSpec("F32", (4,)), 2, torch.zeros(2))


def test_the_base_as_an_expert_is_not_read_again(models, tmp_path):
    """The bytes, and the record's hash of it, are those of a model that is read; also where `skip` keeps some of its tensors out."""
    base, experts, _ = models
    entries = [{"name": "same", "path": str(base), "is_base": True}, {"name": "a", "path": str(experts["a"])}]
    plan = a_plan(models, tmp_path / "merged", experts=entries, skip=["*norm.weight"])
    before = READ.total
    tensors, _ = written(plan, tmp_path / "spans")
    assert READ.total - before == plan.base.nbytes + sum(spec.nbytes for name, spec in plan.specs.items() if plan.merges(name))

    again = replace(plan, experts=(FullExpert("same", plan.base), plan.experts[1]))
    wanted, (digest, *_) = written(again, tmp_path / "again")
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    told = ModelDigest()
    for name in plan.specs:
        told.add(name, plan.base.read(name))
    assert hashes_of(plan, told) == hashes_of(again, told)
    assert hashes_of(plan, told)["base"] == {"tensors": digest}
