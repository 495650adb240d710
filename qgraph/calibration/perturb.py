# SPDX-License-Identifier: Apache-2.0
"""What quantizing one unit alone does to the network's outputs, or to the task's loss.

The float run of a batch is kept, and for each unit and width only what depends on the unit runs
again. Dearer than `fisher` (one partial forward for each width of each unit), but nothing is
linearised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from qgraph.calibration.fisher import quantized_weight
from qgraph.calibration.loader import Arguments, Signature
from qgraph.calibration.objectives import distance
from qgraph.calibration.row_errors import data_encoding, fake
from qgraph.calibration.unit_sweep import Probing, Ranges, UnitSweep
from qgraph.errors import CalibrationError
from qgraph.graph.bit_units import Unit
from qgraph.graph.plan import Role

METHODS = ("output", "loss")


class PerturbSweep(UnitSweep):
    """Accumulates distances of all units over batches; see `UnitSweep`."""

    def __init__(
        self, module: GraphModule, units: Sequence[Unit], ranges: Ranges,
        widths: tuple[Sequence[int], Sequence[int]], how: Probing,
    ) -> None:  # fmt: skip
        super().__init__(module, units, ranges, widths, how)
        self.nodes = list(module.graph.nodes)

    @torch.no_grad()
    def batch(self, batch: Any, adapt: Callable[[Any], Arguments], seed: int) -> dict[str, Tensor]:
        """Distances of one batch with each unit quantized alone."""
        del seed  # nothing is drawn
        env = self.values(batch, adapt)
        exact = self.replay(env, [])
        measure = self._measure(exact, batch)
        found: dict[str, Tensor] = {}
        for unit in self.units:
            weights = [self.replay(env, [unit], weight=b) for b in self.weight_bits]
            values = [self.replay(env, [unit], activation=b) for b in self.activation_bits]
            if unit.weights:
                found[f"{unit.name}/w"] = torch.stack([measure(y) for y in weights])
            found[f"{unit.name}/a"] = torch.stack([measure(y) for y in values])
        return found

    def _measure(self, exact: Any, batch: Any) -> Callable[[Any], Tensor]:
        if self.how.method == "loss":
            loss = self.how.loss
            if loss is None:
                msg = "sensitivity by 'loss' needs loss=, a function (outputs, batch) -> scalar"
                raise CalibrationError(msg)
            base = loss(exact, batch).double()
            return lambda y: (loss(y, batch).double() - base).clamp(min=0)
        return lambda y: distance(exact, y, self.how.output)

    def values(self, batch: Any, adapt: Callable[[Any], Arguments]) -> dict[Node, Any]:
        """Every value of the float graph for one batch."""
        keeper = Interpreter(self.module, garbage_collect_values=False)
        keeper.run(*Signature.of(self.module).flat(*adapt(batch)), enable_io_processing=False)
        return keeper.env

    def replay(
        self, env: dict[Node, Any], units: Sequence[Unit], *, weight: int | None = None,
        activation: int | None = None,
    ) -> Any:  # fmt: skip
        """The model's output with the weights, the inputs, or both, of some units quantized."""
        sites = [s for unit in units for s in (*unit.weights, *unit.activations)]
        edges = {(s.edge.consumer, s.edge.path[0]): s for s in sites}
        products = {node for unit in units for node in unit.products}
        changed: dict[Node, Any] = {}

        def value_of(node: Node) -> Any:
            return changed[node] if node in changed else env[node]

        for node in self.nodes:
            inside = node in products
            if not inside and not any(i in changed for i in node.all_input_nodes):
                continue
            args: Any = map_arg(node.args, value_of)
            kwargs: Any = map_arg(node.kwargs, value_of)
            if node.op == "output":
                return self.module.graph.process_outputs(args[0])
            if inside:
                args = list(args)
                for (reader, place), site in edges.items():
                    if reader is not node or not isinstance(place, int):
                        continue
                    if site.role is Role.WEIGHT and weight is not None:
                        args[place] = quantized_weight(self.module, site, weight)
                    elif site.role is Role.ACTIVATION and activation is not None:
                        ends = self.ranges[site.value]
                        args[place] = fake(data_encoding(*ends, activation, 1.0), args[place])
            changed[node] = node.target(*args, **kwargs)
        output = self.nodes[-1]
        return self.module.graph.process_outputs(map_arg(output.args[0], value_of))
