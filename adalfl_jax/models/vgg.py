"""VGG-16 with batch norm for small images."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
from flax import nnx

from adalfl_jax.models.initializers import glorot
from adalfl_jax.models.layers import ConvNormRelu, MaxPool, Stack, global_average, require_images

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nnx.Module):
    """VGG-16 (Simonyan & Zisserman, 2015), batch norm after every convolution and one linear layer at the end.

    14,728,266 parameters on 32x32x3 and 10 classes. Images larger than 32x32 are averaged before the linear layer.

    Raises:
      ValueError: images smaller than 32x32, which five poolings would leave nothing of.
    """

    def __init__(self, input_shape: Sequence[int], num_outputs: int, *, rngs: nnx.Rngs, remat: bool = False):
        num_in = require_images("vgg16", input_shape, 32)
        stages = []
        for sizes in STAGES:
            pairs = itertools.pairwise((num_in, *sizes))
            layers = [ConvNormRelu(fan_in, fan_out, 3, rngs=rngs) for fan_in, fan_out in pairs]
            stages.append(Stack([*layers, MaxPool()]))
            num_in = sizes[-1]
        self.features = Stack(stages, remat=remat)
        self.output = nnx.Linear(num_in, num_outputs, kernel_init=glorot, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Images `[B, H, W, channels]` to outputs `[B, C]`."""
        return self.output(global_average(self.features(inputs)))
