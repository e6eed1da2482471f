r"""Meta-gradients by the implicit function theorem, as if theta minimised M_phi.

Where theta is a stationary point of M_phi, however it got there,

.. math:: \frac{dL}{d\phi} = -\frac{\partial^2 M_\phi}{\partial\phi\,\partial\theta}\, v, \qquad
  \Big(\frac{\partial^2 M_\phi}{\partial\theta^2} + \lambda I\Big) v = \nabla_\theta L .

The estimators here take the inner steps, then apply this at the new theta on the (last) inner batch. They differ in how
they solve for v, from products with the Hessian alone. Time grows with the number of products, memory does not. The
gradient is biased by how far theta is from stationary, by the solver's remainder and by the damping lambda.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import optax

from adalfl_jax.arguments import require_count, require_number
from adalfl_jax.axes import varying_axes
from adalfl_jax.hypergradient.problem import (
    BilevelProblem,
    Hypergradient,
    bind_learned_loss,
    inner_and_outer_keys,
    keys_of_steps,
    num_inner_steps,
    outer_gradient,
    require_forward_mode,
)
from adalfl_jax.hypergradient.unrolled import run_inner_steps
from adalfl_jax.norms import unit_and_squares
from adalfl_jax.types import BilevelBatch, PyTree, Theta

Product = Callable[[PyTree], PyTree]  # v -> (Hessian + lambda I) v


@dataclasses.dataclass(frozen=True)
class Neumann:
    r"""Inverse by the first terms of its Neumann series.

    .. math:: v = \alpha \sum_{j=0}^{J-1} (I - \alpha (H + \lambda I))^j\, \nabla_\theta L

    These are J steps of gradient descent on the quadratic that v minimises; at a stationary point it is the gradient
    through the last J of many steps of SGD with rate alpha. The relative error along an eigenvector of H with
    eigenvalue h is (1 - alpha (h + lambda))^J.

    Attributes:
      num_iterations: J, the number of terms; products with the Hessian are one fewer.
      step_size: alpha, below 2 / (largest eigenvalue of H + lambda) or the series diverges.
      damping: lambda.

    Raises:
      ValueError: a setting out of its range.

    References:
      Lorraine et al., "Optimizing Millions of Hyperparameters by Implicit Differentiation", arXiv 1911.02590.
    """

    name: ClassVar[str] = "neumann"

    num_iterations: int = 10
    step_size: float = 0.1
    damping: float = 0.01

    def __post_init__(self) -> None:
        _check_solver(self.num_iterations, self.damping)
        require_number("step_size", self.step_size)

    def __call__(
        self, problem: BilevelProblem, theta: Theta, phi_params: PyTree, batch: BilevelBatch, carry: PyTree = (), /
    ) -> Hypergradient:
        """The estimate, with the signature of every estimator."""

        def solve(product: Product, right: PyTree) -> PyTree:
            def iterate(solution: PyTree, _) -> tuple[PyTree, None]:
                residual = optax.tree.sub(product(solution), right)
                return optax.tree.add_scale(solution, -self.step_size, residual), None

            first = optax.tree.scale(self.step_size, right)
            return jax.lax.scan(iterate, first, length=self.num_iterations - 1)[0]

        return _implicit(self.name, problem, theta, phi_params, batch, carry, self.damping, solve)


@dataclasses.dataclass(frozen=True)
class ConjugateGradient:
    """Inverse by the method of conjugate gradients, for a Hessian that is positive definite once damped.

    Far fewer products than `Neumann` for the same error, and no step size; of a Hessian with an eigenvalue below
    -damping, as neural networks have, it makes nonsense. A derivative through the estimate itself is that of the exact
    solution.

    Attributes:
      num_iterations: products with the Hessian, at most; fewer where the residual falls below 1e-5 of the right side.
      damping: lambda, added to the Hessian.

    Raises:
      ValueError: a setting out of its range; when called, `jax.shard_map` with `check_vma`, which JAX's solver does not
        know.

    References:
      Rajeswaran et al., "Meta-Learning with Implicit Gradients", arXiv 1909.04630.
    """

    name: ClassVar[str] = "conjugate_gradient"

    num_iterations: int = 10
    damping: float = 0.01

    def __post_init__(self) -> None:
        _check_solver(self.num_iterations, self.damping)

    def __call__(
        self, problem: BilevelProblem, theta: Theta, phi_params: PyTree, batch: BilevelBatch, carry: PyTree = (), /
    ) -> Hypergradient:
        """The estimate, with the signature of every estimator."""

        _require_untracked_axes(problem, theta)

        def solve(product: Product, right: PyTree) -> PyTree:
            unit, _ = unit_and_squares(right)  # or squares of a converged model's gradient vanish, and 0 / 0 is left
            scaled = jax.tree.map(lambda leaf: (leaf / unit).astype(leaf.dtype), right)
            solution = jax.scipy.sparse.linalg.cg(product, scaled, maxiter=self.num_iterations)[0]
            return jax.tree.map(lambda leaf: (leaf * unit).astype(leaf.dtype), solution)

        return _implicit(self.name, problem, theta, phi_params, batch, carry, self.damping, solve)


def _implicit(
    name: str,
    problem: BilevelProblem,
    theta: Theta,
    phi_params: PyTree,
    batch: BilevelBatch,
    carry: PyTree,
    damping: float,
    solve: Callable[[Product, PyTree], PyTree],
) -> Hypergradient:
    inner_key, outer_key = inner_and_outer_keys(batch.rng_key)
    theta_next, inner_loss = run_inner_steps(problem, theta, phi_params, batch, inner_key)
    outer_loss, task_gradient = outer_gradient(
        problem, theta_next.params, theta_next.model_state, batch.outer, outer_key
    )
    inputs, targets, last_key = *batch.inner, inner_key
    if (num_steps := num_inner_steps(batch)) is not None:
        of_steps = (inputs, targets, keys_of_steps(inner_key, num_steps))
        inputs, targets, last_key = jax.tree.map(lambda steps: steps[-1], of_steps)

    def inner_objective(params: PyTree, phi_params: PyTree) -> jax.Array:
        outputs, _ = problem.apply_fn(params, theta_next.model_state, inputs, train=True, rng_key=last_key)
        return bind_learned_loss(problem.learned_loss_fn, phi_params)(targets, outputs, params)

    def gradients(params: PyTree) -> tuple[PyTree, PyTree]:
        return jax.grad(inner_objective, argnums=(0, 1))(params, problem.own(phi_params))

    params = problem.own(theta_next.params)
    require_forward_mode(name, gradients, params)
    # How both gradients of M_phi change as theta moves; linearised once, applied at every iteration.
    _, own_derivative_along = jax.linearize(gradients, params)

    def derivative_along(direction: PyTree, of: int) -> PyTree:
        return problem.mean(own_derivative_along(problem.own(direction))[of])

    def product(direction: PyTree) -> PyTree:
        return optax.tree.add_scale(derivative_along(direction, 0), damping, direction)

    solution = solve(product, task_gradient)
    gradient = optax.tree.scale(-1.0, derivative_along(solution, 1))
    return Hypergradient(theta_next, gradient, inner_loss, outer_loss, carry)


def _require_untracked_axes(problem: BilevelProblem, theta: Theta) -> None:
    if any(map(varying_axes, jax.tree.leaves(problem.own(theta.params)))):
        raise ValueError(
            'hypergradient="conjugate_gradient" cannot be traced by jax.shard_map with check_vma=True, which JAX\'s '
            'solver does not know; set check_vma=False, or take "neumann"'
        )


def _check_solver(num_iterations: int, damping: float) -> None:
    require_count("num_iterations", num_iterations)
    require_number("damping", damping, least=0)
