# SPDX-License-Identifier: Apache-2.0
"""Long work leaves the collector as it was."""

import gc
import weakref

import pytest
import torch
from torch import nn

import qgraph
from qgraph.errors import CalibrationError
from qgraph.garbage import old_objects_aside

MODEL = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()


class Cycle:
    """Only a collection frees it."""

    def __init__(self):
        self.me = self


def test_what_was_there_before_is_not_walked_and_what_comes_is_freed():
    old = Cycle()
    with old_objects_aside():
        assert not any(each is old for each in gc.get_objects())
        new = weakref.ref(Cycle())
        gc.collect()
        assert new() is None
    assert any(each is old for each in gc.get_objects())


@pytest.mark.parametrize("bad", [False, True])
def test_compile_works_like_that_and_undoes_it_also_when_it_fails(bad):
    frozen = []

    def transform(batch):
        frozen.append(gc.get_freeze_count())
        return batch / (0.0 if bad and len(frozen) > 1 else 1.0)

    loader = [torch.randn(2, 4) for _ in range(2)]
    if bad:
        with pytest.raises(CalibrationError):
            qgraph.compile(MODEL, loader, "int8", transform=transform, verify=False)
    else:
        qgraph.compile(MODEL, loader, "int8", transform=transform, verify=False)
    assert min(frozen) > 0
    assert gc.get_freeze_count() == 0


def test_objects_that_the_caller_set_aside_stay_there():
    gc.freeze()
    try:
        count = gc.get_freeze_count()
        qgraph.trace(MODEL, torch.randn(2, 4))
        assert gc.get_freeze_count() >= count // 2
    finally:
        gc.unfreeze()
