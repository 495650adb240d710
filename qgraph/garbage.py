# SPDX-License-Identifier: Apache-2.0
"""Long work without walks over what was there before.

Tracing and passes make many objects, which sets off full collections; each walks all that the
imported libraries hold. None of that is garbage of ours, so it is left out.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def old_objects_aside() -> Iterator[None]:
    """Collections inside look at objects made inside; a caller's own `gc.freeze` stays."""
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
