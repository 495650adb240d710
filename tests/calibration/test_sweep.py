# SPDX-License-Identifier: Apache-2.0
"""The sweep: what it gathers, what it accepts, and what it says when something is wrong."""

from __future__ import annotations

import collections
import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from qgraph.calibration import (
    FusedStatistics,
    JointReservoir,
    Range,
    Reservoir,
    Signature,
    adapter,
    build_statistics,
    collect,
    first_batch,
)
from qgraph.errors import CalibrationError
from qgraph.graph.requests import Request
from qgraph.graph.trace import trace


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 2)

    def forward(self, x, gate=None):
        hidden = torch.log(self.first(x).abs() + 1e-3)
        return self.second(hidden if gate is None else hidden * gate)


@pytest.fixture(name="one", scope="module")
def _one():
    torch.manual_seed(0)
    return trace(Two().eval(), torch.randn(2, 4))


@pytest.fixture(name="both", scope="module")
def _both():
    torch.manual_seed(0)
    return trace(Two().eval(), torch.randn(2, 4), gate=torch.randn(2, 6))


def linears(module: GraphModule) -> list[Any]:
    return [n for n in module.graph.nodes if "linear" in str(n.target)]


def test_every_requested_value_is_summarised_over_all_batches(one):
    batches = [torch.randn(3, 4) for _ in range(4)]
    statistics = build_statistics(
        [Request(n.args[0], kind) for n in linears(one) for kind in ("Range", "Histogram")]
    )
    code = one.code
    assert collect(one, batches, statistics) == 4
    assert one.code == code
    x = torch.cat(batches)
    entry = statistics[linears(one)[0].args[0]]
    assert entry.range().bounds() == (float(x.min()), float(x.max()))
    hidden = torch.log(nn.functional.linear(x, one.first.weight, one.first.bias).abs() + 1e-3)
    low, high = statistics[linears(one)[1].args[0]].range().bounds()
    assert low == pytest.approx(float(hidden.min()), rel=1e-5)
    assert high == pytest.approx(float(hidden.max()), rel=1e-5)


def test_inputs_can_be_observed_wherever_the_graph_keeps_its_placeholders():
    module = trace(nn.Sequential(nn.Linear(4, 2)).eval(), torch.randn(2, 4))
    inputs = next(node for node in module.graph.nodes if node.op == "placeholder")
    statistics = {inputs: FusedStatistics([Range()])}
    collect(module, [torch.ones(2, 4)], statistics)
    assert statistics[inputs].range().bounds() == (1.0, 1.0)


def test_joint_statistics_see_several_values_at_the_same_rows(one):
    first, second = linears(one)
    pair = (first.args[0], first)
    options = (("leads", (1, 1)), ("rows", 8))
    statistics = build_statistics([Request(pair[0], "JointReservoir", options, (pair[1],))])
    collect(one, [torch.randn(3, 4), torch.randn(4, 4)], statistics)
    rows, outputs = statistics[pair].get(JointReservoir).sampled()
    assert rows.shape == (7, 4)
    torch.testing.assert_close(
        nn.functional.linear(rows, one.first.weight, one.first.bias), outputs
    )
    assert second is not first


def test_equal_requests_are_served_once(one):
    node = linears(one)[0]
    statistics = build_statistics([Request(node, "Range"), Request(node, "Range")])
    assert len(statistics[node].statistics) == 1


def test_padding_rows_do_not_vote():
    module = trace(Two().eval(), torch.randn(2, 3, 4))
    node = linears(module)[0].args[0]
    x = torch.ones(2, 3, 4)
    x[:, 2] = 100.0
    mask = torch.tensor([[True, True, False], [True, False, False]])
    statistics = {node: FusedStatistics([Range(), Reservoir()])}
    collect(module, [x], statistics, row_masks=lambda args, kwargs: mask)
    assert statistics[node].range().bounds() == (1.0, 1.0)
    assert statistics[node].get(Reservoir).sampled().shape == (3, 4)


def test_batches_stop_at_the_limit_and_progress_is_told(one):
    seen = []
    count = collect(
        one, [torch.randn(2, 4)] * 5, {}, max_batches=2, progress=lambda *a: seen.append(a)
    )
    assert count == 2
    assert seen == [("calibrate", 1, 2), ("calibrate", 2, 2)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_value_names_batch_node_module_and_line(one, bad):
    node = linears(one)[1].args[0]
    poisoned = torch.randn(3, 4)
    poisoned[1, 2] = bad
    with pytest.raises(CalibrationError) as caught:
        collect(one, [torch.randn(3, 4), poisoned], {node: [Range()]})
    message = str(caught.value)
    assert message.startswith("batch 1: 6 non-finite values")
    assert node.name in message
    assert "test_sweep.py:" in message
    assert "torch.log" in message


def test_unchecked_values_may_be_infinite(one):
    node = linears(one)[0].args[0]
    statistics = {node: FusedStatistics([Range()], check=False)}
    assert collect(one, [torch.full((2, 4), -float("inf"))], statistics) == 1
    assert statistics[node].range().bounds() == (0.0, 0.0)


def test_empty_exhausted_and_short_loaders_are_refused(one):
    with pytest.raises(CalibrationError, match=r"gave 0 batches$"):
        collect(one, [], {})
    once = iter([torch.randn(2, 4)])
    assert collect(one, once, {}) == 1
    with pytest.raises(CalibrationError, match=r"0 batches .a one-shot iterator"):
        collect(one, once, {})

    class Short(list[torch.Tensor]):
        def __len__(self) -> int:
            return 3

    with pytest.raises(CalibrationError, match="ran dry: it gave 1 of the 3"):
        collect(one, Short([torch.randn(2, 4)]), {})


@pytest.mark.parametrize(
    "batch",
    [torch.randn(2, 5), torch.randn(2, 3, 4), torch.zeros(0, 4), torch.ones(2, 4, dtype=torch.int)],
    ids=["size", "rank", "empty", "dtype"],
)
def test_wrong_shapes_show_both_sides(one, batch):
    with pytest.raises(CalibrationError, match=r"batch 0: input 'x' is .*takes float32\[s"):
        collect(one, [batch], {})


def test_a_batch_on_another_device_names_both(one):
    with pytest.raises(CalibrationError, match="'x' is on meta, the model on cpu"):
        collect(one, [torch.empty(2, 4, device="meta")], {})


def test_a_batch_on_which_the_graph_fails_names_the_node(both):
    with pytest.raises(CalibrationError, match=r"batch 0: mul.*failed: .*size of tensor"):
        collect(both, [{"x": torch.randn(3, 4), "gate": torch.randn(2, 6)}], {})


def test_statistics_of_a_foreign_node_are_refused(one, both):
    with pytest.raises(CalibrationError, match="not of this graph"):
        collect(one, [torch.randn(2, 4)], {linears(both)[0]: [Range()]})


def test_all_common_forms_of_a_batch_reach_the_model(one, both):
    x, gate = torch.randn(3, 4), torch.randn(3, 6)
    label = torch.tensor([0, 1, 0])
    pair = collections.namedtuple("pair", "x label")
    alone: tuple[Any, ...] = (
        x,
        (x,),
        [x],
        {"x": x},
        ((x,), {}),
        (x, label),
        pair(x, label),
        ({"x": x}, label),
    )
    for batch in alone:
        args, kwargs = adapter(one)(batch)
        assert (len(args), kwargs) == (1, {})
        assert args[0] is x
    together: tuple[Any, ...] = (
        (x, gate),
        {"gate": gate, "x": x},
        ((x,), {"gate": gate}),
        ([x, gate], label),
        collections.UserDict(x=x, gate=gate),
        collections.OrderedDict(x=x, gate=gate),
    )
    for batch in together:
        args, kwargs = adapter(both)(batch)
        given = [*args, *kwargs.values()]
        assert given[0] is x
        assert given[1] is gate
        both(*args, **kwargs)
    args, _ = adapter(one, transform=lambda batch: batch["image"])({"image": x})
    assert args[0] is x


def test_extra_names_are_left_out_with_one_warning(one, caplog):
    adapt = adapter(one)
    with caplog.at_level(logging.WARNING, logger="qgraph"):
        for _ in range(2):
            adapt({"x": torch.randn(2, 4), "labels": torch.ones(2)})
    assert [r.message for r in caplog.records if "labels" in r.message] == [
        "calibration batches hold {'labels'}, which the model does not take"
    ]


@pytest.mark.parametrize(
    "batch", ["text", {"y": torch.ones(2, 4)}, (torch.ones(2), torch.ones(2), torch.ones(2)), None]
)
def test_other_batches_show_their_type_and_the_signature(one, batch):
    with pytest.raises(CalibrationError, match=r"batch of type .*takes \(x: float32\[.*transform="):
        adapter(one)(batch)


def test_the_signature_reads_well(both):
    assert str(Signature.of(both)).startswith("(x: float32[")
    assert Signature.of(both).keyword == ("gate",)
    with pytest.raises(CalibrationError, match="the model takes"):
        Signature.of(both).flat((torch.ones(1, 4),), {})


def test_plain_graph_modules_have_a_signature_too():
    module = torch.fx.symbolic_trace(nn.Linear(4, 2))
    node = next(n for n in module.graph.nodes if n.op == "call_function")
    statistics = {node: FusedStatistics([Range()])}
    assert collect(module, [torch.randn(2, 4)], statistics) == 1
    assert statistics[node].range().bounds()[0] < statistics[node].range().bounds()[1]


def test_the_first_batch_is_not_lost():
    batch, loader = first_batch(torch.full((2,), float(i)) for i in range(3))
    assert float(batch[0]) == 0.0
    for _ in range(2):
        assert [float(b[0]) for b in loader] == [0.0, 1.0, 2.0]
    kept = [torch.ones(1)]
    assert first_batch(kept)[1] is kept
    nothing: tuple[Any, ...] = ([], iter([]))
    for empty in nothing:
        with pytest.raises(CalibrationError, match="0 batches"):
            first_batch(empty)
    with pytest.raises(CalibrationError, match=r"one-shot iterator of more than 64 bytes .1 batch"):
        first_batch((torch.ones(10) for _ in range(3)), cap=64)
    with pytest.raises(CalibrationError, match="a int, which is not iterable"):
        first_batch(3)  # type: ignore[arg-type]
