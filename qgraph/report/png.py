# SPDX-License-Identifier: Apache-2.0
"""Small pictures as PNG text for HTML, by the standard library alone."""

from __future__ import annotations

import base64
import struct
import zlib

import torch
from torch import Tensor


def png(pixels: Tensor) -> str:
    """Base64 text of a PNG file.

    Args:
        pixels: uint8 [H, W, 3].
    """
    height, width, _ = pixels.shape
    rows = pixels.to(torch.uint8).cpu().contiguous().view(height, width * 3)
    raw = b"".join(b"\0" + bytes(row.tolist()) for row in rows)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, body) for name, body in parts)
    return base64.b64encode(data).decode()


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
