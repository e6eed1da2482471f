"""A pipelined step against plain steps whose outer batch is the next step's inner batch."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adalfl_jax
from adalfl_jax.hypergradient.pipelined import _smaller
from adalfl_jax.task_losses import softmax_cross_entropy
from tests.problems import make_batch, make_problem


def functions(model_name="plain", optimizer_name="nesterov", loss=None):
    model, optimizer, loss, theta, phi_params = make_problem(model_name, optimizer_name, loss=loss)
    outer = optax.adam(0.01)
    phi = adalfl_jax.Phi.create(phi_params, outer)
    return (model.apply, loss.apply, softmax_cross_entropy, optimizer, outer), theta, phi


def batches(num_steps):
    return [make_batch(key)._replace(rng_key=None) for key in jax.random.split(jax.random.key(3), num_steps)]


def scan(step, theta, phi, batches):
    def body(state, batch):
        *state, metrics = step(*state, batch)
        return tuple(state), metrics

    phi = adalfl_jax.prime(step, theta, phi, batches[0])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    return jax.jit(lambda *arguments: jax.lax.scan(body, *arguments))((theta, phi), stacked)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("estimator", "model_name", "optimizer_name"),
    [
        pytest.param("forward", "batch_norm", "nesterov", marks=pytest.mark.slow),
        pytest.param("forward", "plain", "adam", marks=pytest.mark.slow),
        ("recompute", "batch_norm", "sgd"),
        ("finite_difference", "plain", "clip"),
        pytest.param("central_difference", "batch_norm", "momentum", marks=pytest.mark.slow),
    ],
)
def test_it_makes_the_same_updates_one_step_later(estimator, model_name, optimizer_name):
    problem, theta, phi = functions(model_name, optimizer_name)
    plain = jax.jit(adalfl_jax.make_bilevel_step(*problem, hypergradient=estimator))
    pipelined = adalfl_jax.make_bilevel_step(*problem, hypergradient=estimator, pipelined=True)
    parts = batches(4)
    (_, later), metrics = scan(pipelined, theta, phi, parts)
    expected, outer_losses = (theta, phi), []
    for this, following in itertools.pairwise(parts):
        *expected, plain_metrics = plain(*expected, this._replace(outer=following.inner))
        outer_losses.append(plain_metrics.outer_loss)
    rtol = 1e-8 if "difference" in estimator else 1e-11  # the last bits depend on how a program is compiled
    chex.assert_trees_all_close(later.params, expected[1].params, rtol=rtol)
    chex.assert_trees_all_close(metrics.outer_loss[1:], jnp.stack(outer_losses), rtol=1e-12)


@pytest.mark.usefixtures("float64")
def test_a_loop_equals_a_scan_and_vmapped_seeds_equal_single_ones():
    problem, theta, phi = functions()
    step = adalfl_jax.make_bilevel_step(*problem, pipelined=True)
    parts = batches(3)
    scanned, scanned_metrics = scan(step, theta, phi, parts)
    state, jitted, losses = (theta, phi), jax.jit(step), []
    for part in parts:
        *state, metrics = jitted(*state, part)
        losses.append(metrics)
    chex.assert_trees_all_close(scanned[0], state[0], rtol=1e-12)
    chex.assert_trees_all_close(scanned[1].params, state[1].params, rtol=1e-12)
    chex.assert_trees_all_close(scanned_metrics, jax.tree.map(lambda *leaves: jnp.stack(leaves), *losses), rtol=1e-12)

    shifted = jax.tree.map(lambda leaf: leaf + jnp.asarray(0.1, leaf.dtype), phi.params)
    two = jax.tree.map(lambda *leaves: jnp.stack(leaves), phi, phi._replace(params=shifted))
    vmapped, _ = jax.jit(jax.vmap(lambda phi: scan(step, theta, phi, parts)))(two)
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[0], vmapped[1].params), scanned[1].params, rtol=1e-11)
    assert jnp.abs(vmapped[1].params["layer_0"]["kernel"][1] - scanned[1].params["layer_0"]["kernel"]).max() > 0.05


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("model", "estimator"),
    [
        ("linear", "forward"),
        *(pytest.param("batch_norm", name, marks=pytest.mark.slow) for name in ("forward", "recompute")),
    ],
)
def test_steps_with_and_without_jit_take_turns(model, estimator):
    """Of a small loss, since a step without jit compiles its operations one by one."""
    problem, *start = functions(model, "sgd", adalfl_jax.LossNetwork((3,)))
    step = adalfl_jax.make_bilevel_step(*problem, hypergradient=estimator, pipelined=True)
    jitted, state, expected = jax.jit(step), start, start
    for part, turn in zip(batches(4), (step, jitted, step, step), strict=True):
        *state, _ = turn(*state, part)
        *expected, _ = jitted(*expected, part)
    chex.assert_trees_all_close(jax.tree.leaves(state), jax.tree.leaves(expected), rtol=1e-11)


def test_a_step_keeps_the_types_of_what_it_was_primed_with():
    """A progress of Python's is weakly typed, and a carry that becomes so is compiled for twice."""
    (model, _, task_loss, inner, outer), theta, _ = functions()
    loss = adalfl_jax.LossNetwork(hidden_sizes=(3,), use_progress=True)
    phi = adalfl_jax.Phi.create(loss.init(jax.random.key(0)), outer)
    step = adalfl_jax.make_bilevel_step(model, loss.apply, task_loss, inner, outer, pipelined=True)
    batch = batches(1)[0]._replace(progress=0.5)
    phi = adalfl_jax.prime(step, theta, phi, batch)
    _, after, _ = jax.eval_shape(lambda theta, phi: step(theta, phi, batch), theta, phi)
    weak = [jax.tree.map(lambda leaf: jax.typeof(leaf).weak_type, carry) for carry in (phi.carry, after.carry)]
    assert weak[0] == weak[1]


def test_what_numpy_has_of_a_batch_is_remembered_in_types_of_jax():
    """Without jit a batch comes as it is, labels of 64 bits say."""
    problem, theta, phi = functions()
    step = adalfl_jax.make_bilevel_step(*problem, hypergradient="recompute", pipelined=True)
    batch = jax.tree.map(lambda leaf: np.asarray(leaf, leaf.dtype.kind + "8"), batches(1)[0])
    theta, phi, _ = step(theta, phi, batch)
    assert all(isinstance(leaf, jax.Array) and leaf.dtype.itemsize <= 4 for leaf in jax.tree.leaves(phi.carry))
    jax.eval_shape(step, theta, phi, batch)


def test_the_first_step_leaves_phi_alone():
    problem, theta, phi = functions()
    step = jax.jit(adalfl_jax.make_bilevel_step(*problem, pipelined=True))
    (first,) = batches(1)
    for start in (phi, adalfl_jax.prime(step, theta, phi, first)):
        _, after, metrics = step(theta, start, first)
        chex.assert_trees_all_equal(after._replace(carry=()), phi)
        assert metrics.hypergradient_norm == 0
        assert metrics.outer_loss > 0


def test_what_does_not_fit_together_is_refused():
    problem, theta, phi = functions()
    with pytest.raises(ValueError, match=r"pipelined is for one of the hypergradients 'forward'.*got 'unrolled'"):
        adalfl_jax.make_bilevel_step(*problem, hypergradient="unrolled", pipelined=True)
    for option in ({"outer_every": 2}, {"meta_batch_fraction": 0.5}):
        with pytest.raises(ValueError, match=r"neither meta_batch_fraction nor outer_every"):
            adalfl_jax.make_bilevel_step(*problem, pipelined=True, **option)
    step = adalfl_jax.make_bilevel_step(*problem, pipelined=True)
    (batch,) = batches(1)
    inputs, targets = batch.inner
    with pytest.raises(ValueError, match=r"batch.inner: .* \[B\], not empty; got inputs \(8, 5\) and targets \(7,\)"):
        step(theta, phi, batch._replace(inner=(inputs, targets[:7])))


def test_a_carry_of_another_step_is_refused():
    problem, theta, phi = functions("plain", "sgd")
    step = adalfl_jax.make_bilevel_step(*problem, pipelined=True)
    other = adalfl_jax.make_bilevel_step(*problem, pipelined=True, hypergradient="finite_difference")
    (batch,) = batches(1)
    with pytest.raises(ValueError, match=r"phi.carry is not that of this step.*adalfl_jax.prime"):
        step(theta, adalfl_jax.prime(other, theta, phi, batch), batch)


@pytest.mark.parametrize(("sizes", "kept"), [((1600, 10, 90), [10, 90]), ((100, 90), [90])])
def test_theta_is_known_again_by_a_sixteenth_of_it(sizes, kept):
    assert [len(leaf) for leaf in _smaller([jnp.ones(size) for size in sizes])] == kept
