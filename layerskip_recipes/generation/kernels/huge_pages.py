"""Weights in memory pages of 2 MB on Linux: each step reads all weights, and with 4 kB pages the processor's page
look-ups slow this down.
"""

import ctypes
import sys
import time
from collections.abc import Iterable

import torch

PAGE = 2 << 20
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # from Linux's mman.h; the second since Linux 6.1
_tried = set[int]()  # page addresses divided by PAGE


def use_huge_pages(tensors: Iterable[torch.Tensor], most_seconds: float = 10.0) -> bool:
    """Move CPU tensors to huge pages, in place; returns whether a page was tried for the first time.

    A page takes about 10 ms. Tensors stay in small pages if Linux refuses, or after `most_seconds`.
    """
    pages = set[int]()
    for tensor in tensors:
        start, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        pages |= set(range(start // PAGE, (start + size - 1) // PAGE + 1))
    new = sorted(pages - _tried)
    _tried.update(new)
    if sys.platform != "linux":
        return bool(new)
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    started = time.perf_counter()
    for page in new:
        if time.perf_counter() - started > most_seconds:
            break
        for advice in (MADV_HUGEPAGE, MADV_COLLAPSE):
            madvise(page * PAGE, PAGE, advice)
    return bool(new)
