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

from qgraph.backends.elementary import is_elementary

_LIBRARY = torch.library.Library("qgraph_eager", "DEF")


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
