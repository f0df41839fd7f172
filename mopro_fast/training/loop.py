"""The trainer: one process or torchrun, resumable at every step.

A run is a function of its config and data. The loader, the shuffle across ranks and the schedule depend on
(seed, epoch, step) alone; what else a run is at a step is in checkpoints/state.py.
"""

import time
from contextlib import closing
from pathlib import Path

import torch

from mopro_fast import console, distributed, peers, signals
from mopro_fast.checkpoints.state import RunState
from mopro_fast.checkpoints.weights import initialise
from mopro_fast.data import inputs
from mopro_fast.data.batches import Batch
from mopro_fast.distributed import gather_rows
from mopro_fast.ops import backends
from mopro_fast.training.classes import ClassWatch
from mopro_fast.training.evaluate import accuracy, told
from mopro_fast.training.log import Progress, Replaced, RunLog
from mopro_fast.training.optim import sgd_class
from mopro_fast.training.run import RunFolder
from mopro_fast.training.step import TrainStep
from mopro_fast.training.task import Task
from mopro_fast.transfer import tensor_of


class Trainer:
    """Trains a task's model. :meth:`run` returns 0 when finished, or the signal that stopped it."""

    def __init__(self, task: Task) -> None:
        self.task, self.config = task, task.config
        run, optim = self.config.run, self.config.optim
        self.device = distributed.start(run.device, run.deterministic, run.timeout)
        self.rank, self.ranks = distributed.world()
        self.config.validate(self.ranks)
        backends.require(self.device.type)
        sgd_class(optim.sgd, self.device)
        self.folder = RunFolder(self.config, task.command)
        self.out = self.folder.path
        try:
            self._prepare()
        except BaseException:
            self.folder.close()
            raise

    def _prepare(self) -> None:
        config, state = self.config, self.folder.state
        # 1. The data.
        sets = self.folder.sets(self.task)
        self.index = sets.pop("train")
        shown, repeats = self.task.shown(self.index)
        self.loader = inputs.train_loader(config, shown, self.device, self.task.two_views, repeats)
        self.steps = self.loader.steps_per_epoch
        self.eval_sets = sets
        names = inputs.class_names(config, self.index)
        self.class_names = names if names and len(names) == config.data.num_classes else None
        self.held_out_labels = sets.get("holdout", self.index).labels[self.index.held_out]
        self.eval_loaders = {name: inputs.eval_loader(config, index, self.device) for name, index in sets.items()}
        # 2. The model, fresh or from the checkpoint.
        torch.manual_seed(config.run.seed)
        self.model = self.task.build()
        self.model.to(self.device, memory_format=torch.channels_last).train()
        if state is not None:
            self.folder.require_same_run(self.task, self.model)
            self.model.load_state_dict(state.model)
        elif config.run.init:
            initialise(self.model, config.run.init, self.index.classes)
        self.train_step = TrainStep(config, self.model, len(self.index), self.device)
        # 3. The position: the next step to take.
        self.epoch = self.step = 0
        if state is not None:
            with self.folder.going_on():
                self.train_step.load_from(state, self.folder.found)
                self.epoch, self.step = self.folder.position(self.steps)
            if self.rank == 0:
                console.say(self.folder.resumed())
        # 4. What the run writes.
        self.folder.write_settings(self.index)
        with self.folder.writing():
            log_bytes = 0 if state is None else state.log_bytes
            self.log = RunLog(self.out, self.rank == 0, log_bytes, self.global_step, config.run.tensorboard)
        agreement = [] if state is None else state.agreement
        trusted = config.data.held_out_share() is None
        self.classes = ClassWatch(self.log, self.index, self.task.advice, agreement, trusted)
        self.replaced = Replaced(self.log, self.index, config.data.max_broken)
        if state is not None:
            self.replaced.counts = list(state.replaced)
        self.folder.state = None  # its tensors' memory
        self.resources = (self.loader, *self.eval_loaders.values(), self.train_step, self.log, self.folder)
        self.log.say(f"{shown.num_usable} of {len(self.index)} images are shown, {self.steps} steps per epoch")

    @property
    def global_step(self) -> int:
        return self.epoch * self.steps + self.step

    def run(self) -> int:
        epochs, received = self.config.optim.epochs, 0
        if self.epoch == epochs:
            self.log.say(f"{self.out} is finished: {epochs} epochs done")
        else:
            self.log.say(self.loader.memory())
        try:
            with distributed.StopSignal() as stop:
                while self.epoch < epochs:
                    if received := self._next_epoch(stop):
                        break
        finally:
            self.close()
        peers.pause()
        return received

    def _next_epoch(self, stop: distributed.StopSignal) -> int:
        """-> 0, or the signal that has stopped it; then all is saved."""
        try:
            received = self._train_epoch(stop)
            if not received:
                self._end_epoch(stop)
                received = stop.poll() if self.epoch < self.config.optim.epochs else 0
            path = self._save() if received else None
        except signals.Stopped as stopped:  # while it waited for images, or evaluated
            received = stopped.number
            if self.ranks > 1:
                raise  # the others may know of nothing; an evaluation began with a save
            path = self._save() if self.step < self.steps else self.folder.newest()
        if received:
            self.log.say(
                f"stopped by signal {received} in epoch {self.epoch + 1} after step {self.step} of {self.steps}; "
                f"saved {path}: the same command goes on from there"
            )
        return received

    def close(self) -> None:
        """Let go of files, threads and GPU memory; :meth:`run` does it at its end."""
        for resource in self.resources:
            resource.close()

    def _train_epoch(self, stop: distributed.StopSignal) -> int:
        """Train from (epoch, step) to the epoch's end; -> 0, or the signal that asks to stop now."""
        run = self.config.run
        distributed.sync_buffers(self.model)
        self.train_step.begin_epoch(self.epoch)
        if self.step == 0:
            with stop.at_once():
                self.task.begin_epoch(self.model, self.epoch, self.device, self.train_step.bf16)
        batches = self.task.batches(self.loader.epoch(self.epoch, self.step), self.global_step)
        with closing(Progress(self.log, self.epoch, self.step, self.config.optim, self.steps)) as progress:
            while self.step < self.steps:
                asked = time.perf_counter()
                batch, extra = next(batches)
                progress.waited += time.perf_counter() - asked
                self._train_step(batch, extra)
                self.step += 1
                progress.update()
                if self.step % run.log_every == 0 or self.step == self.steps:
                    self._check_finite()
                    self._note_replaced()
                    values = {"lr": self.rates[0], **self.train_step.means(0)}
                    self.log.entry("train", self.epoch, self.step, self.global_step, values)
                    progress.tell(self.step, self.global_step, values)
                if self.step < self.steps:  # at the epoch's end everything is saved anyway
                    if received := stop.poll():
                        return received
                    if self.step % run.checkpoint_every == 0:
                        self._save()
        return 0

    def _train_step(self, batch: Batch, extra: tuple[torch.Tensor, ...]) -> None:
        self.rates = self.task.learning_rates(self.epoch, self.step, self.steps)
        self.train_step(batch, extra, self.epoch, self.step, self.rates)

    def _end_epoch(self, stop: distributed.StopSignal) -> None:
        self._save()  # evaluation may take longer than a scheduler waits between SIGTERM and SIGKILL
        values = {**self.train_step.means(1), "replaced": self.replaced.counts[0]}
        self.log.entry("epoch", self.epoch, self.step, self.global_step, values)
        distributed.sync_buffers(self.model)
        model, device, bf16, holdout = self.model, self.device, self.train_step.bf16, None
        for name, loader in self.eval_loaders.items():
            with stop.at_once():
                if name == "holdout":
                    values = holdout = self.classes.judge_held_out(model, loader, device, bf16)
                else:
                    values = accuracy(model.encoder_q, loader, device, bf16)
            self.log.entry(name, self.epoch, self.step, self.global_step, values)
            self.log.say(f"epoch {self.epoch + 1}/{self.config.optim.epochs} {name}: {told(values)}")
            if lost := distributed.gather_lists(loader.lost):
                row, _, reason = lost[0]
                first = self.eval_sets[name].name(row)
                self.log.say(f"{name}: {len(lost)} images could not be read any more, such as {first} ({reason})")
        assigned, winners = self.train_step.end_epoch()
        self.folder.save_labels(assigned)
        self.classes.end_epoch(self.epoch, self.step, self.global_step, assigned, winners, holdout)
        self.epoch, self.step, self.replaced.counts[0] = self.epoch + 1, 0, 0
        self._save()

    def _note_replaced(self) -> None:
        now = self.epoch, self.step  # the loader may be a batch ahead
        mine = [lost for lost in self.loader.lost if lost[:2] < now]
        self.loader.lost = [lost for lost in self.loader.lost if lost[:2] >= now]
        if int(gather_rows(torch.tensor([len(mine)], device=self.device)).sum()):
            self.replaced.note(distributed.gather_lists(mine), self.global_step * self.config.optim.batch_size)

    def _check_finite(self, weights: bool = False) -> None:
        self.train_step.require_finite(self.epoch, self.step, self.folder.last_checkpoint, weights)

    def _save(self) -> Path | None:
        self._check_finite(weights=True)
        self._note_replaced()
        state = RunState(
            config=self.config.as_dict(),
            model=self.model.state_dict(),
            epoch=self.epoch,
            step=self.step,
            initial=self.task.initial,
            data_digest=self.index.digest(),
            left_out=tensor_of(self.index.left_out),
            held_out=tensor_of(self.index.held_out),
            held_out_labels=tensor_of(self.held_out_labels),
            ranks=self.ranks,
            log_bytes=self.log.bytes,
            replaced=list(self.replaced.counts),
            agreement=list(self.classes.agreement),
            classes=self.class_names,
        )
        self.train_step.save_into(state)
        with distributed.saving():
            self.log.flush()
            return self.folder.save(self.global_step, state)
