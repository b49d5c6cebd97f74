"""A model's state: a single bit anywhere makes another, what is remembered is never out of date, and all that compares models sees it."""

import os
import random
import shutil
import time

import pytest

from recall_merge import MergeRun, merge
from recall_merge.bench.jobs import Base, Scores, Store
from recall_merge.bench.run_job import run_job
from recall_merge.continual.steps import fingerprint
from recall_merge.files import hashing as content
from recall_merge.files.checkpoint import SINGLE, open_checkpoint
from recall_merge.files.hashing import FileStates, hash_model, hash_weights, same_weights
from recall_merge.files.rows import Row
from recall_merge.files.safetensors import StoredTensor
from recall_merge.files.same_architecture import check_checkpoint
from recall_merge.merging import statistics
from recall_merge.merging.merge import reuse
from recall_merge.runtime.errors import CheckpointError, OutputError
from recall_merge.training import fine_tuning
from recall_merge.training.settings import TrainSettings
from tiny import edit_json, fine_tuned, make_model, save_model, write_rows


@pytest.fixture
def folder(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "model")


def flip(file, place, bit=0):
    """Turn one bit over; size and time of change stay."""
    times = file.stat()
    with file.open("r+b") as opened:
        opened.seek(place)
        [byte] = opened.read(1)
        opened.seek(place)
        opened.write(bytes([byte ^ 1 << bit]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_any_bit_of_any_tensor_makes_another_model(folder):
    """The fingerprint reads 256 bytes of each tensor; the content all of them."""
    first, draws = open_checkpoint(folder), random.Random(0)
    known = hash_model(first)
    for stored in first.tensors.values():
        place, bit = stored.begin + draws.randrange(stored.spec.nbytes), draws.randrange(8)
        flip(folder / SINGLE, place, bit)
        assert hash_model(open_checkpoint(folder)) != known
        flip(folder / SINGLE, place, bit)
        assert hash_model(open_checkpoint(folder)) == known


def test_shards_and_places_make_no_difference_and_a_config_does(folder, tmp_path):
    known = hash_model(open_checkpoint(folder))
    shards = save_model(make_model(), tmp_path / "shards", max_shard_size=40_000)
    edit_json(shards / "config.json", _name_or_path="/home/somebody/model")
    assert hash_model(open_checkpoint(shards)) == known
    edit_json(shards / "config.json", rms_norm_eps=0.5)
    assert hash_model(open_checkpoint(shards)) != known and hash_weights(open_checkpoint(shards)) == hash_weights(open_checkpoint(folder))


def test_a_model_is_read_once_for_as_long_as_its_files_are_untouched(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real = time.time()
    now, reads, fill = [real + 60], [], StoredTensor.fill
    monkeypatch.setattr(content.time, "time", lambda: now[0])
    monkeypatch.setattr(StoredTensor, "fill", lambda stored, *args: (reads.append(stored), fill(stored, *args)))
    checkpoint = open_checkpoint(folder)
    known = hash_weights(checkpoint)
    count = len(reads)
    assert count >= len(checkpoint.tensors) and hash_weights(open_checkpoint(folder)) == known and len(reads) == count
    flip(folder / SINGLE, checkpoint.tensors["model.norm.weight"].begin + 70)
    assert hash_weights(open_checkpoint(folder)) != known and len(reads) == 2 * count  # same size, same time of change
    now[0] = real
    flip(folder / SINGLE, checkpoint.tensors["model.norm.weight"].begin + 71)
    hash_weights(open_checkpoint(folder)), hash_weights(open_checkpoint(folder))
    assert len(reads) == 4 * count  # changed a moment ago: a clock's tick may hide what comes next


def test_what_is_remembered_wrongly_is_not_believed(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    later = time.time() + 60
    monkeypatch.setattr(content.time, "time", lambda: later)
    known = hash_weights(open_checkpoint(folder))
    [note] = (tmp_path / "cache" / "recall-merge" / "contents").iterdir()
    for torn in ("", known[:30]):
        note.write_text(torn)
        assert hash_weights(open_checkpoint(folder)) == known
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no folder can be made there
    assert hash_weights(open_checkpoint(folder)) == known


def test_a_model_that_changes_while_it_is_read_is_refused(folder, monkeypatch):
    fill = StoredTensor.fill

    def busy(stored, *args):
        fill(stored, *args)
        flip(folder / SINGLE, stored.begin)

    monkeypatch.setattr(StoredTensor, "fill", busy)
    with pytest.raises(CheckpointError, match="changed while they were read"):
        hash_weights(open_checkpoint(folder))


def test_an_expert_that_differs_only_after_the_start_of_a_tensor_is_not_the_base(folder, llama):
    base = open_checkpoint(llama)
    with pytest.raises(CheckpointError, match="is the base itself"):
        check_checkpoint("e", open_checkpoint(folder), base)
    stored = base.tensors["model.layers.1.mlp.up_proj.weight"]
    flip(folder / SINGLE, stored.begin + stored.spec.nbytes - 1)
    expert = open_checkpoint(folder)
    assert expert.fingerprint == base.fingerprint and not same_weights(expert, base)
    check_checkpoint("e", expert, base)


def test_a_workspace_sees_a_bit_of_its_base(llama, folder):
    before = fingerprint(folder)
    assert before == fingerprint(llama)
    stored = open_checkpoint(folder).tensors["lm_head.weight"]
    flip(folder / SINGLE, stored.begin + stored.spec.nbytes - 1)
    assert fingerprint(folder) != before


def test_a_bench_sees_a_bit_of_its_base(folder, tmp_path):
    store, base = Store(tmp_path / "jobs"), Base(folder, open_checkpoint(folder).fingerprint)
    store.keep_base(base)
    store.keep_base(base)
    stored = open_checkpoint(folder).tensors["lm_head.weight"]
    flip(folder / SINGLE, stored.begin + stored.spec.nbytes - 1)
    assert open_checkpoint(folder).fingerprint == base.fingerprint
    with pytest.raises(OutputError, match="the base has changed since the bench began"):
        store.keep_base(base)


def rewritten(file):
    """Other bytes in the same place, with size and time as before."""
    times, old = file.stat(), file.read_bytes()
    file.write_bytes(bytes([old[0] ^ 1]) + old[1:])
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("name", [SINGLE, "tokenizer.json", "additional_chat_templates/a.jinja"])
def test_a_file_that_is_rewritten_in_place_with_its_time_put_back(folder, name):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "a.jinja").write_text("{{ messages }}")
    states = FileStates.of([folder])
    states.check(), states.check(elsewhere=True)
    rewritten(folder / name)
    for elsewhere in (False, True):
        with pytest.raises(CheckpointError):
            states.check(elsewhere=elsewhere)


def test_statistics_and_training_are_not_made_of_a_model_that_changed_meanwhile(folder, llama, tmp_path, monkeypatch):
    expert, rows = fine_tuned(llama, tmp_path / "a", seed=1), [Row(0, (), "yes it is"), Row(1, (), "no it is not")]
    path = str(write_rows(tmp_path / "rows.jsonl", [{"text": row.completion} for row in rows]))
    run = {"base": str(folder), "experts": [{"name": "a", "path": str(expert)}], "method": "linear", "samples": {"path": path, "count": 2}}
    real = statistics.choose_samples
    monkeypatch.setattr(statistics, "choose_samples", lambda *given, **more: (rewritten(tmp_path / "rows.jsonl"), real(*given, **more))[1])
    with pytest.raises(CheckpointError, match="the file changed while it was read"):
        statistics.make_statistics(MergeRun.model_validate(run))
    assert not (expert / "stats.json").exists()
    make = fine_tuning._make_model
    monkeypatch.setattr(fine_tuning, "_make_model", lambda *given: (make(*given), rewritten(folder / "tokenizer.json"))[0])
    with pytest.raises(CheckpointError, match="the file changed while it was read"):
        fine_tuning.train(folder, rows, tmp_path / "trained", TrainSettings(epochs=1, rank=2, alpha=2))
    assert not (tmp_path / "trained").exists()


def test_a_bench_sees_another_chat_template(folder, tmp_path):
    store, base = Store(tmp_path / "jobs"), Base(folder, open_checkpoint(folder).fingerprint)
    store.write("bases", base.fingerprint, {"sha256": fingerprint(folder).partition(".")[0]})  # as earlier versions did
    store.keep_base(base)
    store.write("bases", base.fingerprint, {"sha256": fingerprint(folder)})
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(OutputError, match="the base has changed since the bench began"):
        run_job(Scores("scores", base, ()), store)


def test_a_merge_of_models_that_read_otherwise_is_made_again(folder, llama, tmp_path):
    expert = fine_tuned(llama, tmp_path / "a", seed=1)
    run = {"base": str(folder), "experts": [{"name": "a", "path": str(expert)}], "method": "linear", "out": {"path": tmp_path / "out"}}
    merge(MergeRun.model_validate(run))
    assert reuse(MergeRun.model_validate(run)) is not None
    (expert / "chat_template.jinja").write_text("{{ messages }}")
    assert reuse(MergeRun.model_validate(run)) is None
