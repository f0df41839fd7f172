"""One rank of a small training that writes down what it shows, and ends itself as kill -9 would, if it is to.

In a process group it is one of many.
"""

import json
import os
import signal
import sys
from pathlib import Path

from mopro_fast.config import AugmentConfig, DataConfig, ModelConfig, MoProConfig, OptimConfig, RunConfig, TrainConfig
from mopro_fast.training.loop import Trainer
from mopro_fast.training.tasks import task_of


def config(data: Path, out: Path, epochs: int = 2, batch_size: int = 8) -> TrainConfig:
    return TrainConfig(
        data=DataConfig(str(data), num_classes=4, image_size=16, eval_resize=16, augment=AugmentConfig(), threads=1),
        model=ModelConfig(arch="resnet18", width=1 / 16, stem="small", embed_dim=8),
        mopro=MoProConfig(queue_size=64, start_clean=1),
        optim=OptimConfig(epochs=epochs, batch_size=batch_size, lr=0.01),
        run=RunConfig(str(out), device="cpu", log_every=4, checkpoint_every=3, tensorboard=False),
    )


class Recorder(Trainer):
    """Writes a line of {epoch, step, ids} per step and rank into OUT."""

    kill_at = -1

    def _train_step(self, batch, place) -> None:
        line = {"epoch": self.epoch, "step": self.step, "ids": batch.ids.tolist()}
        with (self.out / f"shown.{self.rank}").open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.global_step == self.kill_at and self.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._train_step(batch, place)


def main(_rank: int, _ranks: int, data: Path, out: Path, kill_at: int = -1) -> None:
    """Train; at the global step `kill_at`, if there is one, rank 0 is gone."""
    Recorder.kill_at = kill_at
    sys.exit(Recorder(task_of(config(data, out))).run())
