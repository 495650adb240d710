# SPDX-License-Identifier: Apache-2.0
"""Which float ops give the same bits however they are run.

Elementary arithmetic is correctly rounded by IEEE 754. Kernels of all other float ops round by
memory layout (vector body or scalar tail), so both backends hand them one canonical layout.
"""

from __future__ import annotations

import torch

from qgraph.graph.ops import MOVES, SPLITS

# Correctly rounded, or free of rounding: any compiler gives the same bits.
_ELEMENTARY = frozenset({
    "add", "sub", "mul", "div", "neg", "abs", "relu", "clamp", "clamp_min", "clamp_max", "hardtanh",
    "round", "floor", "ceil", "where", "masked_fill", "minimum", "maximum", "sqrt", "rsub",
    "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not", "bitwise_and",
    "__and__", "__or__", "bitwise_or",
    "bitwise_not", "to", "_to_copy", "cat", "stack", "embedding", "full", "full_like",
    "zeros", "zeros_like", "ones", "ones_like", "arange", "scalar_tensor", "sym_size", "any", "all",
    "amax", "amin", "argmax", "argmin", "constant_pad_nd", "pad", "triu", "tril", "max_pool2d",
    "upsample_nearest2d", "expand_as", "index", "index_select",
})  # fmt: skip


def is_elementary(target: object) -> bool:
    """Whether every compiler computes the same bits."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return True
    return target in MOVES or target in SPLITS or target._opname in _ELEMENTARY
