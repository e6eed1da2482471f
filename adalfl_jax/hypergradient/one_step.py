"""Meta-gradients through one inner step: a product with the base model's Jacobian, then a tiny gradient.

M_phi depends on theta only through the outputs f = f_theta(x). With w = (du/dg)^T dL/dtheta', the direction in which
the outer loss would have the gradient move, the chain rule is

    dL/dphi = d/dphi <g(phi), w> = d/dphi <dM_phi/df, J_f w>.

No second-order pass goes through the base model. The estimators here differ in how they form J_f w, `[B, C]`.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adalfl_jax.hypergradient.problem import (
    AnyBatch,
    BilevelProblem,
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


class OneStep(abc.ABC):
    """What the estimators of this module share: all but how J_f w is formed.

    Raises:
      ValueError: when called, `batch.inner` has a leading axis K (see `num_inner_steps`).
    """

    name: ClassVar[str]
    is_of_one_inner_step: ClassVar[bool] = True

    @abc.abstractmethod
    def _product(self, point: Linearization, direction: PyTree) -> PyTree: ...

    def jacobian_product(self, point: Linearization, direction: PyTree) -> PyTree:
        """J_f w, of the outputs' shape, for a w of the parameters' shape.

        Raises:
          NotImplementedError: the model has a backward pass of its own, which cannot be transposed.
        """
        try:
            return self._product(point, direction)
        except jax.errors.JaxRuntimeError:  # of the device, which may be out of memory
            raise
        except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
            # All that JAX raises where it cannot transpose; the model itself was evaluated and differentiated before.
            raise no_forward_mode(self.name, error) from error

    @abc.abstractmethod
    def require_product(
        self, problem: BilevelProblem, theta: Theta, batch: AnyBatch, rng_key: jax.Array | None
    ) -> None:
        """Looks now for what J_f w would fail on later, where `jax.jit` hides the reason, or silently."""

    def keep(self, point: Linearization) -> Linearization:
        """Of the model at theta what J_f w needs: by default all but the pullback, which holds activations."""
        nothing: Any = None
        return point._replace(pullback=nothing)

    def __call__(
        self, problem: BilevelProblem, theta: Theta, phi_params: PyTree, batch: BilevelBatch, carry: PyTree = (), /
    ) -> Hypergradient:
        """The estimate, with the signature of every estimator."""
        require_one_step(self.name, batch)
        inner_key, outer_key = inner_and_outer_keys(batch.rng_key)
        self.require_product(problem, theta, batch.inner, inner_key)
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
        outputs_tangent = self.jacobian_product(point, problem.own(direction))  # J_f w
        (phi_gradient,) = to_phi(outputs_tangent)
        phi_gradient, inner_loss = problem.mean((phi_gradient, inner_loss))
        return Hypergradient(theta_next, phi_gradient, inner_loss, outer_loss, carry)


@dataclasses.dataclass(frozen=True)
class Forward(OneStep):
    """Exact. J_f w is the transpose of the pullback c -> J_f^T c that gave g: two passes, and no new evaluation of f.

    Transposing the pullback, rather than `jax.jvp`, keeps the memory layouts of the backward pass, in which matrix
    products with w are faster on a CPU. The linearisation lives on until w is known.

    Raises:
      ValueError: when called, `batch.inner` has a leading axis K.
    """

    name: ClassVar[str] = "forward"

    def _product(self, point: Linearization, direction: PyTree) -> PyTree:
        return jax.linear_transpose(lambda c: point.pullback(c)[0], point.outputs)(direction)[0]

    def require_product(
        self, problem: BilevelProblem, theta: Theta, batch: AnyBatch, rng_key: jax.Array | None
    ) -> None:
        """Nothing: what cannot be transposed fails while it is traced."""

    def keep(self, point: Linearization) -> Linearization:
        """The pullback, and the outputs whose shape it takes."""
        nothing: Any = None
        return point._replace(model=nothing, params=nothing)


@dataclasses.dataclass(frozen=True)
class Recompute(OneStep):
    """Exact. J_f w by evaluating f anew together with its tangent, so that nothing is kept but theta.

    One pass more than `Forward`, in far less memory where activations are large.

    Raises:
      NotImplementedError: when called, a model with a `jax.custom_vjp`, which has no forward-mode derivative.
      ValueError: when called, `batch.inner` has a leading axis K.
    """

    name: ClassVar[str] = "recompute"

    def _product(self, point: Linearization, direction: PyTree) -> PyTree:
        # XLA would find f(theta) computed already and keep all of that pass for this one; theta + 0 w it cannot
        # simplify. (`optimization_barrier` does not help: the compiler for CPUs drops it before it looks for equal
        # subexpressions.)
        params = jax.tree.map(lambda leaf, tangent: leaf + 0 * tangent.astype(leaf.dtype), point.params, direction)
        return jax.jvp(point.model, (params,), (direction,))[1]

    def require_product(
        self, problem: BilevelProblem, theta: Theta, batch: AnyBatch, rng_key: jax.Array | None
    ) -> None:
        """Raises NotImplementedError where the model has no forward-mode derivative."""
        require_forward_mode(self.name, *outputs_of(problem, theta, batch[0], rng_key))


class Difference(OneStep):
    """J_f w as a quotient of differences.

    Raises:
      ValueError: when called, `batch.inner` has a leading axis K, or numbers of 16 bits, too few to subtract, are among
        the parameters or inside the model. Products in TF32, the default of NVIDIA GPUs for float32, are not seen.
    """

    takes_differences: ClassVar[bool] = True

    def require_product(
        self, problem: BilevelProblem, theta: Theta, batch: AnyBatch, rng_key: jax.Array | None
    ) -> None:
        """Raises ValueError for numbers of 16 bits, in whose rounding a difference of outputs would drown."""
        require_32_bits(self.name, *outputs_of(problem, theta, batch[0], rng_key))


@dataclasses.dataclass(frozen=True)
class FiniteDifference(Difference):
    """J_f w = (f(theta + h w) - f(theta)) / h + O(h): one forward pass, nothing kept.

    The step moves theta by a distance h |w| = sqrt(eps) max(|theta|, 1), eps being the precision of theta or of the
    outputs, whichever is coarser. That balances the error of the difference, of order h, and that of rounding, of
    order eps / h. In float32 the gradient is off by about a thousandth where the update is linear in the gradient, as
    SGD's is with or without momentum. Adam makes w large where gradients are nearly zero, as of inputs that are always
    black, and then no h serves: the gradient may be of no use. A model whose backward pass is not the derivative of its
    forward pass, as a straight-through estimator's, has another J_f w than this.

    Raises:
      ValueError: as `Difference`.
    """

    name: ClassVar[str] = "finite_difference"

    def _product(self, point: Linearization, direction: PyTree) -> PyTree:
        step = _difference_step(point, direction, order=1)
        return _quotient(point.model(_moved(point.params, direction, step)), point.outputs, step)


@dataclasses.dataclass(frozen=True)
class CentralDifference(Difference):
    """J_f w = (f(theta + h w) - f(theta - h w)) / 2h + O(h^2): two forward passes, nothing kept.

    h |w| = eps^(1/3) max(|theta|, 1), which balances the error of the difference with that of rounding. That is for a
    smooth f: kinks, as of a ReLU, leave an error of order h, and the longer step crosses more of them than
    `FiniteDifference`, which is mostly closer there. Of Adam what is said there holds too.

    Raises:
      ValueError: as `Difference`.
    """

    name: ClassVar[str] = "central_difference"

    def _product(self, point: Linearization, direction: PyTree) -> PyTree:
        step = _difference_step(point, direction, order=2)
        above, below = (point.model(_moved(point.params, direction, sign * step)) for sign in (1, -1))
        return _quotient(above, below, 2 * step)


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

    def update(gradient: PyTree) -> tuple[PyTree, tuple[PyTree, optax.OptState]]:
        updates, opt_state = differentiable_update(problem.inner_optimizer, gradient, theta.opt_state, theta.params)
        # An optimiser may compute in wider types than the parameters', of which dL/dtheta' is.
        return optax.tree.cast_like(updates, theta.params), (updates, opt_state)

    _, to_direction, (updates, opt_state) = jax.vjp(update, gradient, has_aux=True)
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


def _quotient(above: PyTree, below: PyTree, distance: jax.Array) -> PyTree:
    return jax.tree.map(lambda left, right: (left - right) / distance.astype(left.dtype), above, below)


def _moved(params: PyTree, direction: PyTree, step: jax.Array) -> PyTree:
    return jax.tree.map(lambda leaf, tangent: leaf + (step * tangent).astype(leaf.dtype), params, direction)
