# SPDX-License-Identifier: Apache-2.0
"""The calling convention of a traced graph: its own signature in, its own structure out."""

from __future__ import annotations

import inspect
from typing import Any

from torch.fx import GraphModule
from torch.fx import _pytree as fx_pytree

from qgraph.errors import InputError


def flat_inputs(module: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Values of the placeholders, in order.

    Raises:
        InputError: arguments that do not fit the graph's signature.
    """
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError as error:
        msg = f"inputs do not fit the model's signature: {error}"
        raise InputError(msg) from error
    bound.apply_defaults()
    values = [*bound.args, *bound.kwargs.values()]
    info = getattr(module.graph._codegen, "pytree_info", None)
    if info is None or info.in_spec is None:
        return values
    spec = info.in_spec
    if spec.num_children == 2 and spec.type is tuple and spec.child(1).type is dict:
        count, names = spec.child(0).num_children, list(spec.child(1).context)
        structured: Any = (values[:count], dict(zip(names, values[count:], strict=True)))
        return list(fx_pytree.tree_flatten_spec(structured, spec))
    return list(fx_pytree.tree_flatten_spec(values, spec))


def structured_outputs(module: GraphModule, outputs: Any) -> Any:
    """Outputs of the graph in the model's structure."""
    return module.graph._codegen.process_outputs(outputs)
