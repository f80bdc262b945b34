"""Weights in memory pages of 2 MB on Linux: each step reads all weights, and with 4 kB pages the processor's page
look-ups slow this down.
"""

import ctypes
import sys
import time
from collections.abc import Iterable

import torch
from torch.multiprocessing.reductions import StorageWeakRef

PAGE = 2 << 20
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # from Linux's mman.h; the second since Linux 6.1
_tried: dict[int, StorageWeakRef] = {}  # the weights whose pages were tried, by page address divided by PAGE


def use_huge_pages(tensors: Iterable[torch.Tensor], most_seconds: float = 10.0) -> bool:
    """Move CPU tensors to huge pages, in place; returns whether a page was tried for the first time.

    A page takes about 10 ms. Tensors stay in small pages if Linux refuses, or after `most_seconds`.
    """
    pages: dict[int, StorageWeakRef] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        start, size = storage.data_ptr(), storage.nbytes()
        pages |= dict.fromkeys(range(start // PAGE, (start + size - 1) // PAGE + 1), StorageWeakRef(storage))
    # Memory that was freed and taken again is in small pages.
    new = sorted(page for page in pages if page not in _tried or _tried[page].expired())
    _tried.update({page: pages[page] for page in new})
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
