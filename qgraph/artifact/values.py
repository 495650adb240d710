# SPDX-License-Identifier: Apache-2.0
"""Arguments of calls as JSON: what JSON lacks becomes an object with one key, its kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from qgraph.artifact.damage import damaged
from qgraph.errors import ExportError

MAX_DEPTH = 16
_PLAIN = (bool, int, str, type(None))
_DTYPES = {
    str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, torch.dtype)
}
_LAYOUTS = {"strided": torch.strided}
_FORMATS = {
    str(f).removeprefix("torch."): f
    for f in (
        torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d,
    )
}  # fmt: skip


def encode(value: Any) -> Any:
    """A call's argument as JSON values; nodes by their place in the graph.

    Raises:
        ExportError: a kind of value that has no form.
    """
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, slice):
        return {"slice": [encode(item) for item in (value.start, value.stop, value.step)]}
    return _encode_torch(value)


def _encode_torch(value: Any) -> Any:
    kinds = {
        "dtype": torch.dtype, "device": torch.device,
        "layout": torch.layout, "memory_format": torch.memory_format,
    }  # fmt: skip
    for kind, cls in kinds.items():
        if isinstance(value, cls):
            text = str(value).removeprefix("torch.")
            return {kind: text.split(":")[0] if kind == "device" else text}
    msg = f"an argument of type {type(value).__name__} cannot be saved: {str(value)[:80]}"
    raise ExportError(msg)


def decode(value: Any, nodes: dict[str, Node], device: torch.device, depth: int = 0) -> Any:
    """Read what `encode` wrote; devices become the one that the model is loaded to.

    Raises:
        ArtifactError: an unknown kind or node, or nesting beyond `MAX_DEPTH`.
    """
    if depth > MAX_DEPTH:
        raise damaged(f"arguments are nested deeper than {MAX_DEPTH}")
    if isinstance(value, (*_PLAIN, float)):
        return value
    if isinstance(value, list):
        return [decode(item, nodes, device, depth + 1) for item in value]
    if not isinstance(value, dict) or len(value) != 1:
        raise damaged(f"unreadable argument {str(value)[:80]}")
    ((kind, content),) = value.items()
    if kind == "node":
        return _lookup(nodes, content, "node")
    if kind in {"tuple", "slice"} and isinstance(content, list):
        items = [decode(item, nodes, device, depth + 1) for item in content]
        return tuple(items) if kind == "tuple" else _slice(items)
    return _decode_torch(kind, content, device)


def _decode_torch(kind: str, content: Any, device: torch.device) -> Any:
    readers: dict[str, Callable[[Any], Any]] = {
        "float": lambda x: _lookup(
            {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}, x, "float"
        ),
        "dtype": lambda x: _lookup(_DTYPES, x, "dtype"),
        "layout": lambda x: _lookup(_LAYOUTS, x, "layout"),
        "memory_format": lambda x: _lookup(_FORMATS, x, "memory format"),
        "device": lambda _: device,
    }
    if kind not in readers:
        raise damaged(f"unreadable argument of kind {kind[:80]!r}")
    return readers[kind](content)


def dtype_of(name: Any) -> torch.dtype:
    """A dtype by name; `ArtifactError` for unknown ones."""
    return _lookup(_DTYPES, name, "dtype")  # type: ignore[no-any-return]


def _lookup(table: dict[str, Any], key: Any, what: str) -> Any:
    if not isinstance(key, str) or key not in table:
        raise damaged(f"unknown {what} {str(key)[:80]!r}")
    return table[key]


def _slice(items: Sequence[Any]) -> slice:
    if len(items) != 3:
        raise damaged(f"a slice has 3 parts, got {len(items)}")
    return slice(*items)
