# SPDX-License-Identifier: Apache-2.0
"""The tree of typed errors.

QGraphError
├── CaptureError              the model cannot be traced
├── UnsupportedOpError        an op that a step cannot take
├── ConfigError               a wrong option, name or bit width
├── CalibrationError          the loader or its values are unusable
├── RankError                 another process of a distributed job failed or is gone
├── InputError                a quantized model was called with wrong inputs
├── PassError                 a pass broke its contract
│   └── VerificationError     a promise or a parity contract does not hold
├── BudgetInfeasibleError     no assignment fits a budget
├── ExportError               a graph cannot be written in the asked form
└── ArtifactError             a saved file is damaged, foreign or hostile

Every message says what is wrong, the value got, what is allowed, and where.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QGraphError(Exception):
    """Root of all errors that qgraph raises on purpose."""


class CaptureError(QGraphError):
    """The model cannot be traced; the message names the source line and a way out."""


class UnsupportedOpError(QGraphError):
    """An operation that the step at hand cannot take."""


class ConfigError(QGraphError, ValueError):
    """An option, a name or a bit width is not one that is allowed."""


class CalibrationError(QGraphError):
    """The calibration loader, or what came out of it, cannot be used."""


class RankError(QGraphError):
    """Another process of a torch.distributed job failed, is gone, or holds something else."""


class InputError(QGraphError, ValueError):
    """A quantized model was called with inputs that do not fit its signature."""


class PassError(QGraphError):
    """A pass failed or broke its contract.

    Attributes:
        pass_name: id of the pass.
        node: name of the node concerned, or None.
    """

    def __init__(self, message: str, *, pass_name: str = "", node: str | None = None) -> None:
        super().__init__(message)
        self.pass_name = pass_name
        self.node = node


class VerificationError(PassError):
    """A promise does not hold.

    Attributes:
        max_abs: largest absolute difference that was measured (nan when not numeric).
    """

    def __init__(
        self,
        message: str,
        *,
        pass_name: str = "",
        node: str | None = None,
        max_abs: float = float("nan"),
    ) -> None:
        super().__init__(message, pass_name=pass_name, node=node)
        self.max_abs = max_abs


class BudgetInfeasibleError(QGraphError):
    """No assignment fits.

    Attributes:
        resource: the budget that cannot be met.
        best_possible: the smallest value of that resource that can be reached.
    """

    def __init__(self, message: str, *, resource: str, best_possible: float) -> None:
        super().__init__(message)
        self.resource = resource
        self.best_possible = best_possible


class ExportError(QGraphError):
    """A graph cannot be written in the form that was asked for."""


class ArtifactError(QGraphError):
    """A saved file is damaged, was written by something else, or is hostile."""


def unknown_name(kind: str, got: str, allowed: Iterable[str]) -> ConfigError:
    """Build the error for a misspelt name, nearest valid names first.

    >>> str(unknown_name("pipeline", "int88", ["int8", "int4"]))
    "unknown pipeline 'int88'; did you mean 'int8'? allowed: int4, int8"
    """
    names = sorted(allowed)
    near = difflib.get_close_matches(got, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return ConfigError(f"unknown {kind} {got!r}{hint} allowed: {', '.join(names)}")
