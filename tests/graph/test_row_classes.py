# SPDX-License-Identifier: Apache-2.0
"""Classes of rows against partitions kept as plain sets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qgraph.graph.row_classes import RowClasses, compact, compact_pair

laws = settings(max_examples=30, deadline=None)
SIZE = 9
steps = st.lists(
    st.tuples(st.sampled_from(["unite", "pin"]), st.integers(0, SIZE), st.integers(0, SIZE)),
    max_size=14,
)


class Sets:
    """The definition: a list of sets, and the first reason of each pinned one."""

    def __init__(self) -> None:
        self.sets = [{label} for label in range(1, SIZE + 1)]
        self.why: dict[int, tuple[int, str]] = {}  # by label: when and why

    def of(self, label: int) -> set[int]:
        return next(s for s in self.sets if label in s)

    def pin(self, label: int, when: int) -> None:
        if label and not any(v in self.why for v in self.of(label)):
            self.why[label] = when, f"reason {when}"

    def unite(self, a: int, b: int, when: int) -> None:
        if not a or not b:
            self.pin(a or b, when)
        elif self.of(a) is not self.of(b):
            one, other = self.of(a), self.of(b)
            self.sets.remove(other)
            one |= other


@laws
@given(steps)
def test_classes_are_the_sets_that_unions_leave_and_keep_a_reason(drawn):
    classes, sets = RowClasses(SIZE), Sets()
    for when, (what, a, b) in enumerate(drawn):
        if what == "pin":
            classes.pin(a, f"reason {when}")
            sets.pin(a, when)
        else:
            classes.unite(a, b, f"reason {when}")
            sets.unite(a, b, when)
    for label in range(1, SIZE + 1):
        assert classes.find(label) == min(sets.of(label))
        reasons = {sets.why[v][1] for v in sets.of(label) if v in sets.why}
        found = classes.reason(label)
        assert (found in reasons) if reasons else (found is None)
        if len(reasons) == 1:
            assert found in reasons
    assert classes.reason(0) is None
    labels = torch.arange(SIZE + 1).view(2, -1)
    roots = classes.roots(labels)
    assert roots.flatten().tolist() == [classes.find(v) for v in range(SIZE + 1)]
    free = classes.free(labels).flatten().tolist()
    assert free == [v > 0 and classes.reason(v) is None for v in range(SIZE + 1)]


def test_the_first_reason_of_a_class_is_kept_and_moves_with_unions() -> None:
    classes = RowClasses(4)
    classes.pin(3, "first")
    classes.pin(3, "second")
    classes.unite(1, 3, "united")
    assert [classes.reason(v) for v in range(5)] == [None, "first", None, "first", None]
    classes.pin(2, "of two")
    classes.unite(2, 1, "united")
    assert [classes.find(v) for v in range(1, 5)] == [1, 1, 1, 4]
    assert classes.reason(2) == "first"
    classes.pin_all(torch.tensor([[0, 4], [4, 1]]), "all")
    assert classes.reason(4) == "all"
    assert classes.reason(1) == "first"
    classes.unite(4, 0, "met nothing")
    assert classes.reason(4) == "all"


@laws
@given(st.integers(0, 999), st.integers(-2, 1))
def test_tensors_are_united_element_by_element(seed, axis):
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, SIZE + 1, (2, 3), generator=generator)
    second = torch.randint(0, SIZE + 1, (3,), generator=generator)
    whole, single = RowClasses(SIZE), RowClasses(SIZE)
    whole.unite_all(first, second, "r")
    for a, b in zip(first.flatten().tolist(), second.repeat(2).tolist(), strict=True):
        if a != b:
            single.unite(a, b, "r")
    assert state(whole) == state(single)
    along, by_hand = RowClasses(SIZE), RowClasses(SIZE)
    head = along.unite_along(first, axis, "r")
    assert torch.equal(head, first.narrow(axis, 0, 1))
    for row in first.movedim(axis, 0)[1:]:
        by_hand.unite_all(row.contiguous(), first.select(axis, 0), "r")
    assert state(along) == state(by_hand)


def state(classes: RowClasses) -> list[tuple[int, bool]]:
    return [(classes.find(v), classes.reason(v) is not None) for v in range(1, SIZE + 1)]


def test_equal_labels_are_free_and_repeated_ones_need_no_look() -> None:
    classes = RowClasses(SIZE)
    labels = torch.tensor([[1, 2, 3]])
    classes.unite_all(labels, labels.clone(), "r")
    classes.unite_along(labels.expand(4, 3), 0, "r")
    classes.unite_along(labels, 0, "r")
    assert state(classes) == [(v, False) for v in range(1, SIZE + 1)]


def test_labels_beyond_the_last_row_are_none() -> None:
    classes = RowClasses(SIZE)
    assert classes.find(SIZE) == SIZE
    with pytest.raises(IndexError):
        classes.find(SIZE + 1)


def varying(labels: Tensor) -> list[bool]:
    return [bool((labels != labels.narrow(a, 0, 1)).any()) for a in range(labels.ndim)]


@laws
@given(st.integers(0, 999), st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=4))
def test_compact_labels_keep_the_axes_along_which_they_vary(seed, shape):
    generator = torch.Generator().manual_seed(seed)
    base = [n if torch.rand((), generator=generator) < 0.5 else 1 for n in shape]
    labels = torch.randint(0, 4, base, generator=generator).expand(shape)
    for given_ in (labels, labels.contiguous()):
        small = compact(given_)
        axes = varying(given_)
        assert list(small.shape) == [n if v else 1 for n, v in zip(shape, axes, strict=True)]
        assert torch.equal(small.expand(shape), labels)
    other = torch.randint(0, 2, shape, generator=generator)
    first, second = compact_pair(labels, other)
    either = [a or b for a, b in zip(varying(labels), varying(other), strict=True)]
    wanted = [n if v else 1 for n, v in zip(shape, either, strict=True)]
    assert list(first.shape) == list(second.shape) == wanted
    assert torch.equal(first.expand(shape), labels)
    assert torch.equal(second.expand(shape), other)
