"""What the convolutional models share: convolution with batch norm, a stack of blocks.

Batch norm has a momentum of 0.9 and an epsilon of 1e-5. Its running variance averages the batches' biased variances;
PyTorch's averages the unbiased ones, n / (n - 1) times as large for n values a channel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax
from flax import nnx

from adalfl_jax.models.convolution import convolve
from adalfl_jax.models.initializers import he


def conv(
    num_in: int, num_out: int, size: int, *, rngs: nnx.Rngs, stride: int = 1, padded: bool = True, bias: bool = False
) -> nnx.Conv:
    """A square convolution; padded by half its size on every side, so that stride 1 keeps height and width."""
    return nnx.Conv(
        num_in,
        num_out,
        (size, size),
        strides=stride,
        padding=size // 2 if padded else 0,
        use_bias=bias,
        kernel_init=he,
        conv_general_dilated=convolve,
        rngs=rngs,
    )


def batch_norm(num_features: int, *, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Batch norm over all axes but the last."""
    # Nothing is promoted on the way in: the statistics would turn a bfloat16 input, and all after it, to float32.
    return nnx.BatchNorm(num_features, momentum=0.9, epsilon=1e-5, promote_dtype=lambda arrays, **_: arrays, rngs=rngs)


class ConvNormRelu(nnx.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self,
        num_in: int,
        num_out: int,
        size: int,
        *,
        rngs: nnx.Rngs,
        stride: int = 1,
        padded: bool = True,
        bias: bool = True,
    ):
        self.conv = conv(num_in, num_out, size, stride=stride, padded=padded, bias=bias, rngs=rngs)
        self.norm = batch_norm(num_out, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Images `[B, H, W, num_in]` to `[B, H', W', num_out]`."""
        return jax.nn.relu(self.norm(self.conv(inputs)))


class MaxPool(nnx.Module):
    """2x2 maxima with stride 2; an odd row or column at the end is dropped."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Images `[B, H, W, channels]` to `[B, H // 2, W // 2, channels]`."""
        return nnx.max_pool(inputs, (2, 2), strides=(2, 2))


class Stack(nnx.Module):
    """Blocks one after the other.

    Args:
      blocks: modules of one argument.
      remat: whether the backward pass computes the inside of each block anew rather than keeping it in memory.
    """

    def __init__(self, blocks: Iterable[nnx.Module], *, remat: bool = False):
        self.blocks = nnx.List(blocks)
        self.remat = remat

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Applies every block to the output of the one before."""
        hidden = inputs
        for block in self.blocks:
            call = type(block).__call__
            hidden = (nnx.remat(call) if self.remat else call)(block, hidden)
        return hidden


def global_average(inputs: jax.Array) -> jax.Array:
    """Images `[B, H, W, channels]` to `[B, channels]`."""
    return inputs.mean(axis=(1, 2))


def require_images(model: str, input_shape: Sequence[int], min_size: int) -> int:
    """Returns the number of channels.

    Raises:
      ValueError: the inputs are no images, or smaller than the model can take.
    """
    if len(input_shape) != 3 or min(input_shape[:2]) < min_size:
        raise ValueError(
            f"{model} takes images [H, W, channels] of at least {min_size}x{min_size}; got {tuple(input_shape)}"
        )
    return input_shape[2]
