"""What the makers of steps and their steps refuse, and what their errors say."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adalfl_jax
from adalfl_jax.hypergradient import ESTIMATORS, Truncated
from adalfl_jax.models import make_model
from adalfl_jax.task_losses import example_cross_entropy, softmax_cross_entropy

LOSS, INNER, OUTER = adalfl_jax.LossNetwork(hidden_sizes=(4,)), optax.sgd(0.1), optax.adam(1e-2)
INPUTS, TARGETS = jnp.ones((8, 5)), jnp.arange(8) % 3
BATCH = adalfl_jax.BilevelBatch((INPUTS, TARGETS), (INPUTS, TARGETS))


def apply_fn(params, model_state, inputs, *, train, rng_key):
    return inputs @ params, model_state


def make_step(**changes):
    functions = {
        "apply_fn": apply_fn,
        "learned_loss_fn": LOSS.apply,
        "task_loss_fn": softmax_cross_entropy,
        "inner_optimizer": INNER,
        "outer_optimizer": OUTER,
    }
    return adalfl_jax.make_bilevel_step(**functions | changes)


def make_state(loss=LOSS, inner=INNER, outer=OUTER):
    theta = adalfl_jax.Theta.create(jnp.ones((5, 3)), (), inner)
    return theta, adalfl_jax.Phi.create(loss.init(jax.random.key(0)), outer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learned_loss_fn": LOSS}, r"learned_loss_fn must be a function; got LossNetwork.*give its function `apply`"),
        ({"task_loss_fn": "softmax_cross_entropy"}, r"task_loss_fn must be a function; got 'softmax_cross_entropy'"),
        ({"apply_fn": None}, r"apply_fn must be a function; got None"),
        ({"inner_optimizer": None}, r"inner_optimizer must be an optax transformation.*got None"),
        ({"outer_optimizer": 0.1}, r"outer_optimizer must be an optax transformation.*got 0.1"),
        ({"outer_every": True}, r"outer_every must be a whole number of at least 1; got True"),
        ({"outer_every": "2"}, r"outer_every must be a whole number of at least 1; got '2'"),
        ({"pipelined": "no"}, r"pipelined must be True or False; got 'no'"),
        ({"meta_batch_fraction": True}, r"meta_batch_fraction must be a number in \(0, 1\].*got True"),
        ({"apply_fn": list(range(1000))}, r"apply_fn must be a function; got \[0, 1, 2, 3, 4, 5, \.\.\.\]$"),
    ],
)
def test_what_no_step_can_be_made_of_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_step(**changes)


def test_a_loss_that_is_frozen_or_a_name_is_told_what_to_give():
    frozen = adalfl_jax.FrozenLoss(LOSS, LOSS.init(jax.random.key(0)))
    with pytest.raises(ValueError, match=r"a FrozenLoss, whose phi stays.*give its `loss.apply`.*Phi.create\(frozen"):
        make_step(learned_loss_fn=frozen)
    with pytest.raises(ValueError, match=r"task_loss_fn must be a function; .*; adalfl_jax\.task_losses has some"):
        make_step(task_loss_fn="softmax_cross_entropy")
    with pytest.raises(ValueError, match=r"params must be parameters; give those of the FrozenLoss, its `params`"):
        adalfl_jax.Phi.create(frozen, OUTER)
    with pytest.raises(ValueError, match=r"can be saved; got FrozenLoss; give its `loss` and its `params`"):
        adalfl_jax.save_learned_loss("loss.safetensors", frozen, frozen.params)


def test_what_has_parameters_made_is_no_parameters():
    with pytest.raises(ValueError, match=r"params must be parameters, as loss\.init\(rng_key\) makes; got LossNetwork"):
        adalfl_jax.Phi.create(LOSS, OUTER)
    model = make_model("logistic", (5,), 3)
    with pytest.raises(ValueError, match=r"params must be parameters, as model\.init\(rng_key\)\[0\] makes; got"):
        adalfl_jax.Theta.create(model, (), INNER)


def test_the_other_makers_of_steps_want_functions_too():
    with pytest.raises(ValueError, match=r"loss_fn must be a function; got 'softmax_cross_entropy'"):
        adalfl_jax.make_task_step(apply_fn, "softmax_cross_entropy", INNER)
    with pytest.raises(ValueError, match=r"inner_optimizer must be an optax transformation"):
        adalfl_jax.make_reweighting_step(apply_fn, softmax_cross_entropy, softmax_cross_entropy, None)
    with pytest.raises(ValueError, match=r"init_fn must be a function; got LossNetwork.*give its function `init`"):
        adalfl_jax.make_offline_step(make_step(), LOSS, INNER)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"apply_fn": lambda params, inputs: None},
            r"called as apply_fn\(params, model_state, inputs, train=train, rng_key=rng_key\), and takes \(params, in",
        ),
        (
            {"learned_loss_fn": lambda phi, targets, outputs, params: 0.0, "hypergradient": "unrolled"},
            r"called as learned_loss_fn\(phi_params, targets, outputs\), .*'params'; declare params behind a `\*`",
        ),
        ({"learned_loss_fn": softmax_cross_entropy}, r"learned_loss_fn is called .* too many positional arguments$"),
        ({"learned_loss_fn": lambda params, targets: 0.0}, r"learned_loss_fn is called .* positional arguments$"),
        ({"task_loss_fn": LOSS.apply}, r"task_loss_fn is called as task_loss_fn\(targets, outputs\), .*'outputs'$"),
        (
            {"task_loss_fn": lambda targets, outputs, *, progress: 0.0},
            r"task_loss_fn is called .*argument: 'progress'$",
        ),
    ],
)
def test_a_function_of_other_arguments_is_told_how_it_is_called(changes, message):
    with pytest.raises(ValueError, match=message):
        make_step(**changes)


def test_the_other_makers_say_it_too():
    with pytest.raises(ValueError, match=r"loss_fn is called as loss_fn\(targets, outputs, progress=progress\), and"):
        adalfl_jax.make_task_step(apply_fn, LOSS.apply, INNER)
    with pytest.raises(ValueError, match=r"example_loss_fn is called as example_loss_fn\(targets, outputs\), and"):
        adalfl_jax.make_reweighting_step(apply_fn, LOSS.apply, softmax_cross_entropy, INNER)


def test_a_loss_with_the_arguments_of_optax_the_other_way_round_is_refused():
    def of_optax(logits, labels):
        return optax.softmax_cross_entropy(logits, labels).mean()

    match = r"_loss_fn is called .* named the other way round, logits before labels, as optax's losses .*: swap them"
    with pytest.raises(ValueError, match=f"task{match}"):
        make_step(task_loss_fn=of_optax)
    with pytest.raises(ValueError, match=f"task{match}"):
        adalfl_jax.make_reweighting_step(apply_fn, softmax_cross_entropy, of_optax, INNER)
    with pytest.raises(ValueError, match=match.removeprefix("_")):
        adalfl_jax.make_task_step(apply_fn, of_optax, INNER)
    match = r"called as learned_loss_fn\(phi_params, targets, outputs\), .* y_pred before y_true"
    with pytest.raises(ValueError, match=match):
        make_step(learned_loss_fn=lambda phi_params, y_pred, y_true: jnp.mean(y_pred * y_true))


def test_what_does_not_tell_its_arguments_is_called():
    class Untold:
        __signature__ = "none"

        def __call__(self, targets, outputs):
            return softmax_cross_entropy(targets, outputs)

    theta, phi = make_state()
    assert jnp.isfinite(make_step(task_loss_fn=Untold())(theta, phi, BATCH)[2].outer_loss)


def test_a_function_around_a_loss_may_give_the_progress_itself():
    def reads(phi_params, targets, outputs, *, progress):
        return progress * LOSS.apply(phi_params, targets, outputs)

    @functools.wraps(reads)
    def of_any(*arguments, **keywords):
        return reads(*arguments, **({"progress": 0.5} | keywords))

    @functools.wraps(reads)
    def of_three(phi_params, targets, outputs):
        return reads(phi_params, targets, outputs, progress=0.5)

    theta, phi = make_state()
    half = make_step(learned_loss_fn=of_three)(theta, phi, BATCH)[2].inner_loss
    for loss, progress, expected in ((of_three, 1.0, half), (of_any, None, half), (of_any, 1.0, 2 * half)):
        metrics = make_step(learned_loss_fn=loss)(theta, phi, BATCH._replace(progress=progress))[2]
        np.testing.assert_allclose(metrics.inner_loss, expected, rtol=1e-6)


@pytest.mark.parametrize("hypergradient", ["forward", "unrolled"])
def test_outputs_without_gradients_are_refused(hypergradient):
    def with_classes(params, model_state, inputs, *, train, rng_key):
        outputs = inputs @ params
        return {"outputs": outputs, "classes": outputs.argmax(axis=1)}, model_state

    step = make_step(apply_fn=with_classes, hypergradient=hypergradient)
    with pytest.raises(ValueError, match=r"must be floats, .* Got \{'classes': .*int32\[8\]"):
        step(*make_state(), BATCH)


def test_a_loss_that_reads_progress_is_given_it():
    def loss(*arguments, progress):
        return (1 + progress) * softmax_cross_entropy(*arguments[-2:])

    theta, phi = make_state()
    for step in (make_step(learned_loss_fn=loss), make_step(learned_loss_fn=loss, pipelined=True)):
        with pytest.raises(ValueError, match=r"the loss reads `progress`, .*BilevelBatch.progress.* got None"):
            step(theta, phi, BATCH)
        step(theta, phi, BATCH._replace(progress=0.5))
    with pytest.raises(ValueError, match=r"the loss reads `progress`"):
        adalfl_jax.make_task_step(apply_fn, loss, INNER)(theta, BATCH.inner)


@pytest.mark.parametrize("progress", [50, -0.1, float("nan")])
def test_a_progress_that_is_no_share_is_refused_outside_of_a_trace(progress):
    loss = adalfl_jax.LossNetwork(use_progress=True)
    step = make_step(learned_loss_fn=loss.apply)
    theta, phi = make_state(loss)
    with pytest.raises(ValueError, match=r"progress must be the share of training .*, t / T in \[0, 1\]; got"):
        step(theta, phi, BATCH._replace(progress=progress))


def test_a_progress_that_is_no_share_is_refused_where_a_loss_is_called():
    loss = adalfl_jax.LossNetwork(use_progress=True)
    with pytest.raises(ValueError, match=r"t / T in \[0, 1\]; got 100"):
        adalfl_jax.FrozenLoss(loss, loss.init(jax.random.key(0)))(TARGETS, jnp.zeros((len(TARGETS), 3)), progress=100)


def test_lists_in_a_batch_are_named_without_their_thousands_of_numbers():
    theta, phi = make_state()
    with pytest.raises(ValueError, match=r"must be shaped like batch\.outer inputs") as caught:
        jax.jit(make_step())(theta, phi, BATCH._replace(inner=([[0.0] * 5] * 2000, [0] * 2000)))
    assert len(str(caught.value)) < 2000


def test_outputs_of_numpy_in_64_bits_are_taken_without_a_warning(recwarn):
    loss = adalfl_jax.FrozenLoss(LOSS, LOSS.init(jax.random.key(0)))
    assert loss(np.array([0, 1]), np.zeros((2, 3))).dtype == jnp.float32
    assert loss(np.eye(3)[:2], np.zeros((2, 3))).dtype == jnp.float32
    assert not recwarn.list


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draw_batch": lambda: BATCH}, r"draw_batch is called as draw_batch\(source\), and takes \(\)"),
        ({"init_fn": lambda: None}, r"init_fn is called as init_fn\(rng_key\), and takes \(\)"),
    ],
)
def test_functions_of_the_offline_phase_are_told_how_they_are_called(changes, message):
    given = {"init_fn": lambda rng_key: (jnp.ones((5, 3)), ()), **changes}
    with pytest.raises(ValueError, match=message):
        adalfl_jax.make_offline_step(make_step(), inner_optimizer=INNER, **given)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Truncated(window=True), r"window must be a whole number of at least 1; got True"),
        (lambda: Truncated(window="3"), r"window must be .* got '3'"),
        (
            lambda: adalfl_jax.make_estimator("evolution_strategies", sigma="a"),
            r"sigma must be a number above 0; got 'a'",
        ),
        (lambda: adalfl_jax.WeightNetwork(hidden_size="3"), r"hidden_size must be a whole number.*got '3'"),
        (lambda: adalfl_jax.LossNetwork(hidden_sizes=5), r"hidden_sizes must be whole numbers of at least 1; got 5"),
        (lambda: adalfl_jax.LossNetwork(hidden_sizes=(4, "5")), r"hidden_sizes must be .* got \(4, '5'\)"),
        (lambda: adalfl_jax.LossNetwork(hidden_sizes=map(int, "44")), r"hidden_sizes must be .* got <map object"),
        (lambda: adalfl_jax.LossNetwork(use_bias="no"), r"use_bias must be True or False; got 'no'"),
        (lambda: adalfl_jax.LossNetwork(gamma="0"), r"gamma must be a number in \[0, 1\); got '0'"),
        (lambda: adalfl_jax.Theta.create(INNER, (), {"w": INPUTS}), r"inner_optimizer must be an optax.*got {'w': A"),
        (lambda: adalfl_jax.Phi.create(OUTER, {"w": INPUTS}), r"outer_optimizer must be an optax.*got {'w': A"),
    ],
)
def test_settings_say_what_they_must_be_and_what_came(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.slow
def test_numbers_of_numpy_are_numbers():
    options = {"meta_batch_fraction": np.float32(0.25), "outer_every": np.int64(2)}
    step = make_step(**options)
    *_, metrics = step(*make_state(), BATCH._replace(step=np.int64(1)))
    *_, expected = make_step(meta_batch_fraction=0.25)(*make_state(), BATCH)
    np.testing.assert_allclose(metrics, expected, rtol=1e-6)
    assert adalfl_jax.LossNetwork(hidden_sizes=(np.int64(4),)) == LOSS
    assert adalfl_jax.WeightNetwork(np.int64(3)) == adalfl_jax.WeightNetwork(3)
    make_step(hypergradient=Truncated(np.int64(3)))(*make_state(), BATCH)


KEYS = jax.random.split(jax.random.key(0), 8)
STACKED = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), BATCH.inner)


@pytest.mark.parametrize(
    ("options", "batch", "message"),
    [
        ({}, (BATCH.inner, BATCH.outer), r"batch must be an adalfl_jax.BilevelBatch; got a tuple"),
        ({}, BATCH._replace(inner=(INPUTS.tolist(), TARGETS)), r"batch.inner must be two .*got a tuple of list, Arr"),
        ({}, BATCH._replace(outer=(INPUTS,)), r"batch.outer must be two arrays.*got a tuple of ArrayImpl$"),
        ({}, BATCH._replace(outer=None), r"batch.outer must be two arrays.*got a NoneType$"),
        ({"pipelined": True}, BATCH._replace(inner=None), r"batch.inner must be two arrays.*got a NoneType$"),
        ({}, BATCH._replace(rng_key=0), r"batch.rng_key must be one key, as jax.random.key\(0\) makes; got 0$"),
        ({}, BATCH._replace(rng_key=KEYS), r"batch.rng_key must be one key.*got key<fry>\[8\]$"),
        ({}, BATCH._replace(rng_key=jax.random.key_data(KEYS)), r"batch.rng_key must be one key.*got uint32\[8,2\]$"),
        (
            {"outer_every": 2},
            BATCH._replace(step=jnp.arange(8)),
            r"batch.step must be one whole number.*got int32\[8\]",
        ),
        ({"outer_every": 2}, BATCH._replace(step=1.5), r"batch.step must be one whole number.*got ~?float32"),
        ({"pipelined": True}, BATCH._replace(inner=STACKED), r"targets must be .* outputs \[B, C\] = \(3, 8, 3\)"),
    ],
)
def test_a_batch_that_no_step_can_take_is_refused(options, batch, message):
    with pytest.raises(ValueError, match=message):
        make_step(**options)(*make_state(), batch)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (make_state(inner=optax.adam(0.1)), r"theta.opt_state is not that of the step's inner_optimizer.*Theta.create"),
        (
            make_state(inner=optax.sgd(0.1, momentum=0.9)),
            r"Expected \(EmptyState, EmptyState\); got \(TraceState, EmptyState\)$",
        ),
        (make_state(outer=INNER), r"phi.opt_state is not that of the step's outer_optimizer.*Phi.create"),
        (make_state(adalfl_jax.LossNetwork((4, 4))), r"phi is not of LossNetwork\(hidden_sizes=\(4,\).*got {'layer_0'"),
        (make_state(adalfl_jax.LossNetwork((6,))), r"phi is not of LossNetwork.*\(2, 4\).*got.*\(2, 6\)"),
        (make_state()[::-1], r"theta must be an adalfl_jax.Theta; got a Phi"),
    ],
)
def test_a_state_of_another_step_is_refused(state, message):
    with pytest.raises(ValueError, match=message):
        make_step()(*state, BATCH)


@pytest.mark.parametrize("dtype", ["int32", "bool", "key<fry>"])
def test_parameters_without_gradients_are_named(dtype):
    leaf = KEYS[0] if dtype == "key<fry>" else jnp.ones((), dtype)
    theta, phi = make_state()
    theta = theta._replace(params={"w": theta.params, "n": leaf})
    for step, state in (
        (make_step(), (theta, phi, BATCH)),
        (make_step(hypergradient="unrolled"), (theta, phi, BATCH)),
        (adalfl_jax.make_task_step(apply_fn, softmax_cross_entropy, INNER), (theta, BATCH.inner)),
    ):
        with pytest.raises(ValueError, match=rf"theta.params\['n'\] is {dtype}, which has no gradient"):
            step(*state)
    phi_params = {"w": jnp.ones(()), "n": leaf}
    with pytest.raises(ValueError, match=rf"phi.params\['n'\] is {dtype}, which has no gradient; make it floats$"):
        make_step()(make_state()[0], adalfl_jax.Phi.create(phi_params, OUTER), BATCH)


def test_names_in_place_of_parameters_are_named():
    """As `Theta.create(*variables, ...)` makes of a dictionary of Flax."""
    theta = adalfl_jax.Theta.create(*{"params": jnp.ones((5, 3)), "batch_stats": {}}, INNER)
    with pytest.raises(ValueError, match=r"theta.params is str, which has no gradient"):
        make_step()(theta, make_state()[1], BATCH)


@pytest.mark.parametrize(
    ("theta", "batch", "message"),
    [
        (jnp.ones((5, 3)), BATCH.inner, r"theta must be an adalfl_jax.Theta; got a ArrayImpl"),
        (
            make_state(inner=optax.adam(0.1))[0],
            BATCH.inner,
            r"theta.opt_state is not that of the step's optimizer.*Theta.create\(..., optimizer\)",
        ),
        (make_state()[0], INPUTS, r"^batch must be two arrays.*got a ArrayImpl$"),
        (make_state()[0], {"image": INPUTS, "label": TARGETS}, r"^batch must be two arrays.*got a dict$"),
        (make_state()[0], BATCH, r"^batch must be two arrays.*got a BilevelBatch of tuple, tuple, NoneType"),
    ],
)
def test_a_step_on_a_fixed_loss_refuses_alike(theta, batch, message):
    with pytest.raises(ValueError, match=message):
        adalfl_jax.make_task_step(apply_fn, softmax_cross_entropy, INNER)(theta, batch)


def test_float16_is_refused():
    theta, phi = make_state()
    half = [jax.tree.map(lambda leaf: leaf.astype(jnp.float16), tree.params) for tree in (theta, phi)]
    with pytest.raises(ValueError, match=r"theta.params is float16, which has too little range"):
        make_step()(theta._replace(params=half[0]), phi, BATCH)
    with pytest.raises(ValueError, match=r"phi.params\['layer_0'\]\['kernel'\] is float16, which has too little"):
        make_step()(theta, phi._replace(params=half[1]), BATCH)


def test_what_is_long_is_shortened_in_an_error():
    theta, phi = make_state()
    with pytest.raises(ValueError, match=r"theta.opt_state is not that of .* \.\.\. ") as caught:
        make_step()(theta._replace(opt_state=tuple(range(1000))), phi, BATCH)
    assert len(str(caught.value)) < 1500


def test_a_state_of_the_same_optimizer_for_other_shapes_is_refused():
    momentum = optax.sgd(0.1, momentum=0.9)
    theta, phi = make_state(inner=momentum)
    given = theta._replace(opt_state=momentum.init(jnp.ones((1, 3))))  # which would broadcast
    with pytest.raises(ValueError, match=r"theta.opt_state is not that .* Expected \[\(5, 3\)\]; got \[\(1, 3\)\]"):
        make_step(inner_optimizer=momentum)(given, phi, BATCH)
    other = make_state(loss=adalfl_jax.LossNetwork(hidden_sizes=(5,)), inner=momentum)[1]
    with pytest.raises(ValueError, match=r"phi.opt_state is not that of the step's outer_optimizer"):
        make_step(inner_optimizer=momentum)(theta, phi._replace(opt_state=other.opt_state), BATCH)


def test_a_step_on_a_fixed_loss_refuses_batches_of_no_or_unequal_lengths_and_no_key():
    step = adalfl_jax.make_task_step(apply_fn, softmax_cross_entropy, INNER)
    with pytest.raises(ValueError, match=r"batch: inputs and targets .* \[B\], not empty; got inputs \(0, 5\)"):
        step(make_state()[0], (INPUTS[:0], TARGETS[:0]))
    any_loss = adalfl_jax.make_task_step(apply_fn, lambda targets, outputs: (outputs**2).mean(), INNER)
    with pytest.raises(ValueError, match=r"share .* \[B\], not empty; got inputs \(8, 5\) and targets \(7,\)"):
        any_loss(make_state()[0], (INPUTS, TARGETS[:7]))
    with pytest.raises(ValueError, match=r"rng_key must be one key"):
        step(make_state()[0], (INPUTS, TARGETS), 0)


def test_a_step_that_weighs_examples_refuses_alike():
    step = adalfl_jax.make_reweighting_step(apply_fn, example_cross_entropy, softmax_cross_entropy, INNER)
    with pytest.raises(ValueError, match=r"theta.opt_state is not that of the step's inner_optimizer"):
        step(make_state(inner=OUTER)[0], BATCH)
    with pytest.raises(ValueError, match=r"batch.outer must be two arrays"):
        step(make_state()[0], BATCH._replace(outer=None))


def test_inputs_of_a_step_on_a_fixed_loss_may_be_a_pytree():
    def apply(params, model_state, inputs, *, train, rng_key):
        return apply_fn(params, model_state, inputs["x"], train=train, rng_key=rng_key)

    step, (theta, _) = adalfl_jax.make_task_step(apply, softmax_cross_entropy, INNER), make_state()
    jax.eval_shape(step, theta, ({"x": INPUTS}, TARGETS))


def test_phi_of_a_loss_network_is_none_of_a_weight_network():
    with pytest.raises(ValueError, match=r"phi is not of WeightNetwork\(hidden_size=100\)"):
        adalfl_jax.WeightNetwork().apply(LOSS.init(jax.random.key(0)), TARGETS, jnp.ones((8, 3)))
    with pytest.raises(ValueError, match=r"phi is not of ScaledTaskLoss"):
        adalfl_jax.ScaledTaskLoss().apply(LOSS.init(jax.random.key(0)), TARGETS, jnp.ones((8, 3)))


def test_a_model_that_returns_outputs_alone_is_told_of_its_state():
    def outputs_alone(params, model_state, inputs, *, train, rng_key):
        return inputs @ params

    theta, phi = make_state()
    with pytest.raises(
        ValueError, match=r"must return two things, \(outputs \[B, C\], model_state\).*Got float32\[8,3\]"
    ):
        make_step(apply_fn=outputs_alone)(theta, phi, BATCH)
    with pytest.raises(ValueError, match=r"must return two things"):
        adalfl_jax.make_task_step(outputs_alone, softmax_cross_entropy, INNER)(theta, BATCH.inner)


@pytest.mark.parametrize("outputs", [{"logits": "none"}, None, ()])
def test_a_model_that_returns_no_array_is_named(outputs):
    def without_array(params, model_state, inputs, *, train, rng_key):
        return outputs, model_state

    with pytest.raises(ValueError, match=rf"its outputs as an array.*or as a pytree; got {re.escape(repr(outputs))}"):
        make_step(apply_fn=without_array)(*make_state(), BATCH)


def test_priming_refuses_what_the_step_does():
    theta, phi = make_state()
    with pytest.raises(ValueError, match=r"^theta must be an adalfl_jax\.Theta; got a Phi"):
        adalfl_jax.prime(make_step(), phi, theta, BATCH)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^phi must be an adalfl_jax\.Phi; got a dict"):
        adalfl_jax.prime(make_step(), theta, phi.params, BATCH)  # pyright: ignore[reportArgumentType]


def cross_entropy_and_nothing(phi_params, targets, outputs):
    return softmax_cross_entropy(targets, outputs), None


@pytest.mark.parametrize("options", [{}, {"pipelined": True}, {"hypergradient": "evolution_strategies"}])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"task_loss_fn": example_cross_entropy},
            r"^task_loss_fn must return one float, the mean over the batch say; got float32\[8\]",
        ),
        ({"learned_loss_fn": cross_entropy_and_nothing}, r"^learned_loss_fn must return.*float32\[\].*, None\)"),
    ],
)
def test_a_loss_that_does_not_return_one_number_is_named(options, changes, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(make_step(**changes, **options), *make_state(), BATCH._replace(rng_key=jax.random.key(0)))


def test_so_are_those_of_the_other_steps():
    theta, _ = make_state()
    task_step = adalfl_jax.make_task_step(apply_fn, example_cross_entropy, INNER)
    with pytest.raises(ValueError, match=r"^loss_fn must return one float"):
        task_step(theta, BATCH.inner)
    reweighting_step = adalfl_jax.make_reweighting_step(apply_fn, example_cross_entropy, example_cross_entropy, INNER)
    with pytest.raises(ValueError, match=r"^task_loss_fn must return one float"):
        jax.eval_shape(reweighting_step, theta, BATCH)


@pytest.mark.parametrize("options", [{"pipelined": True}, {"hypergradient": "truncated"}])
def test_a_scan_of_a_step_that_was_not_primed_says_so(options):
    step = make_step(**options)

    def body(state, batch):
        *state, metrics = step(*state, batch)
        return tuple(state), metrics

    with pytest.raises(TypeError, match="Primed"):
        jax.lax.scan(body, make_state(), jax.tree.map(lambda leaf: leaf[None], BATCH))


def test_an_estimator_may_be_a_dataclass_that_has_no_hash():
    @dataclasses.dataclass
    class Doubled:
        factor: float = 2.0

        def __call__(self, problem, theta, phi_params, batch, carry=(), /):
            result = ESTIMATORS["forward"](problem, theta, phi_params, batch, carry)
            return result._replace(gradient=optax.tree.scale(self.factor, result.gradient))

    *_, doubled = make_step(hypergradient=Doubled())(*make_state(), BATCH)
    *_, plain = make_step()(*make_state(), BATCH)
    np.testing.assert_allclose(doubled.hypergradient_norm, 2 * plain.hypergradient_norm, rtol=1e-6)


@pytest.mark.parametrize("name", ["learned_loss_fn", "task_loss_fn"])
def test_what_a_loss_raises_has_a_note_of_what_it_was_given(name):
    def in_the_order_of_optax(*arguments):
        *_, outputs, targets = arguments
        return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()

    with pytest.raises(TypeError) as raised:
        make_step(**{name: in_the_order_of_optax})(*make_state(), BATCH)
    assert raised.value.__notes__[0] == f"{name} was given targets and then outputs: int32[8] and float32[8, 3]."
