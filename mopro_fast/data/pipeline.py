"""The loaders: threads read, DALI decodes on a CPU or GPU, crops and colours follow.

Images are turned upright by their EXIF orientation (the official code ignores it). Resizing is Pillow's antialiased
bilinear filter. On a GPU DALI resizes the training crops too, and its filter sees the pixels beyond their borders.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from mopro_fast.data.augment import ATTEMPTS, WIDEST, Crops
from mopro_fast.data.batches import Batch, EvalBatches, TrainBatches
from mopro_fast.data.reader import Reader
from mopro_fast.data.stream import READ_AHEAD, Decoder, Job, Stream
from mopro_fast.data.views import Cropper
from mopro_fast.ops.colour import color_jitter
from mopro_fast.transfer import to_device

_SAMPLE = 1 << 16  # images of which a mean size is taken
_EVAL_AHEAD = 2  # batches that an evaluation decodes ahead


@dataclass(eq=False, kw_only=True)
class TrainLoader(TrainBatches):
    """Training batches from files or shards, by DALI.

    It works ahead, also across the end of an epoch: on ``prefetch`` batches in DALI (on a CPU, where these are whole
    images: one) and two more that are being read. Asking for another position than the next one drops what it has
    prepared.
    """

    prefetch: int = 2
    hw_decoder_load: float = 0.65
    """Share of the JPEGs for a GPU's own decoder."""
    crop_in_dali: bool | None = None
    """By default on a GPU only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        in_dali = self.device.type == "cuda" if self.crop_in_dali is None else self.crop_in_dali
        self._cropper = None if in_dali else Cropper(self.image_size, self.threads)
        views = 2 if self.two_views else 1

        def define(fn, images, shape, numbers):
            if not in_dali:
                return [images]
            boxes = _crops(fn, shape(), numbers(), views)
            return [fn.resize(images, size=[self.image_size] * 2, roi_start=a, roi_end=b) for a, b in boxes]

        decoder = Decoder(define, self.batch_size, self.threads, self.device, self.hw_decoder_load)
        depth = 1 + self.prefetch if in_dali else 2
        self._stream = Stream(Reader(self.index, self.threads), decoder, depth)
        self._next: tuple[int, int] | None = None  # the position that the stream stands at
        self._cropping: tuple[Job, Callable[[], list[torch.Tensor]]] | None = None

    def close(self) -> None:
        """Stop all threads and free DALI's memory. The loader starts again when asked for a batch."""
        self._drop()
        self._stream.close()
        if self._cropper:
            self._cropper.close()

    def memory(self) -> str:
        """How far the loader works ahead and what that takes, for the log."""
        view = self.batch_size * (2 if self.two_views else 1) * self.image_size**2 * 3
        decoding, checked, shards = self._stream.depth, self.index.checked, self.index.shards
        parts = {f"{decoding if self._cropper is None else 2} batches of views": view * decoding}
        usable = self.index.usable
        some = usable[:: max(1, len(usable) // _SAMPLE)]
        if checked is not None and self._cropper is not None:
            pixels = np.mean(checked.width[some].astype(np.int64) * checked.height[some])
            parts[f"{decoding} of whole images"] = decoding * self.batch_size * 3 * pixels
        sizes = checked.size if checked is not None else shards and shards.size
        if sizes is not None:
            files = (decoding + READ_AHEAD) * self.batch_size
            parts[f"{decoding + READ_AHEAD} of files"] = files * sizes[some].mean()
        return "read and decoded ahead: " + ", ".join(f"{name} ({size / 1e6:.0f} MB)" for name, size in parts.items())

    def _batch(self, epoch: int, step: int) -> Batch:
        position = epoch, step
        if self._next != position:
            self._drop()
            self._stream.restart(self._jobs(position))
        self._next = None  # until this batch is whole: after an error everything starts anew
        job, views = self._crops_of_next() if self._cropper else self._resized_by_dali()
        self._next = self._after(position)
        self.lost += [(*position, lost) for lost in job.read.lost]
        rows = job.read.rows
        labels, ids = to_device(np.stack([self.index.labels[rows], rows]), self.device)
        return Batch(views[0], views[1] if self.two_views else None, labels, ids)

    def _resized_by_dali(self) -> tuple[Job, list[torch.Tensor]]:
        job = self._stream.next()
        views = self._stream.decoder.copies()
        if self.two_views:
            views[1] = color_jitter(views[1], job.drawn.jitter)
        return job, views

    def _crops_of_next(self) -> tuple[Job, list[torch.Tensor]]:
        """This batch's crops; those of the next are begun before they are returned."""
        job, result = self._cropping or self._start_cropping()
        self._cropping = None
        views = result()
        self._stream.decoder.release()
        self._cropping = self._start_cropping()
        return job, views

    def _start_cropping(self) -> tuple[Job, Callable[[], list[torch.Tensor]]]:
        job = self._stream.next()
        return job, self._cropper.start(self._stream.decoder.images(), job.drawn, self.two_views)

    def _drop(self) -> None:
        if self._cropping:
            self._cropping[1]()  # its images are DALI's
            self._stream.decoder.release()
        self._cropping = self._next = None
        self._stream.drop()

    def _after(self, position: tuple[int, int]) -> tuple[int, int]:
        epoch, step = position
        return (epoch, step + 1) if step + 1 < self.steps_per_epoch else (epoch + 1, 0)

    def _jobs(self, position: tuple[int, int]) -> Iterator[Job]:
        while True:
            drawn = self._draw(*position)
            numbers = None if self._cropper else _pack([drawn.q, drawn.k] if self.two_views else [drawn.q])
            yield Job(self.rows(*position), self._others(position[0]), numbers, drawn)
            position = self._after(position)


@dataclass(eq=False, kw_only=True)
class EvalLoader(EvalBatches):
    """Evaluation batches from files or shards, by DALI."""

    hw_decoder_load: float = 0.65
    """Share of the JPEGs for a GPU's own decoder."""
    batches: list[np.ndarray] | None = None
    """What this rank shows instead, int32 or int64 rows of the index, at most batch_size each."""
    filter: Literal["linear", "cubic"] = "linear"
    """Of resizing, antialiased."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batches is None:
            mine, size = self._rows, self.batch_size
            self.batches = [mine[first : first + size] for first in range(0, len(mine), size)]

        def define(fn, images, shape, _numbers):
            from nvidia.dali import types

            start, end = _central(fn, shape(), self.resize, self.image_size)
            kind = {"linear": types.INTERP_LINEAR, "cubic": types.INTERP_CUBIC}[self.filter]
            return [fn.resize(images, size=[self.image_size] * 2, roi_start=start, roi_end=end, interp_type=kind)]

        decoder = Decoder(define, self.batch_size, self.threads, self.device, self.hw_decoder_load)
        self._stream = Stream(Reader(self.index, self.threads), decoder, 1 + _EVAL_AHEAD)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        self._stream.drop()  # what an abandoned pass has left
        self.lost = []
        self._stream.restart(Job(rows, None) for rows in self.batches)
        for _ in self.batches:
            job = self._stream.next()
            self.lost += job.read.lost
            rows = job.read.rows
            if len(rows):
                (images,) = self._stream.decoder.copies()
                labels, ids = to_device(np.stack([self.index.labels[rows], rows]), self.device)
                yield images, labels, ids

    def close(self) -> None:
        """Stop all threads and free DALI's memory. The loader starts again when iterated over."""
        self._stream.close()


# Boxes in DALI's arithmetic, in float64, so that they equal augment.crop_boxes to the last pixel. Python constants
# are float32 there; WIDEST alone is not exact, and its products are never near enough to a half for that to matter.


def _pack(views: list[Crops]) -> np.ndarray:
    """What _crops takes, float64 [n, views, ATTEMPTS + 2, 3].

    Rows: the attempts' (height, width, 10 ... 1), the place (y, x, -), the mirrored directions (0, flip, -).
    """
    numbers = np.zeros((len(views[0].flip), len(views), ATTEMPTS + 2, 3))
    numbers[:, :, :ATTEMPTS, 2] = np.arange(ATTEMPTS, 0, -1)
    for i, view in enumerate(views):
        numbers[:, i, :ATTEMPTS, :2] = view.sides
        numbers[:, i, ATTEMPTS, :2] = view.place
        numbers[:, i, ATTEMPTS + 1, 1] = view.flip
    return numbers


def _crops(fn, shape, numbers, views: int) -> list[tuple[Any, Any]]:
    """Per view roi_start and roi_end of augment.crop_boxes' box; a flip exchanges left and right end.

    An operator costs microseconds per image whatever its size, so all views go through the same ones.
    """
    from nvidia.dali import math, types

    # 1. The sides of all attempts, and those of the central box.
    hw = fn.cast(shape[:2], dtype=types.FLOAT64)
    tried = math.floor(math.sqrt(hw[0] * hw[1]) * numbers[:, :ATTEMPTS, :2] + 0.5)  # [views, 10, 2]
    central = fn.expand_dims(math.min(hw, math.floor(fn.stack(hw[1], hw[0]) * WIDEST + 0.5)), axes=0)
    # 2. The first attempt that fits, else the central box: at place 10 of all sides.
    fits = fn.reductions.min(fn.cast((tried >= 1) & (tried <= hw), dtype=types.INT32), axes=2)
    first = ATTEMPTS - fn.reductions.max(fn.cast(fits * numbers[:, :ATTEMPTS, 2], dtype=types.INT32), axes=1)
    size = fn.stack(*(fn.cat(tried[i], central, axis=0)[first[i]] for i in range(views)))  # [views, 2]
    # 3. Its place: at random, or in the middle for the central box.
    room = hw - size
    found = fn.expand_dims(fn.cast(first < ATTEMPTS, dtype=types.FLOAT64), axes=1)
    corner = found * math.floor(numbers[:, ATTEMPTS, :2] * (room + 1)) + (1 - found) * math.floor(room * 0.5)
    # 4. As two corners, mirrored or not.
    mirror = numbers[:, ATTEMPTS + 1, :2] * size
    start = fn.cast(corner + mirror, dtype=types.FLOAT)
    end = fn.cast(corner + size - mirror, dtype=types.FLOAT)
    return [(start[i], end[i]) for i in range(views)]


def _central(fn, shape, resize: int, image_size: int) -> tuple[Any, Any]:
    """roi of torchvision's Resize(resize) and CenterCrop(image_size) in one: the crop, back in the image's pixels."""
    from nvidia.dali import math, types

    short = math.min(shape[0], shape[1])
    size = shape[:2] * resize // short  # the longer side is cut down to a whole number
    room = size - image_size
    corner = (room + room // 2 - room // 4 * 2) // 2  # room / 2, halves to the even number
    hw = fn.cast(shape[:2], dtype=types.FLOAT64)
    scale = hw / fn.cast(size, dtype=types.FLOAT64)
    start, end = corner * scale, (corner + image_size) * scale
    return fn.cast(start, dtype=types.FLOAT), fn.cast(end, dtype=types.FLOAT)
