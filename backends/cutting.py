# SPDX-License-Identifier: Apache-2.0
"""Cut a graph at its quantizers, so that each op can be given the same codes on any runtime.

Every quantizer's readers get a fresh input instead: values that encode to wanted codes exactly
(decoding and encoding is the identity on codes). Each quantizer's own codes become an output.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from qgraph.backends.calling import flat_inputs
from qgraph.backends.reference import lower
from qgraph.graph.build import insert_call, prune, shallow_copy
from qgraph.graph.dialect import DEQUANTIZE, DEQUANTIZE_LEVELS, QUANTIZE, encoding_of, is_quantize
from qgraph.graph.ops import constants


class CutGraph:
    """A graph whose quantizers are fed from outside.

    Attributes:
        module: inputs of the original graph, then one float input per quantizer; one output per
            quantizer, its decoded codes.
        names: the quantizers, in the order of the outputs.
    """

    def __init__(self, source: GraphModule) -> None:
        self.source = source
        self.module = shallow_copy(source)
        graph = self.module.graph
        nodes = list(graph.nodes)
        fixed = constants(nodes)
        cuts = [n for n in nodes if is_quantize(n) and n not in fixed]
        self.names = tuple(n.name for n in cuts)
        last = next(n for n in nodes if n.op == "output")
        anchor = [n for n in nodes if n.op == "placeholder"][-1].next
        outputs = [self._cut(node, anchor, last) for node in cuts]
        last.args = (tuple(outputs),)
        graph._codegen = self._codegen(len(outputs))
        graph.eliminate_dead_code()
        prune(self.module)
        graph.lint()
        self.module.recompile()

    def _cut(self, node: Node, anchor: Node, last: Node) -> Node:
        graph = self.module.graph
        value: Any = node.args[0]
        with graph.inserting_before(anchor):
            fed = graph.placeholder(f"fed_{node.name}")
            parameters = [self._parameter(argument) for argument in node.args[1:]]
        fed.meta["val"] = value.meta["val"]
        readers = list(node.users)
        target: Any = node.target
        again = insert_call(self.module, target, fed, *parameters, like=node, before=anchor)
        for user in readers:
            user.replace_input_with(node, again)
        decode = DEQUANTIZE if node.target is QUANTIZE else DEQUANTIZE_LEVELS
        return insert_call(self.module, decode, node, *node.args[1:], like=node, before=last)

    def _parameter(self, argument: Any) -> Any:
        """Read a parameter anew: the original may be read only further down."""
        if not isinstance(argument, Node):
            return argument
        again = self.module.graph.get_attr(str(argument.target))
        again.meta.update(argument.meta)
        return again

    def _codegen(self, num_outputs: int) -> Any:
        names = [n.name for n in self.module.graph.nodes if n.op == "placeholder"]
        structure: Any = (tuple(range(len(names))), {})
        info = _PyTreeInfo(
            ["self", *names],
            pytree.tree_structure(structure),
            pytree.tree_structure(tuple(range(num_outputs))),
        )
        return _PyTreeCodeGen(info)

    def feed(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Tensor]]:
        """Inputs of the cut graph from the reference's run, and the reference's codes."""
        expected: dict[str, Tensor] = {}
        lower(self.source).run(args, kwargs, lambda n, c: expected.setdefault(n.name, c))
        nodes = {n.name: n for n in self.source.graph.nodes}
        fed = [encoding_of(self.source, nodes[n]).decode(expected[n]) for n in self.names]
        return [*flat_inputs(self.source, args, kwargs), *fed], expected
