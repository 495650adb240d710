# SPDX-License-Identifier: Apache-2.0
"""The one sweep, alone and as any rank of a job: which batches it sees and what it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from qgraph.calibration.ranks import Ranks
from qgraph.context import Context
from qgraph.errors import CalibrationError
from qgraph.graph.requests import Request
from qgraph.passes import Calibrate, calibrate
from qgraph.pipeline import Pass, Pipeline, Promise
from tests.passes.by_hand import Hand, aten


@dataclass(frozen=True)
class Asking(Pass):
    """Asks for the range of what the graph gives."""

    name: ClassVar[str] = "asking"
    promise: ClassVar[Promise] = Promise.IDENTICAL

    def run(self, module: Any, context: Context) -> bool:
        return False

    def statistics(self, module: Any, context: Context) -> Any:
        return [Request(node, "Range") for node in module.graph.nodes if node.name == "double"]


@dataclass(frozen=True)
class Heard(Ranks):
    """A rank whose fellows say what it says itself, in place of messages."""

    def gather(self, text: str, what: str) -> list[str]:
        return [text] * self.size


def batches(count: int) -> list[Tensor]:
    """Batch n holds n + 1 in every place."""
    return [torch.full((2, 3), n + 1.0) for n in range(count)]


def swept(
    monkeypatch: Any, item: Calibrate, count: int, ranks: Ranks | None = None, *, asked: bool = True
) -> tuple[Context, Any]:
    """Run the pass on y = 2 x as such a rank; `asked`: in a pipeline that wants the range of y."""
    if ranks is not None:
        monkeypatch.setattr(calibrate, "Ranks", SimpleNamespace(here=lambda: ranks))
    hand = Hand()
    hand.call(aten.mul.Tensor, hand.given("x", torch.ones(2, 3)), 2.0, name="double")
    module = hand.module()
    context = hand.context(module)
    context.batches, context.adapt = batches(count), lambda batch: ((batch,), {})
    context.pipeline = Pipeline("test", (item, Asking())) if asked else None
    assert item.run(module, context) is False
    return context, module


@pytest.mark.parametrize(
    ("most", "rank", "size", "seen"),
    [
        (None, 0, 1, [1, 2, 3, 4, 5]), (3, 0, 1, [1, 2, 3]), (9, 0, 1, [1, 2, 3, 4, 5]),
        (None, 0, 2, [1, 3, 5]), (None, 1, 2, [2, 4]), (3, 0, 2, [1, 3]), (3, 1, 2, [2]),
        (None, 2, 3, [3]), (4, 2, 3, [3]), (2, 1, 3, [2]),
    ],
)  # fmt: skip
def test_a_rank_sees_its_own_of_the_first_batches(monkeypatch, most, rank, size, seen):
    context, module = swept(monkeypatch, Calibrate(max_batches=most), 5, Heard(rank, size))
    (double,) = [n for n in module.graph.nodes if n.name == "double"]
    assert list(context.statistics) == [double]
    assert context.statistics[double].range().bounds() == (2.0 * min(seen), 2.0 * max(seen))
    assert context.num_batches == size * len(seen), "the sum over ranks, which here say the same"


@pytest.mark.parametrize(("count", "most"), [(0, None), (3, 0)])
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (0, 3)])
def test_no_batch_at_all_is_an_error_of_the_first_rank(monkeypatch, count, most, rank, size):
    with pytest.raises(CalibrationError, match="gave 0 batches"):
        swept(monkeypatch, Calibrate(max_batches=most), count, Heard(rank, size))


@pytest.mark.parametrize(("count", "most"), [(1, None), (3, 1)])
@pytest.mark.parametrize("rank", [1, 2])
def test_a_rank_behind_the_first_may_have_no_batch(monkeypatch, count, most, rank):
    context, _ = swept(monkeypatch, Calibrate(max_batches=most), count, Heard(rank, 3))
    assert context.num_batches == 0


def test_outside_a_pipeline_nobody_asks_and_the_batches_are_checked_all_the_same(monkeypatch):
    context, module = swept(monkeypatch, Calibrate(), 4, asked=False)
    assert not context.statistics
    assert context.num_batches == 4
    assert context.reference is not None
    assert context.reference is not module


def test_the_reference_keeps_the_graph_of_the_sweep(monkeypatch):
    context, module = swept(monkeypatch, Calibrate(), 1)
    before = module.code
    for node in list(module.graph.nodes):
        if node.name == "double":
            node.args = (node.args[0], 3.0)
    module.recompile()
    assert context.reference is not None
    assert context.reference.code == before
    assert torch.equal(context.reference(torch.ones(2, 3)), torch.full((2, 3), 2.0))
