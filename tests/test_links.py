"""Links in a model's folder: what lies outside does not come into a result."""

import shutil

import pytest

from recall_merge import MergeRun, RecallError, merge
from recall_merge.files.checkpoint import open_checkpoint
from recall_merge.files.links import check_links
from recall_merge.files.rows import Row
from recall_merge.training.fine_tuning import train
from tiny import fine_tuned, lora

FILES = [
    "notes.py",
    "generation_config.json",
    "tokenizer_config.json",
    "LICENSE",
    "chat_template.jinja",
    "additional_chat_templates/a.jinja",
]


def a_run(base, expert, out):
    run = {"base": str(base), "experts": [{"name": "a", "path": str(expert)}], "method": "linear", "vocabulary": "newest"}
    return MergeRun.model_validate(run | {"out": {"path": out}})


@pytest.fixture
def secret(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "secret").write_text('{"token": "hf_abc"}')
    return tmp_path / "home" / "secret"


@pytest.fixture
def world(llama, tmp_path, secret):
    base = shutil.copytree(llama, tmp_path / "base")
    fine_tuned(llama, tmp_path / "full", seed=1)
    lora(base, tmp_path / "part", r=2, target_modules=["q_proj"])
    return tmp_path


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("whose", ["base", "full", "part"])
def test_a_link_to_a_file_elsewhere_is_refused_by_name(world, secret, whose, name):
    file = world / whose / name
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    file.symlink_to(secret)
    with pytest.raises(RecallError, match=rf"'{file.name}' is a link to a file outside the model's folder") as error:
        merge(a_run(world / "base", world / ("full" if whose == "base" else whose), world / "out"))
    assert str(file) in str(error.value) and "put the file itself there" in str(error.value)
    assert not (world / "out").exists()


def test_a_folder_of_templates_may_not_lie_elsewhere_either(world, secret):
    (world / "full" / "additional_chat_templates").symlink_to(secret.parent)
    with pytest.raises(RecallError, match="'additional_chat_templates' is a link"):
        merge(a_run(world / "base", world / "full", world / "out"))


def test_links_further_down_are_not_followed(world, secret):
    """The folder holds the files that transformers reads, and no others."""
    deeper = world / "full" / "additional_chat_templates" / "deeper"
    deeper.mkdir(parents=True)
    (deeper.parent / "tool.jinja").write_text("{{ messages }}")
    (deeper / "x.jinja").symlink_to(secret)
    (deeper.parent / ".hidden.jinja").symlink_to(secret)
    merge(a_run(world / "base", world / "full", world / "out"))
    assert [file.name for file in (world / "out" / "additional_chat_templates").rglob("*")] == ["tool.jinja"]


def test_training_reads_through_none_either(world, secret, tmp_path):
    (world / "base" / "extra.json").symlink_to(secret)
    with pytest.raises(RecallError, match=r"'extra\.json' is a link"):
        open_checkpoint(world / "base")
    with pytest.raises(RecallError, match=r"'extra\.json' is a link"):
        train(world / "base", [Row(0, (), "yes it is")], tmp_path / "expert")


def test_the_hubs_cache_is_made_of_links(world, llama, secret):
    """Files of a snapshot are links to blobs of the same model; those to another place are refused there too."""
    model = world / "hub" / "models--org--name"
    snapshot, blobs = model / "snapshots" / ("0" * 40), model / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(llama.iterdir())):
        shutil.copyfile(file, blobs / f"{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    merge(a_run(snapshot, world / "full", world / "out"))
    assert not any(file.is_symlink() for file in (world / "out").iterdir())
    (snapshot / "extra.py").symlink_to(secret)
    with pytest.raises(RecallError, match=r"'extra\.py' is a link"):
        check_links(snapshot)


def test_weights_folders_and_links_within_a_folder_are_followed(world):
    disk = world / "disk"
    disk.mkdir()
    (world / "base" / "model.safetensors").rename(disk / "model.safetensors")
    (world / "base" / "model.safetensors").symlink_to(disk / "model.safetensors")
    (world / "base" / "LICENSE").write_text("free")
    (world / "base" / "LICENSE.txt").symlink_to("LICENSE")
    (world / "link").symlink_to(world / "base")
    merge(a_run(world / "link", world / "full", world / "out"))
    assert (world / "out" / "LICENSE.txt").read_text() == "free" and not (world / "out" / "LICENSE.txt").is_symlink()


def test_a_link_to_itself_is_none_out_of_the_folder_and_is_left(world):
    (world / "base" / "loop.py").symlink_to("loop.py")
    merge(a_run(world / "base", world / "full", world / "out"))
    assert not (world / "out" / "loop.py").exists()
