"""The zoo of base models, by name, behind the functional adapter."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from adalfl_jax.models.classic import MLP as MLP
from adalfl_jax.models.classic import LeNet5 as LeNet5
from adalfl_jax.models.classic import LogisticRegression as LogisticRegression
from adalfl_jax.models.functional import Model as Model
from adalfl_jax.models.functional import functionalize as functionalize
from adalfl_jax.registry import lookup
from adalfl_jax.types import PyTree


def _logistic(input_shape: Sequence[int], num_outputs: int) -> Callable[[nnx.Rngs], nnx.Module]:
    return lambda rngs: LogisticRegression(math.prod(input_shape), num_outputs, rngs=rngs)


def _mlp(
    input_shape: Sequence[int], num_outputs: int, hidden_sizes: Sequence[int] = (1000, 1000)
) -> Callable[[nnx.Rngs], nnx.Module]:
    if not hidden_sizes or any(size < 1 for size in hidden_sizes):
        raise ValueError(f"mlp needs hidden_sizes of at least 1 unit each; got {tuple(hidden_sizes)}")
    return lambda rngs: MLP(math.prod(input_shape), hidden_sizes, num_outputs, rngs=rngs)


def _lenet5(input_shape: Sequence[int], num_outputs: int) -> Callable[[nnx.Rngs], nnx.Module]:
    return lambda rngs: LeNet5(input_shape, num_outputs, rngs=rngs)


MODELS: dict[str, Callable[..., Callable[[nnx.Rngs], nnx.Module]]] = {
    "logistic": _logistic,
    "mlp": _mlp,
    "lenet5": _lenet5,
}


def make_model(name: str, input_shape: Sequence[int], num_outputs: int, **options: Any) -> Model:
    """Makes a base model of the zoo.

    Args:
      name: a key of `MODELS`.
      input_shape: of one example, for example `(28, 28, 1)`.
      num_outputs: C.
      **options: of that model: `hidden_sizes` of "mlp".

    Raises:
      ValueError: an unknown model or option, or inputs the model cannot take.
    """
    builder = lookup("model", MODELS, name)
    known = list(inspect.signature(builder).parameters)[2:]
    for option in options:
        if option not in known:
            raise ValueError(f"model {name!r} has no option {option!r}; it has {', '.join(known) or 'none'}")
    return functionalize(builder(input_shape, num_outputs, **options))


def count_params(params: PyTree) -> int:
    """Number of scalars in a pytree of arrays or of their shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
