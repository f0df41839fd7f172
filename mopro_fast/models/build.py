"""The model that a config describes."""

from mopro_fast.config import TrainConfig
from mopro_fast.models.baseline import CrossEntropy
from mopro_fast.models.capro import CAPro
from mopro_fast.models.method import Method
from mopro_fast.models.mopro import MoPro
from mopro_fast.models.resnet import Backbone, ResNet


def build_encoder(config: TrainConfig) -> ResNet:
    m = config.model
    encoder = ResNet(m.arch, config.data.num_classes, m.embed_dim, m.width, m.stem, m.bn_group)
    encoder.recompute = config.run.recompute
    return encoder


def build(config: TrainConfig) -> Method:
    """The model that ``config`` describes, with fresh weights from torch's global generator."""
    encoder, m = build_encoder(config), config.model
    if config.method == "ce":
        return CrossEntropy(encoder)
    if config.method == "capro":
        return CAPro(encoder, Backbone(m.arch, m.width, m.stem, m.bn_group), config.mopro, config.capro)
    return MoPro(encoder, build_encoder(config), config.mopro)
