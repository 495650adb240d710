# SPDX-License-Identifier: Apache-2.0
"""What the manager checks after every pass: form, honesty, and the promise.

Form: lint, complete metadata, quantizer parameters are buffers. Honesty: a fingerprint of graph
and tensors must agree with the returned bool, and no tensor may be written in place. Promise:
outputs on a sample before and after; where they differ, the first node that does is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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

# A difference of up to so many tolerances is repeated in float64 before it counts.
ROUNDING_ROOM = 100


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


def check_order(module: GraphModule) -> None:
    """Raise `PassError` unless each node reads only nodes before it and attributes that exist."""
    seen: set[Node] = set()
    for node in module.graph.nodes:
        for source in node.all_input_nodes:
            if source not in seen:
                msg = f"{where(node)} reads {source.name}, which does not come before it"
                raise PassError(msg, node=node.name)
        seen.add(node)
        if node.op == "get_attr" and not isinstance(_attribute(module, node), Tensor):
            msg = f"{node.name} reads {node.target!r}, which the module does not hold"
            raise PassError(msg, node=node.name)
    try:
        module.graph.lint()
    except (RuntimeError, AttributeError, TypeError) as error:
        msg = f"malformed graph: {error}"
        raise PassError(msg) from error


def _attribute(module: GraphModule, node: Node) -> object:
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value


def check_form(module: GraphModule) -> None:
    """Raise `PassError` unless the graph is well formed."""
    check_order(module)
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
    whole = raw.numel() // 8 * 8
    wide = raw[:whole].view(torch.int64)
    weighted = int((wide[::2].sum() + 3 * wide[1::2].sum()).item())
    tail = int(raw[whole:].sum().item())
    return (tensor.dtype, tuple(tensor.shape), weighted, tail)


def structure(module: GraphModule) -> tuple[tuple[str, ...], ...]:
    """The graph as comparable data."""
    return tuple(
        (n.name, n.op, str(n.target), str(n.args), str(n.kwargs)) for n in module.graph.nodes
    )


def _first_nonfinite(module: GraphModule, sample: Sample) -> Node | None:
    """The first node that makes a NaN or infinity out of finite values."""
    values = record_values(module, sample)

    def is_finite(node: Node) -> bool:
        value = values.get(node.name)
        return value is None or bool(torch.isfinite(value).all())

    for node in module.graph.nodes:
        if not is_finite(node) and all(is_finite(i) for i in node.all_input_nodes):
            return node  # type: ignore[no-any-return]
    return None


def _reader(module: GraphModule, name: str) -> str | None:
    """The first node that uses the tensor of that name."""
    for node in module.graph.nodes:
        if node.op == "get_attr" and str(node.target) == name:
            return str(next(iter(node.users), node).name)
    return None


class Verifier:
    """Checks the graph after each pass against its state before."""

    def __init__(self, module: GraphModule, sample: Sample, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self.sample = sample
        if enabled:
            self._remember(module, self._run(module))

    def after(self, item: Claim, module: GraphModule, *, changed: bool) -> float | None:
        """Verify; return the largest output difference where outputs were compared.

        Dead tensors go, so the module is to be recompiled afterwards.

        Raises:
            PassError: malformed graph, a dishonest bool, a tensor written in place.
            VerificationError: the promise does not hold.
        """
        if not self.enabled:
            if changed:
                prune(module, recompile=False)
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
        prune(module, recompile=False)
        try:
            outputs = self._run(module)
        except PassError as error:
            error.args = (f"{item.name}: {error}",)
            error.pass_name = item.name
            raise
        largest = self._check_promise(item, module, outputs)
        self._remember(module, outputs)
        return largest

    def _remember(self, module: GraphModule, outputs: list[Tensor]) -> None:
        self._outputs = outputs
        self._structure = structure(module)
        self._tensors = {n: (t, checksum(t)) for n, t in tensors(module).items()}
        self._before = shallow_copy(module)

    def _run(self, module: GraphModule) -> list[Tensor]:
        leaves = tree_leaves((self.sample.args, self.sample.kwargs))
        with torch.no_grad():
            result = _MetadataChecker(module).run(*leaves, enable_io_processing=False)
        return [leaf.clone() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]

    def _check_honesty(self, item: Claim, module: GraphModule, *, changed: bool) -> None:
        now = tensors(module)
        for name, (tensor, was) in self._tensors.items():
            if checksum(tensor) != was:
                msg = f"{item.name} wrote into {name!r} in place; register a new tensor instead"
                raise PassError(msg, pass_name=item.name, node=_reader(self._before, name))
        same = structure(module) == self._structure and all(
            name in now and now[name] is tensor for name, (tensor, _) in self._tensors.items()
        )
        if same and changed:
            msg = f"{item.name} returned True, but the graph did not change"
            raise PassError(msg, pass_name=item.name)
        if not same and not changed:
            known = set(self._structure)
            moved = next((e[0] for e in structure(module) if e not in known), None)
            place = f", first at {moved}" if moved else ""
            msg = f"{item.name} returned False, but the graph changed{place}"
            raise PassError(msg, pass_name=item.name, node=moved)

    def _check_promise(
        self, item: Claim, module: GraphModule, outputs: list[Tensor]
    ) -> float | None:
        allowed = item.allowed
        if allowed is None:
            self._check_finite(item, module, outputs)
            return None
        largest = difference(self._outputs, outputs)
        if largest <= allowed:
            return largest
        if largest <= ROUNDING_ROOM * allowed:
            exact = difference_in_double(self._before, module, self.sample)
            if exact is not None and exact <= allowed:
                return largest  # rounding of float32, not a broken promise
        node, error = first_difference(self._before, module, self.sample, allowed)
        place = "an output" if node is None else where(node)
        around = "" if node is None else f"\n{excerpt(module, node)}"
        msg = (
            f"{item.name} promises {item.promise}, but outputs differ by {largest:.3g} of "
            f"their largest value (allowed {allowed:.3g}); first at {place}, by {error:.3g}{around}"
        )
        raise VerificationError(
            msg, pass_name=item.name, node=None if node is None else node.name, max_abs=largest
        )

    def _check_finite(self, item: Claim, module: GraphModule, outputs: list[Tensor]) -> None:
        for number, (before, after) in enumerate(zip(self._outputs, outputs, strict=True)):
            if bool(torch.isfinite(before).all()) and not bool(torch.isfinite(after).all()):
                node = _first_nonfinite(module, self.sample)
                place = "" if node is None else f"; first at {where(node)}\n{excerpt(module, node)}"
                msg = f"{item.name} made finite outputs non-finite (output {number}){place}"
                name = None if node is None else node.name
                raise VerificationError(msg, pass_name=item.name, node=name)


def first_difference(
    before: GraphModule, after: GraphModule, sample: Sample, allowed: float
) -> tuple[Node | None, float]:
    """The first node of `after` that differs from its namesake in `before` and shows at an output.

    Values that moved and came back, as a rewrite may well do, are passed over.

    Returns the node (None if only outputs differ) and the difference there.
    """
    old, new = record_values(before, sample), record_values(after, sample)
    moved: dict[Node, float] = {}
    pending = [node for node in after.graph.nodes if node.op == "output"]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if node.name in old and node.name in new:
            error = difference([old[node.name]], [new[node.name]])
            if error <= allowed:
                continue
            moved[node] = error
        fresh = set(node.all_input_nodes) - seen
        seen |= fresh
        pending.extend(fresh)
    first = next(
        (node for node in after.graph.nodes if node in moved and node.op != "get_attr"), None
    )
    return first, moved[first] if first is not None else math.nan


def difference(before: list[Tensor], after: list[Tensor]) -> float:
    """Largest absolute difference over the largest finite magnitude; inf when shapes differ."""
    if len(before) != len(after):
        return float("inf")
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        if torch.equal(a, b):
            continue
        a64, b64 = a.to(torch.float64), b.to(torch.float64)
        agree = (a64 == b64) | (a64.isnan() & b64.isnan())
        gap = torch.where(agree, 0.0, (a64 - b64).abs())
        size = a64[a64.isfinite()].abs().max() if bool(a64.isfinite().any()) else a64.new_ones(())
        value = float(gap.max() / size.clamp_min(torch.finfo(torch.float32).tiny))
        worst = max(worst, float("inf") if math.isnan(value) else value)
    return worst


def difference_in_double(before: GraphModule, after: GraphModule, sample: Sample) -> float | None:
    """The outputs' difference when both graphs run in float64; None if they cannot.

    Deep networks amplify the last bit of float32; what is left in float64 is the rewrite's own.
    """
    with torch.no_grad():
        try:
            results = [_run_in_double(module, sample) for module in (before, after)]
        except RuntimeError:  # an op in between insists on float32
            return None
    if any(leaf.dtype == torch.float32 for leaves in results for leaf in leaves):
        return None
    return difference(*results)


def _run_in_double(module: GraphModule, sample: Sample) -> list[Tensor]:
    copy = shallow_copy(module)
    for name, tensor in tensors(copy).items():
        if tensor.is_floating_point():
            path, _, leaf = name.rpartition(".")
            owner = copy.get_submodule(path)
            delattr(owner, leaf)  # replaced, not converted: the tensor is shared
            owner.register_buffer(leaf, tensor.detach().double())
    leaves = [
        leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
        for leaf in tree_leaves((sample.args, sample.kwargs))
    ]
    result = Interpreter(copy).run(*leaves, enable_io_processing=False)
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


class _MetadataChecker(Interpreter):
    """Runs a graph and compares each value with its node's metadata."""

    def run_node(self, n: Node) -> Any:
        value, told = super().run_node(n), n.meta.get("val")
        if n.op == "call_function" and isinstance(value, Tensor) and isinstance(told, Tensor):
            sizes = zip(value.shape, told.shape, strict=False)
            if (
                value.ndim != told.ndim
                or value.dtype != told.dtype
                or any(isinstance(want, int) and have != want for have, want in sizes)
            ):
                msg = (
                    f"{where(n)} computes {value.dtype} {list(value.shape)}, but its metadata "
                    f"says {told.dtype} {list(told.shape)}; call set_value after changing a node"
                )
                raise PassError(msg, node=n.name)
        return value


Tap = Callable[[Node, Tensor], None]


class _Recorder(Interpreter):
    """Runs a graph and keeps tensor values by node name, all or those asked for."""

    def __init__(self, module: GraphModule, names: set[str] | None, tap: Tap | None) -> None:
        super().__init__(module)
        self.names = names
        self.tap = tap
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and (self.names is None or n.name in self.names):
            self.values[n.name] = value
        if self.tap is not None and isinstance(value, Tensor):
            self.tap(n, value)
        return value


def record_values(
    module: GraphModule, sample: Sample, names: set[str] | None = None, tap: Tap | None = None
) -> dict[str, Tensor]:
    """Values of the nodes of these names (default: all) when the graph runs on the sample.

    `tap` sees every tensor in passing.
    """
    recorder = _Recorder(module, names, tap)
    leaves = tree_leaves((sample.args, sample.kwargs))
    with torch.no_grad():
        recorder.run(*leaves, enable_io_processing=False)
    return recorder.values
