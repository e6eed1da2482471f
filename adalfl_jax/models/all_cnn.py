"""The all-convolutional network."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import nnx

from adalfl_jax.arguments import require_number
from adalfl_jax.models.layers import ConvNormRelu, Stack, global_average, require_images


class AllCNNC(nnx.Module):
    """All-CNN-C (Springenberg et al., 2015) with batch norm: convolutions with stride 2 in the place of pooling.

    1,372,254 parameters on 32x32x3 and 10 classes. As in its source, the seventh convolution is not padded, and ReLU
    follows the last one too, here behind batch norm. Inputs are not dropped out, as a fifth of them is there.

    Raises:
      ValueError: images smaller than 9x9, which the unpadded convolution could not be applied to, or a dropout rate
        outside of [0, 1).
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_outputs: int,
        *,
        rngs: nnx.Rngs,
        dropout_rate: float = 0.5,
        remat: bool = False,
    ):
        num_in = require_images("allcnnc", input_shape, 9)
        require_number("dropout_rate", dropout_rate, least=0.0)
        if dropout_rate >= 1:
            raise ValueError(f"dropout_rate must be a share below 1; got {dropout_rate}")
        stages = []
        for width in (96, 192):
            layers = [
                ConvNormRelu(num_in, width, 3, rngs=rngs),
                ConvNormRelu(width, width, 3, rngs=rngs),
                ConvNormRelu(width, width, 3, stride=2, rngs=rngs),
                nnx.Dropout(dropout_rate, rngs=rngs),
            ]
            stages.append(Stack(layers))
            num_in = width
        head = [
            ConvNormRelu(192, 192, 3, padded=False, rngs=rngs),
            ConvNormRelu(192, 192, 1, rngs=rngs),
            ConvNormRelu(192, num_outputs, 1, rngs=rngs),
        ]
        self.features = Stack([*stages, Stack(head)], remat=remat)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Images `[B, H, W, channels]` to outputs `[B, C]`."""
        return global_average(self.features(inputs))
