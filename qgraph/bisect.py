# SPDX-License-Identifier: Apache-2.0
"""bisect(): which pass, and which node, broke a promise or cost the most accuracy.

The pipeline runs pass by pass. What each pass costs is the squared error that the outputs gained
on the sample. For the pass that costs most, each node is then charged on its own: the node's value
is computed from float inputs as the graph after the pass computes it, put into the graph before
the pass, and what it does to the outputs is measured.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from qgraph.calibration.loader import adapter, first_batch
from qgraph.calibration.sample import example_of, small_sample
from qgraph.context import Context
from qgraph.errors import PassError, QGraphError
from qgraph.graph.build import shallow_copy
from qgraph.graph.ignore import Ignore, Pattern
from qgraph.graph.provenance import module_path, source_line
from qgraph.graph.trace import trace, trace_info
from qgraph.graph.verify import Sample
from qgraph.pipeline import Fact, Pass, Pipeline, Step, run_pipeline
from qgraph.pipelines import pipeline as named_pipeline
from qgraph.report.layers import sqnr
from qgraph.report.plain import plain
from qgraph.report.text import table

MAX_NODES = 40  # so many nodes are followed to the outputs; the others only to their own value


@dataclass(frozen=True, slots=True)
class PassCost:
    """One pass of the pipeline.

    Attributes:
        name: of the pass.
        outcome: "held", "broken", or "not reached".
        changed: whether the graph changed.
        sqnr: dB of the outputs against the float model after the pass; nan where not reached.
        share: of the final squared error, how much came with this pass (negative: it helped).
        seconds: wall time of the pass.
    """

    name: str
    outcome: str
    changed: bool
    sqnr: float
    share: float
    seconds: float


@dataclass(frozen=True, slots=True)
class NodeCost:
    """One node under the costliest pass, charged alone.

    Attributes:
        node, path, line: where.
        local: dB of its value, computed from float inputs.
        output: dB of the outputs if only this node were so; nan where it was not followed.
        share: its squared error at the outputs over the sum of those of all nodes followed.
    """

    node: str
    path: str
    line: str
    local: float
    output: float
    share: float


@dataclass(frozen=True)
class Bisection:
    """Where accuracy went. Prints as a table; `to_json` has all of it.

    Attributes:
        passes: in order.
        nodes: of the costliest pass, most costly first.
        pass_name: the first pass that broke a promise, else the one that costs most, "" if none.
        node: the first node that differs, or the one that costs most; "" if none.
        reason: in words.
        broken: whether a promise broke.
    """

    passes: tuple[PassCost, ...]
    nodes: tuple[NodeCost, ...]
    pass_name: str
    node: str
    reason: str
    broken: bool

    def to_json(self) -> str:
        """JSON text; infinite numbers as text, nan as None."""
        return json.dumps(plain(asdict(self)), indent=1, allow_nan=False)

    def __str__(self) -> str:
        rows = [
            (p.name, p.outcome, "yes" if p.changed else "", _db(p.sqnr), _percent(p.share))
            for p in self.passes
        ]
        parts = [
            textwrap.fill(self.reason, 100),
            table(("pass", "promise", "changed", "outputs dB", "of error"), rows),
        ]
        if self.nodes:
            lines = [
                (n.node, n.path, _db(n.local), _db(n.output), _percent(n.share), n.line)
                for n in self.nodes[:12]
            ]
            head = ("node", "module", "own dB", "outputs dB", "of error", "line")
            parts.append(table(head, lines))
        return "\n\n".join(parts)


def bisect(
    pipeline: str | Pipeline, model: nn.Module | torch.export.ExportedProgram,
    loader: Iterable[Any], *,
    example_inputs: Any = None, transform: Callable[[Any], Any] | None = None,
    dynamic_shapes: Any = None, ignore: Pattern | Iterable[Pattern] = (), seed: int = 0,
    max_nodes: int = MAX_NODES,
) -> Bisection:  # fmt: skip
    """Name the first pass and node that breaks a promise, or else that costs most accuracy.

    Args:
        pipeline: a name, or a Pipeline.
        model: as for `qgraph.compile`, and so are all that follow but the last.
        loader: calibration batches.
        example_inputs: inputs to trace with.
        transform: maps a batch to the model's inputs.
        dynamic_shapes: as for torch.export.
        ignore: what stays in float.
        seed: of every random choice.
        max_nodes: so many nodes are followed to the outputs.

    Raises:
        CaptureError, CalibrationError, ConfigError: as `qgraph.compile` does; broken promises and
            failing passes are findings, not errors.

    Example:
        >>> print(qgraph.bisect("w4a4", model, loader))      # doctest: +SKIP
    """
    chosen = named_pipeline(pipeline) if isinstance(pipeline, str) else pipeline
    chosen.check({Fact.TRACED})
    batch, batches = first_batch(loader)
    args, kwargs = example_of(model, batch if example_inputs is None else example_inputs, transform)
    module = trace(model, *args, dynamic_shapes=dynamic_shapes, **kwargs)
    sample = small_sample(module, args, kwargs, dynamic=trace_info(module).dynamic_batch)
    context = Context(
        sample=sample, batches=batches, adapt=adapter(module, transform),
        facts=frozenset({Fact.TRACED}), ignore=Ignore.of(ignore), seed=seed,
    )  # fmt: skip
    watch = _Watch(module, sample)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        error: PassError | None = None
        try:
            run_pipeline(chosen, module, context, watch=watch.after)
        except PassError as caught:
            error = caught
        return _conclude(chosen, watch, error, max_nodes)


class _Watch:
    """Snapshots and errors between passes; graphs share all tensors, so they cost little."""

    def __init__(self, module: GraphModule, sample: Sample) -> None:
        self.sample = sample
        self.outputs = _outputs(module, sample)
        self.costs: list[PassCost] = []
        self.noise = [0.0]
        self.last = shallow_copy(module)
        self.worst: tuple[float, GraphModule, GraphModule] | None = None

    def after(self, item: Pass, module: GraphModule, step: Step) -> None:
        now = _outputs(module, self.sample) if step.changed else None
        noise = self.noise[-1] if now is None else _noise(self.outputs, now)
        gained = noise - self.noise[-1]
        if step.changed:
            copy = shallow_copy(module)
            if gained > 0 and (self.worst is None or gained > self.worst[0]):
                self.worst = (gained, self.last, copy)
            self.last = copy
        self.noise.append(noise)
        db = _decibels(self.outputs, noise)
        self.costs.append(PassCost(item.name, "held", step.changed, db, gained, step.seconds))


def _conclude(
    chosen: Pipeline, watch: _Watch, error: PassError | None, max_nodes: int
) -> Bisection:
    total = watch.noise[-1]
    shared = [replace(c, share=c.share / total if total > 0 else 0.0) for c in watch.costs]
    names = [item.name for item in chosen]
    if error is not None:
        reached = len(shared)
        unknown = [
            PassCost(n, "broken" if n == names[reached] else "not reached", False, math.nan,
                     math.nan, math.nan)
            for n in names[reached:]
        ]  # fmt: skip
        reason = str(error).split("\n", 1)[0]
        return Bisection(
            (*shared, *unknown), (), error.pass_name or names[reached], error.node or "", reason,
            broken=True,
        )  # fmt: skip
    if watch.worst is None:
        return Bisection(tuple(shared), (), "", "", "no pass changed the outputs", broken=False)
    costliest = max(shared, key=lambda cost: cost.share)
    nodes = _charge(watch.worst[1], watch.worst[2], watch.sample, max_nodes)
    node = nodes[0].node if nodes else ""
    reason = f"{costliest.name} costs most: {_percent(costliest.share)} of the final squared error"
    if nodes:
        first = nodes[0]
        place = f" in {first.path}" if first.path else ""
        reason += f"; most of it at {node}{place} ({_percent(first.share)})"
    return Bisection(tuple(shared), tuple(nodes), costliest.name, node, reason, broken=False)


def _charge(
    before: GraphModule, after: GraphModule, sample: Sample, max_nodes: int
) -> list[NodeCost]:
    """Costs of the nodes that both graphs have and that compute something else in `after`."""
    runner = _Replay(before, sample)
    found: list[tuple[float, Node, Tensor]] = []
    names = {node.name: node for node in before.graph.nodes if node.op != "get_attr"}
    for node in after.graph.nodes:
        if node.op != "call_function" or node.name not in names:
            continue
        clean = runner.env[names[node.name]]
        if not isinstance(clean, Tensor) or not clean.is_floating_point():
            continue
        value = _alone(after, node, names, runner.env)
        if value is not None and value.shape == clean.shape and not torch.equal(value, clean):
            found.append((sqnr(clean, value), names[node.name], value))
    found.sort(key=lambda item: item[0])
    wanted = _outputs(before, sample)
    costs = []
    for number, (local, node, value) in enumerate(found):
        noise = math.nan
        if number < max_nodes:
            noise = _noise(wanted, runner.with_value(node, value))
        costs.append((noise, local, node))
    total = sum(noise for noise, _, _ in costs if not math.isnan(noise)) or 1.0
    records = [
        NodeCost(node.name, module_path(node), source_line(node), local,
                 math.nan if math.isnan(noise) else _decibels(wanted, noise), noise / total)
        for noise, local, node in costs
    ]  # fmt: skip
    return sorted(records, key=lambda r: (math.isnan(r.share), -r.share, r.local))


def _alone(
    after: GraphModule, node: Node, names: dict[str, Node], env: dict[Node, Any]
) -> Tensor | None:
    """The node's value as `after` computes it from float values of the nodes both graphs have."""
    known: dict[Node, Any] = {}
    runner = Interpreter(after)

    def value_of(item: Node) -> Any:
        if item not in known:
            if item is not node and item.name in names:
                known[item] = env[names[item.name]]
            elif item.op == "get_attr":
                known[item] = runner.fetch_attr(str(item.target))
            else:
                known[item] = compute(item)
        return known[item]

    def compute(item: Node) -> Any:
        args: Any = torch.fx.node.map_arg(item.args, value_of)
        kwargs: Any = torch.fx.node.map_arg(item.kwargs, value_of)
        return item.target(*args, **kwargs)  # type: ignore[operator]

    try:
        result = compute(node)
    except (RuntimeError, QGraphError):  # the pass changed what the inputs of the node mean
        return None
    return result if isinstance(result, Tensor) else None


class _Replay:
    """Runs a graph once, and again with one value replaced, from there on only."""

    def __init__(self, module: GraphModule, sample: Sample) -> None:
        self.module = module
        runner = Interpreter(module, garbage_collect_values=False)
        runner.run(*tree_leaves((sample.args, sample.kwargs)), enable_io_processing=False)
        self.env: dict[Node, Any] = dict(runner.env)
        self.order = {node: at for at, node in enumerate(module.graph.nodes)}

    def with_value(self, node: Node, value: Tensor) -> list[Tensor]:
        """Outputs if `node` had this value."""
        touched, env = {node}, {**self.env, node: value}
        result: Any = None
        for later in list(self.module.graph.nodes)[self.order[node] + 1 :]:
            if not touched.intersection(later.all_input_nodes):
                if later.op == "output":
                    result = torch.fx.node.map_arg(later.args[0], env.__getitem__)
                continue
            args: Any = torch.fx.node.map_arg(later.args, env.__getitem__)
            kwargs: Any = torch.fx.node.map_arg(later.kwargs, env.__getitem__)
            if later.op == "output":
                result = args[0]
                continue
            env[later] = later.target(*args, **kwargs)
            touched.add(later)
        return _floats(result)


def _outputs(module: GraphModule, sample: Sample) -> list[Tensor]:
    return _floats(module(*sample.args, **sample.kwargs))


def _floats(result: Any) -> list[Tensor]:
    leaves = tree_leaves(result)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def _noise(wanted: list[Tensor], got: list[Tensor]) -> float:
    """Squared error over the squared size of each output, summed over outputs."""
    total = 0.0
    for a, b in zip(wanted, got, strict=True):
        ok = a.isfinite() & b.isfinite() if a.shape == b.shape else None
        if ok is None:
            return math.inf
        signal = float(a[ok].double().square().sum())
        total += float((a[ok].double() - b[ok].double()).square().sum()) / max(signal, 1e-300)
    return total


def _decibels(wanted: list[Tensor], noise: float) -> float:
    return math.inf if noise == 0 else -10 * math.log10(noise / max(len(wanted), 1))


def _db(value: float) -> str:
    return "–" if math.isnan(value) else "exact" if value == math.inf else f"{value:.1f}"


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f} %"
