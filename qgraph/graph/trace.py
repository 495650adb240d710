# SPDX-License-Identifier: Apache-2.0
"""Tracing: from a trained model to a graph of ATen calls, without touching the model.

A private copy goes through torch.export (non-strict), is functionalised, and becomes a plain
`GraphModule` that takes the model's arguments and gives the model's output structure.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from qgraph.errors import CaptureError
from qgraph.garbage import old_objects_aside
from qgraph.graph.capture_checks import check_inference, check_model, check_sample, check_tensors
from qgraph.graph.capture_errors import explain
from qgraph.graph.dynamic_batch import (
    Sample,
    default_sample,
    explicit_sample,
    has_symbolic_outputs,
    specialised,
)
from qgraph.graph.precision import (
    cast_borders,
    cast_inputs,
    float_dtype,
    needs_cast,
    output_dtypes,
)
from qgraph.graph.trace_info import TraceInfo, has_trace_info, set_trace_info, trace_info

__all__ = ["TraceInfo", "trace", "trace_info"]

LOGGER = logging.getLogger("qgraph")


def trace(
    model: nn.Module | ExportedProgram, /, *args: Any, dynamic_shapes: Any = None, **kwargs: Any
) -> GraphModule:
    """Trace a model into a float32 graph of ATen calls.

    Dimension 0 of the inputs is dynamic wherever it is the batch; `trace_info(result)` tells
    whether that worked, and why not. Models of other float dtypes are computed in float32 and
    keep their dtype at inputs and outputs. The caller's model is never changed.

    Args:
        model: nn.Module or fx.GraphModule in eval mode, or an ExportedProgram.
        *args: sample inputs; not needed for an ExportedProgram.
        dynamic_shapes: as for torch.export; default: the batch of all inputs that share it.
        **kwargs: sample keyword inputs.

    Raises:
        CaptureError: the model cannot be traced; the message names the source line and a cure.
    """
    return _trace(model, args, kwargs, dynamic_shapes, {})


def trace_sharing(
    model: nn.Module | ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any],
    dynamic_shapes: Any = None,
) -> GraphModule:  # fmt: skip
    """`trace`, but the graph reads the memory of the model's parameters instead of a copy.

    Sound as long as nobody writes to either: passes register new tensors. Whoever keeps the graph
    calls `own_parameters` in the end.
    """
    shared = {}
    if isinstance(model, nn.Module):
        shared = {id(p): _alias(p) for p in model.parameters() if type(p) is nn.Parameter}
    module = _trace(model, args, kwargs, dynamic_shapes, shared)
    if any(node.target is torch.ops.aten.copy_.default for node in module.graph.nodes):
        own_parameters(module, model)  # calls write
    return module


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach(), requires_grad=False)


def own_parameters(module: GraphModule, model: Any) -> None:
    """Copy what the graph still reads of the model's parameters."""
    if not isinstance(model, nn.Module):
        return
    theirs = {p.untyped_storage().data_ptr() for p in model.parameters()}
    copies: dict[int, Tensor] = {}
    for held in (module.named_parameters, module.named_buffers):
        for name, tensor in list(held(remove_duplicate=False)):
            if tensor.untyped_storage().data_ptr() not in theirs or not tensor.numel():
                continue
            path, _, leaf = name.rpartition(".")
            fresh = copies.setdefault(id(tensor), tensor.detach().clone())
            if isinstance(tensor, nn.Parameter):
                fresh = copies[id(tensor)] = nn.Parameter(fresh, requires_grad=False)
            setattr(module.get_submodule(path), leaf, fresh)


def _trace(
    model: nn.Module | ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any],
    dynamic_shapes: Any, shared: dict[int, Any],
) -> GraphModule:  # fmt: skip
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        model = model._orig_mod
    with old_objects_aside(), _unchanged_surroundings():
        if isinstance(model, ExportedProgram):
            return _from_program(model, dynamic_shapes)
        check_model(model)
        if has_trace_info(model):
            return copy.deepcopy(model, shared)  # type: ignore[return-value]
        return _from_module(model, args, kwargs, dynamic_shapes, shared)


@contextlib.contextmanager
def _unchanged_surroundings() -> Iterator[None]:
    """No gradients inside; the random state afterwards is the one before."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        yield


def _from_module(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any,
    shared: dict[int, Any],
) -> GraphModule:  # fmt: skip
    check_sample(model, args, kwargs)
    private = _private_copy(model, shared)
    _spell_out_keywords(private, args, kwargs)
    original, inputs, outputs = float_dtype(model), (args, kwargs), None
    casts = needs_cast(model)
    if casts:
        outputs = output_dtypes(private, args, kwargs)
        private.float()
        args, kwargs = cast_inputs((args, kwargs))
    program, reason = _export(private, args, kwargs, shapes)
    module = _to_module(program)
    if casts:
        dtypes = [x.dtype if isinstance(x, Tensor) else None for x in pytree.tree_leaves(inputs)]
        cast_borders(module, dtypes, outputs, original)
    return _finish(module, reason, original if casts else torch.float32)


def _from_program(program: ExportedProgram, shapes: Any) -> GraphModule:
    if shapes is not None:
        msg = "dynamic_shapes are fixed in an ExportedProgram; give them to torch.export.export"
        raise CaptureError(msg)
    check_inference(program.graph)
    module = copy.deepcopy(_to_module(program))
    check_tensors(module)
    reason = "" if has_symbolic_outputs(program) else "the ExportedProgram has static shapes"
    return _finish(module, reason, torch.float32)


def _private_copy(model: nn.Module, shared: dict[int, Any]) -> nn.Module:
    """A deep copy, but for what `shared` maps from ids to stand-ins."""
    try:
        private = copy.deepcopy(model, shared)
    except Exception as error:
        msg = (
            f"the model cannot be copied ({type(error).__name__}: {error}); keep computed tensors "
            "out of its attributes, so that copy.deepcopy(model) works"
        )
        raise CaptureError(msg) from error
    private.requires_grad_(requires_grad=False)
    private.register_forward_hook(_register_dataclasses)
    return private


def _spell_out_keywords(private: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Name the keywords that a ``**kwargs`` takes: torch.export cannot make those dynamic."""
    forward = private.forward
    signature = inspect.signature(forward)
    open_ended = [p for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    if not open_ended or open_ended[0].name not in signature.bind(*args, **kwargs).arguments:
        return
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    taken = {p.name for p in named}
    named += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)
        for name in kwargs
        if name not in taken
    ]

    def spelled_out(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    spelled_out.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    private.forward = spelled_out


def _register_dataclasses(_module: nn.Module, _inputs: Any, output: Any) -> None:
    """Let torch take dataclass outputs apart; a hook of the private copy, run by export."""
    pending = [output]
    while pending:
        item = pending.pop()
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            if type(item) not in pytree.SUPPORTED_NODES:
                torch.export.register_dataclass(type(item))
            pending.extend(getattr(item, f.name) for f in dataclasses.fields(item))
        elif isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, (list, tuple)):
            pending.extend(item)


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any
) -> tuple[ExportedProgram, str]:
    """Export with a dynamic batch, else with static shapes; return why not dynamic, or ''."""
    if shapes is not None:
        return _export_explicit(model, explicit_sample(model, args, kwargs, shapes)), ""
    sample = default_sample(model, args, kwargs)
    if not any(sample.marked):
        return _run_export(model, Sample(args, kwargs, None, ())), "no input has a batch dimension"
    try:
        program = _run_export(model, sample)
    except CaptureError as error:
        if isinstance(error.__cause__, GuardOnDataDependentSymNode):
            raise  # static sizes would not help
        reason = str(error)
    else:
        fixed = specialised(program, sample)
        if not fixed or has_symbolic_outputs(program):
            return program, ""
        reason = f"the model's code fixes {', '.join(fixed)}"
    return _run_export(model, Sample(args, kwargs, None, ())), reason


def _export_explicit(model: nn.Module, sample: Sample) -> ExportedProgram:
    program = _run_export(model, sample)
    fixed = specialised(program, sample)
    if fixed:
        msg = (
            "dynamic_shapes asks for dynamic sizes, but the model's code fixes "
            f"{', '.join(fixed)}; leave them out of dynamic_shapes, or make the code independent "
            "of the size"
        )
        raise CaptureError(msg)
    return program


def _run_export(model: nn.Module, sample: Sample) -> ExportedProgram:
    try:
        program = torch.export.export(
            model, sample.args, sample.kwargs, strict=False, dynamic_shapes=sample.shapes
        )
    except Exception as error:
        raise explain(error) from error
    check_inference(program.graph)
    return program


def _to_module(program: ExportedProgram) -> GraphModule:
    """Functionalise, lift parameters back into a module, and drop the exporter's wrapping.

    The plain GraphModule has no input guards (QuantizedModel checks shapes with better words)
    and, unlike the exporter's, may be copied, put into eval mode and pickled.
    """
    with warnings.catch_warnings():  # torch copies a class that it deprecates
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
        wrapped = program.run_decompositions({}).module(check_guards=False)
    for node in list(wrapped.graph.nodes):
        if node.op == "get_attr" and not node.users:
            wrapped.graph.erase_node(node)
    module = GraphModule(wrapped, wrapped.graph)  # whose constants are buffers
    module.eval()
    return module


def _finish(module: GraphModule, reason: str, original: torch.dtype) -> GraphModule:
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.copy_.default:
            LOGGER.warning(
                "the model writes %s during forward; calls depend on history", node.args[0]
            )
    module.graph.lint()
    module.recompile()
    names = tuple(str(node.target) for node in module.graph.nodes if node.op == "placeholder")
    set_trace_info(module, TraceInfo(not reason, reason, names, original))
    if reason:
        LOGGER.warning("traced with static shapes: %s", reason)
    return module
