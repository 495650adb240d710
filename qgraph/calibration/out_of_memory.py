# SPDX-License-Identifier: Apache-2.0
"""Work in batches that become smaller when memory runs out, and says so."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from qgraph.errors import CalibrationError

LOGGER = logging.getLogger("qgraph")
T = TypeVar("T")
# What the CPU allocator says; it has no exception of its own.
_WORDS = ("can't allocate memory", "not enough memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator, of Python, a CPU or an accelerator, had nothing left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def with_smaller_batches(
    work: Callable[[int], T], batch: int, *, what: str, tell: Callable[[str], None] | None = None
) -> T:
    """``work(batch)``; after running out of memory again with half the batch, down to 1.

    Args:
        work: takes a batch size; must be repeatable.
        batch: to begin with.
        what: for messages, such as the name of a block.
        tell: also takes the message of each step down.

    Raises:
        CalibrationError: memory does not suffice for one sample at a time.
    """
    while True:
        try:
            return work(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if batch <= 1:
                first = (str(error).splitlines() or [type(error).__name__])[0]
                msg = f"{what}: out of memory even with one sample at a time ({first[:200]})"
                raise CalibrationError(msg) from error
        batch = max(1, batch // 2)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        message = f"{what}: out of memory; going on with batches of {batch}"
        LOGGER.warning("%s", message)
        if tell is not None:
            tell(message)
