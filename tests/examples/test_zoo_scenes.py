# SPDX-License-Identifier: Apache-2.0
"""The scene generator: deterministic, with splits that share neither digits nor backgrounds."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.zoo.backgrounds import GAP, SOURCES, regions, sample_background
from examples.zoo.metrics import MaskScores, bootstrap, paired_bootstrap
from examples.zoo.objects import DIGITS, KINDS, SHAPES, render_shape
from examples.zoo.scene_cache import instance_map, object_rows
from examples.zoo.scenes import SceneConfig, make_scene
from examples.zoo.splits import SPLITS, digit_images, digit_indices


@settings(max_examples=15, deadline=None)
@given(split=st.sampled_from(SPLITS), index=st.integers(0, 10**6), seed=st.integers(0, 1000))
def test_a_scene_depends_on_seed_split_and_index_only(split, index, seed):
    first = make_scene(split, index, seed=seed)
    make_scene(split, index + 1, seed=seed)
    again = make_scene(split, index, seed=seed)
    assert np.array_equal(first.image, again.image)
    assert [o.box for o in first.objects] == [o.box for o in again.objects]
    assert not np.array_equal(first.image, make_scene(split, index, seed=seed + 1).image)


def test_every_digit_sample_belongs_to_exactly_one_split():
    owned = [set(digit_indices(s, label).tolist()) for s in SPLITS for label in range(10)]
    assert sum(map(len, owned)) == len(set().union(*owned)) == len(digit_images()[1]) == 1797


def test_no_digit_image_of_one_split_is_repeated_in_another():
    images, _ = digit_images()
    seen = [{images[i].tobytes() for n in range(10) for i in digit_indices(s, n)} for s in SPLITS]
    assert all(not (a & b) for a, b in combinations(seen, 2))


@pytest.mark.parametrize("number", range(len(SOURCES)))
def test_regions_of_two_splits_are_a_gap_apart(number):
    for a, b in combinations([regions(split)[number].box for split in SPLITS], 2):
        across = max(a[0] - b[2], b[0] - a[2])
        along = max(a[1] - b[3], b[1] - a[3])
        assert max(across, along) >= GAP


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_use_digits_and_background_of_their_own_split(split):
    allowed = {int(i) for label in range(10) for i in digit_indices(split, label)}
    for index in range(60):
        scene = make_scene(split, index)
        assert {o.digit for o in scene.objects if o.digit is not None} <= allowed
        region, box = scene.background.region, scene.background.box
        assert region in regions(split)
        assert region.box[0] <= box[0] < box[2] <= region.box[2]
        assert region.box[1] <= box[1] < box[3] <= region.box[3]


def test_objects_are_inside_the_image_apart_from_each_other_and_boxes_are_tight():
    config = SceneConfig(size=96)
    for index in range(40):
        scene = make_scene("train", index, config=config)
        assert scene.image.shape == (3, 96, 96)
        assert scene.image.dtype == np.float32
        assert 0 <= scene.image.min() <= scene.image.max() <= 1
        assert scene.objects
        assert np.sum([o.mask for o in scene.objects], axis=0).max() == 1
        for thing in scene.objects:
            rows, columns = np.nonzero(thing.mask)
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert box == thing.box
            assert thing.kind in KINDS
            assert (thing.digit is not None) == (thing.kind in DIGITS)
            if thing.digit is not None:
                assert digit_images()[1][thing.digit] == DIGITS.index(thing.kind)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_fills_its_patch_and_is_not_cut_by_its_rim(shape):
    solid = render_shape(shape, 30, 0.1) > 0.5
    rim = solid[0].sum() + solid[-1].sum() + solid[:, 0].sum() + solid[:, -1].sum()
    assert rim <= 1
    assert 0.15 < solid.mean() < 0.85


def test_an_unknown_shape_is_refused_by_name():
    with pytest.raises(ValueError, match="no shape 'blob'"):
        render_shape("blob", 20, 0.0)


def test_background_crops_keep_the_requested_size():
    background = sample_background(np.random.default_rng(0), "calibration", 48)
    assert background.pixels.shape == (48, 48, 3)


def test_the_instance_map_and_object_table_describe_the_scene():
    scene = make_scene("development", 3)
    instances, rows = instance_map(scene), object_rows(scene)
    for number, thing in enumerate(scene.objects):
        assert np.array_equal(instances == number + 1, thing.mask)
        assert KINDS[rows[number, 0]] == thing.kind
        assert tuple(rows[number, 3:]) == thing.box
    assert (rows[len(scene.objects) :] == -1).all()


def test_mask_scores_average_samples_and_pool_pixels():
    scores = MaskScores.empty()
    target = torch.tensor([[True, True, False, False], [True, False, False, False]])
    predicted = torch.tensor([[True, False, False, False], [True, False, False, False]])
    scores.add(predicted, target)
    scores.add(torch.zeros(1, 4, dtype=torch.bool), torch.zeros(1, 4, dtype=torch.bool))
    assert scores.per_sample == [0.5, 1.0, 1.0]
    assert scores.oiou == 2 / 3


def test_the_paired_interval_is_narrower_than_the_spread_of_its_parts():
    rng = np.random.default_rng(0)
    base = rng.random(500)
    shifted = base - 0.01 + 0.001 * rng.standard_normal(500)
    paired = paired_bootstrap(shifted.tolist(), base.tolist())
    assert paired.low < paired.mean < paired.high < 0
    alone = bootstrap(base.tolist())
    assert paired.high - paired.low < (alone.high - alone.low) / 10
