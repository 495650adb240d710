# SPDX-License-Identifier: Apache-2.0
"""Corrected biases and compensated codes against sums in float64, and why others stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qgraph.calibration import Reservoir
from qgraph.calibration.gram_rounding import InputSums
from qgraph.calibration.output_ranges import row_importance
from qgraph.errors import ConfigError
from qgraph.formats import AffineEncoding, IntGrid
from qgraph.graph.build import attribute
from qgraph.graph.dialect import DEQUANTIZE, is_quantize
from qgraph.passes import (
    CompensateRounding,
    CorrectBiases,
    InsertQuantizers,
    compensate_rounding,
)
from qgraph.passes.compensate_rounding import input_rows, row_request
from tests.passes.by_hand import Hand, aten, normal, told

LINEAR = aten.linear.default
CONVS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}


def coarse(values: Tensor, bits: int, axis: int | None = None) -> AffineEncoding:
    """A min-max encoding of few bits."""
    grid = IntGrid(bits, signed=axis is not None)
    if axis is None:
        low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
        step = (high - low) / grid.qmax
        return AffineEncoding.per_tensor(step, round(-low / step), grid)
    peak = values.movedim(axis, 0).flatten(1).abs().amax(1)
    return AffineEncoding.symmetric(peak / grid.qmax, grid, axis)


def layer(
    dims: int = 0, *, rest: tuple[Any, ...] = (), bias: Any = "stored", data: bool = True,
    weight: Any = "stored", rows: int = 40, exact: bool = False,
) -> tuple[Hand, Any, Any]:  # fmt: skip
    """A linear (0) or a convolution of so many dimensions, with inputs that have a mean."""
    hand = Hand()
    size = (rows, 4) if dims == 0 else (rows, 4, *(5,) * dims)
    values = normal(*size) + 1.5
    groups = rest[3] if len(rest) > 3 else 1
    matrix = normal(6, 4 // groups, *(2, 3, 2)[:dims], seed=1)
    if exact:
        values, matrix = values.sign(), matrix.sign()
    x = hand.given("x", values)
    w = hand.stored("w", matrix)
    if weight == "computed":
        w = hand.call(aten.neg.default, w)
    held = [] if bias is None else [hand.stored("b", normal(6, seed=2))]
    if bias == "computed":
        held = [hand.call(aten.neg.default, held[0])]
    node = hand.call(CONVS[dims] if dims else LINEAR, x, w, *held, *rest, name="node")
    if data:
        site = hand.data_site(node, axis=1 if dims else -1)
        site.decide(coarse(values, 2 if not exact else 8), "test")
        if exact:
            site.decide(AffineEncoding.per_tensor(1.0, 0, IntGrid(4, signed=True)), "test")
    if weight is not None:
        chosen = coarse(w.meta["val"], 3, 0)
        if exact:
            chosen = AffineEncoding.per_tensor(1.0, 0, IntGrid(4, signed=True))
        hand.weight_site(node).decide(chosen, "test")
    return hand, node, x


def after(hand: Hand, *items: Any) -> tuple[Any, Any, list[bool]]:
    """The graph behind insert-quantizers and these passes."""
    return hand.run(InsertQuantizers(), *items)


@pytest.mark.parametrize("dims", [0, 1, 2, 3])
@pytest.mark.parametrize("relative", [0.0, 1.5])
def test_a_bias_takes_back_the_weighted_mean_of_what_outputs_lost(dims, relative):
    hand, node, x = layer(dims)
    chosen: Any = [s.encoding for s in hand.plan.sites]
    data, weight = chosen
    module, context, changed = after(hand, CorrectBiases(relative=relative, rows=64, per_sample=8))
    assert changed == [True, True]
    rows = context.statistics[x].get(Reservoir).sampled()
    w = normal(6, 4, *(2, 3, 2)[:dims], seed=1)
    whole, rounded = (m.double().reshape(6, 4, -1).sum(2) for m in (w, weight.fake(w)))
    lost = (rows.double() @ whole.T - data.fake(rows).double() @ rounded.T).numpy()
    power = row_importance(rows, whole.float(), relative).double().numpy()
    assert len(rows) == (40 if dims == 0 else 64)
    held = np.arange(len(rows)) % 2 == 0
    shift = np.average(lost[~held], axis=0, weights=power[~held])
    wanted = [float((part**2 * power[held, None]).sum()) for part in
              (lost[held], lost[held] - shift)]  # fmt: skip
    (line,) = told(context, "correct-biases")
    assert line.outcome == "applied"
    assert [line.numbers["before"], line.numbers["after"]] == pytest.approx(wanted, rel=1e-3)
    assert line.numbers["rows"] == len(rows)
    read: Any = node.args[2]
    mean = np.average(lost, axis=0, weights=power)
    found = attribute(module, str(read.target)).double().numpy()
    np.testing.assert_allclose(found, normal(6, seed=2).double().numpy() + mean, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bias": None}, "it has no stored bias"),
        ({"bias": "computed"}, "it has no stored bias"),
        ({"data": False}, None),
        ({"weight": None}, "its weight is settled, or an operand is in float"),
        ({"weight": "computed"}, "its weight is computed"),
        ({"dims": 1, "rest": ([1], [0], [1], 2)}, "it is a grouped convolution"),
        ({"dims": 2, "rest": ([1, 1], [0, 0], [1, 1], 2)}, "it is a grouped convolution"),
        ({"dims": 2, "rest": ([1, 1], [0, 0], [1, 1], 1)}, ""),
        ({"rows": 3}, "no rows of its input were sampled"),
        ({"rows": 4}, ""),
        ({"exact": True}, "the held-out error did not fall"),
    ],
)
def test_layers_that_cannot_be_corrected_say_why(options, reason):
    hand, node, _ = layer(**options)
    _, context, changed = after(hand, CorrectBiases())
    lines = told(context, "correct-biases")
    if reason is None:
        assert not lines
    elif reason:
        assert [d.reason for d in lines] == [reason]
        assert not changed[1]
        assert len(node.args) < 3 or "corrected" not in str(node.args[2])
    else:
        assert lines[0].outcome in {"applied", "refused"}
        assert "rows" in lines[0].numbers


def test_rows_are_asked_for_once_per_value_that_a_linear_or_convolution_reads():
    hand, _, x = layer(2)
    value = hand.call(aten.relu.default, x)
    mixed = hand.call(aten.matmul.default, value, value)
    hand.data_site(mixed, axis=-1)
    fc = hand.linear(mixed, normal(3, 5))
    hand.data_site(fc, axis=None)
    module = hand.module()
    context = hand.context(module)
    for item, rows in ((CorrectBiases(rows=9, per_sample=3), {x: 1, mixed: -1}),):
        asked = {r.node: dict(r.options) for r in item.statistics(module, context)}
        assert asked == {
            node: {"axis": axis, "rows": 9, "per_sample": 3} for node, axis in rows.items()
        }
    compensate = CompensateRounding(rows=9, per_sample=3)
    assert not list(compensate.statistics(module, context)), "no weight of a linear is planned"
    hand.weight_site(fc)
    assert [(r.node, dict(r.options)) for r in compensate.statistics(module, context)] == [
        (mixed, {"axis": -1, "rows": 9, "per_sample": 3})
    ]


def test_enough_rows_are_what_halves_can_be_made_of():
    CorrectBiases(rows=4)
    with pytest.raises(ConfigError, match="at least 4"):
        CorrectBiases(rows=3)


@pytest.mark.parametrize(("count", "least", "found"), [(5, 5, True), (5, 6, False), (6, 5, True)])
def test_too_few_rows_are_none(count, least, found):
    hand, node, x = layer(rows=count)
    _, context, _ = after(hand)
    seen = Reservoir(-1, 7, 2)
    seen.update(x.meta["val"])
    from qgraph.calibration import FusedStatistics

    context.statistics[x] = FusedStatistics([seen])
    quantize = node.args[0].args[0]
    rows = input_rows(context, quantize, -1, rows=7, least=least)
    assert (rows is not None) is found
    if rows is not None:
        assert rows.shape == (count, 4)
    assert input_rows(context, quantize, 1, rows=7, least=1) is None
    assert input_rows(context, quantize, -1, rows=8, least=1) is None
    assert input_rows(context, None, -1, rows=7, least=1) is None
    del context.statistics[x]
    assert input_rows(context, quantize, -1, rows=7, least=1) is None
    asked = row_request(x, 1, 7, 2)
    assert (asked.node, asked.kind) == (x, "Reservoir")
    assert dict(asked.options) == {"axis": 1, "rows": 7, "per_sample": 2}


@pytest.mark.parametrize("relative", [0.0, 1.5])
def test_codes_are_learned_from_seven_rows_and_judged_on_the_eighth(relative, monkeypatch):
    hand, node, x = layer(rows=100)
    chosen: Any = [s.encoding for s in hand.plan.sites]
    data, weight = chosen
    given: Any = []
    real = compensate_rounding.round_compensated  # type: ignore[attr-defined]

    def spy(values, encoding, gram, **options):
        found = real(values, encoding, gram, **options)
        given.append((values, gram, options, found.codes))
        return found

    monkeypatch.setattr(compensate_rounding, "round_compensated", spy)
    item = CompensateRounding(relative=relative, damping=0.2, ridge=0.5, rounds=3)
    module, context, changed = after(hand, item)
    assert changed[1]
    ((values, gram, options, codes),) = given
    w = normal(6, 4, seed=1)
    assert torch.equal(values, w)
    assert options == {"damping": 0.2, "ridge": 0.5, "rounds": 3}
    rows = context.statistics[x].get(Reservoir).sampled()
    power = row_importance(rows, w, relative)
    held = torch.arange(100) % 8 == 0
    wanted = InputSums(1, 6, 4)
    wanted.add(data.fake(rows)[None, ~held], rows[None, ~held], power[~held])
    ours, theirs = (
        {k: v for k, v in vars(each).items() if isinstance(v, Tensor)} for each in (gram, wanted)
    )
    assert ours
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    (line,) = told(context, item.name)
    rough, exact = data.fake(rows[held]).double(), (rows[held] @ w.T).double()
    importance = power[held].double()

    def error(chosen: Tensor) -> float:
        off = ((rough @ weight.decode(chosen).double().T - exact) ** 2).sum(1) @ importance
        return float(off / ((exact**2).sum(1) @ importance))

    assert line.numbers["before"] == pytest.approx(error(weight.encode(w)), rel=1e-3)
    assert line.numbers["after"] == pytest.approx(error(codes), rel=1e-3)
    assert line.numbers["rows"] == 100
    stored = next(
        attribute(module, str(n.target))
        for n in module.graph.nodes if n.op == "get_attr" and str(n.target).endswith("_codes")
    )  # fmt: skip
    assert torch.equal(stored.long(), codes.long())
    assert stored.dtype == weight.encode(w).dtype
    del node


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rows": 15}, "no rows of its input were sampled"),
        ({"rows": 16}, ""),
        ({"data": False}, "no rows of its input were sampled"),
        ({"exact": True}, "the held-out error did not fall"),
        ({"weight": "computed"}, None),
        ({"weight": None}, None),
        ({"dims": 1}, None),
    ],
)
def test_layers_that_keep_their_codes_say_why(options, reason):
    hand, _, _ = layer(**options)
    module, context, changed = after(hand, CompensateRounding())
    lines = told(context, "compensate-rounding")
    if reason:
        assert [d.reason for d in lines] == [reason]
        assert not changed[1]
        assert sum(is_quantize(n) for n in module.graph.nodes) == 1 + (options.get("data", True))
    elif reason is None:
        assert not lines
        assert not changed[1]
    else:
        assert lines[0].outcome in {"applied", "refused"}


@pytest.mark.parametrize("how", ["one pair", "two dequantizers", "alone"])
def test_a_weight_that_serves_several_is_left_alone(how):
    hand, node, x = layer(rows=40)
    if how != "alone":
        second = hand.call(LINEAR, x, node.args[1], node.args[2], name="second")
    module = hand.module()
    context = hand.context(module, CompensateRounding())
    InsertQuantizers().run(module, context)
    if how != "alone":
        pair = node.args[1]
        if how == "two dequantizers":
            with module.graph.inserting_after(pair):
                pair = module.graph.call_function(DEQUANTIZE, pair.args)
        second.args = (node.args[0], pair, *second.args[2:])
    changed = CompensateRounding().run(module, context)
    reasons = {d.reason for d in told(context, "compensate-rounding")}
    assert ("the weight serves others too" in reasons) is (how != "alone")
    assert changed is (how == "alone")


def test_what_cannot_be_solved_is_kept_with_the_reason(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        msg = "no solution"
        raise ConfigError(msg)

    monkeypatch.setattr(compensate_rounding, "round_compensated", refuse)
    _, context, changed = after(layer()[0], CompensateRounding())
    (line,) = told(context, "compensate-rounding")
    assert (line.outcome, line.reason, changed[1]) == ("kept", "no solution", False)
