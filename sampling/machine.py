"""A setting of the C library that makes drawing faster and does not change the picture."""

from __future__ import annotations

import ctypes
import platform

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # of glibc's <malloc.h>


def check_keep_memory() -> None:
    """Raise ValueError if the C library is not glibc, which `keep_memory` needs."""
    if platform.libc_ver()[0] != "glibc":
        raise ValueError("--keep-memory needs glibc, the C library of most Linux systems: leave it out")


def keep_memory() -> None:
    """Keep freed memory in this process, instead of returning it to the system and requesting new pages at every layer.

    Calls glibc's `mallopt` (mallopt(3)), for the whole process and until its end: blocks of up to 1 GB come from the heap, and the heap is
    never trimmed and grows by 256 MB. Call it after the model is loaded, so that temporary blocks of the load are not kept. Raises
    ValueError if the C library is not glibc.
    """
    check_keep_memory()
    mallopt = ctypes.CDLL(None).mallopt
    for setting, value in ((MMAP_THRESHOLD, 1 << 30), (TRIM_THRESHOLD, 0x7FFFFFFF), (TOP_PAD, 256 << 20)):
        mallopt(setting, value)
