# SPDX-License-Identifier: Apache-2.0
"""Transformations, one file each, named after what it does."""

from qgraph.passes.assign_bits import AssignBits
from qgraph.passes.balance_channels import BalanceChannels
from qgraph.passes.calibrate import Calibrate
from qgraph.passes.center_keys import CenterKeys
from qgraph.passes.choose_ranges import ChooseRanges
from qgraph.passes.choose_weight_scales import ChooseWeightScales
from qgraph.passes.compensate_rounding import CompensateRounding
from qgraph.passes.correct_biases import CorrectBiases
from qgraph.passes.drop_noops import DropNoops
from qgraph.passes.fold_batch_norm import FoldBatchNorm
from qgraph.passes.fold_key_signs import FoldKeySigns
from qgraph.passes.hoist_quantizers import HoistQuantizers
from qgraph.passes.insert_quantizers import InsertQuantizers
from qgraph.passes.normalize_ops import NormalizeOps
from qgraph.passes.open_attention import OpenAttention
from qgraph.passes.pack_weights import PackWeights
from qgraph.passes.plan_heads import PlanHeads
from qgraph.passes.plan_sites import PlanSites
from qgraph.passes.quantize_biases import QuantizeBiases
from qgraph.passes.raise_precision import RaisePrecision
from qgraph.passes.reconstruct_blocks import ReconstructBlocks
from qgraph.passes.reorder_channels import ReorderChannels
from qgraph.passes.search_softmax_base import SearchSoftmaxBase
from qgraph.passes.tune_ranges import TuneRanges
from qgraph.passes.use_dual_regions import UseDualRegions
from qgraph.passes.use_log_affine import UseLogAffine
from qgraph.pipeline import Pass

ALL: tuple[type[Pass], ...] = (
    DropNoops,
    NormalizeOps,
    FoldBatchNorm,
    OpenAttention,
    PlanSites,
    PlanHeads,
    RaisePrecision,
    Calibrate,
    AssignBits,
    CenterKeys,
    FoldKeySigns,
    SearchSoftmaxBase,
    UseDualRegions,
    ReorderChannels,
    BalanceChannels,
    ChooseRanges,
    UseLogAffine,
    ChooseWeightScales,
    InsertQuantizers,
    CompensateRounding,
    CorrectBiases,
    TuneRanges,
    ReconstructBlocks,
    HoistQuantizers,
    QuantizeBiases,
    PackWeights,
)

__all__ = [
    "ALL",
    "AssignBits",
    "BalanceChannels",
    "Calibrate",
    "CenterKeys",
    "ChooseRanges",
    "ChooseWeightScales",
    "CompensateRounding",
    "CorrectBiases",
    "DropNoops",
    "FoldBatchNorm",
    "FoldKeySigns",
    "HoistQuantizers",
    "InsertQuantizers",
    "NormalizeOps",
    "OpenAttention",
    "PackWeights",
    "PlanHeads",
    "PlanSites",
    "QuantizeBiases",
    "RaisePrecision",
    "ReconstructBlocks",
    "ReorderChannels",
    "SearchSoftmaxBase",
    "TuneRanges",
    "UseDualRegions",
    "UseLogAffine",
]
