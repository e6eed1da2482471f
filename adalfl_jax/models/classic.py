"""Logistic regression, the multi-layer perceptron and LeNet-5."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Sequence

import jax
from flax import nnx

from adalfl_jax.arguments import is_count
from adalfl_jax.models.convolution import convolve
from adalfl_jax.models.initializers import glorot, he
from adalfl_jax.models.layers import require_images


class LogisticRegression(nnx.Module):
    """One linear layer on the flattened inputs; for a regression, linear regression."""

    def __init__(self, input_shape: Sequence[int], num_outputs: int, *, rngs: nnx.Rngs):
        self.output = nnx.Linear(math.prod(input_shape), num_outputs, kernel_init=glorot, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Inputs `[B, ...]` to outputs `[B, C]`."""
        return self.output(inputs.reshape(len(inputs), -1))


class MLP(nnx.Module):
    """ReLU layers on the flattened inputs. The paper's is 1000-1000: 1,796,010 parameters on 28x28 and 10 classes.

    Raises:
      ValueError: no hidden layer, or one without units.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_outputs: int,
        hidden_sizes: Sequence[int] = (1000, 1000),
        *,
        rngs: nnx.Rngs,
    ):
        if not (isinstance(hidden_sizes, Collection) and len(hidden_sizes) and all(map(is_count, hidden_sizes))):
            raise ValueError(f"mlp needs hidden_sizes of at least 1 unit each; got {hidden_sizes!r}")
        sizes = (math.prod(input_shape), *hidden_sizes)
        self.hidden = nnx.List(
            nnx.Linear(fan_in, fan_out, kernel_init=he, rngs=rngs) for fan_in, fan_out in itertools.pairwise(sizes)
        )
        self.output = nnx.Linear(sizes[-1], num_outputs, kernel_init=glorot, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Inputs `[B, ...]` to outputs `[B, C]`."""
        hidden = inputs.reshape(len(inputs), -1)
        for layer in self.hidden:
            hidden = jax.nn.relu(layer(hidden))
        return self.output(hidden)


class LeNet5(nnx.Module):
    """LeNet-5 with tanh and average pooling (LeCun et al., 1998): 44,426 parameters on 28x28x1 and 10 classes.

    Raises:
      ValueError: images too small for two 5x5 valid convolutions, each followed by 2x2 pooling.
    """

    def __init__(self, input_shape: Sequence[int], num_outputs: int, *, rngs: nnx.Rngs):
        channels = require_images("lenet5", input_shape, 16)
        height, width = (((size - 4) // 2 - 4) // 2 for size in input_shape[:2])
        num_features = math.prod((height, width, 16))
        make_conv = functools.partial(
            nnx.Conv, kernel_size=(5, 5), padding="VALID", kernel_init=glorot, conv_general_dilated=convolve, rngs=rngs
        )
        self.conv_0 = make_conv(channels, 6)
        self.conv_1 = make_conv(6, 16)
        self.hidden_0 = nnx.Linear(num_features, 120, kernel_init=glorot, rngs=rngs)
        self.hidden_1 = nnx.Linear(120, 84, kernel_init=glorot, rngs=rngs)
        self.output = nnx.Linear(84, num_outputs, kernel_init=glorot, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Images `[B, H, W, channels]` to outputs `[B, C]`."""
        hidden = inputs
        for conv in (self.conv_0, self.conv_1):
            hidden = nnx.avg_pool(jax.nn.tanh(conv(hidden)), (2, 2), strides=(2, 2))
        hidden = hidden.reshape(len(hidden), -1)
        for layer in (self.hidden_0, self.hidden_1):
            hidden = jax.nn.tanh(layer(hidden))
        return self.output(hidden)
