# SPDX-License-Identifier: Apache-2.0
"""Quantize nodes: requantization of accumulators, encoding of floats, tables, ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from qgraph.backends.arithmetic import Clamp, code_limits, multiplier
from qgraph.backends.integer.emission import Emission
from qgraph.backends.integer.ranking import HalfSteps, half_steps
from qgraph.backends.integer.storage import Storage
from qgraph.backends.integer.values import Coded, Pending
from qgraph.backends.levels import Levels
from qgraph.backends.tables import all_codes, chain_table
from qgraph.formats import AffineEncoding, Encoding, LevelEncoding
from qgraph.graph.dialect import QUANTIZE_LEVELS, is_quantize

aten = torch.ops.aten


class QuantizerEmission(Emission):
    """Emission of quantize nodes."""

    def as_float(self, node: Node) -> Node:
        """The float32 value of a source node."""
        value: Node = self.plain(node)
        return value

    def _parameter(self, node: Node) -> Node:
        """A quantizer's parameter as it is stored, in whatever the mode's values are kept."""
        return self.buffer(node.name, self.semantics.constant(node))

    def _quantize(self, node: Node) -> Coded:
        source: Any = node.args[0]
        target, storage = self.semantics.encodings[node], Storage.of(self.semantics.encodings[node])
        value = self.env.get(source)
        if isinstance(value, Pending) and isinstance(target, AffineEncoding):
            if target.block is None:
                return Coded(self._requantized(value, target, storage), storage)
        elif isinstance(value, Coded) and source in self.semantics.levels:
            levels = self.semantics.levels[source]
            small = levels.axis is None and Storage.of(target).dtype is torch.uint8
            if source in self.semantics.functions or (
                small and value.storage.dtype is torch.uint8 and target.scale.numel() == 1
            ):
                return Coded(self._table(source, value, levels, target), storage)
        if isinstance(target, LevelEncoding):
            return self._quantize_levels(node, target)
        if self._is_joined(source, target):
            return self._quantize_parts(source, target, storage)
        if isinstance(target, AffineEncoding) and target.block is None:
            floats = self.plain(source)
            return Coded(self._encoded(source, floats, target, storage), storage)
        rest = map_arg(node.args[1:], self._parameter)
        codes = self.call(
            node.target, self.as_float(source), *rest, **map_arg(node.kwargs, self._parameter)
        )
        wide = self.call(
            aten.add.Tensor, self.call(aten.to.dtype, codes, torch.int32), storage.offset
        )
        return Coded(self.call(aten.to.dtype, wide, storage.dtype), storage)

    def _quantize_levels(self, node: Node, target: LevelEncoding) -> Coded:
        source: Any = node.args[0]
        floats, storage = self.as_float(source), Storage.of(target)
        if (steps := half_steps(target)) is not None:
            return Coded(self._ranked(source, floats, target, steps), storage)
        rest = map_arg(node.args[1:], self._parameter)
        return Coded(self.call(QUANTIZE_LEVELS, floats, *rest, **node.kwargs), storage)

    def _ranked(self, source: Node, floats: Node, target: LevelEncoding, steps: HalfSteps) -> Node:
        """Rank of floats through a table over half steps; see `half_steps`."""
        scale = self.buffer(f"{source.name}_scale", target.scale.reshape(()))
        if source.meta["val"].dtype is not torch.float32:
            floats = self.call(aten.to.dtype, floats, torch.float32)
        units = self.arithmetic(aten.div.Tensor, floats, scale)
        halves = self.call(aten.ceil.default, self.arithmetic(aten.mul.Tensor, units, 2.0))
        inside = self.call(aten.clamp.default, halves, steps.low, steps.high)
        index = self.call(aten.to.dtype, self.call(aten.sub.Tensor, inside, steps.low), torch.int32)
        ranks = self.lookup(f"{source.name}_ranks", steps.ranks, index)
        if steps.cuts is None:
            return ranks
        cut = self.lookup(f"{source.name}_cuts", steps.cuts, index)
        return self.call(aten.add.Tensor, ranks, self.call(aten.gt.Tensor, units, cut))

    def _is_joined(self, source: Node, target: Encoding) -> bool:
        """Whether the source is a float concatenation that only quantizers read."""
        return (
            source.target is aten.cat.default
            and source not in self.semantics.fixed
            and isinstance(target, AffineEncoding)
            and target.scale.numel() == 1
            and all(is_quantize(user) for user in source.users)
        )

    def _quantize_parts(self, joined: Node, target: Any, storage: Storage) -> Coded:
        """Encoding is elementwise: encode first, then join a quarter of the bytes."""
        parts, sources = [], joined.args[0]
        for part in sources:  # type: ignore[union-attr]
            key = ("part", part, id(target.scale), target.describe())
            if key not in self.memo:
                self.memo[key] = self._encoded(part, self.plain(part), target, storage)  # type: ignore[arg-type]
            parts.append(self.memo[key])
        return Coded(self.call(aten.cat.default, parts, *joined.args[1:]), storage)

    def _table(self, source: Node, coded: Coded, levels: Levels, target: Encoding) -> Node:
        key = ("table", source, id(target.scale), target.describe())
        if key not in self.memo:
            out = Storage.of(target)
            entries = out.pack(chain_table(self.semantics, source, target))
            low = int(all_codes(levels)[0]) + coded.storage.offset
            if low > 0:
                entries = torch.cat([entries[:1].expand(low), entries])
            index = coded.node
            if low < 0:
                wide = self.call(aten.to.dtype, index, torch.int32)
                index = self.call(aten.sub.Tensor, wide, low)
            self.memo[key] = self.lookup(f"{source.name}_table", entries, index)
        node: Node = self.memo[key]
        return node

    def _encoded(
        self, source: Node, floats: Node, target: AffineEncoding, storage: Storage
    ) -> Node:
        """``clamp(round(x / s) + z)`` of floats."""
        ndim = source.meta["val"].ndim
        if source.meta["val"].dtype is not torch.float32:
            floats = self.call(aten.to.dtype, floats, torch.float32)
        scale = self.along(f"{source.name}_scale", target.scale, target.axis, ndim)
        units = self.arithmetic(aten.div.Tensor, floats, scale)
        return self._rounded(units, target, storage, Clamp(), ndim)

    def _requantized(self, pending: Pending, target: AffineEncoding, storage: Storage) -> Node:
        product, form = pending.product, pending.product.form
        ndim = form.node.meta["val"].ndim
        per_tensor = target.scale.numel() == 1
        if not per_tensor and pending.moves:
            return self._requantized_behind_moves(pending, target, storage)
        key: tuple[Any, ...] = (
            "codes", product.node, pending.clamp, id(target.scale), target.describe(),
        )  # fmt: skip
        if per_tensor:
            key = (
                "codes", product.node, pending.clamp, float(target.scale), int(target.zero_point),
                target.qmin, target.qmax,
            )  # fmt: skip
            target = _scalar(target)
        if key not in self.memo:
            factor = multiplier(form.scale, target, ndim)
            scaled = self.arithmetic(
                aten.mul.Tensor, product.node, self.buffer(f"{form.node.name}_multiplier", factor)
            )
            self.memo[key] = self._rounded(scaled, target, storage, pending.clamp, ndim)
        return self.replay(self.memo[key], pending.moves)

    def _requantized_behind_moves(
        self, pending: Pending, target: AffineEncoding, storage: Storage
    ) -> Node:
        """Scales differ by channel of the moved tensor: move integers and scales alike."""
        product, form = pending.product, pending.product.form
        last = pending.moves[-1]
        ndim = last.meta["val"].ndim
        scale: Any = self.buffer(f"{form.node.name}_scale", form.scale)
        if form.scale.ndim:
            scale = self.call(aten.expand_as.default, scale, product.node)
            scale = self.replay(scale, pending.moves)
        accumulator = self.replay(product.node, pending.moves)
        own = self.along(f"{last.name}_scale", target.scale, target.axis, ndim)
        factor = self.call(aten.div.Tensor, scale, own)
        scaled = self.call(aten.mul.Tensor, accumulator, factor)
        return self._rounded(scaled, target, storage, pending.clamp, ndim)

    def _rounded(
        self, units: Node, target: AffineEncoding, storage: Storage, clamp: Clamp, ndim: int
    ) -> Node:
        """``clamp(round(units) + z)`` in storage."""
        codes = self.arithmetic(aten.round.default, units)
        if target.scale.numel() == 1:
            target = _scalar(target)
            zero = int(target.zero_point) + storage.offset
            low, high = (int(v) + storage.offset for v in code_limits(clamp, target, ndim))
            if zero:
                codes = self.arithmetic(aten.add.Tensor, codes, zero)
            codes = self.arithmetic(aten.clamp.default, codes, low, high)
        else:
            zeros = (target.zero_point + storage.offset).to(torch.float32)
            if bool(zeros.any()):
                codes = self.arithmetic(
                    aten.add.Tensor, codes, self.along("zero_points", zeros, target.axis, ndim)
                )
            limits = [v + storage.offset for v in code_limits(clamp, target, ndim)]
            if clamp.is_open:
                low, high = (int(v.flatten()[0]) for v in limits)
                codes = self.arithmetic(aten.clamp.default, codes, low, high)
            else:
                bounds = [self.buffer("limits", v.to(torch.float32)) for v in limits]
                codes = self.arithmetic(aten.clamp.Tensor, codes, *bounds)
        return self.call(aten.to.dtype, codes, storage.dtype)


def _scalar(target: AffineEncoding) -> AffineEncoding:
    """A per-tensor encoding with scale and zero point of rank 0."""
    if target.scale.ndim == 0:
        return target
    return AffineEncoding(
        scale=target.scale.reshape(()), zero_point=target.zero_point.reshape(()),
        qmin=target.qmin, qmax=target.qmax,
    )  # fmt: skip
