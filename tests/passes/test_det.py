# SPDX-License-Identifier: Apache-2.0
"""The `det` pipelines: what is planned, chosen and learned, and that the backends agree."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

import qgraph
from qgraph.calibration.boxes import Detections, detect
from qgraph.calibration.filtered_loss import FilteredGlobalLoss, TeacherStudent, objective_of
from qgraph.errors import ConfigError
from qgraph.formats import LevelEncoding
from qgraph.formats.log_affine import NAME
from qgraph.graph.dialect import encoding_of, is_dequantize
from qgraph.passes import PlanHeads, ReconstructBlocks, TuneRanges, UseLogAffine
from qgraph.pipeline import Pipeline
from tests.passes.detectors import decode, detector, images

LOSS = FilteredGlobalLoss(decode)
FAST = {"steps": 12, "batch": 8}


def pipeline(name: str = "det_int4", **options: Any) -> Pipeline:
    return qgraph.pipeline(name, **{**FAST, **options})


@cache
def traced(*, joined: bool) -> GraphModule:
    return qgraph.trace(detector(joined=joined), images()[0])


def compiled(chosen: Pipeline | str, *, joined: bool = False, **options: Any) -> Any:
    return qgraph.compile(
        traced(joined=joined), images(48), chosen, progress=False, verify=False, **options
    )


def decisions(model: Any, name: str, outcome: str | None = None) -> list[Any]:
    return [d for d in model.report.decisions if d.by == name and outcome in {None, d.outcome}]


def levels(model: Any) -> set[str]:
    """Weights in the log-affine format, by the parameter they come from."""
    module = model.graph_module
    found = set()
    for node in module.graph.nodes:
        if is_dequantize(node):
            encoding = encoding_of(module, node)
            if isinstance(encoding, LevelEncoding) and encoding.name == NAME:
                found.add(str(node.args[0]))
    return found


def plain(name: str = "det_int4") -> Pipeline:
    return pipeline(name).without("tune-ranges").without("reconstruct-blocks")


def error(model: Any) -> float:
    """The filtered global loss on images not seen in calibration."""
    (x,) = images(8, seed=5)
    with torch.no_grad():
        return float(LOSS(model.lower("reference")(x), detector()(x)))


@cache
def learned() -> Any:
    return compiled(pipeline("det_w3a3", steps=25), loss=LOSS)


def found(outputs: tuple[Tensor, Tensor]) -> list[Detections]:
    logits, boxes = decode(tuple(torch.as_tensor(o) for o in outputs))  # type: ignore[arg-type]
    return detect(logits.sigmoid(), boxes, min_score=0.3, threshold=0.6)


def test_last_layers_stay_float_and_adds_follow_the_policy() -> None:
    model = compiled(plain())
    sites = {str(d.site) for d in decisions(model, "plan-heads", "kept")}
    assert len(sites) == 4
    assert str(model.explain()).count("uint4 per tensor") >= 4
    without = compiled(plain().replace("plan-heads", PlanHeads(adds="float")))
    assert len(decisions(without, "plan-heads", "kept")) == 5
    eight = compiled(plain().replace("plan-heads", PlanHeads(last="8")))
    assert not decisions(eight, "plan-heads", "kept")
    neck = compiled(plain().replace("plan-heads", PlanHeads(parts="backbone and neck")))
    assert len(decisions(neck, "plan-heads", "kept")) == 8


def test_boxes_and_scores_never_share_a_scale() -> None:
    careless = compiled(qgraph.pipeline("int8", add_sqnr=-1000.0), joined=True)
    careful = compiled(qgraph.pipeline("det_int8", add_sqnr=-1000.0), joined=True)
    (x,) = images(8, seed=5)
    exact = detector(joined=True)(x)[..., 4:]
    off = [
        float((m.lower("reference")(x)[..., 4:] - exact).abs().max()) for m in (careless, careful)
    ]
    assert off[0] > 4 * off[1]  # one scale for both: scores move by a tenth of their range
    reasons = [d.reason for d in decisions(careful, "plan-heads", "kept")]
    assert any("share one scale" in r for r in reasons)


def test_log_affine_is_used_in_the_head_only_and_shared_weights_have_one_quantizer() -> None:
    forced = UseLogAffine(min_gain_db=float("-inf"))
    model = compiled(plain().replace("use-log-affine", forced))
    assert len(decisions(model, "use-log-affine", "applied")) == 2
    tables = levels(model)
    assert len(tables) == 2
    assert all("tower" in name for name in tables)
    everywhere = UseLogAffine(min_gain_db=float("-inf"), part="all")
    assert len(levels(compiled(plain().replace("use-log-affine", everywhere)))) > 2
    never = UseLogAffine(min_gain_db=1000.0)
    assert not levels(compiled(plain().replace("use-log-affine", never)))


def test_the_format_is_chosen_by_its_measured_error() -> None:
    model = compiled(plain().replace("use-log-affine", UseLogAffine(part="all")))
    judged = [d for d in decisions(model, "use-log-affine") if "gain_db" in d.numbers]
    assert judged
    assert all((d.numbers["gain_db"] > 0) == (d.outcome == "applied") for d in judged)


@pytest.mark.parametrize("decoder", ["exact", "shift"])
def test_detections_are_the_same_on_all_backends(decoder: str) -> None:
    forced = UseLogAffine(min_gain_db=float("-inf"), part="all", decoder=decoder)
    model = compiled(plain().replace("use-log-affine", forced))
    (x,) = images(8, seed=5)
    reference = model.lower("reference")(x)
    exact = model(x)
    assert all(torch.equal(a, b) for a, b in zip(reference, exact, strict=True))
    wanted = found(reference)
    assert sum(len(d.labels) for d in wanted) > 0
    for other in (exact, model.lower("onnx")(x)):
        for a, b in zip(wanted, found(other), strict=True):
            assert torch.equal(a.labels, b.labels)
            torch.testing.assert_close(a.boxes, b.boxes, rtol=1e-4, atol=1e-4)


def test_learning_lowers_the_objective_on_unseen_images_on_every_backend() -> None:
    start, model = compiled(plain("det_w3a3"), loss=LOSS), learned()
    assert error(model) < 0.9 * error(start)
    (line,) = [d for d in decisions(model, "tune-ranges") if "after" in d.numbers]
    assert line.numbers["after"] < line.numbers["before"] or line.outcome == "refused"
    (x,) = images(8, seed=5)
    assert all(
        torch.equal(a, b) for a, b in zip(model.lower("reference")(x), model(x), strict=True)
    )


def test_behind_rounding_the_teacher_is_still_the_float_network() -> None:
    seen: list[Tensor] = []

    def compare(mine: Any, theirs: Any) -> Tensor:
        seen.append(theirs[0].flatten(1))
        return (mine[0] - theirs[0]).square().mean()

    compiled(pipeline("det_w2a8", steps=0), loss=TeacherStudent(compare))
    with torch.no_grad():
        float_rows = torch.cat([detector()(x)[0].flatten(1) for x in images(48)])
    rows = torch.cat(seen)
    away = torch.cdist(rows.double(), float_rows.double()).amin(1)
    assert float(away.max()) < 1e-4 * float(float_rows.norm(dim=1).mean())


def test_biases_and_scales_make_up_for_rounding() -> None:
    rounded = ReconstructBlocks(steps=0, damping=0.1)
    free = TuneRanges(steps=40, batch=8, bias_lr=3e-3, scale_lr=2e-3)
    still = TuneRanges(steps=40, batch=8, bias_lr=0.0, scale_lr=0.0)
    chosen = pipeline("det_w3a8").replace("reconstruct-blocks", rounded)
    alone, corrected = (
        compiled(chosen.replace("tune-ranges", item), loss=LOSS) for item in (still, free)
    )
    assert error(corrected) < 0.9 * error(alone)
    (x,) = images(8, seed=5)
    reference, exact = corrected.lower("reference")(x), corrected(x)
    assert all(torch.equal(a, b) for a, b in zip(reference, exact, strict=True))


def test_the_filter_reports_what_it_kept() -> None:
    (line,) = [d for d in decisions(learned(), "tune-ranges") if d.site == "loss filter"]
    assert 0 < line.numbers["kept"] <= line.numbers["confident"] <= line.numbers["rows"]


def test_a_filter_that_keeps_nothing_warns(caplog: pytest.LogCaptureFixture) -> None:
    nothing = FilteredGlobalLoss(decode, theta_c=1.0)
    with caplog.at_level(logging.WARNING, logger="qgraph"):
        model = compiled(pipeline(steps=1).without("reconstruct-blocks"), loss=nothing)
    assert "no box survives" in caplog.text
    assert decisions(model, "tune-ranges", "refused")


def test_tables_are_learned_and_tied_ones_stay_tied() -> None:
    forced = UseLogAffine(min_gain_db=float("-inf"))
    chosen = pipeline().replace("use-log-affine", forced).without("reconstruct-blocks")
    chosen = chosen.replace("tune-ranges", TuneRanges(steps=60, batch=8, table_lr=0.02))
    model = compiled(chosen, loss=LOSS)
    (line,) = [d for d in decisions(model, "tune-ranges") if "tables" in d.numbers]
    assert line.outcome == "applied"
    assert line.numbers["tables"] == 2
    assert len(levels(model)) == 2
    start = compiled(plain().replace("use-log-affine", forced))
    before, after = (
        [
            b.clone() for n, b in m.graph_module.named_buffers()
            if b.dtype == torch.int32 and b.ndim == 2 and b.shape[-1] == 16
        ] for m in (start, model)
    )  # fmt: skip
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=False))


def test_without_a_teacher_student_loss_only_local_losses_are_used() -> None:
    model = compiled(pipeline(steps=2))
    assert [d.outcome for d in decisions(model, "tune-ranges")] == ["kept"]
    task = compiled(pipeline(steps=2), loss=lambda outputs, batch: outputs[0].sum())
    assert [d.outcome for d in decisions(task, "tune-ranges")] == ["kept"]
    assert objective_of(TeacherStudent(lambda a, b: (a - b).sum())) is not None
    assert objective_of(lambda a, b: (a - b).sum()) is None


def test_any_teacher_student_function_will_do() -> None:
    squared = TeacherStudent(lambda a, b: (a[0] - b[0]).square().mean())
    model = compiled(pipeline().without("reconstruct-blocks"), loss=squared)
    (line,) = decisions(model, "tune-ranges")
    assert line.outcome in {"applied", "refused"}
    assert line.numbers["before"] > 0


def test_heads_shared_over_levels_are_tuned_together() -> None:
    model = compiled(pipeline().without("tune-ranges"), loss=LOSS)
    lines = [d for d in decisions(model, "reconstruct-blocks") if d.numbers]
    tuned = sum(int(d.numbers["weights"]) for d in lines)
    module = detector()
    expected = sum(
        p.weight.numel() for name, p in module.named_modules()
        if hasattr(p, "weight") and name not in {"classes", "boxes"}
    )  # fmt: skip
    assert tuned == expected


def test_the_same_seed_gives_the_same_codes() -> None:
    first, second = (compiled(pipeline(steps=4), loss=LOSS) for _ in range(2))
    (x,) = images(8, seed=7)
    for a, b in zip(first(x), second(x), strict=True):
        assert torch.equal(a, b)


def test_bad_options_are_refused() -> None:
    for make in (
        lambda: PlanHeads(last="4"), lambda: PlanHeads(adds="4"), lambda: PlanHeads(parts="head"),
        lambda: UseLogAffine(part="neck"), lambda: UseLogAffine(decoder="log"),
        lambda: TuneRanges(steps=-1), lambda: ReconstructBlocks(steps=-1),
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            make()
