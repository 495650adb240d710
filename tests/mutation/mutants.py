# SPDX-License-Identifier: Apache-2.0
"""Deliberate bugs: (file, what stands there, what a slip would make of it, tests that must fail)."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """One planted bug; `old` occurs once in `file`."""

    file: str
    old: str
    new: str
    tests: str


AFFINE = ("qgraph/formats/affine.py", "tests/formats/test_affine.py")
LEVELS = (
    "qgraph/formats/levels.py",
    "tests/formats/test_levels.py tests/formats/test_dual_region.py",
)
DUAL = ("qgraph/formats/dual_region.py", "tests/formats/test_dual_region.py")
POWER = ("qgraph/formats/power_of_two.py", "tests/formats/test_power_of_two.py")
NORM = (
    "qgraph/graph/fold_batch_norm.py",
    "tests/graph/test_fold_batch_norm.py tests/graph/test_canonicalize.py",
)
ATTENTION = ("qgraph/graph/decompose_attention.py", "tests/graph/test_decompose_attention.py")
CENTRE = ("passes/center_keys.py", "tests/passes/test_center_keys.py")
BIAS = (
    "passes/quantize_biases.py",
    "tests/passes/test_quantize_biases.py tests/backends/test_integer.py tests/test_compile.py",
)
HOIST = (
    "passes/hoist_quantizers.py",
    "tests/passes/test_hoist_quantizers.py tests/backends/test_integer.py tests/test_compile.py",
)
BOUNDS = (
    "backends/bounds.py",
    "tests/backends/test_bounds.py tests/backends/test_exact_products.py tests/backends/test_integer.py",
)
PRODUCTS = (
    "backends/products.py",
    "tests/backends/test_formats_in_products.py tests/backends/test_exact_products.py",
)
RANGES = ("qgraph/calibration/extrema.py", "tests/calibration/test_statistics.py")
MOMENTS = ("qgraph/calibration/moments.py", "tests/calibration/test_statistics.py")
SCALES = ("qgraph/calibration/affine.py", "tests/calibration/test_ranges.py")
TABLES = ("backends/tables.py", "tests/backends/test_tables.py tests/backends/test_integer.py")
STORED = "tests/backends/test_prepare.py tests/backends/test_onnx_levels.py"
PREPARE = ("backends/onnx/prepare.py", f"{STORED} tests/backends/test_onnx_export.py")
CHANNEL = ("backends/onnx/by_channel.py", "tests/backends/test_onnx_levels.py")
ONNX_LEVELS = ("backends/onnx/levels.py", "tests/backends/test_onnx_levels.py")
FINISH = ("backends/onnx/finish.py", "tests/backends/test_onnx_export.py")
SPELLING = ("qgraph/graph/normalize_ops.py", "tests/graph/test_canonicalize.py")
ASSIGN = ("passes/assign_bits.py", "tests/passes/test_assign_bits.py")
CHOICE = (
    "backends/integer/choice.py",
    "tests/backends/test_integer.py tests/backends/test_exact_products.py",
)
SAFETY = ("backends/onnx/safety.py", "tests/backends/test_onnx_safety.py")
SOFTMAX = ("passes/search_softmax_base.py", "tests/passes/test_search_softmax_base.py")
SEMANTICS = (
    "backends/semantics.py",
    "tests/backends/test_integer.py tests/backends/test_interpolation.py",
)
REORDER = ("passes/reorder_channels.py", "tests/passes/test_reorder_channels.py")
ONNX_OPS = ("backends/onnx/ops.py", "tests/backends/test_onnx_levels.py")
REUSE = ("backends/integer/reuse.py", "tests/backends/test_integer.py")
CONVS = ("backends/onnx/convolutions.py", "tests/backends/test_onnx_export.py")


def _of(room: tuple[str, str], *pairs: tuple[str, str]) -> tuple[Mutant, ...]:
    file, tests = room
    return tuple(Mutant(file, old, new, tests) for old, new in pairs)


MUTANTS: tuple[Mutant, ...] = (
    *_of(
        AFFINE,
        ("(x.to(torch.float32) / s).round_()", "(x.to(torch.float32) / s + 0.5).floor_()"),
        ("(x.to(torch.float32) / s).round_()", "(x.to(torch.float32) * (1 / s)).round_()"),
        (".add_(z).clamp_(qmin, qmax)", ".clamp_(qmin, qmax).add_(z)"),
        (".add_(z).clamp_(qmin, qmax)", ".clamp_(qmin, qmax)"),
        (".add_(z).clamp_(qmin, qmax)", ".sub_(z).clamp_(qmin, qmax)"),
        ("(codes.to(torch.int32) - z).to(torch.float32) * s", "codes.to(torch.float32) * s"),
        ("return (1 << (self.bits - int(self.signed))) - 1", "return 1 << (self.bits - int(self.signed))"),
        ("int(self.narrow) - (1 <<", "-int(self.narrow) - (1 <<"),
        ("repeated.narrow(axis, 0, shape[axis])", "repeated.narrow(axis, 0, shape[axis] - 1)"),
        ("qmin >= -128 and qmax <= 127", "qmin >= -129 and qmax <= 128"),
    ),
    *_of(
        LEVELS,
        ("(wide[..., 1:] + wide[..., :-1]) / 2", "(wide[..., 1:] + wide[..., :-1]) / 2 + 0.25"),
        ("above += units <= threshold", "above += units < threshold"),
        ("num_levels <= 256 else", "num_levels <= 257 else"),
        ("values * along(scale, axis, ranks.ndim)", "values * scale.mean()"),
        ("(self.thresholds < high)", "(self.thresholds < high + 9)"),
    ),
    *_of(
        DUAL,
        ("return 1 << (check_bits(bits) - 1)", "return 1 << check_bits(bits)"),
        ("shift < 0 or bits - 1 + shift > OPERAND_BITS", "shift < 0 or bits - 2 + shift > OPERAND_BITS"),
        ("below, above = max(-shift, 0), max(shift, 0)\n    negative", "below, above = max(shift, 0), max(-shift, 0)\n    negative"),
        ("high / int(levels[-1])", "high / (int(levels[-1]) + 1)"),
        ('rounding_mode="floor") | size', 'rounding_mode="floor")'),
    ),
    *_of(
        POWER,
        ("torch.exp2(FRACTION - steps)", "torch.exp2(FRACTION + 1 - steps)"),
        ("(base + half) >> octave", "base >> octave"),
        ("(codes[ends].double() + 0.5) / tau", "(codes[ends].double() + 1.0) / tau"),
        ("min((1 << check_bits(bits)) - 2, EXPONENT_CAP * tau)", "min((1 << check_bits(bits)) - 1, EXPONENT_CAP * tau)"),
        ("zero + (1 << bits) - 1", "zero + (1 << bits) - 2"),
    ),
    *_of(
        NORM,
        ("(variance.double() + epsilon).rsqrt()", "variance.double().rsqrt()"),
        ("shift = -mean.double() * factor", "shift = mean.double() * factor"),
        ("affine.shift + bias.double() * affine.factor", "affine.shift + bias.double()"),
        ("else factor * gamma.double()", "else factor"),
        ("set(source.users) == {reader}", "reader in source.users"),
        ("factor.reshape(groups, 1, weight.shape[1],", "factor.reshape(weight.shape[1], 1, groups,"),
        ("one / vector, zero", "vector, zero"),
        ("(-one, vector) if swapped else (one, -vector)", "(one, vector) if swapped else (one, -vector)"),
    ),
    *_of(
        ATTENTION,
        ("1.0 / math.sqrt(int(shape_of(query)[-1]))", "1.0 / math.sqrt(int(shape_of(query)[-2]))"),
        ("call(aten.transpose.int, key, -2, -1)", "call(aten.transpose.int, query, -2, -1)"),
        ("call(aten.gt.Tensor, columns,", "call(aten.ge.Tensor, columns,"),
        ("call(aten.logical_not.default, given)", "call(aten.logical_and.default, given, given)"),
        ("call(aten.unsqueeze.default, item, -3)", "call(aten.unsqueeze.default, item, -4)"),
        ("None if every_row_has_a_key else", "None if constant is not None else"),
        ("call(aten.softmax.int, scores, -1)", "call(aten.softmax.int, scores, -2)"),
    ),
    *_of(
        CENTRE,
        ("return -(total / count)[inverse]", "return (total / count)[inverse]"),
        ("key.shift / factor", "key.shift * factor"),
        ("(stored.double() + shift.to(stored.device))", "(stored.double() - shift.to(stored.device))"),
    ),
    *_of(
        BIAS,
        ("torch.round(values / scale.to(torch.float64))", "torch.floor(values / scale.to(torch.float64))"),
        ("return x.scale * w.scale\n\n", "return x.scale\n\n"),
        ("HEADROOM = 2**30", "HEADROOM = 2**40"),
    ),
    *_of(
        HOIST,
        ("int(encoding.zero_point) == encoding.qmin:", "int(encoding.zero_point) >= encoding.qmin:"),
        ("all(is_quantize(user) for user in source.users)", "any(is_quantize(user) for user in source.users)"),
        ("return ours == theirs", "return ours[:1] == theirs[:1]"),
    ),
    *_of(
        BOUNDS,
        ("max(abs(levels[0]), abs(levels[1]))", "abs(levels[1])"),
        (".abs().movedim(axis, 0).flatten(1).sum(1)", ".movedim(axis, 0).flatten(1).sum(1)"),
        ("low, high = min(data[0], 0), max(data[1], 0)", "low, high = data[0], data[1]"),
        ("FLOAT32_EXACT = 2**24", "FLOAT32_EXACT = 2**30"),
    ),
    *_of(
        PRODUCTS,
        ("levels.to(torch.int64) << along(shift", "levels.to(torch.int64) * along(shift"),
        ("torch.log2(data.scale.double() / smallest.double())", "torch.log2(data.scale.double() / data.scale.double().max())"),
        ("return self.codes if bool((ours == theirs).all()) else None", "return self.codes"),
        ("torch.nonzero(data.scale == s).flatten()", "torch.nonzero(data.scale >= s).flatten()"),
    ),
    *_of(
        RANGES,
        ("self.low = torch.minimum(self.low, low)", "self.low = low"),
        ("self.high = torch.maximum(self.high, high)", "self.high = torch.minimum(self.high, high)"),
        ("torch.where(flip, -source.high, source.low)", "torch.where(flip, -source.low, source.low)"),
        ('"low": self.low[order],', '"low": self.low,'),
    ),
    *_of(
        MOMENTS,
        ("total += wide.sum(0)", "total = wide.sum(0)"),
        ("return self.total / self.count.clamp(min=1)", "return self.total / (self.count + 1)"),
        ("matrix += block.T @ block", "matrix = block.T @ block"),
    ),
    *_of(
        SCALES,
        ("scale = (above - below) / (qmax - qmin)", "scale = (above - below) / (qmax - qmin + 1)"),
        ("torch.round(qmin - below / scale.double())", "torch.round(qmin + below / scale.double())"),
        ("below.clamp(max=0.0), above.clamp(min=0.0)", "below, above"),
        ("torch.maximum(scale, below / qmin) if", "torch.minimum(scale, below / qmin) if"),
    ),
    *_of(TABLES, ("table[codes.to(torch.int64) - low]", "table[codes.to(torch.int64)]")),
    *_of(
        PREPARE,
        ("stored = (encoding.zero_point + shift).to(dtype)", "stored = encoding.zero_point.to(dtype)"),
        ("max(-128 - low, 0)", "max(-127 - low, 0)"),
        ("nibbles[..., 0] | (nibbles[..., 1] << 4)", "nibbles[..., 1] | (nibbles[..., 0] << 4)"),
        ("low, high = encoding.qmin + shift, encoding.qmax + shift", "low, high = encoding.qmin + shift, 255"),
    ),
    *_of(
        CHANNEL,
        ("call(aten.round.default, units), constant(", "units, constant("),
        ("wide = call(aten.sub.Tensor, wide,", "wide = call(aten.add.Tensor, wide,"),
    ),
    *_of(
        ONNX_LEVELS,
        ("torch.arange(table.shape[0], dtype=torch.int32) * table.shape[1]", "torch.arange(table.shape[0], dtype=torch.int32)"),
        ("(1 << steps) - 1 - count", "(1 << steps) - count"),
    ),
    *_of(
        FINISH,
        ("10 if opset < OPSET_INT2 else 13", "10 if opset <= OPSET_INT2 else 13"),
        ('node.op_type in _KEPT or node.op_type == "Cast"', 'node.op_type not in _KEPT or node.op_type == "Cast"'),
    ),
    *_of(
        CHOICE,
        ("start.float()) if bool(start.any()) else None\n", "start.float()) if bool(start.all()) else None\n"),
        ("if form.exact_dtype is torch.float32:", "if form.exact_dtype is not torch.float32:"),
        ("        if all(\n            max(", "        if any(\n            max("),
    ),
    *_of(SAFETY, ("not model.graph.node and not", "not model.graph.node or not")),
    *_of(SOFTMAX, ("< 3 or not all(same)", "< 3 or not any(same)")),
    *_of(
        SEMANTICS,
        ("if form.groups or form.bias is not None:", "if form.groups or form.bias is None:"),
        ("node.args[0] if node.target in RESAMPLES else None", "node.args[1] if node.target in RESAMPLES else None"),
    ),
    *_of(REORDER, ("if times < 2:", "if times < 3:")),
    *_of(ONNX_OPS, ("op.Gather if position is None and starts", "op.Gather if position is not None and starts")),
    *_of(REUSE, ("ours.dtype == theirs.dtype and", "ours.dtype != theirs.dtype and")),
    *_of(ASSIGN, ("decided[site.value].bits == sites[0].bits", "decided[site.value].bits != sites[0].bits")),
    *_of(
        SPELLING,
        ("rank_of(left) < 1", "rank_of(left) <= 1"),
        ("data, weight, bias = (argument(node, at) for at in range(3))", "data, weight, bias = (argument(node, at) for at in range(4))"),
    ),
    *_of(
        CONVS,
        ("codes[:, :, row_tap, column_tap].T", "codes[:, :, column_tap, row_tap].T"),
        ("moved(aten.permute.default, [0, 2, 4, 1, 3, 5])", "moved(aten.permute.default, [0, 2, 4, 1, 5, 3])"),
    ),
)  # fmt: skip
