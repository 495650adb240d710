# SPDX-License-Identifier: Apache-2.0
"""Freed memory goes back to the operating system while a sweep runs.

What statistics keep comes to lie between large values that do not live on, and the C library holds
on to the gaps between them: a sweep then takes a multiple of the float model's memory.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

LOOK = 64 << 20  # bytes of values between two looks: a look costs microseconds
GROWTH = 192 << 20  # of resident memory that is worth milliseconds of work
STATM = Path("/proc/self/statm")


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    if not STATM.exists():
        return 0
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def give_back() -> None:
    """Let the C library return what it holds free; nothing where it cannot (it can in glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


class Heap:
    """Watches resident memory as values pass.

    >>> heap = Heap()
    >>> heap.passed(1 << 20)
    """

    def __init__(
        self, size: Callable[[], int] = resident, release: Callable[[], None] = give_back
    ) -> None:
        self._size, self._release = size, release
        self._floor, self._passed = size(), 0

    def passed(self, size: int) -> None:
        """A value of so many bytes was made; now and then see what memory has become."""
        self._passed += size
        if self._passed < LOOK:
            return
        self._passed = 0
        if self._size() - self._floor > GROWTH:
            self.trim()

    def trim(self) -> None:
        """Hand back what is free now."""
        self._release()
        self._floor = self._size()
