# SPDX-License-Identifier: Apache-2.0
"""Passes that rewrite by rule, on graphs written by hand: honest, exact, no further than told."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from qgraph.calibration.ranks import Ranks
from qgraph.context import Context
from qgraph.errors import PassError
from qgraph.formats import AffineEncoding, IntGrid, LevelEncoding
from qgraph.formats.dual_region import dual_region
from qgraph.graph.build import attribute, insert_buffer
from qgraph.graph.dialect import DEQUANTIZE, QUANTIZE, QUANTIZE_LEVELS, encoding_of, is_quantize
from qgraph.graph.trace import trace
from qgraph.graph.verify import Sample
from qgraph.passes import (
    Calibrate,
    ChooseRanges,
    DropNoops,
    FoldBatchNorm,
    HoistQuantizers,
    InsertQuantizers,
    NormalizeOps,
    OpenAttention,
    PackWeights,
    calibrate,
    drop_noops,
    fold_batch_norm,
    normalize_ops,
    open_attention,
)
from qgraph.passes.insert_quantizers import parameter_nodes
from qgraph.pipeline import Pipeline
from tests.passes.by_hand import Hand, aten, normal

STEPS: list[tuple[Any, Any, tuple[str, ...]]] = [
    (DropNoops(), drop_noops, ("drop_asserts", "drop_noops")),
    (NormalizeOps(), normalize_ops,
     ("rename_ops", "recompose_norms", "specialise_convolutions", "drop_noops",
      "decompose_einsum", "recompose_products", "fold_constants")),
    (OpenAttention(), open_attention, ("decompose_attention", "drop_noops", "fold_constants")),
    (FoldBatchNorm(), fold_batch_norm, ("fold_batch_norm", "fold_channel_affine")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("item", "home", "names"), STEPS, ids=lambda each: getattr(each, "name", "")
)
def test_a_pass_of_several_rewrites_runs_them_all_and_tells_if_any_changed_something(
    item, home, names, monkeypatch
):
    context = Context(sample=Sample(()), batches=[])
    for one in (None, *names):
        ran: Any = []
        for name in names:
            monkeypatch.setattr(
                home, name, lambda _, n=name, told=one == name, ran=ran: (ran.append(n), told)[1]
            )
        assert item.run(Hand().graph, context) is (one is not None)
        assert ran == list(names)


SIGNED, UNSIGNED = IntGrid(8, signed=True), IntGrid(8, signed=False)
PLAIN = AffineEncoding.per_tensor(0.5, 3, UNSIGNED)


def layer(*chosen: Any) -> tuple[Hand, Any, list[Any]]:
    """A value that several linears read, each operand decided as told."""
    hand = Hand()
    x = hand.given("x", normal(3, 4))
    hand.given("unused", normal(2))
    value = hand.call(aten.tanh.default, x, name="value")
    nodes = []
    for number, encoding in enumerate(chosen):
        node = hand.linear(value, normal(5, 4, seed=number), name=f"fc{number}")
        if encoding is not None:
            hand.data_site(node).decide(encoding, "test")
        nodes.append(node)
    return hand, value, nodes


def test_readers_of_one_decision_share_a_pair_of_nodes_and_others_have_their_own():
    other = AffineEncoding.per_tensor(0.5, 3, UNSIGNED)
    hand, value, nodes = layer(PLAIN, PLAIN, other, None)
    module, _, changed = hand.run(InsertQuantizers())
    assert changed == [True]
    reads = [n.args[0] for n in nodes]
    assert reads[0] is reads[1] is not reads[2]
    assert reads[3] is value
    assert sum(n.target is QUANTIZE for n in module.graph.nodes) == 2
    wanted = PLAIN.fake(value.meta["val"]) @ normal(5, 4).T
    assert torch.allclose(wanted, aten.linear.default(PLAIN.fake(value.meta["val"]), normal(5, 4)))
    module.graph.lint()
    hand, _, nodes = layer(None)
    assert hand.run(InsertQuantizers())[2] == [False]
    hand, _, nodes = layer(PLAIN)
    hand.plan.sites[0].encoding = None
    with pytest.raises(PassError, match="no pass decided a format"):
        hand.run(InsertQuantizers())


def test_inputs_are_quantized_behind_all_inputs_and_stored_tensors():
    hand = Hand()
    x, _ = hand.given("x", normal(3, 4)), hand.given("y", normal(3, 4))
    node = hand.linear(x, normal(5, 4), name="fc")
    hand.data_site(node).decide(PLAIN, "test")
    hand.weight_site(node).decide(AffineEncoding.per_tensor(0.5, 0, SIGNED), "test")
    module, _, _ = hand.run(InsertQuantizers())
    order = [n.op for n in module.graph.nodes]
    assert order[:2] == ["placeholder", "placeholder"]
    module.graph.lint()
    quantize = [n for n in module.graph.nodes if is_quantize(n)]
    assert [n.args[0].name for n in quantize] == ["x", "fc_weight"]
    assert quantize[0].meta["val"].shape == (3, 4)
    got = module(normal(3, 4), normal(3, 4))
    w = AffineEncoding.per_tensor(0.5, 0, SIGNED).fake(normal(5, 4))
    assert torch.allclose(got, PLAIN.fake(normal(3, 4)) @ w.T, atol=1e-5)


def channels(**options: Any) -> AffineEncoding:
    scale = (
        torch.rand(*options.pop("shape", (4,)), generator=torch.Generator().manual_seed(0)) + 0.5
    )
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return AffineEncoding(scale=scale, zero_point=zero, qmin=-128, qmax=127, **options)


REGIONS = dual_region(4, 2, high=1.5)
ENCODINGS = {
    "tensor": PLAIN,
    "channel": channels(axis=1),
    "negative axis": channels(axis=-1),
    "first axis": channels(axis=0, shape=(3,)),
    "blocks": channels(axis=1, block=2, shape=(3, 2)),
    "levels": REGIONS,
    "levels by channel": LevelEncoding(
        scale=torch.rand(4) + 0.5, levels=REGIONS.levels, thresholds=REGIONS.thresholds,
        name="table", storage_bits=4, axis=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODINGS)
def test_what_was_decided_can_be_read_back_from_the_graph(name):
    chosen = ENCODINGS[name]
    hand, value, (node,) = layer(chosen)
    module, _, _ = hand.run(InsertQuantizers())
    read: Any = node.args[0]
    for each in (read, read.args[0]):
        found = encoding_of(module, each)
        assert type(found) is type(chosen)
        assert vars_of(found) == vars_of(chosen)
    levels = name.startswith("levels")
    assert read.args[0].target is (QUANTIZE_LEVELS if levels else QUANTIZE)
    with pytest.raises(PassError, match="no dialect op for"):
        parameter_nodes(module, "x", object(), before=node)  # type: ignore[arg-type]
    del value


def vars_of(encoding: Any) -> dict[str, Any]:
    names = getattr(encoding, "__slots__", None) or list(vars(encoding))
    found = {n: getattr(encoding, n) for n in names}
    return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in found.items()}


def test_only_quantizers_of_stored_tensors_are_packed():
    hand, value, (node, other) = layer(PLAIN, PLAIN)
    weight = channels(axis=0, shape=(5,))
    hand.weight_site(node).decide(weight, "test")
    turned = hand.call(aten.neg.default, hand.stored("c", normal(5, 4)))
    third = hand.call(aten.linear.default, value, turned)
    hand.weight_site(third).decide(weight, "test")
    module, _, changed = hand.run(InsertQuantizers(), PackWeights())
    assert changed == [True, True]
    left = [n.args[0] for n in module.graph.nodes if is_quantize(n)]
    assert left == [turned, value] or set(left) == {turned, value}
    read: Any = node.args[1]
    codes = attribute(module, str(read.args[0].target))
    assert torch.equal(codes, weight.encode(normal(5, 4)))
    assert PackWeights().run(module, Context(Sample(()), [])) is False
    del other


def moved(*moves: Any, chosen: AffineEncoding = PLAIN, peek: bool = False) -> tuple[Hand, Any]:
    """A linear's output that is moved, quantized and multiplied."""
    hand = Hand()
    value = hand.linear(hand.given("x", normal(2, 6, 4)), normal(4, 4, seed=1), name="first")
    for move, *rest in moves:
        value = hand.call(move, value, *rest)
    node = hand.linear(value, normal(3, value.meta["val"].shape[-1], seed=2), name="second")
    hand.data_site(node, axis=-1).decide(chosen, "test")
    if peek:
        ends = [hand.call(aten.mean.default, each) for each in (node, value)]
        hand.call(aten.add.Tensor, *ends)
    return hand, node


TURN, RELU = (aten.transpose.int, 1, 2), (aten.relu.default,)
AT_BOTTOM = AffineEncoding.per_tensor(0.05, 0, UNSIGNED)
ABOVE = AffineEncoding.per_tensor(0.05, 1, UNSIGNED)
BELOW_ZERO = AffineEncoding.per_tensor(0.05, -128, SIGNED)


@pytest.mark.parametrize(
    ("moves", "chosen", "peek", "above"),
    [
        ([TURN], PLAIN, False, "first"),
        ([TURN], PLAIN, True, "transpose"),
        ([TURN], channels(axis=-1, shape=(6,)), False, "transpose"),
        ([RELU], AT_BOTTOM, False, "first"),
        ([RELU], BELOW_ZERO, False, "first"),
        ([RELU], ABOVE, False, "relu"),
        ([RELU, TURN], AT_BOTTOM, False, "first"),
        ([RELU], AT_BOTTOM, True, "first"),
        ([(aten.tanh.default,)], AT_BOTTOM, False, "tanh"),
        ([(aten.slice.Tensor, 1, 0, 3)], PLAIN, False, "slice"),
        ([(aten.expand.default, [2, 6, 4])], PLAIN, False, "expand"),
    ],
)
def test_quantizers_go_up_through_what_keeps_every_element_and_no_further(
    moves, chosen, peek, above
):
    hand, node = moved(*moves, chosen=chosen, peek=peek)
    module, _, _ = hand.run(InsertQuantizers())
    wanted = module(normal(2, 6, 4))
    start = [n.args[0].name for n in module.graph.nodes if is_quantize(n)]
    changed = HoistQuantizers().run(module, Context(Sample(()), []))
    module.graph.lint()
    module.recompile()
    (quantize,) = [n for n in module.graph.nodes if is_quantize(n)]
    assert str(quantize.args[0].name).startswith(above)
    assert changed is (start != [quantize.args[0].name])
    assert torch.equal(module(normal(2, 6, 4)), wanted)
    del node


@pytest.mark.parametrize("same", [True, False])
def test_quantizers_that_meet_on_their_way_up_become_one_if_they_are_the_same(same):
    hand = Hand()
    value = hand.linear(hand.given("x", normal(2, 6, 4)), normal(4, 4, seed=1), name="first")
    nodes = [
        hand.linear(hand.call(aten.transpose.int, value, 1, 2), normal(3, 6, seed=n), name=f"n{n}")
        for n in (2, 3)
    ]
    for node in nodes:
        hand.data_site(node, axis=-1).decide(PLAIN, "test")
    hand.call(aten.add.Tensor, *nodes)
    module, _, _ = hand.run(InsertQuantizers())
    pairs = [n for n in module.graph.nodes if is_quantize(n)]
    assert len(pairs) == 2
    first, second = pairs
    if same:
        for each in (second, *second.users):
            each.args = (each.args[0], *first.args[1:])
    else:
        zero = insert_buffer(module, "other", torch.tensor(9, dtype=torch.int32), before=second)
        for each in (second, *second.users):
            each.args = (each.args[0], first.args[1], zero, *first.args[3:])
    module.graph.lint()
    module.recompile()
    wanted = module(normal(2, 6, 4))
    assert HoistQuantizers().run(module, Context(Sample(()), [])) is True
    module.graph.lint()
    module.recompile()
    assert sum(is_quantize(n) for n in module.graph.nodes) == (1 if same else 2)
    assert sum(n.target is DEQUANTIZE for n in module.graph.nodes) == 2
    assert torch.equal(module(normal(2, 6, 4)), wanted)


def test_calibration_asks_every_pass_of_the_pipeline_and_stops_where_it_is_told(monkeypatch):
    model = torch.nn.Linear(4, 3)
    module = trace(model.eval(), normal(2, 4))
    batches = [normal(2, 4, seed=n) for n in range(5)]
    for pipeline, most in itertools.product((None, (ChooseRanges(),)), (None, 1, 3)):
        seen: dict[str, Any] = {}
        real = calibrate.collect  # type: ignore[attr-defined]

        def spy(*args, seen=seen, real=real, **options):
            seen.update(options)
            return real(*args, **options)

        monkeypatch.setattr(calibrate, "collect", spy)
        context = Context(Sample((batches[0],)), batches)
        context.pipeline = None if pipeline is None else Pipeline("test", pipeline)
        asked: Any = []
        monkeypatch.setattr(
            ChooseRanges, "statistics", lambda self, m, c, asked=asked: asked.append(m) or []
        )
        assert Calibrate(max_batches=most).run(module, context) is False
        assert len(asked) == (0 if pipeline is None else 1)
        assert seen["max_batches"] == most
        assert seen["allow_empty"] is False
        assert context.num_batches == (5 if most is None else most)
        assert context.reference is not None
        monkeypatch.setattr(calibrate, "collect", real)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_every_process_sweeps_its_share_and_only_the_first_must_have_a_batch(rank, monkeypatch):
    module = trace(torch.nn.Linear(4, 3).eval(), normal(2, 4))
    counts = [3, 2, 2, 0]
    merged: Any = []
    seen: dict[str, Any] = {}

    class Here(Ranks):
        def gather(self, text: str, what: str) -> list[str]:
            assert what
            return [text if at == rank else str(count) for at, count in enumerate(counts)]

    def collect(_module: Any, batches: Any, _statistics: Any, **options: Any) -> int:
        seen.update(options, batches=list(batches))
        return counts[rank]

    monkeypatch.setattr(Here, "here", classmethod(lambda cls: cls(rank, 4)))
    monkeypatch.setattr(Here, "together", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(calibrate, "Ranks", Here)
    monkeypatch.setattr(calibrate, "collect", collect)
    monkeypatch.setattr(calibrate, "all_reduce", merged.append)
    context = Context(Sample((normal(2, 4),)), list(range(9)))
    Calibrate(max_batches=7).run(module, context)
    assert seen["batches"] == list(range(rank, 9, 4))
    assert seen["max_batches"] == len(range(rank, 7, 4))
    assert seen["allow_empty"] is (rank > 0)
    assert merged == [context.statistics]
    assert context.num_batches == sum(counts)
