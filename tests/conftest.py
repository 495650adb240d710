# SPDX-License-Identifier: Apache-2.0
"""Tests draw the same numbers in every run and in any order.

Property tests draw the same examples; HYPOTHESIS_PROFILE=explore draws new ones.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import Phase, settings

settings.register_profile("steady", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, print_blob=True)
# planted bugs only have to be noticed; to make an example small takes minutes where each compiles
settings.register_profile(
    "unshrunk", derandomize=True, deadline=None, phases=(Phase.explicit, Phase.generate)
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))


@pytest.hookimpl(tryfirst=True)
def pytest_make_collect_report() -> None:
    """What a module draws when it is imported does not depend on the modules before."""
    torch.manual_seed(2)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Fixtures do not depend on the tests before."""
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """A test does not depend on which fixtures were there already."""
    torch.manual_seed(1)
