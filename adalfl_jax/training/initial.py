"""What a run starts from: the random streams, models and losses of all seeds."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from adalfl_jax.bilevel import prime
from adalfl_jax.fitting import draw_targets_and_outputs, fit_to_task_loss, relative_mismatch
from adalfl_jax.task_losses import TASK_LOSSES
from adalfl_jax.training.batches import batch_shapes
from adalfl_jax.training.hosts import warn
from adalfl_jax.training.methods import METHODS
from adalfl_jax.training.optimizers import make_inner_optimizer, make_outer_optimizer
from adalfl_jax.training.sections import STARTS
from adalfl_jax.training.setup import Setup
from adalfl_jax.training.sharding import over_seeds, replicate, replicated, to_host
from adalfl_jax.training.start import load_start
from adalfl_jax.training.state import RunState
from adalfl_jax.training.steps import make_online_bilevel_step
from adalfl_jax.types import LossFn, Phi, PyTree, Theta

FITTING = 2**31  # folded into phi's key to fit phi; so large, it is none of the few keys that `init` makes of it
POOR_FIT = 0.55  # of the gradient; a default network lacks .3 of the cross-entropy's, and .4 with 100 classes


class SeedKeys(NamedTuple):
    """The random streams of a seed, `[S]` keys each."""

    theta: jax.Array
    phi: jax.Array
    offline: jax.Array
    training: jax.Array


def make_seed_keys(seeds: tuple[int, ...], mesh: Mesh | None = None) -> SeedKeys:
    """The keys of several seeds, on every device of a mesh."""
    if mesh is not None:
        return jax.jit(functools.partial(make_seed_keys, seeds), out_shardings=replicated(mesh))()
    return SeedKeys(*jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 4), out_axes=1)(jnp.array(seeds)))


def init_theta(setup: Setup, keys: SeedKeys) -> Theta:
    """A fresh theta for every seed."""
    optimizer = make_inner_optimizer(setup.config, setup.config.inner.learning_rate)

    def one_seed(key: jax.Array) -> RunState:
        return setup.divide(RunState(Theta.create(*setup.model.init(key), optimizer), None))

    theta = jax.jit(over_seeds(setup.mesh, one_seed))(keys.theta).theta
    assert theta is not None
    return theta


def init_phi(setup: Setup, keys: SeedKeys) -> Phi:
    """A fresh phi for every seed, where the config says it starts."""
    optimizer = optax.adam(setup.config.offline.learning_rate)
    start = setup.config.learned_loss.start
    given = None if start in STARTS else load_start(setup.config)
    fitted_to = _fitted_to(setup)

    def one_seed(key: jax.Array, given: PyTree) -> RunState:
        params = setup.learned_loss.init(key) if given is None else given
        if fitted_to is not None:
            params = fit_to_task_loss(
                setup.learned_loss,
                params,
                fitted_to,
                jax.random.fold_in(key, FITTING),
                num_outputs=setup.dataset.num_outputs,
                is_classification=setup.dataset.is_classification,
            )
        return setup.divide(RunState(None, Phi.create(params, optimizer)))

    phi = jax.jit(over_seeds(setup.mesh, one_seed))(keys.phi, given).phi
    assert phi is not None
    return phi


def _fitted_to(setup: Setup) -> LossFn | None:
    start = setup.config.learned_loss.start
    return setup.task_loss_fn if start == "task_loss" else TASK_LOSSES.get(start)


def warn_of_poor_fit(setup: Setup, phi: Phi) -> None:
    """Warns where a phi of `init_phi` was fitted to a loss and is far from it."""
    if (fitted_to := _fitted_to(setup)) is None:
        return
    targets, outputs = draw_targets_and_outputs(
        jax.random.key(FITTING), 256, setup.dataset.num_outputs, is_classification=setup.dataset.is_classification
    )

    def one_seed(params: PyTree) -> jax.Array:
        return relative_mismatch(setup.learned_loss, params, fitted_to, targets, outputs)

    worst = float(jax.jit(jax.vmap(one_seed))(to_host(phi.params)).max())
    if not worst <= POOR_FIT:  # or nan
        warn(
            f"config.learned_loss.start: a loss that was fitted to {setup.config.learned_loss.start!r} lacks "
            f"{worst:.0%} of its gradient, at most {POOR_FIT:.0%} is expected, so training does not begin as on that; "
            "try larger config.learned_loss.hidden_sizes or, of classes, other predictions"
        )


def init_training(
    setup: Setup, method: str, keys: SeedKeys, phi: Phi | None = None, theta: Theta | None = None
) -> RunState:
    """The state a method starts from: a fresh theta and, if it learns, a phi and what an online step remembers.

    Args:
      setup: of the run.
      method: one of `METHODS`.
      keys: of the seeds.
      phi: what the offline phase learned; a fresh one by default. Its optimiser starts anew.
      theta: of `init_theta`, the same for every method; made here by default.
    """
    theta = init_theta(setup, keys) if theta is None else theta
    if not METHODS[method].has_learned_loss:
        return RunState(theta, None)
    phi = _restart_outer_optimizer(setup, init_phi(setup, keys) if phi is None else phi)
    config, factor = setup.config, init_rate_factor(setup)
    if not METHODS[method].updates_phi:
        return RunState(theta, phi, factor)
    batch = batch_shapes(setup)

    def one_seed(theta: Theta, phi: Phi, factor: jax.Array | None, learning_rate: jax.Array) -> Phi | None:
        # Rate and factor are traced, as in the steps to come: what a step remembers depends on it.
        step = make_online_bilevel_step(setup, make_inner_optimizer(config, learning_rate, factor))
        return setup.divide(RunState(None, prime(step, theta, phi, batch))).phi

    phi = jax.jit(over_seeds(setup.mesh, one_seed, (0, 0, 0, None)))(theta, phi, factor, config.inner.learning_rate)
    return RunState(theta, phi, factor)


def init_rate_factor(setup: Setup) -> jax.Array | None:
    """The factor on alpha under a learned loss: 1 until its first step is measured, None where alpha stays."""
    return replicate(setup.mesh, jnp.ones(setup.config.num_seeds)) if setup.config.inner.first_step_rate else None


def _restart_outer_optimizer(setup: Setup, phi: Phi) -> Phi:
    """phi with a fresh Adam state; the offline phase's moments are dropped."""
    return jax.jit(jax.vmap(lambda params: Phi.create(params, make_outer_optimizer(setup.config))))(phi.params)
