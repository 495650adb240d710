# SPDX-License-Identifier: Apache-2.0
"""Property tests of the example passes, as their authors would write them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import qgraph
from examples.passes.correct_biases import CorrectBiases
from examples.passes.pool_before_relu import PoolBeforeRelu
from examples.passes.use_power_weights import UsePowerWeights, power_encoding, power_levels
from qgraph import testing

few = settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Pooled(nn.Module):
    """A ReLU in front of a pool, and one that is read twice."""

    def __init__(self, kernel: int, *, twice: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.pool, self.twice = nn.Conv2d(3, 4, 3), nn.MaxPool2d(kernel), twice

    def forward(self, x):
        y = torch.relu(self.conv(x))
        return self.pool(y) + (y.mean((2, 3), keepdim=True) if self.twice else 0.0)


@few
@given(kernel=st.integers(2, 3), x=testing.tensors(shape=(2, 3, 9, 9)))
def test_pooling_first_preserves_settles_and_happens(kernel, x):
    model = Pooled(kernel, twice=False).eval()
    after = testing.assert_preserves(PoolBeforeRelu(), model, (x,))
    testing.assert_idempotent(PoolBeforeRelu(), model, (x,))
    names = [str(n.target) for n in after.graph.nodes]
    assert names.index("aten.max_pool2d.default") < names.index("aten.relu.default")


def test_a_relu_with_two_readers_stays_and_the_report_says_why():
    model, x = Pooled(2, twice=True).eval(), torch.randn(2, 3, 9, 9)
    pipeline = qgraph.pipeline("int8").insert_before("plan-sites", PoolBeforeRelu())
    refused = [
        d for d in qgraph.compile(model, [x], pipeline).report.decisions
        if d.by == "pool-before-relu"
    ]  # fmt: skip
    assert [(d.outcome, d.reason) for d in refused] == [("refused", "relu is also read by mean")]


def corrected(bits):
    base = qgraph.pipeline(f"w{bits}a8", scope="linear", ends_bits=bits)
    return base.insert_after("choose-weight-scales", CorrectBiases())


@few
@given(x=testing.tensors(shape=(32, 6), kinds=["normal", "one_sided", "bimodal"]))
def test_the_mean_of_each_output_comes_back(x):
    torch.manual_seed(0)
    model = nn.Linear(6, 5).eval()
    pipeline = corrected(3).without("quantize-biases")  # which rounds them a little
    quantized = qgraph.compile(model, [x], pipeline, verify=False)
    graph = quantized.graph_module
    linear = next(n for n in graph.graph.nodes if n.target is torch.ops.aten.linear.default)
    runner = torch.fx.Interpreter(graph, garbage_collect_values=False)
    with torch.no_grad():
        runner.run(x)
        weight, bias = runner.env[linear.args[1]], runner.env[linear.args[2]]
        gap = (nn.functional.linear(x, weight, bias) - model(x)).mean(0).abs().max()
        lost = (nn.functional.linear(x, weight, model.bias) - model(x)).mean(0).abs().max()
    assert float(gap) < 1e-5 * float(x.abs().max())
    assert float(lost) > 1e-3


def test_biases_that_cannot_be_corrected_say_why():
    model, x = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 2)).eval(), torch.randn(8, 6)
    quantized = qgraph.compile(model, [x], corrected(4))
    mine = [d for d in quantized.report.decisions if d.by == "correct-biases"]
    assert [(d.outcome, d.reason) for d in mine] == [
        ("refused", "it has no bias"), ("applied", "mean given back"),
    ]  # fmt: skip
    early = qgraph.pipeline("w4a8").insert_before("choose-weight-scales", CorrectBiases())
    decisions = qgraph.compile(model, [x], early).report.decisions
    assert any("move this pass behind" in d.reason for d in decisions)


@given(bits=st.integers(2, 4), weight=testing.tensors(shape=(4, 7)))
def test_power_levels_obey_the_laws_of_quantizers(bits, weight):
    encoding = power_encoding(weight, bits)
    testing.assert_monotone(encoding, weight)
    testing.assert_idempotent(encoding, weight)
    testing.assert_in_range(encoding, weight)
    testing.assert_permutation_invariant(encoding, weight, axis=1)
    magnitude = power_levels(bits).abs()
    assert bool(((magnitude & (magnitude - 1)) == 0).all())


def test_a_model_with_power_weights_runs_on_every_backend_and_saves():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 8), nn.Linear(8, 3)]
    model, x = nn.Sequential(*layers).eval(), torch.randn(4, 3, 6, 6)
    base = qgraph.pipeline("w4a8", ends_bits=4)
    pipeline = base.insert_before("choose-weight-scales", UsePowerWeights())
    quantized = qgraph.compile(model, [x], pipeline)
    formats = {r.format for r in quantized.report.layers if r.role == "weight"}
    assert formats == {"signed powers of two 4-bit per channel"}
    testing.assert_parity(quantized)
    testing.assert_exports(quantized)
    testing.assert_survives_saving(quantized)


def test_widths_that_the_format_has_not_are_refused():
    with pytest.raises(qgraph.ConfigError, match="2 to 4 bits"):
        UsePowerWeights(bits=5)
