# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.extrema`: both ends of a range by one op, or by two.

Microseconds of CPU on one thread, medians, for values of a ViT-S that lie in the cache, as they do
right behind the op that made them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from qgraph.report.text import table

SHAPES = ((2, 197, 384), (2, 197, 1536), (2, 6, 197, 197))
WAYS: dict[str, Callable[[Tensor], object]] = {
    "aminmax": torch.aminmax, "amin, amax": lambda x: (x.amin(), x.amax()),
}  # fmt: skip


def microseconds(way: Callable[[Tensor], object], x: Tensor) -> float:
    """Median of 200 calls."""
    found = []
    for _ in range(200):
        start = time.perf_counter()
        way(x)
        found.append(time.perf_counter() - start)
    return 1e6 * statistics.median(found)


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    values = [torch.randn(shape) for shape in SHAPES]
    rows = [
        (list(x.shape), *(f"{microseconds(way, x):.1f}" for way in WAYS.values())) for x in values
    ]
    print(table(("shape", *WAYS), rows))


if __name__ == "__main__":
    main()
