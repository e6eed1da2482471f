"""A policy-gradient agent on CartPole whose loss is learned while it acts: M_phi of advantage and log-probability.

    .venv/bin/python -m pip install --constraint constraints.txt --editable ".[rl]"
    .venv/bin/python -m experiments.policy_gradient --write=docs/results.md

Each iteration plays some episodes with the policy there is, updates phi for the step of theta before it, then theta. So
the task loss, the policy-gradient surrogate, is taken on fresh episodes of theta' itself, and none is played for phi
alone: that is the pipelined step. phi starts as the surrogate plus a network that is zero.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

import adalfl_jax
from adalfl_jax.models import Model, make_model
from adalfl_jax.types import Batch, BilevelBatch, PyTree, Theta
from experiments import trials
from experiments.launch import parse_flags
from experiments.trials import Curves, Point, Trial, compare_trials, publish_trials

NAME = "policy_gradient"
PACKAGES = (*trials.PACKAGES, "gymnax")
NUM_EPISODES, NUM_STEPS, DISCOUNT = 16, 200, 0.99  # of an iteration; the longest episode
RATES, ETAS = (1.0, 3.0, 10.0), (1e-4, 1e-3, 1e-2)
NETWORK = adalfl_jax.LossNetwork(hidden_sizes=(40, 40), predictions="raw")

_ITERATIONS = flags.DEFINE_integer("num_iterations", 150, "Updates of the policy.", lower_bound=2)
_SEEDS = flags.DEFINE_integer("num_agents", 20, "Seeds that are compared.", lower_bound=2)


class Environment(NamedTuple):
    """An environment of episodes as two functions; a step after the end of an episode may do anything."""

    reset: Callable[[jax.Array], tuple[jax.Array, PyTree]]  # rng_key -> (observation, state)
    step: Callable[..., tuple[jax.Array, PyTree, jax.Array, jax.Array]]  # -> (observation, state, reward, is_over)
    num_observations: int
    num_actions: int


def cartpole() -> Environment:
    """CartPole-v1 of gymnax, which the extra `rl` brings."""
    try:
        import gymnax  # pyright: ignore[reportMissingImports]
    except ImportError:
        sys.exit('gymnax is missing; .venv/bin/python -m pip install --constraint constraints.txt --editable ".[rl]"')
    env, params = gymnax.make("CartPole-v1")

    def step(rng_key: jax.Array, state: PyTree, action: jax.Array):
        observation, state, reward, has_ended, is_cut, _ = env.step(rng_key, state, action, params)
        return observation, state, reward, has_ended | is_cut

    return Environment(lambda rng_key: env.reset(rng_key, params), step, 4, 2)


def play(env: Environment, model: Model, params: PyTree, rng_key: jax.Array) -> tuple[Batch, jax.Array]:
    """Episodes of a policy side by side.

    Returns:
      observations `[B, ...]` and targets `[B, 3]`, which are action, advantage and whether the episode was still on,
      with B of steps and episodes together; and the mean return of the episodes.
    """
    reset_key, play_key = jax.random.split(rng_key)
    observation, state = jax.vmap(env.reset)(jax.random.split(reset_key, NUM_EPISODES))

    def act(carry: tuple, key: jax.Array):
        observation, state, is_on = carry
        action_key, step_key = jax.random.split(key)
        logits, _ = model.apply(params, {}, observation, train=False, rng_key=None)
        action = jax.random.categorical(action_key, logits)
        keys = jax.random.split(step_key, NUM_EPISODES)
        following, state, reward, is_over = jax.vmap(env.step)(keys, state, action)
        return (following, state, is_on & ~is_over), (observation, action, reward * is_on, is_on)

    start = (observation, state, jnp.ones(NUM_EPISODES, bool))
    _, (observations, actions, rewards, is_on) = jax.lax.scan(act, start, jax.random.split(play_key, NUM_STEPS))
    targets = jnp.stack([actions, _advantages(rewards, is_on), is_on], axis=-1)  # [T, N, 3]
    return Batch(observations.reshape(-1, *observations.shape[2:]), targets.reshape(-1, 3)), rewards.sum(0).mean()


def _advantages(rewards: jax.Array, is_on: jax.Array) -> jax.Array:
    """Discounted rewards to come, of all episodes together to mean 0 and deviation 1; `[T, N]`."""

    def add(later: jax.Array, reward: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = reward + DISCOUNT * later
        return total, total

    _, returns = jax.lax.scan(add, jnp.zeros(rewards.shape[1]), rewards, reverse=True)
    mean = returns.mean(where=is_on)
    return jnp.where(is_on, (returns - mean) / (returns.std(where=is_on) + 1e-6), 0.0)


def surrogate(targets: jax.Array, outputs: jax.Array) -> jax.Array:
    """Minus advantage times log-probability, whose gradient is the policy gradient; mean over what was played."""
    return _mean(-targets[:, 1] * _log_probabilities(targets, outputs), targets)


def learned_loss(phi_params: PyTree, targets: jax.Array, outputs: jax.Array) -> jax.Array:
    """The surrogate plus l_phi(advantage, log-probability)."""
    values = NETWORK.elementwise(phi_params, targets[:, 1], _log_probabilities(targets, outputs))
    return surrogate(targets, outputs) + _mean(values, targets)


def init_phi(rng_key: jax.Array) -> PyTree:
    """phi of a network that is zero, and not flat in phi."""
    params = NETWORK.init(rng_key)
    last = f"layer_{len(NETWORK.hidden_sizes)}"
    return params | {last: jax.tree.map(jnp.zeros_like, params[last])}


def scaled_surrogate(phi_params: PyTree, targets: jax.Array, outputs: jax.Array) -> jax.Array:
    """exp(phi) times the surrogate: a learned learning rate."""
    return jnp.exp(phi_params) * surrogate(targets, outputs)


def _log_probabilities(targets: jax.Array, outputs: jax.Array) -> jax.Array:
    actions = targets[:, :1].astype(jnp.int32)
    return jnp.take_along_axis(jax.nn.log_softmax(outputs), actions, axis=1)[:, 0]


def _mean(values: jax.Array, targets: jax.Array) -> jax.Array:
    return (values * targets[:, 2]).sum() / targets[:, 2].sum()


def make_training(
    env: Environment, num_iterations: int, init: Callable | None = None, apply: Callable | None = None
) -> Callable[[jax.Array, float, float], jax.Array]:
    """Makes the program that trains agents side by side.

    Args:
      env: where they act.
      num_iterations: T.
      init: of phi; None to train on the surrogate.
      apply: M_phi.

    Returns:
      `(seeds [S], alpha, eta) -> ` mean returns `[S, T]`.
    """
    model = make_model("mlp", (env.num_observations,), env.num_actions, hidden_sizes=(32,))

    def one_agent(seed: jax.Array, rate: jax.Array, eta: jax.Array) -> jax.Array:
        theta_key, phi_key, play_key = jax.random.split(jax.random.key(seed), 3)
        inner, outer = optax.sgd(rate), optax.adam(eta)
        theta, phi = adalfl_jax.Theta.create(*model.init(theta_key), inner), None
        if init is None or apply is None:
            task_step = adalfl_jax.make_task_step(model.apply, surrogate, inner)

            def advance(theta: Theta, phi: Any, batch: Batch) -> tuple[Theta, Any]:
                return task_step(theta, batch)[0], phi

        else:
            step = adalfl_jax.make_bilevel_step(model.apply, apply, surrogate, inner, outer, pipelined=True)
            batch = jax.eval_shape(lambda: play(env, model, theta.params, play_key)[0])
            phi = adalfl_jax.Phi.create(init(phi_key), outer)
            phi = adalfl_jax.prime(step, theta, phi, BilevelBatch(batch, batch))

            def advance(theta: Theta, phi: Any, batch: Batch) -> tuple[Theta, Any]:
                return step(theta, phi, BilevelBatch(batch, batch))[:2]

        def iteration(state: tuple, key: jax.Array) -> tuple[tuple, jax.Array]:
            theta, phi = state
            batch, score = play(env, model, theta.params, key)
            return advance(theta, phi, batch), score

        return jax.lax.scan(iteration, (theta, phi), jax.random.split(play_key, num_iterations))[1]

    return jax.jit(jax.vmap(one_agent, in_axes=(0, None, None)))


def make_trials(env: Environment, num_iterations: int) -> dict[str, Trial]:
    """REINFORCE, a learned learning rate and a learned loss; judged by the mean return through training."""

    def trial(title: str, init: Callable | None = None, apply: Callable | None = None) -> Trial:
        training = make_training(env, num_iterations, init, apply)

        def run(point: Point, seeds: Sequence[int]) -> Curves:
            curves = np.asarray(training(jnp.array(seeds), point["alpha"], point.get("eta", 0.0)))
            returns = curves.mean(axis=1)
            return Curves(returns, returns, curves)

        etas = ({},) if init is None else tuple({"eta": eta} for eta in ETAS)
        return Trial(title, run, tuple({"alpha": rate, **eta} for rate in RATES for eta in etas))

    return {
        "reinforce": trial("REINFORCE"),
        "learned_rate": trial("learned learning rate", lambda rng_key: jnp.zeros(()), scaled_surrogate),
        "adalfl": trial("AdaLFL", init_phi, learned_loss),
    }


def main(argv: list[str]) -> None:
    """Trains all agents, writes numbers and a picture, and prints the table."""
    del argv
    publish_trials(
        NAME,
        lambda memory: compare_trials(
            make_trials(cartpole(), _ITERATIONS.value),
            "reinforce",
            tuning_seeds=range(5),
            seeds=range(100, 100 + _SEEDS.value),
            largest_is_best=True,
            settings={"num_iterations": _ITERATIONS.value},
            packages=PACKAGES,
            memory=memory,
        ),
        title=f"CartPole, {_ITERATIONS.value} updates of {NUM_EPISODES} episodes",
        measure="mean return through training",
        xlabel="update",
        ylabel="mean return of an episode",
    )


if __name__ == "__main__":
    app.run(main, flags_parser=functools.partial(parse_flags, unused=("config",)))
