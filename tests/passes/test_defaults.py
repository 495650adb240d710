# SPDX-License-Identifier: Apache-2.0
"""What a pass does when nobody says otherwise: named pipelines and saved configurations rely on it.

A new default changes the results of everybody who named none, so it is changed here as well.
"""

from __future__ import annotations

import dataclasses

import pytest

from qgraph import passes
from qgraph.calibration.probability_formats import FAMILIES

DEFAULTS: dict[str, dict[str, object]] = {
    "drop_noops": {},
    "normalize_ops": {},
    "fold_batch_norm": {},
    "open_attention": {},
    "plan_sites": {
        "weight_bits": 8, "activation_bits": 8, "ends_bits": 8, "embedding_bits": None,
        "scope": "full",
    },
    "plan_heads": {
        "last": "float", "adds": "8", "parts": "all", "boxes": (), "classes": (), "head": (),
    },
    "raise_precision": {
        "high_bits": 8, "high_kinds": ("conv", "conv_transpose"), "heads": True, "high": (),
        "roles": ("weight", "activation"),
    },
    "calibrate": {"max_batches": None},
    "assign_bits": {
        "budget": {}, "effort": None, "mode": "free", "weight_choices": (2, 3, 4, 5, 6, 8),
        "activation_choices": (3, 4, 5, 6, 8), "sensitivity": "fisher", "output": "plain",
        "rows": 8, "choose_clips": True,
    },
    "center_keys": {"min_gain": 0.05, "key_method": None, "force_centring": False},
    "fold_key_signs": {"min_gain": 0.05, "key_method": None, "force_signs": False},
    "search_softmax_base": {
        "formats": FAMILIES, "min_gain_db": 0.0, "attention_rows": 128, "per_head": False,
    },
    "use_dual_regions": {
        "min_gain_db": 0.5, "enough_db": 40.0, "max_shift": None, "rows": 128, "skip": (),
        "force": (),
    },
    "reorder_channels": {
        "groups": 4, "grouping": "best", "tied": True, "zero_points": True, "tile": 4,
        "reorder": True, "elements": False, "min_gain_db": 0.5, "enough_db": 40.0,
        "kinds": ("linear", "conv"), "rows": 128, "skip": (), "force": (),
    },
    "balance_channels": {"min_gain_db": 0.5, "rows": 128, "skip": ()},
    "choose_ranges": {"method": "auto", "rows": 128, "add_sqnr": 35.0, "brief_from": 8},
    "use_log_affine": {
        "part": "head", "min_gain_db": 0.0, "decoder": "exact", "reserve_zero": False,
        "boxes": (), "classes": (), "head": (), "skip": (),
    },
    "choose_weight_scales": {"norm": 2.0, "clip_below": 8},
    "insert_quantizers": {},
    "compensate_rounding": {
        "rows": 2048, "per_sample": 32, "damping": 0.3, "ridge": 1.0, "rounds": 2, "relative": 1.5,
    },
    "correct_biases": {"rows": 1024, "per_sample": 32, "relative": 1.5},
    "tune_ranges": {
        "steps": 120, "batch": 16, "step_lr": 4e-3, "table_lr": 1e-2, "bias_lr": 1e-3,
        "scale_lr": 5e-4, "max_samples": 256,
    },
    "reconstruct_blocks": {
        "granularity": "auto", "steps": 400, "batch": 16, "lr": None, "step_lr": 2e-3,
        "drop": 0.5, "regularizer": 0.01, "rounding": "adaround", "learn_steps": True,
        "global_weight": 0.0, "global_every": 4, "global_target": "features",
        "objective_weight": 1.0, "objective_every": 2, "importance": True, "local_weight": 0.0,
        "max_samples": 1024, "warm_start": True, "damping": 0.3,
    },
    "hoist_quantizers": {},
    "quantize_biases": {},
    "pack_weights": {},
}  # fmt: skip


@pytest.mark.parametrize("each", passes.ALL, ids=lambda each: each.name)
def test_a_pass_without_options_is_what_it_always_was(each):
    made = each()
    found = {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}
    told = DEFAULTS[each.name.replace("-", "_")]
    assert {name: found.get(name) for name in told} == told
    new = {name: value for name, value in found.items() if name not in told}
    assert not any(isinstance(value, int) for value in new.values()), "say its default above"
