"""A network and data small enough for many short runs."""

import torch
from torch import nn

from bcosification.train.data import ImageDataModule, ImageTensors, digits

STATISTICS = dict(mean=[0.5] * 3, std=[0.5] * 3)


def small_network(seed=0):
    """A standard network with every kind of bias: convolution, BatchNorm, linear."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip
    for parameter in (model[1].bias, model[1].weight):
        nn.init.uniform_(parameter, 0.3, 1)
    return model


def small_data(count=48, batch_size=12):
    part = digits("train")
    data = ImageTensors(part.images[:count], part.labels[:count], part.class_names)
    return ImageDataModule(data, data, part.class_names, batch_size=batch_size)
