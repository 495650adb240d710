# SPDX-License-Identifier: Apache-2.0
"""What tracing found out about a model, kept on the traced GraphModule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from qgraph.errors import CaptureError

_KEY = "qgraph_trace"


@dataclass(frozen=True, slots=True)
class TraceInfo:
    """How a model was traced.

    Attributes:
        dynamic_batch: whether the graph accepts other batch sizes than the sample's.
        reason: why the batch is static, '' where it is dynamic.
        input_names: names of the traced module's inputs (targets of its placeholders), in order.
        original_dtype: float dtype of the caller's model; the graph computes in float32, takes
            inputs of this dtype and gives outputs of it.
    """

    dynamic_batch: bool
    reason: str
    input_names: tuple[str, ...]
    original_dtype: torch.dtype


def set_trace_info(module: GraphModule, info: TraceInfo) -> None:
    """Attach the information; it survives deepcopy."""
    module.meta[_KEY] = info


def has_trace_info(module: torch.nn.Module) -> bool:
    """Whether the module came out of `qgraph.trace`."""
    return isinstance(module, GraphModule) and isinstance(module.meta.get(_KEY), TraceInfo)


def trace_info(module: GraphModule) -> TraceInfo:
    """The information that `qgraph.trace` attached.

    Raises:
        CaptureError: the module was not traced by qgraph.
    """
    info = module.meta.get(_KEY)
    if not isinstance(info, TraceInfo):
        msg = "this GraphModule was not made by qgraph.trace; pass it to qgraph.trace first"
        raise CaptureError(msg)
    return info
