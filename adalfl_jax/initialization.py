"""The offline phase: phi learned on many fresh models before the real one is trained (Algorithm 1, which is ML3)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from adalfl_jax.arguments import require_function, require_optimizer, shorten
from adalfl_jax.bilevel import BilevelStep
from adalfl_jax.types import BilevelBatch, BilevelMetrics, InitFn, Phi, PyTree, Theta
from adalfl_jax.validation import require_bilevel_batch, require_call

OfflineStep = Callable[[Phi, Any], tuple[Phi, BilevelMetrics]]


def make_offline_step(
    bilevel_step: BilevelStep,
    init_fn: InitFn,
    inner_optimizer: optax.GradientTransformation,
    draw_batch: Callable[[Any], BilevelBatch] | None = None,
) -> OfflineStep:
    """Makes one iteration of Algorithm 1: draw a fresh theta_0, take the inner steps, update phi, forget theta.

    Args:
      bilevel_step: from `make_bilevel_step`. S_inner > 1 is a batch whose `inner` has a leading axis K, with a step
        built for it (`hypergradient="unrolled"`). Not one with `outer_every`, which would leave most of what is drawn
        unused.
      init_fn: `rng_key -> (params, model_state)`, the distribution theta_0 is drawn from.
      inner_optimizer: the one `bilevel_step` was made with. Its `init` alone is used, since its state starts afresh
        each time; the rate is that of `bilevel_step`. So with K = 1 phi is learned from the first step alone. Take
        SGD, at a rate above 0: from Adam's first step, whose length is the same for every gradient, next to nothing is
        learned, and nothing at all from a warm-up from 0 or `optax.MultiSteps`.
      draw_batch: makes the batch of a step when it is due, of a key say, so that the device never holds all of them.

    Returns:
      `offline_step(phi, batch) -> (phi, metrics)`, the shape `jax.lax.scan` takes; with `draw_batch` it takes what
      that takes in place of a batch. `batch.rng_key` is required.

    Raises:
      ValueError: what is no function or optimiser; by the returned step, a batch without a key, a bilevel step that
        remembers the steps before.

    References:
      Algorithm 1 of arXiv 2301.13247; Bechtle et al., "Meta Learning via Learned Loss", ICPR 2021.
    """

    draw_batch = draw_batch or (lambda batch: batch)
    require_function("bilevel_step", bilevel_step)
    require_function("init_fn", init_fn, method="init")
    require_call("init_fn", init_fn, ("rng_key",), ())
    require_optimizer("inner_optimizer", inner_optimizer)
    require_function("draw_batch", draw_batch)
    require_call("draw_batch", draw_batch, ("source",), ())

    def offline_step(phi: Phi, source: Any) -> tuple[Phi, BilevelMetrics]:
        batch = draw_batch(source)
        require_bilevel_batch(batch, ())
        if batch.rng_key is None:
            raise ValueError("the offline phase draws a fresh theta_0 from batch.rng_key; got None")
        init_key, step_key = jax.random.split(batch.rng_key)
        made = init_fn(init_key)
        if not (isinstance(made, tuple | list) and len(made) == 2):
            raise ValueError(
                "init_fn must return two things, (params, model_state); a model without state returns () for it. Got "
                f"{jax.tree.map(jax.typeof, made)}"
            )
        theta = Theta.create(*made, inner_optimizer)
        _, phi, metrics = bilevel_step(theta, phi, batch._replace(rng_key=step_key))
        if jax.tree.leaves(phi.carry):
            raise ValueError(
                "the offline phase forgets theta at every step, and this bilevel step remembers the steps before; make "
                "it without pipelined and with a hypergradient that remembers nothing"
            )
        return phi, metrics

    return offline_step


def initialize_offline(offline_step: OfflineStep, phi: Phi, batches: PyTree) -> tuple[Phi, BilevelMetrics]:
    """Runs Algorithm 1 as one `jax.lax.scan`, compiled whether or not `jax.jit` is around it.

    Called outside of `jax.jit` it waits for the device and looks at what came out.

    Args:
      offline_step: from `make_offline_step`.
      phi: where to start.
      batches: what `offline_step` takes, batches or what they are drawn from, each array with a leading axis S_init
        (2500 in the paper).

    Returns:
      phi after S_init steps, and the metrics of each step, `[S_init]`.

    Raises:
      ValueError: arrays of `batches`, its keys among them, that do not share their leading axis.

    Warns:
      UserWarning: a meta-gradient that was 0 at most steps, or no finite number; under `jax.jit` nobody can tell.

    Example:
      >>> import jax, optax, adalfl_jax
      >>> from adalfl_jax import data, models
      >>> digits = data.load("digits")
      >>> model = models.make_model("mlp", digits.input_shape, digits.num_outputs, hidden_sizes=(8,))
      >>> loss, inner, outer = adalfl_jax.LossNetwork(), optax.sgd(0.01), optax.adam(1e-3)
      >>> task_loss = adalfl_jax.task_losses.softmax_cross_entropy
      >>> bilevel_step = adalfl_jax.make_bilevel_step(model.apply, loss.apply, task_loss, inner, outer)
      >>> def draw_batch(key):
      ...     draw_key, step_key = jax.random.split(key)
      ...     rows = jax.random.randint(draw_key, (2, 100), 0, len(digits.train.inputs))
      ...     halves = [data.take(digits.train, part) for part in rows]
      ...     return adalfl_jax.BilevelBatch(*halves, rng_key=step_key)
      >>> offline_step = adalfl_jax.make_offline_step(bilevel_step, model.init, inner, draw_batch)
      >>> phi = adalfl_jax.Phi.create(loss.init(jax.random.key(1)), outer)
      >>> keys = jax.random.split(jax.random.key(0), 5)  # S_init
      >>> phi, metrics = adalfl_jax.initialize_offline(offline_step, phi, keys)
      >>> phi = adalfl_jax.Phi.create(phi.params, outer)  # for the online phase, whose eta may be another
      >>> metrics.outer_loss.shape
      (5,)
    """
    leading = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
    if len(leading) != 1 or () in leading:
        raise ValueError(
            "every array of batches, rng_key too, has the same leading axis S_init, as jax.random.split(key, S_init) "
            f"makes of a key; got {shorten(jax.tree.map(jnp.shape, batches))}"
        )
    phi, metrics = jax.lax.scan(offline_step, phi, batches)
    norms = metrics.hypergradient_norm
    if isinstance(norms, Tracer) or not norms.size:
        return phi, metrics
    if not np.isfinite(norms).all():
        warnings.warn(
            f"the meta-gradient of step {np.flatnonzero(~np.isfinite(norms))[0]} of the offline phase is no finite "
            "number, and phi is lost; outputs may be too large, labels no class of the model, targets those of a "
            'regression where predictions are not "raw", or the inner optimiser without a finite derivative',
            stacklevel=2,
        )
    elif (share := np.mean(norms == 0)) > 0.5:
        warnings.warn(
            f"the meta-gradient was 0 at {share:.0%} of the steps of the offline phase, of which phi learned nothing; "
            "the first step of the inner optimiser may not depend on phi, as under a warm-up from 0, the learned loss "
            "may be flat, or the bilevel step be one with outer_every",
            stacklevel=2,
        )
    return phi, metrics
