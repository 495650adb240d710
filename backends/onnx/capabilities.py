# SPDX-License-Identifier: Apache-2.0
"""What onnxruntime runs in integer kernels, and under which conditions. Data, not code.

Measured on onnxruntime 1.31 (CPU, x86 with VNNI). Placement, `kernels` and the report read it.
"""

from __future__ import annotations

from dataclasses import dataclass

OPSET_DEFAULT = 21
OPSET_INT2 = 25
# Cast from a packed type is folded when a session is created (basic optimisation level), so
# packed weights run in the int8 kernels; DequantizeLinear on INT4 runs in float at every call,
# and on INT2 makes the session fail.
WIDEN_AT_LOAD = "Cast"

# Session settings that keep the written meaning.
SESSION_CONFIG: dict[str, str] = {
    # Level 4 (the default) quantizes float activations of weight-only products to int8.
    "session.qdq_matmulnbits_accuracy_level": "1",
}


@dataclass(frozen=True, slots=True)
class Capability:
    """How one op behaves between dequantized inputs.

    Attributes:
        fused: the integer kernel with a quantizer behind the op, or None.
        open: the integer kernel without one, or None.
        needs: the condition, in words.
        cure: what to do where it runs in float.
    """

    fused: str | None
    open: str | None = None
    needs: str = ""
    cure: str = ""


_UNSUPPORTED = "no integer kernel exists; its cost is the float op and its Q and DQ"
_BOTH = "input and output quantized"
_ONE_CONTAINER = "both inputs and the output quantized, one container"
_LINK = "quantize its input right behind the producer, and its output"
_MOVING = (
    "MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Gather", "DepthToSpace",
    "Split", "Flatten",
)  # fmt: skip
_FLOAT = (
    "LayerNormalization", "InstanceNormalization", "GroupNormalization", "Gelu", "Erf",
    "HardSwish", "Tanh", "Exp", "Sqrt", "Clip", "ReduceMean", "Sub", "Div", "Pad", "Pow",
)  # fmt: skip

CAPABILITIES: dict[str, Capability] = {
    "Conv": Capability(
        "QLinearConv",
        needs="one quantizer right behind it, or behind a Relu whose zero point is the bottom code",
        cure="give its output one quantizer; an output that floats or two encodings read is float",
    ),
    "MatMul": Capability(
        "QLinearMatMul",
        "MatMulIntegerToFloat",
        needs="both operands quantized per tensor (B may be per column)",
        cure="quantize both operands",
    ),
    "Gemm": Capability(
        "QGemm",
        "QGemm",
        needs="bias int32 with scale s_x * s_w, or none",
        cure="store the bias as int32 codes (quantize-biases)",
    ),
    "Add": Capability("QLinearAdd", needs=_ONE_CONTAINER, cure="quantize the sum"),
    "Mul": Capability("QLinearMul", needs=_ONE_CONTAINER, cure="quantize the product"),
    "Concat": Capability(
        "QLinearConcat",
        needs="all inputs and the output quantized",
        cure="quantize the result; with one shared encoding it is a copy",
    ),
    "Where": Capability("QLinearWhere", needs="both values and the output quantized"),
    "Sigmoid": Capability("QLinearSigmoid", needs=_BOTH, cure=_LINK),
    "LeakyRelu": Capability("QLinearLeakyRelu", needs=_BOTH, cure=_LINK),
    "Softmax": Capability("QLinearSoftmax", needs=_BOTH, cure="quantize the logits"),
    "AveragePool": Capability("QLinearAveragePool", needs=_BOTH),
    "GlobalAveragePool": Capability("QLinearGlobalAveragePool", needs=_BOTH),
    **dict.fromkeys(
        _MOVING, Capability("itself on int8", "itself on int8", needs="codes at its input")
    ),
    "Resize": Capability("itself on int8", needs="mode nearest", cure="linear modes are float"),
    "ConvTranspose": Capability(
        None, cure="output length = stride * input length makes it a Conv and a DepthToSpace"
    ),
    **dict.fromkeys(_FLOAT, Capability(None, cure=_UNSUPPORTED)),
    "Relu": Capability(
        None, cure="fuses into Conv if the quantizer's zero point is the bottom code"
    ),
}

INTEGER_KERNELS = frozenset({
    "QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger",
    "DynamicQuantizeMatMul", "QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearWhere",
    "QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax", "QLinearAveragePool",
    "QLinearGlobalAveragePool", "NhwcMaxPool", "QLinearReduceMean",
})  # fmt: skip
# Ops that carry quantization between integer and float, and bookkeeping.
BORDERS = frozenset({"QuantizeLinear", "DequantizeLinear"})
MOVES = frozenset({
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Gather", "Concat", "DepthToSpace",
    "Split", "Flatten", "Expand", "Shape", "Cast", "Identity", "Constant",
    "ConstantOfShape", "Tile",
})  # fmt: skip
