"""The two views on a CPU: crops, resized and coloured by PyTorch in a few threads.

PyTorch's antialiased resize of uint8 images is Pillow's to within one level and four times as fast as DALI's.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from mopro_fast.data import colors
from mopro_fast.data.augment import Crops, Views, crop_boxes

_PIXELS = 1 << 18  # of a view per task


class Cropper:
    """Makes batches of views in ``threads`` threads, each of them one of PyTorch's."""

    def __init__(self, image_size: int, threads: int) -> None:
        self._size, self._threads = image_size, threads
        self._pool: ThreadPoolExecutor | None = None

    def start(self, images: list[np.ndarray], views: Views, both: bool) -> Callable[[], list[torch.Tensor]]:
        """Begin on uint8 [H, W, 3] images, which must live until the function returned has given the result.

        It gives view_q and, if ``both``, view_k: uint8 [n, S, S, 3].
        """
        self._pool = self._pool or _pool(self._threads)
        n, size = len(images), self._size
        shapes = np.array([image.shape[:2] for image in images])
        plans = [(crop_boxes(shapes, crops), crops) for crops in ((views.q, views.k) if both else (views.q,))]
        out = [torch.empty(n, size, size, 3, dtype=torch.uint8) for _ in plans]
        each = max(1, min(_PIXELS // size**2, -(-n // self._threads)))

        def work(rows: slice) -> None:
            for view, (boxes, crops) in zip(out, plans, strict=True):
                _crop(view[rows], images[rows], boxes[rows], crops, rows.start)
            if both:
                colors.jitter_(out[1][rows], views.jitter[rows])

        tasks = [self._pool.submit(work, slice(first, min(first + each, n))) for first in range(0, n, each)]

        def result() -> list[torch.Tensor]:
            for task in tasks:
                task.result()
            return out

        return result

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _crop(view: torch.Tensor, images: list[np.ndarray], boxes: np.ndarray, crops: Crops, first: int) -> None:
    """Fill uint8 [n, S, S, 3]: crop, resize, flip."""
    size = list(view.shape[1:3])
    planes = view.permute(0, 3, 1, 2)
    for i, (image, (top, left, height, width)) in enumerate(zip(images, boxes.tolist(), strict=True)):
        box = torch.from_numpy(np.ascontiguousarray(image[top : top + height, left : left + width]))
        torch.ops.aten._upsample_bilinear2d_aa.out(
            box.permute(2, 0, 1)[None], size, False, None, None, out=planes[i : i + 1]
        )
        if crops.flip[first + i]:
            view[i].copy_(view[i].flip(1))


def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads whose PyTorch operations run on themselves alone."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "mopro_fast-views", initializer=torch.set_num_threads, initargs=(1,))
    started = threading.Barrier(threads + 1)
    for _ in range(threads):
        pool.submit(started.wait)
    started.wait()
    torch.set_num_threads(before)  # the number is kept per thread, but later threads start with the last one set
    return pool
