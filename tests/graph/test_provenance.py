# SPDX-License-Identifier: Apache-2.0
"""Where a node says it comes from, read off records as torch.export writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.fx import Graph, Node

import qgraph
from qgraph.graph.provenance import (
    call_index,
    is_user_file,
    last_user_frame,
    module_path,
    source_line,
)

TORCH = str(Path(torch.__file__).parent)
QGRAPH = str(Path(qgraph.__file__).parent)


def recorded(*stack: tuple[str, str]) -> Node:
    """A node inside nested modules, given as (key, path)."""
    node = Graph().placeholder("x")
    if stack:
        node.meta["nn_module_stack"] = {key: (path, "Kind") for key, path in stack}
    return node


@pytest.mark.parametrize(
    ("stack", "path", "call"),
    [
        ((), "", 0),
        ((("L__self__", ""),), "", 0),
        ((("L__self__", ""), ("L__self___a", "a")), "a", 0),
        ((("L__self__", ""), ("a", "a"), ("b", "a.b")), "a.b", 0),
        ((("a", "a"), ("b@1", "a.b")), "a.b", 1),
        ((("a@3", "a"), ("b", "a.b")), "a.b", 0),
        ((("a@3", "a"), ("b@12", "a.b")), "a.b", 12),
        ((("b@", "b"),), "b", 0),
        ((("b@x", "b"),), "b", 0),
        ((("7", "7"),), "7", 0),
        ((("b@1@2", "b"),), "b", 2),
    ],
)
def test_the_innermost_module_and_its_call_are_told(stack, path, call):
    assert module_path(recorded(*stack)) == path
    assert call_index(recorded(*stack)) == call


def frame(file: str, line: int, function: str, code: str) -> str:
    return f'  File "{file}", line {line}, in {function}\n    {code}\n'


@pytest.mark.parametrize(
    ("file", "own"),
    [
        ("/elsewhere/model.py", True), (f"{TORCH}/nn/modules/linear.py", False),
        (f"{QGRAPH}/graph/trace.py", False), ("<eval_with_key>.1", False), ("<string>", False),
        (f"{TORCH}vision/models/resnet.py", True), (f"{QGRAPH}_nets/net.py", True),
        (str(Path(QGRAPH).parent / "net.py"), True), ("model.py", True),
        ("/elsewhere/torch.py", True),
    ],
)  # fmt: skip
def test_files_of_torch_and_of_the_toolkit_are_not_the_users(file, own):
    assert is_user_file(file) is own
    text = frame(file, 7, "forward", "y = x")
    where = f"{Path(file).name}:7, in forward: y = x"
    assert last_user_frame(text) == (where if own else "")


def test_the_innermost_frame_of_the_user_is_told() -> None:
    outer = frame("/me/a.py", 3, "run", "return model(x)")
    inner = frame("/me/b.py", 12, "forward", "y = self.fc(x)  ")
    below = frame(f"{TORCH}/nn/linear.py", 9, "forward", "return F.linear(x)")
    for text, want in (
        (outer + inner + below, "b.py:12, in forward: y = self.fc(x)"),
        (inner + outer + below, "a.py:3, in run: return model(x)"),
        (below + outer, "a.py:3, in run: return model(x)"),
        (below, ""),
        ("", ""),
        ("no frame at all", ""),
    ):
        assert last_user_frame(text) == want
        node = recorded()
        node.meta["stack_trace"] = text
        assert source_line(node) == want
    assert source_line(recorded()) == ""
    node = recorded()
    node.meta["stack_trace"] = None
    assert source_line(node) == ""
