# SPDX-License-Identifier: Apache-2.0
"""The reference backend: the dialect evaluated as it is written, in the simplest exact way.

It is the definition the others are compared with: products of levels in float32 where every
partial sum fits its mantissa, else in float64; one requantization function; nothing fused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from qgraph.backends.arithmetic import OPEN, Clamp, combine_partials, materialize, requantize
from qgraph.backends.calling import flat_inputs, structured_outputs
from qgraph.backends.elementary import is_elementary
from qgraph.backends.products import ProductForm
from qgraph.backends.semantics import Role, Semantics, analyze
from qgraph.backends.tables import chain_table, lookup
from qgraph.formats import AffineEncoding
from qgraph.formats.base import along

Observer = Callable[[Node, Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Accumulated:
    """A pending product: exact integers, their fp32 scale, and clamps folded behind them."""

    accumulator: Tensor
    scale: Tensor
    clamp: Clamp = OPEN

    def moved(self, move: Callable[[Tensor], Any]) -> Any:
        """Move the integers and, where it differs by channel, the scale along."""
        scale = self.scale
        if scale.ndim:
            scale = move(scale.expand(self.accumulator.shape))
        moved = move(self.accumulator)
        if isinstance(moved, Tensor):
            return Accumulated(moved, scale, self.clamp)
        scales = scale if scale is not self.scale else [scale] * len(moved)
        return [Accumulated(m, s, self.clamp) for m, s in zip(moved, scales, strict=True)]

    def value(self) -> Tensor:
        """fp32 values."""
        return materialize(self.accumulator, self.scale, self.clamp)


def exact_product(form: ProductForm, data: Tensor, weight: Tensor) -> Tensor:
    """The exact accumulator of a product of int32 levels, bias codes included."""
    dtype = form.exact_dtype
    if form.shift is not None:
        axis = form.what.data_axis % data.ndim
        data = data.to(torch.int64) << along(form.shift, axis, data.ndim)
    accumulator = form.call(data.to(dtype), weight.to(dtype))
    if form.bias_codes is not None:
        bias = form.bias_codes.to(dtype)
        accumulator = accumulator + along(bias, form.channel_axis, accumulator.ndim)
    return accumulator


class Reference(Interpreter):
    """Interprets a quantized graph; `observer` sees, and may replace, each quantizer's codes."""

    def __init__(self, semantics: Semantics, observer: Observer | None = None) -> None:
        super().__init__(semantics.module)
        self.semantics = semantics
        self.observer = observer

    def run_node(self, n: Node) -> Any:
        """Evaluate one node by its role."""
        match self.semantics.roles[n]:
            case Role.QUANTIZE:
                codes = self._quantize(n)
                return codes if self.observer is None else self.observer(n, codes)
            case Role.READ | Role.TABLE:
                return self.env[n.args[0]]  # type: ignore[index]
            case Role.MOVE:
                return self._move(n)
            case Role.PRODUCT:
                return self._product(n)
            case Role.CLAMP:
                pending: Accumulated = self.env[n.args[0]]  # type: ignore[index]
                clamp = pending.clamp.then(*self.semantics.clamps[n])
                return Accumulated(pending.accumulator, pending.scale, clamp)
            case Role.RESAMPLE:
                return self._resample(n)
            case Role.SHAPE:
                return self._call(n, self._raw)
            case Role.FLOAT:
                return super().run_node(n)

    def fetch_args_kwargs_from_env(self, n: Node) -> Any:
        """Arguments of a float op: materialised, in the canonical layout."""
        load = self._value if is_elementary(n.target) else self._arranged
        return map_arg(n.args, load), map_arg(n.kwargs, load)

    def _arranged(self, n: Node) -> Any:
        value, layout = self._value(n), self.semantics.layout(n)
        return value if layout is None else value.contiguous(memory_format=layout)

    def _call(self, n: Node, load: Callable[[Node], Any]) -> Any:
        return n.target(*map_arg(n.args, load), **map_arg(n.kwargs, load))  # type: ignore[operator]

    def _raw(self, n: Node) -> Any:
        value = self.env[n]
        return value.accumulator if isinstance(value, Accumulated) else value

    def _value(self, n: Node) -> Any:
        value = self.env[n]
        if isinstance(value, Accumulated):
            return value.value()
        levels = self.semantics.levels.get(n)
        if levels is None:
            return value
        if isinstance(value, Tensor):
            return levels.values(value)
        return [levels.values(item) for item in value]

    def _move(self, n: Node) -> Any:
        source = n.args[0]
        if isinstance(source, Node) and isinstance(self.env[source], Accumulated):
            rest = map_arg(n.args[1:], self._raw)
            kwargs = map_arg(n.kwargs, self._raw)
            return self.env[source].moved(lambda t: n.target(_dense(t), *rest, **kwargs))  # type: ignore[operator]
        return self._call(n, lambda item: self.env[item])

    def _product(self, n: Node) -> Any:
        form = self.semantics.products[n]
        data, weight = (self.env[n.args[i]] for i in (form.what.data, form.what.weight))  # type: ignore[index]
        levels = form.data.of_codes(data)
        other = form.weight.of_codes(weight)
        if form.groups:
            value = self._partials(form, levels, other)
        else:
            pending = Accumulated(exact_product(form, levels, other), form.scale)
            if form.bias is None:
                return pending
            value = pending.value()
        if form.bias is None:
            return value
        return value + along(self._value(form.bias), form.channel_axis, value.ndim)

    @staticmethod
    def _partials(form: ProductForm, data: Tensor, weight: Tensor) -> Tensor:
        """One exact product per group of channels, the others silenced."""
        partials = []
        axis = form.what.data_axis % data.ndim
        for indices in form.groups:
            mask = torch.zeros(data.shape[axis], dtype=torch.int32).index_fill_(0, indices, 1)
            partials.append(exact_product(form, data * along(mask, axis, data.ndim), weight))
        return combine_partials(partials, form.group_scales)

    def _resample(self, n: Node) -> Tensor:
        source: Any = n.args[0]
        levels = self.semantics.levels[source]
        rest = map_arg(n.args[1:], self._raw)
        value = n.target(levels.of_codes(self.env[source]).to(torch.float32), *rest)  # type: ignore[operator]
        return cast(Tensor, value * levels.scale)

    def _quantize(self, n: Node) -> Tensor:
        source: Any = n.args[0]
        target = self.semantics.encodings[n]
        value = self.env[source]
        if isinstance(value, Accumulated):
            if isinstance(target, AffineEncoding) and target.block is None:
                return requantize(value.accumulator, value.scale, target, value.clamp)
            return target.encode(value.value())
        if source in self.semantics.functions:
            table = chain_table(self.semantics, source, target)
            return lookup(table, value, self.semantics.levels[source])
        return target.encode(self._value(source))


def _dense(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


class ReferenceModel:
    """A quantized graph, callable with the model's own signature."""

    def __init__(self, module: GraphModule) -> None:
        self.graph_module = module
        self.semantics = analyze(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Outputs in the structure of the model."""
        return self.run(args, kwargs)

    def run(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], observer: Observer | None = None
    ) -> Any:
        """The same; `observer(node, codes)` sees each quantizer's codes and returns them."""
        flat = flat_inputs(self.graph_module, args, kwargs)
        with torch.no_grad():
            outputs = Reference(self.semantics, observer).run(*flat, enable_io_processing=False)
        return structured_outputs(self.graph_module, outputs)


def lower(module: GraphModule) -> ReferenceModel:
    """The reference evaluation of a quantized graph.

    Args:
        module: canonical ATen graph with quantize and dequantize nodes.
    """
    return ReferenceModel(module)
