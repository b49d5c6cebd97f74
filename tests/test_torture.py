"""Faults of every kind, a round of each; `make torture` does the same for ten minutes, with stages of workspaces too."""

import json
import os
import shutil
import time

import pytest

import torture
from disturbed import MERGED, MERGES, WALKED, World, merge_here, weights
from recall_merge import MergeRun, RecallError, merge
from recall_merge.cli.report import write as report
from recall_merge.files.output import OutputFolder
from recall_merge.files.ownership import claim, names_in
from recall_merge.merging.verify import verify
from tiny import fine_tuned
from torture import ALL, AT_ONCE, FAULTS


@pytest.fixture(scope="module")
def tortured(tmp_path_factory):
    with torture.started(tmp_path_factory.mktemp("torture") / "world", MERGES) as found:
        yield found


def sound(outcome, words=""):
    assert outcome.survived and not outcome.lost and not outcome.wrong, f"{words}: {outcome.words}"


DEEP = ("killed at any time", "disk full at a change of a file", "a read fails", "an input is replaced meanwhile")
QUICK = [
    (MERGED, fault) for fault, works in FAULTS.items() if MERGED in works and fault not in {"two at once", "the output is a mount point"}
]


@pytest.mark.parametrize(("work", "fault"), [*QUICK, *((WALKED, fault) for fault in DEEP)])
def test_a_merge_survives(tortured, work, fault):
    injected = False
    for seed in range(8):
        print("seed", seed)  # noqa: T201  pytest shows it where the test fails
        outcome = torture.inject(*tortured, work, fault, seed)
        sound(outcome, f"seed {seed}")
        injected |= outcome.injected
        if injected and (seed or work == WALKED):
            break
    assert injected


def test_of_two_at_once_one_is_told_so(tortured, tmp_path):
    world: World = tortured[1]
    with (
        OutputFolder(tmp_path / "out", overwrite=False) as folder,
        pytest.raises(RecallError, match="another process is writing this result"),
    ):
        merge_here(world, folder.target)
    assert list(tmp_path.iterdir()) == []
    merge_here(world, tmp_path / "out")
    assert weights(tmp_path / "out") == world.wanted[MERGED]


@pytest.mark.slow
@pytest.mark.parametrize(("work", "fault"), [(work, fault) for fault in AT_ONCE for work in FAULTS[fault]])
def test_two_commands_at_once(tmp_path, work, fault):
    with torture.started(tmp_path / "world", [work]) as (processes, world):
        for seed in range(3):
            sound(torture.inject(processes, world, work, fault, seed))


@pytest.mark.slow
@pytest.mark.parametrize("work", ALL)
def test_twenty_kills(tmp_path, work):
    with torture.started(tmp_path / "world", [work]) as (processes, world):
        for seed in range(20):
            fault = ("killed before a change of a file", "killed at any time")[seed % 2]
            outcome = torture.inject(processes, world, work, fault, seed)
            print("seed", seed, fault, outcome)  # noqa: T201  pytest shows it where the test fails
            sound(outcome, f"{fault}, seed {seed}")


def test_a_disk_that_is_full_is_said_by_the_command(tortured, tmp_path, monkeypatch):
    world: World = tortured[1]

    def full(folder):
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr("recall_merge.merging.merge.validate_output", lambda plan, folder: full(folder))
    with pytest.raises(RecallError) as error:
        merge_here(world, tmp_path / "out")
    assert "the result cannot be written: No space left on device" in str(error.value) and "make room" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_any_single_bit_of_any_weight_file_is_found(tortured, tmp_path):
    out = shutil.copytree(tortured[1].folder / f"undisturbed {MERGED}", tmp_path / "out")
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    for number, file in enumerate(files):
        data = bytearray(file.read_bytes())
        for place in (0, 9, len(data) // 2 + number, len(data) - 1):
            data[place] ^= 1 << number % 8
            file.write_bytes(data)
            with pytest.raises(RecallError, match=f"'{file.name}' has changed since the merge"):
                verify(out)
            data[place] ^= 1 << number % 8
        file.write_bytes(data)
    verify(out)


def test_links_spaces_and_letters_of_other_scripts(tortured, tmp_path):
    world: World = tortured[1]
    odd = tmp_path / "a b 'c' \"d\" ünï 模型 $HOME;"
    (odd / "real").mkdir(parents=True)
    (odd / "link").symlink_to(odd / "real", target_is_directory=True)
    for name in ("base", *world.experts):
        (odd / name).symlink_to(world.folder / name, target_is_directory=True)
    merge_here(World(odd, world.experts), odd / "link" / "out")
    assert weights(odd / "real" / "out") == world.wanted[MERGED]


def test_a_token_and_places_of_this_machine_are_in_nothing_that_is_written(tortured, tmp_path, monkeypatch):
    secret = "hf_" + "s3cr3t" * 6
    monkeypatch.setenv("HF_TOKEN", secret)
    out = tmp_path / "out"
    merge_here(tortured[1], out)
    models = {name: str(tortured[1].folder / name) for name in tortured[1].experts}
    report(out, out=tmp_path / "report", models={"base": str(tortured[1].folder / "base"), **models})
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"record.json", "README.md"} < {file.name for file in files} and any(file.suffix == ".html" for file in files)
    for file in files:
        data = file.read_bytes()
        assert secret.encode() not in data and str(tmp_path).encode() not in data and str(tortured[1].folder).encode() not in data
        assert os.environ.get("USER", "root-of-nobody").encode() not in data or os.environ.get("USER") in {"root", "user", ""}


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_numbers_that_are_not_finite_are_refused_by_name(tortured, tmp_path, value):
    import torch
    from safetensors.torch import load_file, save_file

    world: World = tortured[1]
    bad = fine_tuned(world.folder / "base", tmp_path / "bad", seed=9)
    file = next(file for file in sorted(bad.glob("*.safetensors")) if "model.layers.1.mlp.up_proj.weight" in load_file(file))
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.tensor(float(value))
    save_file(tensors, file, metadata={"format": "pt"})
    entries = [{"name": "good", "path": str(world.folder / "full1")}, {"name": "bad", "path": str(bad)}]
    run = MergeRun.model_validate(
        {"base": str(world.folder / "base"), "experts": entries, "method": "linear", "out": {"path": str(tmp_path / "out")}}
    )
    with pytest.raises(RecallError, match=r"expert 'bad' holds NaN or infinity in 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        merge(run)
    assert not (tmp_path / "out").exists()


def test_a_stopped_replacement_is_put_right(tortured, tmp_path):
    """A kill between the two renames: the old model waits beside its place, and the next merge begins by putting it back."""
    world: World = tortured[1]
    shutil.copytree(world.folder / "full1", old := tmp_path / "out.replaced.partial")
    claim(old, "model", files=names_in(old))
    merge_here(world, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and weights(tmp_path / "out") == world.wanted[MERGED]


def test_a_clock_that_runs_backwards(tortured, tmp_path, monkeypatch):
    start = time.time()
    monkeypatch.setattr(time, "time", lambda: 2 * start - 10_000 - time.monotonic())
    merge_here(tortured[1], tmp_path / "out")
    assert weights(tmp_path / "out") == tortured[1].wanted[MERGED]
    assert json.loads((tmp_path / "out" / "record.json").read_text())["seconds"]["merge"] >= 0
