# SPDX-License-Identifier: Apache-2.0
"""What the manager checks after every pass: form, honesty, and the promise.

Form: lint, complete metadata, quantizer parameters are buffers. Honesty: a fingerprint of graph
and tensors must agree with the returned bool, and no tensor may be written in place. Promise:
outputs on a sample before and after; where they differ, the first node that does is named.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from qgraph.errors import PassError, VerificationError
from qgraph.graph.build import prune, shallow_copy
from qgraph.graph.dialect import encoding_of, is_dequantize, is_quantize
from qgraph.graph.provenance import module_path, source_line


@dataclass(frozen=True, slots=True)
class Claim:
    """What the pass that just ran says of itself.

    Attributes:
        name: of the pass.
        promise: in words, for messages.
        allowed: largest relative output difference it may cause; None if outputs may change.
    """

    name: str
    promise: str
    allowed: float | None


@dataclass(frozen=True, slots=True)
class Sample:
    """Inputs to replay: positional and keyword arguments of the traced module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


def where(node: Node) -> str:
    """Name, module path and source line of a node, for messages."""
    path, line = module_path(node), source_line(node)
    return f"{node.name}{f' in {path}' if path else ''}{f' at {line}' if line else ''}"


def excerpt(module: GraphModule, node: Node, *, context: int = 5) -> str:
    """The lines of the graph around a node, the node marked."""
    nodes = list(module.graph.nodes)
    at = nodes.index(node)
    shown = nodes[max(0, at - context) : at + context + 1]
    return "\n".join(f"{'>>> ' if i is node else '    '}{i.format_node()}" for i in shown)


def check_form(module: GraphModule) -> None:
    """Raise `PassError` unless the graph is well formed."""
    try:
        module.graph.lint()
    except (RuntimeError, AttributeError, TypeError) as error:
        msg = f"malformed graph: {error}"
        raise PassError(msg) from error
    for node in module.graph.nodes:
        if node.op == "call_function" and "val" not in node.meta:
            msg = f"{where(node)} carries no metadata 'val'; insert nodes with insert_call"
            raise PassError(msg, node=node.name)
        if is_quantize(node) or is_dequantize(node):
            encoding_of(module, node)


def tensors(module: GraphModule) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def checksum(tensor: Tensor) -> tuple[object, ...]:
    """A cheap summary of a tensor's content; a changed element changes it."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.numel() == 0:
        return (tensor.dtype, tuple(tensor.shape))
    raw = flat.view(torch.uint8)
    wide = raw[: raw.numel() // 8 * 8].view(torch.int64)
    weighted = int((wide[::2].sum() + 3 * wide[1::2].sum()).item())
    tail = int(raw[raw.numel() // 8 * 8 :].sum().item())
    return (tensor.dtype, tuple(tensor.shape), weighted, tail)


def structure(module: GraphModule) -> tuple[object, ...]:
    """The graph as comparable data."""
    return tuple(
        (n.name, n.op, str(n.target), str(n.args), str(n.kwargs)) for n in module.graph.nodes
    )


class Verifier:
    """Checks the graph after each pass against its state before."""

    def __init__(self, module: GraphModule, sample: Sample, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self.sample = sample
        if enabled:
            self._remember(module, self._run(module))

    def after(self, item: Claim, module: GraphModule, *, changed: bool) -> float | None:
        """Verify; return the largest output difference where outputs were compared.

        Raises:
            PassError: malformed graph, a dishonest bool, a tensor written in place.
            VerificationError: the promise does not hold.
        """
        if not self.enabled:
            if changed:
                prune(module)
            return None
        try:
            check_form(module)
        except PassError as error:
            error.pass_name = error.pass_name or item.name
            error.args = (f"{item.name}: {error}",)
            raise
        self._check_honesty(item, module, changed=changed)
        if not changed:
            return None
        prune(module)
        outputs = self._run(module)
        largest = self._check_promise(item, module, outputs)
        self._remember(module, outputs)
        return largest

    def _remember(self, module: GraphModule, outputs: list[Tensor]) -> None:
        self._outputs = outputs
        self._structure = structure(module)
        self._tensors = {n: (t, checksum(t)) for n, t in tensors(module).items()}
        self._before = shallow_copy(module)

    def _run(self, module: GraphModule) -> list[Tensor]:
        with torch.no_grad():
            result = module(*self.sample.args, **self.sample.kwargs)
        return [leaf.clone() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]

    def _check_honesty(self, item: Claim, module: GraphModule, *, changed: bool) -> None:
        now = tensors(module)
        for name, (tensor, was) in self._tensors.items():
            if checksum(tensor) != was:
                msg = f"{item.name} wrote into {name!r} in place; register a new tensor instead"
                raise PassError(msg, pass_name=item.name)
        same = structure(module) == self._structure and all(
            name in now and now[name] is tensor for name, (tensor, _) in self._tensors.items()
        )
        if same and changed:
            msg = f"{item.name} returned True, but the graph did not change"
            raise PassError(msg, pass_name=item.name)
        if not same and not changed:
            msg = f"{item.name} returned False, but the graph changed"
            raise PassError(msg, pass_name=item.name)

    def _check_promise(
        self, item: Claim, module: GraphModule, outputs: list[Tensor]
    ) -> float | None:
        allowed = item.allowed
        if allowed is None:
            self._check_finite(item, outputs)
            return None
        largest = difference(self._outputs, outputs)
        if largest <= allowed:
            return largest
        node, error = self._first_difference(module, allowed)
        place = "an output" if node is None else where(node)
        around = "" if node is None else f"\n{excerpt(module, node)}"
        msg = (
            f"{item.name} promises {item.promise}, but outputs differ by {largest:.3g} of "
            f"their largest value (allowed {allowed:.3g}); first at {place}, by {error:.3g}{around}"
        )
        raise VerificationError(
            msg, pass_name=item.name, node=None if node is None else node.name, max_abs=largest
        )

    def _check_finite(self, item: Claim, outputs: list[Tensor]) -> None:
        for before, after in zip(self._outputs, outputs, strict=True):
            if bool(torch.isfinite(before).all()) and not bool(torch.isfinite(after).all()):
                msg = f"{item.name} made finite outputs non-finite"
                raise VerificationError(msg, pass_name=item.name)

    def _first_difference(self, module: GraphModule, allowed: float) -> tuple[Node | None, float]:
        """The first node of either graph's common names whose value moved and stayed moved."""
        old = record_values(self._before, self.sample)
        new = record_values(module, self.sample)
        found: tuple[Node | None, float] = (None, float("nan"))
        for node in reversed(list(module.graph.nodes)):
            if node.op == "output" or node.name not in old or node.name not in new:
                continue
            error = difference([old[node.name]], [new[node.name]])
            if error > allowed:
                found = (node, error)
            elif found[0] is not None and found[0] in node.users:
                break
        return found


def difference(before: list[Tensor], after: list[Tensor]) -> float:
    """Largest absolute difference over the largest finite magnitude; inf when shapes differ."""
    if len(before) != len(after):
        return float("inf")
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        if torch.equal(a, b) or a.numel() == 0:
            continue
        a64, b64 = a.to(torch.float64), b.to(torch.float64)
        agree = (a64 == b64) | (a64.isnan() & b64.isnan())
        gap = torch.where(agree, 0.0, (a64 - b64).abs())
        size = a64[a64.isfinite()].abs().max() if bool(a64.isfinite().any()) else a64.new_ones(())
        value = float(gap.max() / size.clamp_min(torch.finfo(torch.float32).tiny))
        worst = max(worst, float("inf") if math.isnan(value) else value)
    return worst


class _Recorder(Interpreter):
    """Runs a graph and keeps tensor values by node name, all or those asked for."""

    def __init__(self, module: GraphModule, names: set[str] | None) -> None:
        super().__init__(module)
        self.names = names
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and (self.names is None or n.name in self.names):
            self.values[n.name] = value
        return value


def record_values(
    module: GraphModule, sample: Sample, names: set[str] | None = None
) -> dict[str, Tensor]:
    """Values of the nodes of these names (default: all) when the graph runs on the sample."""
    recorder = _Recorder(module, names)
    leaves = tree_leaves((sample.args, sample.kwargs))
    with torch.no_grad():
        recorder.run(*leaves, enable_io_processing=False)
    return recorder.values
