"""SqueezeNet for small images."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from adalfl_jax.models.convolution import convolve
from adalfl_jax.models.initializers import glorot
from adalfl_jax.models.layers import ConvNormRelu, MaxPool, Stack, global_average, require_images


class Fire(nnx.Module):
    """Few channels out of many by 1x1, then many again, half of them by 1x1 and half by 3x3.

    Args:
      residual: whether the input is added to the output.
    """

    def __init__(self, num_in: int, num_squeezed: int, num_out: int, *, rngs: nnx.Rngs, residual: bool = False):
        self.squeeze = ConvNormRelu(num_in, num_squeezed, 1, rngs=rngs)
        self.expand_1 = ConvNormRelu(num_squeezed, num_out // 2, 1, rngs=rngs)
        self.expand_3 = ConvNormRelu(num_squeezed, num_out // 2, 3, rngs=rngs)
        self.residual = residual

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Images `[B, H, W, num_in]` to `[B, H, W, num_out]`."""
        squeezed = self.squeeze(inputs)
        expanded = jnp.concatenate([self.expand_1(squeezed), self.expand_3(squeezed)], axis=-1)
        return expanded + inputs if self.residual else expanded


class SqueezeNet(nnx.Module):
    """SqueezeNet (Iandola et al., 2016) with bypasses around three fires and batch norm after all convolutions but one.

    734,986 parameters on 32x32x3 and 10 classes. Its source has a fourth bypass, around the last fire, dropout behind
    that, and a ReLU behind the last convolution.

    Raises:
      ValueError: images smaller than 8x8, which three poolings would leave nothing of.
    """

    def __init__(self, input_shape: Sequence[int], num_outputs: int, *, rngs: nnx.Rngs, remat: bool = False):
        num_in = require_images("squeezenet", input_shape, 8)
        blocks = [
            Stack([ConvNormRelu(num_in, 96, 3, rngs=rngs), MaxPool()]),
            Fire(96, 16, 128, rngs=rngs),
            Fire(128, 16, 128, residual=True, rngs=rngs),
            Fire(128, 32, 256, rngs=rngs),
            MaxPool(),
            Fire(256, 32, 256, residual=True, rngs=rngs),
            Fire(256, 48, 384, rngs=rngs),
            Fire(384, 48, 384, residual=True, rngs=rngs),
            Fire(384, 64, 512, rngs=rngs),
            MaxPool(),
            Fire(512, 64, 512, rngs=rngs),
        ]
        self.features = Stack(blocks, remat=remat)
        self.output = nnx.Conv(512, num_outputs, (1, 1), kernel_init=glorot, conv_general_dilated=convolve, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Images `[B, H, W, channels]` to outputs `[B, C]`."""
        return global_average(self.output(self.features(inputs)))
