# SPDX-License-Identifier: Apache-2.0
"""What a source node has become while a graph is lowered."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

from qgraph.backends.arithmetic import OPEN, Clamp
from qgraph.backends.integer.storage import Storage
from qgraph.backends.products import ProductForm


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """Integer codes in storage."""

    node: Node
    storage: Storage


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """An emitted accumulator: float32 integers, bias codes included."""

    node: Node
    form: ProductForm


@dataclass(frozen=True, slots=True, eq=False)
class Pending:
    """A product that waits for its reader, the moves and clamps behind it not yet applied."""

    product: Product
    moves: tuple[Node, ...] = field(default=())
    clamp: Clamp = OPEN


@dataclass(frozen=True, slots=True, eq=False)
class KernelChoice:
    """An emitted product.

    Attributes:
        accumulator: float32 integers, bias codes included.
        kernel: its name for reports.
        reason: why this one.
    """

    accumulator: Node
    kernel: str
    reason: str
