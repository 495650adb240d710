# SPDX-License-Identifier: Apache-2.0
"""Float ops that a compiler must not rewrite.

A compiler fuses softmax, norms and the like into other float programs, and rounds elsewhere.
Behind a registered op of the same schema the eager kernel runs in both cases, so compiled codes
equal eager ones. Elementary arithmetic is correctly rounded by IEEE 754 and stays visible.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from qgraph.graph.ops import MOVES, SPLITS

aten = torch.ops.aten
_LIBRARY = torch.library.Library("qgraph_eager", "DEF")

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


@functools.cache
def opaque(target: Any) -> Any:
    """An op of the same schema that runs `target` and cannot be looked into."""
    if is_elementary(target) or any(a.alias_info for a in target._schema.arguments):
        return target
    overload = target._overloadname
    # Names that start with underscores would be mangled as private.
    name = f"x{target._opname}" if target._opname.startswith("_") else target._opname
    name = name if overload == "default" else f"{name}_{overload}"
    _, _, tail = str(target._schema).partition("(")
    _LIBRARY.define(f"{name}({tail}")
    _LIBRARY.impl(name, target, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qgraph_eager::{name}", target, lib=_LIBRARY)
    return getattr(torch.ops.qgraph_eager, name).default
