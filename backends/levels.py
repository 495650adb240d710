# SPDX-License-Identifier: Apache-2.0
"""Values in levels: what a dequantize node stands for until somebody needs floats.

`Levels` is static: it says how codes are to be read. Data movement keeps it, only the channel
axis wanders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qgraph.formats import AffineEncoding, Encoding, LevelEncoding
from qgraph.formats.base import along
from qgraph.formats.levels import levels_of
from qgraph.graph.ops import argument

aten = torch.ops.aten

_SAME_SHAPE = frozenset({
    aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default,
    aten.dropout.default,
})  # fmt: skip
_RESHAPES = frozenset({
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default,
    aten.unsqueeze.default,
})  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Levels:
    """How to read codes.

    Attributes:
        encoding: scale and levels.
        axis: where the channel axis of the encoding lies now (not negative), None per tensor.
    """

    encoding: Encoding
    axis: int | None

    @classmethod
    def of(cls, encoding: Encoding, ndim: int) -> Levels:
        """Levels of a fresh dequantize node whose value has rank `ndim`."""
        if is_per_tensor(encoding):
            return cls(encoding, None)
        assert encoding.axis is not None
        return cls(encoding, encoding.axis % ndim)

    @property
    def scale(self) -> Tensor:
        """fp32 [] or [C]."""
        return self.encoding.scale if self.axis is not None else self.encoding.scale.reshape(())

    @property
    def bits(self) -> int:
        """Storage bits of a code."""
        return self.encoding.bits

    def range(self) -> tuple[int, int]:
        """Smallest and largest level."""
        if isinstance(self.encoding, AffineEncoding):
            zero = self.encoding.zero_point
            return self.encoding.qmin - int(zero.max()), self.encoding.qmax - int(zero.min())
        table = self.encoding.table()
        return int(table.min()), int(table.max())

    def of_codes(self, codes: Tensor) -> Tensor:
        """int32 levels of codes."""
        if isinstance(self.encoding, AffineEncoding):
            zero = self.encoding.zero_point
            zero = zero.reshape(()) if self.axis is None else along(zero, self.axis, codes.ndim)
            return codes.to(torch.int32) - zero
        assert isinstance(self.encoding, LevelEncoding)
        table = self.encoding.levels
        return levels_of(codes, table.reshape(-1) if self.axis is None else table, self.axis)

    def values(self, codes: Tensor) -> Tensor:
        """fp32 values of codes: ``float32(level) * scale``."""
        return self.of_codes(codes).to(torch.float32) * along(self.scale, self.axis, codes.ndim)

    def codes(self) -> tuple[int, int]:
        """Smallest and largest code."""
        if isinstance(self.encoding, AffineEncoding):
            return self.encoding.qmin, self.encoding.qmax
        return 0, self.encoding.table().shape[-1] - 1


def is_per_tensor(encoding: Encoding) -> bool:
    """Whether one scale, and one table, serve all elements."""
    if isinstance(encoding, AffineEncoding):
        return encoding.block is None and encoding.scale.numel() == 1
    table = encoding.table()
    return encoding.scale.numel() == 1 and table.numel() == table.shape[-1]


def is_blocked(encoding: Encoding) -> bool:
    """Whether scales repeat along blocks of an axis."""
    return isinstance(encoding, AffineEncoding) and encoding.block is not None


def same_encoding(first: Encoding, second: Encoding) -> bool:
    """Whether two encodings have the same numbers."""
    if first is second:
        return True
    if isinstance(first, AffineEncoding) and isinstance(second, AffineEncoding):
        return (
            (first.qmin, first.qmax, first.axis) == (second.qmin, second.qmax, second.axis)
            and torch.equal(first.scale, second.scale)
            and torch.equal(first.zero_point, second.zero_point)
        )
    if isinstance(first, LevelEncoding) and isinstance(second, LevelEncoding):
        return (
            torch.equal(first.scale, second.scale)
            and torch.equal(first.levels, second.levels)
            and torch.equal(first.thresholds, second.thresholds)
            and first.axis == second.axis
        )
    return False


def moved_axis(node: Node, axis: int | None) -> tuple[bool, int | None]:
    """Follow a channel axis through a movement: (followed, where it lies in the output)."""
    if axis is None:
        return True, None
    source = node.args[0]
    if not isinstance(source, Node) or not isinstance(source.meta.get("val"), Tensor):
        return False, None
    before, after = source.meta["val"].shape, node.meta.get("val")
    if node.target in _SAME_SHAPE:
        return True, axis
    if node.target in _RESHAPES and isinstance(after, Tensor):
        return _through_view(before, after.shape, axis)
    return _through_permutation(node, len(before), axis)


def _through_permutation(node: Node, ndim: int, axis: int) -> tuple[bool, int | None]:
    if node.target is aten.permute.default:
        order: Any = node.args[1]
        return True, [d % ndim for d in order].index(axis)
    if node.target is aten.t.default or node.target is aten.transpose.int:
        pair = (0, ndim - 1) if node.target is aten.t.default else node.args[1:3]
        first, second = (int(d) % ndim for d in pair)  # type: ignore[arg-type]
        return True, {first: second, second: first}.get(axis, axis)
    if node.target is aten.slice.Tensor:
        return int(argument(node, 1)) % ndim != axis, axis  # type: ignore[call-overload]
    if node.target is aten.select.int:
        dim = int(argument(node, 1)) % ndim  # type: ignore[call-overload]
        return dim != axis, axis - int(dim < axis)
    return False, None


def _through_view(before: Sequence[Any], after: Sequence[Any], axis: int) -> tuple[bool, int]:
    """A view keeps the axis if all sizes before it, or all behind it, stay as they were."""
    if list(after[: axis + 1]) == list(before[: axis + 1]):
        return True, axis
    tail = len(before) - axis
    if tail <= len(after) and list(after[len(after) - tail :]) == list(before[axis:]):
        return True, len(after) - tail
    return False, 0
