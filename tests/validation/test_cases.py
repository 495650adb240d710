# SPDX-License-Identifier: Apache-2.0
"""A few cases of `make fuzz` on every run, and those that once failed."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

from tests.validation.cases import check, drawn


@pytest.mark.parametrize("number", [0, 1, 2, 3, 5])  # 0 and 3 once failed
def test_everything_holds(number):
    outcome = check(number)
    assert not outcome.failure, outcome


def test_a_number_always_draws_the_same_and_different_numbers_differ():
    strategy = st.lists(st.integers(), min_size=3)
    assert drawn(strategy, 4) == drawn(strategy, 4)
    assert len({tuple(drawn(strategy, n)) for n in range(8)}) > 5
