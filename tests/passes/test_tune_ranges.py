# SPDX-License-Identifier: Apache-2.0
"""Tuning ranges by an objective: who is held out, what is kept, what is told."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from qgraph.calibration import global_tuning
from qgraph.calibration.filtered_loss import TeacherStudent
from qgraph.context import Context
from qgraph.errors import ConfigError
from qgraph.formats import AffineEncoding, IntGrid
from qgraph.graph.dialect import is_quantize
from qgraph.graph.trace import trace
from qgraph.graph.verify import Sample
from qgraph.passes import InsertQuantizers, TuneRanges, tune_ranges
from qgraph.passes.tune_ranges import adopt
from tests.passes.by_hand import Hand, normal


class Network:
    """Stands for the whole network: losses as told."""

    def __init__(self, losses: list[float], *, dynamic: bool) -> None:
        self.losses, self.asked = iter(losses), []  # type: ignore[var-annotated]
        self.module, self.inputs, self.made = trace(torch.nn.ReLU().eval(), normal(2, 4)), (), ()
        self.stream: Any = type("S", (), {"batching": type("B", (), {"dynamic": dynamic})})

    def mean_loss(self, module: Any, picks: Any, size: int) -> float:
        self.asked.append((picks, size))
        return next(self.losses)

    def learned(self, train: Any, size: int) -> Any:
        self.train = train, size
        write = lambda module: 2  # noqa: E731
        return type("L", (), {"write": staticmethod(write), "distinct": staticmethod(lambda: [1])})


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(
    ("losses", "applied"), [([1.0, 0.5], True), ([1.0, 1.0], False), ([1.0, 2.0], False)]
)
@pytest.mark.parametrize("guard", [[[3], [4]], [[], [4]], [[], []]])
def test_tuned_ranges_are_kept_where_the_held_out_objective_fell(
    losses, applied, dynamic, guard, monkeypatch
):
    told: Any = []
    given: Any = []
    network = Network(losses, dynamic=dynamic)
    monkeypatch.setattr(tune_ranges, "split", lambda *_: ([[1], [2]], guard))
    monkeypatch.setattr(tune_ranges, "extract", lambda *_: None)

    def descend(_network, _learned, schedule, train, *, seed, tick):
        given.append((schedule, train, seed))
        for step in range(21):
            tick(step)

    monkeypatch.setattr(tune_ranges, "descend", descend)
    monkeypatch.setattr(tune_ranges, "adopt", lambda *_: told.append("adopted"))
    context = Context(Sample(()), [], progress=lambda *seen: told.append(seen), seed=5)
    item = TuneRanges(steps=7, batch=3)
    assert item._tune(network, context) is applied  # type: ignore[arg-type]
    size = 32 if dynamic else 1
    held = guard if any(guard) else [[1], [2]]
    assert network.asked == [(held, size)] * 2
    ((schedule, train, seed),) = given
    assert (train, seed) == ([[1], [2]], 5)
    assert schedule == global_tuning.Schedule(7, 3 if dynamic else 1, 4e-3, 1e-2, 1e-3, 5e-4)
    assert told == [("tune-ranges", s, 7) for s in (0, 10, 20)] + ["adopted"] * applied
    (line,) = context.decisions
    assert (line.numbers["before"], line.numbers["after"]) == tuple(losses)
    assert line.outcome == ("applied" if applied else "refused")


@pytest.mark.parametrize(
    ("options", "fine"),
    [({"steps": 0}, True), ({"steps": -1}, False), ({"batch": 1}, True), ({"batch": 0}, False)],
)
def test_steps_and_batches_are_checked_right_at_their_limits(options, fine):
    if fine:
        TuneRanges(**options)
    else:
        with pytest.raises(ConfigError, match="allowed: steps >= 0, batch >= 1"):
            TuneRanges(**options)


def test_tuning_uses_the_users_adapter_and_does_nothing_without_an_objective(monkeypatch):
    seen: Any = []

    class StopError(Exception):
        pass

    def begin(module, batches, adapt, shelf, *, max_samples):
        seen.append((adapt, max_samples))
        raise StopError

    monkeypatch.setattr(tune_ranges, "begin", begin)
    module = trace(torch.nn.ReLU().eval(), normal(2, 4))
    mine: Any = lambda batch: ((batch,), {})  # noqa: E731
    loss = TeacherStudent(lambda a, b: (a - b).square().mean())
    for adapt in (mine, None):
        context = Context(Sample(()), [], adapt=adapt, loss=loss, reference=module)
        with pytest.raises(StopError):
            TuneRanges().run(module, context)
    assert seen[0] == (mine, 256)
    args, _ = seen[1][0](normal(2, 4))
    assert torch.equal(args[0], normal(2, 4))
    context = Context(Sample(()), [], loss=lambda out, batch: out.sum())
    assert TuneRanges().run(module, context) is False
    assert [d.outcome for d in context.decisions] == ["kept"]


def test_the_teacher_is_the_kept_float_network_or_the_graph_without_its_quantizers():
    values = normal(2, 4)
    hand = Hand()
    node = hand.linear(hand.given("x", values), normal(3, 4, seed=1), name="fc")
    hand.data_site(node).decide(AffineEncoding.per_tensor(0.5, 3, IntGrid(4, signed=False)), "test")
    module, context, _ = hand.run(InsertQuantizers())
    exact = values @ normal(3, 4, seed=1).T
    assert not torch.allclose(module(values), exact)
    twin = TuneRanges()._teacher(module, context)
    assert torch.allclose(twin(values), exact)
    assert any(is_quantize(n) for n in module.graph.nodes)
    kept = trace(torch.nn.ReLU().eval(), values)
    context.reference = kept
    assert TuneRanges()._teacher(module, context) is kept


def test_a_changed_copy_is_taken_over_with_its_new_tensors():
    module, changed = (trace(torch.nn.Linear(4, 3).eval(), normal(2, 4)) for _ in range(2))
    kept = module.get_parameter("weight")
    wanted = changed(normal(2, 4))
    changed.register_buffer("fresh", torch.ones(2))
    changed.add_module("inner", torch.nn.BatchNorm1d(3))
    for holder, value in ((module, 1.0), (changed, 2.0)):
        holder.register_buffer("known", torch.tensor(value))
    count = len(changed.graph.nodes)
    adopt(module, changed)
    assert torch.equal(module.get_buffer("fresh"), torch.ones(2))
    assert module.get_parameter("weight") is kept
    assert float(module.get_buffer("known")) == 1.0
    assert not hasattr(module, "inner")
    assert len(module.graph.nodes) == count
    assert not torch.equal(module(normal(2, 4)), wanted)


def test_a_loss_filter_that_keeps_nothing_is_told(caplog):
    logging.getLogger("qgraph")
    context = Context(Sample(()), [])
    network: Any = type("N", (), {"kept": staticmethod(lambda: None)})
    tune_ranges.report_filter(context, "x", network)
    assert not context.decisions
    for kept, outcome in ((3, "applied"), (0, "refused")):
        found = type("K", (), {"rows": 9, "confident": 5, "kept": kept, "mean_overlap": 0.5})()
        network = type("N", (), {"kept": staticmethod(lambda found=found: found)})
        tune_ranges.report_filter(context, "x", network)
        assert context.decisions[-1].outcome == outcome
        assert context.decisions[-1].numbers["kept"] == kept
    assert "no box survives" in caplog.text
