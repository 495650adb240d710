# SPDX-License-Identifier: Apache-2.0
"""The accounting reproduces the ratios that Reg-PTQ (CVPR 2024, table 4) publishes."""

from __future__ import annotations

import pytest

from qgraph.report.accounting import Convention, OpUse, account, compute_ratio

# Faster R-CNN R50: float 171.8 G operations, 46.91 M words. Shares read off the W4A4 entries
# (22.65 G; 43.7 M words quantized and the rest float); all other entries are predictions.
FLOAT, FULL = 171.8, 22.65
QUANTIZED = (FLOAT - FULL) / (1 - 16 / 128)
WORDS, STORED = 46.91, 43.67


def detector(weight_bits: int, activation_bits: int, share: float = QUANTIZED) -> list[OpUse]:
    """Two products: what is quantized and what is not, in thousands of operations."""
    macs = round(share * 1e6), round((FLOAT - share) * 1e6)
    parameters = round(STORED * 1e6), round((WORDS - STORED) * 1e6)
    return [
        OpUse(
            name="quantized", parameters=parameters[0], macs=macs[0], weight_bits=weight_bits,
            activation_bits=activation_bits,
        ),
        OpUse(name="float", parameters=parameters[1], macs=macs[1]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("bits", "compute", "storage"), [((4, 4), 7.58, 5.39), ((2, 4), 14.2, 7.9)]
)
def test_full_quantization(bits: tuple[int, int], compute: float, storage: float) -> None:
    ops = detector(*bits)
    assert compute_ratio(ops, Convention.WORDS_128) == pytest.approx(compute, rel=0.01)
    assert account(ops, []).weight_ratio == pytest.approx(storage, rel=0.01)


@pytest.mark.parametrize(("bits", "billions"), [((2, 4), 25.48), ((4, 4), 35.24), ((4, 8), 54.75)])
def test_backbone_and_neck_only(bits: tuple[int, int], billions: float) -> None:
    ops = detector(*bits, share=1.2196 * 128)
    assert FLOAT / compute_ratio(ops, Convention.WORDS_128) == pytest.approx(billions, rel=0.005)


def test_full_quantization_saves_twice_what_backbone_and_neck_do() -> None:
    ratios = [
        compute_ratio(detector(2, 4, share), Convention.WORDS_128)
        for share in (QUANTIZED, 1.2196 * 128)
    ]
    assert ratios[0] / ratios[1] == pytest.approx(2.1, abs=0.05)


def test_the_convention_caps_four_bits_at_eight() -> None:
    everything = detector(4, 4, share=FLOAT)
    assert compute_ratio(everything, Convention.WORDS_128) == 8.0
    assert compute_ratio(everything, Convention.BOPS) == 64.0
