"""Files that carry a hash of themselves: any single bit of them is noticed, wherever it lies."""

import json
import shutil

import pytest

from recall_merge import MergeRun, RecallError, merge
from recall_merge.files.record import RECORD
from recall_merge.files.statistics import open_statistics
from recall_merge.merging.statistics import make_statistics
from recall_merge.merging.verify import verify
from recall_merge.runtime.sealed import KEY, read_sealed, sealed
from tiny import TEMPLATE, fine_tuned, write_rows

ROWS = [{"prompt": "is it good?", "completion": " yes"}, {"prompt": "the quick fox", "completion": " jumps"}]


def flipped(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.fixture(scope="module")
def world(llama, tmp_path_factory):
    """A base, an expert with input statistics, and their merge, with a folder of chat templates."""
    world = tmp_path_factory.mktemp("world")
    base = shutil.copytree(llama, world / "base")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    (base / "chat_template.jinja").write_text(TEMPLATE)
    (base / "._notes.py").write_text("\0\5\26\7")  # as macOS leaves beside a file, on disks of other systems
    run = {"base": str(base), "experts": [{"name": "a", "path": str(fine_tuned(llama, world / "a", seed=1))}], "method": "aligned"}
    samples = {"path": str(write_rows(world / "rows.jsonl", ROWS)), "count": 2}
    make_statistics(MergeRun.model_validate(run | {"samples": samples}), rank=2)
    merge(MergeRun.model_validate(run | {"out": {"path": world / "out"}}))
    return world


def test_the_text_holds_its_hash_first_so_that_its_line_can_be_taken_out(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(sealed({"format": 3, "a": "", "b": "é"}))
    assert path.read_text().splitlines()[1].startswith(f' "{KEY}": "') and list(json.loads(path.read_text())) == [KEY, "format", "a", "b"]
    assert read_sealed(path) == {"format": 3, "a": "", "b": "é"}
    path.write_text("".join(line for line in path.read_text().splitlines() if KEY not in line))
    assert read_sealed(path) == read_sealed(path, since=4) == {"format": 3, "a": "", "b": "é"}
    with pytest.raises(RecallError, match="does not fit its own hash"):
        read_sealed(path, since=3)


@pytest.mark.parametrize("indent", [None, 1, 2])
def test_any_single_bit_of_a_file(tmp_path, indent):
    """Also bits that change nothing in what is read: 1e-07 and 1E-07, or a number's last digit."""
    path = tmp_path / "a.json"
    text = sealed({"format": 3, "a": [1e-7, 0.1, True, None], "b": {"c": "d\u001f"}}, indent=indent)
    path.write_text(text)
    read_sealed(path, since=3)
    for bit in range(8 * len(text.encode())):
        flipped(path, bit)
        with pytest.raises(RecallError):
            read_sealed(path, since=3)
        flipped(path, bit)


@pytest.mark.parametrize("name", [RECORD, "additional_chat_templates/tool.jinja", "tokenizer_config.json"])
def test_verify_finds_any_single_bit(world, name):
    file = world / "out" / name
    size = 8 * file.stat().st_size
    verify(world / "out")
    for bit in range(0, size, max(1, size // 75)):
        flipped(file, bit)
        with pytest.raises(RecallError):
            verify(world / "out")
        flipped(file, bit)
    verify(world / "out")


def test_verify_finds_a_template_that_is_new_and_one_that_is_gone(world, tmp_path):
    out = shutil.copytree(world / "out", tmp_path / "out")
    (out / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    with pytest.raises(RecallError, match=r"'additional_chat_templates/rag\.jinja' was not part of the result"):
        verify(out)
    shutil.rmtree(out / "additional_chat_templates")
    with pytest.raises(RecallError, match=r"'additional_chat_templates/tool\.jinja' is missing"):
        verify(out)


def test_hidden_files_are_no_part_of_a_model(world, tmp_path):
    """No loader reads them, and macOS leaves one beside each file."""
    out = shutil.copytree(world / "out", tmp_path / "out")
    assert [file.name for file in out.glob("**/.*")] == [".recall-merge"]
    (out / "._modeling.py").write_text("")
    (out / "additional_chat_templates" / "._tool.jinja").write_text("")
    verify(out)


@pytest.mark.parametrize("name", ["stats.json", "stats.safetensors"])
def test_statistics_notice_any_single_bit(world, name):
    file = world / "a" / name
    size = 8 * file.stat().st_size
    for bit in range(0, size, max(1, size // 75)):
        flipped(file, bit)
        with pytest.raises(RecallError):
            open_statistics(world / "a")
        flipped(file, bit)
    assert open_statistics(world / "a") is not None


def test_what_earlier_versions_wrote_is_read(world, tmp_path):
    out, expert = shutil.copytree(world / "out", tmp_path / "out"), shutil.copytree(world / "a", tmp_path / "a")
    record = json.loads((out / RECORD).read_text())
    files = {name: digest for name, digest in record["files"].items() if "/" not in name}
    (out / RECORD).write_text(json.dumps({key: value for key, value in record.items() if key != KEY} | {"format": 2, "files": files}))
    assert verify(out)["format"] == 2
    facts = json.loads((expert / "stats.json").read_text())
    dropped = (KEY, "stats.safetensors")
    (expert / "stats.json").write_text(json.dumps({key: value for key, value in facts.items() if key not in dropped} | {"format": 3}))
    assert open_statistics(expert) is not None
