# SPDX-License-Identifier: Apache-2.0
"""Export: quantized graph, flat graph, torch.onnx.export, finishing passes, checked file."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from torch.fx import GraphModule

from qgraph.atomic import probe, publish, sweep, temporary_of
from qgraph.backends.onnx import finish, ops
from qgraph.backends.onnx.capabilities import OPSET_DEFAULT, SESSION_CONFIG
from qgraph.backends.onnx.prepare import Prepared, prepare
from qgraph.backends.onnx.program import flat_program
from qgraph.backends.onnx.signature import Signature, dump, read_signature
from qgraph.errors import ExportError, unknown_name

LOGGER = logging.getLogger("qgraph")
CONTAINERS = ("int8", "native")
# protobuf refuses messages of 2 GiB and more.
INLINE_LIMIT = 1_900_000_000
DIGEST_CHARACTERS = 32


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What was written.

    Attributes:
        path: the file.
        size: bytes of the file and its external data.
        opset: default-domain opset.
        container: ``"int8"`` or ``"native"``.
        inputs, outputs: names in the file's order.
        codes: quantize node -> name of the value that holds its codes.
        notes: what a user should know, one line each.
    """

    path: Path
    size: int
    opset: int
    container: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    codes: dict[str, str]
    notes: tuple[str, ...] = ()


def export(
    module: GraphModule, path: str | os.PathLike[str], *, container: str = "int8",
    opset: int | None = None,
    input_names: Sequence[str] | None = None, output_names: Sequence[str] | None = None,
    external_data: bool | None = None,
) -> ExportInfo:  # fmt: skip
    """Write a quantized graph as ONNX that onnxruntime runs in integer kernels.

    Args:
        module: a canonical graph with dialect nodes; it is not changed.
        path: the file to write.
        container: ``"int8"`` keeps codes of up to 8 bits in INT8; ``"native"`` packs weights of
            up to 4 bits as INT4 (2 bits as INT2 at opset 25), widened once when the file is loaded;
            onnxruntime has the kernels for that from 1.23 on.
        opset: 21 by default; at least 25 for INT2.
        input_names: names of the file's inputs; default: the argument names.
        output_names: names of the file's outputs; default: the keys of the result.
        external_data: write tensors beside the file, as ``<name>.<digest>.data``; default: only
            where one file cannot hold them.

    Raises:
        ExportError: the graph cannot be expressed, the file does not pass the checker, or cannot
            be written.
        ConfigError: an unknown container.
    """
    target = probe(path)
    if container not in CONTAINERS:
        raise unknown_name("container", container, CONTAINERS)
    opset = OPSET_DEFAULT if opset is None else opset
    if opset < OPSET_DEFAULT:
        msg = f"opset is {opset}, need at least {OPSET_DEFAULT} (onnxruntime 1.20)"
        raise ExportError(msg)
    signature = read_signature(module, input_names, output_names)
    prepared = prepare(module, container=container)
    model = _translate(prepared, signature)
    _rename_symbols(model, signature)
    codes = finish.resolve_marks(model)
    finish.finish(model, native=container == "native", opset=opset)
    stored = {
        name: {"value": codes[name], **asdict(prepared.codes[name])}
        for name in prepared.codes if name in codes
    }  # fmt: skip
    model.metadata_props["qgraph"] = dump(
        signature, container=container, codes=stored, session=SESSION_CONFIG
    )
    try:
        size = _save(model, target, external_data)
    except OSError as error:
        msg = f"cannot write {path}: {error.strerror or error}"
        raise ExportError(msg) from error
    return ExportInfo(
        target, size, opset, container, tuple(i.name for i in signature.inputs),
        signature.output_names, {n: str(e["value"]) for n, e in stored.items()},
        tuple(prepared.notes),
    )  # fmt: skip


def _translate(prepared: Prepared, signature: Signature) -> ir.Model:
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                flat_program(prepared.module), dynamo=True, opset_version=OPSET_DEFAULT,
                verbose=False, optimize=False,
                input_names=[i.name for i in signature.inputs],
                output_names=list(signature.output_names),
                custom_translation_table=ops.translations(),
            )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        msg = f"torch.onnx.export cannot translate the graph: {cause}"
        raise ExportError(msg) from error
    assert program is not None
    return program.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs and warns about its own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _rename_symbols(model: ir.Model, signature: Signature) -> None:
    """Give symbolic sizes the signature's names; the exporter traces anew and numbers them."""
    fresh: dict[str, str] = {}
    for value, declared in zip(model.graph.inputs, signature.inputs, strict=True):
        for size, name in zip(value.shape or (), declared.shape, strict=False):
            if isinstance(size, ir.SymbolicDim):
                fresh.setdefault(str(size), str(name))
    finish.rename_dims(model, fresh)


def _save(model: ir.Model, path: Path, external_data: bool | None) -> int:
    """Write, check with the strict checker and shape inference, move into place.

    Tensors beside the file are named by their content, so a graph can only meet its own: they are
    published first, the graph second, and what no graph names any more is removed last.
    """
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    outside = weights > INLINE_LIMIT if external_data is None else external_data
    data = f"{path.name}.{_content_digest(model)}.data" if outside else None
    sweep(path)
    folder = temporary_of(path)
    folder.mkdir()
    try:
        draft = folder / path.name
        ir.save(model, draft, external_data=data)
        try:
            onnx.checker.check_model(str(draft), full_check=not outside)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            msg = f"the exported file does not pass onnx.checker: {error}"
            raise ExportError(msg) from error
        written = [draft] if data is None else [folder / data, draft]
        size = sum(part.stat().st_size for part in written)
        for part in written:
            publish(part, path.with_name(part.name))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _remove_stale(path, data)
    return size


def _content_digest(model: ir.Model) -> str:
    """What tells one file of tensors from another: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None:
            digest.update(f"{name} {tensor.dtype} {tensor.shape} {tensor.nbytes}\n".encode())
            digest.update(tensor.tobytes())
    return digest.hexdigest()[:DIGEST_CHARACTERS]


def _remove_stale(path: Path, kept: str | None) -> None:
    """Remove the tensors of graphs that stood at `path` before, and those of killed exports."""
    pattern = re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{{DIGEST_CHARACTERS}}}\.data")
    for entry in path.parent.iterdir():
        if pattern.fullmatch(entry.name) and entry.name != kept:
            entry.unlink(missing_ok=True)
