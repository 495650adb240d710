# SPDX-License-Identifier: Apache-2.0
"""The named pipelines, as data: a family, a width, and the list of passes that makes it."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Callable, Mapping

from qgraph import passes, plugins
from qgraph.errors import ConfigError, unknown_name
from qgraph.formats import check_bits
from qgraph.pipeline import Pass, Pipeline

_NAME = re.compile(
    r"(?:(?P<family>[a-z]+)_)?(?:int(?P<both>\d+)|w(?P<w>\d+)a(?P<a>\d+))(?P<recon>_recon)?"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
    """A family of pipelines.

    Attributes:
        name: prefix in pipeline names; the empty one is the default.
        purpose: one line for listings.
        build: (weight bits, activation bits) -> passes.
        widths: those that listings show.
    """

    name: str
    purpose: str
    build: Callable[[int, int], tuple[Pass, ...]]
    widths: tuple[str, ...] = ("int8", "int6", "w4a8", "int4")


def front() -> tuple[Pass, ...]:
    """Canonicalisation, the same in every pipeline."""
    return (
        passes.DropNoops(),
        passes.NormalizeOps(),
        passes.OpenAttention(),
        passes.FoldBatchNorm(),
    )


def back() -> tuple[Pass, ...]:
    """Writing decisions into the graph, the same in every pipeline."""
    return (
        passes.InsertQuantizers(),
        passes.HoistQuantizers(),
        passes.QuantizeBiases(),
        passes.PackWeights(),
    )


def _int(weight_bits: int, activation_bits: int) -> tuple[Pass, ...]:
    return (
        *front(),
        passes.PlanSites(weight_bits=weight_bits, activation_bits=activation_bits),
        passes.Calibrate(),
        passes.ChooseRanges(),
        passes.ChooseWeightScales(),
        *back(),
    )


def _ris(weight_bits: int, activation_bits: int) -> tuple[Pass, ...]:
    """Vision and text together: PTQ4RIS's two ideas, each used where it measurably helps.

    More bits by rule: the weights of convolutions (few, each used at every pixel) keep 8; so do
    both operands of the first and last products. Residual adds run at 8 bits, or stay float.
    """
    return (
        *front(),
        passes.PlanSites(weight_bits=weight_bits, activation_bits=activation_bits),
        passes.RaisePrecision(heads=False, roles=("weight",)),
        passes.Calibrate(),
        passes.UseDualRegions(),
        passes.ReorderChannels(),
        passes.ChooseRanges(),
        passes.ChooseWeightScales(),
        *back(),
    )


def _sam(weight_bits: int, activation_bits: int) -> tuple[Pass, ...]:
    """Promptable segmentation: PTQ4SAM's two ideas, each used where it measurably helps.

    More bits by rule: convolutions (stem, neck, upscaling) and what lies behind the last
    attention run at 8 bits or more; residual adds at 8; norms, softmax and masks in float.
    """
    return (
        *front(),
        passes.PlanSites(weight_bits=weight_bits, activation_bits=activation_bits),
        passes.RaisePrecision(),
        passes.Calibrate(),
        passes.CenterKeys(),
        passes.FoldKeySigns(),
        passes.SearchSoftmaxBase(),
        passes.ChooseRanges(),
        passes.ChooseWeightScales(),
        *back(),
    )


def _vit(weight_bits: int, activation_bits: int) -> tuple[Pass, ...]:
    """Vision transformers at few bits: strong start points, then block reconstruction.

    The start decides much of a 4-bit result: wide channels behind norms are balanced, softmax and
    GELU outputs get the format that measurably helps, and then rounding is learned. Not from a
    warm start: on the zoo's ViT its codes win the comparison by block more often than they should.
    """
    return (
        *front(),
        passes.PlanSites(weight_bits=weight_bits, activation_bits=activation_bits),
        passes.Calibrate(),
        passes.SearchSoftmaxBase(),
        passes.UseDualRegions(),
        passes.BalanceChannels(),
        passes.ChooseRanges(),
        passes.ChooseWeightScales(),
        passes.InsertQuantizers(),
        passes.ReconstructBlocks(warm_start=False),
        *back()[1:],
    )


def _sirst(weight_bits: int, activation_bits: int) -> tuple[Pass, ...]:
    """Encoder-decoder segmentation of tiny targets: what is rare decides, so errors are weighed.

    A target covers a thousandth of the pixels; ranges that suit the average pixel clip it away.
    Clips minimise Fisher-weighted errors, and everything that is stored is stored as codes.
    """
    assign = passes.AssignBits(
        mode="uniform", weight_choices=(weight_bits,), activation_choices=(activation_bits,),
        output="sigmoid",
    )  # fmt: skip
    return (
        *front(),
        passes.PlanSites(weight_bits=weight_bits, activation_bits=activation_bits, scope="stored"),
        passes.Calibrate(),
        assign,
        passes.ChooseRanges(method="minmax", add_sqnr=-1000.0),
        passes.ChooseWeightScales(),
        *back(),
    )


def sirst_mixed() -> Pipeline:
    """Symmetric progressive mixed precision (Li et al., TGRS 2024) within the paper's ratios.

    2.42 weight bits (mean over parameters), activations 1/4.6, bit operations 1/29 of float.
    """
    assign = passes.AssignBits(
        budget={"size": 2.42 / 32, "bops": 1 / 29, "activations": 1 / 4.6}, mode="spmix",
        output="sigmoid",
    )  # fmt: skip
    return Pipeline("sirst_mixed", _sirst(2, 3)).replace("assign-bits", assign)


def budgeted(built: Pipeline, budget: Mapping[str, float]) -> Pipeline:
    """A copy that assigns bits within a budget, behind calibration; see `AssignBits`.

    Raises:
        ConfigError: an unknown resource, or a pipeline that never calibrates.
    """
    if any(item.name == passes.AssignBits.name for item in built):
        old = built[passes.AssignBits.name]
        assert isinstance(old, passes.AssignBits)
        fresh = passes.AssignBits()
        mode = "spmix" if old.mode == "uniform" else old.mode
        return built.replace(
            old.name,
            dataclasses.replace(
                old, budget=dict(budget), mode=mode, weight_choices=fresh.weight_choices,
                activation_choices=fresh.activation_choices,
            ),
        )  # fmt: skip
    assign = passes.AssignBits(budget=dict(budget), choose_clips=False)
    return built.insert_after(passes.Calibrate.name, assign)


def _det(weight_bits: int, activation_bits: int) -> tuple[Pass, ...]:
    """Detectors, fully quantized: Reg-PTQ's filtered global loss and log-affine weights.

    Last prediction layers stay in float, the first layer at 8 bits. Rounding goes with feedback,
    region by region; short learning gained nothing over that on the zoo's detector,
    so nothing is learned unless ``steps`` are asked for. Ranges are tuned last, on the
    network as it will be, with the biases and weight scales that make up for what rounding
    shifted: what needs an objective takes ``loss=`` of compile
    (`qgraph.FilteredGlobalLoss`). From 8-bit weights on only ranges are tuned, from 8-bit
    activations on channels are not grouped: the searched ranges are within the noise already.
    """
    groups = (passes.ReorderChannels(),) if activation_bits < 8 else ()
    rounded = (passes.ReconstructBlocks(steps=0, damping=0.1),) if weight_bits < 8 else ()
    return (
        *front(),
        passes.PlanSites(weight_bits=weight_bits, activation_bits=activation_bits),
        passes.PlanHeads(),
        passes.Calibrate(),
        *groups,
        passes.ChooseRanges(),
        passes.UseLogAffine(),
        passes.ChooseWeightScales(),
        passes.InsertQuantizers(),
        *rounded,
        passes.TuneRanges(steps=150),
        *back()[1:],
    )


def reconstructed(built: Pipeline) -> Pipeline:
    """A copy that learns rounding and steps region by region, once quantizers are in place."""
    if any(item.name == passes.ReconstructBlocks.name for item in built):
        return built
    return built.insert_after(passes.InsertQuantizers.name, passes.ReconstructBlocks())


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("", "any model: affine formats, ranges by what outputs see or by histograms", _int),
        Family("ris", "vision and text together: dual regions, outlier channels in groups", _ris),
        Family("sam", "promptable segmentation: one-sided or centred keys, softmax bases", _sam),
        Family("det", "detectors: filtered global loss, log-affine weights in the head", _det),
        Family(
            "vit",
            "vision transformers at few bits: block reconstruction",
            _vit,
            ("int6", "int4", "int3", "w4a8"),
        ),
        Family("sirst", "tiny targets: ranges by Fisher-weighted errors, skips as codes", _sirst),
    )
}


def pipelines() -> dict[str, str]:
    """Names of ready pipelines with one line each.

    Widths are free: ``int<b>``, ``w<b>a<b>``, each with a family prefix such as ``ris_``; the
    suffix ``_recon`` adds block reconstruction to any of them.

    >>> "int8" in pipelines()
    True
    """
    listed = {}
    for family in FAMILIES.values():
        prefix = f"{family.name}_" if family.name else ""
        for width in family.widths:
            listed[f"{prefix}{width}"] = family.purpose
        if family.name not in {"vit", "det"}:
            listed[f"{prefix}int4_recon"] = f"{family.purpose}; rounding learned by blocks"
    for name in ("sirst_mixed", "sirst_mixed_recon"):
        listed[name] = "encoder-decoders in mixed precision: bits by resolution level, budgeted"
    return listed


def pipeline(
    name: str, budget: Mapping[str, float] | None = None, **options: object
) -> Pipeline:  # fmt: skip
    """A pipeline by name, its options set.

    Args:
        name: ``int8``, ``w4a8``, ``ris_int4``, ``sirst_mixed``, ...
        budget: limits for mixed precision, such as ``{"size": 0.14, "bops": 0.05}`` (shares of the
            float network); adds `AssignBits` behind calibration, or sets its budget.
        **options: fields of its passes, such as ``scope="linear"``; an option that several
            passes have is set in all of them.

    Raises:
        ConfigError: unknown name or option (nearest valid ones are named), or bits outside 2..16.

    >>> print(pipeline("int8", scope="linear")["plan-sites"])
    plan-sites(scope='linear')
    """
    built = _named(name)
    if budget is not None:
        built = budgeted(built, budget)
    return with_options(built, options) if options else built


def _named(name: str) -> Pipeline:
    if name in {"sirst_mixed", "sirst_mixed_recon"}:
        built = dataclasses.replace(sirst_mixed(), name=name)
        return reconstructed(built) if name.endswith("_recon") else built
    match = _NAME.fullmatch(name)
    family = FAMILIES.get(match["family"] or "") if match else None
    if match is None or family is None:
        offered = plugins.find_pipeline(name)
        if offered is None:
            raise unknown_name("pipeline", name, [*pipelines(), *plugins.names(plugins.PIPELINES)])
        return offered
    weight_bits = check_bits(int(match["both"] or match["w"]))
    activation_bits = check_bits(int(match["both"] or match["a"]))
    built = Pipeline(name, family.build(weight_bits, activation_bits))
    return reconstructed(built) if match["recon"] else built


def with_options(built: Pipeline, options: dict[str, object]) -> Pipeline:
    """Set fields of the pipeline's passes by name."""
    known = {f.name for item in built for f in dataclasses.fields(item)}
    for option in options:
        if option not in known:
            raise unknown_name("pipeline option", option, known)
    edited = []
    for item in built:
        names = {f.name for f in dataclasses.fields(item)} & options.keys()
        edited.append(dataclasses.replace(item, **{n: options[n] for n in names}))
    return dataclasses.replace(built, passes=tuple(edited), options=dict(options))


def parse(text: str) -> Pipeline:
    """Read back what ``str(pipeline)`` printed.

    Raises:
        ConfigError: on text that is not a pipeline, or an unknown pass or option.
    """
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if not lines or not lines[0].endswith(":"):
        msg = f"a pipeline's text starts with its name and a colon, got {text[:40]!r}"
        raise ConfigError(msg)
    return Pipeline(lines[0][:-1], tuple(parse_pass(line) for line in lines[1:]))


def parse_pass(line: str) -> Pass:
    """Read one pass, such as ``plan-sites(weight_bits=4)``."""
    name, _, rest = line.partition("(")
    try:
        call = ast.parse(f"f({rest}" if rest else "f()", mode="eval").body
        assert isinstance(call, ast.Call)
        given = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, AssertionError) as error:
        msg = f"cannot read the options of {line!r}: {error}"
        raise ConfigError(msg) from error
    return make_pass(name, given)


def make_pass(name: str, options: dict[str, object]) -> Pass:
    """A pass by name, of qgraph or of an installed package.

    Raises:
        ConfigError: an unknown pass or option, or options that the pass refuses.
    """
    known = {cls.name: cls for cls in passes.ALL}
    cls = known.get(name) or plugins.find_pass(name)
    if cls is None:
        raise unknown_name("pass", name, [*known, *plugins.names(plugins.PASSES)])
    fields = {f.name for f in dataclasses.fields(cls) if f.init}
    for option in options:
        if option not in fields:
            raise unknown_name(f"option of {name}", option, fields)
    try:
        return cls(**options)
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        msg = f"{name} does not take {options}: {error}"
        raise ConfigError(msg) from error
