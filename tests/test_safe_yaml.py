"""YAML from anybody: what is read, and that bombs of every kind are refused in an instant and in little memory."""

import os
import tracemalloc

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from recall_merge.runtime.errors import RunError
from recall_merge.runtime.safe_yaml import MAX_BYTES, MAX_DEPTH, NotYaml, parse_yaml
from recall_merge.runtime.sections import read_mapping

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
MERGED = "a0: &a0 {x: 1, y: 2}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 10))
BOMBS = {
    "a billion laughs": (LAUGHS, "it has more than 100,000 parts"),
    "a billion merges": (MERGED, "it has more than 100,000 parts"),
    "inside of itself": ("a: &a [*a]", "contains itself"),
    "a key inside of itself": ("&a {*a : 1}", "contains itself"),
    "deep, in one line": ("[" * 60 + "]" * 60, "nested more than 50 deep"),
    "very deep": ("[" * 100_000, "nested more than 50 deep"),
    "deep by aliases": ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 60)), "nested more than 50 deep"),
    "long": ("a: " + "x" * MAX_BYTES, "longer than 1,000,000 bytes"),
    "a number of many digits": ("a: " + "9" * 100_000, "Exceeds the limit"),
    "code": ("!!python/object/apply:os.system [touch pwned]", "could not determine a constructor"),
    "a day that is none": ("a: 2001-99-99", "month must be in 1..12"),
    "a key twice": ("a: 1\nb: 2\na: 3", "the key 'a' is given twice"),
    "a key twice, once as a number": ("1: 1\n1.0: 3", "is given twice"),
    "a list as a key": ("[1]: 2", "unhashable key"),
    "two documents": ("a: 1\n---\na: 2", "expected a single document"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name):
    text, what = BOMBS[name]
    tracemalloc.start()
    try:
        with pytest.raises(NotYaml) as error:
            parse_yaml(text)
        assert what in str(error.value) and "\n" not in str(error.value)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def test_aliases_that_are_short_are_read():
    assert parse_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}") == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}


def test_the_depth_that_is_allowed():
    assert parse_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH)


def test_many_keys_take_no_time_that_grows_with_their_square():
    assert len(parse_yaml("{" + ", ".join(f"k{i}: 0" for i in range(20_000)) + "}")) == 20_000


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "run.yaml")
    with pytest.raises(RunError, match="it is not a file"):
        read_mapping(tmp_path / "run.yaml", "run", "docs/run.md")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(plain)
def test_what_pyyaml_writes_is_read(data):
    assert parse_yaml(yaml.safe_dump(data)) == data


@given(st.text(alphabet="[]{}:,-&*!|>'\"#%@ \n\tab01<?") | st.binary().map(lambda data: data.decode("utf-8", "replace")))
def test_any_text_is_read_or_refused(text):
    try:
        parse_yaml(text)
    except NotYaml as error:
        assert str(error)
