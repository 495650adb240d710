# SPDX-License-Identifier: Apache-2.0
"""Turning a failed torch.export into an error that names the source line and a way out."""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass
from pathlib import Path

from qgraph.errors import CaptureError
from qgraph.graph.provenance import is_user_file, last_user_frame


@dataclass(frozen=True, slots=True)
class _Cause:
    """A kind of failure: how it shows, what happened, and what to do."""

    pattern: str
    happened: str
    cure: str


_CAUSES = (
    _Cause(
        r"GuardOnDataDependent|data-dependent|DataDependentOutput|_local_scalar_dense|"
        r"Could not (guard on|extract specialized)",
        "the code needs the value of a tensor to decide what to compute",
        "move that step (NMS, early exit, filtering) outside the model, or write it with "
        "torch.where or torch.cond",
    ),
    _Cause(
        r"Constraints violated|conflicts between user-specified|0/1 specialized|"
        r"marked .* as dynamic",
        "a dimension that dynamic_shapes declares dynamic is fixed by the model's code",
        "leave that dimension out of dynamic_shapes, or make the code independent of its size",
    ),
    _Cause(
        r"dynamic_shapes|dynamic shape",
        "dynamic_shapes does not fit the sample inputs",
        "give one entry per tensor input, named as in forward(), e.g. {'x': {0: Dim.AUTO}}",
    ),
    _Cause(
        r"numpy|Cannot call numpy|\.data_ptr|PyObject",
        "the code leaves torch (numpy, raw pointers) in the middle of forward()",
        "express the step with torch operations, or move it before or after the model",
    ),
    _Cause(
        r"Unsupported (in|out)put type|not registered|not a known type|"
        r"register_(dataclass|pytree|constant)|register a pytree",
        "an input or output is of a class that torch cannot take apart",
        "return tensors in tuples, dicts or dataclasses, or register the class with "
        "torch.export.register_dataclass",
    ),
    _Cause(
        r"torch\.autograd\.grad|requires grad|backward",
        "the code computes gradients inside forward()",
        "move the gradient computation outside the model",
    ),
)
_GENERIC = _Cause(
    "",
    "torch.export cannot follow the code",
    "run torch.export.export(model, args, strict=False) for the full story and rewrite the line "
    "with plain tensor operations, or move it outside the model",
)


def explain(error: BaseException) -> CaptureError:
    """The typed error for a failed export; raise it `from` the original."""
    text = f"{type(error).__name__}: {error}"
    cause = next((item for item in _CAUSES if re.search(item.pattern, text)), _GENERIC)
    line = last_user_frame(str(error)) or _line_of_traceback(error)
    first = text.strip().splitlines()[0][:300]
    place = f" at {line}" if line else ""
    return CaptureError(
        f"the model cannot be traced: {cause.happened}{place}. Way out: {cause.cure}. ({first})"
    )


def _line_of_traceback(error: BaseException | None) -> str:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        frames = traceback.extract_tb(error.__traceback__)
        for frame in reversed(frames):
            if (
                is_user_file(frame.filename)
                and frame.name != "<module>"
                and "forward" in {f.name for f in frames if is_user_file(f.filename)}
            ):
                return f"{Path(frame.filename).name}:{frame.lineno}, in {frame.name}: {frame.line}"
        error = error.__cause__ or error.__context__
    return ""
