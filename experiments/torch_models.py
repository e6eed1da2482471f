"""The zoo in PyTorch, for 10 classes, written from the papers: what the tests and the benchmark compare ours with.

Needs PyTorch, of the extra `[parity]` or `[bench]`. `as_in_torch` carries the variables of ours over.
"""

from __future__ import annotations

import functools
from collections import OrderedDict

import jax
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

from adalfl_jax.types import PyTree


def named(**layers):
    return nn.Sequential(OrderedDict(layers))


def conv_norm(num_in, num_out, size, **options):
    conv = nn.Conv2d(num_in, num_out, size, **{"padding": size // 2, **options})
    return named(conv=conv, norm=nn.BatchNorm2d(num_out), relu=nn.ReLU())


def average():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def logistic():
    return named(flatten=nn.Flatten(), output=nn.Linear(784, 10))


def mlp():
    hidden = nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU())
    return named(flatten=nn.Flatten(), hidden=hidden, output=nn.Linear(1000, 10))


def lenet5():
    """With the paper's names. C5, a convolution there, is linear, since its kernel is of the size of its input."""
    return named(
        C1=nn.Sequential(nn.Conv2d(1, 6, 5), nn.Tanh()),
        S2=nn.AvgPool2d(2),
        C3=nn.Sequential(nn.Conv2d(6, 16, 5), nn.Tanh()),
        S4=nn.AvgPool2d(2),
        C5=nn.Sequential(nn.Flatten(), nn.Linear(256, 120), nn.Tanh()),
        F6=nn.Sequential(nn.Linear(120, 84), nn.Tanh()),
        output=nn.Linear(84, 10),
    )


def all_cnn_c(dropout_rate):
    return nn.Sequential(
        conv_norm(3, 96, 3),
        conv_norm(96, 96, 3),
        conv_norm(96, 96, 3, stride=2),
        nn.Dropout(dropout_rate),
        conv_norm(96, 192, 3),
        conv_norm(192, 192, 3),
        conv_norm(192, 192, 3, stride=2),
        nn.Dropout(dropout_rate),
        conv_norm(192, 192, 3, padding=0),
        conv_norm(192, 192, 1),
        conv_norm(192, 10, 1),
        average(),
    )


def vgg16():
    stages, num_in = [], 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        convs = [conv_norm(fan_in, width, 3) for fan_in in (num_in, *[width] * (depth - 1))]
        stages.append(nn.Sequential(*convs, nn.MaxPool2d(2)))
        num_in = width
    return named(features=nn.Sequential(*stages), average=average(), output=nn.Linear(512, 10))


class Fire(nn.Module):
    def __init__(self, num_in, num_squeezed, num_out):
        super().__init__()
        self.squeeze = conv_norm(num_in, num_squeezed, 1)
        self.expand_1 = conv_norm(num_squeezed, num_out // 2, 1)
        self.expand_3 = conv_norm(num_squeezed, num_out // 2, 3)

    def forward(self, inputs):
        squeezed = self.squeeze(inputs)
        return torch.cat([self.expand_1(squeezed), self.expand_3(squeezed)], dim=1)


class SqueezeNet(nn.Module):
    """With the paper's names."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv10 = conv_norm(3, 96, 3), nn.Conv2d(512, 10, 1)
        self.fire2, self.fire3, self.fire4 = Fire(96, 16, 128), Fire(128, 16, 128), Fire(128, 32, 256)
        self.fire5, self.fire6 = Fire(256, 32, 256), Fire(256, 48, 384)
        self.fire7, self.fire8 = Fire(384, 48, 384), Fire(384, 64, 512)
        self.fire9 = Fire(512, 64, 512)
        self.pool, self.average = nn.MaxPool2d(2), average()

    def forward(self, images):
        hidden = self.fire2(self.pool(self.conv1(images)))
        hidden = self.pool(self.fire4(hidden + self.fire3(hidden)))
        hidden = self.fire6(hidden + self.fire5(hidden))
        hidden = self.pool(self.fire8(hidden + self.fire7(hidden)))
        return self.average(self.conv10(self.fire9(hidden)))


class Residual(nn.Module):
    def __init__(self, num_in, num_out, stride, *body):
        super().__init__()
        self.body, self.shortcut = nn.Sequential(*body, nn.BatchNorm2d(num_out)), nn.Identity()
        if num_in != num_out or stride > 1:
            projection = nn.Conv2d(num_in, num_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(num_out))

    def forward(self, inputs):
        return torch.relu(self.body(inputs) + self.shortcut(inputs))


def basic(num_in, width, stride):
    first = conv_norm(num_in, width, 3, stride=stride, bias=False)
    return Residual(num_in, width, stride, first, nn.Conv2d(width, width, 3, padding=1, bias=False))


def bottleneck(num_in, width, stride):
    """With its stride in the 3x3 convolution."""
    down, middle = conv_norm(num_in, width, 1, bias=False), conv_norm(width, width, 3, stride=stride, bias=False)
    return Residual(num_in, 4 * width, stride, down, middle, nn.Conv2d(width, 4 * width, 1, bias=False))


def places(counts):
    """The stage and stride of every block."""
    return [(stage, 2 if stage and not index else 1) for stage, count in enumerate(counts) for index in range(count)]


def resnet(depth):
    block, expansion = (bottleneck, 4) if depth == 50 else (basic, 1)
    blocks, num_in = [], 64
    for stage, stride in places((2, 2, 2, 2) if depth == 18 else (3, 4, 6, 3)):
        blocks.append(block(num_in, 64 * 2**stage, stride))
        num_in = expansion * 64 * 2**stage
    stem = conv_norm(3, 64, 3, bias=False)
    return named(stem=stem, blocks=nn.Sequential(*blocks), average=average(), output=nn.Linear(num_in, 10))


class PreActivation(nn.Module):
    def __init__(self, num_in, num_out, stride):
        super().__init__()
        self.before = named(norm=nn.BatchNorm2d(num_in), relu=nn.ReLU())
        self.first = conv_norm(num_in, num_out, 3, stride=stride, bias=False)
        self.last = nn.Conv2d(num_out, num_out, 3, padding=1, bias=False)
        fits = num_in == num_out and stride == 1
        self.shortcut = None if fits else nn.Conv2d(num_in, num_out, 1, stride, bias=False)

    def forward(self, inputs):
        activated = self.before(inputs)
        shortcut = inputs if self.shortcut is None else self.shortcut(activated)
        return shortcut + self.last(self.first(activated))


def wide_resnet(depth, width):
    blocks, num_in = [], 16
    for stage, stride in places([(depth - 4) // 6] * 3):
        blocks.append(PreActivation(num_in, 16 * width * 2**stage, stride))
        num_in = 16 * width * 2**stage
    stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    last = {"norm": nn.BatchNorm2d(num_in), "relu": nn.ReLU(), "average": average(), "output": nn.Linear(num_in, 10)}
    return named(stem=stem, blocks=nn.Sequential(*blocks), **last)


LAYERS = {
    "mlp": {"hidden.1": "hidden.2"},
    "lenet5": {"conv_0": "C1.0", "conv_1": "C3.0", "hidden_0": "C5.1", "hidden_1": "F6.0"},
    "allcnnc": {f"features.{stage}.{index}": f"{4 * stage + index}" for stage in range(3) for index in range(3)},
    "squeezenet": {
        "features.0.0": "conv1",
        **{f"features.{index}.": f"fire{fire}." for fire, index in enumerate((1, 2, 3, 5, 6, 7, 8, 10), start=2)},
        "output": "conv10",
    },
    "wide_resnet": {"norm_0": "before.norm", "conv_0": "first.conv", "norm_1": "first.norm", "conv_1": "last"},
}  # model -> parts of paths in flax, without the "blocks" of a stack -> the name in PyTorch where it is another
PARTS = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
AXES = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}  # HWIO to OIHW, and a matrix to its transpose

dotted = functools.partial(jax.tree_util.keystr, simple=True, separator=".")


def as_in_torch(name: str, *trees: PyTree) -> dict[str, np.ndarray]:
    """Arrays of flax by their names in PyTorch and in its layouts."""
    leaves = [leaf for tree in trees for leaf in jax.tree.leaves_with_path(tree)]
    arrays = {}
    for path, leaf in leaves:
        values = np.asarray(leaf)
        layer, _, part = dotted(path).replace(".blocks.", ".").rpartition(".")
        for in_flax, in_torch in LAYERS.get(name, {}).items():
            layer = layer.replace(in_flax, in_torch)
        if (layer, part) == ("C5.1", "kernel"):  # flax flattens in the order H, W, C and PyTorch in C, H, W
            values = values.reshape(4, 4, 16, 120).transpose(2, 0, 1, 3).reshape(256, 120)
        arrays[f"{layer}.{PARTS[part]}"] = values.transpose(AXES[values.ndim])
    assert len(arrays) == len(leaves)
    return arrays


def load_variables(name: str, module: nn.Module, *trees: PyTree) -> None:
    """Gives a module the variables of ours: all of them, and no others."""
    module.load_state_dict({key: torch.tensor(values) for key, values in as_in_torch(name, *trees).items()})


def images_in_torch(images: np.ndarray) -> torch.Tensor:
    """Images `[..., H, W, channels]` as PyTorch takes them, `[..., channels, H, W]`."""
    return torch.tensor(np.ascontiguousarray(np.moveaxis(images, -1, -3)))
