"""Activations of a loss network, by name."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def smooth_leaky_relu(x: jax.Array, *, beta: float = 10.0, gamma: float = 0.01) -> jax.Array:
    r"""The paper's hidden activation, smooth everywhere and with a slope of at least `gamma`.

    .. math:: \varphi(x) = (1 - \gamma) \log(e^{\beta x} + 1) / \beta + \gamma x

    Value and derivatives of every order take one exponential and one logarithm together in a compiled program.

    Args:
      x: any shape.
      beta: sharpness of the bend at 0, > 0; as it grows this becomes the leaky ReLU.
      gamma: slope towards minus infinity, in [0, 1).

    References:
      Section 3 of arXiv 2301.13247.
    """
    return (1.0 - gamma) / beta * _softplus(beta * x) + gamma * x


@jax.custom_jvp
def _softplus(z: jax.Array) -> jax.Array:
    """log(1 + e^z), with the derivative below; that of `jax.nn.softplus` takes another exponential."""
    return jnp.maximum(z, 0) + jnp.log1p(jnp.exp(-jnp.abs(z)))


@jax.custom_jvp
def _sigmoid(z: jax.Array) -> jax.Array:
    """1 / (1 + e^-z), of the exponential that `_softplus` takes, so that XLA computes it once."""
    exponential = jnp.exp(-jnp.abs(z))
    return jnp.where(z >= 0, 1, exponential) / (1 + exponential)


@_softplus.defjvp
def _softplus_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return _softplus(*primals), _sigmoid(*primals) * tangents[0]


@_sigmoid.defjvp
def _sigmoid_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    slope = _sigmoid(*primals)
    return slope, slope * (1 - slope) * tangents[0]


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "smooth_leaky_relu": smooth_leaky_relu,
    **{
        name: getattr(jax.nn, name)
        for name in (
            *("celu", "elu", "gelu", "hard_tanh", "identity", "leaky_relu", "log_sigmoid", "mish", "relu", "relu6"),
            *("selu", "sigmoid", "silu", "soft_sign", "softplus", "squareplus", "tanh"),
        )
    },
}
