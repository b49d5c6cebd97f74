"""The result's folder: whole or not at all, in its place in one step, and nothing of the user's is ever taken for ours."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file

from recall_merge.files.checkpoint import INDEX, SINGLE, open_checkpoint
from recall_merge.files.output import OutputFolder, Shard, WeightWriter, free_bytes, plan_shards
from recall_merge.files.ownership import MARKER, Owned, claim, leftover, names_in, owned
from recall_merge.files.safetensors import TensorSpec
from recall_merge.runtime.errors import OutputError, RunError
from tiny import load_model, load_tensors


def folder_of(target, *, overwrite=False):
    return OutputFolder(target, overwrite=overwrite)


def write_model(folder, text="new"):
    """Something that counts as a model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "weights").write_text(text)


def write_ours(folder, text="new", *, whole=True):
    """A model as recall-merge leaves it."""
    write_model(folder, text)
    return claim(folder, "model", whole=whole, files=names_in(folder))


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class TestInterrupted:
    def test_leaves_nothing(self, tmp_path):
        with pytest.raises(RuntimeError, match="power"), folder_of(tmp_path / "deep" / "merged") as folder:
            write_model(folder.path)
            assert (folder.path / MARKER).exists()
            raise RuntimeError("power")
        assert list((tmp_path / "deep").iterdir()) == []

    def test_by_the_user_leaves_nothing(self, tmp_path):
        with pytest.raises(KeyboardInterrupt), folder_of(tmp_path / "merged"):
            raise KeyboardInterrupt
        assert list(tmp_path.iterdir()) == []

    def test_leaves_what_was_there(self, tmp_path):
        write_ours(tmp_path / "merged", "old")
        with pytest.raises(RuntimeError), folder_of(tmp_path / "merged", overwrite=True) as folder:
            write_model(folder.path)
            raise RuntimeError
        assert (tmp_path / "merged" / "weights").read_text() == "old" and names(tmp_path) == ["merged"]

    def test_without_commit_leaves_nothing(self, tmp_path):
        with folder_of(tmp_path / "merged") as folder:
            write_model(folder.path)
        assert list(tmp_path.iterdir()) == []


class TestCommitted:
    def test_appears_whole_with_a_marker_that_lists_it(self, tmp_path):
        with folder_of(tmp_path / "a" / "b" / "merged") as folder:
            write_model(folder.path)
            assert not folder.target.exists()
            folder.commit()
        assert owned(folder.target) == Owned(folder.target, "model", whole=True, files=frozenset({"config.json", "weights"}))
        assert names(tmp_path / "a" / "b") == ["merged"] and names(folder.target) == [MARKER, "config.json", "weights"]

    @pytest.mark.parametrize("step", ["mkdir", "open"])
    def test_another_process_that_finishes_while_it_begins_is_no_fault(self, tmp_path, monkeypatch, step):
        """The other one renames its finished folder between two steps of this one."""
        target, finished = tmp_path / "merged", []
        partial = target.with_name("merged.partial")
        real_open, real_mkdir = os.open, os.mkdir

        def finish():
            if not finished:
                finished.append(True)
                partial.rename(tmp_path / "elsewhere")

        def mkdir(path, *args, **options):
            try:
                real_mkdir(path, *args, **options)
            except FileExistsError:
                finish() if step == "mkdir" and Path(path) == partial else None
                raise

        def opened(path, *args, **options):
            finish() if step == "open" and Path(path) == partial else None
            return real_open(path, *args, **options)

        partial.mkdir()
        monkeypatch.setattr(os, "mkdir", mkdir)
        monkeypatch.setattr(os, "open", opened)
        with folder_of(target) as folder:
            write_model(folder.path)
            folder.commit()
        assert finished and contents(target)["weights"] == b"new"

    def test_another_process_that_still_deletes_the_old_folder_is_waited_for(self, tmp_path, monkeypatch):
        """Its new folder is in its place already, and is locked until the old one is gone."""
        target = tmp_path / "merged"
        write_ours(target, "old")
        said, real = [], Owned.remove

        def remove(self):
            if not said and self.folder.name == "merged.replaced.partial":
                said.append("nothing")
                with pytest.raises(OutputError, match="another process is writing this result"), folder_of(target, overwrite=True):
                    pass
                said.append("refused")
            real(self)

        monkeypatch.setattr(Owned, "remove", remove)
        with folder_of(target, overwrite=True) as folder:
            write_model(folder.path)
            assert folder.commit() == ()
        assert said == ["nothing", "refused"] and contents(target)["weights"] == b"new"
        assert [path.name for path in tmp_path.iterdir()] == ["merged"]

    @pytest.mark.parametrize("step", ["is_dir", "iterdir"])
    def test_a_check_while_another_process_finishes_finds_nothing(self, tmp_path, monkeypatch, step):
        """The other one renames its finished folder while it is looked at."""
        target = tmp_path / "merged"
        partial = target.with_name("merged.partial")
        write_ours(partial, whole=False)
        real = getattr(Path, step)

        def look(self):
            if self == partial and partial.exists():
                partial.rename(tmp_path / "elsewhere")
            return real(self)

        monkeypatch.setattr(Path, step, look)
        folder_of(target).check({})
        assert (tmp_path / "elsewhere").exists()

    def test_a_place_where_no_folder_can_be_made_is_refused(self):
        with pytest.raises(OutputError, match="cannot be written: No such file"), folder_of(Path("/proc/self/merged")):
            pass

    def test_a_file_in_the_place_of_the_unfinished_folder_is_refused(self, tmp_path):
        (tmp_path / "merged.partial").write_text("mine")
        with pytest.raises(OutputError, match="cannot be written: File exists"), folder_of(tmp_path / "merged"):
            pass
        assert (tmp_path / "merged.partial").read_text() == "mine"

    def test_takes_the_place_of_an_empty_folder(self, tmp_path):
        (tmp_path / "merged").mkdir()
        with folder_of(tmp_path / "merged") as folder:
            folder.check({})
            write_model(folder.path)
            folder.commit()
        assert names(tmp_path) == ["merged"] and names(folder.target) == [MARKER, "config.json", "weights"]

    def test_replaces_a_model_in_one_step(self, tmp_path, monkeypatch):
        (tmp_path / "merged").mkdir()
        (tmp_path / "merged" / "only-in-the-old").touch()
        write_ours(tmp_path / "merged", "old")
        seen = []
        rename = Path.rename

        def watched(path, target):
            seen.append([(place / "weights").read_text() for place in (path, Path(target)) if (place / "weights").exists()])
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", watched)
        with folder_of(tmp_path / "merged", overwrite=True) as folder:
            folder.check({})
            write_model(folder.path)
            folder.commit()
        assert names(tmp_path) == ["merged"] and names(folder.target) == [MARKER, "config.json", "weights"]
        assert (folder.target / "weights").read_text() == "new"
        assert seen == [["old"], ["new"]]  # at every instant one of the two is whole

    def test_puts_the_old_one_back_if_it_cannot(self, tmp_path, monkeypatch):
        write_ours(tmp_path / "merged", "old")
        before = contents(tmp_path)
        rename = Path.rename

        def fails(path, target):
            if path.name == "merged.partial":
                raise OSError("no")
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", fails)
        with pytest.raises(OutputError, match="the result cannot be written: no"), folder_of(tmp_path / "merged", overwrite=True) as folder:
            write_model(folder.path)
            folder.commit()
        assert contents(tmp_path) == before

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_does_not_replace_what_appeared_meanwhile(self, tmp_path, overwrite):
        with pytest.raises(OutputError) as error, folder_of(tmp_path / "merged", overwrite=overwrite) as folder:
            write_model(folder.path)
            (tmp_path / "merged").mkdir()
            (tmp_path / "merged" / "thesis.txt").write_text("mine")
            folder.commit()
        assert ("is no model that recall-merge made" if overwrite else "the output folder is not empty") in str(error.value)
        assert contents(tmp_path) == {"merged/thesis.txt": b"mine"}

    def test_does_not_replace_what_appears_at_the_last_instant(self, tmp_path, monkeypatch):
        write_ours(tmp_path / "merged", "old")
        rename = Path.rename

        def late(path, target):
            if path.name == "merged.partial":
                Path(target).mkdir()
                (Path(target) / "thesis.txt").write_text("mine")
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", late)
        with pytest.raises(OutputError, match="something else came to stand"), folder_of(tmp_path / "merged", overwrite=True) as folder:
            write_model(folder.path)
            folder.commit()
        assert contents(tmp_path / "merged") == {"thesis.txt": b"mine"}
        assert (tmp_path / "merged.replaced.partial" / "weights").read_text() == "old"

    def test_does_not_replace_what_the_user_put_into_a_result_meanwhile(self, tmp_path):
        write_ours(tmp_path / "merged", "old")
        with pytest.raises(OutputError, match=r"also holds 'notes.txt'"), folder_of(tmp_path / "merged", overwrite=True) as folder:
            write_model(folder.path)
            (tmp_path / "merged" / "notes.txt").write_text("mine")
            folder.commit()
        assert (tmp_path / "merged" / "notes.txt").read_text() == "mine" and names(tmp_path) == ["merged"]

    def test_says_so_where_the_unfinished_folder_is_gone(self, tmp_path):
        with pytest.raises(OutputError, match="moved or removed meanwhile"), folder_of(tmp_path / "merged") as folder:
            folder.path.rename(tmp_path / "elsewhere")
            write_model(folder.path, "of another process")
            folder.commit()
        assert names(tmp_path) == ["elsewhere", "merged.partial"]

    def test_says_so_where_the_old_one_cannot_be_deleted(self, tmp_path, monkeypatch):
        write_ours(tmp_path / "merged", "old")
        unlink = Path.unlink

        def refuse(path, **options):
            if path.parent.name == "merged.replaced.partial":
                raise PermissionError(1, "Operation not permitted", str(path))
            unlink(path, **options)

        with monkeypatch.context() as patched, folder_of(tmp_path / "merged", overwrite=True) as folder:
            write_model(folder.path)
            patched.setattr(Path, "unlink", refuse)
            [note] = folder.commit()
        assert note.startswith(f"the old folder could not be deleted, and still lies in {tmp_path}/merged.replaced.partial: ")
        assert (tmp_path / "merged" / "weights").read_text() == "new"
        with folder_of(tmp_path / "merged", overwrite=True):
            pass
        assert names(tmp_path) == ["merged"]


class TestLeftovers:
    def test_of_ours_are_cleaned(self, tmp_path):
        (tmp_path / "merged.partial" / "below").mkdir(parents=True)
        claim(tmp_path / "merged.partial", "model")
        for file in ("model.safetensors", "below/file", f"{MARKER}.01234567.partial"):
            (tmp_path / "merged.partial" / file).touch()
        with folder_of(tmp_path / "merged") as folder:
            folder.check({})
            assert names(folder.path) == [MARKER]
            folder.commit()

    def test_of_others_are_refused_and_kept(self, tmp_path):
        (tmp_path / "merged.partial").mkdir()
        (tmp_path / "merged.partial" / "thesis.txt").touch()
        with pytest.raises(OutputError) as error:
            folder_of(tmp_path / "merged").check({})
        assert str(error.value) == (
            f"a folder that is not ours lies where the result is to be built\n  where: {tmp_path}/merged.partial\n  fix: move it away"
        )
        assert (tmp_path / "merged.partial" / "thesis.txt").exists()

    @pytest.mark.parametrize("suffix", [".partial", ".replaced.partial"])
    @pytest.mark.parametrize(
        "whose", ["a result", "a model", "an older version's", "a marker that is a link", "a link", "other words", "damaged"]
    )
    def test_that_do_not_say_that_they_are_ours_are_refused_and_kept(self, tmp_path, whose, suffix):
        left = tmp_path / f"merged{suffix}"
        if whose == "a link":
            claim_unfinished(tmp_path / "elsewhere")
            left.symlink_to(tmp_path / "elsewhere")
        else:
            write_model(left, "mine")
        (tmp_path / "marker").mkdir()
        claim(tmp_path / "marker", "model")
        text = (tmp_path / "marker" / MARKER).read_text()
        match whose:
            case "a result":
                write_ours(left, "mine")
            case "a model":
                (left / "record.json").write_text("{}")
            case "an older version's":
                (left / ".recall-unfinished").touch()
            case "a marker that is a link":
                (left / MARKER).symlink_to(tmp_path / "marker" / MARKER)
            case "other words":
                (left / MARKER).write_text(
                    json.dumps({"made_by": "merge-recall", "format": 1, "kind": "model", "whole": False, "files": None})
                )
            case "damaged":
                (left / MARKER).write_text(text.replace("model", "modem"))
        before = contents(tmp_path)
        for action in (lambda: folder_of(tmp_path / "merged").check({}), folder_of(tmp_path / "merged").__enter__):
            with pytest.raises(OutputError, match="a folder that is not ours lies where the result is to be built"):
                action()
        assert contents(tmp_path) == before

    def test_that_hold_what_the_user_put_there_are_refused_and_kept(self, tmp_path):
        write_ours(tmp_path / "merged.partial", whole=False)
        (tmp_path / "merged.partial" / "notes.txt").write_text("mine")
        with pytest.raises(OutputError, match="not ours"):
            folder_of(tmp_path / "merged").check({})

    def test_whose_links_lead_out_are_removed_without_following_them(self, tmp_path):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("mine")
        claim_unfinished(tmp_path / "merged.partial")
        (tmp_path / "merged.partial" / "link").symlink_to(tmp_path / "mine")
        with folder_of(tmp_path / "merged"):
            assert names(tmp_path / "merged.partial") == [MARKER]
        assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"

    def test_that_are_a_file_are_refused(self, tmp_path):
        (tmp_path / "merged.partial").write_text("mine")
        with pytest.raises(OutputError, match="not ours lies where the result is to be built"):
            folder_of(tmp_path / "merged").check({})

    def test_of_a_replacement_that_was_stopped_are_finished(self, tmp_path):
        write_ours(tmp_path / "merged.replaced.partial", "old", whole=False)  # stopped between the two renames
        with folder_of(tmp_path / "merged", overwrite=True):
            assert (tmp_path / "merged" / "weights").read_text() == "old"
        assert names(tmp_path) == ["merged"]
        write_ours(tmp_path / "merged.replaced.partial", "older", whole=False)  # stopped after them
        with folder_of(tmp_path / "merged", overwrite=True):
            pass
        assert names(tmp_path) == ["merged"] and (tmp_path / "merged" / "weights").read_text() == "old"

    def test_of_a_replacement_stay_where_another_thing_stands_in_its_place(self, tmp_path):
        write_ours(tmp_path / "merged.replaced.partial", "old", whole=False)
        (tmp_path / "merged").mkdir()
        (tmp_path / "merged" / "thesis.txt").write_text("mine")
        before = contents(tmp_path)
        with pytest.raises(OutputError), folder_of(tmp_path / "merged", overwrite=True):
            pass
        assert contents(tmp_path) == before

    def test_with_the_marker_last(self, tmp_path, monkeypatch):
        """A stop while a folder is deleted leaves a folder that still counts as ours."""
        ours = write_ours(tmp_path / "merged", whole=False)
        unlink, left = Path.unlink, [1]

        def stop(path, **options):
            if not left:
                raise KeyboardInterrupt
            left.pop()
            unlink(path, **options)

        monkeypatch.setattr(Path, "unlink", stop)
        with pytest.raises(KeyboardInterrupt):
            ours.remove()
        monkeypatch.undo()
        assert len(names(tmp_path / "merged")) == 2 and leftover(tmp_path / "merged") is not None


def claim_unfinished(folder):
    folder.mkdir()
    claim(folder, "model")


class TestCheck:
    """What is refused before any work, with nothing changed."""

    def refused(self, target, what, fix="choose another folder for `out`", protected=None, overwrite=False):
        with pytest.raises(OutputError) as error:
            folder_of(target, overwrite=overwrite).check(protected or {})
        [fault] = error.value.faults
        assert what in fault.what and fix in fault.fix
        return fault

    def test_a_folder_that_is_not_empty(self, tmp_path):
        write_model(tmp_path / "merged")
        fault = self.refused(tmp_path / "merged", "the output folder is not empty", "choose another, or give --overwrite to replace it")
        assert fault.where == str(tmp_path / "merged")

    def test_a_folder_of_other_things_even_with_overwrite(self, tmp_path):
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "thesis.txt").touch()
        self.refused(tmp_path / "home", "the output folder is no model that recall-merge made, and is not replaced", overwrite=True)

    @pytest.mark.parametrize("names", [["config.json", "main.py"], ["config.json", "model.safetensors"], ["record.json"], ["report.json"]])
    def test_a_folder_whose_files_are_called_like_those_of_a_model(self, tmp_path, names):
        (tmp_path / "home").mkdir()
        for name in names:
            (tmp_path / "home" / name).write_text("{}")
        self.refused(tmp_path / "home", "the output folder is no model that recall-merge made", overwrite=True)

    def test_a_folder_of_ours_of_another_kind(self, tmp_path):
        write_model(tmp_path / "merged")
        claim(tmp_path / "merged", "report", whole=True, files=names_in(tmp_path / "merged"))
        self.refused(tmp_path / "merged", "the output folder is no model that recall-merge made", overwrite=True)

    def test_a_result_with_files_of_the_user(self, tmp_path):
        write_ours(tmp_path / "merged")
        for name in "abcd":
            (tmp_path / "merged" / name).touch()
        fault = self.refused(
            tmp_path / "merged", "the output folder also holds 'a', 'b', 'c' and 1 more, and is not replaced", overwrite=True
        )
        assert fault.fix.startswith("move that away")

    def test_what_comes_later_into_a_result_belongs_to_it(self, tmp_path):
        write_ours(tmp_path / "merged")
        for name in ("README.md", "stats.json", "stats.safetensors"):
            (tmp_path / "merged" / name).touch()
        folder_of(tmp_path / "merged", overwrite=True).check({})

    def test_a_link_that_leads_to_itself(self, tmp_path):
        (tmp_path / "merged").symlink_to("merged")
        with pytest.raises(RunError, match="links lead in a circle"):
            folder_of(tmp_path / "merged")

    @pytest.mark.parametrize("name", ["merged.partial", "merged.replaced.partial"])
    def test_a_model_that_lies_where_the_result_is_built(self, tmp_path, name):
        claim_unfinished(tmp_path / name)
        what = "the output would lie in, or over, the folder of base"
        self.refused(tmp_path / "merged", what, protected={"the folder of base": tmp_path / name})

    def test_a_file_that_the_run_reads(self, tmp_path):
        write_ours(tmp_path / "merged")
        what = "the output would lie in, or over, the rows"
        self.refused(tmp_path / "merged", what, protected={"the rows": tmp_path / "merged" / "rows.jsonl"}, overwrite=True)

    def test_a_place_where_a_volume_is_mounted(self, tmp_path, monkeypatch):
        (tmp_path / "volume").mkdir()
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "volume")
        fix = f"give a folder in it, such as {tmp_path}/volume/merged"
        self.refused(tmp_path / "volume", "the output folder is where a disk or volume is mounted", fix)
        folder_of(tmp_path / "volume" / "merged").check({})

    def test_a_file(self, tmp_path):
        (tmp_path / "merged").touch()
        self.refused(tmp_path / "merged", "a file has the name of the output folder", overwrite=True)

    @pytest.mark.parametrize("target", ["base", "base/merged", ".", "link", "link/merged", "elsewhere/../base"])
    def test_a_folder_that_the_run_reads(self, tmp_path, target):
        write_model(tmp_path / "models" / "base")
        (tmp_path / "models" / "link").symlink_to(tmp_path / "models" / "base")
        (tmp_path / "models" / "elsewhere").mkdir()
        protected = {"the folder of base": tmp_path / "models" / "base"}
        self.refused(
            tmp_path / "models" / target, "the output would lie in, or over, the folder of base", protected=protected, overwrite=True
        )

    def test_a_folder_beside_those_is_fine(self, tmp_path):
        write_model(tmp_path / "base")
        for name in ("base2", "bas", "merged/base"):
            folder_of(tmp_path / name).check({"the folder of base": tmp_path / "base"})
        assert names(tmp_path) == ["base"]

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_place_without_permission(self, tmp_path):
        (tmp_path / "locked").mkdir(mode=0o500)
        fault = self.refused(tmp_path / "locked" / "a" / "merged", "there is no permission to write here")
        assert fault.where == str(tmp_path / "locked")

    def test_asks_the_nearest_place_that_exists(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
        assert self.refused(tmp_path / "a" / "b" / "merged", "there is no permission to write here").where == str(tmp_path)
        assert free_bytes(tmp_path / "a" / "b" / "merged") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.5)


class TestShards:
    SPECS = {
        "a": TensorSpec("F32", (2,)),
        "b": TensorSpec("BF16", (2, 2)),
        "c": TensorSpec("F32", (10,)),
        "d": TensorSpec("F32", ()),
        "e": TensorSpec("F32", (0,)),
    }

    @pytest.mark.parametrize(
        ("size", "groups"),
        [
            (10**9, ["abcde"]),
            (60, ["abcde"]),
            (59, ["abc", "de"]),
            (16, ["ab", "c", "de"]),
            (8, ["a", "b", "c", "de"]),
            (1, [*"abcd", "e"]),
        ],
    )
    def test_fill_up_in_order(self, size, groups):
        assert ["".join(shard.specs) for shard in plan_shards(self.SPECS, size)] == groups

    def test_are_named_as_hugging_face_names_them(self):
        assert [shard.file for shard in plan_shards(self.SPECS, 60)] == [SINGLE]
        assert [shard.file for shard in plan_shards(self.SPECS, 59)] == [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        ]
        assert [shard.nbytes for shard in plan_shards(self.SPECS, 59)] == [56, 4]

    @pytest.mark.parametrize("size", [10**9, 59, 1])
    def test_hold_what_was_written(self, tmp_path, size):
        tensors = {
            name: torch.randn(spec.shape, generator=torch.Generator().manual_seed(1)).to(spec.torch_dtype)
            for name, spec in self.SPECS.items()
        }
        shards = plan_shards(self.SPECS, size)
        with WeightWriter(tmp_path, shards) as writer:
            for name, tensor in tensors.items():
                writer.add(name, tensor)
        read = {name: tensor for shard in shards for name, tensor in load_file(tmp_path / shard.file).items()}
        assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)
        assert writer.hashes == {s.file: blake3((tmp_path / s.file).read_bytes()).hexdigest() for s in shards}
        if len(shards) == 1:
            assert names(tmp_path) == [SINGLE]
        else:
            index = json.loads((tmp_path / INDEX).read_text())
            assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
            assert index["weight_map"] == {name: shard.file for shard in shards for name in shard.specs}

    def test_take_the_planned_tensors_only(self, tmp_path):
        tensor = torch.zeros(2)
        for name, wrong in (("b", tensor), ("a", tensor.half()), ("a", torch.zeros(3))):
            with (
                WeightWriter(tmp_path, [Shard(SINGLE, {"a": TensorSpec("F32", (2,))})]) as writer,
                pytest.raises(AssertionError, match="the plan"),
            ):
                writer.add(name, wrong)

    def test_take_a_tensor_that_is_a_view(self, tmp_path):
        tensor = torch.arange(6.0).view(2, 3).T
        with WeightWriter(tmp_path, [Shard(SINGLE, {"a": TensorSpec("F32", (3, 2))})]) as writer:
            writer.add("a", tensor)
        assert torch.equal(load_file(tmp_path / SINGLE)["a"], tensor)


@pytest.mark.parametrize("size", [10**9, 40_000])
def test_a_model_written_is_a_model_for_transformers(llama, tmp_path, size):
    base = open_checkpoint(llama)
    shards = plan_shards(base.specs, size)
    with folder_of(tmp_path / "merged") as folder:
        for file in llama.glob("*.json"):
            shutil.copy(file, folder.path)
        with WeightWriter(folder.path, shards) as writer:
            for name in base.tensors:
                writer.add(name, base.read(name))
        folder.commit()
    assert len(shards) == (1 if size == 10**9 else 3)
    assert open_checkpoint(tmp_path / "merged").fingerprint == base.fingerprint
    state, wanted = load_model(tmp_path / "merged").state_dict(), load_tensors(llama)
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
