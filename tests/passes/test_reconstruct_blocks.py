# SPDX-License-Identifier: Apache-2.0
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qgraph.calibration import reconstruction
from qgraph.errors import ConfigError, QGraphError
from qgraph.graph.build import shallow_copy
from qgraph.graph.dialect import encoding_of, is_quantize
from qgraph.graph.trace import trace
from qgraph.passes import ReconstructBlocks, reconstruct_blocks
from qgraph.passes.reconstruct_blocks import _Work
from qgraph.pipeline import run_pipeline
from qgraph.pipelines import pipeline
from tests.passes.reconstructing import (
    FAST,
    Mixer,
    context_of,
    data,
    inserted,
    model,
    outcomes,
    prefix,
    reconstructed,
    same,
    weight_codes,
)


def test_no_steps_leave_the_network_as_rounding_to_nearest_does():
    module, context, _ = reconstructed(steps=0)
    assert same(module, inserted()[0])
    assert all(d.numbers["before"] == d.numbers["after"] for d in outcomes(context))


def test_held_out_hard_loss_falls_wherever_a_region_is_accepted():
    module, context, changed = reconstructed()
    assert changed
    assert {d.outcome for d in outcomes(context)} <= {"applied", "refused"}
    for decision in outcomes(context):
        if decision.outcome == "applied":
            assert decision.numbers["after"] <= decision.numbers["before"]
    assert sum(d.numbers["flips"] for d in outcomes(context)) > 0
    x = torch.cat(data(seed=1))
    errors = [float((m(x) - model()(x)).square().mean()) for m in (module, inserted()[0])]
    assert errors[0] < errors[1]


def test_codes_stay_next_to_the_floor_and_pack_weights_finds_the_rest():
    module, _, _ = reconstructed()
    codes, nearest = weight_codes(module), weight_codes(inserted()[0])
    assert codes.keys() == nearest.keys()
    moved = [(codes[k].int() - nearest[k].int()).abs().max() for k in codes]
    assert int(max(moved)) == 1
    left = [n for n in module.graph.nodes if is_quantize(n) and n.args[0].op == "get_attr"]
    assert len(left) < len(codes)


def test_a_learning_rate_beyond_reason_is_refused_and_nothing_moves():
    module, context, changed = reconstructed(lr=10.0, step_lr=10.0, steps=3)
    refused = [d for d in outcomes(context) if d.outcome == "refused"]
    assert refused
    if len(refused) == len(outcomes(context)):
        assert not changed
        assert same(module, inserted()[0])


def test_a_loss_that_is_not_finite_is_refused_bit_for_bit(monkeypatch):
    def poison(problem, tuning, *args):
        for rounding in problem.student.unique():
            rounding.variable.data.fill_(float("nan"))
        for step in problem.student.steps():
            step.data.fill_(float("nan"))
        return []

    monkeypatch.setattr(reconstruction, "_descend", poison)
    module, context, changed = reconstructed()
    assert {d.outcome for d in outcomes(context)} == {"refused"}
    assert not changed
    assert same(module, inserted()[0])


def test_what_is_learned_from_a_warm_start_is_dropped_where_it_is_worse(monkeypatch):
    started, context, changed = reconstructed(steps=0, warm_start=True)
    assert changed
    assert any(d.numbers["warm"] < d.numbers["before"] for d in outcomes(context))
    assert all(d.numbers["after"] <= d.numbers["before"] for d in outcomes(context))
    assert not any(d.numbers["learned"] for d in outcomes(context))

    def flip(problem, tuning, *args):
        for rounding in problem.student.unique():
            rounding.variable.data.neg_()
        return []

    monkeypatch.setattr(reconstruction, "_descend", flip)
    module, _, _ = reconstructed(warm_start=True)
    assert same(module, started)


def test_a_warm_start_that_is_worse_is_dropped(monkeypatch):
    def spoil(problem, how):
        for rounding in problem.student.unique():
            rounding.restart(rounding.codes().int().neg().clamp(-3, 3), rounding.source)
        return 1

    monkeypatch.setattr(reconstruct_blocks, "warm_start", spoil)
    module, context, changed = reconstructed(steps=0, warm_start=True)
    assert not changed
    assert same(module, inserted()[0])
    assert all(d.numbers["warm"] > d.numbers["before"] for d in outcomes(context))


def test_a_warm_start_and_learning_end_below_learning_alone_more_often_than_not():
    alone, both = (outcomes(reconstructed(warm_start=w)[1]) for w in (False, True))
    ends = [[d.numbers["after"] for d in found] for found in (alone, both)]
    assert sum(ends[1]) < sum(ends[0])


def test_a_worse_result_is_refused_bit_for_bit(monkeypatch):
    def flip(problem, tuning, *args):
        for rounding in problem.student.unique():
            rounding.variable.data.neg_()
        return []

    monkeypatch.setattr(reconstruction, "_descend", flip)
    module, context, changed = reconstructed()
    assert {d.outcome for d in outcomes(context)} == {"refused"}
    assert not changed
    assert same(module, inserted()[0])


def test_the_same_seed_gives_the_same_codes_and_another_gives_others():
    first, again = (weight_codes(reconstructed()[0]) for _ in range(2))
    other = weight_codes(reconstructed(seed=1)[0])
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_terms_of_weight_zero_change_nothing():
    plain = weight_codes(reconstructed()[0])
    zero = weight_codes(reconstructed(global_weight=0.0, local_weight=0.0, global_every=1)[0])
    assert all(torch.equal(plain[k], zero[k]) for k in plain)


@pytest.mark.parametrize(
    "options",
    [
        {"global_weight": 1.0, "global_every": 2},
        {"global_weight": 1.0, "global_target": "logits"},
        {"local_weight": 0.25},
        {"rounding": "ste"},
        {"granularity": "layer"},
        {"granularity": "subblock", "drop": 0.0},
        {"learn_steps": False},
    ],
    ids=str,
)
def test_every_variant_lowers_the_held_out_loss_somewhere(options):
    module, context, changed = reconstructed(**options)
    assert changed
    assert any(d.outcome == "applied" for d in outcomes(context))
    if options.get("learn_steps") is False:
        assert steps_of(module) == steps_of(inserted()[0])


def steps_of(module):
    return [
        float(encoding_of(module, n).scale)
        for n in module.graph.nodes
        if is_quantize(n) and n.args[0].op != "get_attr"
    ]


def test_global_supervision_lowers_the_held_out_divergence_of_logits():
    x = torch.cat(data(seed=1))
    want = F.log_softmax(model()(x), -1)

    def divergence(module):
        return float(
            F.kl_div(F.log_softmax(module(x), -1), want, log_target=True, reduction="batchmean")
        )

    tuned, _, _ = reconstructed(global_weight=1.0, global_every=1, global_target="logits")
    assert divergence(tuned) < divergence(inserted()[0])


@pytest.mark.parametrize(
    "options",
    [{"granularity": "blocks"}, {"rounding": "stee"}, {"global_target": "logit"}, {"steps": -1}],
    ids=str,
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ConfigError) as caught:
        ReconstructBlocks(**options)
    assert isinstance(caught.value, QGraphError)


@pytest.mark.parametrize("name", ["vit_int4", "vit_int3_recon", "int4_recon", "sam_w4a8_recon"])
def test_pipelines_reconstruct_once_right_behind_the_quantizers(name):
    names = [item.name for item in pipeline(name, steps=7)]
    assert names.count("reconstruct-blocks") == 1
    assert names.index("reconstruct-blocks") == names.index("insert-quantizers") + 1


def test_each_method_has_its_learning_rate_unless_one_is_given():
    assert ReconstructBlocks().tuning().lr == 0.1
    assert ReconstructBlocks(rounding="ste").tuning().lr == 0.01
    assert ReconstructBlocks(lr=0.5).tuning().lr == 0.5


def test_fewer_choices_are_open_the_longer_a_region_is_tuned(monkeypatch):
    found: dict[int, list[Any]] = {}
    real = reconstruct_blocks.tune  # type: ignore[attr-defined]

    def spy(problem, tuning, **options):
        outcome = real(problem, tuning, **options)
        found.setdefault(tuning.steps, []).append(outcome)
        return outcome

    monkeypatch.setattr(reconstruct_blocks, "tune", spy)
    for steps in (20, 160):
        reconstructed(steps=steps, lr=2e-2)
    short, long = (sum(o.undecided for o in found[steps]) for steps in (20, 160))
    assert long < 0.7 * short
    for outcome in found[160]:
        shares = [share for step, _, share in outcome.history if step >= 0.2 * 160]
        assert shares[-1] <= shares[0]


def test_the_float_suffix_gets_no_gradient_and_gives_the_right_one():
    start, _ = inserted()
    work = _Work(ReconstructBlocks(global_weight=1.0), start, context_of(start), None)
    region = work.regions[1]
    judged = tuple(name for name in region.outputs if name in region.moving)
    suffix: Any = work.suffix(1, judged)
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(2, 5, 12, generator=generator).requires_grad_()
    held = dict(suffix.run.named_parameters()) | dict(suffix.run.named_buffers())
    assert not any(t.requires_grad for t in held.values())
    suffix.run(given)[0].square().sum().backward()
    way = torch.randn(2, 5, 12, generator=generator)
    ends = [
        float(suffix.run(given.detach() + sign * 1e-2 * way)[0].double().square().sum())
        for sign in (1, -1)
    ]
    slope = (ends[0] - ends[1]) / 2e-2
    assert float((torch.as_tensor(given.grad) * way).sum()) == pytest.approx(slope, rel=2e-2)
    assert all(t.grad is None for t in held.values())


def test_every_weight_is_learned_in_exactly_one_region():
    start, _ = inserted()
    for granularity in ("layer", "subblock", "block", "stage", "auto"):
        work = _Work(ReconstructBlocks(granularity), start, context_of(start), None)
        weights = {
            n.name for n in start.graph.nodes
            if is_quantize(n) and n.args[0].op == "get_attr"
        }  # fmt: skip
        assert set(work.groups) == weights
        assert all(len(work.owners[name]) == 1 for name in weights)


@pytest.mark.parametrize("seed", range(8))
def test_outputs_never_seen_come_nearer_for_nearly_every_network(seed):
    torch.manual_seed(seed)
    network = Mixer().eval().requires_grad_(False)
    module = trace(network, data()[0])
    chosen, context = prefix(), context_of(module, batches=data((64,) * 4))
    run_pipeline(chosen, module, context)
    start = shallow_copy(module)
    assert ReconstructBlocks(**{**FAST, "warm_start": True, "steps": 10}).run(module, context)
    module.recompile()
    x = torch.cat(data(seed=100 + seed))
    errors = [float((m(x) - network(x)).square().mean()) for m in (module, start)]
    assert errors[0] < errors[1]


def test_eight_bits_stay_as_good_as_they_are():
    """Sums and norms cause most of what is left at 8 bits: the rest moves it by chance only."""
    module = trace(model(), data()[0])
    chosen = pipeline("int8")
    chosen = dataclasses.replace(chosen, passes=chosen.passes[: chosen.index("hoist-quantizers")])
    context = context_of(module, batches=data((64,) * 4))
    run_pipeline(chosen, module, context)
    start = shallow_copy(module)
    ReconstructBlocks(**FAST).run(module, context)
    module.recompile()
    x = torch.cat([part for seed in range(1, 5) for part in data(seed=seed)])
    errors = [float((m(x) - model()(x)).square().mean()) for m in (module, start)]
    assert errors[0] <= 1.1 * errors[1]
