# SPDX-License-Identifier: Apache-2.0
"""Law: a pass that promises to keep the function keeps it, on more than one sample."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from qgraph.errors import ConfigError, PassError
from qgraph.graph.verify import Sample, difference, first_difference, where
from qgraph.pipeline import Pass
from qgraph.testing.failures import BrokenLawError, hold
from qgraph.testing.preparing import run_behind_prefix, traced
from qgraph.testing.probes import probes


def assert_preserves(
    item: Pass, model: nn.Module, inputs: Sequence[Any], *,
    after: Iterable[Pass] | None = None, batches: Iterable[Any] | None = None,
) -> GraphModule:  # fmt: skip
    """The pass changes outputs by no more than it promises; returns the rewritten graph.

    The manager's checks run too (well-formed graph, metadata, honest bool). Outputs before and
    after are compared on the inputs, on their negative, zero, larger, heavy-tailed and permuted
    variants, and at other batch sizes.

    Args:
        item: the pass; its promise is `IDENTICAL` or `EQUIVALENT`.
        model: a model in eval mode, or a traced graph.
        inputs: positional inputs.
        after: passes to run first; default: those of ``int8`` that establish what it requires.
        batches: calibration batches; default: the inputs.

    Raises:
        BrokenLawError: names the pass and the node and shows a small graph as code.
        ConfigError: the pass promises nothing about outputs, or cannot run.
    """
    if item.claim().allowed is None:
        msg = f"{item.name} promises nothing about outputs ({item.promise.value})"
        raise ConfigError(msg)
    prefix = None if after is None else tuple(after)
    given = None if batches is None else list(batches)
    module, sample = traced(model, inputs), Sample(tuple(inputs))
    results: list[GraphModule] = []

    def check(part: GraphModule, at: Sample) -> None:
        data = given if part is module else None
        results.append(_check(item, part, at, prefix, data))

    hold(check, module, sample)
    return results[0]


def _check(
    item: Pass, module: GraphModule, sample: Sample, prefix: tuple[Pass, ...] | None,
    batches: list[Any] | None,
) -> GraphModule:  # fmt: skip
    try:
        run = run_behind_prefix(item, module, sample, after=prefix, batches=batches)
    except PassError as error:
        if error.pass_name != item.name:
            raise
        raise BrokenLawError.of(error, item.name) from error
    allowed = item.claim().allowed
    assert allowed is not None, "checked by the caller"
    for name, at in probes(sample, dynamic=run.dynamic):
        was, now = outputs(run.before, at), outputs(run.after, at)
        gap = difference(was, now)
        if gap > allowed:
            node, moved = first_difference(run.before, run.after, at, allowed)
            place = "an output" if node is None else where(node)
            msg = (
                f"{item.name} promises {item.promise.value}, but on inputs {name!r} outputs differ "
                f"by {gap:.3g} of their largest value (allowed {allowed:.3g}); "
                f"first at {place}, by {moved:.3g}"
            )
            raise BrokenLawError(msg, pass_name=item.name, node=None if node is None else node.name)
    return run.after


def outputs(module: GraphModule, sample: Sample) -> list[Tensor]:
    """The tensors that a graph returns."""
    with torch.no_grad():
        result = module(*sample.args, **sample.kwargs)
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
