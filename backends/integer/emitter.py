# SPDX-License-Identifier: Apache-2.0
"""Lowering a quantized graph to torch ops on integer codes, node by node.

The lowered graph holds no dequantize nodes: codes travel in storage, accumulators wait for
their reader, and each quantizer behind a product becomes one requantization.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from qgraph.backends.elementary import is_elementary
from qgraph.backends.integer.choice import choose
from qgraph.backends.integer.emission import COPIED_META, VIEWS
from qgraph.backends.integer.opaque import opaque
from qgraph.backends.integer.quantizing import QuantizerEmission
from qgraph.backends.integer.reuse import reuse_buffers
from qgraph.backends.integer.storage import Storage
from qgraph.backends.integer.values import Coded, KernelChoice, Pending, Product
from qgraph.backends.levels import Levels
from qgraph.backends.products import ProductForm
from qgraph.backends.semantics import Role
from qgraph.formats import AffineEncoding, Encoding
from qgraph.formats.base import along
from qgraph.formats.levels import levels_of

aten = torch.ops.aten


class Emitter(QuantizerEmission):
    """The walk over a quantized graph; see the module docstring."""

    def lower(self) -> GraphModule:
        """Emit all nodes; returns the lowered graph."""
        with torch.no_grad():
            for node in self.source.graph.nodes:
                self.current = node
                self._emit(node)
        self.graph._codegen = copy.copy(self.source.graph._codegen)
        self.graph.eliminate_dead_code()
        if not self.compiled:
            reuse_buffers(self.graph, self.owned)
        return GraphModule(self.root, self.graph)

    def _emit(self, node: Node) -> None:
        if node.op == "placeholder":
            copied = self.graph.placeholder(node.name)
            copied.target, copied.args = node.target, node.args
            copied.meta.update({k: node.meta[k] for k in COPIED_META if k in node.meta})
            self.env[node] = copied
        elif node.op == "output":
            self.graph.output(map_arg(node.args[0], self.result))
        elif node.op == "call_function" and node not in self.semantics.fixed:
            self.env[node] = self._by_role(node)

    def _by_role(self, node: Node) -> Any:
        match self.semantics.roles[node]:
            case Role.QUANTIZE:
                coded = self._quantize(node)
                self.codes[node.name] = coded
                return coded
            case Role.READ:
                return self.coded(node.args[0], self.semantics.levels[node].encoding)  # type: ignore[arg-type]
            case Role.TABLE:
                return self.env[node.args[0]]  # type: ignore[index]
            case Role.MOVE:
                return self._move(node)
            case Role.PRODUCT:
                return self._product(node)
            case Role.CLAMP:
                pending: Pending = self.env[node.args[0]]  # type: ignore[index]
                clamp = pending.clamp.then(*self.semantics.clamps[node])
                return Pending(pending.product, pending.moves, clamp)
            case Role.RESAMPLE:
                return self._resample(node)
            case Role.SHAPE:
                return self.call(node.target, *map_arg(node.args, self._shaped))
            case Role.FLOAT:
                return self._float(node)

    def _float(self, node: Node) -> Node | Coded:
        source = node.args[0] if node.args else None
        if isinstance(source, Node) and isinstance(self.env.get(source), Coded):
            coded = self.env[source]
            if source not in self.semantics.levels:
                return Coded(self.moved(node, coded.node), coded.storage)
        load = self.plain if is_elementary(node.target) else self._contiguous
        args, kwargs = map_arg(node.args, load), map_arg(node.kwargs, load)
        target = aten.reshape.default if node.target in VIEWS else node.target
        emitted = self.call(opaque(target) if self.compiled else target, *args, **kwargs)
        emitted.meta["val"] = node.meta.get("val")
        return emitted

    def _resample(self, node: Node) -> Node | Coded:
        """Interpolated levels, then the scale: exact in any order of summation."""
        source: Any = node.args[0]
        levels = self.semantics.levels[source]
        integers = self.levels(self.env[source], levels, source.meta["val"].ndim)
        target = opaque(node.target) if self.compiled else node.target
        between = self.call(target, integers, *map_arg(node.args[1:], self._shaped))
        between.meta["val"] = node.meta["val"]
        scale = self.buffer(f"{source.name}_scale", levels.scale)
        return self.arithmetic(aten.mul.Tensor, between, scale)

    def _contiguous(self, node: Node) -> Any:
        """A value in the layout that the reference uses, too: see `Semantics.layout`."""
        plain, layout = self.plain(node), self.semantics.layout(node)
        if layout is None or not isinstance(plain, Node) or node in self.semantics.fixed:
            return plain
        key = ("contiguous", plain, layout)
        if key not in self.memo:
            same = self.call(aten.contiguous.default, plain, memory_format=layout)
            same.meta["val"] = node.meta.get("val")
            self.memo[key] = same
        return self.memo[key]

    def coded(self, node: Node, encoding: Encoding) -> Coded:
        """Codes of a node; those of constants and graph inputs are brought into storage."""
        value = self.env.get(node)
        if isinstance(value, Coded):
            return value
        storage = Storage.of(encoding)
        if node in self.semantics.fixed:
            codes = self.semantics.constant(node)
            return Coded(self.buffer(f"{node.name}_codes", storage.pack(codes)), storage)
        wide = self.call(aten.to.dtype, value, torch.int32)
        moved = self.call(aten.add.Tensor, wide, storage.offset)
        return Coded(self.call(aten.to.dtype, moved, storage.dtype), storage)

    def _shaped(self, node: Node) -> Any:
        value = self.env.get(node)
        if isinstance(value, Coded):
            return value.node
        if isinstance(value, Pending):
            return self.replay(value.product.node, value.moves)
        return self.plain(node)

    def _move(self, node: Node) -> Any:
        if node.target is aten.cat.default:
            parts: Any = node.args[0]
            coded = [self._operand(part) for part in parts]
            moved = self.moved(node, *(item.node for item in coded))
            return Coded(moved, coded[0].storage)
        value = self.env.get(node.args[0])  # type: ignore[arg-type]
        if isinstance(value, Pending):
            return Pending(value.product, (*value.moves, node), value.clamp)
        source = self._operand(node.args[0])
        return Coded(self.moved(node, source.node), source.storage)

    def _operand(self, node: Any) -> Coded:
        return self.coded(node, self.semantics.levels[node].encoding)

    def plain(self, node: Node) -> Any:
        """The value of a node as an ordinary tensor, materialised where it is in levels."""
        key = ("plain", node)
        if key not in self.memo:
            value = self._plain(node)
            if isinstance(value, Node):
                value.meta.setdefault("val", node.meta.get("val"))
            self.memo[key] = value
        return self.memo[key]

    def result(self, node: Node) -> Any:
        """A graph output."""
        return self.plain(node)

    def _plain(self, node: Node) -> Any:
        if node in self.semantics.fixed:
            value = self.semantics.constant_value(node)
            return self.buffer(node.name, value) if isinstance(value, Tensor) else value
        value = self.env[node]
        if isinstance(value, Pending):
            return self.replay(self._materialized(value), value.moves)
        if not isinstance(value, Coded):
            return value
        levels = self.semantics.levels.get(node)
        if levels is None:
            wide = self.call(aten.to.dtype, value.node, torch.int32)
            shifted = self.call(aten.sub.Tensor, wide, value.storage.offset)
            return self.call(aten.to.dtype, shifted, node.meta["val"].dtype)
        ndim = node.meta["val"].ndim
        scale = self.along(f"{node.name}_scale", levels.scale, levels.axis, ndim)
        return self.arithmetic(aten.mul.Tensor, self.levels(value, levels, ndim), scale)

    def levels(
        self, coded: Coded, levels: Levels, ndim: int, dtype: torch.dtype = torch.float32
    ) -> Node:
        """Levels of codes as floats."""
        key = ("levels", coded.node, id(levels.encoding), levels.axis, dtype)
        if key not in self.memo:
            self.memo[key] = self._levels(coded, levels, ndim, dtype)
        node: Node = self.memo[key]
        return node

    def _levels(self, coded: Coded, levels: Levels, ndim: int, dtype: torch.dtype) -> Node:
        if isinstance(levels.encoding, AffineEncoding):
            zero = levels.encoding.zero_point + coded.storage.offset
            wide = coded.node
            if coded.storage.dtype is not dtype:  # else `to` would hand out the codes themselves
                wide = self.arithmetic(aten.to.dtype, wide, dtype)
            if levels.axis is None:
                number = int(zero)
                return self.arithmetic(aten.sub.Tensor, wide, number) if number else wide
            view = along(zero.to(dtype), levels.axis, ndim)
            return self.arithmetic(aten.sub.Tensor, wide, self.buffer("zero_points", view))
        table = levels.encoding.table()
        if table.ndim == 1 or levels.axis is None:
            return self.lookup("levels", table.reshape(-1).to(dtype), coded.node)
        index = self.call(aten.to.dtype, coded.node, torch.int64)
        entries = self.buffer("levels", table)
        return self.call(
            aten.to.dtype, self.call(levels_of, index, entries, levels.axis), dtype
        )  # fmt: skip

    def _materialized(self, pending: Pending) -> Node:
        product, clamp = pending.product, pending.clamp
        key = ("float", product.node, clamp)
        if key not in self.memo:
            scale = self.buffer(f"{product.form.node.name}_scale", product.form.scale)
            value = self.arithmetic(aten.mul.Tensor, product.node, scale)
            if not clamp.is_open:
                value = self.arithmetic(aten.clamp.default, value, clamp.low, clamp.high)
            self.memo[key] = value
        node: Node = self.memo[key]
        return node

    def _product(self, node: Node) -> Any:
        form = self.semantics.products[node]
        if form.groups:
            return self._biased(form, self._partials(form))
        choice = self._choose(form)
        self.choices[node] = choice
        product = Product(choice.accumulator, form)
        if form.bias is None:
            return Pending(product)
        return self._biased(form, self._materialized(Pending(product)))

    def _choose(self, form: ProductForm) -> KernelChoice:
        return choose(self, form)

    def _partials(self, form: ProductForm) -> Node:
        """One float32 or float64 product per channel group; see `combine_partials`."""
        from qgraph.backends.integer.choice import group_choices, of_groups

        total: Node | None = None
        choices = group_choices(self, form)
        self.choices[form.node] = of_groups(choices)
        for choice, scale in zip(choices, form.group_scales, strict=True):
            part = self.call(aten.mul.Tensor, choice.accumulator, self.buffer("group_scale", scale))
            total = part if total is None else self.call(aten.add.Tensor, total, part)
        assert total is not None
        return total

    def _biased(self, form: ProductForm, value: Node) -> Node:
        if form.bias is None:
            return value
        bias = self.plain(form.bias)
        ndim = form.node.meta["val"].ndim
        if form.channel_axis == 1:
            bias = self.call(aten.reshape.default, bias, [-1] + [1] * (ndim - 2))
        return self.call(aten.add.Tensor, value, bias)
