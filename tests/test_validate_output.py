"""The check of a result by another process: the same answers, and nobody left behind, whatever ends."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from recall_merge import MergeRun, verify
from recall_merge.merging import validate_output
from recall_merge.merging.merge import apply
from recall_merge.merging.plan import make_plan
from recall_merge.merging.validate_output import Reader, is_sound, reader
from recall_merge.runtime.errors import CheckpointError, ResultError
from tiny import FAMILIES, fine_tuned, load_tensors


@pytest.fixture
def other():
    made = Reader()
    yield made
    made.end()


def with_tensors(model: Path, folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    shutil.copytree(model, folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def gone(pid: int, seconds: float = 60) -> bool:
    """Whether a process has ended, or ends soon."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_a_whole_process_leaves_transformers_to_the_other(llama, tmp_path):
    expert = fine_tuned(llama, tmp_path / "expert", seed=1)
    program = f"""
import sys
from recall_merge import MergeRun, merge
run = {{"base": {str(llama)!r}, "experts": [{{"name": "a", "path": {str(expert)!r}}}], "method": "linear", "threads": 2}}
for reload in (True, False):
    merge(MergeRun.model_validate(run | {{"out": {{"path": {str(tmp_path)!r} + f"/{{reload}}", "reload": reload}}}}), once=True)
assert "torch" in sys.modules and "transformers" not in sys.modules
"""
    ended = subprocess.run([sys.executable, "-W", "error", "-c", program], check=False, env=os.environ, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    checked, unchecked = (verify(tmp_path / name)["files"]["model.safetensors"] for name in ("True", "False"))
    assert checked == unchecked


def test_numbers_that_are_not_finite_and_a_folder_that_cannot_be_loaded(llama, tmp_path, other):
    tensors = load_tensors(llama)
    norm = "model.norm.weight"
    broken = with_tensors(llama, tmp_path / "nan", tensors | {norm: torch.full_like(tensors[norm], torch.nan)})
    other.prepare(llama)
    assert other.is_sound(broken, 8, broken) is is_sound(broken, 8) is False

    lacking = with_tensors(llama, tmp_path / "lacking", {name: tensor for name, tensor in tensors.items() if name != norm})
    second = Reader()
    try:
        second.prepare(tmp_path / "nowhere")  # is no matter until the result is read
        with pytest.raises(CheckpointError) as there:
            second.is_sound(lacking, 8, lacking)
    finally:
        second.end()
    with pytest.raises(CheckpointError) as here:
        is_sound(lacking, 8)
    assert str(here.value) == str(there.value) and "missing keys" in str(here.value)


def test_a_part_of_transformers_loads_every_family(bases):
    """And all architectures import in it; of what it leaves out nothing is imported after all."""
    folders = [str(bases(family)) for family in FAMILIES]
    program = f"""
import sys
from recall_merge.models.lean import import_transformers
import_transformers()
from pathlib import Path
import transformers.models.auto.modeling_auto as known
from recall_merge.merging.validate_output import is_sound
assert all(is_sound(Path(folder), 8) for folder in {folders!r})
for name in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
    getattr(sys.modules["transformers"], name)
left_out = ("scipy", "sklearn", "accelerate", "torch._dynamo.symbolic_convert", "torch.distributed.tensor", "torch._inductor")
assert not [name for name in left_out if sys.modules.get(name)]
"""
    ended = subprocess.run([sys.executable, "-c", program], check=False, env=os.environ, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_clustering_without_pandas():
    program = """
import sys
import numpy
from recall_merge.models.lean import import_clustering
import_clustering()
assert "sklearn.cluster" in sys.modules and "pandas" not in sys.modules
from recall_merge.maths.samples import typical_samples
assert typical_samples(numpy.eye(5), 2).sizes
import pandas
"""
    ended = subprocess.run([sys.executable, "-c", program], check=False, env=os.environ, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_what_the_part_cannot_load_is_loaded_by_the_whole(llama, tmp_path, monkeypatch):
    (tmp_path / "transformers.py").write_text("raise RuntimeError('broken')\n")  # the other process finds this; the present one has its own
    monkeypatch.syspath_prepend(str(tmp_path))
    other = Reader()
    try:
        other.prepare(llama)
        with pytest.raises(CheckpointError, match="broken"):
            other.is_sound(llama, 8, llama)
    finally:
        other.end()

    expert = fine_tuned(llama, tmp_path / "expert", seed=1)
    monkeypatch.delitem(sys.modules, "transformers")
    with reader(run()) as other:
        monkeypatch.undo()
        made = run(base=str(llama), experts=[{"name": "a", "path": str(expert)}], out={"path": str(tmp_path / "merged")})
        assert verify(apply(make_plan(made), other).path)


def test_a_process_that_is_killed_is_said_with_what_helps(llama, other):
    os.kill(other._process.pid, signal.SIGKILL)
    other._process.wait()
    other.prepare(llama)
    with pytest.raises(ResultError, match="the process that loads the result ended with status -9") as error:
        other.is_sound(llama, 8, Path("merged"))
    assert error.value.faults[0].where == "merged" and "out.reload: false" in error.value.faults[0].fix


def run(**settings) -> MergeRun:
    return MergeRun.model_validate({"base": "b", "experts": [{"name": "a", "path": "a"}], "method": "linear", "threads": 2} | settings)


@pytest.mark.parametrize(
    "settings", [{"threads": 1}, {"out": {"reload": False}}, {"method": "recall", "samples": {"path": "rows.jsonl"}}], ids=str
)
def test_no_other_process_where_it_saves_nothing(settings, monkeypatch):
    monkeypatch.setattr(validate_output, "Reader", lambda: pytest.fail("a process was started"))
    with reader(run()) as other:  # this process has imported transformers
        assert other is None
    monkeypatch.delitem(sys.modules, "transformers")
    with pytest.raises(pytest.fail.Exception), reader(run()):
        pass
    with reader(run(**settings)) as other:
        assert other is None


def test_a_merge_that_fails_ends_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "transformers")
    pids = []
    with pytest.raises(KeyboardInterrupt), reader(run()) as other:
        assert other is not None
        pids.append(other._process.pid)
        raise KeyboardInterrupt
    assert gone(pids[0], 0.1)


def test_a_merge_that_is_killed_leaves_nobody():
    program = """
import time
from recall_merge.merging.validate_output import Reader
other = Reader()
print(other._process.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as merge:
        assert merge.stdout is not None
        pid = int(merge.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        merge.kill()
    assert gone(pid)
