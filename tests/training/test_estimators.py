"""Estimators that remember, and thrift, in the programs of a run: chunks, streams, seeds, what is written."""

import functools

import chex
import jax
import numpy as np
import pytest

from adalfl_jax.hypergradient import ESTIMATORS
from adalfl_jax.training import ConfigError, stage, train
from adalfl_jax.training.batches import splits_of
from adalfl_jax.training.chunk import chunk_means, updates_of_phi
from adalfl_jax.training.initial import init_phi, init_training, make_seed_keys
from adalfl_jax.training.phases import make_offline_program, make_training_program, offline_hypergradient
from adalfl_jax.training.setup import make_setup
from adalfl_jax.training.state import RunState, without_carry
from tests.training.tiny import LINEAR, final_state, tiny_config

pytestmark = pytest.mark.usefixtures("without_figures")

REMEMBERING = [
    pytest.param({"outer.pipelined": True, "hypergradient": "finite_difference"}, marks=pytest.mark.slow),
    {"hypergradient": "truncated", "estimator.window": 2},
    pytest.param(
        {"hypergradient": "persistent_evolution_strategies", "estimator.num_pairs": 2, "estimator.horizon": 4},
        marks=pytest.mark.slow,
    ),
    pytest.param({"outer.pipelined": True}, marks=pytest.mark.slow),
    pytest.param({"outer.every": 4}, marks=pytest.mark.slow),
]


@functools.cache
def make_phase(overrides):
    setup = make_setup(tiny_config(LINEAR | dict(overrides)))
    return setup, make_training_program(setup, "adalfl")


def advance(overrides, chunks):
    """The state and the metrics of every step, in chunks of given lengths."""
    setup, phase = make_phase(tuple(overrides.items()))
    keys, splits, rate = make_seed_keys(setup.config.seeds), splits_of(setup), setup.config.inner.learning_rate
    state, metrics, done = init_training(setup, "adalfl", keys), [], 0
    for num_steps in chunks:
        state, chunk = phase.advance(state, keys, splits, rate, done, num_steps=num_steps)
        metrics.append(chunk)
        done += num_steps
    return state, jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *metrics)


@pytest.mark.parametrize("overrides", REMEMBERING, ids=lambda overrides: "-".join(map(str, overrides.values())))
def test_chunks_of_any_length_and_streams_give_the_same_run(overrides):
    whole, parts = advance(overrides, [10]), advance(overrides, [5, 5])
    chex.assert_trees_all_close(without_carry(whole[0]), without_carry(parts[0]), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(whole[1], parts[1], rtol=1e-4, atol=1e-6)
    if "outer.every" in overrides or overrides.get("hypergradient") == "finite_difference":
        streamed = advance({**overrides, "dataset.streaming": "always"}, [10])
        chex.assert_trees_all_close(without_carry(whole[0]), without_carry(streamed[0]), rtol=1e-5, atol=1e-6)


def test_phi_stays_between_its_updates():
    (third, _), (first, _) = advance({"outer.every": 4}, [1, 1, 1]), advance({"outer.every": 4}, [1])
    chex.assert_trees_all_equal(third.phi, first.phi)
    _, metrics = advance({"outer.every": 4}, [1] * 4)
    np.testing.assert_array_equal(metrics["hypergradient_norm"] > 0, [[False, False, False, True]] * 2)


@pytest.mark.parametrize(("pipelined", "first"), [(False, 0), (True, 1)])
def test_the_first_step_of_a_pipelined_run_updates_nothing(pipelined, first, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(stage, "updates_of_phi", lambda *given: found.append(updates_of_phi(*given)) or found[-1])
    brief = LINEAR | {"num_steps": 4, "eval_every": 2, "offline.num_steps": 0, "outer.pipelined": pipelined}
    train(tiny_config(brief, method="adalfl"), tmp_path / "run")
    np.testing.assert_array_equal(np.concatenate(found), np.arange(4) >= first)


def test_means_of_updates_leave_out_the_steps_between():
    of_updates = ("outer_loss", "hypergradient_norm", "phi_update_ratio")
    metrics = {name: np.arange(6.0)[None] for name in ("inner_loss", *of_updates)}
    assert chunk_means(metrics, updates_of_phi(range(1, 7), 3)) == {
        "inner_loss": 2.5,
        **dict.fromkeys(of_updates, 2.5),
    }  # steps 2 and 5
    again = updates_of_phi(range(2, 8), 3)  # steps 2 and 5, the first and the fourth of this chunk
    assert [chunk_means(metrics, again)[name] for name in of_updates] == [1.5] * 3
    assert chunk_means(metrics, updates_of_phi(range(6), 100))["outer_loss"] == 2.5  # none is an update: all of them
    assert chunk_means(metrics, updates_of_phi(range(6)))["outer_loss"] == 2.5
    assert chunk_means(metrics, updates_of_phi(range(2, 8), 1, 4))["outer_loss"] == 0.5  # steps 2 and 3
    assert chunk_means(metrics, updates_of_phi(range(6), first=1))["outer_loss"] == 3.0  # all but step 0


@pytest.mark.parametrize("others", [{}, {"skipped_steps": np.zeros((1, 4))}], ids=["all", "skipped"])
def test_means_of_finite_numbers_are_finite(others):
    means = chunk_means({"inner_loss": np.full((1, 4), 3e38, np.float32)} | others, updates_of_phi(range(4)))
    np.testing.assert_allclose(means["inner_loss"], 3e38, rtol=1e-6)


FORGOTTEN = {"truncated", "persistent_evolution_strategies"}  # they would have to see every step of one theta
NO_AXIS = {"forward", "recompute", "finite_difference", "central_difference", "truncated"}  # they take one inner step


@pytest.mark.parametrize(("num_inner_steps", "out_of_place"), [(1, FORGOTTEN), (2, FORGOTTEN | NO_AXIS)])
def test_an_estimator_that_does_not_fit_the_offline_phase_gives_way(num_inner_steps, out_of_place):
    taken = {name: offline_hypergradient(name, num_inner_steps) for name in ESTIMATORS}
    assert taken == {name: "unrolled" if name in out_of_place else name for name in ESTIMATORS}


def test_the_offline_phase_takes_any_estimator():
    """Where it does not fit, "unrolled" is taken: the offline phase forgets theta at every step."""

    def phi_after(name):
        setup = make_setup(tiny_config(LINEAR | {"hypergradient": name}))
        keys = make_seed_keys(setup.config.seeds)
        start, rate = RunState(None, init_phi(setup, keys)), setup.config.inner.learning_rate
        state, _ = make_offline_program(setup).advance(start, keys, splits_of(setup), rate, 0, num_steps=2)
        return jax.tree.leaves(state.phi.params)

    unrolled, truncated, implicit = map(phi_after, ("unrolled", "truncated", "conjugate_gradient"))
    assert max(np.abs(a - b).max() for a, b in zip(unrolled, truncated, strict=True)) < 1e-6
    assert max(np.abs(a - b).max() for a, b in zip(unrolled, implicit, strict=True)) > 1e-6


def test_a_run_keeps_theta_and_phi_and_no_more(tmp_path):
    brief = LINEAR | {"num_steps": 4, "eval_every": 2, "offline.num_steps": 0}
    config = tiny_config(brief | {"hypergradient": "truncated", "estimator.window": 2})
    train(config, tmp_path / "run")
    state = final_state(config, tmp_path / "run", "adalfl")
    chex.assert_tree_all_finite(state)
    assert state.phi.carry == ()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"outer.every": 21}, r"outer\.every must be at most config\.num_steps; got 21"),
        ({"outer.every": 0}, r"outer\.every must be a whole number of at least 1; got 0"),
        ({"outer.inner_fraction": 0.0}, r"outer\.inner_fraction must be a number in \(0, 1\]; got 0\.0"),
        ({"outer.outer_fraction": 1.5}, r"outer\.outer_fraction must be a number in \(0, 1\]; got 1\.5"),
        ({"outer.pipelined": True, "outer.every": 2}, r"outer\.pipelined must be False with outer.every 2; got True"),
        ({"outer.pipelined": True, "outer.split": "valid"}, r"outer\.pipelined must be False with outer.split 'valid'"),
        ({"outer.pipelined": True, "hypergradient": "unrolled"}, r"hypergradient must be one of forward, recompute"),
        ({"outer.inner_fraction": 0.5, "hypergradient": "neumann"}, r"hypergradient must be one of forward"),
        *(
            (
                {"outer.inner_fraction": 0.5, bound: 1.0},
                r"outer\.inner_fraction must be 1\.0 with learned_loss\.floor or",
            )
            for bound in ("learned_loss.floor", "learned_loss.ceiling")
        ),
        ({"outer.every": 2, "hypergradient": "truncated"}, r"hypergradient must be one that remembers nothing"),
        (
            {"hypergradient": "finite_difference", "model.compute_dtype": "bfloat16"},
            r'hypergradient must be "forward" with model.compute_dtype "bfloat16"; got \'finite_difference\'',
        ),
        ({"estimator.window": 0}, r"window must be a whole number of at least 1; got 0"),
        ({"estimator.num_iterations": 0}, r"num_iterations must be .* got 0"),
        ({"estimator.sigma": 0.0}, r"sigma must be a number above 0; got 0\.0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(overrides)
