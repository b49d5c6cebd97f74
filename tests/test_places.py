"""A workspace writes into folders of its own: what its links lead to outside is neither emptied, nor replaced, nor appended to."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recall_merge.continual.places import KINDS, SCRATCH, tidy
from recall_merge.continual.state import opened, read_state, write_state
from recall_merge.continual.workspace import init
from recall_merge.files.ownership import MARKER, claim, names_in, owned
from recall_merge.runtime.errors import RecallError, WorkspaceError
from workspaces import make_taught, teach, write_tasks


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def taught(llama, data, tmp_path_factory) -> Path:
    """A workspace that has learnt `a`. Copy it."""
    return make_taught(tmp_path_factory.mktemp("taught") / "ws", llama, data, "a")


@pytest.fixture
def ws(taught, tmp_path) -> Path:
    return shutil.copytree(taught, tmp_path / "ws")


@pytest.fixture
def mine(tmp_path) -> Path:
    """A folder of the user's, with what commands look for and leave behind."""
    folder = tmp_path / "mine"
    for name in ("thesis.txt", "notes.partial", "1.json.0a1b2c3d.partial", "old.partial/thesis.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    (folder / "2-b.training.partial").mkdir()
    (folder / "2-b.training.partial" / "key.json").write_text("{}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", [*KINDS, SCRATCH])
def test_a_folder_that_is_a_link_to_one_of_the_users_is_refused_and_left_alone(ws, mine, data, kind):
    if (ws / kind).exists():
        shutil.rmtree(ws / kind)
    (ws / kind).symlink_to(mine)
    before = contents(mine)
    with pytest.raises(RecallError, match=f"`{kind}` is no folder of this workspace, but a link to another"):
        teach(ws, data, "b")
    assert contents(mine) == before and read_state(ws).unfinished is None


def test_every_place_is_told_at_once(ws, mine, data):
    for kind in ("scores", "statistics"):
        shutil.rmtree(ws / kind)
        (ws / kind).symlink_to(mine)
    (ws / "experts" / "2-b").symlink_to(mine)
    with pytest.raises(RecallError) as error:
        teach(ws, data, "b")
    assert len(error.value.faults) == 4  # the expert's place is a link, and holds no model of ours


def test_a_folder_on_a_larger_disk_is_used_as_one_that_lies_inside(ws, mine, data, tmp_path):
    (tmp_path / "disk").mkdir()
    shutil.move(ws / "merges", tmp_path / "disk" / "merges")
    claim_again(ws, tmp_path / "disk" / "merges")
    (ws / "merges").symlink_to(tmp_path / "disk" / "merges")
    (tmp_path / "disk" / "merges" / "thesis.partial").mkdir()
    (tmp_path / "disk" / "merges" / "thesis.partial" / "chapter.txt").write_text("mine")
    shutil.rmtree(ws / "samples")
    (tmp_path / "disk" / "samples").mkdir()
    (ws / "samples").symlink_to(tmp_path / "disk" / "samples")  # an empty folder is as good
    learned = teach(ws, data, "b")
    assert learned.merge.path.resolve() == tmp_path / "disk" / "merges" / "2" and owned(tmp_path / "disk" / "samples") is not None
    assert (tmp_path / "disk" / "merges" / "thesis.partial" / "chapter.txt").read_text() == "mine"


def claim_again(ws: Path, folder: Path) -> None:
    """What the workspace's next stage would have done before the folder was moved: this one is a copy."""
    claim(folder, f"workspace {ws.stat().st_ino}", whole=True, files=())


def test_a_copy_of_a_workspace_does_not_write_into_the_folder_that_both_are_linked_to(ws, data, tmp_path):
    shutil.move(ws / "merges", tmp_path / "merges")
    claim_again(ws, tmp_path / "merges")
    (ws / "merges").symlink_to(tmp_path / "merges")
    shutil.copytree(ws, tmp_path / "copy", symlinks=True)
    before = contents(tmp_path / "merges")
    with pytest.raises(RecallError, match="`merges` is no folder of this workspace, but a link to another"):
        teach(tmp_path / "copy", data, "b")
    assert contents(tmp_path / "merges") == before


def test_a_workspace_that_was_moved_or_copied_whole_goes_on(ws, data, tmp_path):
    shutil.copytree(ws, tmp_path / "copy")
    ws.rename(tmp_path / "moved")
    for folder in (tmp_path / "copy", tmp_path / "moved"):
        assert teach(folder, data, "b").stage.id == 2


@pytest.mark.parametrize("name", ["lock", "journal.jsonl"])
def test_a_file_that_is_a_link_is_not_written_through(ws, data, tmp_path, name):
    (tmp_path / "mine.txt").write_text("mine")
    (ws / name).unlink(missing_ok=True)
    (ws / name).symlink_to(tmp_path / "mine.txt")
    if name == "lock":
        with opened(ws, "a command"):
            assert not (ws / name).is_symlink()
    else:
        with pytest.raises(WorkspaceError, match="is a link, and may lead out"):
            teach(ws, data, "b")
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["lock", "journal.jsonl", "workspace.json.0a1b2c3d.partial"])
def test_leftovers_that_are_links_make_no_workspace(llama, tmp_path, name):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "ws").mkdir()
    (tmp_path / "ws" / name).symlink_to(tmp_path / "mine.txt")
    with pytest.raises(WorkspaceError, match="something else lies where the workspace is to be"):
        init(tmp_path / "ws", str(llama))
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_what_the_user_put_into_a_workspace_stays(ws, data):
    """Names that look like ours, without our marker; beside real leftovers, which go."""
    for name in ("scratch/notes.txt", "experts/mine.partial/notes.txt", "merges/9.partial/record.json", "my.partial"):
        (ws / name).parent.mkdir(parents=True, exist_ok=True)
        (ws / name).write_text("mine")
    (ws / "experts" / "9-z.partial").mkdir()
    claim(ws / "experts" / "9-z.partial", "model")
    for name in (
        "scores/9.json.0a1b2c3d.partial",
        "workspace.json.0a1b2c3d.partial",
        "lock.0a1b2c3d.partial",
        "experts/9-z.partial/weights",
    ):
        (ws / name).write_text("left")
    (ws / "scratch" / "model").mkdir()
    (ws / "scratch" / "model" / "weights").write_text("left")
    claim(ws / "scratch" / "model", "model", whole=True, files=names_in(ws / "scratch" / "model"))
    before = contents(ws)
    tidy(ws)
    gone = {name for name in before if name not in contents(ws)}
    assert {name for name in gone if before[name] == b"mine"} == set() and {name for name in before if before[name] == b"left"} <= gone
    assert not (ws / "experts" / "9-z.partial").exists() and MARKER not in names_in(ws / "scratch")


def test_what_stands_where_a_stage_is_to_write_is_told_before_it_trains(ws, data):
    (ws / "merges" / "2").mkdir()
    (ws / "merges" / "2" / "config.json").write_text("{}")
    with pytest.raises(RecallError, match="the output folder is no model that recall-merge made"):
        teach(ws, data, "b")
    assert not (ws / "experts" / "2-b").exists() and (ws / "merges" / "2" / "config.json").read_text() == "{}"


HOLD = """
import sys, time
from pathlib import Path
from recall_merge.continual.state import opened
with opened(Path(sys.argv[1]), "recall learn ws"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("deleted", [False, True])
def test_a_second_command_is_refused_even_if_the_lock_file_is_deleted(ws, deleted):
    with subprocess.Popen([sys.executable, "-c", HOLD, ws], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as held:
        assert held.stdin is not None and held.stdout is not None and held.stdout.readline() == "held\n"
        if deleted:
            (ws / "lock").unlink()
        who = "another process" if deleted else rf"process {held.pid}, `recall learn ws`, since "
        with pytest.raises(WorkspaceError, match=f"the workspace is in use by {who}"), opened(ws, "another"):
            pass
        held.stdin.close()
    with opened(ws, "another"):
        assert str(os.getpid()) in (ws / "lock").read_text()


def test_a_state_that_something_else_replaced_is_not_overwritten(ws):
    state = read_state(ws)
    other = state.model_copy(update={"head": 0})
    write_state(ws, other, was=state)
    with pytest.raises(WorkspaceError, match="was changed by something else while this command worked"):
        write_state(ws, state.model_copy(update={"head": 1}), was=state)
    assert read_state(ws) == other
