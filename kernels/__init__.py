"""Triton kernels, installed as `mopro_fast.kernels`: one file per op, named as the op, imported lazily."""

from mopro_fast.kernels.batch_norm_act import batch_norm_act, batch_norm_act_backward
from mopro_fast.kernels.batch_norm_relu_pool import batch_norm_relu_pool, batch_norm_relu_pool_backward
from mopro_fast.kernels.batch_norm_stats import batch_norm_stats_
from mopro_fast.kernels.conv1x1_stats import conv1x1_stats_
from mopro_fast.kernels.correct_labels import correct_labels
from mopro_fast.kernels.info_nce import info_nce
from mopro_fast.kernels.mopro_loss import mopro_loss, mopro_loss_backward
from mopro_fast.kernels.normalize import normalize
from mopro_fast.kernels.prototype_contrast import prototype_contrast
from mopro_fast.kernels.two_views import two_views

__all__ = [
    "batch_norm_act",
    "batch_norm_act_backward",
    "batch_norm_relu_pool",
    "batch_norm_relu_pool_backward",
    "batch_norm_stats_",
    "conv1x1_stats_",
    "correct_labels",
    "info_nce",
    "mopro_loss",
    "mopro_loss_backward",
    "normalize",
    "prototype_contrast",
    "two_views",
]
