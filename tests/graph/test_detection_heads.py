# SPDX-License-Identifier: Apache-2.0
"""The parts of a detector are found by what outputs depend on, or by what the caller names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.zoo.det.model import FCOS, Layout, RetinaNet
from qgraph.graph.detection_heads import DetectionHeads, find_heads
from qgraph.graph.ops import product
from qgraph.graph.provenance import module_path
from qgraph.graph.trace import trace
from tests.passes.detectors import SIDE, detector, images

TINY = Layout(stem=4, stages=(4, 6, 8, 8), pyramid=8, tower=1)


def heads_of(model: nn.Module, x: Tensor, **options: tuple[str, ...]) -> DetectionHeads:
    found = find_heads(trace(model, x), **options)
    assert isinstance(found, DetectionHeads), found
    return found


def paths(nodes) -> set[str]:
    return {module_path(n) for n in nodes if product(n) is not None}


def test_branches_necks_and_last_layers_of_the_zoo() -> None:
    x = torch.rand(2, 3, 64, 64)
    found = heads_of(RetinaNet(TINY).eval(), x)
    assert paths(found.regression) == {"box_tower.0", "box_values"}
    assert paths(found.classification) == {"class_tower.0", "class_logits"}
    assert paths(found.last) == {"box_values", "class_logits"}
    assert paths(found.necks) == {"neck.outputs.0", "neck.outputs.1", "neck.outputs.2"}
    assert set(found.shared) == {
        f"{name}.weight" for name in ("class_tower.0", "class_logits", "box_tower.0", "box_values")
    }
    assert all(len(calls) == 3 for calls in found.shared.values())


def test_a_quality_output_belongs_to_the_head_but_to_neither_branch() -> None:
    found = heads_of(FCOS(TINY).eval(), torch.rand(2, 3, 64, 64))
    assert len(found.others) == 1
    assert paths(found.regression) == {"box_tower.0", "box_values"}
    assert "quality" in paths(found.head)
    assert "quality" in paths(found.last)


def test_rows_of_boxes_and_scores_are_taken_apart() -> None:
    found = heads_of(detector(joined=True), images()[0])
    assert paths(found.regression) == {"box_tower.0", "boxes"}
    assert paths(found.classification) == {"class_tower.0", "classes"}
    assert len(found.joined) >= 2
    assert all(node.op == "call_function" for node in found.joined)
    assert not heads_of(detector(), images()[0]).joined


class Maps(nn.Module):
    """Outputs as maps with three anchors: four times three channels say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3)
        self.first = nn.Conv2d(4, 12, 1)
        self.second = nn.Conv2d(4, 6, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.body(x)
        return self.first(y), self.second(y)


def test_globs_name_what_shapes_do_not_tell() -> None:
    x = torch.rand(2, 3, SIDE, SIDE)
    refused = find_heads(trace(Maps().eval(), x))
    assert isinstance(refused, str)
    assert "no box output" in refused
    found = heads_of(Maps().eval(), x, boxes=("first",))
    assert paths(found.regression) == {"first"}
    assert paths(found.classification) == {"second"}
    named = heads_of(Maps().eval(), x, boxes=("first",), head=("second",))
    assert paths(named.head) == {"second"}


def test_a_classifier_is_no_detector() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 900, 7)).eval()
    assert isinstance(find_heads(trace(model, torch.rand(2, 3, SIDE, SIDE))), str)
