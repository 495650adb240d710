# SPDX-License-Identifier: Apache-2.0
"""The two-stage detector: pooling is bilinear, rows keep their proposal, backends agree."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import qgraph
from examples.zoo.det.data import CLASSES, IMAGE_SIZE
from examples.zoo.det.model import STRIDES, Layout
from examples.zoo.det.two_stage import (
    BINS,
    PROPOSALS,
    SPREAD,
    TwoStage,
    inputs_of,
    pooling,
    propose,
    refined,
    relative_predictions,
    two_stage_detections,
)
from qgraph.calibration.boxes import aligned_iou, pairwise_iou

TINY = Layout(stem=4, stages=(4, 6, 8, 8), pyramid=8, tower=1)
CELLS = IMAGE_SIZE // STRIDES[0]


def proposals(seed: int, batch: int = 2, count: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(batch, count, 2, generator=generator) * 80
    side = torch.rand(batch, count, 2, generator=generator) * 40 + 8
    return torch.cat([corner, corner + side], -1)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_two_products_pool_as_bilinear_sampling_does(seed: int) -> None:
    boxes = proposals(seed, batch=1)
    level = torch.randn(1, 3, CELLS, CELLS, generator=torch.Generator().manual_seed(seed))
    rows, columns = pooling(boxes, 1), pooling(boxes, 0)
    made = torch.einsum("kph,chw,kqw->kcpq", rows[0], level[0], columns[0])
    share = (torch.arange(BINS) + 0.5) / BINS
    low, high = boxes[0, :, :2], boxes[0, :, 2:]
    places = (low[:, :, None] + (high - low)[:, :, None] * share) / IMAGE_SIZE * 2 - 1
    grid = torch.stack(
        [
            places[:, 0, None, :].expand(-1, BINS, -1),
            places[:, 1, :, None].expand(-1, -1, BINS),
        ],
        -1,
    )
    wanted = F.grid_sample(
        level.expand(len(grid), -1, -1, -1), grid, padding_mode="border", align_corners=False
    )
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)


def test_the_head_pools_what_einsum_would() -> None:
    torch.manual_seed(0)
    model = TwoStage(TINY).eval()
    boxes = proposals(0)
    level = torch.randn(2, TINY.pyramid, CELLS, CELLS)
    rows, columns = pooling(boxes, 1), pooling(boxes, 0)
    logits, deltas = model.judge(level, rows, columns)
    pooled = torch.einsum("bkph,bchw,bkqw->bkpcq", rows, level, columns).flatten(2)
    hidden = torch.relu(model.second(torch.relu(model.first(pooled))))
    torch.testing.assert_close(logits, model.classes(hidden))
    torch.testing.assert_close(deltas, model.boxes(hidden).reshape(2, -1, 4))


def test_deltas_of_a_proposal_move_that_proposal() -> None:
    boxes = proposals(1)
    classes = len(CLASSES)
    deltas = torch.zeros(2, boxes.shape[1] * classes, 4)
    still = refined(deltas, boxes)
    torch.testing.assert_close(still.view(2, -1, classes, 4)[:, :, 3], boxes)
    deltas.view(2, -1, classes, 4)[1, 4, 2, 0] = 1.0  # one tenth of the width to the right
    moved = refined(deltas, boxes).view(2, -1, classes, 4)
    step = SPREAD[0] * (boxes[1, 4, 2] - boxes[1, 4, 0])
    torch.testing.assert_close(moved[1, 4, 2, 0], boxes[1, 4, 0] + step)
    assert int((moved != still.view_as(moved)).any(-1).sum()) == 1


def test_confident_rows_become_detections_of_their_class() -> None:
    boxes = torch.tensor([[[10.0, 10, 40, 40], [60, 60, 100, 90]]])
    logits = torch.zeros(1, 2, 1 + len(CLASSES))
    logits[0, 0, 0] = 10.0  # background
    logits[0, 1, 1 + 5] = 10.0
    (found,) = two_stage_detections((logits, torch.zeros(1, 2 * len(CLASSES), 4)), boxes)
    assert found.labels.tolist() == [5]
    torch.testing.assert_close(found.boxes[0], boxes[0, 1])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_overlaps_do_not_depend_on_where_the_proposal_lies(seed: int) -> None:
    boxes = proposals(seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (2, boxes.shape[1] * len(CLASSES), 4)
    first, second = torch.randn(2, *shape, generator=generator)
    logits = torch.randn(2, boxes.shape[1], 1 + len(CLASSES), generator=generator)
    near, far = (relative_predictions((logits, d)) for d in (first, second))
    wanted = aligned_iou(refined(first, boxes), refined(second, boxes))
    torch.testing.assert_close(aligned_iou(near[1], far[1]), wanted, rtol=1e-3, atol=1e-4)
    assert near[0].shape == (*shape[:2], 1)


def test_proposals_are_apart_and_fill_their_number() -> None:
    generator = torch.Generator().manual_seed(0)
    count = 3 * sum((IMAGE_SIZE // s) ** 2 for s in STRIDES)
    logits = torch.randn(2, count, len(CLASSES), generator=generator)
    found = propose(logits, torch.randn(2, count, 4, generator=generator) / 8)
    assert found.shape == (2, PROPOSALS, 4)
    apart = pairwise_iou(found[0], found[0]).fill_diagonal_(0)
    assert float(apart.max()) <= 0.7


def test_all_backends_agree_on_a_quantized_head() -> None:
    torch.manual_seed(0)
    model = TwoStage(TINY).eval().requires_grad_(False)
    batches = [inputs_of(torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE), proposals(s)) for s in (0, 1)]
    loss = qgraph.FilteredGlobalLoss(relative_predictions, theta_c=0.0, distance="overlap")
    chosen = qgraph.pipeline("det_w4a8").replace("tune-ranges", qgraph.passes.TuneRanges(steps=4))
    quantized = qgraph.compile(model, batches, chosen, loss=loss, progress=False, verify=False)
    told = [d for d in quantized.report.decisions if d.by == "plan-heads"]
    assert any(d.outcome == "applied" for d in told)
    wanted = quantized.lower("reference")(**batches[0])
    for mine, theirs in zip(quantized(**batches[0]), wanted, strict=True):
        assert torch.equal(mine, theirs)
    onnx = quantized.lower("onnx")(**batches[0])
    for mine, theirs in zip(onnx, wanted, strict=True):
        torch.testing.assert_close(torch.as_tensor(mine), theirs, rtol=1e-3, atol=1e-3)
