# SPDX-License-Identifier: Apache-2.0
"""Ops by name, from an allow-list: the only functions that a loaded graph can call.

Namespaces ``aten`` and ``qgraph``, and some functions on symbolic sizes. Of aten: ops that write
no argument, without those that touch files, raw storage or uninitialised memory.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

import qgraph.graph.dialect  # registers the ops of the namespace qgraph
from qgraph.artifact.damage import damaged
from qgraph.errors import ExportError

_OP = re.compile(r"(aten|qgraph)::([a-z_][a-z0-9_]*)\.([A-Za-z_][A-Za-z0-9_]*)")
_DIALECT = qgraph.graph.dialect.QUANTIZERS | qgraph.graph.dialect.DEQUANTIZERS
_BUILTIN = (
    operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv,
    operator.mod, operator.neg, operator.pow, operator.eq, operator.ne, operator.lt, operator.le,
    operator.gt, operator.ge, operator.and_, operator.or_, operator.not_,
)  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{item.__name__}": item for item in _BUILTIN},
    **{f"math.{item.__name__}": item for item in (math.ceil, math.floor, math.trunc)},
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("sym_max", "sym_min", "sym_not", "sym_float", "sym_int", "sym_ite")
    },
}
_FUNCTION_NAMES = {function: name for name, function in _FUNCTIONS.items()}
# They read files, reinterpret storage, return uninitialised memory, or skip bounds checks.
_DENIED = re.compile(
    r"from_file|from_blob|set|set_data|resize.*|as_strided.*|empty.*|new_empty.*|.*unsafe.*"
    r"|.*storage.*|.*nested.*|.*sparse.*|.*mkldnn.*|.*cudnn.*|.*miopen.*|.*quantized.*|.*pin.*"
    r"|retain_grad|requires_grad|record_stream|backward|.*_backward.*|data|save.*|load.*"
)
# Private ops that traced models do contain.
_PRIVATE = frozenset({
    "__and__", "__or__", "__xor__", "__lshift__", "__rshift__", "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d", "_assert_async", "_assert_scalar", "_assert_tensor_metadata",
    "_cdist_forward", "_convolution", "_embedding_bag_forward_only", "_fft_c2c", "_fft_c2r",
    "_fft_r2c", "_local_scalar_dense", "_log_softmax", "_native_batch_norm_legit_no_training",
    "_pdist_forward", "_prelu_kernel", "_scaled_dot_product_attention_math",
    "_scaled_dot_product_flash_attention_for_cpu", "_shape_as_tensor", "_softmax", "_to_copy",
    "_unsafe_view", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa",
    "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
    "_weight_norm",
})  # fmt: skip
_ALLOWED = frozenset({"_unsafe_view"})


def name_of(target: Any) -> str:
    """The name of a call's target.

    Raises:
        ExportError: a function that saved graphs cannot call.
    """
    if isinstance(target, OpOverload):
        name = f"{target.namespace}::{target._schema.name.split('::')[1]}.{target._overloadname}"
        if refusal(target) is None:
            return name
        msg = f"the graph calls {target}, which cannot be saved: {refusal(target)}"
        raise ExportError(msg)
    if target in _FUNCTION_NAMES:
        return _FUNCTION_NAMES[target]
    msg = f"the graph calls {target!r}, which cannot be saved; allowed: aten and qgraph ops"
    raise ExportError(msg)


def refusal(target: OpOverload) -> str | None:
    """Why an op is not on the allow-list, or None."""
    if target.namespace == "qgraph":
        return None if target in _DIALECT else "it is not of the dialect"
    name = target._schema.name.split("::")[1]
    if target.namespace != "aten":
        return "only aten and qgraph ops are allowed"
    if target._schema.is_mutable and name != "copy_":
        return "it writes one of its arguments"
    if name.startswith("_") and name not in _PRIVATE:
        return "it is private to torch"
    if name not in _ALLOWED and _DENIED.fullmatch(name):
        return "it reaches files, raw storage or uninitialised memory"
    return None


def resolve(name: object) -> Callable[..., Any]:
    """The function of that name.

    Raises:
        ArtifactError: unknown, or not on the allow-list.
    """
    if isinstance(name, str) and name in _FUNCTIONS:
        return _FUNCTIONS[name]
    match = _OP.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise damaged(f"unknown op {str(name)[:80]!r}")
    found: Any = getattr(torch.ops, match[1])
    for part in (match[2], match[3]):
        found = getattr(found, part, None)
    if not isinstance(found, OpOverload) or found._schema.name != f"{match[1]}::{match[2]}":
        raise damaged(f"unknown op {name!r}; was the file written with a newer torch?")
    reason = refusal(found)
    if reason is not None:
        raise damaged(f"op {name!r} is not allowed in saved graphs: {reason}")
    return found


def check_call(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Check names and number of a call's arguments against the op's schema.

    Raises:
        ArtifactError: they do not fit.
    """
    if not isinstance(target, OpOverload):
        plain = all(isinstance(a, (Node, bool, int, float)) for a in args)
        if kwargs or not 1 <= len(args) <= 3 or not plain:
            raise damaged(f"{target} is called with {len(args)} arguments and {sorted(kwargs)}")
        return
    names = [a.name for a in target._schema.arguments]
    positional = [a.name for a in target._schema.arguments if not a.kwarg_only]
    given = [*positional[: len(args)], *kwargs]
    needed = [a.name for a in target._schema.arguments if not a.has_default_value()]
    wrong = len(args) > len(positional) or len(set(given)) != len(given)
    if wrong or set(given) - set(names) or set(needed) - set(given):
        raise damaged(f"{target} is called with {len(args)} arguments and {sorted(kwargs)}")
