# SPDX-License-Identifier: Apache-2.0
"""What a compilation does grows with the number of nodes, not faster: lines of code are counted.

Counting executed lines, loops and comprehensions included, is exact and needs no clock.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import qgraph
from qgraph.testing.chains import WIDTH, chain

ROOT = Path(qgraph.__file__).resolve().parent.parent
OURS = tuple(str(ROOT / name) for name in ("qgraph", "passes", "backends"))
BLOCKS = 4  # a pass may treat the first block or two differently


def executed(pipeline: str, blocks: int, *, verify: bool) -> Counter[str]:
    """How many lines of each file of qgraph run while a chain of so many blocks is compiled."""
    module, counts = chain(blocks), Counter[str]()
    data = [torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(0))]

    def line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            counts[frame.f_code.co_filename] += 1
        return line

    def call(frame: FrameType, _event: str, _: Any) -> Any:
        return line if frame.f_code.co_filename.startswith(OURS) else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        qgraph.compile(module, data, pipeline, verify=verify, progress=False)
    finally:
        sys.settrace(before)
    return counts


@pytest.mark.parametrize(("pipeline", "verify"), [("ris_int4", False), ("int8", True)])
def test_twice_as_many_nodes_run_at_most_about_twice_as_many_lines(
    pipeline: str, verify: bool
) -> None:
    few, some, many = (
        executed(pipeline, blocks, verify=verify) for blocks in (BLOCKS, 2 * BLOCKS, 4 * BLOCKS)
    )
    for file in many:
        first, second = some[file] - few[file], many[file] - some[file]
        # from 4 to 8 blocks, then from 8 to 16: linear work adds twice as much
        assert second <= 2.3 * first + 300, f"{file} grows faster than the graph"
