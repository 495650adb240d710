# SPDX-License-Identifier: Apache-2.0
"""Attentions and activations written by hand, with planned operands."""

from __future__ import annotations

from typing import Any

from tests.passes.by_hand import Hand, aten, normal


def attention(
    shape: tuple[int, ...] = (2, 3, 5, 6), values: tuple[int, ...] = (2, 3, 6, 4), bits: int = 4
) -> tuple[Hand, Any, Any]:
    """Probabilities of such a shape times values."""
    hand = Hand()
    logits, v = hand.given("logits", 2 * normal(*shape)), hand.given("v", normal(*values, seed=1))
    soft = hand.call(aten.softmax.int, logits, -1, name="soft")
    mixed = hand.call(aten.matmul.default, soft, v, name="mixed")
    return hand, hand.data_site(mixed, bits=bits, axis=-1), soft


def activated(
    function: object = aten.gelu.default, bits: int = 4, outputs: int = 5, rows: int = 24
) -> tuple[Hand, Any, Any]:
    """A function's output read by two linears, `fc` and `other`."""
    hand = Hand()
    x = hand.given("x", 2 * normal(rows, 6))
    value = hand.call(function, x, name="value")
    layers = [
        hand.linear(value, normal(outputs, 6, seed=n + 2), name=name)
        for n, name in enumerate(("fc", "other"))
    ]
    return hand, [hand.data_site(layer, bits=bits, axis=-1) for layer in layers], value
