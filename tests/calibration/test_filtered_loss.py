# SPDX-License-Identifier: Apache-2.0
"""Laws of the filtered global loss: its mask is monotone, masked boxes feel nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qgraph.calibration.boxes import aligned_iou
from qgraph.calibration.filtered_loss import (
    FilteredGlobalLoss,
    Kept,
    Predictions,
    pixel_predictions,
)
from qgraph.errors import ConfigError

seeds = st.integers(0, 10_000)
shares = st.floats(0.0, 1.0)
Pair = tuple[Tensor, Tensor]


def outputs(seed: int, rows: int = 12) -> tuple[Pair, Pair]:
    """Raw (logits, boxes) of a quantized and a float network."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, rows, 3, generator=generator) * 3 - 3
    corner = torch.rand(2, rows, 2, generator=generator) * 0.6
    boxes = torch.cat([corner, corner + 0.1 + torch.rand(2, rows, 2, generator=generator) / 3], -1)
    moved = boxes + torch.randn(2, rows, 4, generator=generator) * 0.1
    noisy = logits + torch.randn(2, rows, 3, generator=generator)
    return (noisy, moved), (logits, boxes)


def same(raw: Pair) -> Pair:
    return raw


@settings(max_examples=30, deadline=None)
@given(seed=seeds, first=st.tuples(shares, shares), more=st.tuples(shares, shares))
def test_raising_a_threshold_never_adds_a_box(
    seed: int, first: tuple[float, float], more: tuple[float, float]
) -> None:
    student, teacher = (Predictions(*o) for o in outputs(seed))
    low = FilteredGlobalLoss(same, theta_c=first[0], theta_i=first[1])
    high = FilteredGlobalLoss(same, theta_c=max(first[0], more[0]), theta_i=max(first[1], more[1]))
    assert bool((high.mask(student, teacher) <= low.mask(student, teacher)).all())


@settings(max_examples=30, deadline=None)
@given(seed=seeds, lam=st.floats(0.0, 3.0), p=st.sampled_from([1.0, 2.0]))
def test_zero_thresholds_are_the_unfiltered_loss(seed: int, lam: float, p: float) -> None:
    (logits, boxes), (wanted, target) = outputs(seed)
    loss = FilteredGlobalLoss(same, theta_c=0.0, theta_i=0.0, lam=lam, p=p)
    probability = wanted.double().sigmoid()
    mine = logits.double().sigmoid()
    entropy = probability * (probability / mine).log()
    entropy = entropy + (1 - probability) * ((1 - probability) / (1 - mine)).log()
    expected = entropy.sum() + lam * (boxes - target).double().abs().pow(p).sum()
    assert float(loss((logits, boxes), (wanted, target))) == pytest.approx(
        float(expected) / 24, rel=1e-4
    )


@settings(max_examples=30, deadline=None)
@given(seed=seeds, theta=st.tuples(shares, shares), classes=st.sampled_from(["sigmoid", "softmax"]))
def test_it_is_zero_for_equal_outputs_and_never_negative(
    seed: int, theta: tuple[float, float], classes: str
) -> None:
    student, teacher = outputs(seed)
    loss = FilteredGlobalLoss(same, theta_c=theta[0], theta_i=theta[1], classes=classes)  # type: ignore[arg-type]
    assert abs(float(loss(teacher, teacher))) < 1e-6
    assert float(loss(student, teacher)) > 0


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_the_order_of_boxes_does_not_count(seed: int) -> None:
    student, teacher = outputs(seed)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    loss = FilteredGlobalLoss(same, theta_c=0.05, theta_i=0.3)
    shuffled = [tuple(t[:, order] for t in pair) for pair in (student, teacher)]
    assert float(loss(*shuffled)) == pytest.approx(float(loss(student, teacher)), rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, theta=st.tuples(st.floats(0.01, 0.9), st.floats(0.05, 0.9)))
def test_masked_boxes_feel_no_gradient_and_neither_does_the_teacher(
    seed: int, theta: tuple[float, float]
) -> None:
    student, teacher = outputs(seed)
    leaves = [t.requires_grad_() for t in (*student, *teacher)]
    loss = FilteredGlobalLoss(same, theta_c=theta[0], theta_i=theta[1])
    loss(student, teacher).backward()
    mask = loss.mask(Predictions(*student), Predictions(*teacher))
    moved = leaves[1].grad
    assert moved is not None
    assert bool((moved[~mask] == 0).all())
    assert bool((moved[mask] != 0).all())
    assert leaves[0].grad is not None
    assert bool((leaves[0].grad != 0).any(-1).all())
    assert leaves[2].grad is None
    assert leaves[3].grad is None


def test_masked_boxes_that_are_not_finite_do_no_harm() -> None:
    (logits, boxes), teacher = outputs(3)
    teacher[0][0, 0] = -50.0
    boxes[0, 0] = torch.inf
    boxes.requires_grad_()
    value = FilteredGlobalLoss(same)((logits, boxes), teacher)
    value.backward()
    assert bool(torch.isfinite(value))
    assert boxes.grad is not None
    assert bool(torch.isfinite(boxes.grad).all())


def test_the_filter_by_hand() -> None:
    """Four boxes: unsure, moved too far, moved a little, moved a little but unsure."""
    logits = torch.tensor([[[-9.0], [2.0], [2.0], [-9.0]]])
    boxes = torch.tensor([[[0.0, 0.0, 0.2, 0.2]] * 4])
    moved = boxes.clone()
    moved[0, 1] += 0.5
    moved[0, 2] += 0.05
    moved[0, 3] += 0.05
    loss = FilteredGlobalLoss(same, theta_c=1e-3, theta_i=0.1)
    assert float(loss((logits, moved), (logits, boxes))) == pytest.approx(4 * 0.05 / 4, rel=1e-5)
    kept = FilteredGlobalLoss(same, theta_c=1e-3, theta_i=0.1, normalizer="kept")
    assert float(kept((logits, moved), (logits, boxes))) == pytest.approx(4 * 0.05, rel=1e-5)
    found = loss.statistics((logits, moved), (logits, boxes))
    assert (found.rows, found.confident, found.kept) == (4, 2, 1)
    assert found.mean_overlap == pytest.approx((0.15**2 / (2 * 0.04 - 0.15**2)) / 2, rel=1e-4)
    assert (found + found).kept == 2
    assert Kept().mean_overlap == 0.0


def test_pixels_are_filtered_by_score() -> None:
    wanted = torch.full((1, 1, 2, 2), -12.0)
    wanted[0, 0, 0, 0] = 1.0
    made = wanted + 0.5
    loss = FilteredGlobalLoss(pixel_predictions, theta_c=1e-3)
    seen = FilteredGlobalLoss(pixel_predictions, theta_c=0.0)
    assert 0 < float(loss(made, wanted)) < float(seen(made, wanted))
    rows = pixel_predictions(torch.arange(12.0).view(1, 3, 2, 2)).logits
    assert rows[0, 1].tolist() == [1.0, 5.0, 9.0]


def test_several_heads_add_up_and_rows_can_be_invalid() -> None:
    student, teacher = outputs(5)
    one = FilteredGlobalLoss(same)
    two = FilteredGlobalLoss(lambda raw: [raw, raw])
    assert float(two(student, teacher)) == pytest.approx(2 * float(one(student, teacher)))
    valid = torch.zeros(2, 12, dtype=torch.bool)
    none = FilteredGlobalLoss(lambda raw: Predictions(raw[0], raw[1], valid))
    assert float(none(student, teacher)) == 0.0


def test_bad_options_and_shapes_are_refused() -> None:
    for options in ({"theta_c": 1.5}, {"theta_i": -0.1}, {"p": 0.5}, {"lam": -1.0}):
        with pytest.raises(ConfigError, match="allowed"):
            FilteredGlobalLoss(same, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="normalizer"):
        FilteredGlobalLoss(same, normalizer="some")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="class function"):
        FilteredGlobalLoss(same, classes="tanh")  # type: ignore[arg-type]
    student, teacher = outputs(1)
    with pytest.raises(ConfigError, match="expected"):
        FilteredGlobalLoss(lambda raw: (raw[0][0], raw[1]))(student, teacher)
    with pytest.raises(ConfigError, match="other heads"):
        FilteredGlobalLoss(same)((student[0][:, :3], student[1][:, :3]), teacher)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, size=st.floats(0.05, 20.0))
def test_by_overlap_a_box_counts_as_much_at_any_size(seed: int, size: float) -> None:
    (logits, boxes), (_, target) = outputs(seed)
    loss = FilteredGlobalLoss(same, distance="overlap")
    plain = loss((logits, boxes), (logits, target))
    torch.testing.assert_close(plain, loss((logits, boxes * size), (logits, target * size)))
    power = FilteredGlobalLoss(same)
    large = power((logits, boxes * size), (logits, target * size))
    torch.testing.assert_close(large, size * power((logits, boxes), (logits, target)))


@settings(max_examples=30, deadline=None)
@given(seed=seeds, confidence=st.floats(0.1, 3.0))
def test_boxes_count_by_the_float_networks_score(seed: int, confidence: float) -> None:
    (_, boxes), (wanted, target) = outputs(seed)
    loss = FilteredGlobalLoss(
        same, theta_c=0.0, theta_i=0.0, distance="overlap", confidence=confidence
    )
    found = loss((wanted, boxes), (wanted, target))
    shared = aligned_iou(boxes.double(), target.double())
    scores = wanted.double().sigmoid().amax(-1) ** confidence
    torch.testing.assert_close(found.double(), (scores * (1 - shared)).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [{"distance": "manhattan"}, {"confidence": -1.0}])
def test_unknown_distances_and_negative_weights_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"allowed|valid"):
        FilteredGlobalLoss(same, **bad)
