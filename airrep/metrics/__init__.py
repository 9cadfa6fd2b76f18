"""Quality and cost of scores: pure functions of arrays.

Matrices are (targets, subsets) or (targets, pool). Scores are higher = more helpful, losses are
higher = worse, so a good score ranks subsets as the negative loss does. A loss that is not finite
is missing: it is left out for its target, never replaced.
"""

from airrep.metrics.bootstrap import Resamples, interval
from airrep.metrics.calibration import calibration, calibration_bins
from airrep.metrics.ceiling import (
    bootstrap_ceiling,
    noise_ceiling,
    resampled_ceiling,
    share_of_ceiling,
)
from airrep.metrics.cost import break_even
from airrep.metrics.counterfactual import (
    against_random,
    data_selection,
    leave_one_out_correlation,
    tail_removal,
)
from airrep.metrics.lds import (
    bootstrap_lds,
    lds_per_target,
    paired_bootstrap,
    resampled_lds,
    sign_test,
)
from airrep.metrics.linear_gap import linear_gap, linear_gap_per_target
from airrep.metrics.mislabel import harmfulness, mislabel_auc
from airrep.metrics.retrieval import mean_reciprocal_rank, ndcg_at_k, recall_at_k

__all__ = [
    "Resamples",
    "against_random",
    "bootstrap_ceiling",
    "bootstrap_lds",
    "break_even",
    "calibration",
    "calibration_bins",
    "data_selection",
    "harmfulness",
    "interval",
    "lds_per_target",
    "leave_one_out_correlation",
    "linear_gap",
    "linear_gap_per_target",
    "mean_reciprocal_rank",
    "mislabel_auc",
    "ndcg_at_k",
    "noise_ceiling",
    "paired_bootstrap",
    "recall_at_k",
    "resampled_ceiling",
    "resampled_lds",
    "share_of_ceiling",
    "sign_test",
    "tail_removal",
]
