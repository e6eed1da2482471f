"""Where parameters start.

The models draw theirs as the literature does: He et al. (2015) before ReLU, Glorot & Bengio (2010) before tanh and at
the output, uniformly, with biases of zero. PyTorch's default is another rule.
"""

from __future__ import annotations

import math

import jax
from flax import nnx

from adalfl_jax.types import PyTree

he = nnx.initializers.he_uniform()
glorot = nnx.initializers.glorot_uniform()


def redraw_as_pytorch(rng_key: jax.Array, params: PyTree) -> PyTree:
    """Draws parameters as PyTorch draws those of its linear and convolutional layers by default.

    Kernels and biases are uniform in ±1/√fan_in. That is a sixth of He's variance: outputs start near zero, and so the
    first steps can be larger.

    Args:
      rng_key: of the draw.
      params: nested dictionaries. A "kernel" `[..., num_in, num_out]` and what lies beside it are drawn anew; the rest,
        scales and offsets of batch norm, stays.

    Returns:
      Parameters of the same structure, shapes and types.

    Raises:
      ValueError: there is no "kernel" among them, so that nothing would be drawn.
    """
    leaves, structure = jax.tree.flatten_with_path(params)
    fan_ins = {
        path[:-1]: math.prod(leaf.shape[:-1])
        for path, leaf in leaves
        if path and getattr(path[-1], "key", None) == "kernel"
    }
    if not fan_ins:
        raise ValueError(
            'params must be nested dictionaries with a "kernel" [..., num_in, num_out] in each layer; got '
            f"{jax.tree.map(jax.typeof, params)}"
        )

    def draw(key: jax.Array, path: tuple, leaf: jax.Array) -> jax.Array:
        if path[:-1] not in fan_ins:
            return leaf
        bound = 1 / math.sqrt(fan_ins[path[:-1]])
        return jax.random.uniform(key, leaf.shape, leaf.dtype, -bound, bound)

    keys = jax.random.split(rng_key, len(leaves))
    return structure.unflatten(draw(key, path, leaf) for key, (path, leaf) in zip(keys, leaves, strict=True))
