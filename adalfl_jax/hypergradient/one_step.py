"""Meta-gradients through one inner step: a product with the base model's Jacobian, then a tiny gradient.

M_phi depends on theta only through the outputs f = f_theta(x). With w = (du/dg)^T dL/dtheta', the direction in which
the outer loss would have the gradient move, the chain rule is

    dL/dphi = d/dphi <g(phi), w> = d/dphi <dM_phi/df, J_f w>.

No second-order pass goes through the base model. The estimators here differ in how they form J_f w, `[B, C]`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from adalfl_jax.hypergradient.problem import (
    AnyBatch,
    BilevelProblem,
    Estimator,
    Hypergradient,
    first_examples,
    inner_and_outer_keys,
    no_forward_mode,
    outer_gradient,
    outputs_of,
    require_32_bits,
    require_forward_mode,
    require_one_step,
)
from adalfl_jax.hypergradient.update import differentiable_update
from adalfl_jax.types import BilevelBatch, PyTree, Theta


class Linearization(NamedTuple):
    """The base model at theta on one batch. A pytree, its functions included."""

    model: Callable[[PyTree], PyTree]  # params -> outputs
    params: PyTree
    outputs: PyTree  # [B, C], or a pytree of such
    pullback: Callable[[PyTree], tuple[PyTree]]  # c -> J_f^T c


def forward(
    problem: BilevelProblem, theta: Theta, phi_params: PyTree, batch: BilevelBatch, carry: PyTree = ()
) -> Hypergradient:
    """Exact. J_f w is the transpose of the pullback c -> J_f^T c that gave g: two passes, and no new evaluation of f.

    Transposing the pullback, rather than `jax.jvp`, keeps the memory layouts of the backward pass, in which matrix
    products with w are faster on a CPU. The linearisation lives on until w is known.

    Raises:
      ValueError: `batch.inner` has a leading axis K (see `num_inner_steps`).
    """
    return _one_step(forward, problem, theta, phi_params, batch, carry)


def recompute(
    problem: BilevelProblem, theta: Theta, phi_params: PyTree, batch: BilevelBatch, carry: PyTree = ()
) -> Hypergradient:
    """Exact. J_f w by evaluating f anew together with its tangent, so that nothing is kept but theta.

    One pass more than `forward`, in far less memory where activations are large.

    Raises:
      ValueError: `batch.inner` has a leading axis K.
    """
    return _one_step(recompute, problem, theta, phi_params, batch, carry)


def finite_difference(
    problem: BilevelProblem, theta: Theta, phi_params: PyTree, batch: BilevelBatch, carry: PyTree = ()
) -> Hypergradient:
    """J_f w = (f(theta + h w) - f(theta)) / h + O(h): one forward pass, nothing kept.

    The step moves theta by a distance h |w| = sqrt(eps) max(|theta|, 1), eps being the precision of theta or of the
    outputs, whichever is coarser. That balances the error of the difference, of order h, and that of rounding, of
    order eps / h. In float32 the gradient is off by about a thousandth where the update is linear in the gradient, as
    SGD's is with or without momentum. Adam makes w large where gradients are nearly zero, as of inputs that are always
    black, and then no h serves: the gradient may be of no use. A model whose backward pass is not the derivative of its
    forward pass, as a straight-through estimator's, has another J_f w than this.

    Raises:
      ValueError: `batch.inner` has a leading axis K, or numbers of 16 bits, too few to subtract, among the parameters
        or inside the model. Products in TF32, the default of NVIDIA GPUs for float32, are not seen.
    """
    return _one_step(finite_difference, problem, theta, phi_params, batch, carry)


def central_difference(
    problem: BilevelProblem, theta: Theta, phi_params: PyTree, batch: BilevelBatch, carry: PyTree = ()
) -> Hypergradient:
    """J_f w = (f(theta + h w) - f(theta - h w)) / 2h + O(h^2): two forward passes, nothing kept.

    h |w| = eps^(1/3) max(|theta|, 1), which balances the error of the difference with that of rounding. That is for a
    smooth f: kinks, as of a ReLU, leave an error of order h, and the longer step crosses more of them than
    `finite_difference`, which is mostly closer there. Of Adam what is said there holds too.

    Raises:
      ValueError: `batch.inner` has a leading axis K, or numbers of 16 bits, too few to subtract, among the parameters
        or inside the model. Products in TF32, the default of NVIDIA GPUs for float32, are not seen.
    """
    return _one_step(central_difference, problem, theta, phi_params, batch, carry)


def _transposed_pullback(point: Linearization, direction: PyTree) -> PyTree:
    return jax.linear_transpose(lambda c: point.pullback(c)[0], point.outputs)(direction)[0]


def _new_evaluation(point: Linearization, direction: PyTree) -> PyTree:
    # XLA would find f(theta) computed already and keep all of that pass for this one; theta + 0 w it cannot simplify.
    # (`optimization_barrier` does not help: the compiler for CPUs drops it before it looks for equal subexpressions.)
    params = jax.tree.map(lambda leaf, tangent: leaf + 0 * tangent.astype(leaf.dtype), point.params, direction)
    return jax.jvp(point.model, (params,), (direction,))[1]


def _one_sided(point: Linearization, direction: PyTree) -> PyTree:
    step = _difference_step(point, direction, order=1)
    return _quotient(point.model(_moved(point.params, direction, step)), point.outputs, step)


def _central(point: Linearization, direction: PyTree) -> PyTree:
    step = _difference_step(point, direction, order=2)
    above, below = (point.model(_moved(point.params, direction, sign * step)) for sign in (1, -1))
    return _quotient(above, below, 2 * step)


def _quotient(above: PyTree, below: PyTree, distance: jax.Array) -> PyTree:
    return jax.tree.map(lambda left, right: (left - right) / distance.astype(left.dtype), above, below)


JACOBIAN_PRODUCTS: dict[Estimator, Callable[[Linearization, PyTree], PyTree]] = {
    forward: _transposed_pullback,
    recompute: _new_evaluation,
    finite_difference: _one_sided,
    central_difference: _central,
}


def _one_step(
    estimator: FunctionType,
    problem: BilevelProblem,
    theta: Theta,
    phi_params: PyTree,
    batch: BilevelBatch,
    carry: PyTree,
) -> Hypergradient:
    require_one_step(estimator.__name__, batch)
    inner_key, outer_key = inner_and_outer_keys(batch.rng_key)
    require_product(estimator, problem, theta, batch.inner, inner_key)
    point, model_state = linearize(problem, theta, batch.inner, inner_key)
    inner_loss, loss_gradient, to_phi = loss_gradient_of(problem, phi_params, batch.inner[1], point.outputs)
    gradient = problem.mean(point.pullback(loss_gradient)[0])
    theta_next, to_direction = update_theta(problem, theta, model_state, gradient)
    if problem.inner_fraction < 1:
        part = first_examples(batch.inner, problem.inner_fraction)
        point, _ = linearize(problem, theta, part, inner_key)
        *_, to_phi = loss_gradient_of(problem, phi_params, part.targets, point.outputs)
    outer_loss, task_gradient = outer_gradient(problem, theta_next.params, model_state, batch.outer, outer_key)
    (direction,) = to_direction(task_gradient)  # w
    outputs_tangent = jacobian_product(estimator, point, problem.own(direction))  # J_f w
    (phi_gradient,) = to_phi(outputs_tangent)
    phi_gradient, inner_loss = problem.mean((phi_gradient, inner_loss))
    return Hypergradient(theta_next, phi_gradient, inner_loss, outer_loss, carry)


def linearize(
    problem: BilevelProblem, theta: Theta, batch: AnyBatch, rng_key: jax.Array | None
) -> tuple[Linearization, PyTree]:
    """The base model in train mode on a batch, and the model state after it."""

    def model(given: tuple, params: PyTree) -> tuple[PyTree, PyTree]:
        model_state, inputs, rng_key = given
        return problem.apply_fn(params, model_state, inputs, train=True, rng_key=rng_key)

    given = theta.model_state, batch[0], rng_key
    params = problem.own(theta.params)
    outputs, pullback, model_state = jax.vjp(functools.partial(model, given), params, has_aux=True)
    outputs_alone = jax.tree_util.Partial(lambda given, params: model(given, params)[0], given)
    return Linearization(outputs_alone, params, outputs, pullback), problem.mean(model_state)


def update_theta(
    problem: BilevelProblem, theta: Theta, model_state: PyTree, gradient: PyTree
) -> tuple[Theta, Callable[[PyTree], tuple[PyTree]]]:
    """theta after the inner optimiser's step along a gradient, and dL/dtheta' -> w."""

    def update(gradient: PyTree) -> tuple[PyTree, optax.OptState]:
        updates, opt_state = differentiable_update(problem.inner_optimizer, gradient, theta.opt_state, theta.params)
        # An optimiser may compute in wider types than the parameters', which theta takes no more of than they hold.
        return optax.tree.cast_like(updates, theta.params), opt_state

    updates, to_direction, opt_state = jax.vjp(update, gradient, has_aux=True)
    return Theta(optax.apply_updates(theta.params, updates), model_state, opt_state), to_direction


def loss_gradient_of(
    problem: BilevelProblem, phi_params: PyTree, targets: PyTree, outputs: PyTree
) -> tuple[jax.Array, PyTree, Callable[[PyTree], tuple[PyTree]]]:
    """M_phi, dM_phi/df of the outputs' shape, and the pullback t -> d/dphi <dM_phi/df, t>."""

    def loss_gradient(phi_params: PyTree) -> tuple[PyTree, jax.Array]:
        loss, gradient = jax.value_and_grad(lambda f: problem.learned_loss_fn(phi_params, targets, f))(outputs)
        return gradient, loss

    gradient, pullback, loss = jax.vjp(loss_gradient, problem.own(phi_params), has_aux=True)
    return loss, gradient, pullback


def jacobian_product(estimator: Estimator, point: Linearization, direction: PyTree) -> PyTree:
    """J_f w by an estimator that is a key of `JACOBIAN_PRODUCTS`.

    Raises:
      NotImplementedError: the model has a backward pass of its own, which cannot be transposed.
    """
    try:
        return JACOBIAN_PRODUCTS[estimator](point, direction)
    except jax.errors.JaxRuntimeError:  # of the device, which may be out of memory
        raise
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        # All that JAX raises where it cannot transpose; the model itself was evaluated and differentiated before.
        raise no_forward_mode(_name(estimator), error) from error


def require_product(
    estimator: Estimator, problem: BilevelProblem, theta: Theta, batch: AnyBatch, rng_key: jax.Array | None
) -> None:
    """Looks for what J_f w fails on later, under `jax.jit`, or without a word.

    Raises:
      NotImplementedError: forward-mode derivatives of a model with a `jax.custom_vjp`, for `recompute`.
      ValueError: numbers of 16 bits, in whose rounding a difference of outputs would drown.
    """
    if estimator is forward:
        return

    require = require_forward_mode if estimator is recompute else require_32_bits
    require(_name(estimator), *outputs_of(problem, theta, batch[0], rng_key))


def _name(estimator: Estimator) -> str:
    return getattr(estimator, "__name__", repr(estimator))


def _difference_step(point: Linearization, direction: PyTree, *, order: int) -> jax.Array:
    """h for a difference quotient whose error is of the given order; 1 where the direction is zero.

    theta moves by a share of its length, and of 1 where it is shorter: near zero, where an update of a frozen layer
    starts, it says nothing about how large the outputs are, in whose rounding a shorter move would drown.
    """
    eps = max(jnp.finfo(leaf.dtype).eps for leaf in jax.tree.leaves((point.outputs, point.params)))
    distance = eps ** (1 / (1 + order)) * jnp.sqrt(jnp.maximum(_squared_length(point.params), 1.0))
    squared = _squared_length(direction)
    return jnp.where(squared > 0, distance / jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 1.0)


def _squared_length(tree: PyTree) -> jax.Array:
    # As a dot product: a sum of squares, which CPUs take one by one, would cost as much as the pass it is for.
    return jnp.asarray(optax.tree.vdot(tree, tree))


def _moved(params: PyTree, direction: PyTree, step: jax.Array) -> PyTree:
    return jax.tree.map(lambda leaf, tangent: leaf + (step * tangent).astype(leaf.dtype), params, direction)
