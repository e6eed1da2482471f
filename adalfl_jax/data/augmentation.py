"""Random crops and mirror images, on the device, inside the step."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def augment(rng_key: jax.Array, images: jax.Array, *, padding: int = 0, flip: bool = False) -> jax.Array:
    """Crops and mirrors every image of its own accord.

    Args:
      rng_key: of the batch.
      images: `[..., H, W, channels]` of any type, on which 0 is what padding is made of.
      padding: rows and columns of zeros put on every side before a window of H x W is cut out anywhere; 0 does not
        crop.
      flip: whether every other image, on average, is mirrored left to right.

    Returns:
      Images of the same shape and type.
    """
    crop_key, flip_key = jax.random.split(rng_key)
    flat = images.reshape(-1, *images.shape[-3:])
    if padding:
        flat = random_crop(crop_key, flat, padding)
    if flip:
        flat = random_flip(flip_key, flat)
    return flat.reshape(images.shape)


def random_crop(rng_key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
    """A window of each image `[B, H, W, channels]` padded by zeros, of the image's size and at a random place."""
    width = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    corners = jax.random.randint(rng_key, (len(images), 2), 0, 2 * padding + 1)

    def window(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), images.shape[1:])

    return jax.vmap(window)(jnp.pad(images, width), corners)


def random_flip(rng_key: jax.Array, images: jax.Array) -> jax.Array:
    """Each image `[B, H, W, channels]` as it is or mirrored left to right, with even odds."""
    mirrored = jax.random.bernoulli(rng_key, shape=(len(images), 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)
