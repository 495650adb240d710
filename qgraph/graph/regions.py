# SPDX-License-Identifier: Apache-2.0
"""Regions: consecutive parts of a graph that can be tuned one after the other.

One sweep over last uses finds cut points, places where few activations are live; where it is one,
residuals are closed. Regions without weights join a neighbour, and the module hierarchy, a hint
only, merges what belongs to one block. Regions are intervals of the graph's order, so running
them in turn is running the graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch.fx import GraphModule, Node

from qgraph.errors import unknown_name
from qgraph.graph.extract import is_size, is_tensor
from qgraph.graph.ops import OpKind, constants, kind, product
from qgraph.graph.provenance import module_path
from qgraph.graph.row_order import batch_sizes, first_size, rows_by_sample

Granularity = Literal["layer", "subblock", "block", "stage", "auto"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)
MAX_PRODUCTS = 12  # a region with more weights than this is cut again with more live values
WIDER = (2, 3, 4)  # live values allowed then
CHUNK = 4  # weights per region where only wide cuts exist


@dataclass(frozen=True, slots=True)
class Region:
    """An interval of a graph's calls.

    Attributes:
        name: module path of its weights, or the name of its last value.
        nodes: names of its calls, in order.
        inputs: values (names) read from outside, in the order they are made.
        outputs: tensors made inside and read later, in order.
        moving: names among the ports that follow from a weight; the others are the same in the
            float and the quantized network.
        weights: names of the calls with a stored weight.
    """

    name: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    moving: frozenset[str]
    weights: tuple[str, ...]


class _Order:
    """The calls of a graph with what the sweep needs."""

    def __init__(self, module: GraphModule, starts: frozenset[str] | None) -> None:
        nodes = list(module.graph.nodes)
        self.place = {node: i for i, node in enumerate(nodes)}
        self.fixed = constants(nodes)
        self.calls = [
            n for n in nodes if n.op not in {"placeholder", "get_attr", "output"}
            and n not in self.fixed
        ]  # fmt: skip
        self.at = {node: i for i, node in enumerate(self.calls)}
        self.weights = [n for n in self.calls if has_weight(n, self.fixed)]
        self.moving = downstream(nodes, self.weights, starts)
        self.last = {node: self._last_use(node) for node in self.calls}
        self.batch = batch_sizes(nodes)
        self.by_rows = rows_by_sample(nodes, self.batch)
        self.live = self._live()
        self.cuttable = self._cuttable()

    def _last_use(self, node: Node) -> int:
        """Position of the last call that reads the value; outputs hold nothing back."""
        return max((self.at[user] for user in node.users if user in self.at), default=-1)

    def _live(self) -> list[list[Node]]:
        """Per position, the moving values that later calls read."""
        ends: dict[int, list[Node]] = {}
        alive: dict[Node, None] = {}
        found = []
        for position, node in enumerate(self.calls):
            if node in self.moving and not is_size(node) and self.last[node] > position:
                alive[node] = None
                ends.setdefault(self.last[node], []).append(node)
            for gone in ends.pop(position, ()):
                alive.pop(gone, None)
            found.append(list(alive))
        return found

    def _cuttable(self) -> list[bool]:
        """Per position, whether all that later calls read can be stored sample by sample.

        Multiples of the batch alone, as [windows * batch, ...], do not say how many samples there
        are; one of the values must show the batch as it is. Tuples are not stored at all.
        """
        good, until = [], 0
        for position, (node, alive) in enumerate(zip(self.calls, self.live, strict=True)):
            if not is_size(node) and not (is_tensor(node) and node in self.by_rows):
                until = max(until, self.last[node])
            known = {first_size(n) for n in alive} - {None}
            counted = not known or bool(known & self.batch)
            good.append(position >= until and counted)
        return good


def has_weight(node: Node, fixed: set[Node]) -> bool:
    """Whether the node multiplies or looks up a stored tensor."""
    what = product(node)
    if what is not None:
        return node.args[what.weight] in fixed or node.args[what.data] in fixed
    return kind(node) is OpKind.EMBEDDING


def downstream(
    nodes: Sequence[Node], weights: Iterable[Node], starts: frozenset[str] | None
) -> set[Node]:
    """Values that quantization moves: what follows from a weight, or from a node in `starts`."""
    begun = {node.name for node in weights} | (starts or frozenset())
    found: set[Node] = set()
    for node in nodes:
        if node.name in begun or any(i in found for i in node.all_input_nodes):
            found.add(node)
    return found


def cut_points(
    module: GraphModule, *, width: int = 1, starts: frozenset[str] | None = None
) -> list[str]:
    """Names of the calls behind which at most `width` activations are live, in graph order."""
    order = _Order(module, starts)
    return [order.calls[i].name for i in _cuts(order, width)]


def _cuts(order: _Order, width: int) -> list[int]:
    possible = order.cuttable
    return [i for i, alive in enumerate(order.live) if 1 <= len(alive) <= width and possible[i]]


def find_regions(
    module: GraphModule,
    granularity: str = "auto",
    *,
    starts: frozenset[str] | None = None,
    max_products: int = MAX_PRODUCTS,
) -> list[Region]:
    """Partition the calls of a graph.

    Args:
        module: a canonical graph, float or quantized.
        granularity: ``layer`` (one weight each), ``subblock`` (residual-closed), ``block``
            (merged by the innermost repeated module), ``stage`` (by its parent), or ``auto``:
            blocks, and where no cut closes before `max_products` weights, cuts with more live
            values; regions that read the same weight (heads shared over pyramid levels) are one
            as long as that does not make them too large, so that it can be tuned.
        starts: names of further values at which the quantized network departs from the float one.
        max_products: see `granularity`.

    Raises:
        ConfigError: an unknown granularity.
    """
    if granularity not in GRANULARITIES:
        raise unknown_name("granularity", granularity, GRANULARITIES)
    order = _Order(module, starts)
    if not order.calls:
        return []
    if granularity == "layer":
        spans = _by_layer(order)
    else:
        spans = _absorb(order, _spans(_cuts(order, 1), len(order.calls)))
        if granularity in {"block", "stage", "auto"}:
            spans = _merge(order, spans, stage=granularity == "stage")
        if granularity == "auto":
            spans = [p for span in spans for p in _split(order, span, max_products)]
            spans = _join_shared(order, spans, max_products)
    return [_region(order, span) for span in spans]


Span = tuple[int, int]


def _spans(ends: Sequence[int], length: int) -> list[Span]:
    """Half-open intervals that end behind the given positions."""
    stops = sorted({*(e + 1 for e in ends), length})
    return list(itertools.pairwise([0, *stops]))


def _by_layer(order: _Order) -> list[Span]:
    """A region per weight, with what comes before it; never through a tuple."""
    ends = [at for at in (order.at[w] for w in order.weights) if order.cuttable[at]]
    return _spans(ends[:-1], len(order.calls))


def _count(order: _Order, span: Span) -> int:
    return sum(span[0] <= order.at[w] < span[1] for w in order.weights)


def _common(first: str, second: str) -> int:
    """How many leading parts two module paths share."""
    shared = 0
    for a, b in zip(first.split("."), second.split("."), strict=False):
        if a != b or not a:
            break
        shared += 1
    return shared


def _absorb(order: _Order, spans: list[Span]) -> list[Span]:
    """Join spans without weights to the neighbour they share more of their module path with."""
    paths = [module_path(order.calls[stop - 1]) for _, stop in spans]
    weighted = [_count(order, span) > 0 for span in spans]
    found: list[Span] = []
    pending: int | None = None
    for i, (start, stop) in enumerate(spans):
        if weighted[i]:
            found.append((start if pending is None else pending, stop))
            pending = None
        elif pending is None and found and not _belongs_ahead(order, spans, paths, weighted, i):
            found[-1] = (found[-1][0], stop)
        elif pending is None:
            pending = start
    # What waits for a weight ahead has met it, unless there is none at all.
    return found if pending is None else [(pending, spans[-1][1])]


def _belongs_ahead(
    order: _Order, spans: list[Span], paths: list[str], weighted: list[bool], i: int
) -> bool:
    later = next((j for j in range(i + 1, len(spans)) if weighted[j]), None)
    if later is None:
        return False
    ahead, behind = _common(paths[i], paths[later]), _common(paths[i], paths[i - 1])
    if ahead != behind:
        return ahead > behind
    return any(kind(n) is OpKind.NORM for n in order.calls[slice(*spans[i])])


def _containers(order: _Order) -> dict[Node, str]:
    """Innermost numbered module with two or more weights and a sibling of its class, by weight."""
    held: dict[str, int] = {}
    families: dict[tuple[str, str], set[str]] = {}
    stacks: dict[Node, list[str]] = {}
    for node in order.weights:
        paths = stacks.setdefault(node, [])
        for path, name in (node.meta.get("nn_module_stack") or {}).values():
            parent, _, leaf = str(path).rpartition(".")
            if leaf.isdigit():
                paths.append(str(path))
                held[str(path)] = held.get(str(path), 0) + 1
                families.setdefault((parent, str(name)), set()).add(str(path))
    repeated = {p for family in families.values() if len(family) > 1 for p in family}
    return {
        node: next((p for p in reversed(paths) if p in repeated and held[p] > 1), "")
        for node, paths in stacks.items()
    }


def _merge(order: _Order, spans: list[Span], *, stage: bool) -> list[Span]:
    """Join neighbours whose weights all lie in one repeated module."""
    containers = _containers(order)
    found: list[Span] = []
    previous = ""
    for start, stop in spans:
        names = {containers[w] for w in order.weights if start <= order.at[w] < stop}
        here = names.pop() if len(names) == 1 else ""
        if stage and here:
            here = here.rpartition(".")[0]
        if here and here == previous:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
        previous = here
    return found


def _split(order: _Order, span: Span, max_products: int) -> list[Span]:
    """Cut a region of too many weights at places with a few more live values."""
    if _count(order, span) <= max_products:
        return [span]
    best = [span]
    for width in WIDER:
        ends = [i for i in _cuts(order, width) if span[0] <= i < span[1]]
        inner = _absorb(order, [
            (a + span[0], b + span[0])
            for a, b in _spans([e - span[0] for e in ends], span[1] - span[0])
        ])  # fmt: skip
        best = _chunks(order, inner)
        if all(_count(order, s) <= max_products for s in best):
            break
    return best


def _chunks(order: _Order, spans: list[Span]) -> list[Span]:
    found: list[Span] = []
    for start, stop in spans:
        if found and _count(order, (found[-1][0], stop)) <= CHUNK:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return found


def _join_shared(order: _Order, spans: list[Span], max_products: int) -> list[Span]:
    """Join regions that read the same weight, if what lies between has few different weights."""
    tensors = {node: _tensor(node) for node in order.weights}
    found = list(spans)
    for name in dict.fromkeys(t for t in tensors.values() if t):
        calls = [order.at[n] for n in order.weights if tensors[n] == name]
        inside = [s for s in found if s[0] <= calls[-1] and s[1] > calls[0]]
        wide = (inside[0][0], inside[-1][1])
        different = {
            tensors[n] or n.name for n in order.weights if wide[0] <= order.at[n] < wide[1]
        }
        if len(inside) > 1 and len(different) <= max_products:
            at = found.index(inside[0])
            found[at : at + len(inside)] = [wide]
    return found


def _tensor(node: Node) -> str:
    """Name of the stored tensor that a product reads, '' without one."""
    what = product(node)
    source = None if what is None else node.args[what.weight]
    return str(source.target) if isinstance(source, Node) and source.op == "get_attr" else ""


def _region(order: _Order, span: Span) -> Region:
    inside = order.calls[span[0] : span[1]]
    members = set(inside)
    read = {i for n in inside for i in n.all_input_nodes if i not in members}
    inputs = [n for n in read if n not in order.fixed and not is_size(n)]
    inputs.sort(key=lambda n: order.place[n])
    outputs = [n for n in inside if is_tensor(n) and any(u not in members for u in n.users)]
    weights = [n.name for n in order.weights if n in members]
    paths = [module_path(order.calls[order.at[w]]) for w in order.weights if w in members]
    name = _prefix(paths) or inside[-1].name
    moving = frozenset(n.name for n in (*inputs, *outputs) if n in order.moving)
    return Region(
        name, tuple(n.name for n in inside), tuple(n.name for n in inputs),
        tuple(n.name for n in outputs), moving, tuple(weights),
    )  # fmt: skip


def _prefix(paths: list[str]) -> str:
    if not paths:
        return ""
    shared = paths[0].split(".")
    for path in paths[1:]:
        shared = shared[: _common(".".join(shared), path)]
    return ".".join(shared)
