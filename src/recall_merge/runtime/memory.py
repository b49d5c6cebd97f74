"""Memory as the system gives it: pages that are there when they are touched, and are given back when they are free."""

from __future__ import annotations

import ctypes
import gc
import math
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
KEPT = 1 << 25
MANY = 50_000  # new objects that are worth a search for cycles among all


@contextmanager
def few_searches() -> Iterator[None]:
    """Let Python search for cycles of garbage after 50,000 new objects instead of 700: a plan of many tensors is made of objects that
    stay, transformers has left a million, and to look through all of them time and again takes a third of the time."""
    before = gc.get_threshold()
    gc.set_threshold(max(before[0], MANY) if before[0] else 0, *before[1:])  # 0: the user wants none
    try:
        yield
    finally:
        gc.set_threshold(*before)


def zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros, of which only what is written to takes memory. (`torch.zeros` writes to all of it.)"""
    import torch

    if not (size := math.prod(shape) * dtype.itemsize):
        return torch.zeros(*shape, dtype=dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # else a number here and there would bring two megabytes each
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(*shape)


def one_heap() -> None:
    """Let threads that begin from now on share one heap, and let it keep what is freed, up to 32 MB.

    glibc would give each thread its own, where what one has freed is of no use to others; and the system would take back each piece, and
    have to make pages of zeros of it again for those who want as much in a moment. `give_back` still lets it. What threads had before
    stays theirs, so the earlier this is called, the better.
    """
    if _glibc() is not None:
        _glibc().mallopt(ARENA_MAX, 1)
        _glibc().mallopt(MMAP_THRESHOLD, KEPT // 2)
        _glibc().mallopt(TRIM_THRESHOLD, KEPT)


def give_back() -> None:
    """Give the system what is free, wherever it lies. To touch it again costs less than the smallest block takes to run."""
    if _glibc() is not None:
        _glibc().malloc_trim(0)


def rest() -> None:
    """Give up what MKL, where torch has it, keeps for the calling thread once it has multiplied matrices: megabytes for each."""
    if _mkl() is not None:
        _mkl().mkl_serv_thread_free_buffers()


@cache
def _mkl() -> Any:
    """torch's library, where MKL is a part of it."""
    import torch

    file = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    library = ctypes.CDLL(str(file)) if file.exists() else None
    return library if hasattr(library, "mkl_serv_thread_free_buffers") else None


@cache
def _glibc() -> Any:
    """The C library, where it is glibc; elsewhere there is nothing to do."""
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None
