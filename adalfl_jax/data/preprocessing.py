"""What becomes of raw inputs before a model takes them, and of its outputs after."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adalfl_jax.data.checks import check_finite, check_numbers, check_tokens
from adalfl_jax.data.errors import DatasetError
from adalfl_jax.data.scaling import Scaling


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """By the statistics of a training split; all that is needed of a dataset to predict for new rows.

    Images of bytes stay bytes in memory, and so do tokens: `normalize` makes of a batch of them what a model takes.
    Everything else is standardised once, by `encode`.
    """

    shape: tuple[int, ...]  # of one raw example, with the last axis of one that images without colour get
    num_outputs: int  # C: classes of a classification, columns of a regression
    inputs: Scaling | None = None  # of bytes one number a channel; None where inputs are taken as they are
    targets: Scaling | None = None  # of a regression
    is_image: bool = False  # whether inputs are images of bytes
    num_tokens: int = 0  # of the vocabulary, where inputs are tokens

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """What `dataclasses.asdict` was made of, be it by way of JSON.

        Raises:
          KeyError, TypeError: other values.
        """
        scalings = {
            name: None if values[name] is None else Scaling.from_dict(values[name]) for name in ("inputs", "targets")
        }
        return cls(**{**values, **scalings, "shape": tuple(values["shape"])})

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example, as a model takes it."""
        return (*self.shape, self.num_tokens) if self.num_tokens else self.shape

    def encode(self, inputs: Any) -> np.ndarray:
        """New inputs `[N, ...]`, in the form and the units of the raw examples, as the splits of the dataset hold them.

        Images of bytes and tokens stay what they are, uint8; everything else is standardised as the training split was,
        float32. A last axis of one, of images without colour say, may be left out.

        Raises:
          DatasetError: inputs of another shape or type than the examples have, or that are not finite.
        """
        inputs = np.asarray(inputs)
        if self.shape == (*inputs.shape[1:], 1):
            inputs = inputs[..., None]
        if inputs.ndim == 0 or inputs.shape[1:] != self.shape:
            raise DatasetError(f"new rows: inputs must be [N, {', '.join(map(str, self.shape))}]; got {inputs.shape}")
        check_numbers("new rows", "inputs", inputs)
        if self.is_image and inputs.dtype != np.uint8:
            raise DatasetError(f"new rows: inputs must be images of uint8, from 0 to 255; got {inputs.dtype}")
        if self.num_tokens and len(inputs):
            check_tokens("new rows", inputs, self.num_tokens)
        if self.is_image or self.num_tokens:
            return inputs.astype(np.uint8)
        scaled = inputs.astype(np.float32) if self.inputs is None else self.inputs.apply(inputs)
        check_finite("new rows", inputs=scaled)
        return scaled

    def normalize(self, inputs: jax.Array) -> jax.Array:
        """Encoded inputs `[..., channels]` as a model takes them, float32.

        Bytes have mean 0 and deviation 1 over the training split then, and tokens `[..., T]` are one-hot,
        `[..., T, num_tokens]`.
        """
        if self.num_tokens:
            return jax.nn.one_hot(inputs, self.num_tokens)
        if not self.is_image or self.inputs is None:
            return inputs
        shape = (1,) * (inputs.ndim - 1) + (-1,)
        mean, deviation = (
            jnp.array(value, jnp.float32).reshape(shape) for value in (self.inputs.mean, self.inputs.deviation)
        )
        return (inputs.astype(jnp.float32) - mean) / deviation

    def decode(self, outputs: Any) -> np.ndarray:
        """Outputs `[N, C]` of a model: of a regression in the target's units, float64; logits as they are.

        Raises:
          DatasetError: another number of columns than the targets have.
        """
        return np.asarray(outputs) if self.targets is None else self.targets.invert(outputs)
