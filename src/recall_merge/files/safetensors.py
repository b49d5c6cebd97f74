"""The safetensors format, read by byte range and written one tensor at a time.

A file is an 8-byte little-endian length N, N bytes of JSON header, then the tensors' bytes without holes. The header maps each name to
{"dtype", "shape", "data_offsets": [begin, end]}, offsets counted from the end of the header. It is checked completely before use.
Source: the format's specification, https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import io
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from recall_merge.runtime.errors import CheckpointError, Fault, short

if TYPE_CHECKING:
    import torch

MAX_HEADER = 10_000_000  # bytes: some 80,000 tensors. The format's own reader takes ten times as much, which would take 3 GB here
MAX_NAME, MAX_DIMENSIONS = 1000, 64  # characters of a tensor's name; dimensions of a shape, as in torch
PEEK = 1 << 16  # bytes of a tensor on the hub that are compared
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
OTHERS = {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
PACKED = {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "U32": 4, "U64": 8, "C64": 8}  # valid, but not for merging
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1} | PACKED
CODES = {torch_name: code for code, torch_name in (FLOATS | OTHERS).items()}


class Counter:
    """A number that threads add to."""

    def __init__(self) -> None:
        self.total = 0
        self._lock = threading.Lock()

    def add(self, amount: int) -> None:
        with self._lock:
            self.total += amount


READ = Counter()
"""Bytes of tensors read by this process."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's dtype, as the format writes it (F32, BF16, ...), and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        return cls(CODES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def nbytes(self) -> int:
        return self.numel * SIZES[self.dtype]

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS

    @cached_property
    def torch_dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, (FLOATS | OTHERS)[self.dtype])

    def __str__(self) -> str:
        return f"{(FLOATS | OTHERS).get(self.dtype, self.dtype)} {self.shape}"


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub whose header alone was fetched."""

    start: bytes = field(repr=False)  # its first bytes, at least to the end of the header
    size: int
    content: str  # a hash
    peek: Callable[[int, int], bytes] = field(repr=False, compare=False)
    """Fetches a number of bytes from a position on: to compare, not to read whole tensors."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its bytes start at `begin`, counted from the start of `file`."""

    spec: TensorSpec
    file: Path
    begin: int
    remote: RemoteFile | None = None

    def read(self, span: range | None = None) -> torch.Tensor:
        """Read the tensor in its own dtype; with `span`, only those of its numbers.

        Raises CheckpointError if the file is not downloaded, or is shorter than its header says.
        """
        import torch

        numbers, size = span or range(self.spec.numel), SIZES[self.spec.dtype]
        raw = torch.empty(len(numbers) * size, dtype=torch.uint8)
        if numbers:
            self.fill(memoryview(cast("Any", raw.numpy())), numbers.start * size)
        flat = raw.view(self.spec.torch_dtype)
        return flat if span else flat.reshape(self.spec.shape)

    def fill(self, buffer: memoryview, start: int = 0) -> None:
        """Fill a buffer with the tensor's bytes from `start` on."""
        READ.add(len(buffer))
        if self.remote is not None:
            what = "the weights in this file are not downloaded, only their header is"
            raise CheckpointError(what, where=self.file, fix="locate the model with its weights")
        try:
            with self.file.open("rb", buffering=0) as file:
                done = 0
                while done < len(buffer):  # subtle: one call reads at most 2 GiB
                    count = os.preadv(file.fileno(), [buffer[done:]], self.begin + start + done)
                    if count == 0:
                        missing = len(buffer) - done
                        fix = "it changed while it was read: restore it, and run again"
                        raise CheckpointError(f"the file ended {missing} bytes early", where=self.file, fix=fix)
                    done += count
        except OSError as error:
            raise _unreadable(self.file, error) from error

    def same_bytes(self, other: StoredTensor, piece: int = 1 << 24) -> bool:
        """Whether two tensors are equal to the bit; for tensors that are still on the hub, whether their starts are."""
        if self is other:
            return True
        if self.spec != other.spec:
            return False
        if self.remote is not None or other.remote is not None:
            return self._start(PEEK) == other._start(PEEK)
        ours, theirs = bytearray(piece), bytearray(piece)
        for start in range(0, self.spec.nbytes, piece):
            length = min(piece, self.spec.nbytes - start)
            for stored, buffer in ((self, ours), (other, theirs)):
                stored.fill(memoryview(buffer)[:length], start)
            if ours[:length] != theirs[:length]:
                return False
        return True

    def identity(self) -> bytes:
        """Bytes that identify the content: the first 256 of the tensor, or the place in a file that is still on the hub."""
        return self._start(256) if self.remote is None else f"{self.remote.content} {self.begin}".encode()

    def _start(self, count: int) -> bytes:
        count = min(count, self.spec.nbytes)
        if self.remote is not None:
            return self.remote.peek(self.begin, count) if count else b""
        buffer = bytearray(count)
        self.fill(memoryview(buffer))
        return bytes(buffer)


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"the file cannot be read: {error.strerror}", where=path, fix="check the path, your permissions and the disk")


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, not copied if it is contiguous; writing to them writes to the tensor."""
    import torch

    flat: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def read_header(path: Path, remote: RemoteFile | None = None) -> dict[str, StoredTensor]:
    """Read and check one file's header; tensors in the order of their bytes. `remote`: the file on the hub, if it is not at `path` yet.

    Raises CheckpointError with every fault of the header.
    """

    def broken(what: str) -> CheckpointError:
        return CheckpointError(what, where=path, fix="the file is damaged or incomplete: copy or download it again")

    try:
        if remote is None and path.exists() and not path.is_file():  # a pipe would never end
            raise broken("this is not a file")
        size = path.stat().st_size if remote is None else remote.size
        with path.open("rb") if remote is None else io.BytesIO(remote.start) as file:
            start = file.read(8)
            if len(start) < 8:
                raise broken(f"a safetensors file has at least 8 bytes, this one has {size}")
            length = int.from_bytes(start, "little")
            if MAX_HEADER < length <= size - 8:
                what = f"the header is longer than {MAX_HEADER:,} bytes: {length:,}"
                raise CheckpointError(what, where=path, fix="save the model in shards, by `max_shard_size` of save_pretrained")
            if length > size - 8:
                raise broken(f"the header claims {length} bytes, the file has {size - 8} after its length")
            text = file.read(length)
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise broken(f"the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise broken("the header is not a JSON object")
    header.pop("__metadata__", None)
    faults = [f"tensor {short(name)}: {fault}" for name, entry in header.items() for fault in _entry_faults(name, entry)]
    if faults:
        raise CheckpointError(Fault(what, str(path), "the file is damaged: copy or download it again") for what in faults[:10])
    stored = {name: (TensorSpec(entry["dtype"], tuple(entry["shape"])), *entry["data_offsets"]) for name, entry in header.items()}
    ordered = dict(sorted(stored.items(), key=lambda item: item[1][1:]))
    end = 0
    for name, (_, begin, stop) in ordered.items():
        if begin != end:
            raise broken(f"tensor '{name}' begins at byte {begin}, where {end} is expected: offsets overlap or leave holes")
        end = stop
    if 8 + length + end != size:
        raise broken(f"the header describes {8 + length + end} bytes, the file has {size}")
    return {name: StoredTensor(spec, path, 8 + length + begin, remote) for name, (spec, begin, _) in ordered.items()}


def encode_header(specs: Mapping[str, TensorSpec]) -> bytes:
    """The first bytes of a file that holds these tensors in this order, padded so that the data starts at a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [end, end + spec.nbytes]}
        end += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _entry_faults(name: str, entry: Any) -> Iterable[str]:
    if len(name) > MAX_NAME:
        return [f"its name has {len(name):,} characters"]
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        return ["its entry lacks dtype, shape or data_offsets"]
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        return [f"unknown dtype {short(dtype)}"]
    if not isinstance(shape, list) or not all(_whole(n) for n in shape):
        return [f"shape {short(shape)} is not a list of whole numbers"]
    if len(shape) > MAX_DIMENSIONS:
        return [f"its shape has {len(shape):,} dimensions"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_whole(n) for n in offsets) or offsets[0] > offsets[1]:
        return [f"data_offsets {short(offsets)} are not a begin and an end"]
    wanted = math.prod(shape) * SIZES[dtype]
    if offsets[1] - offsets[0] != wanted:
        return [f"{dtype} {tuple(shape)} needs {wanted} bytes, its offsets span {offsets[1] - offsets[0]}"]
    return []


def _whole(number: Any) -> bool:
    """Whether it is a count that fits into 64 bits, so that no sum or product of a few of them grows without bound."""
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**63


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name occurs twice")
    return entries
