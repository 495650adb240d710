# SPDX-License-Identifier: Apache-2.0
"""Shapes with symbolic sizes as JSON: an integer, a symbol's name, or [operation, operands...]."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy.functions import CleanDiv, FloorDiv, Max, Min, Mod, PythonMod

from qgraph.artifact.agreement import check_size
from qgraph.artifact.damage import damaged
from qgraph.artifact.values import dtype_of

MAX_DEPTH = 16
MAX_ELEMENTS = 1 << 44
_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_WRITTEN: tuple[tuple[Any, str], ...] = (
    (sympy.Add, "+"), (sympy.Mul, "*"), (sympy.Pow, "**"), (CleanDiv, "//"), (FloorDiv, "//"),
    (Mod, "%"), (PythonMod, "%"), (Max, "max"), (Min, "min"),
    (sympy.Max, "max"), (sympy.Min, "min"),
)  # fmt: skip
_READ = {
    "+": operator.add, "*": operator.mul, "**": operator.pow, "//": operator.floordiv,
    "%": operator.mod, "max": torch.sym_max, "min": torch.sym_min,
}  # fmt: skip


class Symbols:
    """Writes sizes; names symbols s0, s1, ... as they occur.

    Attributes:
        hints: an example value of each symbol.
    """

    def __init__(self) -> None:
        self.hints: dict[str, int] = {}
        self._names: dict[Any, str] = {}

    def size(self, size: Any) -> Any:
        """One size; None where it depends on data."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        return self._expression(size.node.expr, size.node.shape_env)

    def value(self, value: Any) -> Any:
        """What a node computes: dtype and shape of a tensor, a size, a list of them, or None."""
        if isinstance(value, Tensor):
            shape = [self.size(size) for size in value.shape]
            if None in shape:
                return None
            return {"dtype": str(value.dtype).removeprefix("torch."), "shape": shape}
        if isinstance(value, torch.SymInt):
            size = self.size(value)
            return None if size is None else {"size": size}
        if isinstance(value, (list, tuple)):
            items = [self.value(item) for item in value]
            return None if None in items else {"items": items, "tuple": isinstance(value, tuple)}
        return None

    def _expression(self, expression: Any, env: Any) -> Any:
        if expression.is_Integer:
            return int(expression)
        if expression.is_Symbol:
            return self._symbol(expression, env)
        for cls, name in _WRITTEN:
            if isinstance(expression, cls):
                operands = [self._expression(item, env) for item in expression.args]
                return None if None in operands else [name, *operands]
        return None

    def _symbol(self, symbol: Any, env: Any) -> str | None:
        values = getattr(env, "backed_var_to_val", None) or getattr(env, "var_to_val", {})
        if symbol not in values:
            return None
        if symbol not in self._names:
            self._names[symbol] = f"s{len(self._names)}"
            self.hints[self._names[symbol]] = int(values[symbol])
        return self._names[symbol]


class Shapes:
    """Rebuilds values without data, their symbols shared.

    Attributes:
        mode: the fake mode of all values made here.
    """

    def __init__(self, hints: Any, device: torch.device) -> None:
        self._env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self._env, allow_non_fake_inputs=True)
        self._device = device
        if not isinstance(hints, dict):
            raise damaged("the symbols are no object")
        self._symbols = {name: self._symbol(name, hint) for name, hint in hints.items()}

    def _symbol(self, name: str, hint: Any) -> torch.SymInt:
        if not _SYMBOL.fullmatch(name) or type(hint) is not int or not 0 < hint < 1 << 31:
            raise damaged(f"symbol {name[:80]!r} has the example value {str(hint)[:20]}")
        source = ConstantSource(name)
        symbol = self._env.create_symbol(
            hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None,
            do_not_specialize_zero_one=True,
        )  # fmt: skip
        return self._env.create_symintnode(symbol, hint=hint, source=source)  # type: ignore[return-value]

    def size(self, data: Any, depth: int = 0) -> Any:
        """Read one size; `ArtifactError` on anything `Symbols` does not write."""
        if type(data) is int:
            return data
        if isinstance(data, str) and data in self._symbols:
            return self._symbols[data]
        known = isinstance(data, list) and 3 <= len(data) <= 64 and data[0] in _READ
        if not known or depth > MAX_DEPTH:
            raise damaged(f"unreadable size {str(data)[:80]}")
        operands = [self.size(item, depth + 1) for item in data[1:]]
        if data[0] == "**" and not (type(operands[1]) is int and 0 <= operands[1] <= 16):
            raise damaged(f"unreadable size {str(data)[:80]}")
        return functools.reduce(functools.partial(_combined, _READ[data[0]]), operands)

    def value(self, data: Any) -> Any:
        """Read what `Symbols` wrote, None excepted."""
        if isinstance(data, dict) and data.keys() == {"dtype", "shape"}:
            return self._tensor(dtype_of(data["dtype"]), data["shape"])
        if isinstance(data, dict) and data.keys() == {"size"}:
            return self.size(data["size"])
        if isinstance(data, dict) and data.keys() == {"items", "tuple"}:
            items = [self.value(item) for item in list(data["items"])[:4096]]
            return tuple(items) if data["tuple"] else items
        raise damaged(f"unreadable value {str(data)[:80]}")

    def _tensor(self, dtype: torch.dtype, shape: Any) -> Tensor:
        if not isinstance(shape, list) or len(shape) > 32:
            raise damaged(f"unreadable shape {str(shape)[:80]}")
        sizes = [self.size(item) for item in shape]
        total = 1
        for size in sizes:
            number = size if isinstance(size, int) else size.node.hint
            total *= max(int(number), 1)
            if int(number) < 0 or total > MAX_ELEMENTS:
                raise damaged(f"absurd shape {str(shape)[:80]}")
        with self.mode:
            return torch.empty(sizes, dtype=dtype, device=self._device)


def _combined(operation: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    """One step of a size; powers of powers would take longer than the file is long."""
    return check_size(operation(left, right))
