# SPDX-License-Identifier: Apache-2.0
"""What is refused before a model is traced: each refusal names the culprit and the cure."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.utils._pytree import tree_leaves

from qgraph.errors import CaptureError
from qgraph.graph.provenance import module_path, source_line

_TRAINING_FLAG = {
    torch.ops.aten.dropout.default: 2,
    torch.ops.aten.feature_dropout.default: 2,
    torch.ops.aten.alpha_dropout.default: 2,
    torch.ops.aten.native_dropout.default: 2,
    torch.ops.aten.scaled_dot_product_attention.default: 4,
}


def check_model(model: object) -> None:
    """Refuse what is no eager module, is in training mode, or has unusable parameters.

    Raises:
        CaptureError: naming the module or parameter concerned.
    """
    if isinstance(model, torch.jit.ScriptModule):
        msg = "a TorchScript module cannot be traced; give the nn.Module it was made from"
        raise CaptureError(msg)
    if not isinstance(model, nn.Module):
        msg = (
            f"trace() takes an nn.Module, an fx.GraphModule or an ExportedProgram, got "
            f"{type(model).__name__}; wrap a function into the forward() of an nn.Module"
        )
        raise CaptureError(msg)
    training = [path for path, module in _eager_modules("", model) if module.training]
    if training:
        names = ", ".join(repr(path) if path else "the model itself" for path in training[:3])
        more = f" and {len(training) - 3} more" if len(training) > 3 else ""
        msg = f"training mode is on in {names}{more}; call model.eval() before quantizing"
        raise CaptureError(msg)
    check_tensors(model)


def _eager_modules(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules whose `training` flag means something.

    In a GraphModule the graph alone decides: torch.export leaves the flag on (and lets nobody
    call eval()), so only the modules that the graph calls count.
    """
    if isinstance(module, GraphModule):
        called = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
        children = [(name, module.get_submodule(name)) for name in sorted(called)]
    else:
        if not type(module).__module__.startswith("torch.export"):  # input guards, not layers
            yield path, module
        children = list(module.named_children())
    for name, child in children:
        yield from _eager_modules(f"{path}.{name}" if path else name, child)


def check_tensors(model: nn.Module) -> None:
    """Refuse meta tensors, several devices, and non-finite weights.

    Buffers may hold infinities (attention masks do), never NaN.

    Raises:
        CaptureError: naming the tensor concerned.
    """
    homes: dict[torch.device, str] = {}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        homes.setdefault(tensor.device, name)
        if tensor.device.type == "meta":
            msg = f"{name!r} is on the meta device and has no values; load the weights first"
            raise CaptureError(msg)
    if len(homes) > 1:
        places = " and ".join(f"{device} ({name!r})" for device, name in homes.items())
        msg = f"the model is spread over {places}; move it to one device"
        raise CaptureError(msg)
    for name, parameter in model.named_parameters():
        _check_finite(name, parameter, infinity=False)
    for name, buffer in model.named_buffers():
        _check_finite(name, buffer, infinity=True)


def _check_finite(name: str, tensor: Tensor, *, infinity: bool) -> None:
    if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
        return
    values = tensor.float() if tensor.itemsize == 1 else tensor  # 8-bit floats know no extrema
    bad = torch.isnan if infinity else _is_not_finite
    ends = torch.aminmax(torch.view_as_real(values) if values.is_complex() else values)
    if not bool(bad(torch.stack(ends)).any()):  # one read, and no mask as large as the tensor
        return
    what = "NaN" if infinity else "NaN or infinite"
    msg = (
        f"{int(bad(values).sum())} of {tensor.numel()} values of {name!r} are {what}; "
        "repair the checkpoint before quantizing"
    )
    raise CaptureError(msg)


def _is_not_finite(values: Tensor) -> Tensor:
    return ~values.isfinite()


def check_sample(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse sample inputs that do not fit the signature, the device, or are empty.

    Raises:
        CaptureError: naming what was got and what is expected.
    """
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        got = [type(item).__name__ for item in args] + [f"{name}=..." for name in kwargs]
        msg = (
            f"the sample inputs ({', '.join(got)}) do not fit "
            f"{type(model).__name__}.forward{signature}: {error}"
        )
        raise CaptureError(msg) from error
    home = next(chain(model.parameters(), model.buffers()), None)
    for leaf in tree_leaves((args, kwargs)):
        if not isinstance(leaf, Tensor):
            continue
        if leaf.numel() == 0:
            msg = f"a sample input of shape {tuple(leaf.shape)} is empty; give at least one item"
            raise CaptureError(msg)
        if home is not None and leaf.ndim and leaf.device != home.device:
            msg = (
                f"the model is on {home.device}, a sample input on {leaf.device}; move one of them"
            )
            raise CaptureError(msg)


def check_inference(graph: Graph) -> None:
    """Refuse graphs with active dropout, which eval() on a module does not switch off.

    Raises:
        CaptureError: naming the source line.
    """
    for node in graph.nodes:
        at = _TRAINING_FLAG.get(node.target)
        if at is None or len(node.args) <= at or not node.args[at]:
            continue
        line, path = source_line(node), module_path(node)
        msg = (
            f"dropout is active in inference{f' in {path}' if path else ''}"
            f"{f' at {line}' if line else ''}; "
            "pass training=self.training (dropout_p=0.0 for attention) instead of a constant"
        )
        raise CaptureError(msg)
