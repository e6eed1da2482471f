"""The steps: what they update, and that scan, jit, vmap and the plain loop agree."""

import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import adalfl_jax
from adalfl_jax.norms import norm
from adalfl_jax.task_losses import softmax_cross_entropy
from tests.problems import make_batch, make_model, make_problem

SMALL = adalfl_jax.LossNetwork((4,))
GOLDEN = pathlib.Path(__file__).parent / "golden" / "bilevel.json"


def make_step(model="plain", optimizer="sgd", loss=None, **options):
    model, inner, loss, theta, phi_params = make_problem(model, optimizer, loss=loss)
    outer = optax.adam(1e-2)
    step = adalfl_jax.make_bilevel_step(model.apply, loss.apply, softmax_cross_entropy, inner, outer, **options)
    return step, theta, adalfl_jax.Phi.create(phi_params, outer)


def stacked_batches(num_steps):
    return jax.vmap(make_batch)(jax.random.split(jax.random.key(2), num_steps))


def loop(step, theta, phi, batches):
    metrics = []
    for index in range(len(batches.rng_key)):
        theta, phi, measured = step(theta, phi, jax.tree.map(lambda leaf, i=index: leaf[i], batches))
        metrics.append(measured)
    return theta, phi, jax.tree.map(lambda *leaves: jnp.stack(leaves), *metrics)


def scan(step, theta, phi, batches):
    def body(carry, batch):
        theta, phi, metrics = step(*carry, batch)
        return (theta, phi), metrics

    (theta, phi), metrics = jax.lax.scan(body, (theta, phi), batches)
    return theta, phi, metrics


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "model", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("plain", "batch_norm", "dropout")), "linear"]
)
def test_scan_and_jit_equal_the_eager_loop(model):
    step, theta, phi = make_step(model, "nesterov", SMALL)
    batches = stacked_batches(3)
    eager = loop(step, theta, phi, batches)
    chex.assert_trees_all_close(eager, loop(jax.jit(step), theta, phi, batches), rtol=1e-9, atol=1e-12)
    chex.assert_trees_all_close(eager, scan(step, theta, phi, batches), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"pipelined": True}, {"outer_every": 2}])
def test_an_outer_optimizer_is_given_the_value_of_the_loss(options):
    model, inner, loss, theta, phi_params = make_problem()
    outer = optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=1))
    step = jax.jit(
        adalfl_jax.make_bilevel_step(model.apply, loss.apply, softmax_cross_entropy, inner, outer, **options)
    )
    batches = stacked_batches(4)._replace(step=jnp.arange(4))
    _, phi, metrics = loop(step, theta, adalfl_jax.Phi.create(phi_params, outer), batches)
    is_updated = metrics.hypergradient_norm > 0
    assert is_updated.sum() == {"outer_every": 2, "pipelined": 3}.get(*options, 4) if options else is_updated.all()
    assert phi.opt_state[1].best_value == metrics.outer_loss[is_updated].min()


# An estimator of each family; the slow tests have all.
QUICK = ("forward", "mixed_mode", "truncated", "conjugate_gradient", "persistent_evolution_strategies")


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "options",
    [
        *(
            pytest.param({"hypergradient": name}, marks=() if name in QUICK else pytest.mark.slow)
            for name in adalfl_jax.hypergradient.ESTIMATORS
        ),
        {"pipelined": True},
        pytest.param({"outer_every": 2}, marks=pytest.mark.slow),
        {"meta_batch_fraction": 0.5},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_inputs_targets_and_outputs_may_be_pytrees(options):
    """A model of parts does what the model does of which they are, side by side, inputs and outputs."""
    model, inner, loss, theta, phi_params = make_problem(loss=SMALL)
    outer = optax.adam(1e-2)

    def apply_to_parts(params, model_state, inputs, **keywords):
        inputs = jnp.concatenate([inputs["left"], inputs["right"]], axis=-1)
        outputs, model_state = model.apply(params, model_state, inputs, **keywords)
        return {"first": outputs[..., 0], "others": outputs[..., 1:]}, model_state

    def of_parts(loss_fn):
        def of_whole(*arguments):
            *phi_params, targets, outputs = arguments
            outputs = jnp.concatenate([outputs["first"][..., None], outputs["others"]], axis=-1)
            return targets["weights"].mean() * loss_fn(*phi_params, targets["labels"], outputs)

        return of_whole

    def parted(inputs, targets):
        inputs = {"left": inputs[..., :2], "right": inputs[..., 2:]}
        return inputs, {"labels": targets, "weights": jnp.ones(targets.shape)}

    batches = stacked_batches(2)._replace(step=jnp.arange(2))
    parts = batches._replace(inner=parted(*batches.inner), outer=parted(*batches.outer))
    results = []
    for functions, given in (
        ((model.apply, loss.apply, softmax_cross_entropy), batches),
        ((apply_to_parts, of_parts(loss.apply), of_parts(softmax_cross_entropy)), parts),
    ):
        step = adalfl_jax.make_bilevel_step(*functions, inner, outer, **options)
        first = jax.tree.map(lambda leaf: leaf[0], given)
        phi = adalfl_jax.prime(step, theta, adalfl_jax.Phi.create(phi_params, outer), first)  # one program of all steps
        *found, _ = loop(jax.jit(step), theta, phi, given)
        results.append((found[0], found[1].params))
    chex.assert_trees_all_close(*results, rtol=1e-8, atol=1e-12)


def test_inputs_of_which_one_does_not_fit_are_told():
    step, theta, phi = make_step()
    batch = make_batch(jax.random.key(0))
    inputs, targets = batch.inner
    for inner, message in (
        (({"a": inputs, "b": inputs[:3]}, targets), r"share their leading axes \[B\]; got inputs \{'a': \(8, 5\), 'b'"),
        (({"a": inputs, "b": inputs[None]}, targets), r"or have one leading axis K more"),
        (({}, targets), r"batch.inner must be two arrays.*or pytrees of such; got a tuple of dict"),
    ):
        outer = ({"a": inputs, "b": inputs}, targets)
        with pytest.raises(ValueError, match=message):
            step(theta, phi, batch._replace(inner=inner, outer=outer))


@pytest.mark.parametrize("options", [{}, {"pipelined": True}])
def test_a_loop_that_donates_its_state_equals_one_that_does_not(options):
    step, theta, phi = make_step("plain", "momentum", **options)
    batches = stacked_batches(3)
    phi = adalfl_jax.prime(step, theta, phi, jax.tree.map(lambda leaf: leaf[0], batches))
    kept = loop(jax.jit(step), theta, phi, batches)
    own = jax.tree.map(jnp.copy, (theta, phi))
    chex.assert_trees_all_equal(loop(jax.jit(step, donate_argnums=(0, 1)), *own, batches), kept)
    assert jax.tree.leaves(own[0].params)[0].is_deleted()


def test_parameters_that_an_optimiser_holds_too_may_be_donated():
    """DoG keeps the parameters it started from."""
    model, _, loss, theta, phi_params = make_problem("plain", "sgd", loss=SMALL)
    inner = outer = optax.contrib.dog()
    step = adalfl_jax.make_bilevel_step(model.apply, loss.apply, softmax_cross_entropy, inner, outer)
    theta = adalfl_jax.Theta.create(theta.params, theta.model_state, inner)
    phi = adalfl_jax.Phi.create(phi_params, outer)
    kept = jax.jit(step)(theta, phi, make_batch(jax.random.key(1)))
    chex.assert_trees_all_equal(jax.jit(step, donate_argnums=(0, 1))(theta, phi, make_batch(jax.random.key(1))), kept)


@pytest.mark.usefixtures("float64")
def test_vmapped_seeds_equal_single_runs():
    model, inner, loss, *_ = make_problem("batch_norm", "nesterov", loss=SMALL)
    outer = optax.adam(1e-2)
    step = adalfl_jax.make_bilevel_step(model.apply, loss.apply, softmax_cross_entropy, inner, outer)

    def run(key):
        theta = adalfl_jax.Theta.create(*model.init(key), inner)
        phi = adalfl_jax.Phi.create(loss.init(key), outer)
        return scan(step, theta, phi, jax.vmap(make_batch)(jax.random.split(key, 4)))

    keys = jax.random.split(jax.random.key(3), 3)
    together = jax.jit(jax.vmap(run))(keys)
    for seed, key in enumerate(keys):
        alone = jax.jit(run)(key)
        chex.assert_trees_all_close(jax.tree.map(lambda leaf, s=seed: leaf[s], together), alone, rtol=1e-9, atol=1e-12)


def test_the_step_is_compiled_once():
    step, theta, phi = make_step()
    step = jax.jit(step)
    loop(step, theta, phi, stacked_batches(3))
    assert step._cache_size() == 1


@pytest.mark.usefixtures("float64")
def test_golden_trajectory():
    """A change of these numbers is a change of the method; regenerate with `python -m tests.test_bilevel`."""
    # The model starts from draws in single precision, and their last bits depend on how they are compiled.
    rtol = 1e-7 if jax.default_backend() == "cpu" else 1e-6
    chex.assert_trees_all_close(golden_trajectory(), json.loads(GOLDEN.read_text()), rtol=rtol)


def golden_trajectory():
    step, theta, phi = make_step("batch_norm", "nesterov")
    metrics = jax.jit(scan, static_argnums=0)(step, theta, phi, stacked_batches(5))[2]
    return {name: np.asarray(values).tolist() for name, values in metrics._asdict().items()}


@pytest.mark.parametrize("hypergradient", ["forward", "unrolled"])
def test_an_inner_optimizer_that_needs_more_than_a_gradient_is_refused(hypergradient):
    model, _, loss, _, phi_params = make_problem("plain", "sgd")
    inner, outer = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()), optax.adam(1e-3)
    step = jax.jit(
        adalfl_jax.make_bilevel_step(
            model.apply, loss.apply, softmax_cross_entropy, inner, outer, hypergradient=hypergradient
        )
    )
    theta = adalfl_jax.Theta.create(*model.init(jax.random.key(0)), inner)
    with pytest.raises(
        ValueError, match=r"the inner optimiser gets gradient, state and parameters and no more, .*: 'value'"
    ):
        step(theta, adalfl_jax.Phi.create(phi_params, outer), make_batch(jax.random.key(1)))


def test_an_outer_optimizer_that_searches_a_line_is_refused():
    model, inner, loss, theta, phi_params = make_problem()
    outer = optax.lbfgs()
    step = jax.jit(adalfl_jax.make_bilevel_step(model.apply, loss.apply, softmax_cross_entropy, inner, outer))
    with pytest.raises(ValueError, match=r"the outer optimiser gets gradient, .* value of the loss and no more, .*fn'"):
        step(theta, adalfl_jax.Phi.create(phi_params, outer), make_batch(jax.random.key(1)))


@pytest.mark.parametrize("scale", [1.0, np.float32(1.0), jnp.array(1.0)])
def test_numbers_without_a_type_of_their_own_compile_a_step_once(scale):
    outer, inner = optax.adam(1e-2), optax.adam(1e-2)
    times = []

    def apply_fn(params, model_state, inputs, *, train, rng_key):
        times.append(train)
        return params["scale"] * inputs, model_state

    def learned_loss(phi_params, targets, outputs):
        return phi_params["scale"] * softmax_cross_entropy(targets, outputs)

    step = jax.jit(adalfl_jax.make_bilevel_step(apply_fn, learned_loss, softmax_cross_entropy, inner, outer))
    theta = adalfl_jax.Theta.create({"scale": scale}, {"count": scale}, inner)
    phi = adalfl_jax.Phi.create({"scale": scale}, outer)
    traces = []
    for _ in range(3):
        theta, phi, _ = step(theta, phi, make_batch(jax.random.key(1))._replace(step=None))
        traces.append(len(times))
    assert traces[0] == traces[-1] > 0


def test_phi_moves_by_the_outer_optimizer_on_the_hypergradient():
    model, inner, loss, theta, phi_params = make_problem()
    steps = [
        adalfl_jax.make_bilevel_step(model.apply, loss.apply, softmax_cross_entropy, inner, optax.sgd(rate))
        for rate in (1.0, 0.5)
    ]
    moves = []
    for step in steps:
        phi = adalfl_jax.Phi.create(phi_params, optax.sgd(1.0))
        _, after, metrics = jax.jit(step)(theta, phi, make_batch(jax.random.key(1)))
        moves.append(optax.tree.norm(optax.tree.sub(after.params, phi_params)))
    np.testing.assert_allclose(moves[0], metrics.hypergradient_norm, rtol=1e-3)
    np.testing.assert_allclose(moves[0], 2 * moves[1], rtol=1e-3)


def test_following_the_hypergradient_lowers_the_outer_loss():
    step, theta, phi = make_step()
    batch = make_batch(jax.random.key(1))
    step = jax.jit(step)
    first = step(theta, phi, batch)[2].outer_loss
    for _ in range(300):
        _, phi, metrics = step(theta, phi, batch)  # theta is put back each time: only phi learns
    assert metrics.outer_loss < 0.9 * first


def test_the_inner_pass_updates_batch_statistics_and_the_outer_pass_does_not():
    step, theta, phi = make_step("batch_norm")
    batch = make_batch(jax.random.key(1))
    after, _, _ = jax.jit(step)(theta, phi, batch)
    model = make_model("batch_norm")
    _, expected = model.apply(theta.params, theta.model_state, batch.inner.inputs, train=True, rng_key=None)
    chex.assert_trees_all_close(after.model_state, expected, rtol=1e-6)
    assert not np.allclose(after.model_state["norm"]["mean"], theta.model_state["norm"]["mean"])


def test_the_outer_pass_normalises_by_its_own_batch():
    step, theta, phi = make_step("batch_norm", "sgd")
    batch = make_batch(jax.random.key(1))
    after, _, metrics = jax.jit(step)(theta, phi, batch)
    outputs, _ = make_model("batch_norm").apply(
        after.params, after.model_state, batch.outer.inputs, train=True, rng_key=None
    )
    np.testing.assert_allclose(metrics.outer_loss, softmax_cross_entropy(batch.outer.targets, outputs), rtol=1e-5)


def test_dropout_differs_by_key_and_repeats_with_it():
    step, theta, phi = make_step("dropout")
    step, batch = jax.jit(step), make_batch(jax.random.key(1))
    first, again = (step(theta, phi, batch)[2].outer_loss for _ in range(2))
    other = step(theta, phi, batch._replace(rng_key=jax.random.key(9)))[2].outer_loss
    assert first == again
    assert first != other


def test_a_model_that_draws_needs_a_key():
    step, theta, phi = make_step("dropout")
    with pytest.raises(ValueError, match="rng_key"):
        step(theta, phi, make_batch(jax.random.key(1))._replace(rng_key=None))


def test_a_task_step_on_the_task_loss_is_plain_sgd():
    model, inner, _, theta, _ = make_problem()
    batch = make_batch(jax.random.key(1)).inner

    def objective(params):
        return softmax_cross_entropy(batch.targets, model.apply(params, {}, batch.inputs, train=True, rng_key=None)[0])

    step = jax.jit(adalfl_jax.make_task_step(model.apply, softmax_cross_entropy, inner))
    after, metrics = step(theta, batch)
    value, gradient = jax.jit(jax.value_and_grad(objective))(theta.params)
    chex.assert_trees_all_close(after.params, optax.apply_updates(theta.params, optax.tree.scale(-0.3, gradient)))
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-6)


@pytest.mark.parametrize("hypergradient", ["forward", "unrolled"])
def test_a_task_step_on_the_frozen_loss_moves_theta_as_the_bilevel_step_does(hypergradient):
    model, inner, loss, theta, phi_params = make_problem("batch_norm", "nesterov")
    batch = make_batch(jax.random.key(1))._replace(rng_key=None)
    frozen = adalfl_jax.FrozenLoss(loss, phi_params)
    plain, _ = jax.jit(adalfl_jax.make_task_step(model.apply, frozen, inner))(theta, batch.inner)
    outer = optax.adam(1e-2)
    step = adalfl_jax.make_bilevel_step(
        model.apply, loss.apply, softmax_cross_entropy, inner, outer, hypergradient=hypergradient
    )
    bilevel, _, _ = jax.jit(step)(theta, adalfl_jax.Phi.create(phi_params, outer), batch)
    chex.assert_trees_all_close(plain, bilevel, rtol=1e-5, atol=1e-7)


def test_an_unknown_hypergradient_lists_the_known():
    with pytest.raises(ValueError, match=r"'forwards'.*did you mean 'forward'.*forward, mixed_mode"):
        make_step(hypergradient="forwards")


def test_forward_refuses_a_loss_that_reads_theta():
    model, inner, *_ = make_problem()

    def reads_theta(phi_params, targets, outputs, *, params):
        return phi_params * optax.tree.norm(params)

    def reads_theta_by_default(phi_params, targets, outputs, params=None):
        return reads_theta(phi_params, targets, outputs, params=params)

    for loss_fn in (reads_theta, reads_theta_by_default):
        with pytest.raises(ValueError, match=r"reads it.*unrolled"):
            adalfl_jax.make_bilevel_step(model.apply, loss_fn, softmax_cross_entropy, inner, inner)


def test_a_loss_may_call_its_own_parameters_params():
    model, inner, loss, theta, phi_params = make_problem()

    def named_so(params, targets, outputs):
        return loss.apply(params, targets, outputs)

    batch, outer = make_batch(jax.random.key(1)), optax.sgd(1.0)
    steps = [
        jax.jit(adalfl_jax.make_bilevel_step(model.apply, function, softmax_cross_entropy, inner, outer))
        for function in (named_so, loss.apply)
    ]
    chex.assert_trees_all_equal(*(step(theta, adalfl_jax.Phi.create(phi_params, outer), batch) for step in steps))


def test_the_length_of_a_gradient_of_sixteen_bits_is_summed_in_float32():
    leaves = [jax.random.normal(key, 2000) for key in jax.random.split(jax.random.key(0), 3)]
    few_bits = [leaf.astype(jnp.bfloat16) for leaf in leaves]
    exact = np.linalg.norm(np.concatenate([np.asarray(leaf, np.float64) for leaf in few_bits]))
    assert norm(few_bits).dtype == jnp.float32
    assert float(norm(few_bits)) == pytest.approx(exact, rel=1e-6)


if __name__ == "__main__":
    with jax.enable_x64(True):
        GOLDEN.write_text(json.dumps(golden_trajectory(), indent=2) + "\n")
