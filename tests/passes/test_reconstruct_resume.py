# SPDX-License-Identifier: Apache-2.0
"""Reconstruction that is killed, interrupted or short of memory, and what it leaves alone."""

from __future__ import annotations

import contextlib

import pytest
import torch

from qgraph.calibration import reconstruction
from qgraph.graph.verify import checksum, tensors
from qgraph.passes import reconstruct_blocks
from tests.passes.reconstructing import (
    data,
    inserted,
    model,
    outcomes,
    reconstructed,
    same,
    traced,
    weight_codes,
)


def fingerprint(module):
    held = {n: (checksum(t), t.requires_grad) for n, t in tensors(module).items()}
    return held, module.training, torch.random.get_rng_state().tolist()


@pytest.mark.parametrize("fails", [False, True])
def test_the_float_network_and_the_random_state_are_left_alone(fails, monkeypatch):
    start, _ = inserted()
    before = fingerprint(model()), fingerprint(traced()), fingerprint(start)
    if fails:
        monkeypatch.setattr(reconstruction, "output_loss", lambda *_: 1 / 0)
    with contextlib.suppress(ZeroDivisionError):
        reconstructed(global_weight=1.0, local_weight=1.0, steps=4)
    assert (fingerprint(model()), fingerprint(traced()), fingerprint(start)) == before


@pytest.mark.parametrize(("killed_at", "warm"), [(0, False), (2, True), (3, False)])
def test_a_killed_run_goes_on_and_ends_as_an_uninterrupted_one(
    tmp_path, killed_at, warm, monkeypatch
):
    options = {"warm_start": warm}
    whole = weight_codes(reconstructed(cache_dir=tmp_path / "whole", **options)[0])

    class KilledError(Exception):
        pass

    def kill(what, done, total):
        if f" {killed_at + 1}/" in what:
            raise KilledError

    with pytest.raises(KilledError):
        reconstructed(cache_dir=tmp_path / "cut", progress=kill, **options)
    finished = sorted((tmp_path / "cut").rglob("region_*.pt"))
    assert len(finished) == killed_at + 1
    stamps = [path.stat().st_mtime_ns for path in finished]
    with monkeypatch.context() as patch:  # what was collected is not collected again
        patch.setattr(reconstruct_blocks, "begin", lambda *_, **__: pytest.fail("collects again"))
        module, context, _ = reconstructed(cache_dir=tmp_path / "cut", **options)
    assert [path.stat().st_mtime_ns for path in finished] == stamps
    resumed = weight_codes(module)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    again, _, _ = reconstructed(cache_dir=tmp_path / "cut", **options)
    assert same(again, module)
    assert len(outcomes(context)) == 4


def test_a_state_of_other_options_or_other_data_is_not_taken_over(tmp_path):
    reconstructed(cache_dir=tmp_path, steps=2)
    reconstructed(cache_dir=tmp_path, steps=3)
    assert len(list(tmp_path.iterdir())) == 2
    reconstructed(cache_dir=tmp_path, steps=2, batches=data(seed=5))
    assert len(list(tmp_path.iterdir())) == 3
    first, *others = data()
    swapped = [first.flip(0), *others]
    other = reconstructed(cache_dir=tmp_path, steps=2, batches=swapped)[0]
    assert len(list(tmp_path.iterdir())) == 4
    fresh = reconstructed(steps=2, batches=swapped)[0]
    assert same(other, fresh)


def test_values_on_disk_give_the_same_codes():
    memory = weight_codes(reconstructed()[0])
    disk = weight_codes(reconstructed(max_memory=0)[0])
    assert all(torch.equal(memory[k], disk[k]) for k in memory)


def test_an_interrupt_keeps_the_regions_that_are_finished():
    def interrupt(what, done, total):
        if " 3/" in what:
            raise KeyboardInterrupt

    module, context, changed = reconstructed(progress=interrupt)
    assert changed
    assert len(outcomes(context)) == 2
    assert not same(module, inserted()[0])
