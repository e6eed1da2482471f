"""The bilevel problem: what an estimator takes and returns, the inner step, the outer objective."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.core import ShapedArray
from jax.extend import core

from adalfl_jax import learned_losses
from adalfl_jax.arguments import shorten
from adalfl_jax.axes import mean_over, own_copy
from adalfl_jax.hypergradient.update import differentiable_update
from adalfl_jax.types import ApplyFn, Batch, BilevelBatch, LearnedLossFn, LossFn, PyTree, Theta

AnyBatch = Batch | tuple[PyTree, PyTree]


class BilevelProblem(NamedTuple):
    """The functions that define the inner update and the outer objective."""

    apply_fn: ApplyFn
    learned_loss_fn: LearnedLossFn
    task_loss_fn: LossFn
    inner_optimizer: optax.GradientTransformation
    inner_fraction: float = 1.0  # share of the inner batch on which J_f w is taken; g takes the whole
    axis_name: str | None = None  # of the devices among which batches are divided, inside jax.pmap or jax.shard_map

    def own(self, tree: PyTree) -> PyTree:
        """What is equal on all devices as each device's own, to be differentiated with respect to."""
        return own_copy(self.axis_name, tree)

    def mean(self, tree: PyTree) -> PyTree:
        """The mean over devices of what each computed on its part of a batch."""
        return mean_over(self.axis_name, tree)

    def at_progress(self, progress: jax.Array | float | None) -> BilevelProblem:
        """The problem with the learned loss as it is at this share of training."""
        return self._replace(learned_loss_fn=learned_losses.at_progress(self.learned_loss_fn, progress))


class Hypergradient(NamedTuple):
    """What an estimator returns."""

    theta: Theta  # theta_{t+1}, K steps later in a K-step unroll
    gradient: PyTree  # d outer_loss / d phi, the shape of phi
    inner_loss: jax.Array  # [] M_phi before the update, mean over the K steps
    outer_loss: jax.Array  # [] task loss at theta_{t+1} on the outer batch
    carry: PyTree = ()  # what the estimator remembers for the next step


class Estimator(Protocol):
    """The signature of every estimator. `carry` is the one returned by the step before, `()` at the start.

    Attributes that are True say what an estimator cannot do: `remembers`, of any, that it has to see every step of
    theta; of those in `ESTIMATORS`, which configurations name, `is_of_one_inner_step` that it takes no leading axis K
    and `takes_differences` that it takes no numbers of 16 bits.
    """

    def __call__(
        self, problem: BilevelProblem, theta: Theta, phi_params: PyTree, batch: BilevelBatch, carry: PyTree = (), /
    ) -> Hypergradient: ...


def require_forward_mode(name: str, function: Callable[[PyTree], PyTree], point: PyTree) -> None:
    """Looks for what fails under `jax.jit` later, where the error would not say what to do.

    Raises:
      NotImplementedError: the function has no forward-mode derivative, as of a `jax.custom_vjp` inside.
    """
    program = jax.make_jaxpr(lambda point: jax.jvp(function, (point,), (point,))[1])(point).jaxpr
    if any(equation.primitive.name == "custom_lin" for equation in equations(program)):
        raise no_forward_mode(name)


def no_forward_mode(name: str, reason: Exception | None = None) -> NotImplementedError:
    """The error of an estimator that needs a forward-mode derivative which JAX cannot derive, for a reason it gives."""
    # Where JAX gave a reason it could not transpose the backward pass, and "recompute", which does not, may still work.
    others = '"unrolled"' if reason is None else '"recompute" or "unrolled"'
    said = f" (JAX: {str(reason).splitlines()[0]})" if reason is not None and str(reason) else ""
    return NotImplementedError(
        f"hypergradient={name!r} needs forward-mode derivatives of the model, and JAX cannot derive them here, as of a "
        f"jax.custom_vjp inside; build the step with hypergradient={others}{said}"
    )


def require_32_bits(name: str, outputs: Callable[[PyTree], PyTree], params: PyTree) -> None:
    """Raises ValueError for a model that computes in 16 bits, of an estimator that takes differences."""
    program = jax.make_jaxpr(outputs)(params).jaxpr
    variables = (*program.invars, *(var for equation in equations(program) for var in equation.outvars))
    types = (var.aval.dtype for var in variables if isinstance(var.aval, ShapedArray))
    coarse = next(
        (dtype for dtype in types if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32), None
    )
    if coarse is not None:
        raise ValueError(
            f"hypergradient={name!r} takes differences of what the model makes, and they drown in the rounding of 16 "
            f"bits; got {coarse} among the parameters or in the model. Compute in float32, or build the step with "
            'hypergradient="forward"'
        )


def outputs_of(
    problem: BilevelProblem, theta: Theta, inputs: PyTree, rng_key: jax.Array | None
) -> tuple[Callable[[PyTree], PyTree], PyTree]:
    """The outputs in train mode as a function of the parameters, and those."""

    def outputs(params: PyTree) -> PyTree:
        return problem.apply_fn(params, theta.model_state, inputs, train=True, rng_key=rng_key)[0]

    return outputs, problem.own(theta.params)


def equations(program: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """Those of a program and of the programs inside it."""
    for equation in program.eqns:
        yield equation
        for inner in core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def descend(
    apply_fn: ApplyFn,
    loss_fn: Callable[[PyTree, PyTree, PyTree], jax.Array],
    optimizer: optax.GradientTransformation,
    theta: Theta,
    batch: AnyBatch,
    rng_key: jax.Array | None,
    axis_name: str | None = None,
) -> tuple[Theta, jax.Array, PyTree]:
    """One differentiable optimiser step of theta on `loss_fn(targets, outputs, params)`.

    Returns:
      theta after the step; the loss `[]` and the outputs `[B, C]` before it.
    """
    inputs, targets = batch

    def objective(params: PyTree) -> tuple[jax.Array, tuple[PyTree, PyTree]]:
        outputs, model_state = apply_fn(params, theta.model_state, inputs, train=True, rng_key=rng_key)
        return loss_fn(targets, outputs, params), (model_state, outputs)

    differentiate = jax.value_and_grad(objective, has_aux=True)
    (loss, (model_state, outputs)), gradient = differentiate(own_copy(axis_name, theta.params))
    gradient, loss, model_state = mean_over(axis_name, (gradient, loss, model_state))
    updates, opt_state = differentiable_update(optimizer, gradient, theta.opt_state, theta.params)
    return Theta(optax.apply_updates(theta.params, updates), model_state, opt_state), loss, outputs


def inner_step(
    problem: BilevelProblem, theta: Theta, phi_params: PyTree, batch: AnyBatch, rng_key: jax.Array | None
) -> tuple[Theta, jax.Array]:
    """One differentiable step of theta on M_phi; returns M_phi before it."""
    loss_fn = bind_learned_loss(problem.learned_loss_fn, phi_params)
    theta, loss, _ = descend(
        problem.apply_fn, loss_fn, problem.inner_optimizer, theta, batch, rng_key, problem.axis_name
    )
    return theta, loss


def outer_objective(
    problem: BilevelProblem, params: PyTree, model_state: PyTree, batch: AnyBatch, rng_key: jax.Array | None
) -> jax.Array:
    """Task loss on the outer batch. Batch norm normalises by that batch; the statistics it would record are dropped."""
    inputs, targets = batch
    outputs, _ = problem.apply_fn(params, model_state, inputs, train=True, rng_key=rng_key)
    return problem.task_loss_fn(targets, outputs)


def outer_gradient(
    problem: BilevelProblem, params: PyTree, model_state: PyTree, batch: AnyBatch, rng_key: jax.Array | None
) -> tuple[jax.Array, PyTree]:
    """Task loss on the outer batch, and its gradient to the parameters."""
    differentiate = jax.value_and_grad(outer_objective, argnums=1)
    return problem.mean(differentiate(problem, problem.own(params), model_state, batch, rng_key))


def num_inner_steps(batch: BilevelBatch) -> int | None:
    """K when `batch.inner` carries a leading axis of inner steps, None when it is one plain batch.

    The inner batch is unrolled when its inputs, an array or all arrays of a pytree, have one axis more than the outer
    batch's.

    Raises:
      ValueError: leading axes within a batch or ranks of inner and outer inputs differ, or a batch is empty.
    """
    inner, outer = (jax.tree.map(jnp.shape, tuple(part)) for part in (batch.inner, batch.outer))
    ranks = [[jnp.ndim(leaf) for leaf in jax.tree.leaves(part[0])] for part in (batch.inner, batch.outer)]
    extra_axes = {inner - outer for inner, outer in zip(*ranks, strict=False)}
    if len(ranks[0]) != len(ranks[1]) or extra_axes not in ({0}, {1}):
        raise ValueError(
            "batch.inner inputs must be shaped like batch.outer inputs, or have one leading axis K more; got "
            f"inner {shorten(inner[0])} and outer {shorten(outer[0])}"
        )
    (num_extra,) = extra_axes
    leading = {}
    for name, part, shapes, axes in (("inner", batch.inner, inner, 1 + num_extra), ("outer", batch.outer, outer, 1)):
        leading[name], *others = {jnp.shape(leaf)[:axes] for leaf in jax.tree.leaves(tuple(part))}
        if others or len(leading[name]) < axes:
            letters = "[K, B]" if axes == 2 else "[B]"
            raise ValueError(
                f"batch.{name}: inputs and targets must share their leading axes {letters}; got inputs "
                f"{shorten(shapes[0])} and targets {shorten(shapes[1])}"
            )
    if 0 in leading["inner"] + leading["outer"]:
        raise ValueError(f"batches are empty; got inner {inner[0]} and outer {outer[0]}")
    return leading["inner"][0] if num_extra else None


def require_examples(name: str, batch: AnyBatch) -> None:
    """Raises ValueError for a plain batch that is empty, or whose arrays do not share their leading axis."""
    axes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(tuple(batch))}
    if len(axes) > 1 or axes & {(), (0,)}:
        inputs, targets = (shorten(jax.tree.map(jnp.shape, part)) for part in batch)
        raise ValueError(
            f"{name}: inputs and targets must share their leading axis [B], not empty; got inputs {inputs} and targets "
            f"{targets}"
        )


def first_examples(batch: AnyBatch, fraction: float) -> Batch:
    """A share of a batch, at least one example."""
    return Batch(*jax.tree.map(lambda leaf: leaf[: max(1, round(fraction * len(leaf)))], tuple(batch)))


def require_one_step(name: str, batch: BilevelBatch) -> None:
    """Raises ValueError where `batch.inner` has a leading axis K that the named estimator has no use for."""
    if (num_steps := num_inner_steps(batch)) is not None:
        raise ValueError(
            f"the estimator {name!r} differentiates through exactly one inner step, and batch.inner carries a leading "
            f"axis K = {num_steps}; drop that axis, or take make_bilevel_step with the hypergradient "
            '"unrolled", "checkpointed" or "mixed_mode"'
        )


def bind_learned_loss(
    learned_loss_fn: LearnedLossFn, phi_params: PyTree
) -> Callable[[PyTree, PyTree, PyTree], jax.Array]:
    """M_phi as a function of (targets, outputs, params), whether it reads theta or not."""
    if learned_losses.declares(learned_loss_fn, "params"):
        return lambda targets, outputs, params: learned_loss_fn(phi_params, targets, outputs, params=params)  # pyright: ignore[reportCallIssue]
    return lambda targets, outputs, _: learned_loss_fn(phi_params, targets, outputs)


def inner_and_outer_keys(rng_key: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
    """Keys of the inner and of the outer pass; None for both without a key."""
    if rng_key is None:
        return None, None
    inner_key, outer_key = jax.random.split(rng_key)
    return inner_key, outer_key


def keys_of_steps(inner_key: jax.Array | None, num_steps: int) -> jax.Array | None:
    """Keys `[K]` of the inner steps; None without a key."""
    return None if inner_key is None else jax.random.split(inner_key, num_steps)
