# SPDX-License-Identifier: Apache-2.0
"""Passes, the facts they promise, pipelines as data, and the manager that verifies each step.

A pass is a frozen dataclass: its fields are its options, it keeps no state between runs. The
order of a pipeline is checked from facts before anything runs; the manager never reorders.
After each pass the graph is verified, and a pass that promises to keep the function is
replayed on a sample and compared.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import TYPE_CHECKING, ClassVar, cast

from torch.fx import GraphModule

from qgraph.errors import ConfigError, PassError, QGraphError, unknown_name
from qgraph.graph.build import compile_when_called
from qgraph.graph.metadata import CREATED_BY
from qgraph.graph.verify import Claim, Verifier, check_order

if TYPE_CHECKING:
    from qgraph.context import Context
    from qgraph.graph.requests import Request

LOGGER = logging.getLogger("qgraph")


class Promise(Enum):
    """What a pass guarantees about the function of the graph."""

    IDENTICAL = "bit for bit the same outputs"
    EQUIVALENT = "the same outputs within the pass's tolerance"
    QUANTIZING = "outputs may change; the graph stays well formed"


class Fact(StrEnum):
    """What is known to hold of the graph or the context between passes.

    Third-party passes may use any string; these are the ones the built-in passes speak of.
    """

    TRACED = "traced"
    CANONICAL = "canonical"
    PLANNED = "planned"
    STATISTICS = "statistics"
    RANGES = "ranges"
    QUANTIZED = "quantized"
    BIASES = "biases"
    PACKED = "packed"


@dataclass(frozen=True)
class Pass(ABC):
    """One transformation.

    Class attributes:
        name: id used in pipelines, reports and errors (verb-object, dashes).
        promise: see `Promise`.
        tolerance: for `EQUIVALENT`, the largest difference relative to the largest output.
        requires, establishes, invalidates: facts before, after, and no longer.

    `run` returns whether the graph changed, honestly: the manager checks. Tensors of the module
    are immutable to passes: register a new one and redirect the reader, never write in place.
    """

    name: ClassVar[str]
    promise: ClassVar[Promise] = Promise.QUANTIZING
    tolerance: ClassVar[float] = 1e-5
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()
    invalidates: ClassVar[frozenset[str]] = frozenset()

    def statistics(self, module: GraphModule, context: Context) -> Iterable[Request]:
        """Statistics this pass wants from the one sweep; asked just before it."""
        del module, context
        return ()

    @abstractmethod
    def run(self, module: GraphModule, context: Context) -> bool:
        """Transform `module` in place (it is a private copy); return whether it changed."""

    def claim(self) -> Claim:
        """The promise in the form that the verifier checks."""
        limits = {Promise.IDENTICAL: 0.0, Promise.EQUIVALENT: self.tolerance}
        return Claim(self.name, self.promise.value, limits.get(self.promise))

    def __str__(self) -> str:
        given = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if f.init and getattr(self, f.name) != _default(f)
        ]
        return f"{self.name}({', '.join(given)})" if given else self.name


def _default(item: dataclasses.Field[object]) -> object:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return item.default


@dataclass(frozen=True)
class Pipeline:
    """An ordered list of passes: prints as text that parses back, editable by copies.

    Raises:
        ConfigError: a pass is not a `Pass`, or a name occurs twice.
    """

    name: str
    passes: tuple[Pass, ...]
    options: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for item in self.passes:
            if not isinstance(item, Pass):
                msg = f"pipeline {self.name!r}: {item!r} is not a Pass (an instance is needed)"
                raise ConfigError(msg)
        names = [item.name for item in self.passes]
        for name in names:
            if names.count(name) > 1:
                msg = f"pipeline {self.name!r}: pass {name!r} occurs {names.count(name)} times"
                raise ConfigError(msg)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __getitem__(self, name: str) -> Pass:
        return self.passes[self.index(name)]

    def index(self, name: str) -> int:
        """Position of the pass of that name; `ConfigError` if there is none."""
        names = [item.name for item in self.passes]
        if name not in names:
            raise unknown_name("pass", name, names)
        return names.index(name)

    def _with(self, passes: Iterable[Pass]) -> Pipeline:
        return dataclasses.replace(self, passes=tuple(passes))

    def insert_before(self, name: str, item: Pass) -> Pipeline:
        """A copy with `item` before the pass called `name`."""
        at = self.index(name)
        return self._with((*self.passes[:at], item, *self.passes[at:]))

    def insert_after(self, name: str, item: Pass) -> Pipeline:
        """A copy with `item` after the pass called `name`."""
        at = self.index(name) + 1
        return self._with((*self.passes[:at], item, *self.passes[at:]))

    def replace(self, name: str, item: Pass) -> Pipeline:
        """A copy with the pass called `name` replaced."""
        at = self.index(name)
        return self._with((*self.passes[:at], item, *self.passes[at + 1 :]))

    def without(self, *names: str) -> Pipeline:
        """A copy without the passes of these names."""
        dropped = {self.index(name) for name in names}
        return self._with(p for i, p in enumerate(self.passes) if i not in dropped)

    def check(self, established: Iterable[str] = ()) -> None:
        """Check the order from facts alone, before anything runs.

        Raises:
            ConfigError: naming the pass, the missing fact, and who could establish it.
        """
        facts = set(established)
        for step, item in enumerate(self.passes):
            for missing in sorted(item.requires - facts):
                raise ConfigError(self._missing(step, item, missing))
            facts -= item.invalidates
            facts |= item.establishes

    def _missing(self, step: int, item: Pass, fact: str) -> str:
        later = [p.name for p in self.passes[step + 1 :] if fact in p.establishes]
        lost = [p.name for p in self.passes[:step] if fact in p.invalidates]
        why = f"{item.name} (step {step + 1} of {self.name}) requires the fact {str(fact)!r}"
        if lost:
            return f"{why}, which {lost[-1]} invalidated"
        if later:
            return f"{why}, which {later[0]} establishes only later; move {item.name} behind it"
        return f"{why}, which no pass before it establishes"

    def __str__(self) -> str:
        return "\n".join([f"{self.name}:", *(f"  {item}" for item in self.passes)])


@dataclass(frozen=True, slots=True)
class Step:
    """What the manager recorded of one pass.

    Attributes:
        name: of the pass.
        changed: whether the graph changed.
        seconds: wall time of the pass without its verification.
        cpu_seconds: CPU time of the same, all threads.
        max_abs: largest output difference found by the replay, None if not replayed.
        nodes: number of nodes afterwards.
    """

    name: str
    changed: bool
    seconds: float
    cpu_seconds: float
    max_abs: float | None
    nodes: int


Watch = Callable[[Pass, GraphModule, Step], None]


def run_pipeline(
    pipeline: Pipeline, module: GraphModule, context: Context, *, watch: Watch | None = None
) -> list[Step]:
    """Run all passes over `module` in place, verifying each one; `watch` sees each result.

    Raises:
        ConfigError: the order cannot work.
        PassError: a pass failed, left a malformed graph, or lied about a change.
        VerificationError: a promise does not hold, naming the first node that differs.
    """
    pipeline.check(context.facts)
    context.pipeline = pipeline
    verifier = Verifier(module, context.sample, enabled=context.verify is not False)
    steps = []
    for number, item in enumerate(pipeline.passes, start=1):
        context.progress_step(item.name, number, len(pipeline.passes))
        start, cpu_start = time.perf_counter(), time.process_time()
        changed = _run_one(item, module, context)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        max_abs = verifier.after(item.claim(), module, changed=changed)
        if changed:
            compile_when_called(module)  # code is a fifth of the cost of a big graph
        context.facts = (context.facts - item.invalidates) | item.establishes
        size = len(module.graph.nodes)
        steps.append(Step(item.name, changed, seconds, cpu_seconds, max_abs, size))
        LOGGER.debug("%s: changed=%s in %.2f s", item.name, changed, seconds)
        if watch is not None:
            watch(item, module, steps[-1])
    module.recompile()
    return steps


def _run_one(item: Pass, module: GraphModule, context: Context) -> bool:
    before = set(module.graph.nodes)
    try:
        changed = item.run(module, context)
    except QGraphError as error:
        if isinstance(error, PassError) and not error.pass_name:
            error.pass_name = item.name
        raise
    except Exception as error:
        msg = f"{item.name} failed: {type(error).__name__}: {error}"
        raise PassError(msg, pass_name=item.name) from error
    if not isinstance(cast("object", changed), bool):
        msg = f"{item.name}: run() must return a bool (did the graph change?), got {changed!r}"
        raise PassError(msg, pass_name=item.name)
    if changed:
        _stamp(item, module, before)
        try:
            check_order(module)
        except PassError as error:
            msg = f"{item.name}: {error}"
            raise PassError(msg, pass_name=item.name, node=error.node) from error
    return changed


def _stamp(item: Pass, module: GraphModule, before: set[object]) -> None:
    for node in module.graph.nodes:
        if node not in before and CREATED_BY.get(node) is None:
            CREATED_BY.set(node, item.name)
