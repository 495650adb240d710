# SPDX-License-Identifier: Apache-2.0
"""The container: a safetensors file whose every byte is covered by a SHA-256 digest.

    8 bytes   length of the header, little endian
    header    {"__metadata__": {"digest": ..., "manifest": ...}, tensor: dtype, shape, offsets}
    data      the tensors, without gaps

The digest sits at a fixed place and is that of the length and the header with the digest's own
characters zeroed; the manifest holds the digest of each tensor. All are checked before anything
is parsed or used, so damage is noticed, whatever it hits. They are no signature: whoever writes a
file can also write its digests.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qgraph.artifact.damage import as_damage, damaged
from qgraph.errors import ExportError

MAX_HEADER = 1 << 26  # bytes; MiniLM's has 0.5 MiB
MAX_RANK = 32
_PREFIX = b'{"__metadata__":{"digest":"'
_ZEROS = b"0" * 64
_ALIGN = 8
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_.]{1,512}")


@dataclass(frozen=True, slots=True)
class Content:
    """What a file holds: the manifest (plain JSON values) and the tensors by name."""

    manifest: dict[str, Any]
    tensors: dict[str, Tensor]


def chunks(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The bytes of a file; equal content gives equal bytes.

    Raises:
        ExportError: a tensor's dtype has no place in the format.
    """
    ordered = sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))
    payload = {name: _bytes(name, tensors[name]) for name in ordered}
    digests = {name: hashlib.sha256(payload[name]).hexdigest() for name in ordered}
    text = json.dumps({**manifest, "digests": digests}, separators=(",", ":"), allow_nan=False)
    header: dict[str, Any] = {
        "__metadata__": {"digest": _ZEROS.decode(), "format": "qgraph", "manifest": text}
    }
    offset = 0
    for name in ordered:
        end = offset + len(payload[name])
        header[name] = {
            "dtype": _NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    raw = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    raw += b" " * (-len(raw) % _ALIGN)
    if len(raw) > MAX_HEADER:
        msg = f"the graph takes {len(raw)} bytes as text; at most {MAX_HEADER} can be saved"
        raise ExportError(msg)
    digest = _header_digest(struct.pack("<Q", len(raw)), raw)
    yield memoryview(struct.pack("<Q", len(raw)))
    yield memoryview(raw.replace(_PREFIX + _ZEROS, _PREFIX + digest, 1))
    yield from (payload[name] for name in ordered)


def read(path: str | os.PathLike[str]) -> Content:
    """Read and check a file; memory stays within the file's size and the header's limit.

    Raises:
        ArtifactError: missing, foreign, truncated, damaged, or not what its header declares.
    """
    where = Path(path)
    with as_damage(f"{where}: cannot be read", OSError), where.open("rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise damaged(f"{where}: not a regular file")
        header, start = _read_header(file, status.st_size, where)
        entries = _entries(header, status.st_size - start, where)
        manifest = _manifest(header, where)
        data = bytearray(status.st_size - start)
        if file.readinto(data) != len(data) or file.read(1):
            raise damaged(f"{where}: changed while it was read")
    return Content(manifest, _tensors(entries, manifest, data, where))


def _bytes(name: str, tensor: Tensor) -> memoryview:
    if tensor.dtype not in _NAMES:
        msg = f"tensor {name!r} has dtype {tensor.dtype}, which cannot be saved"
        raise ExportError(msg)
    plain = tensor.detach().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data.cast("B")


def _header_digest(length: bytes, raw: bytes) -> bytes:
    start = len(_PREFIX)
    digest = hashlib.sha256(length + raw[:start] + _ZEROS + raw[start + len(_ZEROS) :])
    return digest.hexdigest().encode()


def _read_header(file: BinaryIO, size: int, where: Path) -> tuple[dict[str, Any], int]:
    length = file.read(8)
    count = int.from_bytes(length, "little")
    start = len(_PREFIX)
    if len(length) < 8 or count < start + len(_ZEROS) or count > MAX_HEADER:
        raise damaged(f"{where}: no qgraph file, or its first 8 bytes are damaged")
    if count > size - 8:
        raise damaged(f"{where}: truncated: the header takes {count} bytes of {size - 8}")
    raw = file.read(count)
    if raw[:start] != _PREFIX:
        raise damaged(f"{where}: written by something else: no qgraph digest in its header")
    if raw[start : start + len(_ZEROS)] != _header_digest(length, raw):
        raise damaged(f"{where}: the header's SHA-256 does not agree; the file is damaged")
    header = _parse(raw, f"{where}: the header")
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
        raise damaged(f"{where}: the header is no object")
    return header, 8 + count


def _parse(text: bytes | str, what: str) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            raise damaged(f"{what} names something twice")
        return found

    def constant(name: str) -> Any:
        raise damaged(f"{what} holds {name}")

    with as_damage(f"{what} is not JSON", ValueError, RecursionError):
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)


def _manifest(header: dict[str, Any], where: Path) -> dict[str, Any]:
    text = header["__metadata__"].get("manifest")
    found = _parse(text, f"{where}: the manifest") if isinstance(text, str) else None
    if not isinstance(found, dict):
        raise damaged(f"{where}: the manifest is no object")
    return found


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def _entries(header: dict[str, Any], size: int, where: Path) -> list[_Entry]:
    found = [_entry(n, e, where) for n, e in header.items() if n != "__metadata__"]
    position = 0
    for entry in sorted(found, key=lambda e: (e.begin, e.end)):
        if entry.begin != position:
            raise damaged(f"{where}: tensor {entry.name!r} leaves a gap or overlaps another")
        position = entry.end
    if position != size:
        kind = "truncated" if position > size else "bytes follow the last tensor"
        raise damaged(f"{where}: {kind}: {position} bytes of data declared, {size} present")
    return found


def _entry(name: str, entry: Any, where: Path) -> _Entry:
    with as_damage(f"{where}: tensor {name!r} is malformed", KeyError, TypeError, ValueError):
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
        good = all(type(n) is int and 0 <= n < 1 << 48 for n in numbers)
        if not good or not _TENSOR_NAME.fullmatch(name) or len(shape) > MAX_RANK:
            raise damaged(f"{where}: tensor {name[:80]!r} declares {str(entry)[:80]}")
        if math.prod(shape) * dtype.itemsize != end - begin:
            raise damaged(f"{where}: tensor {name!r} declares {shape}, stores {end - begin} bytes")
        return _Entry(name, dtype, tuple(shape), begin, end)


def _tensors(
    entries: list[_Entry], manifest: dict[str, Any], data: bytearray, where: Path
) -> dict[str, Tensor]:
    digests = manifest.get("digests")
    if not isinstance(digests, dict) or digests.keys() != {e.name for e in entries}:
        raise damaged(f"{where}: the manifest does not list the tensors that the file holds")
    view = memoryview(data)
    found = {}
    for entry in entries:
        part = view[entry.begin : entry.end]
        if hashlib.sha256(part).hexdigest() != digests[entry.name]:
            raise damaged(f"{where}: the SHA-256 of tensor {entry.name!r} does not agree")
        found[entry.name] = _tensor(entry, part)
    return found


def _tensor(entry: _Entry, part: memoryview) -> Tensor:
    if not len(part):
        return torch.empty(entry.shape, dtype=entry.dtype)
    if entry.dtype is torch.bool and max(part) > 1:
        raise damaged(f"tensor {entry.name!r} holds truth values other than 0 and 1")
    raw = torch.frombuffer(part, dtype=torch.uint8)
    if entry.begin % entry.dtype.itemsize:
        raw = raw.clone()
    return raw.view(entry.dtype).reshape(entry.shape)
