"""The trainer: one process or torchrun, resumable at every step.

A run is a function of its config and data. The loader, the shuffle across ranks and the schedule depend on
(seed, epoch, step) alone, so a checkpoint is: weights, optimizer, position, the log's length and running sums.
"""

import json
import sys
import time
from pathlib import Path

import torch

from mopro_fast import __version__
from mopro_fast.config import TrainConfig, differences
from mopro_fast.data.index import Index
from mopro_fast.errors import UserError
from mopro_fast.models.build import build
from mopro_fast.ops import backends
from mopro_fast.training import checkpoint, distributed, inputs
from mopro_fast.training.distributed import gather_rows
from mopro_fast.training.evaluate import accuracy
from mopro_fast.training.log import RunLog
from mopro_fast.training.optim import build_optimizer, learning_rate

# Settings that may change between an interrupted run and its continuation: they do not change the result.
# The data may move: its paths and labels are compared by digest.
FREE = {"data.path", "data.root", "data.val", "data.layout", "data.extra_val", "data.threads", "data.max_broken"}
FREE |= {"data.hw_decoder_load"}
FREE |= {f"run.{name}" for name in ("out", "device", "log_every", "checkpoint_every", "keep")}
FREE |= {f"run.{name}" for name in ("resume", "init", "tensorboard")}

UNSEEN, REMOVED = -2, -1  # in the record of decisions: not shown this epoch; kept out of the losses


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
        auto = self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        self.bf16 = config.run.precision == "bf16" or (config.run.precision == "auto" and auto)
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
        targets = list(self.model.encoder_k.parameters()) if config.method == "mopro" else None
        self.optimizer = build_optimizer(self.model.encoder_q, config.optim, targets, config.mopro.key_momentum)
        self.query = self.model.encoder_q
        if self.ranks > 1:
            self.query = distributed.data_parallel(self.query, self.device)

        self.epoch = self.step = 0  # the next step to take
        self.sums: dict[str, torch.Tensor] | None = None  # per metric float64 [2]: since the last entry, this epoch
        self.counts = [0, 0]
        self.assigned = self._no_decisions()
        self.bad_step = torch.full((1,), -1, dtype=torch.int64, device=self.device)
        self.replaced = [0, 0]  # images that could not be read any more: in this epoch, in the run
        log_bytes = self._restore(path, state) if state else 0
        if not state and config.run.init:
            checkpoint.load_weights(self.model, config.run.init)
        if self.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "config.json").write_text(config.to_json())
            if not state:
                inputs.write_list(self.index, self.out / "images.txt")
            if len(self.index.left_out):
                inputs.write_left_out(self.index, self.out / "left_out.csv")
        self.log = RunLog(self.out, self.rank == 0, log_bytes, self.global_step, config.run.tensorboard)

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
            for loader in (self.loader, *self.eval_loaders.values()):
                loader.close()
            self.log.close()
        return 0

    def _train_epoch(self, stop: distributed.StopSignal) -> int:
        """Train from (epoch, step) to the epoch's end; -> 0, or the signal that asks to stop now."""
        run, batch_size = self.config.run, self.config.optim.batch_size
        distributed.sync_buffers(self.model)
        bar = self.log.progress(self.epoch, self.config.optim.epochs, self.step, self.steps, batch_size)
        began, waited, since = time.perf_counter(), 0.0, self.step
        batches = self.loader.epoch(self.epoch, self.step)
        with bar:
            while self.step < self.steps:
                asked = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked
                self._train_step(batch)
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

    def _train_step(self, batch) -> None:
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, self.epoch, self.step, self.steps)
        order = distributed.shuffle_order(config.run.seed, self.global_step, config.optim.batch_size)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            out = self.model(batch.view_q, batch.view_k, batch.labels, self.epoch, order, self.query)
        self.optimizer.zero_grad(set_to_none=True)
        out.loss.backward()
        self.optimizer.step()  # with it the key encoder: step 2 of the method

        # Nothing below waits for the device: the sums are read when they are logged.
        if self.sums is None:
            self.sums = {name: torch.zeros(2, dtype=torch.float64, device=self.device) for name in out.metrics}
        for name, value in out.metrics.items():
            self.sums[name] += value
        self.counts = [n + 1 for n in self.counts]
        self.assigned[batch.ids] = torch.where(out.kept, out.labels, REMOVED).to(torch.int32)
        first_bad = (self.bad_step < 0) & ~out.loss.detach().isfinite()
        self.bad_step = torch.where(first_bad, self.step, self.bad_step)

    def _means(self, which: int) -> dict[str, float]:
        """The metrics' means over all ranks: which=0 since the last entry, 1 this epoch. Starts the sums anew."""
        names = sorted(self.sums)
        sums = gather_rows(torch.stack([self.sums[name][which] for name in names])[None]).sum(0)
        means = (sums / (self.ranks * self.counts[which])).tolist()
        for total in self.sums.values():
            total[which] = 0
        self.counts[which] = 0
        return dict(zip(names, means, strict=True))

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
            values = accuracy(self.model.encoder_q, loader, self.device, self.bf16)
            self.log.entry(name, self.epoch, self.step, self.global_step, values)
            self.log.say(
                f"epoch {self.epoch + 1}/{self.config.optim.epochs} {name}: "
                f"top-1 {values['top1']:.2f} % top-5 {values['top5']:.2f} % of {values['images']} images"
            )
            if lost := distributed.gather_lists(loader.lost):
                row, _, reason = lost[0]
                first = self.eval_sets[name].name(row)
                self.log.say(f"{name}: {len(lost)} images could not be read any more, such as {first} ({reason})")
        decisions = self._merged_decisions()
        if self.rank == 0:
            partial = self.out / "labels.partial"
            torch.save(decisions, partial)
            partial.replace(self.out / "labels.pt")
        self.assigned = self._no_decisions()
        self.epoch, self.step, self.replaced[0] = self.epoch + 1, 0, 0
        self._save()

    def _note_replaced(self) -> None:
        """Count and name what the ranks could not read; too much of it ends the run."""
        mine, self.loader.lost = self.loader.lost, []
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
        bad = gather_rows(self.bad_step).tolist()
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

    def _no_decisions(self) -> torch.Tensor:
        return torch.full((len(self.index),), UNSEEN, dtype=torch.int32, device=self.device)

    def _merged_decisions(self) -> torch.Tensor:
        """int32 [images]: the label each image was trained with this epoch, REMOVED or UNSEEN; of all ranks."""
        merged = self.assigned.clone()
        if self.ranks > 1:
            torch.distributed.all_reduce(merged, torch.distributed.ReduceOp.MAX)
        return merged.cpu()

    def _save(self) -> Path | None:
        self._check_finite()
        self._check_weights()
        self._note_replaced()
        sums = self.sums or {}
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
            "sums": {name: gather_rows(total[None]).cpu() for name, total in sums.items()},  # [W, 2]
            "assigned": self._merged_decisions(),
        }
        if self.rank != 0:
            return None
        state["model"] = self.model.state_dict()
        state["optimizer"] = self.optimizer.state_dict()
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
        self._require_same_run(path, state)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.assigned = state["assigned"].to(self.device)
        self.counts, self.replaced = list(state["counts"]), list(state["replaced"])
        same_ranks = state["ranks"] == self.ranks
        # The sums of each rank are its own; another number of ranks shares out their mean, the log alone differs.
        self.sums = {
            name: (total[self.rank] if same_ranks else total.mean(0)).to(self.device)
            for name, total in state["sums"].items()
        } or None
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
        theirs, ours = json.loads(state["config"]), json.loads(self.config.to_json())
        changed = [name for name in differences(theirs, ours) if name not in FREE]
        if any(name.startswith("model.") or name == "data.num_classes" for name in changed):
            checkpoint.check_fits(self.model.state_dict(), state["model"], path)
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
