# SPDX-License-Identifier: Apache-2.0
"""A failed export is told by its kind, its line and its way out."""

from __future__ import annotations

import re

import pytest

from qgraph.errors import CaptureError
from qgraph.graph.capture_errors import explain

CAUSES = {
    "GuardOnDataDependentSymNode: u0": "needs the value of a tensor",
    "something data-dependent here": "needs the value of a tensor",
    "aten._local_scalar_dense.default": "needs the value of a tensor",
    "Could not extract specialized integer": "needs the value of a tensor",
    "Constraints violated (batch)": "is fixed by the model's code",
    "marked batch as dynamic, yet it is 4": "is fixed by the model's code",
    "0/1 specialized": "is fixed by the model's code",
    "When `dynamic_shapes` is a dict": "does not fit the sample inputs",
    "Cannot call numpy on a fake tensor": "leaves torch",
    "x.data_ptr()": "leaves torch",
    "Unsupported input type <class 'Own'>": "cannot take apart",
    "Unsupported output type <class 'Own'>": "cannot take apart",
    "please register_pytree_node": "cannot take apart",
    "a tensor that requires grad": "computes gradients",
    "only for squares": "cannot follow the code",
}


@pytest.mark.parametrize("text", CAUSES)
def test_each_kind_of_failure_is_told_from_the_others(text):
    said = explain(ValueError(text))
    assert isinstance(said, CaptureError)
    assert CAUSES[text] in str(said)
    assert f"(ValueError: {text})" in str(said)
    assert " at " not in str(said).partition(". Way out")[0].partition("traced:")[2].replace(
        "at the", ""
    )


def test_the_first_line_is_quoted_up_to_three_hundred_letters() -> None:
    assert str(explain(ValueError("one\ntwo"))).endswith("(ValueError: one)")
    for length, kept in ((287, 287), (288, 288), (289, 288), (500, 288)):
        said = str(explain(ValueError("y" * length + "\nnext")))
        assert said.endswith("(ValueError: " + "y" * kept + ")")


def test_a_printed_frame_goes_before_the_traceback() -> None:
    said = str(explain(ValueError('no\n  File "/me/net.py", line 31, in forward\n    y = x + 1\n')))
    assert "cannot follow the code at net.py:31, in forward: y = x + 1. Way out" in said


def helper() -> None:
    msg = "only for squares"
    raise ValueError(msg)


class Model:
    def forward(self) -> None:
        helper()


def caught(call: object) -> BaseException:
    try:
        call()  # type: ignore[operator]
    except Exception as error:  # noqa: BLE001 - any of them is looked at
        return error
    raise AssertionError


def wrapping() -> None:
    try:
        Model().forward()
    except ValueError as error:
        msg = "outer"
        raise RuntimeError(msg) from error


def handling() -> None:
    try:
        Model().forward()
    except ValueError:
        msg = "outer"
        raise RuntimeError(msg)  # noqa: B904 - what was being handled is found too


@pytest.mark.parametrize("call", [Model().forward, wrapping, handling])
def test_the_innermost_line_under_forward_is_named_also_behind_other_errors(call):
    said = str(explain(caught(call)))
    found = re.search(r"code at test_capture_errors\.py:(\d+), in helper: raise ValueError", said)
    assert found, said


def test_without_a_forward_no_line_is_named_and_circles_end() -> None:
    assert ".py:" not in str(explain(caught(helper)))
    assert ".py:" not in str(explain(ValueError("never raised")))
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert ".py:" not in str(explain(first))


def test_lines_at_the_top_of_a_file_are_none_of_the_model() -> None:
    names: dict[str, object] = {}
    code = "def forward():\n    exec(compile('1 / 0', '/me/top.py', 'exec'))\n"
    exec(compile(code, "/me/net.py", "exec"), names)
    said = str(explain(caught(names["forward"])))
    assert "at net.py:2, in forward" in said
