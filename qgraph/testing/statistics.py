# SPDX-License-Identifier: Apache-2.0
"""Laws of statistics: they merge, and passes that rewrite transport them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from qgraph.calibration import FusedStatistics, Statistic, collect
from qgraph.graph.verify import Sample
from qgraph.pipeline import Pass
from qgraph.testing.failures import BrokenLawError
from qgraph.testing.preparing import run_behind_prefix, traced


def assert_mergeable(make: Callable[[], Statistic], x: Tensor, *, tolerance: float = 1e-6) -> None:
    """The summary does not depend on how samples (dim 0) were split, ordered or merged.

    Args:
        make: gives an empty statistic, such as ``lambda: Moments(axis=-1)``.
        x: samples along dim 0.
        tolerance: relative, for sums; extrema and counts agree exactly anyway.

    Raises:
        AssertionError: names the field that differs.
    """
    whole, split, other = make(), make(), make()
    whole.update(x)
    half = x.shape[0] // 2
    if half:
        other.update(x[half:])
    split.update(x[:half] if half else x)
    split.merge(other)
    _assert_same(whole, split, tolerance, "split in two and merged")
    backwards = make()
    for row in reversed(range(x.shape[0])):
        backwards.update(x[row : row + 1])
    _assert_same(whole, backwards, tolerance, "one by one in reverse order")


def assert_transports(
    item: Pass, model: nn.Module, inputs: Sequence[Any], *,
    after: Iterable[Pass] | None = None, tolerance: float = 1e-4,
) -> None:  # fmt: skip
    """After the pass, the statistics it left equal those that a new sweep would gather.

    Raises:
        BrokenLawError: names the pass, the value and the statistic.
    """
    module, sample = traced(model, inputs), Sample(tuple(inputs))
    run = run_behind_prefix(item, module, sample, after=after)
    kept = {k: v for k, v in run.context.statistics.items() if isinstance(k, Node)}
    fresh = {
        node: FusedStatistics(type(each)(**each.options()) for each in fused.statistics)
        for node, fused in kept.items()
    }
    with torch.no_grad():
        collect(run.after, [(sample.args, sample.kwargs)], fresh, adapt=run.context.adapt)
    for node, fused in kept.items():
        pairs = zip(fused.statistics, fresh[node].statistics, strict=True)
        for had, seen in pairs:
            try:
                _assert_same(seen, had, tolerance, "transported")
            except AssertionError as error:
                msg = (
                    f"{item.name}: statistics of {node.name} are not what a new sweep sees: {error}"
                )
                raise BrokenLawError(msg, pass_name=item.name, node=node.name) from error


def _assert_same(want: Statistic, got: Statistic, tolerance: float, how: str) -> None:
    first, second = want.fields(), got.fields()
    assert first.keys() == second.keys(), f"{want!r} {how}: fields {sorted(second)}"
    for name, value in first.items():
        a, b = value.double(), second[name].double()
        same = a.shape == b.shape and torch.allclose(
            a, b, rtol=tolerance, atol=tolerance * float(a[a.isfinite()].abs().max())
            if bool(a.isfinite().any()) else tolerance, equal_nan=True,
        )  # fmt: skip
        assert same, f"{want!r} {how}: field {name!r} differs"
