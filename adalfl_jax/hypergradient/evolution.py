"""Meta-gradients without differentiation: the outer loss at random displacements of phi."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adalfl_jax.arguments import require_count, require_number
from adalfl_jax.hypergradient.carry import is_same, require_carry, to_keep
from adalfl_jax.hypergradient.problem import (
    BilevelProblem,
    Hypergradient,
    inner_and_outer_keys,
    outer_objective,
    outputs_of,
    require_32_bits,
)
from adalfl_jax.hypergradient.unrolled import run_inner_steps
from adalfl_jax.types import BilevelBatch, PyTree, Theta


@dataclasses.dataclass(frozen=True)
class EvolutionStrategies:
    r"""Antithetic evolution strategies: the gradient of the outer loss smoothed by a Gaussian.

    .. math:: \frac{1}{2 N \sigma} \sum_{i=1}^{N} \big(L(\theta'(\phi + \sigma\epsilon_i)) -
      L(\theta'(\phi - \sigma\epsilon_i))\big)\,\epsilon_i, \qquad \epsilon_i \sim \mathcal N(0, I)

    Unbiased for the smoothed loss, of which phi's gradient is off by O(sigma^2). Its variance grows with the number
    of parameters of phi over N. Needs no derivative of the task loss, so L may be an error rate. The pairs run side by
    side, and take the memory of 2N models with what their passes keep.

    Attributes:
      num_pairs: N.
      sigma: the standard deviation of each parameter's displacement.

    Raises:
      ValueError: a setting out of its range; when called, a batch without `rng_key`, or numbers of 16 bits among the
        parameters or inside the model, in whose rounding differences of losses would drown.

    References:
      Salimans et al., "Evolution Strategies as a Scalable Alternative to Reinforcement Learning", arXiv 1703.03864.
    """

    name: ClassVar[str] = "evolution_strategies"
    takes_differences: ClassVar[bool] = True

    num_pairs: int = 8
    sigma: float = 0.01

    def __post_init__(self) -> None:
        _check_sampling(self.num_pairs, self.sigma)

    def __call__(
        self, problem: BilevelProblem, theta: Theta, phi_params: PyTree, batch: BilevelBatch, carry: PyTree = (), /
    ) -> Hypergradient:
        """The estimate, with the signature of every estimator."""
        keys = _Keys.of(batch, self.name)
        require_32_bits(self.name, *outputs_of(problem, theta, batch.outer[0], keys.outer))
        noise = _draw(keys.noise, phi_params, self.num_pairs)

        def outer_loss(displacement: PyTree) -> jax.Array:
            displaced = optax.tree.add_scale(phi_params, self.sigma, displacement)
            return _run(problem, theta, displaced, batch, keys)[2]

        pairs = jax.vmap(outer_loss, axis_size=2 * self.num_pairs)(_both_signs(noise)).reshape(2, -1)
        gradient = _correlate(pairs, noise, self.sigma)
        theta_next, inner_loss, loss = _run(problem, theta, phi_params, batch, keys)
        return Hypergradient(theta_next, gradient, inner_loss, loss, carry)


class PrimedParticles(NamedTuple):
    """The carry of `PersistentEvolutionStrategies`: models that train on displaced losses beside the real one."""

    theta: Theta  # [2N], the displaced upwards first
    displacement: PyTree  # [N], the sum of all since the last restart, in units of sigma
    age: jax.Array  # [] int32, steps since the last restart
    params_after: PyTree  # the parameters of the real one after the last step


@dataclasses.dataclass(frozen=True)
class PersistentEvolutionStrategies:
    r"""Persistent evolution strategies: unbiased over a long horizon at the price of short steps.

    N antithetic pairs of models train on for `horizon` steps, each on losses displaced afresh at every step, and the
    outer loss is correlated with the *sum* of a model's displacements, so that what phi did many steps ago counts:

    .. math:: \frac{1}{2 N \sigma} \sum_{i=1}^{N} (L_i^+ - L_i^-)\, \sum_{s \le t} \epsilon_{i,s}

    All models start again from the real theta every `horizon` steps, which bounds the sums, and wherever something else
    than the last step has moved or replaced it.

    Attributes:
      num_pairs: N.
      sigma: the standard deviation of each parameter's displacement in one step.
      horizon: steps between restarts; 1 makes it `EvolutionStrategies`.

    Raises:
      ValueError: a setting out of its range; when called, a batch without `rng_key`, or numbers of 16 bits among the
        parameters or inside the model, in whose rounding differences of losses would drown.

    References:
      Vicol, Metz and Sohl-Dickstein, "Unbiased Gradient Estimation in Unrolled Computation Graphs with Persistent
      Evolution Strategies", ICML 2021, arXiv 2112.13835.
    """

    name: ClassVar[str] = "persistent_evolution_strategies"
    takes_differences: ClassVar[bool] = True
    remembers: ClassVar[bool] = True

    num_pairs: int = 8
    sigma: float = 0.01
    horizon: int = 100

    def __post_init__(self) -> None:
        _check_sampling(self.num_pairs, self.sigma)
        require_count("horizon", self.horizon)

    def __call__(
        self, problem: BilevelProblem, theta: Theta, phi_params: PyTree, batch: BilevelBatch, carry: PyTree = (), /
    ) -> Hypergradient:
        """The estimate, with the signature of every estimator."""
        keys = _Keys.of(batch, self.name)
        require_32_bits(self.name, *outputs_of(problem, theta, batch.outer[0], keys.outer))
        particles = self._started(theta, phi_params, carry)
        noise = _draw(keys.noise, phi_params, self.num_pairs)

        def advance(theta: Theta, displacement: PyTree) -> tuple[Theta, jax.Array]:
            displaced = optax.tree.add_scale(phi_params, self.sigma, displacement)
            theta, _, loss = _run(problem, theta, displaced, batch, keys)
            return theta, loss

        thetas, losses = jax.vmap(advance, axis_size=2 * self.num_pairs)(particles.theta, _both_signs(noise))
        total = optax.tree.add(particles.displacement, noise)
        gradient = _correlate(losses.reshape(2, -1), total, self.sigma)
        theta_next, inner_loss, loss = _run(problem, theta, phi_params, batch, keys)
        after = PrimedParticles(thetas, total, particles.age + 1, to_keep(theta_next.params))
        return Hypergradient(theta_next, gradient, inner_loss, loss, after)

    def _started(self, theta: Theta, phi_params: PyTree, carry: PyTree) -> PrimedParticles:
        """The particles, or new ones at theta where there are none or their horizon is reached."""
        fresh = PrimedParticles(
            theta=jax.tree.map(lambda leaf: jnp.stack([leaf] * 2 * self.num_pairs), theta),
            displacement=jax.tree.map(lambda leaf: jnp.stack([jnp.zeros_like(leaf)] * self.num_pairs), phi_params),
            age=jnp.zeros((), jnp.int32),
            params_after=theta.params,
        )
        if not carry:
            return fresh
        require_carry(self.name, carry, fresh)
        restart = (carry.age % self.horizon == 0) | ~is_same(theta.params, carry.params_after)
        return optax.tree.where(restart, fresh, carry)


class _Keys(NamedTuple):
    inner: jax.Array
    outer: jax.Array
    noise: jax.Array

    @classmethod
    def of(cls, batch: BilevelBatch, name: str) -> _Keys:
        if batch.rng_key is None:
            raise ValueError(f"hypergradient={name!r} draws displacements of phi from batch.rng_key; got None")
        # Inner and outer keys are those of all other estimators, so that theta goes the same way.
        return cls(*inner_and_outer_keys(batch.rng_key), jax.random.fold_in(batch.rng_key, 2))  # pyright: ignore[reportArgumentType]


def _run(
    problem: BilevelProblem, theta: Theta, phi_params: PyTree, batch: BilevelBatch, keys: _Keys
) -> tuple[Theta, jax.Array, jax.Array]:
    """theta after the inner steps, M_phi before them, the outer loss after them."""
    theta, inner_loss = run_inner_steps(problem, theta, phi_params, batch, keys.inner)
    outer_loss = outer_objective(problem, theta.params, theta.model_state, batch.outer, keys.outer)
    return theta, inner_loss, problem.mean(outer_loss)


def _draw(rng_key: jax.Array, phi_params: PyTree, num_pairs: int) -> PyTree:
    """Standard normal numbers, `[N]` of phi's shape."""
    keys = jax.random.split(rng_key, num_pairs)
    return jax.vmap(lambda key: optax.tree.random_like(key, phi_params))(keys)


def _both_signs(noise: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.concatenate([leaf, -leaf]), noise)


def _correlate(losses: jax.Array, displacement: PyTree, sigma: float) -> PyTree:
    """1 / (2 N sigma) sum_i (L_i^+ - L_i^-) displacement_i, of losses `[2, N]`."""
    weights = (losses[0] - losses[1]) / (2 * sigma * losses.shape[1])
    return jax.tree.map(lambda leaf: jnp.tensordot(weights.astype(leaf.dtype), leaf, axes=1), displacement)


def _check_sampling(num_pairs: int, sigma: float) -> None:
    require_count("num_pairs", num_pairs)
    require_number("sigma", sigma)
