# SPDX-License-Identifier: Apache-2.0
"""One sweep over the calibration batches fills every statistic that was asked for.

A shallow copy of the graph gets taps, calls that hand a value to its statistics. The copy runs as
generated code, which frees each value after its last use and costs no more than the model itself;
a node-by-node interpreter only comes in to say where a failing batch failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from qgraph.calibration.fused import FusedStatistics
from qgraph.calibration.heap import Heap
from qgraph.calibration.later import Later
from qgraph.calibration.loader import Arguments, Signature, adapter
from qgraph.calibration.ranks import Share
from qgraph.calibration.statistics import Statistic
from qgraph.errors import CalibrationError, QGraphError
from qgraph.graph.build import shallow_copy
from qgraph.graph.verify import where

Key = Node | tuple[Node, ...]
Wanted = FusedStatistics | Sequence[Statistic]
Masks = Callable[[tuple[Any, ...], dict[str, Any]], Tensor | None]
Progress = Callable[[str, int, int], None]


@dataclass
class _Run:
    """What the taps of one sweep share: the batch at hand and checks still to be read back."""

    batch: int = 0
    mask: Tensor | None = None
    pending: list[tuple[Node, Tensor, list[int]]] = field(default_factory=list)
    later: Later = field(default_factory=Later)
    heap: Heap = field(default_factory=Heap)

    def settle(self) -> None:
        """Do what waits, and read the counts of a device back, once per batch."""
        self.later.run()
        if not self.pending:
            return
        counts = torch.stack([count for _, count, _ in self.pending]).tolist()
        for (node, _, shape), count in zip(self.pending, counts, strict=True):
            self.refuse(node, count, shape)
        self.pending.clear()

    def refuse(self, node: Node, count: int, shape: Sequence[int]) -> None:
        """Raise if a value held non-finite numbers."""
        if count:
            msg = (
                f"batch {self.batch}: {count} non-finite values (NaN or Inf) in {where(node)}, "
                f"shape {list(shape)}; look at the batch, or at the float model"
            )
            raise CalibrationError(msg)


class _Tap(nn.Module):
    """Hands a value, or several, to their statistics."""

    def __init__(self, nodes: tuple[Node, ...], statistics: FusedStatistics, run: _Run) -> None:
        super().__init__()
        self.nodes = nodes
        self.statistics = statistics
        self.sweep = run

    def forward(self, *values: Tensor) -> None:
        if values[0].device.type == "cpu":
            self.sweep.heap.passed(values[0].nbytes)
        if len(values) > 1:
            self.statistics.update_all(values)
            return
        bad = self.statistics.update(values[0], mask=self.sweep.mask, later=self.sweep.later)
        if isinstance(bad, int):
            self.sweep.refuse(self.nodes[0], bad, values[0].shape)
        elif bad.device.type == "cpu":
            self.sweep.refuse(self.nodes[0], int(bad), values[0].shape)
        else:
            self.sweep.pending.append((self.nodes[0], bad, list(values[0].shape)))


class _Locator(Interpreter):
    """Runs a failing batch node by node to name the node."""

    def run_node(self, n: Node) -> Any:
        try:
            return super().run_node(n)
        except (RuntimeError, IndexError, TypeError, ValueError, AssertionError) as error:
            msg = f"{where(n)} failed: {error}"
            raise CalibrationError(msg) from error


def instrument(
    module: GraphModule, statistics: Mapping[Key, FusedStatistics], run: _Run
) -> GraphModule:
    """A copy of the graph, sharing all tensors, that updates the statistics when called."""
    clone = shallow_copy(module)
    twins = dict(zip(module.graph.nodes, clone.graph.nodes, strict=True))
    position = {node: at for at, node in enumerate(module.graph.nodes)}
    # generated code binds the inputs where the last placeholder stands
    bound = [node for node in clone.graph.nodes if node.op == "placeholder"][-1:]
    for number, (key, fused) in enumerate(statistics.items()):
        nodes = key if isinstance(key, tuple) else (key,)
        if any(node not in twins for node in nodes):
            msg = f"statistics of {[node.name for node in nodes]} are not of this graph"
            raise CalibrationError(msg)
        name = f"_tap_{number}"
        clone.add_submodule(name, _Tap(nodes, fused, run))
        last = twins[max(nodes, key=lambda node: position[node])]
        with clone.graph.inserting_after(bound[0] if last.op == "placeholder" else last):
            clone.graph.call_module(name, tuple(twins[node] for node in nodes))
    clone.recompile()
    return clone


@torch.no_grad()
def collect(
    module: GraphModule,
    loader: Iterable[Any],
    requests: Mapping[Node, Wanted] | Mapping[Key, Wanted],
    *,
    adapt: Callable[[Any], Arguments] | None = None,
    row_masks: Masks | None = None,
    progress: Progress | None = None,
    max_batches: int | None = None,
    allow_empty: bool = False,
) -> int:
    """Run the loader once through the graph, updating the statistics; return the batch count.

    Args:
        module: a traced graph in eval mode; unchanged.
        loader: any iterable of batches.
        requests: statistics by the node that computes the value; joint ones by tuples of nodes.
        adapt: batch -> (args, kwargs) of the module; default `adapter(module)`.
        row_masks: (args, kwargs) -> bool [B, T], True where a token counts, or None.
        progress: called with ("calibrate", batches done, batches expected or 0).
        max_batches: stop after so many.
        allow_empty: no batch is no error: other ranks have some.

    Raises:
        CalibrationError: no batches, or fewer than the loader's length announces; inputs that do
            not fit the signature or lie on another device; a value that is not finite (with batch
            index, node, module path, source line and count); a batch on which the graph fails.
    """
    statistics: dict[Key, FusedStatistics] = {
        key: each if isinstance(each, FusedStatistics) else FusedStatistics(each)
        for key, each in requests.items()
    }
    run = _Run()
    observed = instrument(module, statistics, run)
    signature = Signature.of(module)
    adapt = adapt or adapter(module)
    expected = _expected(loader, max_batches)
    done = 0
    for batch in () if max_batches == 0 else loader:
        args, kwargs = adapt(batch)
        run.batch = loader.number(done) if isinstance(loader, Share) else done
        signature.check(args, kwargs, batch=run.batch)
        run.mask = None if row_masks is None else row_masks(args, kwargs)
        _forward(module, observed, args, kwargs, run)
        done += 1
        if done == 1:
            run.heap.trim()  # by now statistics lie where they stay, with gaps between them
        if progress is not None:
            progress("calibrate", done, expected)
        if done == max_batches:
            break
    if done or not allow_empty:
        _check_count(done, expected, loader)
    return done


def _forward(module: GraphModule, observed: GraphModule, args: Any, kwargs: Any, run: _Run) -> None:
    try:
        observed(*args, **kwargs)
        run.settle()
    except QGraphError:
        raise
    except (RuntimeError, IndexError, TypeError, ValueError, AssertionError) as error:
        try:
            _Locator(module).run(
                *Signature.of(module).flat(args, kwargs), enable_io_processing=False
            )
        except CalibrationError as located:
            msg = f"batch {run.batch}: {located}"
            raise CalibrationError(msg) from error
        msg = f"batch {run.batch} failed: {error}"
        raise CalibrationError(msg) from error


def _expected(loader: Iterable[Any], max_batches: int | None) -> int:
    """How many batches should come; 0 when the loader does not say."""
    try:
        length = len(loader) if isinstance(loader, Sized) else 0
    except (TypeError, NotImplementedError):
        length = 0
    return min(length, max_batches) if max_batches is not None and length else length


def _check_count(done: int, expected: int, loader: Iterable[Any]) -> None:
    if done == 0:
        one_shot = iter(loader) is loader
        why = "a one-shot iterator gives its batches only once; pass a list or a DataLoader"
        msg = f"the calibration loader gave 0 batches{f' ({why})' if one_shot else ''}"
        raise CalibrationError(msg)
    if done < expected:
        msg = f"the calibration loader ran dry: it gave {done} of the {expected} announced batches"
        raise CalibrationError(msg)
