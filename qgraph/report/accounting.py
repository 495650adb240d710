# SPDX-License-Identifier: Apache-2.0
"""What bit widths buy: weight bytes, activation memory and bit operations, each with its weighting.

An average number of bits says nothing without what it was averaged over, so there are three: over
parameters, over stored activation elements, and of the product over multiply-accumulates. Counts
come in as plain data, read from the rewritten graph, never from a solver.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

from qgraph.errors import unknown_name

FLOAT_BITS = 32


class Convention(StrEnum):
    """How papers price one multiply-accumulate of w x a bits.

    BOPS: w*a bit operations, float 32*32 (Yao et al., HAWQ-V3). WORDS_64: w*a/64 word operations,
    float 1. WORDS_128: 2*w*a/128 of the two float operations, float 2 (binary networks, Reg-PTQ).
    """

    BOPS = "bops"
    WORDS_64 = "w*a/64"
    WORDS_128 = "w*a/128"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpUse:
    """One product.

    Attributes:
        name: node name.
        parameters: elements of its weight (0 for a product of two activations).
        macs: multiply-accumulates for one sample.
        weight_bits, activation_bits: widths of its operands, 32 where float.
        scales, biases: 32-bit numbers stored with the weight.
    """

    name: str
    parameters: int
    macs: int
    weight_bits: int = FLOAT_BITS
    activation_bits: int = FLOAT_BITS
    scales: int = 0
    biases: int = 0

    @property
    def is_float(self) -> bool:
        """Whether neither operand has fewer than 32 bits."""
        return min(self.weight_bits, self.activation_bits) >= FLOAT_BITS


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorUse:
    """One stored activation.

    Attributes:
        name: node name.
        elements: elements for one sample.
        bits: width it is stored in.
        born, last_read: steps of the schedule; it is alive from one through the other.
    """

    name: str
    elements: int
    bits: int = FLOAT_BITS
    born: int
    last_read: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Totals; every ratio is float / quantized, so larger is better. Bytes are for one sample.

    Attributes:
        mean_weight_bits: over parameters. mean_activation_bits: over stored elements.
        mean_bit_product: weight bits * activation bits over multiply-accumulates.
        weight_bytes, scale_bytes, bias_bytes: parts of the model.
        weight_ratio: of weights alone. model_ratio: with scales, and with biases on both sides.
        bit_operations, bit_operations_ratio: the BOPS convention.
        activation_bytes, activation_ratio: sum over stored tensors.
        peak_bytes, peak_ratio, peak_step: most bytes alive at one step, skips included.
        disk_bytes: size of the written file, or None.
        macs, float_macs: multiply-accumulates, and those of products in float.
    """

    mean_weight_bits: float
    mean_activation_bits: float
    mean_bit_product: float
    weight_bytes: float
    scale_bytes: float
    bias_bytes: float
    weight_ratio: float
    model_ratio: float
    bit_operations: int
    bit_operations_ratio: float
    activation_bytes: float
    activation_ratio: float
    peak_bytes: float
    peak_ratio: float
    peak_step: int
    disk_bytes: int | None = None
    macs: int = 0
    float_macs: int = 0

    def compute_ratio(self, convention: Convention | str) -> float:
        """Float / quantized compute as a paper counts it; see `Convention`.

        Raises:
            ConfigError: an unknown convention.
        """
        if convention not in set(Convention):
            what = "convention"
            raise unknown_name(what, str(convention), [c.value for c in Convention])
        if convention == Convention.BOPS or not self.macs:
            return self.bit_operations_ratio
        unit = 1 if convention == Convention.WORDS_64 else 2
        quantized = self.bit_operations - FLOAT_BITS**2 * self.float_macs
        return _ratio(unit * self.macs, unit * self.float_macs + quantized / 64)

    def to_json(self) -> dict[str, object]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Cost:
        """Read what `to_json` gave; counts that older versions did not write are 0.

        Raises:
            KeyError, TypeError: the data is something else.
        """
        given = {"macs": 0, "float_macs": 0, **data}
        if any(type(value) not in {int, float} for value in given.values() if value is not None):
            msg = f"the totals are no numbers: {given}"
            raise TypeError(msg)
        return cls(**{f.name: given[f.name] for f in fields(cls)})

    def __str__(self) -> str:
        lines = [
            (
                f"weights      {self.mean_weight_bits:.2f} bits (mean over parameters),"
                f" {self.weight_bytes:,.0f} bytes, 1/{self.weight_ratio:.2f} of float;"
                f" scales {self.scale_bytes:,.0f}, biases {self.bias_bytes:,.0f} bytes;"
                f" model 1/{self.model_ratio:.2f}"
            ),
            (
                f"activations  {self.mean_activation_bits:.2f} bits (mean over stored elements),"
                f" sum {self.activation_bytes:,.0f} bytes, 1/{self.activation_ratio:.2f};"
                f" peak {self.peak_bytes:,.0f} bytes, 1/{self.peak_ratio:.2f}"
            ),
            (
                f"compute      {self.mean_bit_product:.2f} bits x bits (mean over MACs),"
                f" {self.bit_operations:,} bit operations, 1/{self.bit_operations_ratio:.2f}"
                f" (1/{self.compute_ratio(Convention.WORDS_64):.2f} by w*a/64,"
                f" 1/{self.compute_ratio(Convention.WORDS_128):.2f} by w*a/128)"
            ),
        ]
        if self.disk_bytes is not None:
            lines.append(f"disk         {self.disk_bytes:,} bytes")
        return "\n".join(lines)


def account(
    ops: Sequence[OpUse], tensors: Sequence[TensorUse], *, disk_bytes: int | None = None
) -> Cost:
    """Sum up a network. Uniform 8/8 gives exactly 1/4 of the weights and 1/16 of the BOPs."""
    parameters = sum(op.parameters for op in ops)
    macs = sum(op.macs for op in ops)
    weight_bits = sum(op.parameters * op.weight_bits for op in ops)
    extra = FLOAT_BITS * sum(op.scales + op.biases for op in ops)
    biases = FLOAT_BITS * sum(op.biases for op in ops)
    bit_operations = round(compute(ops, Convention.BOPS))
    elements = sum(t.elements for t in tensors)
    stored = sum(t.elements * t.bits for t in tensors)
    peak, step = peak_bits(tensors)
    float_peak, _ = peak_bits(tensors, bits=FLOAT_BITS)
    return Cost(
        mean_weight_bits=_ratio(weight_bits, parameters),
        mean_activation_bits=_ratio(stored, elements),
        mean_bit_product=_ratio(bit_operations, macs),
        weight_bytes=weight_bits / 8,
        scale_bytes=(extra - biases) / 8,
        bias_bytes=biases / 8,
        weight_ratio=_ratio(FLOAT_BITS * parameters, weight_bits),
        model_ratio=_ratio(FLOAT_BITS * parameters + biases, weight_bits + extra),
        bit_operations=bit_operations,
        bit_operations_ratio=_ratio(FLOAT_BITS**2 * macs, bit_operations),
        activation_bytes=stored / 8,
        activation_ratio=_ratio(FLOAT_BITS * elements, stored),
        peak_bytes=peak / 8,
        peak_ratio=_ratio(float_peak, peak),
        peak_step=step,
        disk_bytes=disk_bytes,
        macs=macs,
        float_macs=sum(op.macs for op in ops if op.is_float),
    )


def compute(ops: Sequence[OpUse], convention: Convention) -> float:
    """Return the compute of all products in the units of a convention."""
    match convention:
        case Convention.BOPS:
            return sum(op.macs * op.weight_bits * op.activation_bits for op in ops)
        case Convention.WORDS_64:
            unit = 1
        case Convention.WORDS_128:
            unit = 2
    return sum(
        op.macs * (unit if op.is_float else op.weight_bits * op.activation_bits / 64) for op in ops
    )


def compute_ratio(ops: Sequence[OpUse], convention: Convention) -> float:
    """Return float / quantized compute in a convention, to compare with published ratios."""
    plain = [OpUse(name=op.name, parameters=op.parameters, macs=op.macs) for op in ops]
    return _ratio(compute(plain, convention), compute(ops, convention))


def peak_bits(tensors: Sequence[TensorUse], *, bits: int | None = None) -> tuple[int, int]:
    """Return the most bits alive at one step and the first such step; `bits` overrides widths."""
    changes: dict[int, int] = {}
    for tensor in tensors:
        amount = tensor.elements * (tensor.bits if bits is None else bits)
        changes[tensor.born] = changes.get(tensor.born, 0) + amount
        changes[tensor.last_read + 1] = changes.get(tensor.last_read + 1, 0) - amount
    alive, peak, at = 0, 0, 0
    for step in sorted(changes):
        alive += changes[step]
        if alive > peak:
            peak, at = alive, step
    return peak, at


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 1.0
