"""What the makers of steps require of their arguments, and the steps of theirs."""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Callable, Sequence
from numbers import Number
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adalfl_jax.arguments import (
    is_number,
    require_count,
    require_flag,
    require_function,
    shorten,
    signature_of,
    why_not_called,
)
from adalfl_jax.hypergradient import (
    ONE_STEP,
    Estimator,
    OneStep,
    estimator_name,
)
from adalfl_jax.learned_losses import FrozenLoss, RescaledLoss, declares, wrapped_functions
from adalfl_jax.types import ApplyFn, Batch, BilevelBatch, LearnedLossFn, Phi, PyTree, Theta

# What the arguments of losses are called elsewhere, where outputs often come first.
TARGET_NAMES = {"label", "labels", "target", "targets", "y", "y_true"}
OUTPUT_NAMES = {"logit", "logits", "output", "outputs", "pred", "preds", "prediction", "predictions", "y_hat", "y_pred"}


def require_options(
    estimator: Estimator,
    learned_loss_fn: LearnedLossFn,
    shares: tuple[float, float],
    outer_every: int,
    pipelined: bool,
) -> None:
    """Raises ValueError for options out of their range, or that do not fit each other, the estimator or the loss.

    Args:
      estimator: of the meta-gradient.
      learned_loss_fn: M_phi.
      shares: of the inner and of the outer batch, as `meta_batch_shares` returns them.
      outer_every: n, at least 1.
      pipelined: True or False.
    """
    if isinstance(estimator, type) or not callable(estimator):
        raise ValueError(f"hypergradient must be a name or an estimator, as `make_estimator` makes; got {estimator!r}")
    name = estimator_name(estimator)
    is_one_step = isinstance(estimator, OneStep)
    if is_one_step and declares(learned_loss_fn, "params"):
        raise ValueError(
            f"hypergradient={name!r} needs a learned loss that depends on theta only through the "
            'outputs, and this one reads it (keyword argument `params`); build the step with hypergradient="unrolled"'
        )
    require_count("outer_every", outer_every)
    require_flag("pipelined", pipelined)
    inner, outer = shares
    if inner < 1 and _has_bounds(learned_loss_fn):
        raise ValueError(
            "meta_batch_fraction of the inner batch is for learned losses that are means over examples, and the bounds "
            "of a RescaledLoss are of the whole batch, which the meta-gradient on a part would be biased by; take a "
            f"part of the outer batch alone: (1.0, {outer})"
        )
    if outer_every > 1 and getattr(estimator, "remembers", False):
        raise ValueError(
            f"hypergradient={name!r} has to see every step of theta, and outer_every = "
            f"{outer_every} skips some; set outer_every to 1, or take another estimator"
        )
    for option, is_set in (("meta_batch_fraction of the inner batch", inner < 1), ("pipelined", pipelined)):
        if is_set and not is_one_step:
            raise ValueError(
                f"{option} is for one of the hypergradients {', '.join(map(repr, ONE_STEP))}; got {name!r}"
                + ("" if pipelined else f", which takes a part of the outer batch alone: (1.0, {outer})")
            )
    if pipelined and (min(inner, outer) < 1 or outer_every > 1):
        raise ValueError(
            "pipelined shares the forward pass of the whole batch at every step, so it goes with neither "
            f"meta_batch_fraction nor outer_every; got {shares} and {outer_every}"
        )


def meta_batch_shares(given: float | tuple[float, float]) -> tuple[float, float]:
    """Returns the shares of the inner and of the outer batch; raises ValueError where they are none in (0, 1]."""
    shares = given if isinstance(given, Sequence) else (given, given)
    if len(shares) != 2 or not all(map(is_number, shares)) or not all(0 < share <= 1 for share in shares):
        raise ValueError(f"meta_batch_fraction must be a number in (0, 1], or two: of inner and outer; got {given!r}")
    return shares[0], shares[1]


def require_model(apply_fn: ApplyFn) -> None:
    """Raises ValueError for what cannot be called as a base model."""
    require_function("apply_fn", apply_fn)
    require_call("apply_fn", apply_fn, ("params", "model_state", "inputs"), ("train", "rng_key"))


def require_learned_loss(learned_loss_fn: LearnedLossFn) -> None:
    """Raises ValueError for what cannot be called as a learned loss, or whose phi cannot be learned."""
    name = "learned_loss_fn"
    if isinstance(learned_loss_fn, FrozenLoss):
        raise ValueError(
            f"{name} is a FrozenLoss, whose phi stays as it is; to learn it further give its `loss.apply`, and "
            "start from Phi.create(frozen.params, outer_optimizer)"
        )
    require_loss(name, learned_loss_fn, "phi_params", "targets", "outputs", optional=("params", "progress"))


def require_loss(name: str, loss_fn: Callable[..., Any], *arguments: str, optional: Sequence[str] = ()) -> None:
    """Raises ValueError for what cannot be called as a loss, or names its arguments in optax's order.

    Args:
      name: of the function.
      loss_fn: the function.
      *arguments: names of those it is given by position, the last two of them targets and outputs.
      optional: names of those it is given by keyword where it declares them.
    """
    if isinstance(loss_fn, str):
        raise ValueError(f"{name} must be a function; got {reprlib.repr(loss_fn)}; adalfl_jax.task_losses has some")
    require_function(name, loss_fn)
    require_call(name, loss_fn, arguments, [keyword for keyword in optional if declares(loss_fn, keyword)], optional)
    names = _parameters(loss_fn)[: len(arguments)]
    if len(names) < len(arguments):  # it does not name them all
        return
    *_, first, second = names
    if first.lower() in OUTPUT_NAMES and second.lower() in TARGET_NAMES:
        raise ValueError(
            f"{name} is called as {name}({', '.join(arguments)}), and its arguments are named the other way round, "
            f"{first} before {second}, as optax's losses have them: swap them, or "
            "rename them where the order does not matter"
        )


def require_mean(name: str, loss_fn: Callable[..., Any], axis_name: str | None) -> None:
    """Raises ValueError for a loss with bounds, which is no mean over examples, where each device has a part of those.

    What is a function of a user's own, a lambda around such a loss too, is taken at its word.
    """
    if axis_name is not None and _has_bounds(loss_fn):
        raise ValueError(
            f"{name} is a RescaledLoss, whose bounds are of the whole batch, and with axis_name={axis_name!r} each "
            "device has a part; leave axis_name out, and divide the batch by shardings under jax.jit"
        )


def _has_bounds(loss_fn: Callable[..., Any]) -> bool:
    """Whether this is a `RescaledLoss`, as far as that can be seen from outside."""
    owners = (
        function.loss if isinstance(function, FrozenLoss) else getattr(function, "__self__", None)
        for function in wrapped_functions(loss_fn)
    )
    return any(isinstance(owner, RescaledLoss) and owner.is_bounded for owner in owners)


def _parameters(function: Callable[..., Any]) -> list[str]:
    """Names of a function's parameters; none where it has no signature."""
    signature = signature_of(function)
    return [] if signature is None else list(signature.parameters)


def require_call(
    name: str,
    function: Callable[..., Any],
    arguments: Sequence[str],
    keywords: Sequence[str],
    optional: Sequence[str] = (),
) -> None:
    """Raises ValueError for a function that cannot be called with so many arguments and these keywords."""
    if reason := why_not_called(function, arguments, keywords):
        call = ", ".join((*arguments, *(f"{keyword}={keyword}" for keyword in keywords)))
        further = _parameters(function)[len(arguments) :]
        unheard = [keyword for keyword in optional if keyword in further and keyword not in keywords]
        remedy = f"; declare {' and '.join(unheard)} behind a `*`, to be given it by keyword" if unheard else ""
        raise ValueError(f"{name} is called as {name}({call}), and takes {signature_of(function)}: {reason}{remedy}")


def returning_state(apply_fn: ApplyFn) -> ApplyFn:
    """The model, made to raise ValueError where it does not return outputs and state."""

    def apply(
        params: PyTree, model_state: PyTree, inputs: jax.Array, /, *, train: bool, rng_key: jax.Array | None
    ) -> tuple[jax.Array, PyTree]:
        returned = apply_fn(params, model_state, inputs, train=train, rng_key=rng_key)
        if not (isinstance(returned, tuple | list) and len(returned) == 2):
            raise ValueError(
                "apply_fn must return two things, (outputs [B, C], model_state); a model without state returns the one "
                f"it was given. Got {jax.tree.map(jax.typeof, returned)}"
            )
        outputs = jax.tree.leaves(returned[0])
        if not (outputs and all(hasattr(array, "ndim") for array in outputs)):
            raise ValueError(
                "apply_fn must return its outputs as an array, [B, C] for the losses of this package, or as a pytree; "
                f"got {returned[0]!r}"
            )
        if not all(jnp.issubdtype(array.dtype, jnp.inexact) for array in outputs):
            raise ValueError(
                "outputs of apply_fn must be floats, which have gradients; leave others out, or return them in "
                f"model_state. Got {jax.tree.map(jax.typeof, returned[0])}"
            )
        return returned[0], returned[1]

    return apply


def returning_scalar(name: str, loss_fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The loss, made to raise ValueError where it does not return one number; its own errors note what it was given."""

    @functools.wraps(loss_fn)  # with the keyword arguments that the loss declares
    def loss(*arguments: Any, **keywords: Any) -> jax.Array:
        try:
            value = loss_fn(*arguments, **keywords)
        except Exception as error:
            given = [jax.tree.map(_kind, each) for each in arguments[-2:]]
            error.add_note(f"{name} was given targets and then outputs: {' and '.join(map(str, given))}.")
            raise
        if jax.tree.map(jnp.shape, value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.inexact):
            raise ValueError(
                f"{name} must return one float, the mean over the batch say; got {jax.tree.map(jax.typeof, value)}"
            )
        return value

    return loss


def _kind(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "dtype") else type(leaf).__name__


def require_theta(theta: Theta, optimizer_name: str, optimizer: optax.GradientTransformation) -> None:
    """Raises ValueError unless given a Theta, of parameters with usable gradients and the state of this optimiser."""
    _require_kind("theta", theta, Theta)
    require_floats("theta.params", theta.params, ", or move it to theta.model_state")
    _require_opt_state("theta", theta, optimizer_name, optimizer)


def require_phi(phi: Phi, outer_optimizer: optax.GradientTransformation) -> None:
    """Raises ValueError unless given a Phi, of parameters with usable gradients and the state of this optimiser."""
    _require_kind("phi", phi, Phi)
    require_floats("phi.params", phi.params)
    _require_opt_state("phi", phi, "outer_optimizer", outer_optimizer)


def require_bilevel_batch(batch: BilevelBatch, parts: Sequence[str]) -> None:
    """Raises ValueError unless given a BilevelBatch, whose parts are arrays and whose key, if any, is one."""
    _require_kind("batch", batch, BilevelBatch)
    for part in parts:
        require_batch(f"batch.{part}", getattr(batch, part))
    if batch.rng_key is not None:
        require_key("batch.rng_key", batch.rng_key)


def require_batch(name: str, batch: Batch | tuple[PyTree, PyTree]) -> None:
    """Raises ValueError unless given two things, inputs and targets, each an array or a pytree of arrays."""
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        raise _no_batch(name, batch)
    inputs, targets = map(jax.tree.leaves, batch)
    if not (inputs and targets and all(hasattr(array, "ndim") for array in (*inputs, *targets))):
        raise _no_batch(name, batch)


def require_key(name: str, rng_key: jax.Array) -> None:
    """Raises ValueError unless given one key, typed or raw."""
    try:
        jax.eval_shape(jax.random.split, rng_key)
    except (TypeError, ValueError) as error:
        got = jax.typeof(rng_key) if hasattr(rng_key, "dtype") else repr(rng_key)
        raise ValueError(f"{name} must be one key, as jax.random.key(0) makes; got {got}") from error


def _require_kind(name: str, given: Any, kind: type) -> None:
    if not isinstance(given, kind):
        raise ValueError(f"{name} must be an adalfl_jax.{kind.__name__}; got a {type(given).__name__}")


def require_floats(name: str, params: PyTree, remedy: str = "") -> None:
    """Raises ValueError for parameters without usable gradients; `remedy` is another than making them floats."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        is_number = isinstance(leaf, Number) or hasattr(leaf, "dtype")
        kind = jnp.result_type(leaf) if is_number else type(leaf).__name__
        if not (is_number and jnp.issubdtype(kind, jnp.inexact)):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} is {kind}, which has no gradient; make it floats{remedy}"
            )
        if kind == jnp.float16:
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} is float16, which has too little range for gradients and their "
                "derivatives; keep it in float32 or bfloat16"
            )


def _require_opt_state(
    name: str, moved: Theta | Phi, optimizer_name: str, optimizer: optax.GradientTransformation
) -> None:
    states = moved.opt_state, jax.eval_shape(optimizer.init, moved.params)
    given, expected = map(jax.tree.structure, states)
    if given == expected:
        given, expected = ([jnp.shape(leaf) for leaf in jax.tree.leaves(state)] for state in states)
    elif _names(states[0]) != _names(states[1]):
        given, expected = map(_names, states)
    if given != expected:
        raise ValueError(
            f"{name}.opt_state is not that of the step's {optimizer_name} and these parameters; make it with "
            f"{type(moved).__name__}.create(..., {optimizer_name}). Expected {shorten(expected)}; got {shorten(given)}"
        )


def _names(state: optax.OptState) -> str:
    """What the parts of an optimiser's state are called: "(TraceState, EmptyState)"."""
    if isinstance(state, tuple) and not hasattr(state, "_fields"):
        return f"({', '.join(map(_names, state))})"
    return type(state).__name__


def _no_batch(name: str, batch: Any) -> ValueError:
    kinds = f" of {', '.join(type(item).__name__ for item in batch)}" if isinstance(batch, tuple | list) else ""
    return ValueError(
        f"{name} must be two arrays, (inputs [B, ...], targets [B] or [B, C]), or pytrees of such; got a "
        f"{type(batch).__name__}{kinds}"
    )
