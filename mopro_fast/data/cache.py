"""Loaders for data that fits in the device's memory: every image is decoded once, and stays there as uint8.

Order and random numbers are those of the loaders in pipeline.py, so the same steps show the same images with the same
boxes, flips and colours; the pixels are those of Pillow within one level (tests/test_cache.py has the amounts).
DALI is not needed. Each rank decodes and holds all images.
"""

import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import torch
from PIL import Image

from mopro_fast import ops
from mopro_fast.console import Progress
from mopro_fast.data import decode
from mopro_fast.data.augment import crop_boxes
from mopro_fast.data.batches import Batch, EvalBatches, TrainBatches
from mopro_fast.data.decode import DecodeError
from mopro_fast.data.index import Index
from mopro_fast.data.reader import Broken, Lost, Verified
from mopro_fast.data.waiting import results_of
from mopro_fast.errors import UserError
from mopro_fast.ops.two_views import largest_side
from mopro_fast.transfer import to_device

_CHUNK = 1024  # images decoded ahead at most: what an interruption waits for, and what lies in memory


class DeviceTrainLoader(TrainBatches):
    """Training batches of images on ``device``: a batch is one copy to the device and one kernel there.

    ``threads`` decode the images, here, once it is known that they fit the memory: else a UserError.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._images = np.zeros((len(self.index), 3), np.int64)  # offset in _pixels, height, width; zeros: not there
        self._reasons: dict[int, str] = {}  # why those are not there that should be
        self._pixels: torch.Tensor | None = self._decode()

    def close(self) -> None:
        """Free the images' memory. The loader decodes again when asked for a batch."""
        self._pixels = None

    def memory(self) -> str:
        """What the images take, for the log."""
        count = (self._images[:, 1] > 0).sum()
        return f"{count} images on {self.device} ({3 * self._images[:, 1:].prod(1).sum() / 1e6:.0f} MB)"

    def _decode(self) -> torch.Tensor:
        """All images' pixels, uint8 [bytes]; sets _images and _reasons."""
        rows, largest = self.index.usable, largest_side(self.image_size)
        shapes = _shapes(self.index, rows, self.threads)
        if (shapes > largest).any():
            first = (shapes > largest).any(1).argmax()
            height, width = shapes[first]
            raise UserError(
                f"{self.index.name(rows[first])} has {width}x{height} pixels, --cache device takes sides of at most "
                f"{largest}: pack the data with a smaller --size, or use --cache no"
            )
        ends = 3 * shapes.prod(1).cumsum()
        needed = int(ends[-1])
        _require_memory(needed, len(rows), self.device)
        pixels = torch.empty(needed, dtype=torch.uint8, device=self.device)
        self._images[:], self._reasons = 0, {}
        found = decoded(self.index, rows, self.threads, show=self.rank == 0)
        for row, end, shape, image in zip(rows, ends, shapes, found, strict=True):
            if isinstance(image, str):
                self._reasons[row] = image
            elif image.size != 3 * shape.prod():
                self._reasons[row] = f"not the {shape[1]}x{shape[0]} pixels that its header names"
            else:
                pixels[end - image.size : end] = torch.from_numpy(image.reshape(-1).copy())
                self._images[row] = end - image.size, *image.shape[:2]
        return pixels

    def _batch(self, epoch: int, step: int) -> Batch:
        if self._pixels is None:
            self._pixels = self._decode()
        rows, drawn = self._readable(epoch, step), self._draw(epoch, step)
        images, jitter = self._images[rows], drawn.jitter
        crops = [drawn.q, drawn.k] if self.two_views else [drawn.q]
        boxes = np.stack([crop_boxes(images[:, 1:], crop) for crop in crops], axis=1)
        flips = np.stack([crop.flip for crop in crops], axis=1)
        labels, ids, images, boxes, order, factors, flips, gray = _together(
            [self.index.labels[rows], rows, images, boxes, jitter.order, jitter.factors, flips, jitter.gray],
            self.device,
        )
        views = ops.two_views(self._pixels, images, boxes, flips, gray, factors, order, self.image_size)
        return Batch(views[0], views[1] if self.two_views else None, labels, ids)

    def _readable(self, epoch: int, step: int) -> np.ndarray:
        """The rows of :meth:`_rows`, those that are not there replaced."""
        rows = self.rows(epoch, step)
        for i in np.flatnonzero(self._images[rows, 1] == 0):
            row = int(rows[i])
            others = self._others(epoch)(row)
            there = others[self._images[others, 1] > 0]
            if not there.size:
                raise UserError(
                    f"cannot read {self.index.name(row)} ({self._reasons[row]}), nor any of {len(others)} images "
                    "tried in its place: is the storage still there?"
                )
            rows[i] = there[0]
            self.lost.append((epoch, step, Lost(row, int(there[0]), self._reasons[row])))
        return rows


class DeviceEvalLoader(EvalBatches):
    """Evaluation batches of images on ``device``, resized and cropped by Pillow; ``lost`` has those not decoded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._there = self._rows  # those of them that are in _images
        self._images: torch.Tensor | None = self._decode()

    def __len__(self) -> int:
        return -(-len(self._there) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        if self._images is None:
            self._images = self._decode()
        for first in range(0, len(self._there), self.batch_size):
            rows = self._there[first : first + self.batch_size]
            labels, ids = _together([self.index.labels[rows], rows], self.device)
            yield self._images[first : first + self.batch_size], labels, ids

    def close(self) -> None:
        """Free the images' memory. The loader decodes again when iterated over."""
        self._images = None

    def _decode(self) -> torch.Tensor:
        """uint8 [n, S, S, 3]; sets _rows and lost."""
        wanted, size = self._rows, self.image_size
        _require_memory(3 * len(wanted) * size**2, len(wanted), self.device)
        images = torch.empty(len(wanted), size, size, 3, dtype=torch.uint8, device=self.device)
        rows, self.lost = [], []

        def crop(image: np.ndarray) -> np.ndarray:
            return central_crop(image, self.resize, size)

        found = decoded(self.index, wanted, self.threads, self.rank == 0, crop)
        for row, image in zip(wanted.tolist(), found, strict=True):
            if isinstance(image, str):
                self.lost.append(Lost(row, -1, image))
            else:
                images[len(rows)] = torch.from_numpy(image)
                rows.append(row)
        self._there = np.array(rows, np.int64)
        return images[: len(rows)]


def central_crop(image: np.ndarray, resize: int, size: int) -> np.ndarray:
    """torchvision's Resize(resize) and CenterCrop(size)."""
    height, width, _ = image.shape
    short = min(height, width)
    height, width = height * resize // short, width * resize // short  # the longer side is cut to a whole number
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    return np.array(resized.crop((left, top, left + size, top + size)))


def _shapes(index: Index, rows: np.ndarray, threads: int) -> np.ndarray:
    """int64 [n, 2]: height and width as the check found them, or of the headers, before any turn; zeros: unknown."""
    if index.checked is not None:
        return np.stack([index.checked.height, index.checked.width], axis=1)[rows].astype(np.int64)
    images = Verified(index, threads)

    def shape(row: int) -> tuple[int, int]:
        try:
            width, height = Image.open(io.BytesIO(images.read(row)[0])).size
        except Exception:  # Pillow raises many kinds; decoding will name the reason
            return 0, 0
        return height, width

    with closing(images), ThreadPoolExecutor(threads) as pool:
        return np.array(list(pool.map(shape, rows.tolist())), np.int64).reshape(-1, 2)


def decoded(
    index: Index,
    rows: np.ndarray,
    threads: int,
    show: bool,
    then: Callable[[np.ndarray], np.ndarray] = lambda image: image,
) -> Iterator[np.ndarray | str]:
    """then(pixels of each row), or why it cannot be read; with progress where it is to be shown."""

    images = Verified(index, threads)

    def work(row: int) -> np.ndarray | str:
        try:
            return then(decode.decode(images.read(row)[0]))
        except (Broken, DecodeError) as error:
            return str(error)

    bar = Progress("decoding", len(rows), "images", active=show)
    with closing(images), ThreadPoolExecutor(threads) as pool, bar:
        for first in range(0, len(rows), _CHUNK):
            chunk = rows[first : first + _CHUNK].tolist()
            for row, task in [(row, pool.submit(work, row)) for row in chunk]:
                yield results_of([task], [lambda row=row: index.name(row)])[0]
                bar.update()


def _require_memory(needed: int, images: int, device: torch.device) -> None:
    free = _free(device)
    if needed > free:
        raise UserError(
            f"--cache device needs {needed} bytes for {images} images, {device} has {free} free: "
            "pack the data with a smaller --size, or use --cache no"
        )


def _free(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _together(arrays: list[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """To the device in one copy. By falling size of their elements, so that each begins at a multiple of its own."""
    flat = [np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in arrays]
    parts = to_device(np.concatenate(flat), device).split([len(f) for f in flat])
    types = [torch.from_numpy(np.empty(0, a.dtype)).dtype for a in arrays]
    return [part.view(t).view(a.shape) for part, t, a in zip(parts, types, arrays, strict=True)]
