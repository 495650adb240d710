# SPDX-License-Identifier: Apache-2.0
"""Lowering a quantized graph to torch ops on integer codes, node by node.

The lowered graph holds no dequantize nodes: codes travel in storage, accumulators wait for
their reader, and each quantizer behind a product becomes one requantization.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from qgraph.backends.arithmetic import Clamp, code_limits, multiplier
from qgraph.backends.integer.choice import KernelChoice, choose
from qgraph.backends.integer.kernels import LOOKUP
from qgraph.backends.integer.opaque import opaque
from qgraph.backends.integer.ranking import HalfSteps, half_steps
from qgraph.backends.integer.reuse import reuse_buffers
from qgraph.backends.integer.storage import Storage
from qgraph.backends.integer.values import Coded, Pending, Product
from qgraph.backends.levels import Levels
from qgraph.backends.products import ProductForm
from qgraph.backends.semantics import Role, Semantics
from qgraph.backends.tables import all_codes, chain_table
from qgraph.formats import AffineEncoding, Encoding, LevelEncoding
from qgraph.formats.base import along
from qgraph.formats.levels import levels_of
from qgraph.graph.dialect import QUANTIZE_LEVELS, is_quantize

aten = torch.ops.aten
_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})
_COPIED_META = ("nn_module_stack", "stack_trace", "val")


class Emitter:
    """State of one lowering; see the module docstring."""

    def __init__(self, semantics: Semantics, *, compiled: bool = False) -> None:
        self.compiled = compiled
        self.semantics = semantics
        self.source = semantics.module
        self.graph = Graph()
        self.root = nn.Module()
        self.env: dict[Node, Any] = {}
        self.choices: dict[Node, KernelChoice] = {}
        self.codes: dict[str, Coded] = {}
        self.memo: dict[Any, Any] = {}
        self._names: dict[str, int] = {}
        self._owned: set[Node] = set()
        self._current: Node | None = None

    def lower(self) -> GraphModule:
        """Emit all nodes; returns the lowered graph."""
        with torch.no_grad():
            for node in self.source.graph.nodes:
                self._current = node
                self._emit(node)
        self.graph._codegen = copy.deepcopy(self.source.graph._codegen)
        self.graph.eliminate_dead_code()
        if not self.compiled:
            reuse_buffers(self.graph, self._owned)
        return GraphModule(self.root, self.graph)

    # -- emission primitives -------------------------------------------------------------

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Emit one call."""
        node = self.graph.call_function(target, args, kwargs)
        if self._current is not None:
            for key in _COPIED_META[:2]:
                if key in self._current.meta:
                    node.meta[key] = self._current.meta[key]
            node.meta["qgraph_source"] = self._current.name
        return node

    def arithmetic(self, target: Any, *args: Any) -> Node:
        """Emit a call of lowering's own, whose float result nobody else can hold."""
        node = self.call(target, *args)
        self._owned.add(node)
        return node

    def buffer(self, hint: str, tensor: Tensor) -> Node:
        """Register a constant and read it."""
        name = "_c_" + "".join(c if c.isalnum() else "_" for c in hint)
        number = self._names.get(name, 0)
        self._names[name] = number + 1
        name = f"{name}_{number}" if number else name
        self.root.register_buffer(name, tensor.detach())
        return self.graph.get_attr(name)

    def lookup(self, hint: str, table: Tensor, index: Node) -> Node:
        """Entries of a table at non-negative integers; compilers see a gather they can fuse."""
        entries = self.buffer(hint, table)
        if not self.compiled:
            return self.call(LOOKUP, entries, index)
        return self.call(aten.index.Tensor, entries, [self.call(aten.to.dtype, index, torch.int32)])

    # -- nodes by role -------------------------------------------------------------------

    def _emit(self, node: Node) -> None:
        if node.op == "placeholder":
            copied = self.graph.placeholder(node.name)
            copied.target, copied.args = node.target, node.args
            copied.meta.update({k: node.meta[k] for k in _COPIED_META if k in node.meta})
            self.env[node] = copied
        elif node.op == "output":
            self.graph.output(map_arg(node.args[0], self.plain))
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
            case Role.SHAPE:
                return self.call(node.target, *map_arg(node.args, self._shaped))
            case Role.FLOAT:
                return self._float(node)

    def _float(self, node: Node) -> Node | Coded:
        source = node.args[0] if node.args else None
        if isinstance(source, Node) and isinstance(self.env.get(source), Coded):
            coded = self.env[source]
            if source not in self.semantics.levels and node.target is not operator.getitem:
                return Coded(self._moved(node, coded.node), coded.storage)
        args, kwargs = map_arg(node.args, self.plain), map_arg(node.kwargs, self.plain)
        target = aten.reshape.default if node.target in _VIEWS else node.target
        emitted = self.call(opaque(target) if self.compiled else target, *args, **kwargs)
        emitted.meta["val"] = node.meta.get("val")
        return emitted

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
            return self._replay(value.product.node, value.moves)
        return self.plain(node)

    # -- movement ------------------------------------------------------------------------

    def _moved(self, move: Node, *operands: Node) -> Node:
        """Apply a movement to other operands."""
        target = aten.reshape.default if move.target in _VIEWS else move.target
        if target is aten.cat.default:
            return self.call(target, list(operands), *move.args[1:], **move.kwargs)
        rest = map_arg(move.args[1:], self.plain)
        return self.call(target, operands[0], *rest, **map_arg(move.kwargs, self.plain))

    def _move(self, node: Node) -> Any:
        if node.target is aten.cat.default:
            parts: Any = node.args[0]
            coded = [self._operand(part) for part in parts]
            moved = self._moved(node, *(item.node for item in coded))
            return Coded(moved, coded[0].storage)
        value = self.env.get(node.args[0])  # type: ignore[arg-type]
        if isinstance(value, Pending):
            return Pending(value.product, (*value.moves, node), value.clamp)
        source = self._operand(node.args[0])
        return Coded(self._moved(node, source.node), source.storage)

    def _operand(self, node: Any) -> Coded:
        return self.coded(node, self.semantics.levels[node].encoding)

    def _replay(self, payload: Node, moves: tuple[Node, ...]) -> Node:
        for move in moves:
            key = ("move", payload, move)
            if key not in self.memo:
                self.memo[key] = self._moved(move, payload)
            payload = self.memo[key]
        return payload

    # -- readers -------------------------------------------------------------------------

    def plain(self, node: Node) -> Any:
        """The value of a node as an ordinary tensor, materialised where it is in levels."""
        key = ("plain", node)
        if key not in self.memo:
            value = self._plain(node)
            if isinstance(value, Node):
                value.meta.setdefault("val", node.meta.get("val"))
            self.memo[key] = value
        return self.memo[key]

    def _plain(self, node: Node) -> Any:
        if node in self.semantics.fixed:
            value = self.semantics.constant_value(node)
            return self.buffer(node.name, value) if isinstance(value, Tensor) else value
        value = self.env[node]
        if isinstance(value, Pending):
            return self._replay(self._materialized(value), value.moves)
        if not isinstance(value, Coded):
            return value
        levels = self.semantics.levels.get(node)
        if levels is None:
            wide = self.call(aten.to.dtype, value.node, torch.int32)
            shifted = self.call(aten.sub.Tensor, wide, value.storage.offset)
            return self.call(aten.to.dtype, shifted, node.meta["val"].dtype)
        ndim = node.meta["val"].ndim
        scale = self._along(f"{node.name}_scale", levels.scale, levels.axis, ndim)
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
            wide = self.arithmetic(aten.to.dtype, coded.node, dtype)
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

    # -- quantizers ----------------------------------------------------------------------

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
        if self._is_joined(source, target):
            return self._quantize_parts(source, target, storage)
        floats = self.plain(source)
        if isinstance(target, AffineEncoding) and target.block is None:
            return Coded(self._encoded(source, floats, target, storage), storage)
        if isinstance(target, LevelEncoding):
            if (steps := half_steps(target)) is not None:
                return Coded(self._ranked(source, floats, target, steps), storage)
            rest = map_arg(node.args[1:], self.plain)
            return Coded(self.call(QUANTIZE_LEVELS, floats, *rest, **node.kwargs), storage)
        rest = map_arg(node.args[1:], self.plain)
        codes = self.call(node.target, floats, *rest, **map_arg(node.kwargs, self.plain))
        wide = self.call(
            aten.add.Tensor, self.call(aten.to.dtype, codes, torch.int32), storage.offset
        )
        return Coded(self.call(aten.to.dtype, wide, storage.dtype), storage)

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

    def _along(self, hint: str, values: Tensor, axis: int | None, ndim: int) -> Node:
        return self.buffer(hint, along(values, axis, ndim) if values.ndim else values)

    def _encoded(
        self, source: Node, floats: Node, target: AffineEncoding, storage: Storage
    ) -> Node:
        """``clamp(round(x / s) + z)`` of floats."""
        ndim = source.meta["val"].ndim
        if source.meta["val"].dtype is not torch.float32:
            floats = self.call(aten.to.dtype, floats, torch.float32)
        scale = self._along(f"{source.name}_scale", target.scale, target.axis, ndim)
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
        return self._replay(self.memo[key], pending.moves)

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
            scale = self._replay(scale, pending.moves)
        accumulator = self._replay(product.node, pending.moves)
        own = self._along(f"{last.name}_scale", target.scale, target.axis, ndim)
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
                    aten.add.Tensor, codes, self._along("zero_points", zeros, target.axis, ndim)
                )
            limits = [v + storage.offset for v in code_limits(clamp, target, ndim)]
            if clamp.is_open:
                low, high = (int(v.flatten()[0]) for v in limits)
                codes = self.arithmetic(aten.clamp.default, codes, low, high)
            else:
                bounds = [self.buffer("limits", v.to(torch.float32)) for v in limits]
                codes = self.arithmetic(aten.clamp.Tensor, codes, *bounds)
        return self.call(aten.to.dtype, codes, storage.dtype)

    # -- products ------------------------------------------------------------------------

    def _product(self, node: Node) -> Any:
        form = self.semantics.products[node]
        if form.groups:
            return self._biased(form, self._partials(form))
        choice = choose(self, form)
        self.choices[node] = choice
        product = Product(choice.accumulator, form)
        if form.bias is None:
            return Pending(product)
        return self._biased(form, self._materialized(Pending(product)))

    def _partials(self, form: ProductForm) -> Node:
        """One float32 or float64 product per channel group; see `combine_partials`."""
        from qgraph.backends.integer.choice import group_choices

        total: Node | None = None
        choices = group_choices(self, form)
        self.choices[form.node] = choices[0]
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


def _scalar(target: AffineEncoding) -> AffineEncoding:
    """A per-tensor encoding with scale and zero point of rank 0."""
    if target.scale.ndim == 0:
        return target
    return AffineEncoding(
        scale=target.scale.reshape(()), zero_point=target.zero_point.reshape(()),
        qmin=target.qmin, qmax=target.qmax,
    )  # fmt: skip
