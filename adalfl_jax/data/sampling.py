"""Which examples a step sees: on the device, without replacement within an epoch, resumable at any step."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from adalfl_jax.types import Batch


# A loop of Python would compile `lax.map` anew at every call. Inline, as part of a larger program it is what it was.
@functools.partial(jax.jit, static_argnames=("num_steps", "num_examples", "batch_size"), inline=True)
def epoch_indices(
    rng_key: jax.Array, first_step: jax.Array | int, *, num_steps: int, num_examples: int, batch_size: int
) -> jax.Array:
    """Indices of the examples of steps `first_step`, ..., `first_step + num_steps - 1`, `[num_steps, batch_size]`.

    Each epoch is a permutation drawn from `rng_key` and the number of the epoch, cut into batches; the remainder that
    does not fill a batch sits that epoch out. The indices of a step depend on `rng_key` and the step alone, however the
    steps are cut into calls, so a position in the data is just a number.

    Raises:
      ValueError: the batch is larger than the number of examples.
    """
    if not 1 <= batch_size <= num_examples:
        raise ValueError(f"a batch of {batch_size} cannot be drawn from a split of {num_examples} examples")
    steps_per_epoch = num_examples // batch_size
    steps = first_step + jnp.arange(num_steps)
    first_epoch = first_step // steps_per_epoch
    num_epochs = (num_steps + steps_per_epoch - 2) // steps_per_epoch + 1  # the most that many steps can touch

    def permutation(epoch: jax.Array) -> jax.Array:
        return jax.random.permutation(jax.random.fold_in(rng_key, epoch), num_examples)

    def touched(epoch: jax.Array) -> jax.Array:
        """Sorting is expensive: an epoch that begins after the last step is not drawn."""
        last_epoch = steps[-1] // steps_per_epoch
        return jax.lax.cond(epoch <= last_epoch, permutation, lambda _: jnp.arange(num_examples), epoch)

    order = jax.lax.map(touched, first_epoch + jnp.arange(num_epochs))  # [num_epochs, num_examples]
    rows = steps // steps_per_epoch - first_epoch
    columns = (steps % steps_per_epoch * batch_size)[:, None] + jnp.arange(batch_size)[None, :]
    return order[rows[:, None], columns]


def take(split: Batch | tuple[jax.Array, jax.Array], indices: jax.Array) -> Batch:
    """The examples of a split at `indices` of any shape, which becomes the leading axes of every array."""
    return Batch(*jax.tree.map(lambda array: array[indices], tuple(split)))
