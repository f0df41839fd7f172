"""A run's folder: its lock, the checkpoint to go on from, and whether that is of the same run."""

import contextlib
import functools
from collections.abc import Iterator
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopro_fast import distributed
from mopro_fast.checkpoints import state as checkpoints
from mopro_fast.checkpoints.fields import Damaged, check_model_fits, require
from mopro_fast.checkpoints.state import RunState
from mopro_fast.checkpoints.weights import check_fits
from mopro_fast.config import VIEW_K, Settings, differences, from_dict
from mopro_fast.data import inputs
from mopro_fast.data.begun import as_begun, begun, write_images
from mopro_fast.data.index import Index
from mopro_fast.errors import UserError
from mopro_fast.files import json_object, own_folder, replacing, write_json, writing
from mopro_fast.models.method import Method
from mopro_fast.training.task import Task

# Settings that may change between an interrupted run and its continuation: they do not change the result, apart from
# rounding where another device or another SGD is chosen.
# The data may move: its paths and labels are compared by digest; the anchors of CAPro with what a run begins with.
FREE = {"data.path", "data.root", "data.val", "data.layout", "data.extra_val", "data.threads", "data.max_broken"}
FREE |= {"data.trust_index", "data.hw_decoder_load", "optim.sgd", "capro.anchors"}
FREE |= {"data.holdout"}  # which images are held out is compared
FREE |= {f"run.{name}" for name in ("out", "device", "log_every", "checkpoint_every", "keep")}
FREE |= {f"run.{name}" for name in ("resume", "init", "tensorboard", "timeout", "cuda_graph", "compile", "recompute")}


class RunFolder:
    """The folder ``--out``, for this process alone until :meth:`close`.

    found: the checkpoint to go on from, or None.
    state: what it holds, or None.
    """

    def __init__(self, config: Settings, command: str = "train") -> None:
        self.config, self.path = config, Path(config.run.out)
        self.checkpoints = self.path / "checkpoints"
        self._rank, self._ranks = distributed.world()
        self._lock = contextlib.ExitStack()
        made = functools.partial(own_folder, self.path, command, functools.partial(_made_by, command=command))
        self._lock.enter_context(distributed.on_rank0(made))
        try:
            self._require_run()
            self.found = self._newest()
            with self.going_on():
                self.state = None if self.found is None else checkpoints.load(self.found)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the folder free; one that was made and stayed empty goes."""
        self._lock.close()

    def _require_run(self) -> None:
        """Raise a UserError where the folder has our mark, and files of others: a run begins with its settings."""
        names = sorted(p.name for p in self.path.iterdir() if not p.name.startswith("."))
        config = json_object(self.path / "config.json")
        if names and not {"data", "optim", "run"} <= config.keys() and not checkpoints.all_of(self.checkpoints):
            raise UserError(f"--out {self.path} holds other files, such as {names[0]}: name a new or an empty folder")

    def writing(self) -> contextlib.AbstractContextManager[None]:
        """An OSError inside becomes a CannotWrite that names the folder."""
        return writing(f"--out {self.path}", "name another folder")

    def sets(self, task: Task) -> dict[str, Index]:
        """The training set, as it was when the run began, and the validation sets; all checked by rank 0."""
        return distributed.by_rank0(lambda: self._sets(task))

    def _sets(self, task: Task) -> dict[str, Index]:
        state, data = self.state, self.config.data
        noted = None if state is None else begun(self.path, state.data_digest, data.num_classes)
        sets = inputs.load(self.config, noted, resumed=state is not None)
        sets["train"] = task.labelled(sets["train"])
        left_out = {}
        if state is not None:
            sets["train"] = as_begun(sets["train"], noted)
            if sets["train"].digest() != state.data_digest:
                self._refuse(self._changed(task), task)  # that is why, if there is any
                raise UserError(
                    f"{self.found} was trained on other data than {data.path}: paths or labels differ; {_other(task)}"
                )
            with self.going_on():
                holds = not bool((state.left_out >= len(sets["train"])).any())
                require(holds, self.found, "left_out", state.left_out, f"rows below {len(sets['train'])}")
            left_out["train"] = state.left_out.numpy()
        workers = inputs.threads(data)
        sets = {
            name: inputs.readable(index, name, workers, left_out.get(name), data.trust_index)
            for name, index in sets.items()
        }
        if data.holdout:
            sets["train"], sets["holdout"] = inputs.hold_out(sets["train"], data)
        held_out = sets["train"].held_out
        labels = sets["holdout"].labels[held_out] if data.holdout else held_out
        if state is not None and not (
            np.array_equal(state.held_out, held_out) and np.array_equal(state.held_out_labels, labels)
        ):
            raise UserError(
                f"{self.found} held out other images, or judged them by other labels, than --holdout {data.holdout!r}: "
                f"give what it had, or {_other(task)}"
            )
        return sets

    def require_same_run(self, task: Task, model: Method) -> None:
        """Raise a UserError where ``state`` is of a run that would have had another result."""
        changed = self._changed(task)
        if any(name.startswith("model.") or name == "data.num_classes" for name in changed):
            check_fits(model.state_dict(), self.state.model, self.found)
        if self.state.initial != task.initial and not self.state.imported:
            raise UserError(
                f"{self.found} is of a run that began with another {task.begins_with}: give that one, or {_other(task)}"
            )
        self._refuse(changed, task)
        with self.going_on():
            check_model_fits(self.state.model, model.state_dict(), self.found)

    def position(self, steps: int) -> tuple[int, int]:
        """Epoch and step to go on with, of ``steps`` in an epoch."""
        s, epochs = self.state, self.config.optim.epochs
        require(s.epoch <= epochs, self.found, "epoch", s.epoch, f"at most {epochs}")
        require(s.step <= (steps if s.epoch < epochs else 0), self.found, "step", s.step, f"at most {steps}")
        return s.epoch, s.step

    @contextlib.contextmanager
    def going_on(self) -> Iterator[None]:
        """A checkpoint that is found damaged inside names the one to go on from instead."""
        try:
            yield
        except Damaged as error:
            raise UserError(f"{error}{self._instead()}") from None

    def _instead(self) -> str:
        """The end of the message."""
        saved = checkpoints.all_of(self.checkpoints)
        if not saved or Path(self.found).resolve() != saved[-1].resolve():
            return ""
        for newer, path in enumerate(reversed(saved[:-1]), 1):
            with contextlib.suppress(UserError):
                checkpoints.load(path)
                remove = "the damaged file" if newer == 1 else f"the {newer} newer files"
                which = "the one before it" if newer == 1 else "an earlier one"
                resume = "" if self.config.run.resume == "auto" else " with --resume auto"
                return f"; {which}, {path.name}, can be read: remove {remove} and run the same command again{resume}"
        return "; no earlier one can be read: begin anew with another --out"

    def _changed(self, task: Task) -> dict[str, tuple[Any, Any]]:
        """The settings that decide the result and are others: as they were, as they are."""
        theirs = from_dict(type(self.config), self.state.config, str(self.found)).as_dict()
        ours, free = self.config.as_dict(), FREE | task.free | (set() if task.two_views else VIEW_K)
        changed = [name for name in differences(theirs, ours) if name not in free]
        return {name: tuple(functools.reduce(getitem, name.split("."), c) for c in (theirs, ours)) for name in changed}

    def _refuse(self, changed: dict[str, tuple[Any, Any]], task: Task) -> None:
        for name, (then, now) in changed.items():
            raise UserError(
                f"{self.found} is of a run with {name}={then}, this one has {now}: set it as it was, or {_other(task)}"
            )

    def write_settings(self, index: Index) -> None:
        """The config, and of the training set what class folders do not keep; on rank 0."""
        if self._rank != 0:
            return
        with self.writing():
            write_json(self.path / "config.json", self.config.as_dict())
            if self.state is None:
                write_images(index, self.path)
            if len(index.left_out):
                inputs.write_left_out(index, self.path / "left_out.csv")

    def resumed(self) -> str:
        """The line that says so."""
        then, now = self.state.ranks, self._ranks
        note = "" if then == now else f" (saved by {then} ranks, now {now}: not bit for bit)"
        return f"resuming {self.found} at epoch {self.state.epoch + 1}, step {self.state.step}{note}"

    def save(self, global_step: int, state: RunState) -> Path | None:
        """Write a checkpoint; on rank 0."""
        if self._rank == 0:
            return checkpoints.save(self.checkpoints, global_step, state, self.config.run.keep)
        return None

    def save_labels(self, assigned: Tensor) -> None:
        """The labels that an epoch's images were trained with, into labels.pt; on rank 0."""
        if self._rank == 0:
            with self.writing(), replacing(str(self.path / "labels.pt")) as file:
                torch.save(assigned, file)

    def newest(self) -> Path | None:
        """The checkpoint that was saved last."""
        return next(reversed(checkpoints.all_of(self.checkpoints)), None)

    def last_checkpoint(self) -> str:
        """For messages."""
        return f"last checkpoint: {self.newest() or 'none yet'}"

    def _newest(self) -> str | Path | None:
        resume, saved = self.config.run.resume, checkpoints.all_of(self.checkpoints)
        path = resume if resume not in ("auto", "never") else (saved[-1] if saved else None)
        if resume == "never" and saved:
            raise UserError(f"{self.path} already holds a run: choose another --out, or --resume auto to go on with it")
        if path and saved and Path(path).resolve() in [p.resolve() for p in saved[:-1]]:
            raise UserError(f"{path} is older than {saved[-1]}: to go back to it, choose another --out")
        return distributed.from_rank0(path)


def _made_by(folder: Path, command: str) -> str | None:
    """The command whose run a folder without a mark holds; without its settings it may be of ``command``."""
    settings = json_object(folder / "config.json")
    if {"data", "optim", "run"} <= settings.keys() and (folder / "log.jsonl").is_file():
        return "retrain" if "cleaned" in settings else "finetune" if "share" in settings else "train"
    return command if checkpoints.all_of(folder / "checkpoints") else None


def _other(task: Task) -> str:
    """What to do instead; a task that begins with a checkpoint has no --init."""
    return "choose another --out" + (" (with --init for the weights alone)" if task.command == "train" else "")
