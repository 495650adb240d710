# SPDX-License-Identifier: Apache-2.0
"""Ranges and weight scales on graphs written by hand: what is asked, which search, which rival."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from qgraph.calibration import (
    Histogram,
    Range,
    Reservoir,
    choose_range,
    choose_range_for_output,
    weight_encoding,
    weight_parameters,
)
from qgraph.calibration.decibels import decibels
from qgraph.calibration.outliers import SUSPECT
from qgraph.errors import ConfigError
from qgraph.formats import AffineEncoding, IntGrid
from qgraph.passes import (
    ChooseRanges,
    ChooseWeightScales,
    UseLogAffine,
    choose_ranges,
    use_log_affine,
)
from qgraph.passes.choose_ranges import output_weight
from qgraph.pipeline import Pass, Promise
from tests.passes.by_hand import Hand, aten, kinds_asked, normal, told

METHODS = ("auto", "output", "mse", "minmax", "percentile", "entropy")


def reading(what: str, *, normed: tuple[bool, ...] = ()) -> tuple[Hand, Any, Any]:
    """A value that linears (`fc`), a sum, a product of values or a convolution read."""
    hand = Hand()
    if what == "conv":
        x = hand.given("x", normal(6, 4, 9))
        node = hand.call(aten.conv1d.default, x, hand.stored("w", normal(5, 4, 3, seed=1)))
        return hand, [hand.data_site(node, axis=1)], x
    x = hand.given("x", normal(40, 6))
    sites = []
    for number, has_norm in enumerate(normed or (False,)):
        if "fc" in what:
            layer = hand.linear(x, normal(5, 6, seed=1 + number), name=f"fc{number}")
            sites.append(hand.data_site(layer, axis=-1))
            if has_norm:
                one = hand.stored(f"one{number}", torch.ones(5))
                hand.call(aten.layer_norm.default, layer, [5], one, one)
    if "sum" in what:
        y = hand.given("y", normal(40, 6, seed=8))
        total = hand.call(aten.add.Tensor, x, y)
        sites += [hand.data_site(total), hand.data_site(total, 1)]
    if "product" in what:
        mixed = hand.call(aten.matmul.default, x, hand.given("z", normal(6, 3)))
        sites.append(hand.data_site(mixed, axis=-1))
    return hand, sites, x


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("what", ["fc", "fc and sum", "sum", "product", "conv"])
def test_each_method_asks_for_what_it_looks_at(method, what):
    hand, sites, x = reading(what)
    asked = [
        kind for name, kind in kinds_asked(ChooseRanges(method=method), hand) if name == x.name
    ]
    linears = {"fc", "fc and sum"}
    by_output = what in {"output": linears | {"conv"}, "auto": linears}.get(method, set())
    needs = method != "minmax" and (not by_output or "sum" in what)
    wanted = ["Range"] + ["Histogram"] * needs + ["Reservoir"] * by_output
    assert asked == wanted
    if by_output:
        module, item = hand.module(), ChooseRanges(method=method, rows=7)
        requests = list(item.statistics(module, hand.context(module)))
        (options,) = [dict(r.options) for r in requests if r.kind == "Reservoir"]
        assert options == {"axis": 1 if what == "conv" else -1, "rows": 7, "per_sample": 16}
        sites[0].axis = None
        requests = list(item.statistics(module, hand.context(module)))
        assert [dict(r.options)["axis"] for r in requests if r.kind == "Reservoir"] == [-1]


def ends(encoding: Any) -> tuple[float, float]:
    zero, scale = int(encoding.zero_point), float(encoding.scale)
    return (encoding.qmin - zero) * scale, (encoding.qmax - zero) * scale


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("normed", [(False,), (True,), (True, True), (True, False)])
def test_a_range_is_what_its_method_finds(method, normed):
    hand, sites, x = reading("fc", normed=normed)
    _, context, changed = hand.run(ChooseRanges(method=method))
    assert changed == [False]
    seen = context.statistics[x]
    value = x.meta["val"]
    low, high = float(value.min()), float(value.max())
    if method in {"auto", "output"}:
        rows = seen.get(Reservoir).sampled()
        weight = torch.cat([normal(5, 6, seed=1 + n) for n in range(len(normed))])
        wanted = choose_range_for_output(
            rows, weight, low=low, high=high, bits=4, relative=1.5 if all(normed) else 0.0
        )
    elif method == "minmax":
        wanted = low, high
    else:
        source: Any = seen.get(Histogram)
        wanted = choose_range(source, seen.get(Range), bits=4, method=method)
    assert all(site.encoding is sites[0].encoding for site in sites)
    step = float(sites[0].encoding.scale)
    assert ends(sites[0].encoding) == pytest.approx(wanted, abs=0.51 * step)
    assert step == pytest.approx((wanted[1] - wanted[0]) / 15, rel=1e-3)
    told_method = "output-aware" if method in {"auto", "output"} else method
    assert sites[0].reason.startswith(f"{told_method} range")


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("what", ["fc", "conv"])
@pytest.mark.parametrize("normed", [(False,), (True,), (True, True), (True, False)])
def test_rows_judge_where_they_tell_enough(what, normed, bits):
    hand, sites, x = reading(what, normed=normed)
    if what == "conv":
        normed = (False,)
    for site in sites:
        site.bits = bits
    _, context, _ = hand.run(ChooseRanges())
    by_rows = all(normed) or (what == "fc" and bits < 8)
    method = "output-aware" if by_rows else "mse"
    assert all(site.reason.startswith(f"{method} range") for site in sites)
    assert (context.statistics[x].find(Histogram) is None) is by_rows


@pytest.mark.parametrize(("asked", "bits", "told"), [(4, 8, "output-aware"), (8, 4, "mse")])
def test_bits_that_change_behind_calibration_are_judged_by_what_it_asked_for(asked, bits, told):
    hand, (site,), _ = reading("fc")
    site.bits = asked

    @dataclasses.dataclass(frozen=True)
    class Assign(Pass):
        name = "assign"
        promise = Promise.IDENTICAL

        def run(self, module: Any, context: Any) -> bool:
            site.bits = bits
            return False

    hand.run(Assign(), ChooseRanges())
    assert site.reason.startswith(f"{told} range")


@pytest.mark.parametrize("known", [True, False])
def test_without_a_stored_weight_the_default_is_the_clip_of_least_squares(known):
    hand, sites, x = reading("sum product" if known else "product")
    item = ChooseRanges(add_sqnr=-1000.0)
    _, context, _ = hand.run(item)
    seen = context.statistics[x]
    source: Any = seen.get(Histogram)
    wanted = choose_range(source.bins() if known else source, seen.get(Range), bits=4)
    step = float(sites[0].encoding.scale)
    assert ends(sites[0].encoding) == pytest.approx(wanted, abs=0.51 * step)
    assert sites[-1].reason.startswith("mse range")


def kept(value: torch.Tensor) -> float:
    """dB that the best of many 4-bit clips keeps."""
    best = math.inf
    for share in np.linspace(0.3, 1.0, 71):
        grid = IntGrid(4, signed=False)
        low, high = float(value.min()) * share, float(value.max()) * share
        step = (high - low) / 15
        encoding = AffineEncoding.per_tensor(step, round(-low / step), grid)
        best = min(best, float((encoding.fake(value) - value).square().sum()))
    return decibels(float(value.square().sum()), best)


def test_a_sum_stays_in_float_where_one_operand_would_lose_too_much():
    hand, _, _ = reading("sum")
    item = ChooseRanges(add_sqnr=1000.0)
    _, context, _ = hand.run(item)
    (line,) = told(context, item.name)
    least = line.numbers["sqnr"]
    values = [normal(40, 6), normal(40, 6, seed=8)]
    assert least == pytest.approx(min(kept(v) for v in values), abs=0.7)
    assert not context.plan.sites
    for asked, stays in ((least, False), (math.nextafter(least, 99.0), True)):
        hand, sites, _ = reading("sum")
        _, context, _ = hand.run(ChooseRanges(add_sqnr=asked))
        assert (len(context.plan.sites) == 0) is stays
        assert bool(told(context, item.name)) is stays
        assert all((s.encoding is None) is stays for s in sites)
    for add_sqnr, method in ((-math.inf, "output"), (1000.0, "minmax")):
        hand, sites, _ = reading("fc sum")
        _, context, _ = hand.run(ChooseRanges(add_sqnr=add_sqnr, method=method))
        assert len(context.plan.sites) == 3
    hand, sites, _ = reading("fc sum")
    sites[1].decide(sites[0], "someone")
    _, context, _ = hand.run(ChooseRanges(add_sqnr=1000.0))
    assert sites[0].encoding is not None
    assert sites[1] in context.plan.sites
    assert sites[2] not in context.plan.sites


@pytest.mark.parametrize("large", [False, True])
def test_one_value_far_beyond_the_median_is_told(large, monkeypatch, caplog):
    for ratio in (SUSPECT, math.nextafter(SUSPECT, math.inf)):
        monkeypatch.setattr(choose_ranges, "outlier_ratio", lambda _, found=ratio: found)
        hand, _, x = reading("fc")
        _, context, _ = hand.run(ChooseRanges())
        doubts = [d for d in context.decisions if "median" in d.reason]
        assert bool(doubts) is (ratio > SUSPECT)
        if doubts:
            assert doubts[0].site == x.name
            assert doubts[0].numbers["ratio"] == ratio
    assert "x: one value is" in caplog.text
    del large


def test_the_weights_that_see_a_value_are_stacked():
    hand = Hand()
    x = hand.given("x", normal(3, 4, 4))
    a = hand.linear(x, normal(5, 4, seed=1), name="a")
    conv = hand.call(aten.conv1d.default, x, hand.stored("w", normal(6, 4, 2, seed=2)))
    grouped = hand.call(
        aten.conv1d.default, x, hand.stored("g", normal(6, 2, 2)), None, [1], [0], [1], 2
    )
    mixed = hand.call(aten.matmul.default, x, hand.stored("m", normal(4, 7)))
    computed = hand.call(
        aten.linear.default, x, hand.call(aten.neg.default, hand.stored("n", normal(5, 4)))
    )
    total = hand.call(aten.add.Tensor, x, x)
    module = hand.module()
    s = {n.name: hand.data_site(n) for n in (a, conv, grouped, mixed, computed, total)}
    assert torch.equal(output_weight(module, [s["a"]]), normal(5, 4, seed=1))  # type: ignore[arg-type]
    w = normal(6, 4, 2, seed=2)
    rows = [w[o, :, k] for o in range(6) for k in range(2)]
    assert torch.equal(output_weight(module, [s[conv.name]]), torch.stack(rows))  # type: ignore[arg-type]
    both = output_weight(module, list(s.values()))
    assert torch.equal(both, torch.cat([normal(5, 4, seed=1), torch.stack(rows)]))  # type: ignore[arg-type]
    for other in (grouped, mixed, computed, total):
        assert output_weight(module, [s[other.name]]) is None
    assert output_weight(module, [hand.weight_site(a)]) is None


def weights(kind: str, shape: tuple[int, ...], **options: Any) -> tuple[Hand, Any]:
    hand = Hand()
    w = hand.stored("w", normal(*shape).pow(3))
    if kind == "embedding":
        node = hand.call(aten.embedding.default, w, hand.given("n", torch.arange(3)), name="node")
        return hand, hand.weight_site(node, 0, **options)
    if kind == "conv":
        x = hand.given("x", normal(2, shape[1], 9))
        node = hand.call(aten.conv1d.default, x, w, name="node")
    else:
        node = hand.call(aten.linear.default, hand.given("x", normal(2, shape[1])), w, name="node")
    return hand, hand.weight_site(node, **options)


@pytest.mark.parametrize("bits", [2, 4, 7, 8, 9])
@pytest.mark.parametrize("below", [4, 8])
@pytest.mark.parametrize(
    ("kind", "shape", "axis"),
    [("linear", (5, 6), 0), ("linear", (5, 6), -2), ("linear", (5, 6), None),
     ("conv", (5, 4, 3), 0), ("conv", (5, 4, 3), 1),
     ("embedding", (9, 4), 0), ("embedding", (9, 4), -1)],
)  # fmt: skip
def test_weights_have_symmetric_scales_clipped_below_eight_bits(kind, shape, axis, bits, below):
    hand, site = weights(kind, shape, bits=bits, axis=axis)
    _, _, changed = hand.run(ChooseWeightScales(clip_below=below))
    w = normal(*shape).pow(3)
    clip = bits < below and kind != "embedding"
    narrow = bits >= 8
    qmax = 2 ** (bits - 1) - 1
    flat = w.reshape(1, -1) if axis is None else w.movedim(axis, 0).flatten(1)
    wanted, _ = weight_parameters(flat, axis=0, bits=bits, narrow=narrow, clip=clip)
    found = site.encoding
    assert changed == [False]
    assert (found.qmin, found.qmax) == (-qmax if narrow else -qmax - 1, qmax)
    assert found.axis == (None if axis is None else axis % len(shape))
    assert found.scale.shape == found.zero_point.shape == (() if axis is None else (len(wanted),))
    assert torch.allclose(found.scale.flatten(), wanted)
    if not clip:
        steps = qmax if narrow else None
        assert steps is None or torch.allclose(wanted * steps, flat.abs().amax(1))
    assert site.reason == ("clip by MSE search" if clip else "whole range")


def test_tied_weights_share_one_encoding_and_decided_ones_keep_theirs():
    hand = Hand()
    w = hand.stored("w", normal(5, 6))
    nodes = [hand.call(aten.linear.default, hand.given(f"x{n}", normal(2, 6)), w) for n in range(4)]
    first, second, third, fourth = (hand.weight_site(n) for n in nodes)
    third.bits = 5
    mine = AffineEncoding.per_tensor(1.0, 0, IntGrid(4, signed=True))
    fourth.decide(mine, "someone")
    hand.run(ChooseWeightScales())
    assert first.encoding is second.encoding
    assert third.encoding is not first.encoding
    assert fourth.encoding is mine


@pytest.mark.parametrize(
    ("shape", "options", "asked"),
    [
        ((5, 64), {}, {"axis": 0, "decoder": "exact", "reserve_zero": False}),
        ((5, 63), {}, {"axis": None, "decoder": "exact", "reserve_zero": False}),
        ((64, 5), {"axis": 1}, {"axis": 1, "decoder": "exact", "reserve_zero": False}),
        ((64, 5), {"axis": -1}, {"axis": 1, "decoder": "exact", "reserve_zero": False}),
        ((5, 64), {"axis": None}, {"axis": None, "decoder": "exact", "reserve_zero": False}),
        ((5, 64), {"decoder": "shift"}, {"axis": 0, "decoder": "shift", "reserve_zero": False}),
        ((5, 64), {"decoder": "shift", "bits": 5}, None),
        ((5, 64), {"reserve_zero": True, "bits": 5}, {"axis": 0, "reserve_zero": True}),
        ((5, 64), {"reserve_zero": True, "bits": 3}, {"axis": 0, "reserve_zero": True}),
        ((5, 64), {"reserve_zero": True, "bits": 2}, {"axis": 0, "reserve_zero": False}),
        ((5, 64), {"bits": 6}, None),
        ((5, 64), {"skip": ("node",)}, None),
        ((5, 64), {"skip": ("nobody",)}, {"axis": 0}),
    ],
)
def test_log_affine_tables_are_fitted_where_they_may_win(shape, options, asked, monkeypatch):
    seen: Any = []
    real = use_log_affine.log_affine_encoding  # type: ignore[attr-defined]
    monkeypatch.setattr(
        use_log_affine, "log_affine_encoding",
        lambda w, bits, **k: (seen.append((bits, k)), real(w, bits, **k))[1],
    )  # fmt: skip
    own = {k: options[k] for k in ("bits", "axis") if k in options}
    rest = {k: v for k, v in options.items() if k not in own}
    hand, site = weights("linear", shape, **own)
    item = UseLogAffine(part="all", min_gain_db=-math.inf, **rest)
    _, context, changed = hand.run(item)
    assert changed == [False]
    assert (site.encoding is not None) is (asked is not None)
    (line,) = told(context, item.name)
    if asked is None:
        assert not seen
        return
    ((bits, given),) = seen
    assert bits == site.bits
    assert {k: given[k] for k in asked} == asked
    w = normal(*shape).pow(3)
    rival = weight_encoding(w, bits, None if own.get("axis", 0) is None else own.get("axis", 0) % 2)
    errors = [float((e.fake(w) - w).double().square().mean()) for e in (rival, site.encoding)]
    gain = line.numbers["gain_db"]
    assert gain == pytest.approx(decibels(*errors), abs=1e-6)
    for least, outcome in ((gain, "kept"), (math.nextafter(gain, -math.inf), "applied")):
        hand, site = weights("linear", shape, **own)
        found = told(hand.run(dataclasses.replace(item, min_gain_db=least))[1], item.name)
        assert [d.outcome for d in found] == [outcome]
        assert (site.encoding is None) is (outcome == "kept")


def test_log_affine_leaves_tables_and_decided_weights_and_shares_tied_ones():
    hand, site = weights("embedding", (9, 64))
    assert not told(hand.run(UseLogAffine(part="all", min_gain_db=-99.0))[1], "use-log-affine")
    assert site.encoding is None
    hand = Hand()
    w = hand.stored("w", normal(5, 64))
    nodes = [
        hand.call(aten.linear.default, hand.given(f"x{n}", normal(2, 64)), w, name=f"n{n}")
        for n in range(3)
    ]
    first, second, third = (hand.weight_site(n) for n in nodes)
    third.decide(weight_encoding(normal(5, 64), 4, 0), "someone")
    hand.run(UseLogAffine(part="all", min_gain_db=-99.0))
    assert first.encoding is second.encoding is not None
    assert third.decided_by == "someone"
    for skip in (("n0",), ("n1",)):
        first.encoding = second.encoding = None
        hand.run(UseLogAffine(part="all", min_gain_db=-99.0, skip=skip))
        assert first.encoding is None
    for part in ("head", "regression"):  # no detector: no part of one
        _, context, _ = hand.run(UseLogAffine(part=part, min_gain_db=-99.0))
        assert first.encoding is None
        assert [d.outcome for d in told(context, "use-log-affine")] == ["refused"]


def test_wrong_options_are_refused():
    for item, wrong in (
        (ChooseRanges, {"method": "max"}), (UseLogAffine, {"part": "neck"}),
        (UseLogAffine, {"decoder": "table"}),
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            item(**wrong)  # type: ignore[arg-type]
    for method in METHODS:
        ChooseRanges(method=method)
    for part in ("head", "regression", "all"):
        UseLogAffine(part=part, decoder="shift")


@pytest.mark.parametrize(
    ("part", "treated"),
    [("all", {"box", "tower", "stem"}), ("head", {"box", "tower"}), ("regression", {"box"})],
)
def test_only_weights_of_the_part_are_fitted_and_globs_name_what_it_is(part, treated, monkeypatch):
    hand = Hand()
    x = hand.given("x", normal(2, 64))
    nodes = {name: hand.linear(x, normal(5, 64).pow(3), name=name) for name in
             ("stem", "tower", "box")}  # fmt: skip
    sites = {name: hand.weight_site(node) for name, node in nodes.items()}
    given: Any = []

    class Heads:
        head = frozenset({nodes["tower"], nodes["box"]})
        regression = frozenset({nodes["box"]})

    monkeypatch.setattr(
        use_log_affine, "find_heads", lambda *_, **globs: (given.append(globs), Heads)[1]
    )
    globs: Any = {"boxes": ("b*",), "classes": ("c",), "head": ("h",)}
    _, context, _ = hand.run(UseLogAffine(part=part, min_gain_db=-math.inf, **globs))
    assert {name for name, site in sites.items() if site.encoding is not None} == treated
    assert given == ([] if part == "all" else [globs])
    assert {d.outcome for d in told(context, "use-log-affine")} == {"applied"}
