"""What a run writes for people: log.jsonl, timing.jsonl, replaced.csv, TensorBoard, progress bars.

log.jsonl holds only what is a function of the config and the data, so that an interrupted and resumed run
writes the same bytes as an uninterrupted one; seconds and images/s go to timing.jsonl.
"""

import contextlib
import csv
import functools
import io
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mopro_fast import console
from mopro_fast.config import OptimConfig
from mopro_fast.data.index import Index
from mopro_fast.data.reader import Lost
from mopro_fast.errors import CannotWrite, UserError, first_line
from mopro_fast.files import append, open_regular, writing

_LONGEST = 1 << 24  # bytes in a line of the log


class RunLog:
    """Rank 0's log; on other ranks nothing is written."""

    def __init__(self, out: Path, active: bool, log_bytes: int, global_step: int, tensorboard: bool) -> None:
        self.out, self.active = out, active
        self.named: set[int] = set()
        self.writer = self._hook_before = None
        if not active:
            return
        self.file = (out / "log.jsonl").open("a+b", buffering=0)
        size = self.file.seek(0, os.SEEK_END)
        end = min(size, log_bytes)  # entries written after the checkpoint we resume from come again
        self.file.seek(end - min(end, _LONGEST))
        self.file.truncate(end - len(self.file.read(min(end, _LONGEST)).rpartition(b"\n")[2]))  # a torn line, too
        self.file.seek(0, os.SEEK_END)
        if 0 < size < log_bytes:
            self.say(f"{out / 'log.jsonl'} has lost its end: {log_bytes - size} bytes that the checkpoint knows of")
        self.timing = (out / "timing.jsonl").open("ab", buffering=0)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._hook_before = threading.excepthook
            threading.excepthook = functools.partial(_unless_tensorboard, self._hook_before)
            with self._tensorboard():
                self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=global_step or None)

    @property
    def bytes(self) -> int:
        """Length of log.jsonl so far."""
        return self.file.tell() if self.active else 0

    def entry(self, split: str, epoch: int, step: int, global_step: int, values: dict[str, Any]) -> None:
        """One line of log.jsonl and its TensorBoard scalars. step counts within the epoch, global_step overall."""
        if not self.active:
            return
        line = {"split": split, "epoch": epoch, "step": step, **values}
        append(self.file, json.dumps(line).encode() + b"\n")
        self._scalars(split, values, global_step)

    def replaced(self, index: Index, lost: list[tuple[int, int, Lost]]) -> None:
        """A line of replaced.csv for each (epoch, step, Lost); every image is named once on the terminal."""
        if not self.active:
            return
        path = self.out / "replaced.csv"
        there: set[tuple[str, ...]] = set()  # the steps since the latest checkpoint come again after an interruption
        if path.exists():
            with io.TextIOWrapper(open_regular(path), "utf-8", "surrogateescape", newline="") as file:
                there = {tuple(line[:3]) for line in csv.reader(file)}
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        if not there:
            writer.writerow(["epoch", "step", "path", "reason", "shown instead"])
        for epoch, step, (row, by, reason) in lost:
            if (str(epoch), str(step), index.paths[row]) not in there:
                writer.writerow([epoch, step, index.paths[row], reason, index.paths[by]])
            if row not in self.named:
                self.say(f"cannot read {index.name(row)} ({reason}): another image is shown, here and from now on")
            self.named.add(row)
        with writing(self.out, "make it writable"), path.open("ab", buffering=0) as file:
            append(file, text.getvalue().encode("utf-8", "surrogateescape"))

    def speed(self, epoch: int, step: int, global_step: int, images_per_second: float, data_wait: float) -> None:
        """One line of timing.jsonl; data_wait is the share of the time spent waiting for images."""
        if not self.active:
            return
        values = {"images_per_second": round(images_per_second, 2), "data_wait": round(data_wait, 4)}
        line = {"epoch": epoch, "step": step, "time": round(time.time(), 2), **values}
        append(self.timing, json.dumps(line).encode() + b"\n")
        self._scalars("speed", values, global_step)

    def say(self, text: str) -> None:
        """A line for the person watching, beside the progress bar."""
        if self.active:
            console.say(text)

    def flush(self) -> None:
        """Let nothing be lost where the process is ended."""
        if self.writer:
            with self._tensorboard():
                self.writer.flush()

    def close(self) -> None:
        if self.writer:
            with self._tensorboard():
                self.writer.close()
        if self._hook_before:
            threading.excepthook, self._hook_before = self._hook_before, None
        if self.active:
            for file in (self.file, self.timing):
                try:
                    file.close()
                except OSError as error:
                    raise CannotWrite(file.name, error) from None

    def _scalars(self, prefix: str, values: dict[str, Any], global_step: int) -> None:
        with self._tensorboard():
            for name, value in values.items():
                if self.writer and isinstance(value, (int, float)):
                    self.writer.add_scalar(f"{prefix}/{name}", value, global_step)

    @contextlib.contextmanager
    def _tensorboard(self) -> Iterator[None]:
        """The run goes on without TensorBoard where that cannot write: it shows what the logs hold."""
        try:
            yield
        except OSError as error:
            self.writer = None
            self.say(f"cannot write {self.out / 'tensorboard'} ({first_line(error)}): the run goes on without it")


class Progress:
    """An epoch's progress: a bar on a terminal, a line per log entry elsewhere; and the speed since the last entry."""

    def __init__(self, log: RunLog, epoch: int, step: int, config: OptimConfig, steps: int) -> None:
        """step: the first of the epoch that is taken now, of ``steps``."""
        self._log, self._config, self._epoch, self._steps = log, config, epoch, steps
        name, total = f"epoch {epoch + 1}/{config.epochs}", steps * config.batch_size
        done = step * config.batch_size
        self._bar = console.Progress(name, total, "images", done=done, active=log.active, lines=False)
        self.waited = 0.0
        """Seconds of waiting for images since the last entry."""
        self._began, self._since = time.perf_counter(), step

    def close(self) -> None:
        self._bar.close()

    def update(self) -> None:
        """A step is done."""
        self._bar.update(self._config.batch_size)

    def tell(self, step: int, global_step: int, values: dict[str, float]) -> None:
        """Show an entry's values, the speed and what is left of the run."""
        now, c = time.perf_counter(), self._config
        seconds = now - self._began
        speed = (step - self._since) * c.batch_size / seconds
        self._log.speed(self._epoch, step, global_step, speed, self.waited / seconds)
        left = console.duration((c.epochs * self._steps - global_step) * c.batch_size / speed)
        shown = {name: f"{values[name]:.3f}" for name in ("loss", "acc_cls", "kept") if name in values}
        text = " ".join(f"{name} {value}" for name, value in shown.items())
        self._bar.note(f"{text}, run left {left}")
        if not self._bar.is_bar:
            where = f"epoch {self._epoch + 1}/{c.epochs} step {step}/{self._steps}"
            self._log.say(f"{where} | {text} | {speed:.0f} img/s | {left} left")
        self._began, self.waited, self._since = now, 0.0, step


class Replaced:
    """Images that broke during the run, for which others were shown: named, counted, and limited."""

    def __init__(self, log: RunLog, index: Index, most: float) -> None:
        """most: the share of the images shown at which the run ends."""
        self._log, self._index, self._most = log, index, most
        self.counts = [0, 0]
        """In this epoch, in the run."""

    def note(self, lost: list[tuple[int, int, Lost]], shown: int) -> None:
        """lost: of all ranks, as TrainBatches collects them. shown: images so far. Raises a UserError for too many."""
        if not lost:
            return
        self._log.replaced(self._index, lost)
        self.counts = [n + len(lost) for n in self.counts]
        if self.counts[1] > self._most * max(1000, shown):
            row, _, reason = lost[-1][2]
            raise UserError(
                f"{self.counts[1]} of {max(1000, shown)} images could not be read any more, such as "
                f"{self._index.name(row)} ({reason}): repair the storage and run the same command again, "
                f"or raise --max-broken {self._most:g}"
            )


def _unless_tensorboard(hook: Callable[[Any], object], failed: Any) -> None:
    """For threading.excepthook: what TensorBoard's thread raises its writer raises as well, where a run says it."""
    if not type(failed.thread).__module__.startswith("tensorboard."):
        hook(failed)
