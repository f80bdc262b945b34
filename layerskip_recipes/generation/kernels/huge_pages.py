"""Weights in memory pages of 2 MB, where Linux gives them: each step reads all weights, and from pages of 4 kB memory
streams slower, since the processor has to look up many more of them.
"""

import ctypes
import sys
import time
from collections.abc import Iterable

import torch

PAGE = 2 << 20
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # from the kernel's mman.h; the second one since Linux 6.1
_tried = set[int]()  # pages by their addresses, over PAGE


def use_huge_pages(tensors: Iterable[torch.Tensor], most_seconds: float = 10.0) -> bool:
    """Move tensors of the CPU to pages of 2 MB, at the addresses that they have.

    A page takes some 10 ms, once. Where Linux refuses, or after `most_seconds`, they stay in the pages that they have.

    Returns:
        Whether a page was tried for the first time.
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
