# SPDX-License-Identifier: Apache-2.0
"""Small work put off until there is much of it.

Between the large operations of a model, each small one finds its code out of the processor's
caches. So values wait in a buffer, and those of many tensors are worked on in turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ROOM = 1 << 21  # fp32 values that may wait


class Later:
    """A buffer of values that wait, and what to do with them."""

    def __init__(self) -> None:
        self._room: Tensor | None = None
        self._used = 0
        self._waiting: list[tuple[Callable[..., None], tuple[Any, ...]]] = []

    def room(self, shape: tuple[int, ...]) -> Tensor:
        """Uninitialised fp32 on the host that stays valid until `run`."""
        size = math.prod(shape)
        if self._used + size > ROOM:
            self.run()
        if size > ROOM:
            return torch.empty(shape, device="cpu")
        if self._room is None:  # the pages are the system's until they are written
            self._room = torch.empty(ROOM, device="cpu")
        start, self._used = self._used, self._used + size
        return self._room[start : self._used].view(shape)

    def put_off(self, work: Callable[..., None], values: Tensor, *rest: Any) -> None:
        """Call ``work(values, *rest)`` at the next `run`, or now if they are too many to wait.

        `values` lie in a `room`, or nobody else writes to them.
        """
        if values.numel() > ROOM:
            work(values, *rest)
        else:
            self._waiting.append((work, (values, *rest)))

    def run(self) -> None:
        """Do all that waits."""
        waiting, self._waiting, self._used = self._waiting, [], 0
        for work, arguments in waiting:
            work(*arguments)
