# SPDX-License-Identifier: Apache-2.0
"""Tables: an elementwise function between two quantizers, evaluated once per code."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from qgraph.backends.arithmetic import code_table
from qgraph.backends.levels import Levels
from qgraph.backends.semantics import Semantics
from qgraph.formats import Encoding


def all_codes(levels: Levels) -> Tensor:
    """Every code, ascending (int32)."""
    low, high = levels.codes()
    return torch.arange(low, high + 1, dtype=torch.int32, device=levels.encoding.scale.device)


def chain_table(semantics: Semantics, source: Node, target: Encoding) -> Tensor:
    """Codes of `target` for every code that the chain ending in `source` reads."""
    levels = semantics.levels[source]
    return code_table(levels.values(all_codes(levels)), semantics.functions.get(source, ()), target)


def lookup(table: Tensor, codes: Tensor, levels: Levels) -> Tensor:
    """Entries of a table over all codes of `levels`."""
    low, _ = levels.codes()
    return table[codes.to(torch.int64) - low]
