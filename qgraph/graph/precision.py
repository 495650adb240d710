# SPDX-License-Identifier: Apache-2.0
"""Half, bfloat16 and double models: traced as float32, with their own dtype at the borders."""

from __future__ import annotations

import copy
from collections import Counter
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves, tree_map_only

from qgraph.graph.build import insert_call

aten = torch.ops.aten


def float_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that most of the model's floating-point weights have; float32 without any."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point():
            counts[tensor.dtype] += tensor.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def needs_cast(model: nn.Module) -> bool:
    """Whether some parameter is of a float dtype other than float32."""
    return any(p.is_floating_point() and p.dtype != torch.float32 for p in model.parameters())


def cast_inputs(value: Any) -> Any:
    """The inputs with every floating-point tensor in float32."""
    return tree_map_only(
        Tensor, lambda t: t.to(torch.float32) if t.is_floating_point() else t, value
    )


def output_dtypes(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[torch.dtype] | None:
    """Dtypes of the model's tensor outputs, found without running a kernel; None if that fails.

    A half model may well return some outputs in float32, so they are looked up one by one.
    Runs a throw-away copy: a model may keep what it computes.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    twin = copy.deepcopy(model)
    try:
        state: dict[str, Tensor] = {
            name: mode.from_tensor(tensor)
            for name, tensor in chain(twin.named_parameters(), twin.named_buffers())
        }
        fake_args, fake_kwargs = tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
        with mode:
            result = functional_call(twin, state, fake_args, fake_kwargs)
    except Exception:  # noqa: BLE001 - any failure only costs precision of this answer
        return None
    return [leaf.dtype for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def cast_borders(
    module: GraphModule,
    inputs: list[torch.dtype | None],
    outputs: list[torch.dtype] | None,
    original: torch.dtype,
) -> None:
    """Cast inputs to float32 on entry and outputs back on exit, as nodes of the graph.

    Args:
        module: a graph that computes in float32.
        inputs: per placeholder the caller's dtype, None for what is no tensor.
        outputs: per tensor output the caller's dtype; None: `original` for all float outputs.
        original: float dtype of the caller's model.
    """
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    first = next(node for node in module.graph.nodes if node.op not in {"placeholder", "get_attr"})
    for node, dtype in zip(placeholders, inputs, strict=True):
        if dtype is None or not dtype.is_floating_point or dtype == torch.float32:
            continue
        users = list(node.users)
        node.meta["val"] = node.meta["val"].to(dtype)
        node.meta.pop("tensor_meta", None)
        cast = insert_call(
            module, aten._to_copy.default, node, like=node, before=first, dtype=torch.float32
        )
        for user in users:
            user.replace_input_with(node, cast)
    _cast_outputs(module, outputs, original)


def _cast_outputs(
    module: GraphModule, outputs: list[torch.dtype] | None, original: torch.dtype
) -> None:
    end = module.graph.output_node()
    results = list(tree_leaves(end.args[0]))
    wanted = iter(outputs or [])
    for at, node in enumerate(results):
        value = getattr(node, "meta", {}).get("val")
        if not isinstance(value, Tensor):
            continue
        target = next(wanted, original)
        if value.dtype == torch.float32 and target.is_floating_point and target != torch.float32:
            results[at] = insert_call(
                module, aten._to_copy.default, node, like=node, before=end, dtype=target
            )
    end.args = (tuple(results),)
