# SPDX-License-Identifier: Apache-2.0
"""What a broken law of graphs says: the pass, the node, and a small program that shows it."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from qgraph.errors import PassError, QGraphError
from qgraph.graph.verify import Sample
from qgraph.testing.code import graph_as_code
from qgraph.testing.shrinking import shrink

Check = Callable[[GraphModule, Sample], None]


class BrokenLawError(AssertionError):
    """A law does not hold.

    Attributes:
        pass_name, node: where; the node is None if none can be named.
        kind: of the failure, such as "promise"; shrinking keeps it.
        code: a Python program that builds the smallest graph found on which it fails.
    """

    def __init__(
        self,
        message: str,
        *,
        pass_name: str,
        node: str | None,
        code: str = "",
        kind: str = "promise",
    ) -> None:
        shown = (
            f"{message}\n\nthe smallest graph found that shows it:\n\n{code}" if code else message
        )
        super().__init__(shown)
        self.pass_name = pass_name
        self.node = node
        self.code = code
        self.kind = kind

    @classmethod
    def of(cls, error: PassError, pass_name: str) -> BrokenLawError:
        """What the manager found, as a broken law."""
        crashed = error.__cause__ is not None and not isinstance(error.__cause__, QGraphError)
        kind = "crash" if crashed else type(error).__name__
        return cls(str(error), pass_name=pass_name, node=error.node, kind=kind)


def hold(check: Check, module: GraphModule, sample: Sample) -> None:
    """Run a check of a traced graph; a failure comes back with the smallest graph that fails.

    Raises:
        BrokenLawError: the check failed.
    """
    try:
        check(module, sample)
    except BrokenLawError as error:
        kind = error.kind
        small, inputs = shrink(module, sample, lambda part, given: _fails(check, part, given, kind))
        code = graph_as_code(small, tree_leaves((inputs.args, inputs.kwargs)))
        raise BrokenLawError(
            str(error), pass_name=error.pass_name, node=error.node, code=code, kind=kind
        ) from error


def _fails(check: Check, part: GraphModule, sample: Sample, kind: str) -> bool:
    try:
        check(part, sample)
    except BrokenLawError as error:
        return error.kind == kind
    except (QGraphError, RuntimeError, ValueError, TypeError, IndexError):
        return False  # the part is no graph that the pass can be asked about
    return False
