# SPDX-License-Identifier: Apache-2.0
"""The detection zoo: boxes round-trip, suppression is greedy, and mAP is COCO's."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from examples.zoo.det.boxes import (
    anchor_boxes,
    decode_deltas,
    decode_distances,
    detections,
    encode_deltas,
    locations,
)
from examples.zoo.det.data import CLASSES, IMAGE_SIZE, Target, batches, make_sample, target_of
from examples.zoo.det.metrics import BoxScores
from examples.zoo.det.model import FCOS, Layout, RetinaNet
from examples.zoo.det.train import Batch, anchor_loss, assign_anchors, location_loss
from qgraph.calibration.boxes import Detections, aligned_iou, detect, pairwise_iou, suppress
from qgraph.errors import ConfigError

TINY = Layout(stem=4, stages=(4, 6, 8, 8), pyramid=8, tower=1)


def random_boxes(generator: torch.Generator, count: int) -> Tensor:
    corner = torch.rand(count, 2, generator=generator) * 90
    side = torch.rand(count, 2, generator=generator) * 36 + 12
    return torch.cat([corner, corner + side], 1)


def case(seed: int, classes: int = 3) -> tuple[list[Detections], list[Target]]:
    """Some images with objects, and detections that are those objects moved, or noise."""
    generator = torch.Generator().manual_seed(seed)
    found, targets = [], []
    for _ in range(5):
        count = int(torch.randint(1, 6, (), generator=generator))
        boxes = random_boxes(generator, count)
        labels = torch.randint(0, classes, (count,), generator=generator)
        near = boxes.repeat(2, 1) + torch.randn(2 * count, 4, generator=generator) * 2
        noise = random_boxes(generator, 3)
        guesses = torch.cat([near, noise])
        scores = torch.rand(len(guesses), generator=generator)
        kinds = torch.cat([labels, labels, torch.randint(0, classes, (3,), generator=generator)])
        order = scores.argsort(descending=True)
        found.append(Detections(guesses[order], scores[order], kinds[order]))
        targets.append(Target(boxes, labels))
    return found, targets


def coco_map(found: list[Detections], targets: list[Target], classes: int) -> float:
    """The same by pycocotools."""
    coco = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    annotations: list[dict[str, object]] = []
    results: list[dict[str, object]] = []
    for image, (d, t) in enumerate(zip(found, targets, strict=True)):
        for box, label in zip(t.boxes.double().tolist(), t.labels.tolist(), strict=True):
            size = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            annotations.append({
                "id": len(annotations) + 1, "image_id": image, "category_id": label,
                "bbox": size, "area": size[2] * size[3], "iscrowd": 0,
            })  # fmt: skip
        rows = zip(d.boxes.double().tolist(), d.scores.tolist(), d.labels.tolist(), strict=True)
        for box, score, label in rows:
            size = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            results.append({"image_id": image, "category_id": label, "bbox": size, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO()
        truth.dataset = {
            "images": [{"id": i} for i in range(len(found))],
            "categories": [{"id": c} for c in range(classes)], "annotations": annotations,
        }  # fmt: skip
        truth.createIndex()
        run = evaluation.COCOeval(truth, truth.loadRes(results), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return float(run.stats[0])


@pytest.mark.parametrize("seed", range(6))
def test_map_equals_pycocotools(seed: int) -> None:
    found, targets = case(seed)
    scores = BoxScores(3)
    for d, t in zip(found, targets, strict=True):
        scores.add(d, t)
    assert scores.mean_average_precision() == pytest.approx(coco_map(found, targets, 3), abs=1e-9)


def test_map_of_cases_that_can_be_computed_by_hand() -> None:
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    target = Target(box, torch.tensor([0]))

    def score(boxes: Tensor, scores: list[float], labels: list[int]) -> float:
        counted = BoxScores(2)
        counted.add(Detections(boxes, torch.tensor(scores), torch.tensor(labels)), target)
        return counted.mean_average_precision()

    assert score(box, [0.9], [0]) == 1.0
    assert score(box, [0.9], [1]) == 0.0
    assert score(box[:0], [], []) == 0.0
    # overlap 0.8: found at 0.50 ... 0.80, seven of ten thresholds
    assert score(torch.tensor([[0.0, 0.0, 10.0, 8.0]]), [0.9], [0]) == pytest.approx(0.7)
    # a false detection in front of the true one halves the precision everywhere
    wrong = torch.tensor([[50.0, 50.0, 60.0, 60.0], [0.0, 0.0, 10.0, 10.0]])
    assert score(wrong, [0.9, 0.8], [0, 0]) == pytest.approx(0.5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), threshold=st.floats(0.1, 0.9))
def test_suppression_is_greedy(seed: int, threshold: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    boxes = random_boxes(generator, 20)
    scores = torch.rand(20, generator=generator)
    kept = suppress(boxes, scores, threshold).tolist()
    overlaps = pairwise_iou(boxes, boxes)
    expected: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        if all(float(overlaps[i, j]) <= threshold for j in expected):
            expected.append(i)
    assert kept == expected


def test_detections_of_other_classes_do_not_suppress_each_other() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.9]]])
    scores = torch.tensor([[[0.9, 0.8], [0.7, 0.02]]])
    (found,) = detect(scores, boxes)
    assert found.labels.tolist() == [0, 1]
    assert torch.equal(found.scores, torch.tensor([0.9, 0.8]))
    with pytest.raises(ConfigError, match="do not belong together"):
        detect(scores, boxes[:, :1])


def test_boxes_survive_encoding() -> None:
    anchors = anchor_boxes()
    boxes = random_boxes(torch.Generator().manual_seed(1), len(anchors))
    decoded = decode_deltas(encode_deltas(boxes, anchors)[None], anchors)[0]
    grown = (boxes[:, 2:] - boxes[:, :2]) / anchors[:, 2:] > 8
    torch.testing.assert_close(decoded[~grown.any(1)], boxes[~grown.any(1)], rtol=1e-4, atol=1e-3)
    centres, strides = locations()
    reach = torch.cat([centres - boxes[: len(centres), :2], boxes[: len(centres), 2:] - centres], 1)
    decoded = decode_distances((reach / strides[:, None])[None])[0]
    torch.testing.assert_close(decoded, boxes[: len(centres)], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", [RetinaNet, FCOS])
def test_outputs_have_one_row_per_anchor(kind: type[RetinaNet] | type[FCOS]) -> None:
    model = kind(TINY).eval()
    outputs = model(torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE))
    rows = len(anchor_boxes()) if kind is RetinaNet else len(locations()[0])
    assert [tuple(o.shape) for o in outputs[:2]] == [(2, rows, len(CLASSES)), (2, rows, 4)]
    assert len(detections(outputs)) == 2


def test_every_object_gets_an_anchor_and_perfect_outputs_have_almost_no_loss() -> None:
    targets = [target_of(make_sample("train", i)) for i in range(4)]
    most = max(len(t.labels) for t in targets)
    boxes = torch.full((4, most, 4), -1.0)
    labels = torch.full((4, most), -1)
    for i, t in enumerate(targets):
        boxes[i, : len(t.labels)], labels[i, : len(t.labels)] = t.boxes, t.labels
    batch = Batch(torch.zeros(4, 3, IMAGE_SIZE, IMAGE_SIZE), boxes, labels)
    anchors = anchor_boxes()
    found, _ = assign_anchors(batch, anchors)
    for i, t in enumerate(targets):
        assert set(found[i].tolist()) >= set(range(len(t.labels)))
    logits = torch.full((4, len(anchors), len(CLASSES)), -20.0)
    deltas = torch.zeros(4, len(anchors), 4)
    for i, k in torch.nonzero(found >= 0).tolist():
        logits[i, k, labels[i, found[i, k]]] = 20.0
        deltas[i, k] = encode_deltas(boxes[i, found[i, k]], anchors[k])
    assert float(anchor_loss((logits, deltas), batch)) < 1e-3
    assert float(anchor_loss((-logits, deltas), batch)) > 1.0


def test_the_anchor_free_loss_prefers_the_true_boxes() -> None:
    target = target_of(make_sample("train", 3))
    batch = Batch(torch.zeros(1, 3, 8, 8), target.boxes[None], target.labels[None])
    centres, strides = locations()
    logits, quality = torch.zeros(1, len(centres), 17), torch.zeros(1, len(centres), 1)
    near = pairwise_iou(torch.cat([centres - 1, centres + 1], 1), target.boxes).argmax(1)
    box = target.boxes[near]
    true = torch.cat([centres - box[:, :2], box[:, 2:] - centres], 1) / strides[:, None]
    right = location_loss((logits, true[None], quality), batch)
    wrong = location_loss((logits, true[None] * 0.5, quality), batch)
    assert float(right) < float(wrong)


def test_samples_depend_on_their_number_only_and_boxes_are_tight() -> None:
    ((inputs, targets),) = batches("development", 3, 3)
    again = list(batches("development", 3, 2))
    assert torch.equal(inputs["pixel_values"][2:], again[1][0]["pixel_values"])
    scene = make_sample("development", 2)
    assert torch.equal(targets[2].boxes, target_of(scene).boxes)
    thing = scene.objects[0]
    columns = np.flatnonzero(thing.mask.any(0))
    assert (int(columns[0]), int(columns[-1]) + 1) == (thing.box[0], thing.box[2])


def test_overlap_of_empty_and_equal_boxes() -> None:
    empty, full = torch.zeros(4), torch.tensor([0.0, 0.0, 2.0, 2.0])
    assert float(aligned_iou(empty, empty)) == 0.0
    assert float(aligned_iou(full, full)) == 1.0
    assert float(aligned_iou(full, torch.tensor([1.0, 0.0, 3.0, 2.0]))) == pytest.approx(1 / 3)
