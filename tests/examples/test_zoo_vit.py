# SPDX-License-Identifier: Apache-2.0
"""Digit classifiers: samples repeat, models fit their size and export, weights work."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from examples.zoo.vit import batches, evaluate, load_model
from examples.zoo.vit.data import make_sample
from examples.zoo.vit.weights import weights_path

KINDS = ("vit", "swin")


def test_samples_depend_on_split_and_index_only():
    first = make_sample("evaluation", 13)
    make_sample("evaluation", 14)
    again, other = make_sample("evaluation", 13), make_sample("development", 13)
    assert first.label == 3
    assert np.array_equal(first.image, again.image)
    assert not np.array_equal(first.image, other.image)


def test_batches_end_with_a_short_one():
    found = list(batches("calibration", 5, 3))
    assert [len(labels) for _, labels in found] == [3, 2]
    assert found[0][0]["pixel_values"].shape == (3, 3, 48, 48)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_fit_in_four_mebibytes(kind):
    assert weights_path(kind).stat().st_size <= 4 * 2**20


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_exports_with_a_dynamic_batch(kind):
    model = load_model(kind)
    inputs, _ = next(iter(batches("development", 2, 2)))
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)
    other, _ = next(iter(batches("development", 3, 3)))
    assert torch.allclose(program.module()(**other), model(**other), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_committed_weights_classify_nearly_all_of_a_few_samples(kind):
    assert evaluate(load_model(kind), "development", 200)["accuracy"] >= 0.93
