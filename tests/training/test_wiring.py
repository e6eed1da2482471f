"""What the parts of a run are given: each the key, the setting and the mode that are meant for it."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np

import adalfl_jax
from adalfl_jax.hypergradient import ESTIMATORS
from adalfl_jax.training import initial, phases, steps
from adalfl_jax.training.batches import splits_of
from adalfl_jax.training.evaluation import EVAL_BATCHES, _network_of, predict
from adalfl_jax.training.initial import init_phi, make_seed_keys
from adalfl_jax.training.optimizers import make_inner_optimizer
from adalfl_jax.training.setup import make_setup
from adalfl_jax.training.state import RunState
from adalfl_jax.types import BilevelMetrics, Theta
from tests.training.tiny import tiny_config


def updates_of(optimizer, num_steps):
    """Those of a gradient that stays 1, which Adam makes as long as its rate."""
    state, updates = optimizer.init(jnp.zeros(())), []
    for _ in range(num_steps):
        update, state = optimizer.update(jnp.ones(()), state)
        updates.append(float(update))
    return updates


def test_the_phases_draw_from_streams_of_their_own(monkeypatch):
    keys = make_seed_keys((0, 1))
    assert len({tuple(key) for stream in keys for key in jax.random.key_data(stream).tolist()}) == 8
    monkeypatch.setattr(phases, "_make_program", lambda setup, make_step, select_key, num_inner_steps: select_key(keys))
    setup = make_setup(tiny_config())
    assert phases.make_offline_program(setup) is keys.offline
    assert phases.make_training_program(setup, "task_loss") is keys.training


def test_phi_is_drawn_from_a_stream_of_its_own():
    setup = make_setup(tiny_config(num_seeds=1))
    keys, others = make_seed_keys((0,)), make_seed_keys((1,))
    phi = init_phi(setup, keys).params
    chex.assert_trees_all_equal(init_phi(setup, others._replace(phi=keys.phi)).params, phi)
    moved = init_phi(setup, keys._replace(phi=others.phi)).params
    assert not np.allclose(moved["layer_0"]["kernel"], phi["layer_0"]["kernel"])


def test_phi_is_fitted_by_a_key_that_drew_none_of_its_layers(monkeypatch):
    def fit(loss, params, task_loss_fn, rng_key, **settings):
        return jax.random.key_data(rng_key).astype(float)

    monkeypatch.setattr(initial, "fit_to_task_loss", fit)
    keys = make_seed_keys((0, 1))
    fitted_by = init_phi(make_setup(tiny_config({"learned_loss.start": "task_loss"})), keys).params.tolist()
    expected = jax.vmap(lambda key: jax.random.fold_in(key, initial.FITTING))(keys.phi)
    assert fitted_by == jax.random.key_data(expected).astype(float).tolist()
    for key, used in zip(keys.phi, fitted_by, strict=True):
        assert used not in jax.random.key_data(jax.random.split(key, 8)).astype(float).tolist()


def test_the_offline_phase_has_no_progress(monkeypatch):
    def make_step(*arguments):
        return lambda phi, batch: (phi, BilevelMetrics(*[batch.progress] * 3))

    monkeypatch.setattr(phases, "make_offline_step", make_step)
    setup = make_setup(tiny_config())
    keys = make_seed_keys(setup.config.seeds)
    start, splits = RunState(None, init_phi(setup, keys)), splits_of(setup)
    _, metrics = phases.make_offline_program(setup).advance(start, keys, splits, 0.1, 3, num_steps=2)
    assert metrics["inner_loss"].tolist() == [[0, 0], [0, 0]]


def test_shares_of_the_batch_and_the_schedule_of_eta_reach_the_online_step(monkeypatch):
    changes = {"hypergradient": "finite_difference", "outer.inner_fraction": 0.5, "outer.outer_fraction": 0.25}
    changes |= {"outer.schedule": "linear", "outer.learning_rate": 0.5, "num_steps": 2}
    setup = make_setup(tiny_config(changes))
    monkeypatch.setattr(steps, "make_bilevel_step", lambda *given, **named: (given, named))
    (*_, outer), named = steps.make_online_bilevel_step(setup, make_inner_optimizer(setup.config, 0.1))
    assert named["meta_batch_fraction"] == (0.5, 0.25)
    np.testing.assert_allclose(updates_of(outer, 2), (-0.5, -0.25), rtol=1e-4)


def test_settings_of_an_estimator_and_eta_reach_both_phases(monkeypatch):
    changes = {"hypergradient": "neumann", "estimator.num_iterations": 3}
    setup = make_setup(tiny_config({**changes, "offline.learning_rate": 0.5, "outer.learning_rate": 0.25}))
    made = []

    def make_step(*given, **named):
        made.append((given[4], named["hypergradient"]))
        return lambda theta, phi, batch: None

    for module in (steps, phases):
        monkeypatch.setattr(module, "make_bilevel_step", make_step)
    steps.make_online_bilevel_step(setup, make_inner_optimizer(setup.config, 0.1))
    phases.make_offline_program(setup)
    for (outer, estimator), eta in zip(made, (0.25, 0.5), strict=True):
        assert estimator.num_iterations == 3
        np.testing.assert_allclose(updates_of(outer, 1), [-eta], rtol=1e-4)


def test_defaults_of_estimators_are_those_of_the_default_configuration():
    for name in ESTIMATORS:
        assert tiny_config().estimator.make(name) == adalfl_jax.make_estimator(name), name


def test_the_last_example_is_predicted_where_it_alone_is_beyond_whole_batches():
    setup = make_setup(tiny_config())
    inputs = setup.dataset.test.inputs[: EVAL_BATCHES * setup.config.batch_size + 1]

    def apply(params, model_state, inputs, *, train, rng_key):
        return inputs.reshape(len(inputs), -1), model_state

    setup = dataclasses.replace(setup, model=setup.model._replace(apply=apply))
    np.testing.assert_array_equal(predict(setup, Theta((), (), ()), inputs), inputs.reshape(len(inputs), -1))


def test_a_loss_with_bounds_has_the_shape_of_the_network_in_it():
    setup = make_setup(tiny_config({"learned_loss.floor": 1.0, "learned_loss.ceiling": 1.0}))
    assert _network_of(setup) == make_setup(tiny_config()).learned_loss


def test_a_run_is_measured_in_eval_mode():
    setup, modes = make_setup(tiny_config()), []

    def apply(params, model_state, inputs, *, train, rng_key):
        modes.append(train)
        return inputs.reshape(len(inputs), -1), model_state

    setup = dataclasses.replace(setup, model=setup.model._replace(apply=apply))
    predict(setup, Theta((), (), ()), setup.dataset.test.inputs)
    assert modes
    assert not any(modes)
