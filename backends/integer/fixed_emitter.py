# SPDX-License-Identifier: Apache-2.0
"""Lowering to the fixed-point mode: the same walk, every value an integer.

What is not in codes is an int64 with 24 fractional bits (`qgraph.backends.fixed_point`). With
`exact_floats` only the products differ: float64, exact; that is the mode's reference.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from qgraph.backends import fixed_point as fixed
from qgraph.backends.arithmetic import code_limits
from qgraph.backends.bounds import INT32_LIMIT
from qgraph.backends.integer.choice import of_groups
from qgraph.backends.integer.emitter import Emitter
from qgraph.backends.integer.fixed_kernels import choose_fixed
from qgraph.backends.integer.fixed_ops import LOWERINGS
from qgraph.backends.integer.storage import Storage
from qgraph.backends.integer.values import Coded, KernelChoice, Pending
from qgraph.backends.levels import Levels
from qgraph.backends.products import ProductForm, contraction_axis_of_weight
from qgraph.backends.semantics import Semantics
from qgraph.formats import AffineEncoding, Encoding, LevelEncoding
from qgraph.formats.base import along
from qgraph.formats.levels import ranks_by_channel

aten = torch.ops.aten


class FixedEmitter(Emitter):
    """State of one fixed-point lowering."""

    def __init__(self, semantics: Semantics, *, exact_floats: bool = False) -> None:
        super().__init__(semantics)
        self.exact_floats = exact_floats
        self.islands: dict[Node, str] = {}

    # -- values --------------------------------------------------------------------------

    def operand(self, item: Any) -> Any:
        """An argument of a float op: fixed point, or a scalar's fixed-point integer."""
        if isinstance(item, Node):
            return self.plain(item)
        if isinstance(item, (float, int)) and not isinstance(item, bool):
            return int(fixed.to_fixed(torch.tensor(float(item))))
        return item

    def arguments(self, node: Node) -> tuple[Any, Any]:
        """All arguments, nodes as fixed point, literals as they are."""
        return map_arg(node.args, self.plain), map_arg(node.kwargs, self.plain)

    def exp_tables(self) -> tuple[Node, Node]:
        """The tables of the exponential, registered once."""
        if "exp" not in self.memo:
            table = fixed.ExpTable.make()
            self.memo["exp"] = (
                self.buffer("exp_coarse", table.coarse), self.buffer("exp_fine", table.fine),
            )  # fmt: skip
        pair: tuple[Node, Node] = self.memo["exp"]
        return pair

    def size_of(self, node: Node, axis: int) -> Any:
        """Size of a resize's result: a number, or computed from the input's."""
        size = node.meta["val"].shape[axis]
        if isinstance(size, int):
            return size
        arguments: Any = node.args
        source, sizes, *_, factors = arguments
        position = axis - 2
        if sizes is not None:
            return self.plain(sizes[position])
        before = self.call(aten.sym_size.int, self.plain(source), axis)
        return self.call(operator.mul, before, int(factors[position]))

    def _plain(self, node: Node) -> Any:
        if node in self.semantics.fixed:
            value = self.semantics.constant_value(node)
            if isinstance(value, Tensor) and value.is_floating_point():
                return self._constant(node, value)
            return self.buffer(node.name, value) if isinstance(value, Tensor) else value
        value = self.env[node]
        if isinstance(value, Coded) and node in self.semantics.levels:
            levels, ndim = self.semantics.levels[node], node.meta["val"].ndim
            wide = self.levels(value, levels, ndim, torch.int64)
            return self._rescaled(wide, along(levels.scale, levels.axis, ndim))
        if node.op == "placeholder" and _is_float(node):
            return self.call(fixed.to_fixed, value)
        return super()._plain(node)

    def _constant(self, node: Node, value: Tensor) -> Node:
        """A constant in fixed point; large ones are stored as int32 and widened when read."""
        wide = fixed.to_fixed(value)
        if wide.numel() < 2**16 or int(wide.abs().max()) >= 2**31:
            return self.buffer(node.name, wide)
        return self.call(aten.to.dtype, self.buffer(node.name, wide.to(torch.int32)), torch.int64)

    def _rescaled(self, integers: Node, scale: Tensor, bound: int = 0) -> Node:
        """Fixed point of integers (at most `bound`) times a real scale."""
        function = fixed.rescale if bound < INT32_LIMIT else fixed.rescale_wide
        values = fixed.factor(scale.double() * fixed.ONE)
        nodes = [self.buffer(hint, v) for hint, v in zip(("factor", "shift"), values, strict=True)]
        return self.call(fixed.saturate, self.call(function, integers, *nodes))

    def _materialized(self, pending: Pending) -> Node:
        product, clamp = pending.product, pending.clamp
        key = ("fixed", product.node, clamp)
        if key not in self.memo:
            value = self._rescaled(product.node, product.form.scale, product.form.bound)
            if not clamp.is_open:
                low, high = (int(fixed.to_fixed(torch.tensor(b))) for b in (clamp.low, clamp.high))
                value = self.call(aten.clamp.default, value, low, high)
            self.memo[key] = value
        node: Node = self.memo[key]
        return node

    # -- float ops -----------------------------------------------------------------------

    def _float(self, node: Node) -> Any:
        if not _is_float(node) and not any(_is_float(n) for n in node.all_input_nodes):
            return super()._float(node)
        source = node.args[0] if node.args else None
        coded = isinstance(source, Node) and isinstance(self.env.get(source), Coded)
        if coded and source not in self.semantics.levels:
            return super()._float(node)
        if node.target is aten.embedding.default and self._codes_of_table(node):
            return self._embedding(node)
        lowering = LOWERINGS.get(node.target)
        emitted = lowering(self, node) if lowering is not None else self._structural(node)
        return self._island(node) if emitted is None else emitted

    def _resample(self, node: Node) -> Any:
        return self._float(node)

    def _structural(self, node: Node) -> Node | None:
        """Movement, and comparisons between values or with zero."""
        from qgraph.backends.semantics import Role
        from qgraph.graph.ops import MOVES, SPLITS

        name = getattr(node.target, "_opname", getattr(node.target, "__name__", ""))
        if node.target in MOVES or node.target in SPLITS or name == "getitem":
            return super()._float(node)  # type: ignore[return-value]
        if name in {"eq", "ne", "lt", "le", "gt", "ge"}:
            return self.call(node.target, *(self.operand(item) for item in node.args))
        if name in {"argmax", "argmin", "any", "all"}:
            args, kwargs = self.arguments(node)
            return self.call(node.target, *args, **kwargs)
        if self.semantics.roles[node] is Role.SHAPE:
            return super()._float(node)  # type: ignore[return-value]
        return None

    def _codes_of_table(self, node: Node) -> bool:
        table: Any = node.args[0]
        return table in self.semantics.fixed and table in self.semantics.levels

    def _embedding(self, node: Node) -> Node:
        """Rows of codes, then fixed point: the table keeps its 8 bits."""
        table: Any = node.args[0]
        levels = self.semantics.levels[table]
        if levels.axis not in {None, 1}:
            return self._island(node)
        coded = self.coded(table, levels.encoding)
        rows = self.call(node.target, coded.node, *map_arg(node.args[1:], self.plain))
        ndim = node.meta["val"].ndim
        moved = Levels(levels.encoding, None if levels.axis is None else ndim - 1)
        wide = self.levels(Coded(rows, coded.storage), moved, ndim, torch.int64)
        return self._rescaled(wide, along(levels.scale, moved.axis, ndim))

    def _island(self, node: Node) -> Node:
        """An op without an integer form: floats in, floats out, and said so."""
        reason = self.semantics.reasons.get(node)
        self.islands[node] = reason or f"no integer form of {node.target}"

        def as_float(item: Node) -> Any:
            value = self.plain(item)
            if isinstance(value, Node) and _is_float(item):
                return self.call(fixed.from_fixed, value)
            return value

        args, kwargs = map_arg(node.args, as_float), map_arg(node.kwargs, as_float)
        value = self.call(node.target, *args, **kwargs)
        return self.call(fixed.to_fixed, value) if _is_float(node) else value

    def result(self, node: Node) -> Any:
        """A graph output: floats again."""
        value = self.plain(node)
        return self.call(fixed.from_fixed, value) if _is_float(node) else value

    # -- quantizers ----------------------------------------------------------------------

    def _requantized(self, pending: Pending, target: AffineEncoding, storage: Storage) -> Node:
        product, form = pending.product, pending.product.form
        ndim = form.node.meta["val"].ndim
        if target.scale.numel() > 1 and pending.moves:
            fixed_value = self.replay(self._materialized(pending), pending.moves)
            return self._codes_of(fixed_value, target, storage, pending.moves[-1].meta["val"].ndim)
        real = form.scale.double() / _over(target.scale, target, ndim).double()
        limits = [v + storage.offset for v in code_limits(pending.clamp, target, ndim)]
        codes = self._emit_codes(
            fixed.requantize if form.bound < INT32_LIMIT else fixed.requantize_fixed,
            product.node,
            fixed.factor(real),
            target,
            storage,
            limits,
        )
        return self.replay(codes, pending.moves)

    def _encoded(
        self, source: Node, floats: Node, target: AffineEncoding, storage: Storage
    ) -> Node:
        if source.op == "placeholder":  # the input's own quantizer: the last float
            return super()._encoded(source, self.env[source], target, storage)
        return self._codes_of(floats, target, storage, source.meta["val"].ndim)

    def _codes_of(self, value: Node, target: AffineEncoding, storage: Storage, ndim: int) -> Node:
        from qgraph.backends.arithmetic import OPEN

        real = 1 / (_over(target.scale, target, ndim).double() * fixed.ONE)
        limits = [v + storage.offset for v in code_limits(OPEN, target, ndim)]
        return self._emit_codes(
            fixed.requantize_fixed, value, fixed.factor(real), target, storage, limits
        )

    def _emit_codes(
        self, function: Any, value: Node, factor: tuple[Tensor, Tensor], target: AffineEncoding,
        storage: Storage, limits: list[Tensor],
    ) -> Node:  # fmt: skip
        ndim = max(factor[0].ndim, 1)
        zero = _over(target.zero_point, target, ndim).to(torch.int64) + storage.offset
        parameters = [*factor, zero, *(v.to(torch.int64) for v in limits)]
        nodes = [self.buffer("requantize", p) for p in parameters]
        return self.call(aten.to.dtype, self.call(function, value, *nodes), storage.dtype)

    def as_float(self, node: Node) -> Node:
        """The float input as it came, or fixed point turned back: the latter is an island."""
        if node.op == "placeholder":
            value: Node = self.env[node]
            return value
        self.islands[node] = "its quantizer has no integer form"
        return self.call(fixed.from_fixed, self.plain(node))

    def _quantize_levels(self, node: Node, target: LevelEncoding) -> Coded:
        """Ranks of fixed-point values: thresholds in fixed point, compared as integers."""
        source: Any = node.args[0]
        storage = Storage.of(target)
        if source.op == "placeholder":
            return super()._quantize_levels(node, target)
        scale = target.scale.double().reshape(() if target.scale.numel() == 1 else (-1, 1))
        real = target.thresholds.double() * scale
        cuts = self.buffer(f"{node.name}_thresholds", torch.floor(real * fixed.ONE).to(torch.int64))
        value = self.call(aten.contiguous.default, self.plain(source))
        if real.ndim == 1:
            ranks = self.call(aten.bucketize.Tensor, value, cuts)
        else:
            ranks = self.call(ranks_by_channel, value, cuts, target.axis)
        return Coded(self.call(aten.to.dtype, ranks, storage.dtype), storage)

    # -- products ------------------------------------------------------------------------

    def _choose(self, form: ProductForm) -> KernelChoice:
        return choose_fixed(self, form)

    def _partials(self, form: ProductForm) -> Node:
        assert form.weight_levels is not None
        axis = contraction_axis_of_weight(form.node, form.weight_levels.ndim)
        choices: list[KernelChoice] = []
        total: Node | None = None
        for indices, scale in zip(form.groups, form.group_scales, strict=True):
            mask = torch.zeros(form.weight_levels.shape[axis], dtype=torch.int32)
            mask = along(mask.index_fill_(0, indices, 1), axis, form.weight_levels.ndim)
            choices.append(choose_fixed(self, form, mask))
            part = self._rescaled(choices[-1].accumulator, scale, form.bound)
            total = part if total is None else self.call(aten.add.Tensor, total, part)
        assert total is not None
        self.choices[form.node] = of_groups(choices)
        return total

    def _is_joined(self, source: Node, target: Encoding) -> bool:
        return False


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return isinstance(value, Tensor) and value.is_floating_point()


def _over(parameter: Tensor, target: AffineEncoding, ndim: int) -> Tensor:
    """A scale or zero point as it broadcasts over a value of rank `ndim`."""
    return along(parameter.reshape(() if target.axis is None else (-1,)), target.axis, ndim)
