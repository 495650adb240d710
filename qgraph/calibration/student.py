# SPDX-License-Identifier: Apache-2.0
"""The student: a region of a quantized graph whose rounding and steps can be learned.

Weights are computed once per step and held; each activation quantizer becomes one fused
function. Everything else is the graph as it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qgraph.calibration.rounding import FakeAffine, FakeFixed, Method, Rounding, coins
from qgraph.errors import PassError
from qgraph.formats import AffineEncoding, Encoding
from qgraph.graph.build import attribute
from qgraph.graph.dialect import encoding_of, is_dequantize, is_quantize
from qgraph.graph.extract import extract


class Held(nn.Module):
    """Gives the tensor that it holds: a weight as rounded in this step."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self) -> Tensor:
        """The tensor."""
        return self.value


class Fake(nn.Module):
    """An activation quantizer; its step can be learned where there is one for the tensor.

    Attributes:
        log_step: logarithm of the step relative to the calibrated one; None where it is fixed.
        drop: share of elements that stay float (QDrop); 0 outside training.
    """

    def __init__(self, encoding: Encoding, *, learn: bool) -> None:
        super().__init__()
        self.encoding = encoding
        self.log_step: Tensor | None = None
        if learn and isinstance(encoding, AffineEncoding) and encoding.scale.ndim == 0:
            self.log_step = torch.zeros((), requires_grad=True)
        self.drop = 0.0
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize."""
        keep = None
        if self.drop > 0 and self.generator is not None:
            keep = coins(x.shape, self.generator, self.drop)
        form = self.encoding
        if self.log_step is None or not isinstance(form, AffineEncoding):
            fixed: Any = FakeFixed.apply
            return fixed(x, form, keep)  # type: ignore[no-any-return]
        limits = form.qmin, form.qmax
        learned: Any = FakeAffine.apply
        zero = float(form.zero_point)
        return learned(x, self.log_step, form.scale, zero, limits, keep)  # type: ignore[no-any-return]

    def learned(self) -> Tensor | None:
        """The step to deploy, fp32; None where it was not learned."""
        if self.log_step is None:
            return None
        return (self.encoding.scale * torch.exp(self.log_step)).detach()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Codes of the learned weights and logarithms of the learned steps at some moment."""

    codes: list[Tensor]
    steps: list[Tensor]


@dataclass
class Student:
    """A region that learns.

    Attributes:
        graph: from the region's inputs to its outputs and observed values.
        roundings: learned weights by the name of their quantize node; tied ones share an object.
        held: the modules that give these weights.
        fakes: activation quantizers by the name of their quantize node.
    """

    graph: GraphModule
    roundings: dict[str, Rounding]
    held: dict[str, Held]
    fakes: dict[str, Fake]

    def variables(self) -> list[Tensor]:
        """Rounding variables, tied ones once."""
        return [r.variable for r in self.unique()]

    def steps(self) -> list[Tensor]:
        """Learned logarithms of activation steps."""
        return [f.log_step for f in self.fakes.values() if f.log_step is not None]

    def unique(self) -> list[Rounding]:
        """Rounding objects, tied ones once."""
        return list({id(r): r for r in self.roundings.values()}.values())

    def snapshot(self) -> Snapshot:
        """Hard choices as they stand."""
        codes = [r.codes() for r in self.unique()]
        return Snapshot(codes, [t.detach().clone() for t in self.steps()])

    @torch.no_grad()
    def restore(self, kept: Snapshot) -> None:
        """Go back to a moment; the choices start over from its codes."""
        for rounding, codes in zip(self.unique(), kept.codes, strict=True):
            rounding.restart(codes.to(torch.int32), rounding.source)
        for step, value in zip(self.steps(), kept.steps, strict=True):
            step.copy_(value)

    def set_weights(self) -> None:
        """Round all weights for good."""
        values = {id(r): r.weight(r.hard()) for r in self.unique()}
        self._hold(values)

    def soften_weights(self, beta: float | None) -> list[Tensor]:
        """Give all weights their soft choices; return the penalties on them (0 without `beta`)."""
        made = {id(r): r.soft(beta) for r in self.unique()}
        self._hold({key: weight for key, (weight, _) in made.items()})
        return [pull for _, pull in made.values()]

    def _hold(self, values: dict[int, Tensor]) -> None:
        for name, rounding in self.roundings.items():
            self.held[name].value = values[id(rounding)]

    def train(self, *, drop: float, generator: torch.Generator) -> None:
        """Let a share of activation elements stay float."""
        for fake in self.fakes.values():
            fake.drop, fake.generator = drop, generator

    def eval(self) -> None:
        """Quantize every element."""
        for fake in self.fakes.values():
            fake.drop = 0.0


@dataclass(frozen=True, slots=True)
class Trainable:
    """What a region may learn.

    Attributes:
        weights: quantize nodes of weights -> key of their tied group.
        activations: quantize nodes of activations.
        method: how rounding is learned.
        learn_steps: whether activation steps are learned.
    """

    weights: dict[str, str]
    activations: frozenset[str]
    method: Method = "adaround"
    learn_steps: bool = True


def build_student(
    module: GraphModule, inputs: Sequence[str], outputs: Sequence[str], what: Trainable
) -> Student:
    """Extract a region from a quantized graph and make its quantizers learn."""
    graph = extract(module, inputs, outputs)
    student = Student(graph, {}, {}, {})
    groups: dict[str, Rounding] = {}
    for node in list(graph.graph.nodes):
        if not is_dequantize(node):
            continue
        quantize = node.args[0]
        if not isinstance(quantize, Node) or not is_quantize(quantize):
            continue
        source, encoding = quantize.args[0], encoding_of(graph, quantize)
        assert isinstance(source, Node)
        name = quantize.name
        if source.op == "get_attr" and name in what.weights:
            key = what.weights[name]
            if key not in groups:
                weight = attribute(graph, str(source.target)).detach()
                groups[key] = Rounding(weight, encoding, what.method)
            student.roundings[name] = groups[key]
            rounding = groups[key]
            student.held[name] = held = Held(rounding.weight(rounding.hard()))
            _replace(graph, node, f"held_{name}", held, ())
        elif source.op != "get_attr":
            learn = what.learn_steps and name in what.activations
            student.fakes[name] = fake = Fake(encoding, learn=learn)
            _replace(graph, node, f"fake_{name}", fake, (source,))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return student


def _replace(
    graph: GraphModule, node: Node, name: str, module: nn.Module, args: tuple[Node, ...]
) -> None:
    graph.add_submodule(name, module)
    with graph.graph.inserting_before(node):
        call = graph.graph.call_module(name, args)
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)


def without_quantizers(module: GraphModule, *, by: str) -> None:
    """Let every reader of a dequantized value read the float value itself, in place.

    Raises:
        PassError: a weight is left as codes only, so what comes out would not be the float
            network; `by` is the pass that asks.
    """
    for node in list(module.graph.nodes):
        if is_dequantize(node):
            quantize = node.args[0]
            if not isinstance(quantize, Node) or not is_quantize(quantize):
                msg = "a weight is rounded already and its float values are gone; run earlier"
                raise PassError(msg, pass_name=by, node=node.name)
            source = quantize.args[0]
            assert isinstance(source, Node)
            node.replace_all_uses_with(source)
    module.graph.eliminate_dead_code()
    module.recompile()


def quantized_readers(module: GraphModule) -> frozenset[str]:
    """Names of the calls that read a quantized activation or weight."""
    found = set()
    for node in module.graph.nodes:
        if is_dequantize(node):
            found |= {user.name for user in node.users}
    return frozenset(found)
