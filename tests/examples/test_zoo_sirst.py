# SPDX-License-Identifier: Apache-2.0
"""Scenes, metrics and trained networks of the small-target example."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from examples.zoo import sirst
from examples.zoo.sirst.metrics import Mask, SegmentationCounts
from examples.zoo.sirst.scenes import MAX_AREA, MIN_AREA, scene
from examples.zoo.sirst.scoring import WEIGHTS
from examples.zoo.sirst.train import SceneCache, fit, loss_of


def _mask(*pixels: tuple[int, int], size: int = 32) -> Mask:
    mask = np.zeros((size, size), dtype=np.bool_)
    for row, column in pixels:
        mask[row, column] = True
    return mask


def _counts(guess: Mask, truth: Mask) -> SegmentationCounts:
    counts = SegmentationCounts.empty()
    counts.update([guess], [truth])
    return counts


def test_a_scene_depends_only_on_seed_split_and_index():
    first = scene("train", 7)
    for index in (0, 7, 3):
        scene("train", index)
    again = scene("train", 7)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.mask, again.mask)
    assert not np.array_equal(first.image, scene("train", 7, seed=1).image)


def test_no_image_occurs_in_two_splits_or_twice():
    images = {scene(split, i).image.tobytes() for split in sirst.SPLITS for i in range(12)}
    assert len(images) == 12 * len(sirst.SPLITS)


def test_targets_have_two_to_nine_pixels_and_the_stated_contrast():
    scenes = [scene("calibration", i) for i in range(60)]
    for sample in scenes:
        labels, count = ndimage.label(sample.mask, np.ones((3, 3)))
        areas = np.bincount(labels.ravel())[1:]
        assert count == len(sample.contrasts) <= 3
        assert all(MIN_AREA <= area <= MAX_AREA for area in areas)
        assert all(1.9 <= contrast <= 8.1 for contrast in sample.contrasts)
    assert {s.kind for s in scenes} == {"cloud", "sea", "ground"}
    assert {len(s.contrasts) for s in scenes} == {0, 1, 2, 3}


def test_images_lie_on_the_twelve_bit_grid():
    image = scene("evaluation", 0).image
    assert image.dtype == np.float32
    assert image.min() >= 0.0
    assert image.max() <= 1.0
    np.testing.assert_allclose(image * 4095, np.round(image * 4095), atol=1e-3)


def test_an_unknown_split_is_refused():
    with pytest.raises(KeyError, match="training"):
        scene("training", 0)


def test_batches_cover_the_split_in_order_with_a_short_tail():
    got = list(sirst.batches("development", 5, 2))
    assert [len(images) for images, _ in got] == [2, 2, 1]
    images = torch.cat([images for images, _ in got])
    assert images.shape == (5, 1, sirst.SIZE, sirst.SIZE)
    np.testing.assert_array_equal(images[3, 0].numpy(), scene("development", 3).image)


def test_overlap_counts_pixels_and_a_near_centroid_matches():
    result = _counts(_mask((5, 5), (5, 6), (6, 7)), _mask((5, 5), (5, 6), (5, 7))).result()
    assert result == {"iou": 0.5, "niou": 0.5, "pd": 1.0, "fa": 0.0}


def test_diagonal_pixels_are_one_component():
    counts = _counts(_mask(), _mask((3, 3), (4, 4)))
    assert counts.targets == [1]
    assert counts.result()["pd"] == 0.0


@pytest.mark.parametrize(("column", "pd", "false_pixels"), [(12, 1.0, 0), (13, 0.0, 1)])
def test_a_match_is_closer_than_three_pixels(column, pd, false_pixels):
    counts = _counts(_mask((10, column)), _mask((10, 10)))
    assert counts.result()["pd"] == pd
    assert counts.false_pixels == [false_pixels]
    assert counts.result()["fa"] == false_pixels / 32**2


def test_one_prediction_matches_one_target_only_the_nearest():
    counts = _counts(_mask((10, 12)), _mask((10, 10), (10, 13)))
    assert counts.matched == [1]
    assert counts.targets == [2]
    assert counts.false_pixels == [0]


def test_images_without_target_and_prediction_leave_only_the_false_alarm_rate_defined():
    result = _counts(_mask(), _mask()).result()
    assert result["fa"] == 0.0
    assert all(math.isnan(result[key]) for key in ("iou", "niou", "pd"))


def test_niou_weighs_images_and_iou_weighs_pixels():
    counts = SegmentationCounts.empty()
    counts.update(
        [_mask((1, 1)), _mask((1, 1))],
        [_mask((1, 1)), _mask((1, 1), (1, 2), (1, 3), (1, 4))],
    )
    assert counts.result()["iou"] == 2 / 5
    assert counts.result()["niou"] == (1 + 1 / 4) / 2


def test_merging_equals_counting_everything_at_once():
    rng = np.random.default_rng(0)
    guesses, truths = rng.random((2, 6, 16, 16)) > 0.9
    whole, left, right = (SegmentationCounts.empty() for _ in range(3))
    whole.update(guesses, truths)
    left.update(guesses[:2], truths[:2])
    right.update(guesses[2:], truths[2:])
    assert left.merge(right) == whole
    assert right.merge(left).result() == whole.result()


def test_masks_of_different_shape_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        _counts(_mask(size=8), _mask(size=9))


@pytest.mark.parametrize("name", ["resunet", "nested"])
def test_a_network_exports_with_a_dynamic_batch(name):
    model = sirst.build(name).eval()
    image = torch.rand(2, 1, 32, 32)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (image,), dynamic_shapes=({0: batch},)).module()
    more = torch.rand(3, 1, 32, 32)
    torch.testing.assert_close(exported(more), model(more))
    assert exported(more).shape == (3, 1, 32, 32)


@pytest.mark.parametrize(("name", "floor"), [("resunet", 0.68), ("nested", 0.65)])
def test_trained_weights_are_small_and_segment_development_scenes(name, floor):
    model = sirst.load_model(name)
    assert not model.training
    assert (WEIGHTS / f"{name}.safetensors").stat().st_size <= 6 * 2**20
    scores = sirst.evaluate(model, "development", 32)
    assert scores["iou"] >= floor
    assert scores["pd"] >= 0.7
    assert scores["per_image"]["union"].shape == (32,)


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="allowed: nested, resunet"):
        sirst.load_model("unet")


def test_training_lowers_the_loss_on_its_own_crops():
    torch.manual_seed(0)
    cache = SceneCache.generate(4)
    images, masks = cache.crops(np.random.default_rng(0), 8)
    model = sirst.build("nested")
    before = float(loss_of(model(images), masks).detach())
    fit(model, cache, steps=12, batch_size=4)
    assert float(loss_of(model(images), masks).detach()) < before
