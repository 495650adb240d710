# SPDX-License-Identifier: Apache-2.0
"""compile(): from a trained model to a quantized one, the whole way on one page.

trace      a private copy becomes an fx graph of ATen calls        qgraph/graph/trace.py
pipeline   passes canonicalise, plan, calibrate once, decide,
           rewrite, and write quantizers into the graph            qgraph/pipelines.py, passes/
result     the graph, its report, and backends that run it         qgraph/model.py, backends/
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.fx import GraphModule

from qgraph.backends.onnx.latency import price_of_products
from qgraph.calibration.loader import adapter, first_batch
from qgraph.calibration.ranks import check_equal, own_folder
from qgraph.calibration.sample import Call, example_of, small_sample
from qgraph.context import Context, Progress
from qgraph.errors import ConfigError
from qgraph.garbage import old_objects_aside
from qgraph.graph.ignore import Ignore, Pattern
from qgraph.graph.trace import own_parameters, trace_info, trace_sharing
from qgraph.max_drop import Metric, cheapest_within, check_limits
from qgraph.model import QuantizedModel
from qgraph.passes import AssignBits
from qgraph.pipeline import Fact, Pipeline, run_pipeline
from qgraph.pipelines import pipeline as named_pipeline
from qgraph.progress import progress_bar
from qgraph.report.build import build_report
from qgraph.validation import check_unchanged, fingerprint, validate


@old_objects_aside()
def compile(  # noqa: A001
    model: nn.Module | torch.export.ExportedProgram,
    calib_loader: Iterable[Any],
    pipeline: str | Pipeline = "int8",
    *,
    example_inputs: Any = None,
    transform: Callable[[Any], Any] | None = None,
    dynamic_shapes: Any = None,
    ignore: Pattern | Iterable[Pattern] = (),
    loss: Any = None,
    metric_fn: Metric | None = None,
    max_drop: float | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    verify: bool | Literal["full"] = True,
    progress: Progress | bool | None = None,
    row_masks: Callable[..., Any] | None = None,
    cache_dir: str | Path | None = None,
    max_memory: int | None = None,
) -> QuantizedModel:
    """Quantize a trained model without retraining it.

    Args:
        model: in eval mode; never changed. An ExportedProgram or a traced graph will do as well.
        calib_loader: any iterable of tensors, tuples, mappings or (inputs, label) pairs; some
            32 to 512 samples. Read once.
        pipeline: a name such as ``"int8"`` or ``"w4a8"`` (see `qgraph.pipelines`), or a Pipeline.
        example_inputs: inputs to trace with; default: the first batch.
        transform: maps a batch of the loader to the model's inputs, where that is not plain.
        dynamic_shapes: as for torch.export; default: a dynamic batch.
        ignore: what stays in float: globs on module paths, node or parameter names, op kinds, or
            a predicate on nodes.
        loss: objective for the passes that take one: a `FilteredGlobalLoss` (or another
            teacher-student objective) compares the quantized outputs with the float ones, a plain
            callable is the task's loss of (outputs, batch).
        metric_fn: scores a callable with the model's signature on development data, larger is
            better. With `max_drop`: bits are assigned so that the model is the cheapest whose
            metric drops by at most that much; at most 7 compilations, and always a result.
        max_drop: in the metric's units.
        device: where to calibrate; default: where the model is.
        seed: of every random choice; the same seed gives the same bytes.
        verify: check the graph after each pass; ``"full"`` also validates the result on the first
            batch: backends, saved and exported files, a second compilation (so it takes twice as
            long), and that the model is unchanged.
        progress: True for a bar, a callable (what, done, total), or False; default: a bar on a
            terminal.
        row_masks: (args, kwargs) -> bool [B, T] of the tokens that count in statistics.
        cache_dir: where long work keeps its state, to resume a killed run.
        max_memory: bytes that cached activations may take before they go to disk.

    Raises:
        CaptureError: the model cannot be traced.
        CalibrationError: the loader, or a value in the network, is unusable.
        ConfigError: an unknown pipeline, a pattern that matches nothing, bits out of range.
        VerificationError: a pass broke its promise, or the result one of `verify="full"`.
        RankError: in a torch.distributed job: another rank failed, is gone, or got another result.

    Example:
        >>> quantized = qgraph.compile(model, calib_loader, pipeline="int8")  # doctest: +SKIP
        >>> quantized(images)                                                 # doctest: +SKIP
    """
    chosen = named_pipeline(pipeline) if isinstance(pipeline, str) else pipeline
    _check_options(chosen, verify, metric_fn, max_drop)
    before = fingerprint(model) if verify == "full" else {}
    batch, loader = first_batch(calib_loader)
    given = batch if example_inputs is None else example_inputs
    module, call = _traced(model, given, transform, dynamic_shapes)
    if device is not None:
        module.to(device)
    if metric_fn is not None and max_drop is not None:
        with tempfile.TemporaryDirectory() as kept:  # sensitivities are measured once
            again = functools.partial(
                compile, module, loader, example_inputs=example_inputs, transform=transform,
                ignore=ignore, loss=loss, seed=seed, verify=verify, progress=progress,
                row_masks=row_masks, cache_dir=cache_dir or kept, max_memory=max_memory,
            )  # fmt: skip
            with torch.no_grad():
                reference = float(metric_fn(module))
            return cheapest_within(again, chosen, metric_fn, reference=reference, max_drop=max_drop)

    with torch.random.fork_rng(devices=[]), torch.no_grad(), progress_bar(progress) as shown:
        torch.manual_seed(seed)
        context = _context(
            chosen, module, loader, transform, call, ignore=Ignore.of(ignore), loss=loss,
            seed=seed, verify=verify, progress=shown, row_masks=row_masks, max_memory=max_memory,
            cache_dir=None if cache_dir is None else own_folder(Path(cache_dir)),
        )  # fmt: skip
        own = small_sample(module, *call, dynamic=False)  # on the model's device, whole
        steps = run_pipeline(chosen, module, context)
        _settle(module, model)
        report = build_report(chosen, module, context, steps)
    quantized = QuantizedModel(module, report, context.sample)
    if verify == "full":
        again = functools.partial(
            compile, model, loader, chosen, example_inputs=example_inputs, transform=transform,
            dynamic_shapes=dynamic_shapes, ignore=ignore, loss=loss, device=device, seed=seed,
            row_masks=row_masks, max_memory=max_memory,
        )  # fmt: skip
        unchanged = functools.partial(check_unchanged, model, before)
        quantized.report = validate(quantized, own, again, unchanged)
    return quantized


def _check_options(
    chosen: Pipeline, verify: object, metric_fn: Metric | None, max_drop: float | None
) -> None:
    chosen.check({Fact.TRACED})
    check_limits(metric_fn, max_drop)
    if verify not in {True, False, "full"}:
        msg = f"verify is {verify!r}; allowed: True, False, 'full'"
        raise ConfigError(msg)


def _traced(
    model: nn.Module | torch.export.ExportedProgram, given: Any, transform: Any, shapes: Any
) -> tuple[GraphModule, Call]:
    """The graph, and the call that the given batch stands for."""
    args, kwargs = example_of(model, given, transform)
    module = trace_sharing(model, args, kwargs, shapes)
    if isinstance(model, torch.export.ExportedProgram):  # its signature is known only now
        return module, adapter(module, transform)(given)
    return module, (args, kwargs)


def _settle(module: GraphModule, model: Any) -> None:
    """The result stands alone, and is the same on all ranks."""
    own_parameters(module, model)
    check_equal(module)


def _context(
    chosen: Pipeline, module: GraphModule, loader: Iterable[Any], transform: Any,
    example: Call, **options: Any,
) -> Context:  # fmt: skip
    dynamic = trace_info(module).dynamic_batch
    context = Context(
        sample=small_sample(module, *example, dynamic=dynamic),
        batches=loader,
        adapt=adapter(module, transform),
        facts=frozenset({Fact.TRACED}),
        **options,
    )
    if any(isinstance(p, AssignBits) and "ms" in p.budget for p in chosen):
        context.latency = price_of_products()
    return context
