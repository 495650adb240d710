# SPDX-License-Identifier: Apache-2.0
"""What verification knows a tensor by: one element that changed is noticed, in any size."""

import pytest
import torch

from qgraph.graph.verify import checksum


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64, torch.float64])
def test_each_element_counts(size, dtype):
    values = torch.arange(size).to(dtype)
    known = checksum(values)
    assert checksum(values.clone()) == known
    for at in range(size):
        changed = values.clone()
        changed[at] += 1
        assert checksum(changed) != known
    assert checksum(values.reshape(1, size)) != known


def test_what_is_empty_is_known_by_shape_and_dtype():
    assert checksum(torch.zeros(0, 2)) != checksum(torch.zeros(2, 0))
    assert checksum(torch.zeros(0)) != checksum(torch.zeros(0, dtype=torch.int32))
