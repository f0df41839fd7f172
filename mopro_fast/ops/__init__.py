"""The operations of one MoPro or CAPro step (public API, see each function).

All work on CPU and CUDA tensors; a trailing underscore means in place. Every op gives the same bits for the
same input on the same device, never waits for the device, has a fake kernel and compiles with
``fullgraph=True``. A wrong shape, dtype, device or coefficient is a ``ValueError`` that names the argument.
"""

from mopro_fast.ops.backends import use_backend
from mopro_fast.ops.batch_norm_act import batch_norm_act
from mopro_fast.ops.batch_norm_relu_pool import batch_norm_relu_pool
from mopro_fast.ops.collective_targets import collective_targets
from mopro_fast.ops.conv1x1_stats import conv1x1_stats_
from mopro_fast.ops.correct_labels import correct_labels
from mopro_fast.ops.ema_update import ema_update_
from mopro_fast.ops.info_nce import info_nce
from mopro_fast.ops.mopro_loss import METRICS, mopro_loss
from mopro_fast.ops.normalize import normalize
from mopro_fast.ops.prototype_contrast import prototype_contrast
from mopro_fast.ops.prototype_update import prototype_update_
from mopro_fast.ops.queue_enqueue import queue_enqueue_
from mopro_fast.ops.sgd_ema_update import sgd_ema_update_
from mopro_fast.ops.soft_neighbour_labels import soft_neighbour_labels
from mopro_fast.ops.two_views import two_views

__all__ = [
    "METRICS",
    "batch_norm_act",
    "batch_norm_relu_pool",
    "collective_targets",
    "conv1x1_stats_",
    "correct_labels",
    "ema_update_",
    "info_nce",
    "mopro_loss",
    "normalize",
    "prototype_contrast",
    "prototype_update_",
    "queue_enqueue_",
    "sgd_ema_update_",
    "soft_neighbour_labels",
    "two_views",
    "use_backend",
]
