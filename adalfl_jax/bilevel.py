"""Steps of training: on a loss that is learned meanwhile (Algorithm 2's body), and on a fixed one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adalfl_jax.arguments import require_optimizer
from adalfl_jax.axes import with_own_keys, zeros_like
from adalfl_jax.hypergradient import (
    BilevelProblem,
    Estimator,
    OneStep,
    descend,
    make_estimator,
    make_pipelined_step,
    num_inner_steps,
)
from adalfl_jax.hypergradient.problem import (
    bind_learned_loss,
    first_examples,
    inner_and_outer_keys,
    require_examples,
)
from adalfl_jax.hypergradient.update import outer_update
from adalfl_jax.learned_losses import at_progress, require_progress
from adalfl_jax.norms import norm
from adalfl_jax.types import (
    ApplyFn,
    Batch,
    BilevelBatch,
    BilevelMetrics,
    LearnedLossFn,
    LossFn,
    Phi,
    PyTree,
    TaskMetrics,
    Theta,
)
from adalfl_jax.validation import (
    meta_batch_shares,
    require_batch,
    require_bilevel_batch,
    require_key,
    require_learned_loss,
    require_loss,
    require_mean,
    require_model,
    require_options,
    require_phi,
    require_theta,
    returning_scalar,
    returning_state,
)

BilevelStep = Callable[[Theta, Phi, BilevelBatch], tuple[Theta, Phi, BilevelMetrics]]


def make_bilevel_step(
    apply_fn: ApplyFn,
    learned_loss_fn: LearnedLossFn,
    task_loss_fn: LossFn,
    inner_optimizer: optax.GradientTransformation,
    outer_optimizer: optax.GradientTransformation,
    *,
    hypergradient: str | Estimator = "forward",
    meta_batch_fraction: float | tuple[float, float] = 1.0,
    outer_every: int = 1,
    pipelined: bool = False,
    axis_name: str | None = None,
) -> BilevelStep:
    r"""Makes the step that trains the base model and its loss together.

    .. math::
      \theta_{t+1} = \theta_t + u(\nabla_\theta M_{\phi_t}(y, f_{\theta_t}(x))), \qquad
      \phi_{t+1} = \phi_t + v(\nabla_\phi L(y', f_{\theta_{t+1}(\phi_t)}(x')))

    with `u` and `v` the updates of the inner and the outer optimiser, `(x, y)` the inner and `(x', y')` the outer
    batch. The step is pure: put it under `jax.jit`, `jax.lax.scan`, `jax.vmap` or a sharding as it is.

    Labels must be from 0 to C - 1. Outside of `jax.jit` others raise ValueError; under it, where values cannot be
    looked at, the losses of this package are nan.

    Args:
      apply_fn: the base model, `(params, model_state, inputs, *, train, rng_key) -> (outputs [B, C], model_state)`.
        It is called with `train=True` on both batches. The inner pass updates `model_state`; the outer pass
        normalises by its own batch and what it would record is dropped. A `flax.nnx` module becomes one by
        `adalfl_jax.models.functionalize`; by hand, merge it with `nnx.merge(..., copy=True)`, since it is called inside
        transformations.
      learned_loss_fn: M_phi, `(phi_params, targets, outputs) -> scalar`. Targets are the batch's and outputs the
        model's, arrays for the losses of this package, or pytrees. If it declares a keyword argument `params` it
        reads theta and receives it there; if it declares `progress` it receives `batch.progress`. A function around one
        that declares them declares them too by `functools.wraps`, and hands them on.
      task_loss_fn: L, `(targets, outputs) -> scalar`.
      inner_optimizer: any optax transformation that needs gradient, state and parameters alone (a line search needs
        more) and has a finite derivative, as `optax.radam` has not in its first steps, nor `optax.contrib`'s `prodigy`
        and `mechanize`; the paper's is `optax.sgd`. The update is what phi is learned through, so not at all where it
        is a sign (`optax.lion`) or waits for further gradients (`optax.MultiSteps`), and hardly from Adam's first step,
        whose length is the same for every gradient.
      outer_optimizer: any optax transformation that needs gradient, state, parameters and the value of the loss alone,
        as `optax.contrib.reduce_on_plateau`; the paper's is `optax.adam`.
      hypergradient: a key of `adalfl_jax.hypergradient.ESTIMATORS`, or an estimator with settings of your own from
        `adalfl_jax.make_estimator`. "forward" is exact through one inner step, "unrolled" through any number.
      meta_batch_fraction: share of the inner and of the outer batch, or of each, on which the meta-gradient is
        estimated, their first examples; theta is updated on the whole inner batch. Unbiased if the examples of a
        batch come in random order and the first of them have the outputs they have in the whole batch: so for models
        without batch norm, with dropout where its masks are drawn as `[B, ...]`. Below 1 for the inner batch it is for
        the one-step estimators, and for learned losses that are means over examples, so not for a `RescaledLoss`.
      outer_every: n, to update phi at the steps numbered n - 1, 2n - 1, ... alone, by `batch.step`. The others cost no
        more than training on a frozen loss, and report the task loss at theta_t on the inner batch as `outer_loss`.
        Under `jax.vmap` leave `batch.step` unmapped, or every step pays in full. theta is moved behind the estimator
        then, by its gradient: what one of your own does to theta besides is lost.
      pipelined: takes as outer batch of a step the inner batch of the *next*, whose forward pass then serves both
        losses: step t first updates phi for what step t - 1 did, then theta. `batch.outer` is not looked at. For the
        one-step estimators.
      axis_name: of the devices of `jax.pmap` or `jax.shard_map`, where the step runs inside one and is given a part of
        each batch, of equal size, on each device. It then averages over them what it must, so that theta and phi move
        as on the whole batches and stay equal on all devices. `theta`, `phi` and `batch.rng_key` are the same on all of
        them; losses are means over examples, so a `RescaledLoss` is refused, and batch norm averages its statistics if
        the model is made with this `axis_name` too. `jax.vmap` stands in for them where there is one device. Under
        `jax.jit` with shardings leave it out.

    Returns:
      `bilevel_step(theta, phi, batch) -> (theta, phi, metrics)`. A step that remembers something ("truncated",
      "persistent_evolution_strategies", pipelined) keeps it in `phi.carry`; see `prime` for its use under a scan.

    Raises:
      ValueError: an unknown hypergradient, functions of other arguments, options that do not fit each other or the
        learned loss; by the returned step, states of other optimisers, shapes that do not fit together, parameters
        without gradients, losses that are not one number, no progress for a loss that needs it.

    Example:
      >>> import jax, optax, adalfl_jax
      >>> def apply_fn(params, model_state, inputs, *, train, rng_key):
      ...   return inputs @ params, model_state
      >>> loss = adalfl_jax.LossNetwork()
      >>> inner, outer = optax.sgd(0.1), optax.adam(1e-3)
      >>> step = adalfl_jax.make_bilevel_step(
      ...   apply_fn, loss.apply, adalfl_jax.task_losses.softmax_cross_entropy, inner, outer)
      >>> theta = adalfl_jax.Theta.create(jax.numpy.zeros((4, 3)), (), inner)
      >>> phi = adalfl_jax.Phi.create(loss.init(jax.random.key(0)), outer)
      >>> x, y = jax.numpy.ones((8, 4)), jax.numpy.arange(8) % 3
      >>> theta, phi, metrics = jax.jit(step)(theta, phi, adalfl_jax.BilevelBatch((x, y), (x, y)))
      >>> theta.params.shape
      (4, 3)

    References:
      Algorithm 2 of Raymond et al., "Meta-Learning Adaptive Loss Functions", arXiv 2301.13247.
    """
    estimate = make_estimator(hypergradient) if isinstance(hypergradient, str) else hypergradient
    require_model(apply_fn)
    require_learned_loss(learned_loss_fn)
    require_loss("task_loss_fn", task_loss_fn, "targets", "outputs")
    require_optimizer("inner_optimizer", inner_optimizer)
    require_optimizer("outer_optimizer", outer_optimizer)
    inner_fraction, outer_fraction = meta_batch_shares(meta_batch_fraction)
    require_options(estimate, learned_loss_fn, (inner_fraction, outer_fraction), outer_every, pipelined)
    require_mean("learned_loss_fn", learned_loss_fn, axis_name)
    problem = BilevelProblem(
        with_own_keys(axis_name, returning_state(apply_fn)),
        returning_scalar("learned_loss_fn", learned_loss_fn),
        returning_scalar("task_loss_fn", task_loss_fn),
        inner_optimizer,
        inner_fraction,
        axis_name,
    )

    def update_phi(phi: Phi, gradient: PyTree, outer_loss: jax.Array, carry: PyTree) -> Phi:
        updates, opt_state = outer_update(outer_optimizer, gradient, phi.opt_state, phi.params, outer_loss)
        return Phi(optax.apply_updates(phi.params, updates), opt_state, carry)

    def take_step(
        problem: BilevelProblem, theta: Theta, phi: Phi, batch: BilevelBatch
    ) -> tuple[Theta, Phi, BilevelMetrics]:
        if outer_fraction < 1:
            num_inner_steps(batch)  # what does not fit together is told of the whole batch, not of a part
            batch = batch._replace(outer=first_examples(batch.outer, outer_fraction))
        result = estimate(problem.at_progress(batch.progress), theta, phi.params, batch, phi.carry)
        metrics = BilevelMetrics(result.inner_loss, result.outer_loss, norm(result.gradient))
        return result.theta, update_phi(phi, result.gradient, result.outer_loss, result.carry), metrics

    if pipelined:
        assert isinstance(estimate, OneStep)  # as `require_options` has made sure
        step, parts = make_pipelined_step(problem, estimate, update_phi), ("inner",)
    elif outer_every == 1:
        step, parts = functools.partial(take_step, problem), ("inner", "outer")
    else:
        step, parts = _every(take_step, problem, outer_every), ("inner", "outer")

    def bilevel_step(theta: Theta, phi: Phi, batch: BilevelBatch) -> tuple[Theta, Phi, BilevelMetrics]:
        require_theta(theta, "inner_optimizer", inner_optimizer)
        require_phi(phi, outer_optimizer)
        require_bilevel_batch(batch, parts)
        require_progress(learned_loss_fn, batch.progress)
        return step(theta, phi, batch)

    return bilevel_step


def prime(bilevel_step: BilevelStep, theta: Theta, phi: Phi, batch: BilevelBatch) -> Phi:
    """phi with an empty carry of the shape that the step will give it, which `jax.lax.scan` wants from the start.

    A step called on an empty carry does what it does on none, and so does one on the carry of a theta that has been
    moved by another step or replaced since. Steps that remember nothing return phi as it is. Call it before a
    checkpoint is restored into phi, which has the carry too.

    Args:
      bilevel_step: from `make_bilevel_step`.
      theta: the base model, for its shapes.
      phi: the learned loss.
      batch: one batch of a step, or its shapes (`jax.ShapeDtypeStruct`).

    Example:
      >>> import jax, optax, adalfl_jax
      >>> loss, inner, outer = adalfl_jax.ScaledTaskLoss(), optax.sgd(0.1), optax.adam(1e-3)
      >>> step = adalfl_jax.make_bilevel_step(
      ...   lambda params, model_state, inputs, *, train, rng_key: (inputs @ params, model_state),
      ...   loss.apply, adalfl_jax.task_losses.softmax_cross_entropy, inner, outer, pipelined=True)
      >>> theta = adalfl_jax.Theta.create(jax.numpy.zeros((4, 3)), (), inner)
      >>> phi = adalfl_jax.Phi.create(loss.init(jax.random.key(0)), outer)
      >>> x, y = jax.numpy.ones((5, 8, 4)), jax.numpy.zeros((5, 8), int)  # five batches
      >>> batches = adalfl_jax.BilevelBatch((x, y), (x, y))
      >>> phi = adalfl_jax.prime(step, theta, phi, jax.tree.map(lambda leaf: leaf[0], batches))
      >>> _, metrics = jax.lax.scan(
      ...   lambda carry, batch: (lambda theta, phi, metrics: ((theta, phi), metrics))(*step(*carry, batch)),
      ...   (theta, phi), batches)
      >>> metrics.outer_loss.shape
      (5,)
    """
    fresh = phi._replace(carry=()) if isinstance(phi, Phi) else phi  # what is no phi the step itself refuses
    _, after, _ = jax.eval_shape(bilevel_step, theta, fresh, batch)
    return phi._replace(carry=jax.tree.map(zeros_like, after.carry))


def make_task_step(
    apply_fn: ApplyFn, loss_fn: LossFn, optimizer: optax.GradientTransformation, *, axis_name: str | None = None
) -> Callable[..., tuple[Theta, TaskMetrics]]:
    """Makes the step that trains the base model on a loss that does not change.

    The loss is a task loss (the baseline), a learned loss read from a file, or what the offline phase learned (ML3),
    `FrozenLoss(loss, phi.params)`.

    Args:
      apply_fn: the base model, as in `make_bilevel_step`.
      loss_fn: `(targets, outputs) -> scalar`; one that reads how far training is declares `progress`.
      optimizer: any optax transformation that needs gradient, state and parameters alone.
      axis_name: of the devices of `jax.pmap` or `jax.shard_map`, as in `make_bilevel_step`.

    Returns:
      `task_step(theta, batch, rng_key=None, progress=None) -> (theta, metrics)`, where `batch` is `(inputs, targets)`;
      inputs are what `apply_fn` takes, an array or a pytree, and progress is t / T, `[]` in [0, 1].

    Raises:
      ValueError: what is no optimiser, or no function of such arguments; by the returned step, a theta of another
        optimiser, a batch that is no pair of arrays, empty or of unequal lengths, a loss that is not one number, no
        progress for one that needs it.
    """
    require_model(apply_fn)
    require_loss("loss_fn", loss_fn, "targets", "outputs", optional=("progress",))
    require_optimizer("optimizer", optimizer)
    require_mean("loss_fn", loss_fn, axis_name)
    own_apply_fn = with_own_keys(axis_name, returning_state(apply_fn))
    scalar_loss_fn = returning_scalar("loss_fn", loss_fn)

    def task_step(
        theta: Theta,
        batch: Batch | tuple[PyTree, PyTree],
        rng_key: jax.Array | None = None,
        progress: jax.Array | float | None = None,
    ) -> tuple[Theta, TaskMetrics]:
        require_theta(theta, "optimizer", optimizer)
        require_batch("batch", batch)
        require_examples("batch", batch)
        if rng_key is not None:
            require_key("rng_key", rng_key)
        require_progress(loss_fn, progress)
        loss_now = at_progress(scalar_loss_fn, progress)

        def loss(targets: PyTree, outputs: PyTree, _) -> jax.Array:
            return loss_now(targets, outputs)

        theta, value, _ = descend(own_apply_fn, loss, optimizer, theta, batch, rng_key, axis_name)
        return theta, TaskMetrics(value)

    return task_step


class _Recorded(NamedTuple):
    """Stands for an optimiser's state: the gradient it was given."""

    gradient: PyTree


def _every(take_step: Callable[..., Any], problem: BilevelProblem, outer_every: int) -> BilevelStep:
    """The step at every n-th number, one on a frozen phi at the others.

    What a branch returns is written to new memory, and under `jax.lax.scan` copied from there. So the branches return
    the gradient, which is new anyway, and theta is updated behind them, in place.
    """
    optimizer = problem.inner_optimizer
    recorded = problem._replace(inner_optimizer=_recording(optimizer))

    def due_step(theta: Theta, phi: Phi, batch: BilevelBatch) -> tuple[PyTree, PyTree, Phi, BilevelMetrics]:
        theta, phi, metrics = take_step(recorded, theta, phi, batch)
        return _gradient_of(theta), theta.model_state, phi, metrics

    def frozen_step(theta: Theta, phi: Phi, batch: BilevelBatch) -> tuple[PyTree, PyTree, Phi, BilevelMetrics]:
        *_, like = jax.eval_shape(due_step, theta, phi, batch)
        loss_fn = bind_learned_loss(problem.at_progress(batch.progress).learned_loss_fn, phi.params)
        inner_key, _ = inner_and_outer_keys(batch.rng_key)
        theta, loss, outputs = descend(
            problem.apply_fn, loss_fn, recorded.inner_optimizer, theta, batch.inner, inner_key, problem.axis_name
        )
        task_loss = problem.mean(problem.task_loss_fn(batch.inner[1], outputs))
        metrics = BilevelMetrics(loss, task_loss, jnp.zeros(()))
        # Both branches measure in the same types.
        metrics = jax.tree.map(lambda value, other: value.astype(other.dtype), metrics, like)
        return _gradient_of(theta), theta.model_state, phi, metrics

    def step(theta: Theta, phi: Phi, batch: BilevelBatch) -> tuple[Theta, Phi, BilevelMetrics]:
        if batch.step is None:
            raise ValueError(f"outer_every = {outer_every} goes by the number of the step: give batch.step; got None")
        if jnp.shape(batch.step) or not jnp.issubdtype(jnp.result_type(batch.step), jnp.integer):
            raise ValueError(f"batch.step must be one whole number, that of this step; got {jax.typeof(batch.step)}")
        if num_inner_steps(batch) is not None:
            raise ValueError("outer_every counts single inner steps; drop the leading axis K of batch.inner")
        is_due = batch.step % outer_every == outer_every - 1
        gradient, model_state, phi, metrics = jax.lax.cond(is_due, due_step, frozen_step, theta, phi, batch)
        updates, opt_state = optimizer.update(gradient, theta.opt_state, theta.params)
        return Theta(optax.apply_updates(theta.params, updates), model_state, opt_state), phi, metrics

    return step


def _recording(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimiser that updates alike, once, and leaves the gradient as its state."""

    def update(updates: PyTree, state: optax.OptState, params: PyTree = None) -> tuple[PyTree, _Recorded]:
        if isinstance(state, _Recorded):
            raise _no_single_step("two steps of it or more")
        return optimizer.update(updates, state, params)[0], _Recorded(updates)

    return optax.GradientTransformation(optimizer.init, update)


def _gradient_of(theta: Theta) -> PyTree:
    if not isinstance(theta.opt_state, _Recorded):
        raise _no_single_step(f"an optimiser's state of type {type(theta.opt_state).__name__}")
    return theta.opt_state.gradient


def _no_single_step(got: str) -> ValueError:
    return ValueError(
        "outer_every takes estimators whose theta is one step of problem.inner_optimizer from where it was; got "
        f"{got}. Set outer_every to 1"
    )
