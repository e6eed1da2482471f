"""Steps on eight devices, a part of each batch on each, beside steps on the whole batches."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import adalfl_jax
from adalfl_jax.axes import with_own_keys
from adalfl_jax.hypergradient import ESTIMATORS
from adalfl_jax.models import functionalize
from adalfl_jax.models.convolution import convolve
from tests.problems import BATCH_SIZE, MODELS, make_batch, make_problem

AXIS = "data"
NUM_STEPS = 3
OUTER = optax.adam(1e-2)
CASES = {
    **{name: {"hypergradient": name} for name in ESTIMATORS},
    "truncated": {"hypergradient": adalfl_jax.make_estimator("truncated", window=2)},
    # Undamped, indefinite Hessians make rounding grow.
    "conjugate_gradient": {"hypergradient": adalfl_jax.make_estimator("conjugate_gradient", damping=1.0)},
    "evolution_strategies": {
        "hypergradient": adalfl_jax.make_estimator("evolution_strategies", num_pairs=2, sigma=1.0)
    },
    "persistent_evolution_strategies": {
        "hypergradient": adalfl_jax.make_estimator("persistent_evolution_strategies", num_pairs=2, sigma=1.0, horizon=2)
    },
    "pipelined": {"pipelined": True},
    "pipelined finite_difference": {"pipelined": True, "hypergradient": "finite_difference"},
    "outer_every": {"outer_every": 2},
}


def make_mesh():
    return jax.make_mesh((BATCH_SIZE,), (AXIS,), axis_types=(AxisType.Auto,))


def make_batches(num_inner_steps=None):
    """A batch for each step, and where their examples are."""
    keys = jax.random.split(jax.random.key(5), NUM_STEPS)
    batches = jax.vmap(functools.partial(make_batch, num_inner_steps=num_inner_steps))(keys)
    batches = batches._replace(step=jnp.arange(NUM_STEPS))
    inner, outer = P(None, AXIS) if num_inner_steps is None else P(None, None, AXIS), P(None, AXIS)
    specs = adalfl_jax.BilevelBatch((inner, inner), (outer, outer), P(), P())  # pyright: ignore[reportArgumentType]
    return batches._replace(inner=tuple(batches.inner), outer=tuple(batches.outer)), specs


def make_run(model, options, axis_name=None):
    """Several steps, from fresh states to the metrics of each; what a step remembers stays inside."""
    model, optimizer, loss, theta, phi_params = make_problem(model, "momentum", loss=adalfl_jax.LossNetwork((4,)))
    if axis_name is not None:
        norm = functionalize(lambda rngs: MODELS["batch_norm"](rngs), axis_name=axis_name)
        model = norm if theta.model_state else model
    task_loss = adalfl_jax.task_losses.softmax_cross_entropy
    step = adalfl_jax.make_bilevel_step(
        model.apply, loss.apply, task_loss, optimizer, OUTER, axis_name=axis_name, **options
    )

    def run(theta, phi, batches):
        phi = adalfl_jax.prime(step, theta, phi, jax.tree.map(lambda leaf: leaf[0], batches))

        def body(carry, batch):
            theta, phi, metrics = step(*carry, batch)
            return (theta, phi), metrics

        (theta, phi), metrics = jax.lax.scan(body, (theta, phi), batches)
        return theta, phi._replace(carry=()), metrics

    return run, theta, adalfl_jax.Phi.create(phi_params, OUTER)


def assert_close(found, expected, relative):
    """Compares trees, each leaf to the scale of its largest number; a bias before batch norm has a gradient of 0."""
    chex.assert_trees_all_equal_structs(found, expected)
    for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, wanted, rtol=0, atol=relative * max(np.abs(wanted).max(), 1e-3))


def assert_equal_to_whole(case, divide, model="plain", axis_name=AXIS):
    """Compares a run of `divide(run, specs)` on parts of batches with the run on whole ones."""
    options = CASES[case]
    batches, specs = make_batches(2 if case in ("unrolled", "checkpointed", "mixed_mode", "neumann") else None)
    run, theta, phi = make_run(model, options)
    expected = jax.jit(run)(theta, phi, batches)
    run, *_ = make_run(model, options, axis_name)
    # A difference quotient turns rounding of 1e-16 into one of 1e-16 / h, with h about 1e-8 or 1e-5.
    relative = 1e-7 if "finite" in case else 1e-9 if "central" in case else 1e-12
    assert_close(divide(run, specs)(theta, phi, batches), expected, relative)


def by_shard_map(run, specs, **options):
    return jax.jit(jax.shard_map(run, mesh=make_mesh(), in_specs=(P(), P(), specs), out_specs=P(), **options))


def by_map(run, specs, transform=jax.pmap):
    def divided(theta, phi, batches):
        parts = jax.tree.map(_divide, specs, batches, is_leaf=lambda leaf: isinstance(leaf, P))
        axes = jax.tree.map(lambda spec: 0 if spec else None, specs, is_leaf=lambda leaf: isinstance(leaf, P))
        results = transform(run, axis_name=AXIS, in_axes=(None, None, axes))(theta, phi, parts)
        jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape)), results)
        return jax.tree.map(lambda leaf: leaf[0], results)

    return divided


def by_shardings(run, specs):
    def shardings(tree):
        return jax.tree.map(
            lambda spec: NamedSharding(make_mesh(), spec), tree, is_leaf=lambda leaf: isinstance(leaf, P)
        )

    return jax.jit(run, in_shardings=shardings((P(), P(), specs)), out_shardings=shardings(P()))


def _divide(spec, array):
    """The parts of an array along a new leading axis of devices."""
    return jnp.stack(jnp.split(array, BATCH_SIZE, axis=tuple(spec).index(AXIS))) if spec else array


def slow_but(*quick):
    """Every case, all but a few of them marked slow."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("case", slow_but("forward"))
def test_a_step_inside_shard_map_moves_as_on_the_whole_batch(case):
    model = "batch_norm" if case in ("forward", "mixed_mode") else "plain"
    assert_equal_to_whole(case, functools.partial(by_shard_map, check_vma=case != "conjugate_gradient"), model)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("case", slow_but("outer_every"))
def test_a_step_inside_pmap_moves_as_on_the_whole_batch(case):
    assert_equal_to_whole(case, by_map, "batch_norm")


def test_a_state_that_a_model_does_not_average_is_averaged_by_the_step():
    def apply_fn(params, model_state, inputs, *, train, rng_key):
        return inputs @ params, {"mean": inputs.mean(axis=0)}

    optimizer = optax.sgd(0.1)
    batch = make_batch(jax.random.key(0)).inner
    theta = adalfl_jax.Theta.create(jnp.ones((5, 3)), {"mean": jnp.zeros(5)}, optimizer)
    step = adalfl_jax.make_task_step(apply_fn, adalfl_jax.task_losses.softmax_cross_entropy, optimizer, axis_name=AXIS)
    parts = jax.tree.map(lambda array: array.reshape(4, -1, *array.shape[1:]), batch)
    moved, _ = jax.vmap(step, in_axes=(None, 0), axis_name=AXIS)(theta, parts)
    found = moved.model_state["mean"]
    np.testing.assert_allclose(found, np.broadcast_to(batch.inputs.mean(axis=0), found.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("case", CASES)
def test_a_step_inside_vmap_moves_as_on_the_whole_batch(case):
    def transform(run, **options):
        return jax.jit(jax.vmap(run, **options))

    assert_equal_to_whole(case, functools.partial(by_map, transform=transform), "batch_norm")


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("case", CASES)
def test_a_step_under_jit_with_shardings_moves_as_on_one_device(case):
    assert_equal_to_whole(case, by_shardings, "batch_norm", axis_name=None)


@pytest.mark.slow
def test_conjugate_gradients_refuse_a_shard_map_that_tracks_axes():
    batches, specs = make_batches()
    run, theta, phi = make_run("plain", CASES["conjugate_gradient"], AXIS)
    with pytest.raises(ValueError, match=r"conjugate_gradient.* check_vma=False"):
        by_shard_map(run, specs)(theta, phi, batches)


def test_a_loss_with_bounds_of_the_whole_batch_is_refused():
    model, inner, loss, *_ = make_problem("plain", "sgd")
    rescaled = adalfl_jax.RescaledLoss(loss, floor=1.0)
    unbounded = adalfl_jax.RescaledLoss(loss)
    frozen = adalfl_jax.FrozenLoss(rescaled, {})
    given = functools.partial(rescaled.apply, progress=0.5)
    task_loss = adalfl_jax.task_losses.softmax_cross_entropy
    for loss_fn in (rescaled.apply, given):
        with pytest.raises(ValueError, match=r"learned_loss_fn is a RescaledLoss, .* with axis_name='parts' each"):
            adalfl_jax.make_bilevel_step(model.apply, loss_fn, task_loss, inner, inner, axis_name="parts")
        adalfl_jax.make_bilevel_step(model.apply, loss_fn, task_loss, inner, inner)
    adalfl_jax.make_bilevel_step(
        model.apply, unbounded.apply, adalfl_jax.task_losses.softmax_cross_entropy, inner, inner, axis_name="parts"
    )
    with pytest.raises(ValueError, match=r"loss_fn is a RescaledLoss, .* divide the batch by shardings under jax\.jit"):
        adalfl_jax.make_task_step(model.apply, frozen, inner, axis_name="parts")


@pytest.mark.usefixtures("float64")
def test_a_task_step_inside_shard_map_or_vmap_moves_as_on_the_whole_batch():
    _, optimizer, _, theta, _ = make_problem("batch_norm", "clip")
    batch = jax.tree.map(lambda leaf: leaf[0], make_batches()[0].inner)

    def make_step(axis_name=None):
        model = functionalize(lambda rngs: MODELS["batch_norm"](rngs), axis_name=axis_name)
        task_loss = adalfl_jax.task_losses.softmax_cross_entropy
        return adalfl_jax.make_task_step(model.apply, task_loss, optimizer, axis_name=axis_name)

    expected = jax.jit(make_step())(theta, batch)
    divided = jax.shard_map(make_step(AXIS), mesh=make_mesh(), in_specs=(P(), P(AXIS)), out_specs=P())
    assert_close(jax.jit(divided)(theta, batch), expected, 1e-12)
    mapped = jax.vmap(make_step(AXIS), in_axes=(None, 0), out_axes=None, axis_name=AXIS)
    parts = jax.tree.map(lambda leaf: leaf[:, None], batch)
    assert_close(jax.jit(mapped)(theta, parts), expected, 1e-12)


def test_random_numbers_differ_from_device_to_device_though_the_key_does_not():
    def apply_fn(params, model_state, inputs, *, train, rng_key):
        return jax.random.normal(rng_key, (1,)), model_state

    def draw(rng_key):
        return with_own_keys(AXIS, apply_fn)((), (), jnp.zeros(1), train=True, rng_key=rng_key)[0]

    drawn = jax.shard_map(draw, mesh=make_mesh(), in_specs=P(), out_specs=P(AXIS))(jax.random.key(0))
    assert len(set(np.asarray(drawn).tolist())) == BATCH_SIZE


def test_a_convolution_inside_shard_map_has_the_gradients_of_the_whole_batch():
    inputs, cotangents = (jax.random.normal(jax.random.key(seed), (BATCH_SIZE, 5, 5, 2)) for seed in (1, 2))
    kernel = jax.random.normal(jax.random.key(3), (3, 3, 2, 2))

    def gradients(inputs, cotangents, kernel):
        outputs, pullback = jax.vjp(lambda *args: convolve(*args, (1, 1), "SAME"), inputs, kernel)
        return outputs, pullback(cotangents)

    specs = (P(AXIS), P(AXIS), P())
    divided = jax.shard_map(gradients, mesh=make_mesh(), in_specs=specs, out_specs=(P(AXIS), (P(AXIS), P())))
    arguments = (inputs, cotangents, kernel)
    assert_close(jax.jit(divided)(*arguments), jax.jit(gradients)(*arguments), 1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_several_models_share_a_phi_that_takes_the_mean_of_their_gradients():
    """By an outer optimiser and `jax.vmap` alone, in training and in the offline phase."""
    model, inner, loss, _, phi_params = make_problem("batch_norm", "momentum", loss=adalfl_jax.LossNetwork((4,)))

    def make_step(outer):
        step = adalfl_jax.make_bilevel_step(
            model.apply, loss.apply, adalfl_jax.task_losses.softmax_cross_entropy, inner, outer
        )
        return step, adalfl_jax.make_offline_step(step, model.init, inner), adalfl_jax.Phi.create(phi_params, outer)

    keys = jax.random.split(jax.random.key(0), 3)
    thetas = jax.vmap(lambda key: adalfl_jax.Theta.create(*model.init(key), inner))(keys)
    batches = jax.vmap(make_batch)(keys)
    step, offline_step, phi = make_step(optax.sgd(1.0))
    shared_outer = optax.chain(optax.stateless(lambda gradient, _: jax.lax.pmean(gradient, "models")), OUTER)
    shared_step, shared_offline_step, shared_phi = make_step(shared_outer)

    def expected(all_phi):
        gradient = jax.tree.map(lambda old, new: old - new.mean(axis=0), phi_params, all_phi.params)
        updates, _ = OUTER.update(gradient, OUTER.init(phi_params), phi_params)
        return optax.apply_updates(phi_params, updates)

    theta, all_phi, _ = jax.jit(jax.vmap(step, in_axes=(0, None, 0)))(thetas, phi, batches)
    shared_step = jax.vmap(shared_step, in_axes=(0, None, 0), out_axes=(0, None, 0), axis_name="models")
    together, phi_of_all, metrics = jax.jit(shared_step)(thetas, shared_phi, batches)
    assert metrics.outer_loss.shape == (3,)
    assert_close(together, theta, 1e-12)
    assert_close(phi_of_all.params, expected(all_phi), 1e-9)

    all_phi, _ = jax.jit(jax.vmap(offline_step, in_axes=(None, 0)))(phi, batches)
    shared_offline_step = jax.vmap(shared_offline_step, in_axes=(None, 0), out_axes=(None, 0), axis_name="models")
    phi_of_all, _ = adalfl_jax.initialize_offline(
        shared_offline_step, shared_phi, jax.tree.map(lambda leaf: leaf[None], batches)
    )
    assert_close(phi_of_all.params, expected(all_phi), 1e-5)  # models are drawn in single precision
