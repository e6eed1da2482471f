"""What the convolutional models share: convolution, the same with batch norm, a stack of blocks.

Batch norm has a momentum of 0.9 and an epsilon of 1e-5. Its running variance averages the batches' biased variances;
PyTorch's averages the unbiased ones, n / (n - 1) times as large for n values a channel.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from adalfl_jax.models.initializers import he

BAND_COLUMNS = 256


def convolve(
    inputs: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """Convolution of images, for `nnx.Conv(conv_general_dilated=...)`; on a CPU it is a product of matrices.

    XLA compiles the gradient to a kernel, inside a loop and for a CPU, to code 25 to 55 times as slow as outside of
    one; training is such a loop. Which form is taken is settled when a program is lowered, not when it is traced, so
    that one lowered on a CPU for a GPU has the GPU's own convolution.

    Args:
      inputs: `[B, H, W, channels]`.
      kernel: `[h, w, channels, num_out]`.
      strides: down and across.
      padding: before and after, down and across; or "VALID" or "SAME".
      **options: others of `jax.lax.conv_general_dilated` at the defaults of `nnx.Conv`: no groups, no dilation.

    Returns:
      `[B, H', W', num_out]`.

    References:
      https://github.com/jax-ml/jax/issues/12868
    """
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(inputs.shape[1:3], kernel.shape[:2], strides, padding)
    native = functools.partial(jax.lax.conv_general_dilated, window_strides=strides, padding=padding, **options)
    product = functools.partial(_convolve_by_product, strides=strides, padding=padding)
    return jax.lax.platform_dependent(inputs, kernel, cpu=product, default=native)


def _convolve_by_product(
    inputs: jax.Array, kernel: jax.Array, *, strides: Sequence[int], padding: Sequence[tuple[int, int]]
) -> jax.Array:
    inputs = jnp.pad(inputs, ((0, 0), *padding, (0, 0)))
    _, height, width, num_in = inputs.shape
    h, w, _, num_out = kernel.shape
    num_rows, num_columns = (height - h) // strides[0] + 1, (width - w) // strides[1] + 1
    down = [slice(i, i + (num_rows - 1) * strides[0] + 1, strides[0]) for i in range(h)]
    if num_columns * num_out <= BAND_COLUMNS:
        # Of few channels the product below is too narrow to be fast. Here h rows of inputs give a row of outputs, by a
        # matrix with the kernel along its diagonals and zeros elsewhere: more arithmetic, and half the time of LeNet-5.
        offsets = jnp.arange(width)[:, None] - strides[1] * jnp.arange(num_columns)[None, :]
        diagonals = (offsets[None] == jnp.arange(w)[:, None, None]).astype(kernel.dtype)  # [w, width, num_columns]
        matrix = jnp.einsum("hwio,wxy->hxiyo", kernel, diagonals).reshape(h * width * num_in, num_columns * num_out)
        rows = inputs.reshape(-1, height, width * num_in)
        patches = [rows[:, i] for i in down]
    else:
        across = [slice(j, j + (num_columns - 1) * strides[1] + 1, strides[1]) for j in range(w)]
        matrix = kernel.reshape(h * w * num_in, num_out)
        patches = [inputs[:, i, j] for i in down for j in across]
    outputs = jnp.concatenate(patches, axis=-1).reshape(-1, len(matrix)) @ matrix
    return outputs.reshape(-1, num_rows, num_columns, num_out)


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
