# SPDX-License-Identifier: Apache-2.0
"""Law: doing it twice changes nothing more, for passes and for quantizers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from qgraph.errors import PassError
from qgraph.graph.verify import Sample, structure
from qgraph.pipeline import Pass
from qgraph.testing.failures import BrokenLawError, hold
from qgraph.testing.preparing import run_behind_prefix, traced
from qgraph.testing.quantizing import Quantizer, describe, fake


@overload
def assert_idempotent(subject: Pass, model: nn.Module, inputs: tuple[Any, ...]) -> None: ...
@overload
def assert_idempotent(subject: Quantizer, model: Tensor, inputs: None = None) -> None: ...
def assert_idempotent(
    subject: Pass | Quantizer, model: nn.Module | Tensor, inputs: tuple[Any, ...] | None = None
) -> None:
    """A second run of a pass returns False and changes nothing; ``Q(Q(x)) = Q(x)`` bit for bit.

    Args:
        subject: a pass, an `Encoding`, or a function from a tensor to a tensor of its shape.
        model: the model for a pass, the tensor for a quantizer.
        inputs: positional inputs of the model.

    Raises:
        BrokenLawError: for a pass, with a small graph as code.
        AssertionError: for a quantizer, with the first element that moves.
    """
    if isinstance(subject, Pass):
        assert isinstance(model, nn.Module), "a pass needs a model and its inputs"
        given = tuple(inputs or ())
        hold(lambda m, s: _settles(subject, m, s), traced(model, given), Sample(given))
        return
    assert isinstance(model, Tensor), "a quantizer needs a tensor"
    once = fake(subject, model)
    twice = fake(subject, once)
    if not torch.equal(once, twice):
        at = int((once != twice).flatten().nonzero()[0])
        values = (float(t.flatten()[at]) for t in (model, once, twice))
        msg = "{}: Q(Q(x)) is not Q(x): {!r} becomes {!r}, then {!r}"
        raise AssertionError(msg.format(describe(subject), *values))


def _settles(item: Pass, module: GraphModule, sample: Sample) -> None:
    after: Iterable[Pass] | None = None
    try:
        run = run_behind_prefix(item, module, sample, after=after)
        was = structure(run.after)
        changed = item.run(run.after, run.context)
    except PassError as error:
        raise BrokenLawError.of(error, item.name) from error
    if changed or structure(run.after) != was:
        old = {node.name for node in run.before.graph.nodes}
        new = [node.name for node in run.after.graph.nodes if node.name not in old]
        msg = f"{item.name}: a second run returned {changed} and made {new or 'other changes'}"
        raise BrokenLawError(msg, pass_name=item.name, node=new[0] if new else None)
