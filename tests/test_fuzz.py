"""Sound inputs with bytes and values changed by chance: each is taken, or refused as an error of ours, in little memory.

A longer run: HYPOTHESIS_PROFILE=long python -m pytest tests/test_fuzz.py
"""

import json
import os
import shutil
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from corpus import SOUND, Case, use
from recall_merge.runtime.errors import RecallError

settings.register_profile("short", max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.register_profile("long", max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))
MEMORY = 100_000_000  # bytes; the inputs have some hundreds

FILES = [(kind, name) for kind, files in SOUND.items() for name in files]
STRANGE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**53, 2**63, 2**64, 10**30, 1e308, float("inf"), float("nan"), "", ".", "..", "/", "a\0b", "\ud800"]),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.integers(), max_size=4),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)


@st.composite
def bytes_changed(draw, sound: bytes) -> bytes:
    data = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["flip", "cut", "insert", "double", "drop"])):
            case "flip" if place < len(data):
                data[place] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[place:]
            case "insert":
                data[place:place] = draw(st.binary(max_size=12))
            case "double":
                data[place:place] = data[place // 2 : place]
            case "drop":
                del data[place : place + draw(st.integers(1, 20))]
    return bytes(data)


@st.composite
def values_changed(draw, sound: object) -> object:
    """JSON with one value, somewhere, replaced by another, taken out, or under another key."""
    if isinstance(sound, dict) and sound and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(sound)))
        match draw(st.integers(0, 6)):
            case 0:
                return {name: value for name, value in sound.items() if name != key}
            case 1:
                return sound | {draw(st.text(max_size=8)): sound[key]}
        return sound | {key: draw(values_changed(sound[key]))}
    if isinstance(sound, list) and sound and draw(st.integers(0, 4)):
        place = draw(st.integers(0, len(sound) - 1))
        return [*sound[:place], draw(values_changed(sound[place])), *sound[place + 1 :]]
    return draw(STRANGE)


def taken_or_refused(kind: str, name: str, data: bytes) -> None:
    note(repr(data))
    folder = Path(tempfile.mkdtemp(dir=os.environ["XDG_CACHE_HOME"]))
    try:
        Case(kind, "changed", {name: data}).write(folder)
        tracemalloc.start()
        try:
            use(kind, folder)
        except RecallError as error:
            assert str(error)
        finally:
            used = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert used < MEMORY
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize(("kind", "name"), FILES, ids=[f"{kind}, {name}" for kind, name in FILES])
@given(st.data())
def test_bytes(kind, name, data):
    taken_or_refused(kind, name, data.draw(bytes_changed(SOUND[kind][name])))


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, n in FILES if n.endswith((".json", ".jsonl"))])
@given(st.data())
def test_values(kind, name, data):
    changed = data.draw(values_changed(json.loads(SOUND[kind][name].decode())))
    taken_or_refused(kind, name, json.dumps(changed).encode())


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, n in FILES if n.endswith(".safetensors")])
@given(st.data())
def test_headers(kind, name, data):
    sound = SOUND[kind][name]
    end = 8 + int.from_bytes(sound[:8], "little")
    text = json.dumps(data.draw(values_changed(json.loads(sound[8:end])))).encode()
    taken_or_refused(kind, name, len(text).to_bytes(8, "little") + text + sound[end:])
