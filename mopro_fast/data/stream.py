"""From rows of an index to decoded images, batch after batch: read ahead by threads, decoded ahead by DALI."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from types import ModuleType
from typing import Any

import numpy as np
import torch

from mopro_fast import peers, signals
from mopro_fast.data.augment import Views
from mopro_fast.data.reader import Read, Reader
from mopro_fast.errors import UserError, first_line

READ_AHEAD = 2  # batches read beyond those in DALI


@dataclass
class Job:
    """A batch to read and decode."""

    rows: np.ndarray
    """int64 [n]: those wanted."""
    others: Callable[[int], np.ndarray] | None
    """Rows to try in place of one that cannot be read; without it that one is left out."""
    numbers: np.ndarray | None = None
    """float64 [n, ...] for DALI."""
    drawn: Views | None = None
    reading: Callable[[], Read] | None = None
    read: Read | None = None


@dataclass(eq=False)
class Decoder:
    """A DALI pipeline from encoded images and numbers to outputs: submit() any number ahead, take() in that order."""

    define: Callable[..., list]
    """define(fn, images, shape, numbers) gives the outputs from the decoded images; shape() is their int64 (H, W, C)
    and numbers() the submitted float64 numbers; ``fn`` is nvidia.dali.fn."""
    batch_size: int
    threads: int
    device: torch.device
    hw_decoder_load: float

    def __post_init__(self) -> None:
        self._dali = _import_dali()
        self._pipeline: Any = None
        self._submitted = 0  # batches not taken yet
        self._outputs: list | None = None

    def submit(self, data: list[np.ndarray], numbers: np.ndarray | None = None) -> None:
        """Start on a batch: n times uint8 [bytes] and float64 [n, ...], if ``define`` uses numbers."""
        if self._pipeline is None:
            self._pipeline = self._build()
        tensors = self._dali.tensors  # as fast as files that DALI reads itself; a list of arrays is not
        self._pipeline.feed_input("encoded", tensors.TensorListCPU([tensors.TensorCPU(x) for x in data]))
        if numbers is not None:
            self._pipeline.feed_input("numbers", numbers)
        self._pipeline.schedule_run()
        self._submitted += 1

    def take(self) -> None:
        """Wait for the oldest batch submitted. Bytes that DALI cannot decode raise a RuntimeError and end it."""
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        self._submitted -= 1
        self._outputs = self._pipeline.share_outputs(cuda_stream=stream)

    def images(self) -> list[np.ndarray]:
        """The first output of the batch taken, without a copy: valid until release()."""
        return [np.asarray(image) for image in self._outputs[0]]

    def copies(self) -> list[torch.Tensor]:
        """The batch taken, as uint8 tensors on the device, in the order of its current stream. Releases it."""
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        tensors = []
        for output in self._outputs:
            output = output.as_tensor()
            copy = torch.empty(output.shape(), dtype=torch.uint8, device=self.device)
            tensors.append(self._dali.plugin.pytorch.feed_ndarray(output, copy, cuda_stream=stream))
        self.release()
        return tensors

    def release(self) -> None:
        """The batch taken is no longer needed."""
        if self._outputs is not None:
            self._outputs = None
            self._pipeline.release_outputs()

    def drop(self) -> None:
        """Forget the batches submitted and not taken."""
        self.release()
        while self._submitted:
            try:
                self.take()
                self.release()
            except RuntimeError:  # bytes that DALI cannot decode, and with them the pipeline
                self.close()

    def close(self) -> None:
        self._submitted = 0
        self._outputs = self._pipeline = None

    def refused(self, data: list[np.ndarray]) -> dict[int, str]:
        """Which of these images DALI cannot decode, and why. Its message for a batch does not say."""
        single = replace(self, define=lambda _fn, images, shape, _: [images, shape()], batch_size=1)
        reasons = {}
        for i, encoded in enumerate(data):
            try:
                single.submit([encoded])
                single.take()
                single.release()
            except RuntimeError as error:
                single.close()
                said = str(error).partition("encountered:")[2].strip().partition("\n")[0]
                reasons[i] = said or "DALI gives no reason"
        return reasons

    def _build(self) -> Any:
        fn, types, device = self._dali.fn, self._dali.types, self.device
        gpu = device.type == "cuda"
        device_id = torch.cuda.current_device() if gpu and device.index is None else device.index
        # Depth 1: then each schedule_run runs one batch; the executor works ahead on all that are scheduled anyway.
        pipeline = self._dali.Pipeline(
            batch_size=self.batch_size,
            num_threads=self.threads,
            device_id=device_id if gpu else None,
            prefetch_queue_depth=1,
        )
        place = {"device": "mixed", "hw_decoder_load": self.hw_decoder_load} if gpu else {"device": "cpu"}
        with pipeline:
            encoded = fn.external_source(name="encoded")
            images = fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=True, **place)
            outputs = self.define(
                fn,
                images,
                lambda: fn.peek_image_shape(encoded, adjust_orientation=True),
                lambda: fn.external_source(name="numbers"),
            )
            pipeline.set_outputs(*outputs)
        pipeline.build()
        return pipeline


class Stream:
    """Jobs in order: at most ``depth`` in DALI, of which :meth:`next` gives the oldest, and some being read."""

    def __init__(self, reader: Reader, decoder: Decoder, depth: int) -> None:
        self.reader, self.decoder, self.depth = reader, decoder, depth
        self._coming: Iterator[Job] = iter(())
        self._reading: deque[Job] = deque()
        self._decoding: deque[Job] = deque()

    def restart(self, jobs: Iterator[Job]) -> None:
        """Go on with other jobs, after drop()."""
        self._coming = jobs

    def next(self) -> Job:
        """Wait for the next job; unless it has no rows left, its outputs are the decoder's until the next call."""
        signals.check()
        peers.moved()
        while True:
            self._advance()
            job = self._decoding[0]
            if len(job.read.rows):
                try:
                    self.decoder.take()
                except RuntimeError as error:
                    self._recover(error)
                    continue
            self._decoding.popleft()
            return job

    def drop(self) -> None:
        """Forget all jobs."""
        self._reading.clear()
        self._decoding.clear()
        self.decoder.drop()

    def close(self) -> None:
        self.drop()
        self.decoder.close()
        self.reader.close()

    def _advance(self) -> None:
        for _ in range(self.depth + READ_AHEAD - len(self._reading) - len(self._decoding)):
            job = next(self._coming, None)
            if job is None:
                break
            job.reading = self.reader.start(job.rows, job.others)
            self._reading.append(job)
        while self._reading and len(self._decoding) < self.depth:
            job = self._reading.popleft()
            job.read = job.reading()
            if len(job.read.rows):
                self.decoder.submit(job.read.data, job.numbers)
            self._decoding.append(job)

    def _recover(self, error: RuntimeError) -> None:
        """DALI has given up a batch, and with it all others. The reader learns whose bytes those were."""
        self.decoder.close()
        job = self._decoding[0]
        refused = self.decoder.refused(job.read.data)
        if not refused:
            raise error
        for i, reason in refused.items():
            self.reader.distrust(int(job.read.rows[i]), reason)
        again = [*self._decoding, *self._reading]
        self._decoding.clear()
        self._reading.clear()
        self._coming = chain(again, self._coming)


def _import_dali() -> ModuleType:
    try:
        import nvidia.dali as dali
        import nvidia.dali.plugin.pytorch  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"reading images needs NVIDIA DALI ({error}): pip install nvidia-dali-cuda130") from None
    except (ImportError, OSError) as error:  # its libraries take 3 GB of address space, for one
        raise UserError(
            f"NVIDIA DALI cannot be loaded ({first_line(error)}): `ulimit -v` or its installation"
        ) from None
    return dali
