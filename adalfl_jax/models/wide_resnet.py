"""Wide residual networks."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import nnx

from adalfl_jax.arguments import is_count
from adalfl_jax.models.initializers import glorot
from adalfl_jax.models.layers import Stack, batch_norm, conv, global_average, require_images


class PreActivation(nnx.Module):
    """Batch norm and ReLU before each of two 3x3 convolutions, and a shortcut."""

    def __init__(self, num_in: int, num_out: int, stride: int, *, rngs: nnx.Rngs):
        self.norm_0 = batch_norm(num_in, rngs=rngs)
        self.conv_0 = conv(num_in, num_out, 3, stride=stride, rngs=rngs)
        self.norm_1 = batch_norm(num_out, rngs=rngs)
        self.conv_1 = conv(num_out, num_out, 3, rngs=rngs)
        changes = num_in != num_out or stride > 1
        self.shortcut = conv(num_in, num_out, 1, stride=stride, rngs=rngs) if changes else None

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Images `[B, H, W, num_in]` to `[B, H', W', num_out]`."""
        hidden = jax.nn.relu(self.norm_0(inputs))
        shortcut = inputs if self.shortcut is None else self.shortcut(hidden)
        return shortcut + self.conv_1(jax.nn.relu(self.norm_1(self.conv_0(hidden))))


class WideResNet(nnx.Module):
    """WRN-depth-width (Zagoruyko & Komodakis, 2016) without dropout.

    On 32x32x3 and 10 classes 10,961,370 parameters at 16-8, 36,479,194 at 28-10.

    Raises:
      ValueError: a depth that is not 6n + 4, a width that is no whole number of at least 1, or images smaller than 4x4.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_outputs: int,
        depth: int = 16,
        width: int = 8,
        *,
        rngs: nnx.Rngs,
        remat: bool = False,
    ):
        channels = require_images("wide_resnet", input_shape, 4)
        if not (is_count(depth) and is_count(width)) or depth < 10 or (depth - 4) % 6:
            raise ValueError(
                "wide_resnet has a depth of 6n + 4 with n of at least 1 (10, 16, 22, 28, 40, ...) and a width that is "
                f"a whole number of at least 1; got depth {depth!r}, width {width!r}"
            )
        self.stem = conv(channels, 16, 3, rngs=rngs)
        num_in, blocks = 16, []
        for stride, num_out in ((1, 16 * width), (2, 32 * width), (2, 64 * width)):
            for index in range((depth - 4) // 6):
                blocks.append(PreActivation(num_in, num_out, stride if index == 0 else 1, rngs=rngs))
                num_in = num_out
        self.blocks = Stack(blocks, remat=remat)
        self.norm = batch_norm(num_in, rngs=rngs)
        self.output = nnx.Linear(num_in, num_outputs, kernel_init=glorot, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Images `[B, H, W, channels]` to outputs `[B, C]`."""
        hidden = jax.nn.relu(self.norm(self.blocks(self.stem(inputs))))
        return self.output(global_average(hidden))
