"""A method in one file: a linear classifier on the pooled feature of a frozen encoder, as docs/method.md shows it.

python tests/linear_probe.py WEIGHTS DATA OUT trains one on six class folders of 16 px images.
"""

import sys

import torch.nn.functional as F
from torch import Tensor, nn

from mopro_fast import ops
from mopro_fast.checkpoints.weights import build_encoder, load_weights
from mopro_fast.config import DataConfig, OptimConfig, RunConfig, TrainConfig
from mopro_fast.models.method import Method, StepOutput
from mopro_fast.training.command import run
from mopro_fast.training.task import Task


class LinearProbe(Method):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__(encoder.requires_grad_(False))
        encoder.classifier = nn.Linear(encoder.feature_dim, encoder.classifier.out_features)

    def train(self, mode: bool = True) -> Method:
        super().train(mode)
        self.encoder_q.eval()
        return self

    def trained(self) -> list[list[nn.Parameter]]:
        return [list(self.encoder_q.classifier.parameters())]

    def forward(self, view_q: Tensor, _view_k: None, labels: Tensor, _epoch: int) -> StepOutput:
        logits, _ = self.query(ops.normalize(view_q))
        loss = F.cross_entropy(logits.float(), labels)
        metrics = {"loss": loss.detach(), "acc_cls": (logits.argmax(1) == labels).float().mean()}
        return StepOutput(loss, metrics, labels, labels >= 0)


class LinearProbeTask(Task):
    def __init__(self, config: TrainConfig, weights: str) -> None:
        super().__init__(config)
        self.weights = load_weights(weights)

    def build(self) -> Method:
        return LinearProbe(build_encoder(self.weights))


def task(weights: str, data: str, out: str) -> Task:
    config = TrainConfig(
        data=DataConfig(data, num_classes=6, image_size=16, eval_resize=16, cache="device"),
        optim=OptimConfig(epochs=3, batch_size=8, lr=0.003),
        run=RunConfig(out, device="cpu", log_every=2, checkpoint_every=2, tensorboard=False),
    )
    return LinearProbeTask(config, weights)


if __name__ == "__main__":
    sys.exit(run(task(*sys.argv[1:])))
