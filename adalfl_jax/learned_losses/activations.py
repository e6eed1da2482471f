"""Activations of a loss network, by name."""

from __future__ import annotations

from collections.abc import Callable

import jax


def smooth_leaky_relu(x: jax.Array, *, beta: float = 10.0, gamma: float = 0.01) -> jax.Array:
    r"""The paper's hidden activation, smooth everywhere and with a slope of at least `gamma`.

    .. math:: \varphi(x) = (1 - \gamma) \log(e^{\beta x} + 1) / \beta + \gamma x

    Args:
      x: any shape.
      beta: sharpness of the bend at 0, > 0; as it grows this becomes the leaky ReLU.
      gamma: slope towards minus infinity, in [0, 1).

    References:
      Section 3 of arXiv 2301.13247.
    """
    return (1.0 - gamma) / beta * jax.nn.softplus(beta * x) + gamma * x


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
