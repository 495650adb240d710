# SPDX-License-Identifier: Apache-2.0
"""Promptable segmentation: prompts lie on their object, the model exports, its weights work."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from examples.zoo.sam import batches, evaluate, load_model
from examples.zoo.sam.data import box_prompt, point_prompt
from examples.zoo.sam.encoder import RelativeAttention
from examples.zoo.sam.model import best_mask
from examples.zoo.sam.weights import WEIGHTS
from examples.zoo.scenes import make_scene


def test_point_prompts_lie_on_the_mask_and_box_prompts_near_the_corners():
    rng = np.random.default_rng(0)
    for index in range(30):
        thing = make_scene("development", index).objects[0]
        points, labels = point_prompt(rng, thing.mask)
        x, y = points[0].astype(int)
        assert thing.mask[y, x]
        assert labels == [1, -1, -1]
        corners, labels = box_prompt(rng, thing.box)
        assert np.abs(corners[1:].ravel() - thing.box).max() <= 1
        assert labels == [-1, 2, 3]


def test_mixed_batches_alternate_points_and_boxes():
    inputs, masks = next(iter(batches("calibration", 4, 4)))
    assert (inputs["labels"][:, 0] == 1).tolist() == [True, False, True, False]
    assert masks.shape == (4, 1, 80, 80)


def test_relative_positions_equal_the_sum_over_row_and_column_offsets():
    torch.manual_seed(0)
    layer = RelativeAttention(dim=4, heads=1, side=3)
    torch.nn.init.normal_(layer.vertical)
    torch.nn.init.normal_(layer.horizontal)
    query = torch.randn(1, 1, 1, 9, 4)
    bias = layer._positions(query)[0, 0, 0]
    for a in range(9):
        for b in range(9):
            rows, columns = a // 3 - b // 3 + 2, a % 3 - b % 3 + 2
            table = layer.vertical[rows] + layer.horizontal[columns]
            assert torch.allclose(bias[a, b], query[0, 0, 0, a] @ table, atol=1e-5)


def test_the_candidate_with_the_highest_quality_is_chosen():
    masks = torch.stack([torch.full((2, 2), v) for v in (-1.0, 1.0, -1.0)])[None]
    assert best_mask(masks, torch.tensor([[0.1, 0.9, 0.2]])).all()
    assert not best_mask(masks, torch.tensor([[0.9, 0.1, 0.2]])).any()


def test_weights_fit_in_eight_mebibytes():
    assert WEIGHTS.stat().st_size <= 8 * 2**20


@pytest.fixture(scope="module")
def model():
    return load_model()


def test_the_model_exports_with_a_dynamic_batch(model):
    inputs, _ = next(iter(batches("development", 2, 2)))
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {name: {0: batch} for name in inputs}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)
    other, _ = next(iter(batches("development", 3, 3)))
    for ours, theirs in zip(program.module()(**other), model(**other), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("prompt", ["box", "point"])
def test_the_committed_weights_reach_the_stated_quality(model, prompt):
    assert evaluate(model, "development", 48, prompt=prompt)["miou"] > 0.6
