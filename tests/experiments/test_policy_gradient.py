"""The policy-gradient agent, on an environment of one state in which one action is right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adalfl_jax.models import make_model
from experiments import policy_gradient as program

LENGTH = 3  # of an episode that chooses the right action throughout


def choice():
    """Action 1 is right and earns 1; the other ends the episode, as does the end."""

    def step(rng_key, state, action):
        is_right = action == 1
        return jnp.ones(2), state + 1, is_right.astype(jnp.float32), ~is_right | (state + 1 >= LENGTH)

    return program.Environment(lambda rng_key: (jnp.ones(2), jnp.zeros((), jnp.int32)), step, 2, 2)


@pytest.fixture(autouse=True)
def short_episodes(monkeypatch):
    monkeypatch.setattr(program, "NUM_STEPS", 4)


def test_what_is_played_is_what_was_on():
    model = make_model("mlp", (2,), 2, hidden_sizes=(4,))
    params, _ = model.init(jax.random.key(0))
    batch, score = program.play(choice(), model, params, jax.random.key(1))
    actions, advantages, is_on = (np.asarray(batch.targets[:, k]).reshape(4, -1) for k in range(3))
    assert batch.inputs.shape == (4 * program.NUM_EPISODES, 2)
    np.testing.assert_array_equal(is_on[0], 1)
    np.testing.assert_array_equal(is_on[1], actions[0] == 1)
    np.testing.assert_array_equal(is_on[3], 0)
    np.testing.assert_allclose(score, (is_on * actions).sum() / program.NUM_EPISODES)
    np.testing.assert_array_equal(advantages[is_on == 0], 0)
    np.testing.assert_allclose([advantages[is_on == 1].mean(), advantages[is_on == 1].std()], [0, 1], atol=1e-4)


def test_the_learned_loss_starts_as_the_surrogate_and_phi_has_a_gradient():
    targets = jnp.array([[0.0, 1.5, 1.0], [1.0, -0.5, 1.0], [1.0, 0.0, 0.0]])
    outputs = jnp.array([[0.3, -0.2], [1.0, 0.5], [0.1, 0.9]])
    phi_params = program.init_phi(jax.random.key(0))
    slope = jax.grad(program.surrogate, argnums=1)
    np.testing.assert_allclose(
        jax.jit(jax.grad(program.learned_loss, argnums=2))(phi_params, targets, outputs),
        slope(targets, outputs),
        rtol=1e-6,
    )
    expected = -(1.5 * jax.nn.log_softmax(outputs[0])[0] - 0.5 * jax.nn.log_softmax(outputs[1])[1]) / 2
    np.testing.assert_allclose(program.surrogate(targets, outputs), expected, rtol=1e-6)

    @jax.jit
    def phi_gradient(phi_params):
        _, pullback = jax.vjp(lambda phi: jax.grad(program.learned_loss, argnums=2)(phi, targets, outputs), phi_params)
        return pullback(outputs)[0]

    assert jnp.abs(phi_gradient(phi_params)["layer_2"]["kernel"]).max() > 0


@pytest.mark.parametrize(
    "learned", [pytest.param((), marks=pytest.mark.slow), (program.init_phi, program.learned_loss)]
)
def test_agents_of_a_few_updates_learn_the_right_action(learned):
    curves = program.make_training(choice(), 25, *learned)(jnp.arange(2), 1.0, 1e-3)
    assert curves.shape == (2, 25)
    assert float(curves[:, -1].min()) > 0.8 * LENGTH > float(curves[:, 0].max())


@pytest.mark.slow
def test_a_pole_is_balanced_on_the_environment_of_the_study(monkeypatch):
    pytest.importorskip("gymnax")
    monkeypatch.setattr(program, "NUM_STEPS", 20)
    env = program.cartpole()
    model = make_model("mlp", (env.num_observations,), env.num_actions, hidden_sizes=(4,))
    params, _ = model.init(jax.random.key(0))
    batch, score = program.play(env, model, params, jax.random.key(1))
    assert batch.inputs.shape == (20 * program.NUM_EPISODES, 4)
    assert 5 < score <= 20  # no policy falls at once
    np.testing.assert_array_equal(np.unique(batch.targets[:, 0]), [0, 1])


def test_an_advantage_is_of_the_discounted_rewards_to_come():
    rewards = jnp.array([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    is_on = np.array([[True, True], [True, True], [False, True]])
    discount = program.DISCOUNT
    returns = np.array([[1 + 2 * discount, 3 * discount**2], [2, 3 * discount], [0, 3]])
    expected = np.where(is_on, (returns - returns[is_on].mean()) / returns[is_on].std(), 0)
    np.testing.assert_allclose(program._advantages(rewards, jnp.asarray(is_on)), expected, atol=1e-5)
