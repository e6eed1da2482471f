"""A run on many devices: one named mesh, and where on it states, batches and data lie.

Seeds are divided over the axis `seed`, the examples of every batch over `data`, and large arrays of theta, phi and
their optimisers over `model`. All is under `jax.jit`, so a batch is one array whatever devices its examples are on: its
means, the statistics of batch norm too, are those of the whole batch, and results do not depend on the mesh but for
rounding. With one device there is no mesh, and nothing here does anything.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from adalfl_jax.learned_losses import LossNetwork, ScaledTaskLoss, WeightNetwork, at_progress
from adalfl_jax.training.config import TrainConfig
from adalfl_jax.training.fields import ConfigError
from adalfl_jax.training.sections import MeshConfig
from adalfl_jax.training.state import RunState
from adalfl_jax.types import LearnedLoss, LearnedLossFn, PyTree

SEED, DATA, MODEL = AXES = ("seed", "data", "model")
MIN_DIVIDED = 2**14  # numbers in an array that is divided over `model`; a smaller one is not worth the messages
_MEANS = (LossNetwork, ScaledTaskLoss, WeightNetwork)  # learned losses that are means over examples


def make_mesh(config: TrainConfig) -> Mesh | None:
    """The mesh of a config; None for one device.

    Raises:
      ConfigError: more devices than there are, in several processes also fewer, or an axis that does not divide the
        seeds or the batch.
    """
    sizes = _sizes(config.mesh)
    num_devices = math.prod(sizes)
    shape = " x ".join(f"{name} {size}" for name, size in zip(AXES, sizes, strict=True))
    if num_devices > jax.device_count() or (jax.process_count() > 1 and num_devices < jax.device_count()):
        raise ConfigError(
            f"config.mesh ({shape}) takes {num_devices} devices, and JAX has {jax.device_count()} "
            f"(processes: {jax.process_count()}); choose other sizes, or 0 for one of them to take what is left"
        )
    for axis, size, field, count in (
        (SEED, sizes[0], "num_seeds", config.num_seeds),
        (DATA, sizes[1], "batch_size", config.batch_size),
    ):
        if count % size:
            raise ConfigError(f"config.mesh.{axis} must divide config.{field} = {count}; got {size}")
    if num_devices == 1:
        return None
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:num_devices])


def _sizes(mesh: MeshConfig) -> tuple[int, int, int]:
    """The size of each axis; what is left of the devices for one of size 0."""
    given = (mesh.seed, mesh.data, mesh.model)
    taken = math.prod(size for size in given if size)
    if 0 in given and (jax.device_count() % taken or jax.device_count() < taken):
        raise ConfigError(
            f"config.mesh has axes of {taken} devices beside the one that takes what is left, and they do not divide "
            f"the {jax.device_count()} there are"
        )
    seed, data, model = (size or jax.device_count() // taken for size in given)
    return seed, data, model


def over_seeds(mesh: Mesh | None, function: Callable[..., Any], in_axes: Any = 0) -> Callable[..., Any]:
    """`jax.vmap` of a function of one seed, the seeds divided over the mesh."""
    return jax.vmap(function, in_axes, spmd_axis_name=None if mesh is None else SEED)


def replicated(mesh: Mesh | None) -> NamedSharding | None:
    """The whole array on every device; None, which leaves it open, without a mesh."""
    return None if mesh is None else NamedSharding(mesh, P())


def replicate(mesh: Mesh | None, tree: PyTree) -> PyTree:
    """Copies arrays, the same on every host, to every device of the mesh."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda leaf: place(NamedSharding(mesh, P()), np.asarray(leaf)), tree)


def place_rows(mesh: Mesh | None, array: Any) -> Any:
    """Rows of a host's array on the devices of the mesh, divided over `data` where their number can be."""
    if mesh is None or not isinstance(array, np.ndarray):
        return array
    return place(NamedSharding(mesh, P(DATA) if len(array) % mesh.shape[DATA] == 0 else P()), array)


def own_part(mesh: Mesh | None, spec: P, array: np.ndarray) -> np.ndarray:
    """The part that goes to this host's devices of an array divided as `spec` says."""
    if mesh is None:
        return array
    parts = NamedSharding(mesh, spec).addressable_devices_indices_map(array.shape).values()
    bounds = [[part[axis].indices(size) for part in parts if part] for axis, size in enumerate(array.shape)]
    return array[tuple(slice(min(b[0] for b in each), max(b[1] for b in each)) for each in bounds)]


def join_parts(mesh: Mesh | None, specs: Sequence[P], trees: Sequence[PyTree]) -> tuple[PyTree, ...]:
    """The arrays that all hosts' `own_part`s make together, on their devices."""
    if mesh is None:
        return jax.device_put(tuple(trees), jax.local_devices()[0])
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    return tuple(
        jax.tree.map(functools.partial(jax.make_array_from_process_local_data, sharding), tree)
        for sharding, tree in zip(shardings, trees, strict=True)
    )


def place(sharding: jax.sharding.Sharding, array: np.ndarray) -> jax.Array:
    """An array on the devices of a sharding; each host needs the parts of its own devices alone."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def divide_batch(mesh: Mesh | None, batch: PyTree, axis: int = 0) -> PyTree:
    """Divides the examples of one seed's batch over the mesh.

    Args:
      mesh: or None.
      batch: arrays with examples along `axis`.
      axis: 1 where an axis of inner steps leads.
    """
    if mesh is None:
        return batch
    sharding = NamedSharding(mesh, P(*[None] * axis, DATA))
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, sharding), batch)


def on_parts(mesh: Mesh | None, learned_loss: LearnedLoss) -> LearnedLossFn:
    """A learned loss; a mean over examples as the mean of its values on parts of a batch, each with a phi of its own.

    Then the gradient to phi is added up over devices once, at its end. Else XLA for CPUs adds up what each use of phi
    makes of it: the second derivatives use phi twice.
    """
    if mesh is None or mesh.shape[DATA] == 1 or type(learned_loss) not in _MEANS:
        return learned_loss.apply
    num_parts, sharding = mesh.shape[DATA], NamedSharding(mesh, P(DATA))

    def divide(array: jax.Array) -> jax.Array:
        parts = array.reshape(num_parts, -1, *array.shape[1:])
        return jax.lax.with_sharding_constraint(parts, sharding)

    def apply(
        phi_params: PyTree, targets: jax.Array, outputs: jax.Array, *, progress: jax.Array | float | None = None
    ) -> jax.Array:
        loss_fn = at_progress(learned_loss.apply, progress)
        if len(targets) % num_parts:  # a part of a batch, for a meta-gradient
            return loss_fn(phi_params, targets, outputs)
        copies = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_parts, *leaf.shape)), phi_params)
        copies = jax.lax.with_sharding_constraint(copies, sharding)
        return jax.vmap(loss_fn)(copies, divide(targets), divide(outputs)).mean()

    return apply


def divide_state(mesh: Mesh | None, state: RunState, batch_size: int) -> RunState:
    """Divides the state of one seed over the mesh: large arrays over `model`, and remembered batches over `data`.

    The first axis of `batch_size` in what a step remembers is taken for that of the examples.
    """
    if mesh is None:
        return state

    def constrain(spec_of: Callable[[tuple[int, ...]], P], tree: PyTree) -> PyTree:
        return jax.tree.map(
            lambda leaf: jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec_of(leaf.shape))), tree
        )

    spec_of = functools.partial(_spec, mesh.shape[MODEL])

    def spec_remembered(shape: tuple[int, ...]) -> P:
        return P(*[None] * shape.index(batch_size), DATA) if batch_size in shape else spec_of(shape)

    divided = constrain(spec_of, state)
    if state.phi is None:
        return divided
    return divided._replace(phi=divided.phi._replace(carry=constrain(spec_remembered, state.phi.carry)))


def _spec(num_devices: int, shape: tuple[int, ...]) -> P:
    """Divides a large array along the longest axis that can be divided, the last of several that are equal."""
    fitting = [axis for axis, size in enumerate(shape) if size % num_devices == 0]
    if num_devices == 1 or not fitting or math.prod(shape) < MIN_DIVIDED:
        return P()
    axis = max(fitting, key=lambda axis: (shape[axis], axis))
    return P(*[None] * axis, MODEL)


def to_host(tree: PyTree) -> PyTree:
    """Arrays as NumPy's, whole in every process. All processes must call it."""

    def gather(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return np.asarray(leaf)

    return jax.tree.map(gather, tree)
