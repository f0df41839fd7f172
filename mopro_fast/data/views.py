"""The two views on a CPU: a few threads crop, resize, mirror and colour, in C++ (csrc/views.cpp).

Where the package was built without a C++ compiler PyTorch does it: the same colours to the bit, crops within one level.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import torch

from mopro_fast.data.augment import Views, crop_boxes
from mopro_fast.ops.colour import Jitter, color_jitter

try:
    from mopro_fast import _views
except ImportError:
    _views = None

_PIXELS = 1 << 18  # of a view per task


class Cropper:
    """Makes batches of views in ``threads`` threads."""

    def __init__(self, image_size: int, threads: int) -> None:
        self._size, self._threads = image_size, threads
        self._pool: ThreadPoolExecutor | None = None

    def start(self, images: list[np.ndarray], views: Views, both: bool) -> Callable[[], list[torch.Tensor]]:
        """Begin on uint8 [H, W, 3] images, which must live until the function returned has given the result.

        It gives view_q and, if ``both``, view_k: uint8 [n, S, S, 3].
        """
        self._pool = self._pool or ThreadPoolExecutor(self._threads, "mopro_fast-views")
        n, size = len(images), self._size
        shapes = np.array([image.shape[:2] for image in images])
        plans = [(crop_boxes(shapes, crops), crops.flip) for crops in ((views.q, views.k) if both else (views.q,))]
        out = [np.empty((n, size, size, 3), np.uint8) for _ in plans]
        each = max(1, min(_PIXELS // size**2, -(-n // self._threads)))

        def work(rows: slice) -> None:
            for view, (boxes, flips) in zip(out, plans, strict=True):
                _crop(images[rows], boxes[rows], flips[rows], view[rows])
            if both:
                _color(out[1][rows], views.jitter[rows])

        tasks = [self._pool.submit(work, slice(first, min(first + each, n))) for first in range(0, n, each)]

        def result() -> list[torch.Tensor]:
            wait(tasks)  # also those after one that fails: all read the images
            for task in tasks:
                task.result()
            return [torch.from_numpy(view) for view in out]

        return result

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _crop(images: list[np.ndarray], boxes: np.ndarray, flips: np.ndarray, out: np.ndarray) -> None:
    """Fill uint8 [n, S, S, 3]: crop, resize, flip."""
    if _views is not None:
        _views.crop(images, boxes, flips, out)
        return
    for image, (top, left, height, width), flip, view in zip(images, boxes.tolist(), flips, out, strict=True):
        box = torch.from_numpy(image[top : top + height, left : left + width].copy()).permute(2, 0, 1)[None]
        resized = torch.nn.functional.interpolate(box, view.shape[:2], mode="bilinear", antialias=True)
        np.copyto(view[:, ::-1] if flip else view, resized[0].permute(1, 2, 0).numpy())


def _color(view: np.ndarray, jitter: Jitter) -> None:
    """uint8 [n, S, S, 3], in place."""
    if _views is not None:
        _views.color_jitter(view, jitter.gray, jitter.factors, jitter.order)
    else:
        view[:] = color_jitter(torch.from_numpy(view), jitter).numpy()
