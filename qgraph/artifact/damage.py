# SPDX-License-Identifier: Apache-2.0
"""Turning whatever a malformed file provokes into one typed error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from qgraph.errors import ArtifactError


def damaged(message: str) -> ArtifactError:
    """Build the error for a file that cannot be used."""
    return ArtifactError(message)


@contextlib.contextmanager
def as_damage(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Report exceptions of these kinds as `ArtifactError`, with `what` before their text."""
    try:
        yield
    except ArtifactError:
        raise
    except kinds as error:
        reason = str(error)[:300] or type(error).__name__
        raise damaged(f"{what}: {reason}") from error
