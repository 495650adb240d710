# SPDX-License-Identifier: Apache-2.0
"""Writing einsum as permute and matmul.

Labels of two operands fall into four classes: batch (both, kept), contracted (both, summed),
and those of one side. One label per side becomes a row or column; further ones act as batch
dimensions of size 1 on the other side, so that broadcasting matmul needs no reshape:
``bhwc,hkc->bhwk`` is ``[b h w c] @ [1 h c k]``.
"""

from __future__ import annotations

import string
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from qgraph.graph.build import insert_call
from qgraph.graph.sizes import rank_of, shape_of

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class _Term:
    """An operand with one label per dimension."""

    node: Node
    labels: str


def decompose_einsum(module: GraphModule) -> bool:
    """Rewrite every einsum of one or two operands (more: pair by pair); leave exotic ones whole."""
    changed = False
    for node in list(module.graph.nodes):
        if node.target is not aten.einsum.default:
            continue
        result = _rewrite(module, node)
        if result is not None:
            node.replace_all_uses_with(result)
            module.graph.erase_node(node)
            changed = True
    return changed


def _parse(node: Node) -> tuple[list[_Term], str] | None:
    equation, operands = node.args[0], node.args[1]
    assert isinstance(equation, str)
    assert isinstance(operands, (list, tuple))
    left, arrow, output = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    unused = [c for c in string.ascii_letters if c not in equation]
    terms, longest = [], ""
    for labels, operand in zip(inputs, operands, strict=True):
        if not isinstance(operand, Node):
            return None
        missing = rank_of(operand) - len(labels.replace("...", ""))
        # the ellipsis is aligned at its end, as in broadcasting
        dots = "".join(reversed(unused[:missing])) if "..." in labels else ""
        longest = max(longest, dots, key=len)
        terms.append(_Term(operand, labels.replace("...", dots)))
    if not arrow:
        every = "".join(inputs).replace(".", "")
        output = "..." + "".join(sorted(c for c in set(every) if every.count(c) == 1))
    output = output.replace("...", longest)
    if any(len(set(t.labels)) != len(t.labels) for t in terms) or len(set(output)) != len(output):
        return None
    return terms, output


def _rewrite(module: GraphModule, node: Node) -> Node | None:
    parsed = _parse(node)
    if parsed is None or not _sizes_agree(parsed[0]):
        return None
    terms, output = parsed
    term = terms[0]
    for position, other in enumerate(terms[1:], start=2):
        kept = output + "".join(t.labels for t in terms[position:])
        left = _sum(module, node, term, kept + other.labels)
        right = _sum(module, node, other, kept + term.labels)
        term = _contract(module, node, (left, right), kept)
    return _arrange(module, node, _sum(module, node, term, output), output)


def _sizes_agree(terms: list[_Term]) -> bool:
    """Whether a label has one size everywhere; einsum would also broadcast size 1."""
    sizes: dict[str, str] = {}
    return all(
        sizes.setdefault(label, str(size)) == str(size)
        for term in terms
        for label, size in zip(term.labels, shape_of(term.node), strict=True)
    )


def _sum(module: GraphModule, like: Node, term: _Term, kept: str) -> _Term:
    """Sum over the labels that nothing else reads."""
    gone = [axis for axis, label in enumerate(term.labels) if label not in kept]
    if not gone:
        return term
    node = insert_call(module, aten.sum.dim_IntList, term.node, gone, like=like, before=like)
    return _Term(node, "".join(c for c in term.labels if c in kept))


def _arrange(module: GraphModule, like: Node, term: _Term, order: str, *, inner: int = 0) -> Node:
    """Permute to `order` with size 1 for labels the term lacks.

    Leading ones come for free by broadcasting, except among the last `inner` dimensions.
    """
    present = "".join(c for c in order if c in term.labels)
    node = term.node
    if present != term.labels:
        dims = [term.labels.index(c) for c in present]
        node = insert_call(module, aten.permute.default, node, dims, like=like, before=like)
    first = min([order.index(c) for c in present] + [len(order) - inner])
    for position in range(first, len(order)):
        if order[position] not in present:
            target = aten.unsqueeze.default
            node = insert_call(module, target, node, position - first, like=like, before=like)
    return node


def _contract(module: GraphModule, like: Node, pair: tuple[_Term, _Term], kept: str) -> _Term:
    left, right = pair
    shared = [c for c in left.labels if c in right.labels]
    summed = "".join(c for c in shared if c not in kept)
    batch = "".join(c for c in shared if c in kept)
    rows = "".join(c for c in left.labels if c not in shared)
    columns = "".join(c for c in right.labels if c not in shared)
    if not summed:
        order = batch + rows + columns
        factors = [_arrange(module, like, term, order) for term in pair]
        return _Term(insert_call(module, aten.mul.Tensor, *factors, like=like, before=like), order)
    left, right = (_merge(module, like, term, summed) for term in pair)
    outer, row, column = rows[:-1] + columns[:-1] + batch, rows[-1:], columns[-1:]
    # "<" and ">" stand for the row or column that a vector does not have
    a = _arrange(module, like, left, outer + (row or "<") + summed[0], inner=2)
    b = _arrange(module, like, right, outer + summed[0] + (column or ">"), inner=2)
    node = insert_call(module, aten.matmul.default, a, b, like=like, before=like)
    if not column:
        node = insert_call(module, aten.squeeze.dim, node, -1, like=like, before=like)
    if not row:
        axis = -2 if column else -1
        node = insert_call(module, aten.squeeze.dim, node, axis, like=like, before=like)
    return _Term(node, outer + row + column)


def _merge(module: GraphModule, like: Node, term: _Term, summed: str) -> _Term:
    """Flatten several contracted labels into one, last."""
    if len(summed) == 1:
        return term
    rest = "".join(c for c in term.labels if c not in summed)
    node = _arrange(module, like, term, rest + summed)
    first, last = len(rest), len(rest) + len(summed) - 1
    target = aten.flatten.using_ints
    node = insert_call(module, target, node, first, last, like=like, before=like)
    return _Term(node, rest + summed[0])
