# SPDX-License-Identifier: Apache-2.0
"""Typed metadata: JSON-able values under ``meta["custom"]["qgraph"]``, one owner per key.

That place survives re-export. Meaning never depends on metadata: it informs reports only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from torch.fx import Node

T = TypeVar("T", bound="str | int | float | bool | list[object] | dict[str, object]")


@dataclass(frozen=True, slots=True)
class Key(Generic[T]):
    """A metadata key; `owner` is the module or pass that alone writes it."""

    name: str
    owner: str

    def set(self, node: Node, value: T) -> None:
        """Attach the value to the node; copies of the node keep theirs."""
        custom = node.meta.get("custom", {})
        node.meta["custom"] = custom | {"qgraph": custom.get("qgraph", {}) | {self.name: value}}

    def get(self, node: Node) -> T | None:
        """The value, or None where it was never set."""
        return node.meta.get("custom", {}).get("qgraph", {}).get(self.name)  # type: ignore[no-any-return]


CREATED_BY: Key[str] = Key("created_by", owner="qgraph.pipeline")
