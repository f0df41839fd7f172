"""The trainer: one process or torchrun, resumable at every step.

A run is a function of its config and data. The loader, the shuffle across ranks and the schedule depend on
(seed, epoch, step) alone, so a checkpoint is: weights, optimizer, position, the log's length and running sums.
"""

import json
import sys
import time
from pathlib import Path

import torch

from mopro_fast import __version__, distributed
from mopro_fast.checkpoints import state as checkpoint
from mopro_fast.checkpoints import weights
from mopro_fast.checkpoints.weights import check_fits
from mopro_fast.config import TrainConfig, differences, from_dict
from mopro_fast.data import inputs
from mopro_fast.data.index import Index
from mopro_fast.data.pipeline import Batch
from mopro_fast.distributed import gather_rows
from mopro_fast.errors import UserError
from mopro_fast.labels import UNSEEN
from mopro_fast.models.build import build
from mopro_fast.ops import backends
from mopro_fast.training.evaluate import accuracy
from mopro_fast.training.log import RunLog
from mopro_fast.training.optim import learning_rate, sgd_class
from mopro_fast.training.step import Shuffle, TrainStep

# Settings that may change between an interrupted run and its continuation: they do not change the result, apart from
# rounding where another device or another SGD is chosen.
# The data may move: its paths and labels are compared by digest.
FREE = {"data.path", "data.root", "data.val", "data.layout", "data.extra_val", "data.threads", "data.max_broken"}
FREE |= {"data.hw_decoder_load", "optim.sgd"}
FREE |= {f"run.{name}" for name in ("out", "device", "log_every", "checkpoint_every", "keep")}
FREE |= {f"run.{name}" for name in ("resume", "init", "tensorboard", "cuda_graph", "compile", "recompute")}


class Trainer:
    """Trains ``config``'s model. :meth:`run` returns 0 when finished, or the signal that stopped it."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.device = distributed.start(config.run.device)
        self.rank, self.ranks = distributed.world()
        config.validate(self.ranks)
        self.out = Path(config.run.out)
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out} is a file: name a folder")
        backends.require(self.device.type)
        sgd_class(config.optim.sgd, self.device)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = not config.run.deterministic
            torch.backends.cudnn.deterministic = config.run.deterministic

        path, state = self._saved()
        sets = inputs.load(config, resumed=state is not None)
        if state:
            sets["train"] = inputs.as_begun(sets["train"], self.out / "images.txt", state["data_digest"])
            self._require_same_data(path, state, sets["train"])
        left_out = {"train": state["left_out"].numpy()} if state else {}
        workers = inputs.threads(config.data)
        sets = {name: inputs.readable(index, name, workers, left_out.get(name)) for name, index in sets.items()}
        self.index = sets.pop("train")
        self.loader = inputs.train_loader(config, self.index, self.device)
        self.steps = self.loader.steps_per_epoch
        self.eval_sets = sets
        self.eval_loaders = {name: inputs.eval_loader(config, index, self.device) for name, index in sets.items()}

        torch.manual_seed(config.run.seed)
        self.model = build(config).to(self.device, memory_format=torch.channels_last).train()
        self.epoch = self.step = 0  # the next step to take
        self.counts = [0, 0]  # steps that train_step.sums cover
        self.replaced = [0, 0]  # images that could not be read any more: in this epoch, in the run
        if state:
            self._require_same_run(path, state)
            self.model.load_state_dict(state["model"])
        elif config.run.init:
            weights.initialise(self.model, config.run.init)
        self.train_step = TrainStep(config, self.model, len(self.index), self.device)
        self.shuffle = Shuffle(config.run.seed, config.optim.batch_size)
        log_bytes = self._restore(path, state) if state else 0
        try:
            if self.rank == 0:
                self.out.mkdir(parents=True, exist_ok=True)
                (self.out / "config.json").write_text(config.to_json())
                if not state:
                    inputs.write_list(self.index, self.out / "images.txt")
                if len(self.index.left_out):
                    inputs.write_left_out(self.index, self.out / "left_out.csv")
            self.log = RunLog(self.out, self.rank == 0, log_bytes, self.global_step, config.run.tensorboard)
        except OSError as error:
            raise UserError(f"cannot write into --out {self.out}: {error.strerror}: name another folder") from None
        self.resources = (self.loader, *self.eval_loaders.values(), self.train_step, self.log)

    @property
    def global_step(self) -> int:
        return self.epoch * self.steps + self.step

    def run(self) -> int:
        epochs = self.config.optim.epochs
        if self.epoch == epochs:
            self.log.say(f"{self.out} is finished: {epochs} epochs done")
        else:
            self.log.say(self.loader.memory())
        try:
            with distributed.StopSignal() as stop:
                while self.epoch < epochs:
                    received = self._train_epoch(stop)
                    if not received:
                        self._end_epoch()
                        received = stop.poll() if self.epoch < epochs else 0
                    if received:
                        path = self._save()
                        self.log.say(
                            f"stopped by signal {received} in epoch {self.epoch + 1} after step {self.step} of "
                            f"{self.steps}; saved {path}: the same command goes on from there"
                        )
                        return received
        finally:
            self.close()
        return 0

    def close(self) -> None:
        """Let go of files, threads and GPU memory; :meth:`run` does it at its end."""
        for resource in self.resources:
            resource.close()

    def _train_epoch(self, stop: distributed.StopSignal) -> int:
        """Train from (epoch, step) to the epoch's end; -> 0, or the signal that asks to stop now."""
        run, batch_size = self.config.run, self.config.optim.batch_size
        distributed.sync_buffers(self.model)
        bar = self.log.progress(self.epoch, self.config.optim.epochs, self.step, self.steps, batch_size)
        began, waited, since = time.perf_counter(), 0.0, self.step
        batches = self.shuffle(self.loader.epoch(self.epoch, self.step), self.global_step)
        with bar:
            while self.step < self.steps:
                asked = time.perf_counter()
                batch, place = next(batches)
                waited += time.perf_counter() - asked
                self._train_step(batch, place)
                self.step += 1
                bar.update(batch_size)
                if self.step % run.log_every == 0 or self.step == self.steps:
                    values = self._log_window()
                    now = time.perf_counter()
                    speed = (self.step - since) * batch_size / (now - began)
                    self.log.speed(self.epoch, self.step, self.global_step, speed, waited / (now - began))
                    self._tell(bar, values, speed)
                    began, waited, since = now, 0.0, self.step
                if self.step < self.steps:  # at the epoch's end everything is saved anyway
                    if received := stop.poll():
                        return received
                    if self.step % run.checkpoint_every == 0:
                        self._save()
        return 0

    def _train_step(self, batch: Batch, place: torch.Tensor | None) -> None:
        lr = learning_rate(self.config.optim, self.epoch, self.step, self.steps)
        self.train_step(batch, place, self.epoch, self.step, lr)
        self.counts = [n + 1 for n in self.counts]

    def _means(self, which: int) -> dict[str, float]:
        """The metrics' means over all ranks: which=0 since the last entry, 1 this epoch. Starts the sums anew."""
        sums = gather_rows(self.train_step.sums[which][None]).sum(0)
        means = dict(zip(self.model.METRICS, (sums / (self.ranks * self.counts[which])).tolist(), strict=True))
        self.train_step.sums[which] = 0
        self.counts[which] = 0
        return dict(sorted(means.items()))

    def _log_window(self) -> dict[str, float]:
        self._check_finite()
        self._note_replaced()
        lr = learning_rate(self.config.optim, self.epoch, self.step - 1, self.steps)
        values = {"lr": lr, **self._means(0)}
        self.log.entry("train", self.epoch, self.step, self.global_step, values)
        return values

    def _tell(self, bar, values: dict[str, float], speed: float) -> None:
        done = self.global_step
        left = (self.config.optim.epochs * self.steps - done) * self.config.optim.batch_size / speed
        shown = {name: f"{values[name]:.3f}" for name in ("loss", "acc_cls", "kept") if name in values}
        bar.set_postfix({**shown, "run left": _duration(left)})
        if bar.disable:
            text = " ".join(f"{name} {value}" for name, value in shown.items())
            where = f"epoch {self.epoch + 1}/{self.config.optim.epochs} step {self.step}/{self.steps}"
            self.log.say(f"{where} | {text} | {speed:.0f} img/s | {_duration(left)} left")

    def _end_epoch(self) -> None:
        self._save()  # evaluation may take longer than a scheduler waits between SIGTERM and SIGKILL
        values = {**self._means(1), "replaced": self.replaced[0]}
        self.log.entry("epoch", self.epoch, self.step, self.global_step, values)
        distributed.sync_buffers(self.model)
        for name, loader in self.eval_loaders.items():
            values = accuracy(self.model.encoder_q, loader, self.device, self.train_step.bf16)
            self.log.entry(name, self.epoch, self.step, self.global_step, values)
            self.log.say(
                f"epoch {self.epoch + 1}/{self.config.optim.epochs} {name}: "
                f"top-1 {values['top1']:.2f} % top-5 {values['top5']:.2f} % of {values['images']} images"
            )
            if lost := distributed.gather_lists(loader.lost):
                row, _, reason = lost[0]
                first = self.eval_sets[name].name(row)
                self.log.say(f"{name}: {len(lost)} images could not be read any more, such as {first} ({reason})")
        decisions = self.train_step.decisions()
        if self.rank == 0:
            partial = self.out / "labels.partial"
            torch.save(decisions, partial)
            partial.replace(self.out / "labels.pt")
        self.train_step.assigned.fill_(UNSEEN)
        self.epoch, self.step, self.replaced[0] = self.epoch + 1, 0, 0
        self._save()

    def _note_replaced(self) -> None:
        """Count and name what the ranks could not read; too much of it ends the run."""
        now = self.epoch, self.step  # the loader may be a batch ahead
        mine = [lost for lost in self.loader.lost if lost[:2] < now]
        self.loader.lost = [lost for lost in self.loader.lost if lost[:2] >= now]
        if not int(gather_rows(torch.tensor([len(mine)], device=self.device)).sum()):
            return
        lost = distributed.gather_lists(mine)
        self.log.replaced(self.index, lost)
        self.replaced = [n + len(lost) for n in self.replaced]
        shown = max(1000, self.global_step * self.config.optim.batch_size)
        most = self.config.data.max_broken
        if self.replaced[1] > most * shown:
            row, _, reason = lost[-1][2]
            raise UserError(
                f"{self.replaced[1]} of {shown} images could not be read any more, such as {self.index.name(row)} "
                f"({reason}): repair the storage and run the same command again, or raise --max-broken {most:g}"
            )

    def _check_finite(self) -> None:
        bad = gather_rows(self.train_step.bad_step).tolist()
        for rank, step in enumerate(bad):
            if step >= 0:
                raise UserError(
                    f"the loss is not finite at epoch {self.epoch + 1}, step {step + 1}, rank {rank}; last checkpoint: "
                    f"{self._last_checkpoint()}; try a lower --lr or some --warmup-epochs"
                )

    def _check_weights(self) -> None:
        """The losses can be finite to the last and the step after them not: such weights are never saved."""
        norms = torch.stack(torch._foreach_norm(list(self.model.parameters())))
        if not bool(norms.isfinite().all()):
            raise UserError(
                f"weights are not finite at epoch {self.epoch + 1}, step {self.step}, rank {self.rank}; "
                f"last checkpoint: {self._last_checkpoint()}; try a lower --lr or some --warmup-epochs"
            )

    def _last_checkpoint(self) -> str:
        saved = checkpoint.all_of(self.out / "checkpoints")
        return str(saved[-1]) if saved else "none yet"

    def _save(self) -> Path | None:
        self._check_finite()
        self._check_weights()
        self._note_replaced()
        state = {
            "version": __version__,
            "config": self.config.to_json(),
            "data_digest": self.index.digest(),
            "ranks": self.ranks,
            "epoch": self.epoch,
            "step": self.step,
            "log_bytes": self.log.bytes,
            "counts": self.counts,
            "replaced": self.replaced,
            "left_out": torch.from_numpy(self.index.left_out),
            **self.train_step.state_dict(),
        }
        if self.rank != 0:
            return None
        state["model"] = self.model.state_dict()
        state["optimizer"] = self.train_step.optimizer.state_dict()
        return checkpoint.save(self.out / "checkpoints", self.global_step, state, self.config.run.keep)

    def _saved(self) -> tuple[str | Path | None, dict | None]:
        """-> the checkpoint to go on from and what it holds, if there is one."""
        run = self.config.run
        saved = checkpoint.all_of(self.out / "checkpoints")
        path = run.resume if run.resume not in ("auto", "never") else (saved[-1] if saved else None)
        if run.resume == "never" and saved:
            raise UserError(f"{self.out} already holds a run: choose another --out, or --resume auto to go on with it")
        if path and saved and Path(path).resolve() in [p.resolve() for p in saved[:-1]]:
            raise UserError(f"{path} is older than {saved[-1]}: to go back to it, choose another --out")
        path = distributed.from_rank0(path)
        return path, None if path is None else checkpoint.load(path)

    def _restore(self, path: str | Path, state: dict) -> int:
        """Take up an earlier run; -> the length its log.jsonl had."""
        self.train_step.optimizer.load_state_dict(state["optimizer"])
        self.train_step.load_state_dict(state)
        self.epoch, self.step = state["epoch"], state["step"]
        self.counts, self.replaced = list(state["counts"]), list(state["replaced"])
        same_ranks = state["ranks"] == self.ranks
        if self.rank == 0:
            note = "" if same_ranks else f" (saved by {state['ranks']} ranks, now {self.ranks}: not bit for bit)"
            print(f"resuming {path} at epoch {self.epoch + 1}, step {self.step}{note}", file=sys.stderr)
        return state["log_bytes"]

    def _require_same_data(self, path: str | Path, state: dict, index: Index) -> None:
        if state["data_digest"] != index.digest():
            raise UserError(
                f"{path} was trained on other data than {self.config.data.path}: paths or labels differ; "
                "choose another --out (with --init for the weights alone)"
            )

    def _require_same_run(self, path: str | Path, state: dict) -> None:
        saved = from_dict(TrainConfig, json.loads(state["config"]), str(path))  # without settings that are newer
        theirs, ours = (json.loads(config.to_json()) for config in (saved, self.config))
        changed = [name for name in differences(theirs, ours) if name not in FREE]
        if any(name.startswith("model.") or name == "data.num_classes" for name in changed):
            check_fits(self.model.state_dict(), state["model"], path)
        if changed:
            first = changed[0]
            raise UserError(
                f"{path} is of a run with {first}={_at(theirs, first)}, this one has {_at(ours, first)}: "
                "set it as it was, or choose another --out (with --init for the weights alone)"
            )


def _at(values: dict, dotted: str):
    for name in dotted.split("."):
        values = values[name]
    return values


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02d}m" if hours else f"{m}m{s:02d}s"
