"""The outer loss straight from Algorithm 1, its derivative by finite differences, and how an estimate is compared."""

import functools

import jax
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import adalfl_jax
from adalfl_jax.hypergradient import ESTIMATORS, BilevelProblem, num_inner_steps
from adalfl_jax.task_losses import softmax_cross_entropy

TOLERANCE = 1e-6


def outer_loss(apply_fn, learned_loss_fn, optimizer, theta, batch, phi_params):
    """L after the inner steps, straight from Algorithm 1 with `jax.grad` and the plain `optimizer.update`."""
    inner_key, outer_key = jax.random.split(batch.rng_key)
    num_steps = num_inner_steps(batch)
    keys = [inner_key] if num_steps is None else list(jax.random.split(inner_key, num_steps))
    for step, key in enumerate(keys):
        inputs, targets = batch.inner if num_steps is None else jax.tree.map(lambda leaf, k=step: leaf[k], batch.inner)

        def objective(params, theta=theta, inputs=inputs, targets=targets, key=key):
            outputs, state = apply_fn(params, theta.model_state, inputs, train=True, rng_key=key)
            return learned_loss_fn(phi_params, targets, outputs), state

        gradient, state = jax.grad(objective, has_aux=True)(theta.params)
        updates, opt_state = optimizer.update(gradient, theta.opt_state, theta.params)
        theta = adalfl_jax.Theta(optax.apply_updates(theta.params, updates), state, opt_state)
    outputs, _ = apply_fn(theta.params, theta.model_state, batch.outer[0], train=True, rng_key=outer_key)
    return softmax_cross_entropy(batch.outer[1], outputs)


def finite_differences(function, phi_params, step=1e-5):
    """Central differences along every coordinate of phi, all in one program; returns a flat vector."""
    flat, unravel = ravel_pytree(phi_params)
    offsets = step * np.eye(flat.size, dtype=flat.dtype)
    points = np.asarray(flat) + np.stack([offsets, -offsets])
    above, below = np.asarray(jax.jit(jax.vmap(jax.vmap(lambda point: function(unravel(point)))))(points))
    return (above - below) / (2 * step)


def estimator_program(name, model, loss, optimizer):
    """`(theta, phi_params, batch) -> Hypergradient`, compiled once."""
    problem = BilevelProblem(model.apply, loss.apply, softmax_cross_entropy, optimizer)
    return jax.jit(functools.partial(ESTIMATORS[name], problem))


def estimate(name, model, loss, optimizer, theta, phi_params, batch):
    return estimator_program(name, model, loss, optimizer)(theta, phi_params, batch)


def assert_relative(actual, expected, tolerance=TOLERANCE):
    assert np.isfinite(actual).all()
    assert np.abs(expected).max() > 0
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()
