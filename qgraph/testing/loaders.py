# SPDX-License-Identifier: Apache-2.0
"""Calibration loaders in the forms that people have them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from qgraph.testing.case import Case, Inputs

FORMS = ("tuples", "lists", "mappings", "labelled", "tensors")


@dataclass(frozen=True)
class Loader:
    """An iterable of batches.

    Attributes:
        case: whose inputs it yields.
        sizes: samples of each batch.
        form: of a batch; see `FORMS`. One that does not fit the model becomes "tuples".
        once: whether it can be read only once, as a generator.
    """

    case: Case
    sizes: tuple[int, ...] = (2, 2)
    form: str = "tuples"
    once: bool = False

    def batches(self) -> Iterable[Any]:
        """What to give to `qgraph.compile`."""
        return self._read() if self.once else list(self._read())

    def _read(self) -> Iterator[Any]:
        names = list(inspect.signature(self.case.model().forward).parameters)
        for number, size in enumerate(self.sizes):
            whole = [self.case.inputs(10 * number + i) for i in range(size)]
            inputs = tuple(torch.cat(parts)[:size] for parts in zip(*whole, strict=True))
            yield self._shaped(inputs, names)

    def _shaped(self, inputs: Inputs, names: list[str]) -> Any:
        single: Tensor | None = inputs[0] if len(inputs) == 1 else None
        match self.form:
            case "lists":
                return list(inputs)
            case "mappings":
                return dict(zip(names, inputs, strict=True))
            case "labelled" if single is not None:
                return single, torch.zeros(single.shape[0])
            case "tensors" if single is not None:
                return single
        return inputs


def loaders(case: Case, *, max_batches: int = 3) -> st.SearchStrategy[Loader]:
    """Loaders for a model: forms, generators, batches of unequal sizes."""
    sizes = st.lists(st.integers(1, 3), min_size=1, max_size=max_batches).map(tuple)
    return st.builds(
        Loader, st.just(case), sizes=sizes, form=st.sampled_from(FORMS), once=st.booleans()
    )
