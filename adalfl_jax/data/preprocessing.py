"""What becomes of raw inputs before a model takes them, and of its outputs after."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adalfl_jax.arguments import is_count
from adalfl_jax.data.checks import check_finite, check_numbers, check_tokens, to_floats
from adalfl_jax.data.errors import DatasetError
from adalfl_jax.data.scaling import Scaling


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """By the statistics of a training split; all that is needed of a dataset to predict for new rows.

    Images of bytes stay bytes in memory, and so do tokens: `normalize` makes of a batch of them what a model takes.
    Everything else is standardised once, by `encode`.

    Raises:
      ValueError: no shape or number of outputs, or means that do not fit: of another number than columns, channels or
        outputs, of tokens, or none of anything else.
    """

    shape: tuple[int, ...]  # of one raw example, with the last axis of one that images without colour get
    num_outputs: int  # C: classes of a classification, columns of a regression
    inputs: Scaling | None  # of images of bytes one number a channel; None of tokens
    targets: Scaling | None = None  # of a regression
    is_image: bool = False  # whether inputs are images of bytes
    num_tokens: int = 0  # of the vocabulary, where inputs are tokens

    def __post_init__(self) -> None:
        if not (self.shape and all(map(is_count, (*self.shape, self.num_outputs)))):
            raise ValueError(
                f"shape and num_outputs must be of whole numbers above 0; got {self.shape!r} and {self.num_outputs!r}"
            )
        if (self.inputs is None) != (self.num_tokens > 0) or (self.is_image and self.num_tokens):
            raise ValueError(f"all inputs but tokens have means; got {self.inputs} and num_tokens {self.num_tokens}")
        for name, size in (("inputs", self.shape[-1]), ("targets", self.num_outputs)):
            scaling = getattr(self, name)
            if scaling is not None and np.shape(scaling.mean) not in ((), (size,)):
                raise ValueError(f"{name} must have one mean, or {size}; got {scaling.mean}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """What `dataclasses.asdict` was made of, be it by way of JSON.

        Raises:
          KeyError, TypeError, ValueError: other values.
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
        if self.is_image or self.inputs is None:
            return inputs.astype(np.uint8)
        scaled = self.inputs.apply(to_floats(inputs))
        check_finite("new rows", inputs=scaled)
        return scaled

    def normalize(self, inputs: jax.Array) -> jax.Array:
        """Encoded inputs `[..., channels]` as a model takes them, float32.

        Bytes have mean 0 and deviation 1 over the training split then, and tokens `[..., T]` are one-hot,
        `[..., T, num_tokens]`.
        """
        if self.num_tokens:
            return jax.nn.one_hot(inputs, self.num_tokens)
        if not self.is_image:
            return inputs
        assert self.inputs is not None
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
