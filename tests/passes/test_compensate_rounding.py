# SPDX-License-Identifier: Apache-2.0
import torch
from torch import nn

from qgraph.graph.dialect import is_quantize
from qgraph.passes import CompensateRounding
from tests.passes.rounding import rounded


def network(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24), nn.Tanh(), nn.Linear(24, 8)]
    return nn.Sequential(*layers).eval().requires_grad_(False)


def data(seed=0, count=6):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(24, 24, generator=torch.Generator().manual_seed(9))
    return [torch.randn(16, 10, 24, generator=generator) @ mix * 0.3 for _ in range(count)]


def compiled(model, *items, batches=None):
    return rounded(model, batches or data(), *items, scope="linear")


def error(module, model):
    x = torch.cat(data(seed=1))
    return float((module(x) - model(x)).square().mean())


def test_outputs_come_nearer_on_data_never_seen():
    model = network()
    plain, _ = compiled(model)
    better, lines = compiled(model, CompensateRounding())
    assert [d.outcome for d in lines] == ["applied"] * 3
    assert all(d.numbers["after"] < d.numbers["before"] for d in lines)
    assert error(better, model) < 0.7 * error(plain, model)
    assert not any(is_quantize(n) and n.args[0].op == "get_attr" for n in better.graph.nodes)


def test_a_layer_whose_held_out_error_rises_keeps_its_codes(monkeypatch):
    from qgraph.passes import compensate_rounding

    real = compensate_rounding.round_compensated  # type: ignore[attr-defined]

    def spoilt(weight, encoding, gram, **options):
        found = real(weight, encoding, gram, **options)
        found.codes.neg_()
        return found

    monkeypatch.setattr(compensate_rounding, "round_compensated", spoilt)
    model = network()
    module, lines = compiled(model, CompensateRounding())
    plain, _ = compiled(model)
    assert [d.outcome for d in lines] == ["refused"] * 3
    assert all(torch.equal(module(b), plain(b)) for b in data(seed=1))


def test_a_weight_that_serves_two_layers_and_an_input_without_rows_are_left_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(24, 24)

        def forward(self, x):
            return self.layer(self.layer(x).tanh())

    _, lines = compiled(Twice().eval().requires_grad_(False), CompensateRounding())
    assert {(d.outcome, d.reason) for d in lines} == {("kept", "the weight serves others too")}
    few = [batch[:1, :1] for batch in data(count=2)]
    _, lines = compiled(network(), CompensateRounding(), batches=few)
    assert {d.reason for d in lines} == {"no rows of its input were sampled"}
