# SPDX-License-Identifier: Apache-2.0
"""Fisher-weighted errors of every unit at every width: one backward per batch serves all of them.

``omega(b) = sum (dL/dy)^2 (y_b - y)^2`` over sampled outputs y of each product, with only its
weight or only its input quantized to b bits (as in ModelOpt's auto_quantize; Fisher information in
place of the Hessian). Every width is tried with several clips at once; the best one is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from qgraph.calibration.loader import Arguments, Signature
from qgraph.calibration.objectives import pooled_mask, probe, target_mask
from qgraph.calibration.row_errors import (
    FRACTIONS,
    data_candidates,
    fake,
    grouped,
    has_rows,
    sample_rows,
    whole_sample,
)
from qgraph.calibration.unit_sweep import Probing, Ranges, UnitSweep
from qgraph.calibration.weight_scales import CLIP_BELOW, weight_encoding
from qgraph.errors import CalibrationError
from qgraph.formats import AffineEncoding
from qgraph.graph.bit_units import Unit
from qgraph.graph.build import attribute
from qgraph.graph.ops import product
from qgraph.graph.plan import Role, Site
from qgraph.graph.verify import where

METHODS = ("fisher", "sqnr")


class _Forward(Interpreter):
    """Runs the float graph and keeps operands and outputs of some products."""

    def __init__(self, module: GraphModule, wanted: set[Node]) -> None:
        super().__init__(module)
        self.wanted = wanted
        self.kept: dict[Node, tuple[Tensor, Tensor, Tensor]] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            what = product(n)
            assert what is not None
            args, _ = self.fetch_args_kwargs_from_env(n)
            if not value.requires_grad:
                value = value.detach().requires_grad_(True)
            self.kept[n] = (args[what.data].detach(), args[what.weight].detach(), value)
        return value


class FisherSweep(UnitSweep):
    """Accumulates omegas of all units over batches; see `UnitSweep`."""

    def __init__(
        self, module: GraphModule, units: Sequence[Unit], ranges: Ranges,
        widths: tuple[Sequence[int], Sequence[int]], how: Probing,
    ) -> None:  # fmt: skip
        super().__init__(module, units, ranges, widths, how)
        self.nodes = [n for unit in self.units for n in unit.products]
        self.sites = {
            (s.edge.consumer, s.edge.path[0]): s
            for unit in self.units for s in (*unit.weights, *unit.activations)
        }  # fmt: skip
        self.order = {node: i for i, node in enumerate(module.graph.nodes)}
        self._weights: dict[Node, list[Tensor]] = {}

    @torch.enable_grad()
    def batch(self, batch: Any, adapt: Callable[[Any], Arguments], seed: int) -> dict[str, Tensor]:
        """Errors of one batch, of weights and of inputs, by unit."""
        leaves = Signature.of(self.module).flat(*adapt(batch))
        leaves = [
            x.detach().clone().requires_grad_(True)
            if isinstance(x, Tensor) and x.is_floating_point() else x
            for x in leaves
        ]  # fmt: skip
        runner = _Forward(self.module, set(self.nodes))
        outputs = self.module.graph.process_outputs(runner.run(*leaves, enable_io_processing=False))
        gradients = self._gradients(runner, outputs, batch, seed)
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            for unit in self.units:
                for node in unit.products:
                    if node in gradients and node in runner.kept:
                        data, weight, _ = runner.kept.pop(node)
                        part = self._errors(node, data, weight, gradients.pop(node), seed)
                        for key, value in part.items():
                            name = f"{unit.name}/{key}"
                            found[name] = found[name] + value if name in found else value
        return found

    def _gradients(
        self, runner: _Forward, outputs: Any, batch: Any, seed: int
    ) -> dict[Node, Tensor]:
        nodes = [n for n in self.nodes if n in runner.kept]
        if not nodes:  # nothing to choose bits for, such as a graph of adds
            return {}
        values = [runner.kept[n][2] for n in nodes]
        if self.how.method == "sqnr":
            mask = target_mask(outputs, batch, self.how.targets)
            return {
                n: _target_weights(y.detach(), mask, self.how.background)
                for n, y in zip(nodes, values, strict=True)
            }
        if self.how.loss is None:
            generator = torch.Generator().manual_seed(seed)
            objective = probe(outputs, self.how.output, generator)
        else:
            objective = self.how.loss(outputs, batch)
        if not objective.requires_grad:
            msg = "the loss does not depend on the model's outputs in a differentiable way"
            raise CalibrationError(msg)
        found = torch.autograd.grad(objective, values, allow_unused=True)
        for n, g in zip(nodes, found, strict=True):
            if g is not None and not bool(torch.isfinite(g.square().sum())):
                msg = f"the gradient at {where(n)} is not finite; look at the loss"
                raise CalibrationError(msg)
        return {n: g.detach() for n, g in zip(nodes, found, strict=True) if g is not None}

    def _errors(
        self, node: Node, data: Tensor, weight: Tensor, gradient: Tensor, seed: int
    ) -> dict[str, Tensor]:
        what = product(node)
        assert what is not None
        draw = seed * 100_003 + self.order[node]
        inner = self.sites.get((node, what.weight))
        outer = self.sites.get((node, what.data))
        is_constant = inner is not None and inner.role is Role.WEIGHT
        if is_constant and has_rows(node) and outer is not None:
            count = max(1, self.how.rows * data.shape[0])
            rows = sample_rows(node, data, weight, gradient, count=count, seed=draw)
            groups = rows.data.shape[1]
            candidates = [grouped(w, groups) for w in self._quantized(node, inner)]
            low, high = self.ranges[outer.value]
            found = {"w": rows.weight_errors(candidates)}
            encodings = data_candidates(low, high, self.activation_bits)
            if outer.role is Role.ACTIVATION:
                found["a"] = rows.data_errors(encodings)
            return found
        whole = whole_sample(node, data, weight, gradient, seed=draw, is_constant=is_constant)
        found = {}
        if is_constant:
            found["w"] = whole.errors((whole.data, w) for w in self._quantized(node, inner))
        found["a"] = whole.errors(self._pairs(whole.data, whole.weight, outer, inner))
        return found

    def _pairs(
        self, data: Tensor, weight: Tensor, outer: Site | None, inner: Site | None
    ) -> Iterable[tuple[Tensor, Tensor]]:
        """Quantized operands at every width and clip, activations only."""

        def encodings(site: Site | None) -> list[AffineEncoding | None]:
            if site is None or site.role is Role.WEIGHT:
                return [None] * (len(self.activation_bits) * len(FRACTIONS))
            return list(data_candidates(*self.ranges[site.value], self.activation_bits))

        for first, second in zip(encodings(outer), encodings(inner), strict=True):
            yield (
                data if first is None else fake(first, data),
                weight if second is None else fake(second, weight),
            )

    def _quantized(self, node: Node, site: Site | None) -> list[Tensor]:
        """The weight at every width, made once."""
        assert site is not None
        if node not in self._weights:
            self._weights[node] = [
                quantized_weight(self.module, site, bits) for bits in self.weight_bits
            ]
        return self._weights[node]


def quantized_weight(module: GraphModule, site: Site, bits: int) -> Tensor:
    """A stored weight at some width, as `choose-weight-scales` would make it by default."""
    weight = attribute(module, str(site.value.target)).detach()
    return weight_encoding(weight, bits, site.axis, clip=bits < CLIP_BELOW).fake(weight)


def _target_weights(output: Tensor, mask: Tensor, background: float) -> Tensor:
    """Roots of the weights of squared errors: one over the signal inside and outside targets."""
    weights = torch.full_like(output, 0.0)
    if output.ndim != 4:
        return weights + (1.0 / output.square().sum().clamp(min=1e-12)).sqrt()
    inside = pooled_mask(mask, (output.shape[2], output.shape[3])).expand_as(output)
    for chosen, factor in ((inside, 1.0), (~inside, background)):
        energy = output[chosen].square().sum()
        if float(energy) > 0:
            weights[chosen] = (factor / energy).sqrt()
    return weights
