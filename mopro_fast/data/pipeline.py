"""The loaders: DALI reads, decodes, crops and flips on a CPU or GPU; the colours follow in augment.py.

They keep no state. The order of an epoch is a function of (seed, epoch), the random numbers of a batch one of
(seed, epoch, step) and the row in the batch of all ranks. So a run resumes exactly at any step without anything
of the loader in a checkpoint, and W ranks with N rows see the pixels of one rank with W·N.

Pixels are read as stored: EXIF orientation is ignored, as in the official code. Resizing is Pillow's antialiased
bilinear filter, but at a crop's border it sees the pixels beyond.
"""

from collections import deque
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from mopro_fast.data.augment import (
    ATTEMPTS,
    WIDEST,
    AugmentConfig,
    Crops,
    Jitter,
    Views,
    color_jitter,
    draw,
    to_device,
)
from mopro_fast.data.index import Index
from mopro_fast.errors import UserError

_ORDER, _AUGMENT = range(2)  # first words of the generators' seeds
_EVAL_PREFETCH = 2


class Batch(NamedTuple):
    """One rank's rows of a step, on the loader's device."""

    view_q: torch.Tensor
    """uint8 [N, S, S, 3]."""
    view_k: torch.Tensor | None
    """uint8 [N, S, S, 3], or None with one view."""
    labels: torch.Tensor
    """int64 [N]; -1: none given."""
    ids: torch.Tensor
    """int64 [N]: rows of the index."""


class TrainLoader:
    """Endless, seekable training batches: ``for batch in loader.epoch(e, start_step)``.

    One DALI pipeline serves all epochs and works ``prefetch`` batches ahead, also across the end of an epoch. Asking
    for another position than the next one drops what it has prepared. ``batch_size`` counts this rank's rows.
    """

    def __init__(
        self,
        index: Index,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        image_size: int,
        augment: AugmentConfig,
        two_views: bool = True,
        device: torch.device,
        threads: int,
        prefetch: int = 2,
    ) -> None:
        self.steps_per_epoch = len(index) // (batch_size * world_size)
        if self.steps_per_epoch == 0:
            raise UserError(
                f"batch larger than the data: {batch_size * world_size} rows over all ranks, {len(index)} images in "
                f"{index.source}: lower --batch-size"
            )
        self._index, self._augment, self._two_views, self._device = index, augment, two_views, device
        self._batch_size, self._rank, self._world_size, self._seed = batch_size, rank, world_size, seed
        self._prefetch = prefetch
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))  # an epoch and its order
        views = 2 if two_views else 1

        def define(fn, images, shape, numbers):
            boxes = _crops(fn, shape, numbers, views)
            return [fn.resize(images, size=[image_size] * 2, roi_start=a, roi_end=b) for a, b in boxes]

        self._decoder = _Decoder(define, batch_size, threads, device)
        self._coming: deque[tuple[tuple[int, int], np.ndarray, Jitter]] = deque()  # what the decoder works on

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of steps [start_step, steps_per_epoch) of this epoch."""
        for step in range(start_step, self.steps_per_epoch):
            yield self._batch((epoch, step))

    def close(self) -> None:
        """Stop DALI's threads and free its memory. The loader starts again when asked for a batch."""
        self._coming.clear()
        self._decoder.close()

    def _batch(self, position: tuple[int, int]) -> Batch:
        if self._coming and self._coming[0][0] != position:
            self._coming.clear()
            self._decoder.drop()
        following = self._after(self._coming[-1][0]) if self._coming else position
        while len(self._coming) <= self._prefetch:
            self._submit(following)
            following = self._after(following)
        _, rows, jitter = self._coming.popleft()
        try:
            views = self._decoder.take()
        except UserError:
            self._coming.clear()
            raise
        view_k = color_jitter(views[1], jitter) if self._two_views else None
        labels, ids = to_device(np.stack([self._index.labels[rows], rows]), self._device)
        return Batch(views[0], view_k, labels, ids)

    def _after(self, position: tuple[int, int]) -> tuple[int, int]:
        epoch, step = position
        return (epoch, step + 1) if step + 1 < self.steps_per_epoch else (epoch + 1, 0)

    def _submit(self, position: tuple[int, int]) -> None:
        rows, views = self._rows(*position), self._draw(*position)
        crops = [views.q, views.k] if self._two_views else [views.q]
        self._decoder.submit([self._index.full_path(i) for i in rows], _pack(crops))
        self._coming.append((position, rows, views.jitter))

    def _rows(self, epoch: int, step: int) -> np.ndarray:
        """int64 [N]: the index's rows that this rank shows at this step."""
        if self._order[0] != epoch:
            rng = np.random.default_rng((_ORDER, self._seed, epoch))
            self._order = (epoch, rng.permutation(len(self._index)))
        first = (step * self._world_size + self._rank) * self._batch_size
        return self._order[1][first : first + self._batch_size]

    def _draw(self, epoch: int, step: int) -> Views:
        rng = np.random.Generator(np.random.PCG64((_AUGMENT, self._seed, epoch, step)))
        return draw(rng, self._batch_size, self._augment, skip=self._rank * self._batch_size)


class EvalLoader:
    """Every image once over all ranks (rank r has rows r::W): shorter side to ``resize``, central crop.

    Iterate, as often as needed, over (images uint8 [n, S, S, 3], labels int64 [n], ids int64 [n]) on ``device``; the
    last batch may be smaller, and a rank may have none.
    """

    def __init__(
        self,
        index: Index,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        image_size: int,
        resize: int,
        device: torch.device,
        threads: int,
    ) -> None:
        if resize < image_size:
            raise UserError(f"cannot crop {image_size} px from a shorter side of {resize} px: raise --eval-resize")
        self._index, self._device = index, device
        mine = np.arange(rank, len(index), world_size)
        self._batches = [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]

        def define(fn, images, shape, _numbers):
            start, end = _central(fn, shape, resize, image_size)
            return [fn.resize(images, size=[image_size] * 2, roi_start=start, roi_end=end)]

        self._decoder = _Decoder(define, batch_size, threads, device)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        self._decoder.drop()  # what an abandoned pass has left
        later = deque(self._batches)
        for rows in self._batches:
            while later and len(self._decoder) <= _EVAL_PREFETCH:
                ahead = later.popleft()
                self._decoder.submit([self._index.full_path(i) for i in ahead])
            (images,) = self._decoder.take()
            labels, ids = to_device(np.stack([self._index.labels[rows], rows]), self._device)
            yield images, labels, ids

    def close(self) -> None:
        """Stop DALI's threads and free its memory. The loader starts again when iterated over."""
        self._decoder.close()


class _Decoder:
    """A DALI pipeline from files and numbers to image batches: submit() any number ahead, take() in that order.

    define(fn, images, shape, numbers) gives the outputs from the decoded images, their int64 (H, W, C) and the
    submitted float64 numbers; ``fn`` is nvidia.dali.fn.
    """

    def __init__(self, define: Callable[..., list], batch_size: int, threads: int, device: torch.device) -> None:
        self._define, self._batch_size, self._threads, self._device = define, batch_size, threads, device
        self._dali = _import_dali()
        self._pipeline: Any = None
        self._files: deque[list[str]] = deque()  # of the batches submitted and not taken

    def __len__(self) -> int:
        return len(self._files)

    def submit(self, files: list[str], numbers: np.ndarray | None = None) -> None:
        """Start on a batch: n paths and float64 [n, ...], if ``define`` uses numbers."""
        if self._pipeline is None:
            self._pipeline = self._build()
        # One array, padded with zero bytes (where a path ends in C): a list of arrays takes three times as long.
        names = np.array([file.encode() for file in files])
        self._pipeline.feed_input("files", names.view(np.uint8).reshape(len(files), -1))
        if numbers is not None:
            self._pipeline.feed_input("numbers", numbers)
        self._pipeline.schedule_run()
        self._files.append(files)

    def take(self) -> list[torch.Tensor]:
        """The outputs for the oldest batch submitted. A file that DALI cannot read raises a UserError."""
        files = self._files.popleft()
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            outputs = self._pipeline.share_outputs(cuda_stream=stream)
        except RuntimeError as error:
            self.close()
            raise self._explain(str(error), files) from error
        tensors = [self._copy(output.as_tensor(), stream) for output in outputs]
        self._pipeline.release_outputs()
        return tensors

    def drop(self) -> None:
        """Forget the batches submitted and not taken."""
        while self._files:
            self._files.popleft()
            try:
                self._pipeline.share_outputs()
                self._pipeline.release_outputs()
            except RuntimeError:  # a broken file among them, and with it the pipeline
                self.close()

    def close(self) -> None:
        self._files.clear()
        self._pipeline = None

    def _build(self) -> Any:
        fn, types, device = self._dali.fn, self._dali.types, self._device
        gpu = device.type == "cuda"
        device_id = torch.cuda.current_device() if gpu and device.index is None else device.index
        # Depth 1: then each schedule_run runs one batch; the executor works ahead on all that are scheduled anyway.
        pipeline = self._dali.Pipeline(
            batch_size=self._batch_size,
            num_threads=self._threads,
            device_id=device_id if gpu else None,
            prefetch_queue_depth=1,
        )
        with pipeline:
            # Not by mmap: a file cut short meanwhile would end the process with SIGBUS.
            encoded = fn.io.file.read(fn.external_source(name="files"), dont_use_mmap=True)
            numbers = fn.external_source(name="numbers")
            shape = fn.peek_image_shape(encoded, adjust_orientation=False)
            images = fn.decoders.image(
                encoded, device="mixed" if gpu else "cpu", output_type=types.RGB, adjust_orientation=False
            )
            pipeline.set_outputs(*self._define(fn, images, shape, numbers))
        pipeline.build()
        return pipeline

    def _explain(self, error: str, files: list[str]) -> UserError:
        """For a batch that DALI gave up. Its message names no file, so the files are tried one by one."""
        if len(files) > 1:
            single = _Decoder(lambda fn, images, shape, numbers: [images], 1, self._threads, self._device)
            for file in files:
                single.submit([file])
                single.take()  # raises at the broken one
            files = [f"one of {files[0]} ... {files[-1]}"]
        reason = error.partition("encountered:")[2].strip().partition("\n")[0] or "DALI gives no reason"
        return UserError(f"cannot read the image {files[0]} ({reason}): replace the file, or remove it from the data")

    def _copy(self, tensor: Any, stream: torch.cuda.Stream | None) -> torch.Tensor:
        """Out of DALI's memory, in the order of ``stream``."""
        copy = torch.empty(tensor.shape(), dtype=torch.uint8, device=self._device)
        return self._dali.plugin.pytorch.feed_ndarray(tensor, copy, cuda_stream=stream)


def _import_dali() -> ModuleType:
    try:
        import nvidia.dali as dali
        import nvidia.dali.plugin.pytorch  # noqa: F401
    except ImportError as error:
        raise UserError(f"reading images needs NVIDIA DALI ({error}): pip install nvidia-dali-cuda130") from None
    return dali


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
