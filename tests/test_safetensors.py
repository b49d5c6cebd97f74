"""The format: what the safetensors library writes we read, what we write it reads, and a file that lies is caught by its header."""

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file

from recall_merge.files.safetensors import (
    FLOATS,
    MAX_HEADER,
    OTHERS,
    SIZES,
    RemoteFile,
    StoredTensor,
    TensorSpec,
    bytes_of,
    encode_header,
    read_header,
)
from recall_merge.runtime.errors import CheckpointError

DTYPES = {code: getattr(torch, name) for code, name in (FLOATS | OTHERS).items()}


def tensor(code, shape, seed=0):
    """Any bytes at all, as a tensor."""
    raw = torch.randint(0, 2 if code == "BOOL" else 256, (TensorSpec(code, shape).nbytes,), generator=torch.Generator().manual_seed(seed))
    return raw.to(torch.uint8).view(DTYPES[code]).reshape(shape)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and bytes(bytes_of(a.flatten())) == bytes(bytes_of(b.flatten()))


SPECS = st.builds(TensorSpec, st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3).map(tuple))
FILES = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__"), SPECS, max_size=6
)


@settings(deadline=None, max_examples=60)
@given(FILES)
def test_what_the_library_writes_we_read(tmp_path_factory, specs):
    tensors = {name: tensor(spec.dtype, spec.shape, seed) for seed, (name, spec) in enumerate(specs.items())}
    path = tmp_path_factory.mktemp("st") / "a.safetensors"
    path.write_bytes(save(tensors, metadata={"format": "pt"}))
    stored = read_header(path)
    assert {name: found.spec for name, found in stored.items()} == specs
    assert all(same(stored[name].read(), tensors[name]) for name in tensors)
    assert [found.begin for found in stored.values()] == sorted(found.begin for found in stored.values())


@settings(deadline=None, max_examples=60)
@given(FILES)
def test_what_we_write_the_library_reads(specs):
    tensors = {name: tensor(spec.dtype, spec.shape, seed) for seed, (name, spec) in enumerate(specs.items())}
    header = encode_header(specs)
    assert len(header) % 8 == 0
    data = header + b"".join(bytes(bytes_of(found)) for found in tensors.values() if found.numel())
    loaded = load(data)
    assert loaded.keys() == tensors.keys()
    assert all(same(loaded[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("code", sorted(DTYPES))
def test_every_dtype_and_odd_shapes(tmp_path, code):
    tensors = {"0-d": tensor(code, ()), "empty": tensor(code, (0, 3)), "one": tensor(code, (1,)), "plain": tensor(code, (3, 5))}
    save_file(tensors, tmp_path / "a.safetensors")
    stored = read_header(tmp_path / "a.safetensors")
    for name, wanted in tensors.items():
        assert same(stored[name].read(), wanted)
        assert stored[name].spec.torch_dtype == wanted.dtype and stored[name].spec.nbytes == wanted.nbytes
        assert stored[name].spec.is_float == wanted.is_floating_point()


def test_a_tensor_read_is_memory_of_its_own(tmp_path):
    save_file({"a": torch.zeros(4)}, tmp_path / "a.safetensors")
    stored = read_header(tmp_path / "a.safetensors")["a"]
    stored.read().fill_(1.0)
    assert torch.equal(stored.read(), torch.zeros(4))


def test_a_piece_of_a_tensor(tmp_path):
    save_file({"a": torch.arange(10, dtype=torch.uint8), "b": torch.arange(100, 110, dtype=torch.uint8)}, tmp_path / "a.safetensors")
    buffer = bytearray(3)
    read_header(tmp_path / "a.safetensors")["b"].fill(memoryview(buffer), start=4)
    assert list(buffer) == [104, 105, 106]


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    stored = read_header(path)["a"]
    os.truncate(path, path.stat().st_size - 40)
    with pytest.raises(CheckpointError) as error:
        stored.read()
    assert (
        str(error.value)
        == f"the file ended 40 bytes early\n  where: {path}\n  fix: it changed while it was read: restore it, and run again"
    )


@pytest.mark.parametrize("piece", [1, 7, 1 << 24])
def test_same_bytes_compares_to_the_last_one(tmp_path, piece):
    ours = torch.arange(40, dtype=torch.float32)
    other = ours.clone()
    other[-1] += 1
    for name, found in (("a", ours), ("b", ours.clone()), ("c", other), ("d", ours.view(4, 10)), ("e", ours.to(torch.float64))):
        save_file({"t": found.contiguous()}, tmp_path / name)
    a, b, c, d, e = (read_header(tmp_path / name)["t"] for name in "abcde")
    assert a.same_bytes(b, piece) and a.same_bytes(a, piece)
    assert not any(a.same_bytes(different, piece) for different in (c, d, e))


def test_not_a_number_is_the_same_as_itself(tmp_path):
    save_file({"a": torch.full((2,), torch.nan), "b": torch.full((2,), torch.nan), "c": torch.tensor([0.0, -0.0])}, tmp_path / "a")
    stored = read_header(tmp_path / "a")
    assert stored["a"].same_bytes(stored["b"]) and not stored["a"].same_bytes(stored["c"])


class TestAFileStillOnTheHub:
    @pytest.fixture
    def asked(self):
        return []

    @pytest.fixture
    def stored(self, tmp_path, asked):
        save_file({"a": torch.arange(100_000.0), "b": torch.arange(100_000.0), "c": torch.ones(100_000)}, tmp_path / "here")
        data = (tmp_path / "here").read_bytes()

        def peek(begin, count):
            asked.append(count)
            return data[begin : begin + count]

        remote = RemoteFile(data[: 8 + int.from_bytes(data[:8], "little")], len(data), "hash", peek)
        return read_header(tmp_path / "gone.safetensors", remote)

    def test_has_the_same_header(self, stored, tmp_path):
        here = read_header(tmp_path / "here")
        assert {name: (t.spec, t.begin) for name, t in stored.items()} == {name: (t.spec, t.begin) for name, t in here.items()}

    def test_cannot_be_read(self, stored, asked):
        with pytest.raises(CheckpointError, match=r"the weights in this file are not downloaded, only their header is\n  where: .*gone"):
            stored["a"].read()
        assert asked == []

    def test_is_compared_by_its_start(self, stored, asked, tmp_path):
        assert stored["a"].same_bytes(stored["b"]) and not stored["a"].same_bytes(stored["c"])
        assert stored["a"].same_bytes(read_header(tmp_path / "here")["b"])
        assert set(asked) == {65_536}

    def test_is_told_apart_by_its_hash_and_place(self, stored, tmp_path):
        assert len({found.identity() for found in stored.values()}) == 3
        assert stored["a"].identity() == b"hash " + str(stored["a"].begin).encode()
        assert read_header(tmp_path / "here")["a"].identity() == bytes(bytes_of(torch.arange(64.0)))

    def test_that_lies_about_its_header_is_caught(self, tmp_path):
        with pytest.raises(CheckpointError, match="the header claims 1000000 bytes, the file has 492 after its length"):
            read_header(tmp_path / "gone", RemoteFile((10**6).to_bytes(8, "little"), 500, "hash", lambda *_: b""))


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


BROKEN = {  # what is wrong -> header, data -> what is said
    "overlap": (
        {"a": entry(), "b": entry(offsets=(4, 12))},
        12,
        "tensor 'b' begins at byte 4, where 8 is expected: offsets overlap",
    ),
    "hole": (
        {"a": entry(), "b": entry(offsets=(12, 20))},
        20,
        "tensor 'b' begins at byte 12, where 8 is expected: offsets overlap",
    ),
    "hole at the start": ({"a": entry(offsets=(8, 16))}, 16, "tensor 'a' begins at byte 8, where 0 is expected"),
    "the same place twice": ({"a": entry(), "b": entry()}, 8, "tensor 'b' begins at byte 0, where 8 is expected"),
    "past the end": ({"a": entry((200,), (0, 800))}, 8, "the header describes"),
    "bytes to spare": ({"a": entry()}, 9, "bytes, the file has"),
    "offsets too short": ({"a": entry(offsets=(0, 4))}, 4, "tensor 'a': F32 (2,) needs 8 bytes, its offsets span 4"),
    "offsets backwards": ({"a": entry(offsets=(8, 0))}, 8, "tensor 'a': data_offsets [8, 0] are not a begin and an end"),
    "offsets below 0": ({"a": entry(offsets=(-8, 0))}, 8, "tensor 'a': data_offsets [-8, 0] are not a begin and an end"),
    "offsets of three": ({"a": entry(offsets=(0, 4, 8))}, 8, "tensor 'a': data_offsets [0, 4, 8] are not a begin and an end"),
    "offsets as text": ({"a": entry(offsets=("0", "8"))}, 8, "tensor 'a': data_offsets ['0', '8'] are not a begin and an end"),
    "a huge shape": ({"a": entry((2**40, 2**40))}, 8, f"needs {2**82} bytes, its offsets span 8"),
    "a shape below 0": ({"a": entry((-2, -1))}, 8, "tensor 'a': shape [-2, -1] is not a list of whole numbers"),
    "a fraction": ({"a": entry((2.0,))}, 8, "tensor 'a': shape [2.0] is not a list of whole numbers"),
    "a truth value": ({"a": entry((True, 2))}, 8, "tensor 'a': shape [True, 2] is not a list of whole numbers"),
    "an unknown dtype": ({"a": entry(dtype="F12")}, 8, "tensor 'a': unknown dtype 'F12'"),
    "a dtype that is none": ({"a": entry(dtype=["F32"])}, 8, "tensor 'a': unknown dtype ['F32']"),
    "an entry without offsets": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "tensor 'a': its entry lacks dtype, shape or data_offsets"),
    "an entry that is none": ({"a": [1]}, 8, "tensor 'a': its entry lacks dtype, shape or data_offsets"),
    "a list": ([1, 2], 0, "the header is not a JSON object"),
    "no JSON": (b'{"a": ', 0, "the header is not JSON"),
    "no text": (b"\xff\xfe{}", 0, "the header is not JSON"),
    "another encoding": ("{}".encode("utf-16-le"), 0, "the header is not JSON"),
    "deep nesting": (b"[" * 100_000, 0, "the header is not JSON"),
    "a name twice": (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{}}', 8, "the header is not JSON: a name occurs twice"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_header_that_lies(tmp_path, case):
    header, count, what = BROKEN[case]
    path = write(tmp_path / "a.safetensors", header, bytes(count))
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    [fault] = error.value.faults
    assert what in fault.what
    assert fault.where == str(path)
    assert fault.fix.startswith("the file is damaged") and fault.fix.endswith("copy or download it again")
    with pytest.raises((SafetensorError, ValueError, RecursionError)):  # the library refuses it as well
        load_file(path)


def test_all_faults_of_the_entries_are_told_at_once(tmp_path):
    path = write(tmp_path / "a.safetensors", {"a": entry(dtype="F12"), "b": entry((-1,)), "c": entry()}, bytes(8))
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    assert [fault.what for fault in error.value.faults] == [
        "tensor 'a': unknown dtype 'F12'",
        "tensor 'b': shape [-1] is not a list of whole numbers",
    ]


@pytest.mark.parametrize(("content", "what"), [(b"", "at least 8 bytes, this one has 0"), (b"1234567", "at least 8 bytes, this one has 7")])
def test_an_empty_file(tmp_path, content, what):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(CheckpointError, match=what):
        read_header(tmp_path / "a")


def test_a_header_that_claims_more_than_the_file_has(tmp_path):
    for length, what in ((50, "the header claims 50 bytes, the file has 2 after its length"), (2**63, f"the header claims {2**63} bytes")):
        with pytest.raises(CheckpointError, match=what):
            read_header(write(tmp_path / "a", {}, length=length))
    with (tmp_path / "large").open("wb") as file:  # a sparse file of 200 MB that is said to be all header
        file.write((150_000_000).to_bytes(8, "little"))
        file.truncate(200_000_000)
    assert MAX_HEADER < 150_000_000
    with pytest.raises(CheckpointError, match="the header is longer than 10,000,000 bytes: 150,000,000"):
        read_header(tmp_path / "large")


def test_a_file_that_is_not_there_or_no_file(tmp_path):
    with pytest.raises(CheckpointError) as error:
        read_header(tmp_path / "none")
    fix = "check the path, your permissions and the disk"
    assert str(error.value) == f"the file cannot be read: No such file or directory\n  where: {tmp_path}/none\n  fix: {fix}"
    with pytest.raises(CheckpointError, match="this is not a file"):
        read_header(tmp_path)


def test_an_unknown_key_of_an_entry_and_metadata_are_left_alone(tmp_path):
    path = write(tmp_path / "a", {"__metadata__": {"format": "np"}, "a": entry() | {"note": 1}}, bytes(8))
    assert read_header(path) == {"a": StoredTensor(TensorSpec("F32", (2,)), path, path.stat().st_size - 8)}


def test_dtypes_that_are_no_numbers_for_merging_are_known_by_their_size(tmp_path):
    path = write(tmp_path / "a", {"a": entry((8,), (0, 8), "F8_E4M3"), "b": entry((4,), (8, 16), "U16")}, bytes(16))
    assert [found.spec.nbytes for found in read_header(path).values()] == [8, 8]
    assert str(TensorSpec("BF16", (2, 3))) == "bfloat16 (2, 3)" and str(TensorSpec("F8_E4M3", (2,))) == "F8_E4M3 (2,)"
    assert set(FLOATS) | set(OTHERS) <= set(SIZES)
