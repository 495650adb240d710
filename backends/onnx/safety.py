# SPDX-License-Identifier: Apache-2.0
"""Refuse hostile files before onnxruntime sees them.

External data must be plain files inside the model's folder; ops must come from domains that
this backend writes or onnxruntime ships; declared sizes must be ones that the bytes can back.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from qgraph.errors import ArtifactError

DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
MAX_BYTES = 64 * 2**30
MAX_ELEMENTS = 2**36
MAX_NODES = 2_000_000


def check_file(path: Path) -> onnx.ModelProto:
    """Parse a file without its external data, and check it and the data it points to.

    Raises:
        ArtifactError: the file is missing, no ONNX model, or hostile.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            msg = f"{path.name}: {size} bytes; refused above {MAX_BYTES}"
            raise ArtifactError(msg)
        model = onnx.load(str(path), load_external_data=False)
    except (OSError, DecodeError) as error:
        msg = f"{path}: not a readable ONNX file: {error}"
        raise ArtifactError(msg) from error
    check_model(model, path.parent)
    return model


def check_bytes(data: bytes) -> onnx.ModelProto:
    """Parse and check a model held in memory; external data is refused.

    Raises:
        ArtifactError: the bytes are no ONNX model, or hostile.
    """
    try:
        model = onnx.load_from_string(data)
    except DecodeError as error:
        msg = f"not an ONNX model: {error}"
        raise ArtifactError(msg) from error
    check_model(model, None)
    return model


def check_model(model: onnx.ModelProto, folder: Path | None) -> None:
    """Check a parsed model; see the module docstring.

    Args:
        model: parsed, external data not loaded.
        folder: where external data may lie, or None to refuse it.

    Raises:
        ArtifactError: with the reason.
    """
    if not model.graph.node and not model.graph.output:
        msg = "the file holds no graph"
        raise ArtifactError(msg)
    if model.functions:
        msg = f"model-local functions are not accepted: {model.functions[0].name!r}"
        raise ArtifactError(msg)
    count = 0
    for graph in _graphs(model.graph):
        count += len(graph.node)
        for node in graph.node:
            if node.domain not in DOMAINS:
                msg = f"node {node.name!r} uses the unknown domain {node.domain!r}"
                raise ArtifactError(msg)
        for tensor in graph.initializer:
            check_tensor(tensor, folder)
        for sparse in graph.sparse_initializer:
            check_tensor(sparse.values, folder)
            check_tensor(sparse.indices, folder)
    if count > MAX_NODES:
        msg = f"{count} nodes; refused above {MAX_NODES}"
        raise ArtifactError(msg)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    pending = [graph]
    while pending:
        item = pending.pop()
        yield item
        for node in item.node:
            for attribute in node.attribute:
                pending.extend(attribute.graphs)
                if attribute.HasField("g"):
                    pending.append(attribute.g)
                for tensor in (attribute.t, *attribute.tensors):
                    check_tensor(tensor, None)


def check_tensor(tensor: onnx.TensorProto, folder: Path | None) -> None:
    """Check the declared size of a tensor and where its data lies.

    Raises:
        ArtifactError: with the tensor's name and the reason.
    """
    if any(d < 0 for d in tensor.dims) or math.prod(tensor.dims) > MAX_ELEMENTS:
        msg = f"tensor {tensor.name!r} declares the absurd shape {list(tensor.dims)}"
        raise ArtifactError(msg)
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        if tensor.external_data:
            msg = f"tensor {tensor.name!r} has external data but is not marked external"
            raise ArtifactError(msg)
        return
    if folder is None:
        msg = f"tensor {tensor.name!r} points outside the model, which is not accepted here"
        raise ArtifactError(msg)
    entries = {e.key: e.value for e in tensor.external_data}
    _check_external(tensor, entries, folder)


def _check_external(tensor: onnx.TensorProto, entries: dict[str, str], folder: Path) -> None:
    location = entries.get("location", "")
    parts = Path(location).parts
    bad = not location or Path(location).is_absolute() or "\\" in location or ":" in location
    if bad or ".." in parts or "\0" in location:
        msg = f"tensor {tensor.name!r}: external data {location!r} leaves the model's folder"
        raise ArtifactError(msg)
    size = _plain_file_size(folder, Path(location), tensor.name)
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries.get("length", str(max(size - offset, 0))))
    except ValueError as error:
        msg = f"tensor {tensor.name!r}: external data has offset {entries}"
        raise ArtifactError(msg) from error
    if offset < 0 or length < 0 or offset + length > size:
        msg = f"tensor {tensor.name!r}: bytes {offset}..{offset + length} of a file of {size}"
        raise ArtifactError(msg)
    needed = declared_bytes(tensor)
    if needed > length:
        msg = f"tensor {tensor.name!r} needs {needed} bytes, its external data has {length}"
        raise ArtifactError(msg)


def _plain_file_size(folder: Path, location: Path, name: str) -> int:
    """Size of an external file that is a plain file, reached through no link."""
    current = folder
    for part in location.parts:
        current = current / part
        try:
            status = current.lstat()
        except OSError as error:
            msg = f"tensor {name!r}: external data {str(location)!r} cannot be read: {error}"
            raise ArtifactError(msg) from error
        if stat.S_ISLNK(status.st_mode):
            msg = f"tensor {name!r}: external data {str(location)!r} goes through a link"
            raise ArtifactError(msg)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        msg = f"tensor {name!r}: external data {str(location)!r} is not a plain, unlinked file"
        raise ArtifactError(msg)
    return status.st_size


def declared_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes that the declared shape and type need."""
    kind = tensor.data_type
    names = onnx.TensorProto.DataType.Name
    label = names(kind) if kind in onnx.TensorProto.DataType.values() else "UNDEFINED"
    bits = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}.get(label)
    if bits is None:
        if label in {"UNDEFINED", "STRING"}:
            msg = f"tensor {tensor.name!r} has type {label}"
            raise ArtifactError(msg)
        bits = 8 * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
    return (math.prod(int(d) for d in tensor.dims) * int(bits) + 7) // 8
