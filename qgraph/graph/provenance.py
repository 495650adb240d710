# SPDX-License-Identifier: Apache-2.0
"""Where a node comes from: the module and the source line that torch.export recorded."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from torch.fx import Node

FRAME = re.compile(r'File "([^"]+)", line (\d+), in ([^\n]+)\n[ \t]*([^\n]*)')
_TORCH = str(Path(torch.__file__).parent) + os.sep  # torchvision's folder begins alike
_QGRAPH = str(Path(__file__).parents[1]) + os.sep


def module_path(node: Node) -> str:
    """Path of the innermost module that computed the node, '' for the root or when unknown."""
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""


def call_index(node: Node) -> int:
    """Which call of that module it was: 0 for the first, 1 where export wrote ``name@1``."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return 0
    _, _, call = str(list(stack)[-1]).rpartition("@")
    return int(call) if call.isdigit() and "@" in str(list(stack)[-1]) else 0


def is_user_file(filename: str) -> bool:
    """Whether a frame of that file is the model author's, not torch's, qgraph's or generated."""
    return not filename.startswith((_TORCH, _QGRAPH, "<"))


def last_user_frame(text: str) -> str:
    """The innermost user frame of a printed stack, as 'file.py:12, in forward: code', or ''."""
    frames = [frame for frame in FRAME.findall(text) if is_user_file(frame[0])]
    if not frames:
        return ""
    filename, line, function, code = frames[-1]
    return f"{Path(filename).name}:{line}, in {function.strip()}: {code.strip()}"


def source_line(node: Node) -> str:
    """The last user frame of the node's stack trace, as 'file.py:12, in forward: code', or ''."""
    return last_user_frame(node.meta.get("stack_trace") or "")
