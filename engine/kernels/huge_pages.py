"""Large pages for weights: a CPU that looks up fewer pages reads memory faster (docs/performance.md)."""

import ctypes
import functools
import mmap

import torch

_HUGE_PAGE_BYTES = 2 * 2**20
_LEAST_BYTES = 2 * _HUGE_PAGE_BYTES


def advise_huge_pages(tensor: torch.Tensor) -> None:
    """Ask the kernel to back a new CPU tensor, before anything is written to it, with huge pages. Only whole ones of
    its own are asked for; where the kernel has none, nothing changes."""
    if tensor.device.type != "cpu" or tensor.numel() * tensor.element_size() < _LEAST_BYTES:
        return
    begin = -(-tensor.data_ptr() // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
    _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_HUGEPAGE)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
