# SPDX-License-Identifier: Apache-2.0
"""The same codes for any batch size, number of threads, and run, where nothing is float."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qgraph.backends import integer
from tests.backends.builders import models, quantize

MODELS = {name: (model, inputs) for name, model, inputs in models()}


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def codes(lowered: integer.IntegerModel, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Codes of every quantizer."""
    found: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> Tensor:
        found[name] = value.clone()
        return value

    lowered.run(inputs, {}, keep)
    return found


def repeated(inputs: tuple[Tensor, ...], times: int) -> tuple[Tensor, ...]:
    """The first sample, then `times - 1` others, so that a batch is not one sample copied."""
    return tuple(torch.cat([x[:1].roll(k, -1) for k in range(times)]) for x in inputs)


@pytest.mark.parametrize("name", MODELS)
def test_a_sample_has_the_codes_it_has_in_a_batch_of_32(name):
    model, inputs = MODELS[name]
    lowered = integer.lower(quantize(model, inputs), mode="fixed_point")
    many = repeated(inputs, 32)
    alone = codes(lowered, tuple(x[:1] for x in many))
    for key, value in codes(lowered, many).items():
        assert torch.equal(value[: len(alone[key])], alone[key]), key


@pytest.mark.parametrize("name", MODELS)
def test_threads_and_runs_change_no_code(name, two_threads):
    model, inputs = MODELS[name]
    lowered = integer.lower(quantize(model, inputs))
    parallel = codes(lowered, inputs)
    torch.set_num_threads(1)
    for _ in range(2):
        for key, value in codes(lowered, inputs).items():
            assert torch.equal(value, parallel[key]), key
