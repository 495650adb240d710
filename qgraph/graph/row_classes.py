# SPDX-License-Identifier: Apache-2.0
"""Which rows of weights must change together, and which may not change at all.

A row is one output channel of one stored weight. Rewrites that act on rows (a sign, a
permutation) must treat all rows of a class alike; a pinned class must stay as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor


class RowClasses:
    """Union-find over row labels 1 ... `size`, with a reason on classes that are pinned.

    Label 0 stands for "no row": values that no rewrite of rows changes.
    """

    def __init__(self, size: int) -> None:
        self.parent = list(range(size + 1))
        self.reasons: dict[int, str] = {}

    def find(self, label: int) -> int:
        """The representative of a label's class."""
        root = label
        while self.parent[root] != root:
            root = self.parent[root]
        while self.parent[label] != root:
            self.parent[label], label = root, self.parent[label]
        return root

    def unite(self, first: int, second: int, reason: str) -> None:
        """Two labels must agree; a row that meets label 0 is pinned for `reason`."""
        if first == 0 or second == 0:
            self.pin(first or second, reason)
            return
        a, b = sorted((self.find(first), self.find(second)))
        if a == b:
            return
        self.parent[b] = a
        if b in self.reasons:
            why = self.reasons.pop(b)
            self.reasons.setdefault(a, why)

    def pin(self, label: int, reason: str) -> None:
        """The label's class must stay as it is; the first reason is kept."""
        if label:
            self.reasons.setdefault(self.find(label), reason)

    def unite_all(self, first: Tensor, second: Tensor, reason: str) -> None:
        """Unite label tensors element by element (they broadcast)."""
        if first is second:
            return
        size = len(self.parent)
        pairs = torch.unique(first.to(torch.int64) * size + second)
        for pair in pairs.tolist():
            a, b = divmod(pair, size)
            if a != b:
                self.unite(a, b, reason)

    def unite_along(self, labels: Tensor, axis: int, reason: str) -> Tensor:
        """Let labels agree along an axis; return them with that axis of size 1."""
        head = labels.narrow(axis, 0, 1)
        self.unite_all(labels, head.expand_as(labels), reason)
        return head

    def pin_all(self, labels: Tensor, reason: str) -> None:
        """Pin every label that occurs."""
        for label in torch.unique(labels).tolist():
            self.pin(label, reason)

    def reason(self, label: int) -> str | None:
        """Why the label's class is pinned, or None if it is free."""
        return self.reasons.get(self.find(label)) if label else None

    def roots(self, labels: Tensor) -> Tensor:
        """Representative of each label, same shape."""
        values, inverse = torch.unique(labels, return_inverse=True)
        found = torch.tensor([self.find(v) for v in values.tolist()], dtype=torch.int64)
        return found[inverse]

    def free(self, labels: Tensor) -> Tensor:
        """Bool, same shape: whether each label's class may change."""
        values, inverse = torch.unique(labels, return_inverse=True)
        allowed = [v != 0 and self.find(v) not in self.reasons for v in values.tolist()]
        return torch.tensor(allowed, dtype=torch.bool)[inverse]


def compact(labels: Tensor) -> Tensor:
    """Labels with size 1 along every axis where they do not vary."""
    for axis in range(labels.ndim):
        if labels.shape[axis] == 1:
            continue
        head = labels.narrow(axis, 0, 1)
        if labels.stride(axis) == 0 or bool((labels == head).all()):
            labels = head
    return labels


def compact_pair(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two label tensors of one shape, cut to size 1 along axes where neither varies."""
    for axis in range(first.ndim):
        heads = first.narrow(axis, 0, 1), second.narrow(axis, 0, 1)
        if all(
            x.stride(axis) == 0 or bool((x == head).all())
            for x, head in zip((first, second), heads, strict=True)
        ):
            first, second = heads
    return first, second
