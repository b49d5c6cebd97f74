"""The rows that the demo ships: readable, balanced, no test row in the training, each from a named source, and made anew the same."""

import importlib.util
import re
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from recall_merge.files.rows import read_rows

ROOT = Path(__file__).parents[1]
DATA = ROOT / "src" / "recall_merge" / "demo" / "data"
FILES = sorted(DATA.rglob("*.jsonl"))
TASKS = sorted({file.parent.name for file in FILES})
SIZES = {"opinion": (200, 80), "desk": (200, 80), "french": (252, 84)}


def maker():
    spec = importlib.util.spec_from_file_location("make_demo_data", ROOT / "scripts" / "make_demo_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(task, split):
    return read_rows(DATA / task / f"{split}.jsonl")


def words(row):
    """The words of the message itself, without the question that all rows of a task share."""
    return set(re.findall(r"\w+", row.plain.rpartition("\n")[2].lower()))


def test_all_that_is_there_is_tested():
    assert sorted(SIZES) == TASKS
    assert len(FILES) == 2 * len(TASKS)
    assert sum(file.stat().st_size for file in DATA.rglob("*") if file.is_file()) < 400_000


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_readable_and_as_many_as_said(task):
    assert (len(rows(task, "train")), len(rows(task, "test"))) == SIZES[task]
    assert f"{SIZES[task][0]} / {SIZES[task][1]}" in (DATA / "SOURCES.md").read_text("utf-8")
    for split in ("train", "test"):
        assert all(row.prompt and row.completion == row.completion.strip() != "" for row in rows(task, split))


@pytest.mark.parametrize("task", TASKS)
def test_no_prompt_comes_twice(task):
    prompts = [row.plain.lower() for split in ("train", "test") for row in rows(task, split)]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("task", ["opinion", "desk"])
def test_labels_are_balanced_and_so_are_those_of_the_first_rows(task):
    for split in ("train", "test"):
        found = rows(task, split)
        choices = found[0].choices
        assert all(row.choices == choices for row in found)
        for some in (found, found[: len(choices) * 5]):
            assert set(Counter(row.completion for row in some).values()) == {len(some) // len(choices)}


@pytest.mark.parametrize("task", ["opinion", "desk"])
def test_test_messages_have_words_of_their_own(task):
    trained = [words(row) for row in rows(task, "train")]
    for row in rows(task, "test"):
        mine = words(row)
        nearest = max(trained, key=lambda other: len(mine & other) / len(mine | other))
        assert len(mine & nearest) <= 0.4 * len(mine | nearest), f"{row.plain}: {sorted(mine & nearest)}"


def test_messages_do_not_tell_their_label():
    for row in rows("opinion", "train") + rows("opinion", "test"):
        assert not words(row) & {"positive", "negative"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_sources_name_every_file(file):
    assert f"`{file.parent.name}/{file.name}`" in (DATA / "SOURCES.md").read_text("utf-8")


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_made_anew_to_the_byte(task):
    module = maker()
    if task == "french" and not installed("Babel", module.BABEL):
        pytest.skip(f"Babel {module.BABEL} is not installed, and only this needs it")
    for split, records in module.TASKS[task]().items():
        assert (DATA / task / f"{split}.jsonl").read_text("utf-8") == module.json_lines(records)


def installed(package, wanted):
    try:
        return version(package) == wanted
    except PackageNotFoundError:
        return False
