# SPDX-License-Identifier: Apache-2.0
"""Print a graph as a Python program that builds it again, weights and inputs included."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.graph.build import attribute

LITERAL, PACKED = 64, 1 << 16  # elements, bytes
_UNPACK = '''
def unpack(text, dtype, shape):
    """A tensor from base85 text."""
    raw = bytearray(zlib.decompress(base64.b85decode(text)))
    return torch.frombuffer(raw, dtype=dtype).reshape(shape).clone()
'''


_STANDIN = '''
def standin(shape, spread, mean, dtype):
    """Random numbers in place of a tensor too large to print: not its values."""
    return (torch.randn(shape) * spread + mean).to(dtype)
'''


def graph_as_code(module: GraphModule, inputs: Sequence[object] = ()) -> str:
    """Runnable code: a module ``Net``, an instance ``model`` and, if given, ``inputs``.

    Tensors of up to 64 elements are written out, larger ones as packed text; beyond 64 KiB of
    text random numbers of the same mean and spread stand in, which the program says.

    Args:
        module: a flat graph of calls, as `qgraph.trace` gives it.
        inputs: values of its placeholders, in order.
    """
    tensors = {
        str(node.target): attribute(module, str(node.target))
        for node in module.graph.nodes
        if node.op == "get_attr"
    }
    given = [_argument(item) if not isinstance(item, Tensor) else _tensor(item) for item in inputs]
    body = [_statement(node) for node in module.graph.nodes]
    holders = [n.name for n in module.graph.nodes if n.op == "placeholder"]
    lines = ["class Net(torch.nn.Module):"]
    if tensors:
        lines += ["    def __init__(self):", "        super().__init__()"]
        lines += [
            f"        self.register_buffer({_flat(name)!r}, {_tensor(value)})"
            for name, value in tensors.items()
        ]
        lines.append("")
    lines += [f"    def forward({', '.join(['self', *holders])}):"]
    lines += [f"        {line}" for line in body if line]
    lines += ["", "", "model = Net().eval()"]
    if inputs:
        lines += [f"inputs = ({''.join(f'{item}, ' for item in given).rstrip()})"]
    text = "\n".join(lines)
    return f"{_head(text)}\n\n{text}\n"


def _head(text: str) -> str:
    imports = ["import torch"]
    if "operator." in text:
        imports.insert(0, "import operator")
    if "unpack(" in text:
        imports = ["import base64", *imports[:-1], "import zlib", "", imports[-1]]
    if "ops.qgraph." in text:
        imports += ["", "import qgraph  # registers the dialect's ops"]
    tools = [tool for tool, name in ((_UNPACK, "unpack("), (_STANDIN, "standin(")) if name in text]
    return "\n\n".join(["\n".join(imports), *(tool.rstrip() for tool in tools)])


def _flat(name: str) -> str:
    flat = name.replace(".", "_")
    return flat if flat.isidentifier() else f"t_{flat}"


def _statement(node: Node) -> str:
    match node.op:
        case "placeholder":
            return ""
        case "get_attr":
            return f"{node.name} = self.{_flat(str(node.target))}"
        case "output":
            return f"return {_argument(node.args[0])}"
        case _:
            words = [_argument(item) for item in node.args]
            words += [f"{key}={_argument(item)}" for key, item in node.kwargs.items()]
            return f"{node.name} = {_callable(node.target)}({', '.join(words)})"


def _callable(target: object) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return f"torch.ops.{target}"
    name = str(getattr(target, "__qualname__", getattr(target, "__name__", target)))
    home = str(getattr(target, "__module__", ""))
    return f"{'operator' if home == '_operator' else home}.{name}"


def _argument(item: object) -> str:
    if isinstance(item, Node):
        return item.name
    if isinstance(item, (list, tuple)):
        inside = ", ".join(map(_argument, item))
        if isinstance(item, list):
            return f"[{inside}]"
        return f"({inside}{',' if len(item) == 1 else ''})"
    if isinstance(item, dict):
        return f"{{{', '.join(f'{k!r}: {_argument(v)}' for k, v in item.items())}}}"
    if isinstance(item, float) and not math.isfinite(item):
        return f'float("{item}")'
    if isinstance(item, torch.device):
        return f'torch.device("{item}")'
    return repr(item)


def _tensor(tensor: Tensor) -> str:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.numel() <= LITERAL and tensor.numel():
        return f"torch.tensor({_argument(tensor.tolist())}, dtype={tensor.dtype})"
    raw = tensor.view(-1).view(torch.uint8).numpy() if tensor.numel() else np.zeros(0, np.uint8)
    text = base64.b85encode(zlib.compress(raw.tobytes(), 9)).decode()
    shape = tuple(tensor.shape)
    if tensor.numel() == 0:
        return f"torch.zeros({shape}, dtype={tensor.dtype})"
    if len(text) <= PACKED:
        return f"unpack({text!r}, {tensor.dtype}, {shape})"
    wide = tensor.double()
    mean, spread = float(wide.mean()), float(wide.std())
    return f"standin({shape}, {spread:.6g}, {mean:.6g}, {tensor.dtype})"
