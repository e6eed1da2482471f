"""Residual networks for small images: a 3x3 stem of stride 1 and no pooling before the blocks."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import nnx

from adalfl_jax.models.initializers import glorot
from adalfl_jax.models.layers import ConvNormRelu, Stack, batch_norm, conv, global_average, require_images

WIDTHS = (64, 128, 256, 512)


class Basic(nnx.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, num_in: int, width: int, stride: int, *, rngs: nnx.Rngs):
        self.body = Stack(
            [
                ConvNormRelu(num_in, width, 3, stride=stride, bias=False, rngs=rngs),
                conv(width, width, 3, rngs=rngs),
                batch_norm(width, rngs=rngs),
            ]
        )
        self.shortcut = _shortcut(num_in, width, stride, rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Images `[B, H, W, num_in]` to `[B, H', W', width]`."""
        return jax.nn.relu(self.body(inputs) + self.shortcut(inputs))


class Bottleneck(nnx.Module):
    """1x1 down to `width`, 3x3, 1x1 up to four times `width`, and a shortcut.

    The stride is that of the 3x3, so that no value is skipped, and not of the first 1x1 as in He et al. (2016).
    """

    expansion = 4

    def __init__(self, num_in: int, width: int, stride: int, *, rngs: nnx.Rngs):
        num_out = width * self.expansion
        self.body = Stack(
            [
                ConvNormRelu(num_in, width, 1, bias=False, rngs=rngs),
                ConvNormRelu(width, width, 3, stride=stride, bias=False, rngs=rngs),
                conv(width, num_out, 1, rngs=rngs),
                batch_norm(num_out, rngs=rngs),
            ]
        )
        self.shortcut = _shortcut(num_in, num_out, stride, rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Images `[B, H, W, num_in]` to `[B, H', W', 4 width]`."""
        return jax.nn.relu(self.body(inputs) + self.shortcut(inputs))


DEPTHS: dict[int, tuple[type[Basic] | type[Bottleneck], tuple[int, ...]]] = {
    18: (Basic, (2, 2, 2, 2)),
    34: (Basic, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
}  # depth -> the block, and how many of it in each stage


class ResNet(nnx.Module):
    """ResNet-18, 34 or 50 (He et al., 2016) with the stem for 32x32: 11,173,962 parameters at depth 18 and 10 classes.

    Raises:
      ValueError: a depth that is none of these, or images smaller than 8x8, which the last stages would not see.
    """

    def __init__(
        self, input_shape: Sequence[int], num_outputs: int, depth: int = 18, *, rngs: nnx.Rngs, remat: bool = False
    ):
        channels = require_images("resnet", input_shape, 8)
        if depth not in DEPTHS:
            raise ValueError(f"resnet has a depth of {', '.join(map(str, DEPTHS))}; got {depth!r}")
        block, counts = DEPTHS[depth]
        num_in = WIDTHS[0]
        self.stem = ConvNormRelu(channels, num_in, 3, bias=False, rngs=rngs)
        blocks = []
        for width, count in zip(WIDTHS, counts, strict=True):
            for index in range(count):
                stride = 2 if index == 0 and width != WIDTHS[0] else 1
                blocks.append(block(num_in, width, stride, rngs=rngs))
                num_in = width * block.expansion
        self.blocks = Stack(blocks, remat=remat)
        self.output = nnx.Linear(num_in, num_outputs, kernel_init=glorot, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Images `[B, H, W, channels]` to outputs `[B, C]`."""
        return self.output(global_average(self.blocks(self.stem(inputs))))


def _shortcut(num_in: int, num_out: int, stride: int, rngs: nnx.Rngs) -> Stack:
    if num_in == num_out and stride == 1:
        return Stack([])
    return Stack([conv(num_in, num_out, 1, stride=stride, rngs=rngs), batch_norm(num_out, rngs=rngs)])
