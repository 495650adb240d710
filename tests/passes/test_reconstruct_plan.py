# SPDX-License-Identifier: Apache-2.0
"""What each region is given to be tuned with, where nothing is: ports, suffix, seed, memory."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch
from torch.fx import Interpreter

from qgraph.calibration.filtered_loss import TeacherStudent
from qgraph.calibration.region_problem import Outcome
from qgraph.calibration.streams import ROW_MASK, read
from qgraph.errors import ConfigError
from qgraph.graph.build import shallow_copy
from qgraph.graph.dialect import encoding_of, is_quantize
from qgraph.passes import ReconstructBlocks, reconstruct_blocks
from qgraph.passes.reconstruct_blocks import _Work
from tests.passes.reconstructing import context_of, data, inserted

REFUSED = Outcome(
    accepted=False, before=1.0, warm=1.0, after=1.0, learned=False, flips=0, weights=3,
    undecided=0.0,
)  # fmt: skip
DIVERGENCE = TeacherStudent(lambda ours, theirs: (ours - theirs).square().mean())


class Call:
    """What one region's tuning was given."""

    def __init__(self, problem: Any, tuning: Any, options: dict[str, Any]) -> None:
        self.problem, self.tuning, self.options = problem, tuning, options
        self.held = {name for b in problem.streams.exact.buckets for name in b.values}
        ((exact, quantized),) = zip(
            problem.streams.exact.buckets, problem.streams.quantized.buckets, strict=True
        )
        self.inputs = {
            name: tuple(read(b, exact, name, slice(None)).clone() for b in (exact, quantized))
            for name in problem.ports.inputs if name not in exact.shared
        }  # fmt: skip


def planned(item: ReconstructBlocks, *, steps: range = range(0), **options: Any) -> Any:
    """Run the pass with a tuner that learns nothing; the calls, the trainables, the context."""
    start, facts = inserted()
    module = shallow_copy(start)
    own = {"adapt": options.pop("adapt")} if "adapt" in options else {}
    context = dataclasses.replace(context_of(module, **options), facts=facts, **own)
    calls: list[Call] = []
    trainables: Any = []
    build = reconstruct_blocks.build_student  # type: ignore[attr-defined]

    def tune(problem, tuning, **given):
        calls.append(Call(problem, tuning, given))
        for step in steps:
            given["tick"](step)
        return REFUSED

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruct_blocks, "tune", tune)
        patch.setattr(reconstruct_blocks, "importances", lambda *_, **__: "weighed")
        patch.setattr(
            reconstruct_blocks, "build_student",
            lambda m, i, o, what: (trainables.append(what), build(m, i, o, what))[1],
        )  # fmt: skip
        changed = item.run(module, context)
    assert changed is False
    return calls, trainables, context


def work(item: ReconstructBlocks, **options: Any) -> _Work:
    start, _ = inserted()
    module = shallow_copy(start)
    return _Work(item, module, context_of(module, **options), None)


@pytest.mark.parametrize("granularity", ["layer", "subblock", "block", "stage"])
@pytest.mark.parametrize("target", ["features", "logits", "objective"])
def test_the_float_rest_of_the_network_gives_its_targets_from_what_a_region_gives(
    granularity, target
):
    loss = DIVERGENCE if target == "objective" else None
    named = "features" if target == "objective" else target
    found = work(ReconstructBlocks(granularity, global_weight=1.0, global_target=named), loss=loss)
    values = values_of(found.exact, data()[0][:3])
    (end,) = found.targets
    head = [n.name for n in found.exact.graph.nodes if n.name.startswith("linear")][-1]
    assert end == (head if target != "features" else values_name(found, head))
    if target != "features":
        assert torch.equal(values[end], *values["output"])
    made_in = next(i for i, r in enumerate(found.regions) if end in r.nodes)
    for number, region in enumerate(found.regions):
        judged = tuple(n for n in region.outputs if n in region.moving)
        suffix = found.suffix(number, judged)
        assert (suffix is None) is (loss is None and number >= made_in)
        if suffix is None:
            continue
        assert suffix.targets == (end,)
        assert suffix.logits is (target == "logits")
        assert (suffix.objective is not None) is (loss is not None)
        assert set(suffix.made) <= set(judged)
        later = {n for r in found.regions[number + 1 :] for n in r.nodes}
        assert not set(suffix.passing) & (later | set(judged))
        if number < made_in:
            assert suffix.made
        with torch.no_grad():
            (got,) = suffix.run(*(values[n] for n in (*suffix.made, *suffix.passing)))
        assert torch.equal(got, values[end])
        entries = [n for n in suffix.run.graph.nodes if n.op == "placeholder"]  # type: ignore[attr-defined]
        assert all(n.users for n in entries)


def values_of(module: Any, x: Any) -> dict[str, Any]:
    """What every node of a graph gives."""
    values: dict[str, Any] = {}

    class Recorder(Interpreter):
        def run_node(self, n: Any) -> Any:
            values[n.name] = super().run_node(n)
            return values[n.name]

    with torch.no_grad():
        Recorder(module).run(x)
    return values


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_a_region_is_tuned_on_what_both_networks_give_before_it(granularity):
    item = ReconstructBlocks(granularity)
    calls, _, _ = planned(item)
    wanted = [values_of(module, torch.cat(data())) for module in (work(item).exact, inserted()[0])]
    moved = 0
    for call in calls:
        assert call.inputs
        for name, (exact, quantized) in call.inputs.items():
            torch.testing.assert_close(exact, wanted[0][name])
            torch.testing.assert_close(quantized, wanted[1][name])
            moved += not torch.allclose(exact, quantized)
    assert moved >= len(calls) - 1, "all but the first read values that quantization moved"


def values_name(found: _Work, head: str) -> str:
    """What the last product reads."""
    node = next(n for n in found.exact.graph.nodes if n.name == head)
    return str(node.args[0])


@pytest.mark.parametrize(
    ("options", "loss", "targets", "judged"),
    [
        ({}, None, 0, False),
        ({"global_weight": 0.5}, None, 1, False),
        ({}, DIVERGENCE, 1, True),
        ({"objective_weight": 0.0}, DIVERGENCE, 0, False),
        ({"objective_weight": 0.0, "global_weight": 0.5}, DIVERGENCE, 1, False),
        ({}, lambda output, batch: output.sum(), 0, False),
    ],
)
def test_what_is_supervised_follows_the_weights_and_the_loss(options, loss, targets, judged):
    item = ReconstructBlocks(**options)
    found = work(item, loss=loss)
    assert len(found.targets) == targets
    assert (found.objective is not None) is judged
    wanted = (1.0, 2) if judged else (item.global_weight, 4)
    assert (found.tuning.global_weight, found.tuning.global_every) == wanted


@pytest.mark.parametrize("target", ["features", "logits"])
def test_where_no_product_is_last_nothing_is_supervised(target):
    """An embedding has a weight and is no product; a network may have no weights at all."""
    found = work(ReconstructBlocks(global_weight=1.0, global_target=target))
    assert len(found._targets()) == 1
    region = found.regions[-1]
    looked_up = next(n.name for n in found.exact.graph.nodes if n.name.startswith("softmax"))
    for weights in ((), (*region.weights, looked_up)):
        found.regions = [dataclasses.replace(region, weights=weights)]
        assert found._targets() == ()


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_every_quantizer_is_learned_in_one_region_and_every_seed_is_another(granularity):
    calls, trainables, context = planned(ReconstructBlocks(granularity, rounding="ste"))
    again, _, _ = planned(ReconstructBlocks(granularity), seed=1)
    start, _ = inserted()
    quantizers = [n for n in start.graph.nodes if is_quantize(n)]
    weights = {n.name for n in quantizers if n.args[0].op == "get_attr"}
    learned = [set(t.weights) for t in trainables]
    assert sum(map(len, learned)) == len(weights)
    assert set().union(*learned) == weights
    steps = [t.activations for t in trainables]
    assert sum(map(len, steps)) == len(frozenset().union(*steps))
    others = {n.name for n in quantizers} - weights
    assert frozenset().union(*steps) <= others
    assert len(frozenset().union(*steps)) >= len(others) - 1
    assert {t.method for t in trainables} == {"ste"}
    seeds = [c.options["seed"] for c in (*calls, *again)]
    assert len(set(seeds)) == len(seeds) >= 8
    assert all(0 <= seed < 1 << 56 for seed in seeds)
    assert [d.outcome for d in context.decisions if d.by == "reconstruct-blocks"] == [
        "refused"
    ] * len(calls)


@pytest.mark.parametrize("local", [0.0, 0.25])
@pytest.mark.parametrize("warm", [False, True])
def test_inner_values_and_the_warm_start_are_there_where_they_were_asked_for(local, warm):
    calls, _, _ = planned(ReconstructBlocks("block", local_weight=local, warm_start=warm, batch=5))
    assert any(c.problem.ports.inside for c in calls) is (local > 0)
    assert all((c.options["start"] is not None) is warm for c in calls)
    assert {c.tuning.batch for c in calls} == {5}
    assert {c.tuning.local_weight for c in calls} == {local}


@pytest.mark.parametrize(
    ("loss", "importance", "weighed"),
    [(DIVERGENCE, True, True), (DIVERGENCE, False, False), (None, True, False)],
)
def test_errors_are_weighed_by_an_objective_only(loss, importance, weighed):
    calls, _, _ = planned(ReconstructBlocks("block", importance=importance), loss=loss)
    before_the_end = [c for c in calls if c.problem.suffix is not None]
    assert bool(before_the_end) is (loss is not None)
    assert all((c.problem.importance == "weighed") is weighed for c in calls[:-1])


@pytest.mark.parametrize("supervised", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_values_are_held_as_long_as_somebody_will_read_them(supervised, masked):
    item = ReconstructBlocks("layer", global_weight=1.0 if supervised else 0.0)
    masks = (
        (lambda args, kwargs: torch.ones(args[0].shape[:2], dtype=torch.bool)) if masked else None
    )
    calls, _, _ = planned(item, row_masks=masks)
    found = work(item)
    tuned = [n for n, r in enumerate(found.regions) if r.weights]
    assert len(tuned) == len(calls)
    for number, call in zip(tuned, calls, strict=True):
        later = {n for r in found.regions[number:] for n in r.inputs}
        kept = set(found.targets) | ({ROW_MASK} if masked else set())
        assert set(found.regions[number].inputs) <= call.held
        assert call.held <= later | kept | set(found.regions[number].outputs)
        assert kept <= call.held
    gone = {n for r in found.regions for n in r.inputs} - calls[-1].held
    assert gone


@pytest.mark.parametrize("steps", [0, 30])
def test_progress_is_told_every_twenty_steps_of_all_regions(steps):
    told: Any = []
    item = ReconstructBlocks("block", steps=steps)
    calls, _, _ = planned(item, steps=range(41), progress=lambda *seen: told.append(seen))
    regions = len(work(item).regions)
    numbers = [n for n, r in enumerate(work(item).regions) if r.weights]
    wanted = [
        (f"reconstruct-blocks {n + 1}/{regions}", n * steps + step, regions * max(1, steps))
        for n in numbers for step in (0, 20, 40)
    ]  # fmt: skip
    assert [each for each in told if each[0].startswith("reconstruct-blocks")] == wanted
    assert len(calls) == len(numbers)


def test_the_time_that_is_left_is_told_and_where_an_interrupt_came(monkeypatch, caplog):
    class Clock:
        now = 0.0

        @classmethod
        def perf_counter(cls) -> float:
            cls.now += 1.0
            return cls.now

    monkeypatch.setattr(reconstruct_blocks, "time", Clock)
    item = ReconstructBlocks("block", steps=1)
    with caplog.at_level(logging.INFO, logger="qgraph"):
        planned(item)
    count = len(work(item).regions)
    left = [r.getMessage().rpartition("about ")[2] for r in caplog.records if "left" in r.msg]
    assert left == [f"{count - 1 - n} s left" for n in range(count)]
    caplog.clear()

    def stop(what: str, done: int, total: int) -> None:
        if " 2/" in what:
            raise KeyboardInterrupt

    _, _, context = planned(item, steps=range(1), progress=stop)
    assert "regions from 2 on stay as they are" in caplog.text
    assert [d.reason for d in context.decisions][-1] == "interrupted"


def test_the_users_own_adapter_reads_the_batches(monkeypatch, tmp_path):
    seen: Any = []
    real = reconstruct_blocks.begin  # type: ignore[attr-defined]
    monkeypatch.setattr(
        reconstruct_blocks, "begin",
        lambda m, b, adapt, shelf, **k: (seen.append((adapt, k)), real(m, b, adapt, shelf, **k))[1],
    )  # fmt: skip
    mine: Any = lambda batch: ((batch["x"],), {})  # noqa: E731
    batches = [{"x": each} for each in data()]
    item = ReconstructBlocks("block", max_samples=16)
    planned(item, adapt=mine, batches=batches, cache_dir=tmp_path)
    assert seen[0][0] is mine
    assert seen[0][1]["max_samples"] == 16
    planned(item, adapt=None)
    args, kwargs = seen[1][0](data()[0])
    assert torch.equal(args[0], data()[0])
    assert not kwargs


def test_a_mask_of_rows_belongs_to_a_saved_state(tmp_path):
    item = ReconstructBlocks("block")
    half: Any = lambda args, kwargs: (torch.arange(5) < 3).expand(args[0].shape[:2])  # noqa: E731
    for masks, folders in ((None, 1), (half, 2), (half, 2), (None, 2)):
        planned(item, row_masks=masks, cache_dir=tmp_path)
        assert len(list(tmp_path.iterdir())) == folders
    planned(dataclasses.replace(item, drop=0.25), cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("options", "fine"),
    [
        ({"steps": 0}, True), ({"steps": -1}, False), ({"batch": 1}, True), ({"batch": 0}, False),
        ({"steps": 0, "batch": 0}, False), ({"steps": -1, "batch": 1}, False),
        ({"rounding": "ste"}, True), ({"global_target": "logits"}, True),
    ],
)  # fmt: skip
def test_options_are_checked_right_at_their_limits(options, fine):
    if fine:
        ReconstructBlocks(**options)
    else:
        with pytest.raises(ConfigError):
            ReconstructBlocks(**options)


@pytest.mark.parametrize("learn_steps", [True, False])
@pytest.mark.parametrize("accepted", [True, False])
def test_exactly_the_steps_that_moved_are_written_and_only_if_accepted(accepted, learn_steps):
    start, facts = inserted()
    module = shallow_copy(start)
    context = dataclasses.replace(context_of(module), facts=facts)
    moved: dict[str, float] = {}
    seen: list[str] = []

    def tune(problem, tuning, **given):
        for number, (name, fake) in enumerate(problem.student.fakes.items()):
            seen.append(name)
            if fake.log_step is not None and number % 2 == 0:
                fake.log_step.data.fill_(0.25)
                moved[name] = float(fake.learned())
        return dataclasses.replace(REFUSED, accepted=accepted)

    def scales(graph: Any) -> dict[str, float]:
        return {n.name: float(encoding_of(graph, n).scale) for n in graph.graph.nodes
                if n.name in seen and is_quantize(n)}  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruct_blocks, "tune", tune)
        changed = ReconstructBlocks("block", learn_steps=learn_steps).run(module, context)
    assert changed is accepted
    assert bool(moved) is learn_steps
    assert len(seen) > len(moved)
    before, after = scales(start), scales(module)
    assert after == (before | moved if accepted else before)
    fresh = [n for n, _ in module.named_buffers() if n.endswith("_scale")]
    known = [n for n, _ in start.named_buffers() if n.endswith("_scale")]
    assert len(fresh) - len(known) == (len(moved) if accepted else 0)


def test_a_region_without_weights_or_without_an_output_that_moves_has_nothing_to_learn():
    found = work(ReconstructBlocks("block"))
    number = next(n for n, r in enumerate(found.regions) if r.weights)
    region, groups = found.regions[number], found.groups
    found.regions[number] = dataclasses.replace(region, moving=frozenset())
    assert found.tune(number, found.tuning) == (None, {})
    found.regions[number], found.groups = region, {}
    assert found.tune(number, found.tuning) == (None, {})
    found.note(region, None)
    assert [d.reason for d in found.context.decisions] == ["nothing to learn"]
    found.groups = groups


@pytest.mark.parametrize("supervised", [False, True])
def test_values_to_compare_with_are_made_once_and_taken_from_a_saved_state(
    supervised, tmp_path, monkeypatch
):
    made: Any = []
    real = _Work.final_targets
    monkeypatch.setattr(_Work, "final_targets", lambda self: (made.append(self), real(self))[1])
    item = ReconstructBlocks("block", global_weight=1.0 if supervised else 0.0)
    for runs in (1, 2):
        planned(item, cache_dir=tmp_path)
        assert len(made) == int(supervised), runs
