# SPDX-License-Identifier: Apache-2.0
"""Structures of inputs and outputs as JSON, without importing what a file names.

A dataclass (such as a transformers output) is only taken for itself where this process already
knows it; else the value is an `Output`: a dict whose entries are attributes too.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any, cast

from torch.utils import _pytree as pytree

from qgraph.artifact.damage import damaged
from qgraph.errors import ExportError

MAX_DEPTH = 32
_SEQUENCES: dict[str, Any] = {"tuple": tuple, "list": list}
_MAPPINGS: dict[str, Any] = {"dict": dict, "ordered_dict": collections.OrderedDict}


class Output(dict[str, Any]):
    """Stands for a dataclass that is not known here: entries by name or as attributes.

    >>> Output(logits=1).logits
    1
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            msg = f"this output has no {name!r}; it has {', '.join(self)}"
            raise AttributeError(msg) from None


def encode(spec: Any) -> Any:
    """A pytree spec as JSON values.

    Raises:
        ExportError: a container of a kind that cannot be saved.
    """
    if spec.is_leaf():
        return None
    children = [encode(child) for child in spec.children()]
    for table in (_SEQUENCES, _MAPPINGS):
        for kind, cls in table.items():
            if spec.type is cls:
                keys = {} if table is _SEQUENCES else {"keys": _keys(spec.context)}
                return {"kind": kind, **keys, "items": children}
    if not isinstance(spec.type, type):
        named = list(spec.context._fields)  # a namedtuple
        return {"kind": "fields", "type": "", "keys": named, "items": children}
    fields = _fields(spec.context)
    if fields is None or len(fields) != len(children):
        msg = f"inputs or outputs of type {spec.type.__qualname__} cannot be saved"
        raise ExportError(msg)
    known = f"{spec.type.__module__}.{spec.type.__qualname__}"
    context = spec.context if dataclasses.is_dataclass(spec.type) else None
    return {
        "kind": "fields", "type": known, "keys": fields, "context": context, "items": children,
    }  # fmt: skip


def decode(data: Any, depth: int = 0) -> Any:
    """Read what `encode` wrote.

    Raises:
        ArtifactError: an unknown kind, unfit keys, or nesting beyond `MAX_DEPTH`.
    """
    if depth > MAX_DEPTH:
        raise damaged(f"structures are nested deeper than {MAX_DEPTH}")
    if data is None:
        return pytree.treespec_leaf()
    if not isinstance(data, dict) or not isinstance(data.get("items"), list):
        raise damaged(f"unreadable structure {str(data)[:80]}")
    children = [decode(item, depth + 1) for item in data["items"]]
    kind = data.get("kind")
    if kind in _SEQUENCES:
        return pytree.TreeSpec(_SEQUENCES[kind], None, children)
    if kind not in _MAPPINGS and kind != "fields":
        raise damaged(f"unknown structure {str(kind)[:80]!r}")
    keys = data.get("keys")
    if not isinstance(keys, list) or len(keys) != len(children):
        raise damaged("a structure's keys do not fit its items")
    if not all(isinstance(k, (str, int)) for k in keys) or len(set(keys)) != len(keys):
        raise damaged("a structure's keys are not distinct names")
    if kind in _MAPPINGS:
        return pytree.TreeSpec(_MAPPINGS[kind], keys, children)
    found = _known(data.get("type"), keys, data.get("context"))
    return pytree.TreeSpec(found or _output_type(), data["context"] if found else keys, children)


def _keys(context: Any) -> list[Any]:
    keys = list(context or ())
    if not all(isinstance(key, (str, int)) for key in keys):
        msg = f"dictionary keys must be strings or integers to be saved, got {keys}"
        raise ExportError(msg)
    return keys


def _fields(context: Any) -> list[str] | None:
    """Names of the children, from the context of transformers' outputs or torch's dataclasses."""
    if isinstance(context, (list, tuple)) and context and not isinstance(context[0], str):
        context = context[0]
    names = list(context) if isinstance(context, (list, tuple)) else None
    return names if names is not None and all(isinstance(n, str) for n in names) else None


def _known(name: Any, keys: list[Any], context: Any) -> type | None:
    """A dataclass that this process has registered with torch under that name and these fields."""
    if not isinstance(name, str) or not name or _fields(context) != keys:
        return None
    for cls in cast("Iterable[Any]", list(pytree.SUPPORTED_NODES)):
        if isinstance(cls, type) and f"{cls.__module__}.{cls.__qualname__}" == name:
            if not dataclasses.is_dataclass(cls):
                return None
            allowed = {f.name for f in dataclasses.fields(cls)}
            return cls if {str(n) for part in _parts(context) for n in part} <= allowed else None
    return None


def _parts(context: Any) -> list[Any]:
    return [context] if isinstance(context[0], str) else list(context)


def _output_type() -> type[Output]:
    """`Output`, made known to torch when the first file needs it."""
    if Output not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(
            Output,
            lambda value: (list(value.values()), list(value)),
            lambda items, keys: Output(zip(cast("list[str]", keys), items, strict=True)),
            flatten_with_keys_fn=lambda value: (
                [(pytree.MappingKey(key), item) for key, item in value.items()],
                list(value),
            ),
            serialized_type_name="qgraph.artifact.structure.Output",
        )
    return Output
