# SPDX-License-Identifier: Apache-2.0
"""Batches become smaller when memory runs out, and only then."""

from __future__ import annotations

import logging

import pytest
import torch

from qgraph.calibration import reconstruction, streams
from qgraph.calibration.out_of_memory import is_out_of_memory, with_smaller_batches
from qgraph.errors import CalibrationError
from tests.passes.reconstructing import reconstructed, same, weight_codes

ALLOCATORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: not enough memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ALLOCATORS, ids=lambda e: type(e).__name__)
def test_batches_are_halved_until_they_fit_and_it_is_said(error, caplog):
    seen: list[int] = []
    told: list[str] = []

    def work(batch: int) -> str:
        seen.append(batch)
        if batch > 3:
            raise error
        return f"done with {batch}"

    with caplog.at_level(logging.WARNING, logger="qgraph"):
        assert with_smaller_batches(work, 13, what="block 2", tell=told.append) == "done with 3"
    assert seen == [13, 6, 3]
    assert told == [f"block 2: out of memory; going on with batches of {n}" for n in (6, 3)]
    assert [record.message for record in caplog.records] == told


def test_one_sample_that_does_not_fit_is_a_typed_error():
    def work(batch: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory\nmore lines")

    with pytest.raises(CalibrationError, match=r"block 2: out of memory even with one sample .*"):
        with_smaller_batches(work, 4, what="block 2")


def test_other_errors_pass_through_at_once():
    seen: list[int] = []

    def work(batch: int) -> None:
        seen.append(batch)
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        with_smaller_batches(work, 4, what="x")
    assert seen == [4]
    assert not is_out_of_memory(ValueError("out of memory"))


def test_reconstruction_goes_on_with_smaller_batches(monkeypatch):
    real = reconstruction._descend

    def descend(problem, tuning, generator, batch, tick):
        if batch > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(problem, tuning, generator, batch, tick)

    want, _, _ = reconstructed(batch=4, steps=4)
    monkeypatch.setattr(reconstruction, "_descend", descend)
    got, context, changed = reconstructed(batch=8, steps=4)
    assert changed
    assert same(got, want)
    told = [d.reason for d in context.decisions if "out of memory" in d.reason]
    assert told
    assert all(text.endswith("going on with batches of 4") for text in told)


def test_streams_advance_with_smaller_batches(monkeypatch):
    want = weight_codes(reconstructed(steps=2)[0])
    real = streams.Stream._advance

    def advance(self, run, inputs, outputs, size, side):
        if size > 8:
            real(self, run, inputs, outputs, size, side)  # some of it is written already
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        real(self, run, inputs, outputs, size, side)

    monkeypatch.setattr(streams.Stream, "_advance", advance)
    got = weight_codes(reconstructed(steps=2)[0])
    assert all(torch.equal(want[k], got[k]) for k in want)
