# SPDX-License-Identifier: Apache-2.0
"""Progress bars that vanish when nobody watches a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from tqdm import tqdm

from qgraph.context import Progress


@contextlib.contextmanager
def progress_bar(progress: Progress | bool | None) -> Iterator[Progress | None]:
    """Turn the user's choice into a callable (what, done, total), or None.

    None means: a bar if standard error is a terminal.
    """
    if callable(progress):
        yield progress
        return
    if progress is False or (progress is None and not sys.stderr.isatty()):
        yield None
        return
    with tqdm(leave=False, bar_format="{desc} {percentage:3.0f}%|{bar}| {n}/{total} {eta}") as bar:

        def show(what: str, done: int, total: int) -> None:
            bar.set_description(what, refresh=False)
            bar.total = total or None
            bar.n = done
            bar.refresh()

        yield show
