# SPDX-License-Identifier: Apache-2.0
"""Bits within budgets, on a small U-Net: the graph is counted, never the solver."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import qgraph
from qgraph import compiler
from qgraph.context import Context
from qgraph.errors import BudgetInfeasibleError, ConfigError
from qgraph.graph.bit_units import CARRIERS
from qgraph.graph.plan import Site
from qgraph.graph.trace import trace
from qgraph.passes import AssignBits
from qgraph.pipeline import Pass, Promise
from qgraph.report.accounting import Cost
from qgraph.sensitivity import observe
from tests.small_unet import images, tiny_unet


@pytest.fixture(scope="module")
def model():
    return tiny_unet()


@pytest.fixture(scope="module")
def data():
    return images()


BUDGETS = {"size": 0.13, "bops": 0.03, "activations": 0.21}


def cost_of(quantized: qgraph.QuantizedModel) -> Cost:
    assert quantized.report.cost is not None
    return quantized.report.cost


def bits_of(quantized) -> dict[str, tuple[int, int]]:
    found = {}
    for node in quantized.report.graph:
        if node.op == "conv":
            found[node.path] = (node.weight_bits, node.activation_bits)
    return found


@pytest.mark.parametrize("mode", ["spmix", "spmix_delta", "free", "greedy", "uniform"])
def test_every_budget_holds_on_the_rewritten_graph(model, data, mode):
    budget = BUDGETS if mode != "uniform" else {k: 1.6 * v for k, v in BUDGETS.items()}
    chosen = qgraph.pipeline("sirst_mixed", budget=budget, mode=mode)
    cost = cost_of(qgraph.compile(model, data, chosen))
    assert 1 / cost.weight_ratio <= budget["size"]
    assert 1 / cost.bit_operations_ratio <= budget["bops"]
    assert 1 / cost.activation_ratio <= budget["activations"]


def test_spmix_ties_the_decoder_to_the_encoder_and_deep_layers_get_no_more(model, data):
    found = bits_of(qgraph.compile(model, data, qgraph.pipeline("sirst_mixed", budget=BUDGETS)))
    assert found["first"] == found["merge"] == found["short"]
    assert found["deep"] == found["deeper"]
    assert all(deep <= shallow for deep, shallow in zip(found["deep"], found["first"], strict=True))
    assert found["stem"] == found["head"] == (8, 8)


@dataclass(frozen=True)
class LookAtPlan(Pass):
    """Shows a test the plan behind the pass before it."""

    name: ClassVar[str] = "look-at-plan"
    promise: ClassVar[Promise] = Promise.IDENTICAL
    seen: list[Site] = field(default_factory=list)

    def run(self, module: GraphModule, context: Context) -> bool:
        self.seen.extend(context.plan.activations())
        return False


def test_what_is_stored_for_a_concatenation_has_the_encoding_behind_it(model, data):
    look = LookAtPlan()
    chosen = qgraph.pipeline("sirst_mixed", budget=BUDGETS).insert_after("assign-bits", look)
    qgraph.compile(model, data, chosen)
    decided = [(s, s.encoding) for s in look.seen if s.encoding is not None]
    known = {(s.bits, float(e.scale)) for s, e in decided if s.kind not in CARRIERS}
    shared = [(s.bits, e) for s, e in decided if s.kind in CARRIERS]
    assert all(e.bits == bits for bits, e in shared)
    assert all((bits, float(e.scale)) in known for bits, e in shared)
    assert len(shared) >= 2, "the pool and a branch of the concatenation"


def test_free_is_never_worse_than_spmix_on_its_objective(model, data):
    omegas = {}
    for mode in ("spmix", "free"):
        chosen = qgraph.pipeline("sirst_mixed", budget=BUDGETS, mode=mode)
        told = qgraph.compile(model, data, chosen).report.decisions
        omegas[mode] = next(d.numbers["omega"] for d in told if d.site == "network")
    assert omegas["free"] <= omegas["spmix"]


def test_an_impossible_budget_names_the_resource_and_the_best_value(model, data):
    with pytest.raises(BudgetInfeasibleError, match="budget size") as caught:
        qgraph.compile(model, data, qgraph.pipeline("sirst_mixed", budget={"size": 0.01}))
    assert caught.value.resource == "size"
    cost = cost_of(qgraph.compile(model, data, qgraph.pipeline("sirst_w2a8")))
    assert caught.value.best_possible == pytest.approx(cost.weight_bytes)


@pytest.mark.parametrize("name", ["int8", "ris_int4", "vit_w4a8", "sam_int4"])
def test_a_budget_goes_into_every_family(name):
    built = qgraph.pipeline(name, budget={"size": 0.14})
    item = built["assign-bits"]
    assert isinstance(item, AssignBits)
    assert item.budget == {"size": 0.14}
    assert built.index("assign-bits") == built.index("calibrate") + 1


def test_a_budget_on_another_family_holds_and_the_integer_graph_equals_the_reference(model, data):
    chosen = qgraph.pipeline("int4", budget={"size": 0.12})
    quantized = qgraph.compile(model, data, chosen)
    assert 1 / cost_of(quantized).weight_ratio <= 0.12
    batch = data[0]
    assert torch.equal(quantized(batch), quantized.lower("reference")(batch))


def test_a_family_that_keeps_convolutions_at_8_bits_says_what_budget_it_can_meet(model, data):
    chosen = qgraph.pipeline("ris_int4", budget={"size": 0.12})
    with pytest.raises(BudgetInfeasibleError, match="cannot be met; best possible is"):
        qgraph.compile(model, data, chosen)


def test_mixed_precision_runs_the_same_in_integers_and_in_onnxruntime(model, data):
    quantized = qgraph.compile(model, data, qgraph.pipeline("sirst_mixed", budget=BUDGETS))
    widths = set(bits_of(quantized).values())
    assert len(widths) > 1
    batch = data[0]
    expected = quantized.lower("reference")(batch)
    assert torch.equal(quantized(batch), expected)
    run = quantized.lower("onnx")(batch)
    assert (run - expected).abs().max() <= 0.05 * expected.abs().max()


def test_the_report_shows_what_every_width_would_have_cost(model, data):
    report = qgraph.compile(model, data, qgraph.pipeline("sirst_mixed", budget=BUDGETS)).report
    chosen = [p for p in report.sensitivity if p.chosen]
    assert len(chosen) == 2 * len({"first", "deep", "deeper", "merge"})
    assert len(report.sensitivity) == 4 * (6 + 5)
    assert "Bits against sensitivity" in report.to_html()


def test_the_same_inputs_give_the_same_decisions(model, data):
    first, second = (
        qgraph.compile(model, data, qgraph.pipeline("sirst_mixed", budget=BUDGETS)).report
        for _ in range(2)
    )
    assert first.decisions == second.decisions


def test_names_of_nodes_decide_nothing(model, data):
    """The same graph, its nodes named in the opposite order of the alphabet."""
    plain, renamed = (trace(model, data[0]) for _ in range(2))
    inner = [n for n in renamed.graph.nodes if n.op == "call_function"]
    for number, node in enumerate(reversed(inner)):
        node.name = f"a{number:03d}"
    renamed.recompile()
    chosen = qgraph.pipeline("sirst_mixed", budget=BUDGETS)
    first, second = (bits_of(qgraph.compile(m, data, chosen)) for m in (plain, renamed))
    assert len(set(first.values())) > 1
    assert first == second


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": {"weight": 0.1}}, "unknown budget 'weight'"),
        ({"budget": {"size": 0.0}}, r"budget size=0.0; allowed: above 0"),
        ({"mode": "best"}, "unknown assignment mode"),
        ({"sensitivity": "magic"}, "unknown sensitivity method"),
        ({"output": "logits"}, "unknown kind of output"),
        ({"weight_choices": (1,)}, "bits is 1"),
        ({"activation_choices": ()}, "at least one weight width"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        AssignBits(**options)


def test_a_budget_in_milliseconds_counts_what_the_latency_model_says(model, data, monkeypatch):
    def price():
        return lambda node, bits: 1.0 if bits > 8 else 0.25

    monkeypatch.setattr(compiler, "price_of_products", price)
    wide = {"weight_choices": (4, 16), "activation_choices": (8, 16)}
    chosen = qgraph.pipeline("sirst_mixed", {"ms": 4.0}, mode="free", **wide)
    found = bits_of(qgraph.compile(model, data, chosen))
    spent = sum(1.0 if max(pair) > 8 else 0.25 for pair in found.values())
    assert spent <= 4.0
    assert any(max(pair) == 16 for pair in found.values())
    with pytest.raises(BudgetInfeasibleError, match="budget ms=1"):
        qgraph.compile(model, data, qgraph.pipeline("sirst_mixed", {"ms": 1.0}, mode="free"))


def test_milliseconds_without_a_latency_model_are_refused(model, data):
    module, context = observe(model, data, bits=(8, 8))
    with pytest.raises(ConfigError, match="needs a latency model"):
        AssignBits(budget={"ms": 5.0}).run(module, context)


class Tokens(nn.Module):
    """Two attention layers over tokens: no image, so levels are pseudo-levels."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu")
            for _ in range(2)
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


@pytest.mark.parametrize("name", ["int8", "ris_int4", "sam_int4", "vit_int4"])
def test_budgets_hold_for_transformers_in_every_family(name):
    torch.manual_seed(0)
    model = Tokens().eval()
    data = [torch.randn(4, 6, 8) for _ in range(2)]
    chosen = qgraph.pipeline(name, {"size": 0.15, "bops": 0.04})
    if name.startswith("vit"):
        chosen = chosen.without("reconstruct-blocks")
    quantized = qgraph.compile(model, data, chosen)
    cost = cost_of(quantized)
    assert 1 / cost.weight_ratio <= 0.15
    assert 1 / cost.bit_operations_ratio <= 0.04
    assert torch.equal(quantized(data[0]), quantized.lower("reference")(data[0]))
    run = quantized.lower("onnx")(data[0])
    assert run.shape == quantized(data[0]).shape
