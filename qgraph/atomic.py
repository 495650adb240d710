# SPDX-License-Identifier: Apache-2.0
"""Writing files so that a reader sees the old file or the new one, never half of it.

A temporary file in the same folder, fsync, rename, fsync of the folder. Temporary files that
a killed process left behind are swept by the next writer of the same target.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

from qgraph.errors import ExportError

Chunk = bytes | bytearray | memoryview


def probe(path: str | os.PathLike[str]) -> Path:
    """Check that a file can be written there, before any long work.

    Raises:
        ExportError: no such folder, a read-only one, or a target that is no regular file.
    """
    target = Path(path)
    _refuse_special(target)
    temporary = temporary_of(target)
    try:
        temporary.touch(exist_ok=False)
        temporary.unlink()
    except OSError as error:
        msg = f"{target}: cannot be written: {error.strerror or error}"
        raise ExportError(msg) from error
    return target


def write_file(path: str | os.PathLike[str], chunks: Iterable[Chunk]) -> int:
    """Write the chunks as one file, all or nothing; return its size.

    Raises:
        ExportError: the path cannot be written to, or the disk is full; an older file stays.
    """
    target = Path(path)
    _refuse_special(target)
    sweep(target)
    temporary = temporary_of(target)
    try:
        with temporary.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
            size = file.tell()
        publish(temporary, target)
    except OSError as error:
        msg = f"{target}: cannot be written: {error.strerror or error}"
        raise ExportError(msg) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return size


def publish(draft: Path, target: Path) -> None:
    """Move a finished file into place; after a crash of the machine the old one stands, or it."""
    with draft.open("rb") as written:
        os.fsync(written.fileno())
    draft.replace(target)
    _sync_folder(target.parent)


def _refuse_special(target: Path) -> None:
    """os.replace would put a file in place of a device, a pipe or a link."""
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        msg = f"{target}: cannot be written: {error.strerror or error}"
        raise ExportError(msg) from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a link" if stat.S_ISLNK(mode) else "no file"
        msg = f"{target}: is {kind}; only regular files are written over"
        raise ExportError(msg)


def temporary_of(target: Path) -> Path:
    """A name beside the target that tells which process made it."""
    return target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def sweep(target: Path) -> None:
    """Remove files and folders that processes that no longer live left beside the target."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(\d{{1,10}})-[0-9a-f]{{8}}\.tmp")
    with contextlib.suppress(OSError):
        for entry in target.parent.iterdir():
            match = pattern.fullmatch(entry.name)
            if match and not _alive(int(match[1])):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
