"""Numbers that are not finite: a step is skipped, a chunk taken again; a phi without a gradient is told."""

import dataclasses
import functools
import re
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adalfl_jax import data, save_learned_loss
from adalfl_jax.training import DivergenceError, PreemptionError, run, stage, train
from adalfl_jax.training.batches import splits_of
from adalfl_jax.training.chunk import (
    chunk_means,
    seeds_at_rest,
    seeds_with_long_steps,
    seeds_without_gradient,
    updates_of_phi,
)
from adalfl_jax.training.divergence import require_finite
from adalfl_jax.training.faults import all_finite, skip_nonfinite
from adalfl_jax.training.initial import init_phi, init_training, make_seed_keys
from adalfl_jax.training.methods import phase_of
from adalfl_jax.training.phases import make_offline_program, make_training_program
from adalfl_jax.training.setup import make_setup
from adalfl_jax.training.state import RunState
from adalfl_jax.training.steps import phi_metrics
from adalfl_jax.types import Batch, Phi, Theta
from tests.training.same_run import assert_same_run
from tests.training.test_resume import run_in_pieces
from tests.training.tiny import DIABETES, LINEAR, final_state, records, tiny_config

pytestmark = [
    pytest.mark.filterwarnings("ignore:The inplace keyword"),  # tbparse's, of pandas
    pytest.mark.usefixtures("without_figures"),
]

SEEDS = 3
PHASES = [*(pytest.param(name, marks=pytest.mark.slow) for name in ("task_loss", "offline")), "adalfl"]


@functools.cache
def make_phase(method, policy):
    """The program of a phase, and what three seeds start from."""
    setup = make_setup(tiny_config(LINEAR, on_nonfinite=policy, num_seeds=SEEDS))
    keys = make_seed_keys(setup.config.seeds)
    if method == "offline":
        return setup, keys, make_offline_program(setup), RunState(None, init_phi(setup, keys))
    return setup, keys, make_training_program(setup, method), init_training(setup, method, keys)


@functools.cache
def advance(method, policy, spoil=None, num_steps=6):
    """A chunk of a phase from a state of three seeds that `spoil` may change before."""
    setup, keys, phase, state = make_phase(method, policy)
    state = state if spoil is None else spoil(state)
    return state, *phase.advance(state, keys, splits_of(setup), 0.1, 0, num_steps=num_steps)


def spoil_second_seed(state):
    """Parameters so large that no loss of theirs is finite."""
    return jax.tree.map(lambda leaf: leaf.at[1].set(1e38) if leaf.dtype == jnp.float32 else leaf, state)


@pytest.mark.parametrize("method", PHASES)
def test_a_seed_that_diverges_stays_as_it_is_and_its_neighbours_are_the_same_bits(method):
    before, after, metrics = advance(method, "skip", spoil_second_seed)
    _, expected, expected_metrics = advance(method, "skip")
    for seed in (0, 2):
        jax.tree.map(lambda a, b, s=seed: np.testing.assert_array_equal(a[s], b[s]), after, expected)
        jax.tree.map(lambda a, b, s=seed: np.testing.assert_array_equal(a[s], b[s]), metrics, expected_metrics)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[1]), after, before)
    np.testing.assert_array_equal(metrics["skipped_steps"], [[0] * 6, [1] * 6, [0] * 6])
    assert all_finite(metrics)


@pytest.mark.parametrize("method", PHASES)
def test_where_all_is_finite_skipping_changes_nothing(method):
    _, state, metrics = advance(method, "skip")
    _, expected, expected_metrics = advance(method, "stop")
    assert not metrics["skipped_steps"].any()
    expected_metrics = expected_metrics | {"skipped_steps": metrics["skipped_steps"]}
    chex.assert_trees_all_close((state, metrics), (expected, expected_metrics), rtol=1e-5, atol=1e-7)


@pytest.fixture
def poisoned(monkeypatch):
    """Digits with one example in the training split, the last, that no loss of is finite."""
    digits = data.load("digits")
    inputs = np.array(digits.train.inputs)
    inputs[-1] = 3e38
    digits = dataclasses.replace(digits, train=Batch(jnp.asarray(inputs), digits.train.targets))
    monkeypatch.setattr(run, "make_setup", lambda config: make_setup(config, digits))


def test_a_run_skips_the_steps_that_meet_a_poisoned_example(poisoned, tmp_path):
    overrides = {"batch_size": 200, "num_steps": 12, "eval_every": 6, "offline.num_steps": 6}  # six steps an epoch
    overrides |= LINEAR
    with pytest.raises(DivergenceError):
        train(tiny_config(overrides, method="task_loss"), tmp_path / "stop")
    config = tiny_config(overrides, method="adalfl", on_nonfinite="skip")
    train(config, tmp_path / "skip")
    rows = [row for row in records(tmp_path / "skip") if "train/skipped_steps" in row]
    assert len(rows) == 2 + 2 * 2
    assert {row["train/skipped_steps"] for row in rows} <= {0.0, 1.0, 2.0}  # in an inner batch, in an outer one
    assert any(row["train/skipped_steps"] for row in rows if row["phase"] == "training")
    assert all(row["train/inner_loss"] != 0 for row in rows)
    assert all_finite(final_state(config, tmp_path / "skip", "adalfl"))


def test_a_step_is_skipped_where_any_part_of_it_is_not_finite():
    def step(state, batch):
        theta, phi, metric = batch
        return RunState(state.theta + theta, state.phi), {"loss": metric, "number": phi}

    guarded = skip_nonfinite(step)
    state = RunState(jnp.zeros(2), None)
    good, bad = jnp.float32(1), jnp.float32(jnp.nan)
    taken, metrics = guarded(state, (good, jnp.int32(3), good))
    assert taken.theta.tolist() == [1, 1]
    assert metrics == {"loss": 1, "number": 3, "skipped_steps": 0}
    for batch in ((bad, jnp.int32(3), good), (good, jnp.int32(3), bad)):
        left, metrics = guarded(state, batch)
        assert left.theta.tolist() == [0, 0]
        assert metrics == {"loss": 0, "number": 0, "skipped_steps": 1}


@pytest.mark.parametrize(("added", "is_skipped"), [(1.0, False), (jnp.inf, True)])
def test_a_step_is_skipped_where_the_optimiser_of_phi_is_not_finite(added, is_skipped):
    def step(state, batch):
        phi = state.phi
        return state._replace(phi=phi._replace(params=phi.params + 1, opt_state=phi.opt_state + batch)), {}

    state = RunState(Theta(jnp.zeros(2), (), ()), Phi(jnp.zeros(2), jnp.zeros(2), ()))
    after, metrics = skip_nonfinite(step)(state, added)
    assert metrics["skipped_steps"] == is_skipped
    np.testing.assert_array_equal(after.phi.params, 1 - is_skipped)


def test_what_a_step_remembers_is_forgotten_where_it_is_skipped():
    def step(state, batch):
        return state._replace(phi=Phi(batch, (), jnp.full(2, 8.0))), {}

    state = RunState(None, Phi(jnp.float32(1), (), jnp.full(2, 7.0)))
    taken, _ = skip_nonfinite(step)(state, jnp.float32(2))
    assert (taken.phi.params, taken.phi.carry.tolist()) == (2, [8, 8])
    left, _ = skip_nonfinite(step)(state, jnp.float32(jnp.nan))
    assert (left.phi.params, left.phi.carry.tolist()) == (1, [0, 0])


def test_a_schedule_goes_on_where_a_step_is_skipped():
    optimizer = optax.sgd(optax.linear_schedule(1.0, 0.0, 4), momentum=0.5)

    def step(state, gradient):
        updates, opt_state = optimizer.update(gradient, state.theta.opt_state)
        return RunState(Theta(state.theta.params + updates, (), opt_state), None), {}

    state = RunState(Theta.create(jnp.float32(0), (), optimizer), None)
    path = []
    for gradient in (1.0, jnp.nan, 1.0, 1.0):
        state, _ = skip_nonfinite(step)(state, jnp.float32(gradient))
        path.append(float(state.theta.params))
    np.testing.assert_allclose(np.diff([0.0, *path]), [-1.0, 0.0, -0.5 * 1.5, -0.25 * 1.75])


def test_skipped_steps_are_counted_and_in_no_mean():
    metrics = {
        "inner_loss": np.array([[1.0, 0.0, 3.0], [0.0, 0.0, 0.0]]),
        "outer_loss": np.array([[9.0, 0.0, 5.0], [0.0, 0.0, 0.0]]),
        "skipped_steps": np.array([[0, 1, 0], [1, 1, 1]]),
    }
    means = chunk_means(metrics, updates_of_phi(range(3)))
    assert {name: values.tolist() for name, values in means.items()} == {
        "inner_loss": [2.0, 0.0],
        "outer_loss": [7.0, 0.0],
        "skipped_steps": [1, 3],
    }
    last_alone = updates_of_phi(range(3), 3)
    assert chunk_means(metrics, last_alone)["outer_loss"].tolist() == [5.0, 0.0]


def test_phi_is_updated_at_every_nth_step_from_the_first_and_not_at_the_end():
    assert np.flatnonzero(updates_of_phi(range(8), 2, end=5, first=3)).tolist() == [3]
    assert np.flatnonzero(updates_of_phi(range(4, 9), 3, first=4)).tolist() == [1, 4]


def test_a_zero_meta_gradient_is_seen_where_phi_is_updated():
    norms = np.array([[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]])
    metrics = {"hypergradient_norm": norms}
    always = updates_of_phi(range(4))
    assert seeds_without_gradient(metrics, always) == [1]
    assert seeds_without_gradient(metrics, updates_of_phi(range(4), 2)) == [1, 2]  # at the second and the fourth
    assert seeds_without_gradient(metrics, updates_of_phi(range(1, 5), 2)) == [0, 1]
    assert seeds_without_gradient(metrics, updates_of_phi(range(4), 4)) == []  # one update says nothing
    assert seeds_without_gradient(metrics, updates_of_phi(range(4), 1, 0)) == []  # theta trains on both batches
    assert seeds_without_gradient(metrics | {"skipped_steps": np.eye(3, 4, dtype=int)}, always) == []
    assert seeds_without_gradient({"inner_loss": norms}, always) == []


def test_a_state_that_is_not_finite_is_named_with_its_seed_and_what_a_step_remembers_may_be():
    bad = jnp.array([[1.0, 2.0], [3.0, jnp.inf]])
    about = {"first_step": 4, "method": "adalfl", "config": tiny_config(seed=7)}
    good = RunState(None, Phi({"kernel": jnp.ones((2, 3))}, (jnp.arange(2),), bad))
    require_finite({}, {}, good, last_finite=good, **about)
    state = good._replace(theta=Theta({"kernel": bad}, {}, ()))
    with pytest.raises(DivergenceError) as caught:
        require_finite({}, {}, state, last_finite=good, **about)
    assert (caught.value.metric, caught.value.seed) == ("theta", 8)
    assert caught.value.state.phi.carry == ()


def test_the_first_number_that_is_not_finite_is_named_whatever_it_is_of():
    good = RunState(None, Phi({"kernel": jnp.ones((2, 3))}, ()))
    metrics = {"inner_loss": np.ones((2, 3)), "outer_loss": np.ones((2, 3))}
    metrics["inner_loss"][0, 2] = metrics["outer_loss"][1, 1] = np.nan
    with pytest.raises(DivergenceError) as caught:
        require_finite(metrics, {}, good, last_finite=good, first_step=4, method="adalfl", config=tiny_config(seed=7))
    assert (caught.value.metric, caught.value.step, caught.value.seed) == ("outer_loss", 6, 8)


BACK_OFF = ', or on_nonfinite="back_off"'
FIRST_STEP, BACK_OFF_ETA = {"inner.first_step_rate": 0.3}, {"on_nonfinite": "back_off"}
JOINT = {"outer.split": "valid", "outer.joint_share": 0.8}  # from step 4 on


@pytest.mark.parametrize(
    ("method", "metric", "overrides", "remedy"),
    [
        ("task_loss", "theta", {}, "a smaller inner.learning_rate, or inner.clip_norm"),
        ("task_loss", "theta", FIRST_STEP, "a smaller inner.learning_rate"),
        ("task_loss", "theta", {"inner.clip_norm": 1.0}, "a smaller inner.learning_rate, or a smaller inner.clip_norm"),
        ("task_loss", "theta", BACK_OFF_ETA, "a smaller inner.learning_rate, or inner.clip_norm"),
        ("tuned_task_loss", "inner_loss", {}, "a smaller tuning.learning_rates, or inner.clip_norm"),
        ("ml3", "inner_loss", {}, "a smaller inner.learning_rate, or inner.clip_norm, or inner.first_step_rate"),
        ("ml3", "inner_loss", FIRST_STEP, "a smaller inner.first_step_rate"),
        (
            "adalfl",
            "outer_loss",
            {},
            "a smaller inner.learning_rate or outer.learning_rate, or inner.clip_norm, or inner.first_step_rate"
            + BACK_OFF,
        ),
        (
            "adalfl",
            "theta",
            FIRST_STEP | BACK_OFF_ETA,
            "a smaller inner.first_step_rate or outer.learning_rate",
        ),
        (
            "adalfl",
            "hypergradient_norm",
            {},
            "a smaller outer.learning_rate or inner.learning_rate, or inner.clip_norm, or inner.first_step_rate"
            + BACK_OFF,
        ),
        ("adalfl", "phi", FIRST_STEP | BACK_OFF_ETA, "a smaller outer.learning_rate or inner.first_step_rate"),
        ("adalfl", "inner_loss", JOINT, "a smaller inner.learning_rate, or inner.clip_norm, or inner.first_step_rate"),
        (
            "offline",
            "outer_loss",
            {},
            "a smaller offline.learning_rate or inner.learning_rate, or inner.clip_norm" + BACK_OFF,
        ),
        (
            "offline",
            "phi",
            FIRST_STEP | BACK_OFF_ETA,
            "a smaller offline.learning_rate or inner.learning_rate",
        ),
    ],
)
def test_the_settings_are_named_that_move_what_is_not_finite(method, metric, overrides, remedy):
    good = RunState(Theta(jnp.ones((2, 3)), (), ()), Phi(jnp.ones((2, 3)), ()))
    is_state, nan = metric in good._fields, jnp.full((2, 3), jnp.nan)
    state = good._replace(**{metric: getattr(good, metric)._replace(params=nan)}) if is_state else good
    metrics = {} if is_state else {metric: np.asarray(nan)}
    with pytest.raises(DivergenceError) as caught:
        require_finite(
            {"inner_loss": np.ones((2, 3))} | metrics,
            {},
            state,
            last_finite=good,
            first_step=4,
            method=method,
            config=tiny_config(overrides),
        )
    assert f"{metric} is not finite at {phase_of(method)} step" in str(caught.value)
    assert f"; {remedy} may help, in another workdir. The last finite state is that of step 4" in str(caught.value)


def test_seeds_at_rest_are_those_that_the_learned_loss_does_not_move():
    assert seeds_at_rest({"gradient_scale": np.array([0.0, 0.1, 1e-9, 48.0])}) == [0, 2]
    assert seeds_at_rest({"valid/error_rate": np.zeros(2)}) == []  # of a task loss


def test_long_steps_are_those_of_too_large_a_rate_on_the_task_loss():
    measured = {"gradient_scale": np.array([0.0, 101.0, 99.0, 290.0])}
    assert seeds_with_long_steps(measured, 0.01) == [1, 3]
    assert seeds_with_long_steps(measured, 0.001) == []  # a smaller rate mends it
    assert seeds_with_long_steps(measured, 0.1) == [1, 2, 3]
    assert seeds_with_long_steps({"valid/error_rate": np.full(2, 0.9)}, 3.0) == []  # of a task loss


@pytest.mark.parametrize("joint_share", [0.0, pytest.param(0.5, marks=pytest.mark.slow), 1.0])
def test_a_frozen_loss_that_saturates_the_outputs_is_told_once_unless_the_clean_set_trains(joint_share, tmp_path):
    loss = tiny_config().learned_loss.network()
    phi = loss.init(jax.random.key(0))
    phi["layer_1"]["kernel"] *= 1e6  # one step leaves nothing but probabilities of zero and one
    save_learned_loss(tmp_path / "far.safetensors", loss, phi)
    overrides = LINEAR | {"learned_loss.start": str(tmp_path / "far.safetensors"), "offline.num_steps": 0}
    overrides |= {"outer.split": "valid", "outer.joint_share": joint_share}
    far, at_rest = (
        "the first step is as long as one on the task loss at a rate above 1",
        "after step 5 .* is below a millionth of",
    )
    with pytest.warns(UserWarning, match="is told once") as told:
        train(tiny_config(overrides, method="ml3", eval_every=5), tmp_path / "run")
    texts = [str(warning.message) for warning in told if "is told once" in str(warning.message)]
    expected = [far] if joint_share == 1 else [far, at_rest]
    assert [bool(re.search(*pair)) for pair in zip(expected, texts, strict=True)] == [True] * len(expected)


def test_a_first_step_that_is_clipped_or_asked_for_is_not_told_to_be_long(tmp_path, recwarn):
    loss = tiny_config().learned_loss.network()
    phi = jax.tree.map(lambda leaf: 10 * leaf, loss.init(jax.random.key(0)))
    save_learned_loss(tmp_path / "steep.safetensors", loss, phi)
    overrides = {"learned_loss.start": str(tmp_path / "steep.safetensors"), "offline.num_steps": 0, "num_steps": 1}
    overrides |= LINEAR | {"inner.learning_rate": 10.0, "method": "ml3", "eval_every": 1, "num_seeds": 1}
    told = []
    for number, more in enumerate(({}, {"inner.clip_norm": 1e-3}, {"inner.first_step_rate": 3.0})):
        train(tiny_config(overrides | more), tmp_path / f"{number}")
        told.append(any("the first step is as long" in str(warning.message) for warning in recwarn))
        recwarn.clear()
    assert told == [True, False, False]


def test_update_ratio_is_that_of_the_norms():
    before, after = {"a": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}, {"a": jnp.array([3.0, 3.0]), "b": jnp.array(8.0)}
    assert phi_metrics(Phi(before, ()), Phi(after, ()))["phi_update_ratio"] == pytest.approx(1.0)
    zeros = jax.tree.map(jnp.zeros_like, before)
    assert phi_metrics(Phi(zeros, ()), Phi(after, ())) == {"phi_update_ratio": 0}


def test_a_learned_loss_without_a_gradient_is_told_once(tmp_path, recwarn):
    overrides = {"learned_loss.activation": "relu", "learned_loss.output_activation": "relu", "offline.num_steps": 8}
    overrides |= LINEAR | {"num_seeds": 1, "num_steps": 8, "eval_every": 4, "learned_loss.hidden_sizes": (1,)}
    for seed in range(8):  # of one unit, some are dead from the start
        train(tiny_config(overrides, method="adalfl", seed=seed), tmp_path / str(seed))
        if told := [str(warning.message) for warning in recwarn if "exactly zero" in str(warning.message)]:
            break
    expected = "the meta-gradient was exactly zero at every update of"
    assert [text.partition(" steps")[0] for text in told] == [
        f"offline: {expected} offline",
        f"adalfl: {expected} training",
    ]
    assert f"steps 1 to 4 (seeds {seed})" in told[0]
    rows = [row for row in records(tmp_path / str(seed)) if "train/phi_update_ratio" in row]
    assert {row["train/phi_update_ratio"] for row in rows} == {0.0}


@pytest.fixture
def fragile(shared_programs, monkeypatch):
    """Makes the training phase of AdaLFL fail after step 10 of seed 1 as long as eta is above 1e-4."""

    def make(setup, method):
        phase = make_program(setup, method)
        phases.append(phase)

        def advance(*arguments, **options):
            if arguments[-1] != 10 or setup.config.outer.learning_rate <= limit[0]:
                return phase.advance(*arguments, **options)
            state, metrics = phases[0].advance(*arguments, **options)  # is compiled; nothing is kept of what fails
            metrics["outer_loss"] = metrics["outer_loss"].at[1, 2].set(jnp.nan)
            return state, metrics

        return phase._replace(advance=advance)

    limit, phases, make_program = [1e-4], [], run.make_training_program
    monkeypatch.setattr(run, "make_training_program", make)
    return limit


BACKING_OFF = LINEAR | {
    "offline.num_steps": 0,
    "on_nonfinite": "back_off",
    "outer.learning_rate": 3e-4,
    "eval_every": 5,
}


@pytest.mark.usefixtures("fragile")
def test_a_chunk_that_is_not_finite_is_taken_again_with_eta_halved(tmp_path):
    with pytest.warns(UserWarning, match="eta is halved") as told:
        train(tiny_config(BACKING_OFF, method="adalfl"), tmp_path / "run")
    text = "adalfl diverged: outer_loss is not finite at training step 13 (seed 1);"
    assert [text in str(warning.message) for warning in told] == [True, True]
    back_offs = {row["step"]: row.get("train/back_offs") for row in records(tmp_path / "run")}
    assert back_offs == {0: None, 5: 0.0, 10: 0.0, 15: 2.0, 20: 2.0}


@pytest.mark.slow
@pytest.mark.usefixtures("fragile")
def test_a_run_broken_off_after_eta_was_halved_ends_as_an_unbroken_one(tmp_path, monkeypatch):
    config = tiny_config(BACKING_OFF, method="adalfl")
    with pytest.warns(UserWarning, match="eta is halved"):
        train(config, tmp_path / "unbroken")
    with pytest.warns(UserWarning, match="eta is halved"):
        run_in_pieces(train, config, tmp_path / "broken", (5,), monkeypatch)  # behind the halving
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")


@pytest.mark.parametrize("times", [0, 1, 3])
def test_eta_is_halved_online_and_offline(times):
    setup = make_setup(tiny_config({"outer.learning_rate": 0.8, "offline.learning_rate": 0.4}))
    config = run._backed_off(setup, lambda changed: changed.config)(times)
    assert (config.outer.learning_rate, config.offline.learning_rate) == (0.8 / 2**times, 0.4 / 2**times)


def test_a_signal_is_obeyed_before_a_chunk_is_taken_again(fragile, tmp_path, monkeypatch):
    fragile[0] = 0.0  # no eta is small enough
    config, before = tiny_config(BACKING_OFF, method="adalfl"), stage.StageRunner._back_off

    def signal_comes(self, *arguments):
        self._preemption.signal = signal.SIGTERM
        return before(self, *arguments)

    monkeypatch.setattr(stage.StageRunner, "_back_off", signal_comes)
    with (
        pytest.warns(UserWarning, match=r"halved \(1 of at most 10 times\)"),
        pytest.raises(PreemptionError, match="after step 10 of 20, AdaLFL, saved; the same command goes on"),
    ):
        train(config, tmp_path / "run")
    fragile[0] = 1.0
    monkeypatch.setattr(stage.StageRunner, "_back_off", before)
    assert train(config, tmp_path / "run")["methods"].keys() == {"adalfl"}


def test_eta_is_not_halved_where_phi_stays_as_it_is(fragile, tmp_path):
    fragile[0] = 0.0
    joint = {"outer.split": "valid", "outer.joint_share": 0.5}  # from step 10 on
    with pytest.raises(DivergenceError, match="outer_loss is not finite at training step 13"):
        train(tiny_config(BACKING_OFF | joint, method="adalfl"), tmp_path / "run")


def test_halving_eta_in_vain_ends_the_run(fragile, tmp_path, monkeypatch):
    fragile[0] = 0.0
    monkeypatch.setattr(stage, "MAX_BACK_OFFS", 1)
    with (
        pytest.warns(UserWarning, match=r"halved \(1 of at most 1 times\)"),
        pytest.raises(DivergenceError, match="Eta was halved 1 times, in vain"),
    ):
        train(tiny_config(BACKING_OFF, method="adalfl"), tmp_path / "run")


def test_where_no_eta_is_at_fault_the_run_stops(tmp_path):
    overrides = DIABETES | {"inner.learning_rate": 1e30, "on_nonfinite": "back_off"}
    with pytest.raises(DivergenceError):
        train(tiny_config(overrides, method="task_loss"), tmp_path / "run")
