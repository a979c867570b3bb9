"""Keep freed memory in the process while a CPU embeds: glibc gives it back after every batch, and asks for it again."""

from __future__ import annotations

import ctypes
import functools
import os
import sys

# Parameters of mallopt, from malloc.h, with the environment variable by which users set each.
_PARAMETERS = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_TOP_PAD_": -2, "MALLOC_MMAP_THRESHOLD_": -3}
_KEPT_BYTES = 512 * 2**20
_VALUES = {
    "MALLOC_TRIM_THRESHOLD_": _KEPT_BYTES,  # freed memory up to this size stays in the process
    "MALLOC_TOP_PAD_": 64 * 2**20,  # is asked for in addition, so that the system is asked rarely
    "MALLOC_MMAP_THRESHOLD_": _KEPT_BYTES,  # only larger blocks are mapped and unmapped one by one
}


@functools.cache
def keep_freed_memory() -> bool:
    """Let glibc keep up to 512 MB of freed memory in this process; returns whether it does so.

    Each page that is given back costs a page fault when it is used again: 8 to 12 % of the time that a CPU embeds.
    Nothing happens without glibc, or if one of the environment variables MALLOC_TRIM_THRESHOLD_, MALLOC_TOP_PAD_ and
    MALLOC_MMAP_THRESHOLD_, or GLIBC_TUNABLES, says what to do.
    """
    if sys.platform != "linux" or any(name in os.environ for name in (*_PARAMETERS, "GLIBC_TUNABLES")):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):  # musl
        return False
    accepted = [libc.mallopt(number, _VALUES[name]) == 1 for name, number in _PARAMETERS.items()]
    return all(accepted)
