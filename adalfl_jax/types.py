"""The pytrees that a bilevel step takes and returns, and the types of the functions a user brings.

Letters used in every shape: `B` examples in a batch, `C` outputs of the base model, `K` inner steps of one unroll.
"""

from __future__ import annotations

from numbers import Number
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from adalfl_jax.arguments import refuse_model_or_loss, require_optimizer

PyTree = Any


class Batch(NamedTuple):
    """Examples and their targets; a plain `(inputs, targets)` tuple does as well."""

    inputs: PyTree  # an array [B, ...], or a pytree of such
    targets: PyTree  # [B] integer labels, or [B, C] one-hot, soft or real-valued; or a pytree, for losses of your own


class BilevelBatch(NamedTuple):
    """What one bilevel step consumes.

    For a K-step unroll every array of `inner` carries a leading axis K, and `outer` does not.
    """

    inner: Batch | tuple[PyTree, PyTree]  # the batch of the update of theta on M_phi
    outer: Batch | tuple[PyTree, PyTree]  # the batch the task loss is taken on at the new theta
    rng_key: jax.Array | None = None  # for dropout and the like; None for a deterministic model
    step: jax.Array | int | None = None  # [] number of the step, from 0; read by `outer_every` alone
    progress: jax.Array | float | None = None  # [] t / T, the same for all K steps; for a learned loss that reads it


class Theta(NamedTuple):
    """The base model while it trains."""

    params: PyTree
    model_state: PyTree  # what the model carries beside its parameters: batch-norm statistics
    opt_state: optax.OptState

    @classmethod
    def create(cls, params: PyTree, model_state: PyTree, inner_optimizer: optax.GradientTransformation) -> Theta:
        """Pairs fresh parameters with the state `inner_optimizer` starts from.

        Raises:
          ValueError: `inner_optimizer` is no optimiser, or `params` are what makes them.
        """
        refuse_model_or_loss("params", params, made_by="model.init(rng_key)[0]")
        require_optimizer("inner_optimizer", inner_optimizer)
        params = _strongly_typed(params)
        model_state, opt_state = _strongly_typed((model_state, inner_optimizer.init(params)))
        return cls(params, model_state, _apart_from(params, opt_state))


class Phi(NamedTuple):
    """The learned loss while it trains."""

    params: PyTree
    opt_state: optax.OptState
    carry: PyTree = ()  # what the step remembers of the steps before, () for most; see `adalfl_jax.prime`

    @classmethod
    def create(cls, params: PyTree, outer_optimizer: optax.GradientTransformation) -> Phi:
        """Pairs the parameters of a learned loss with the state `outer_optimizer` starts from.

        Raises:
          ValueError: `outer_optimizer` is no optimiser, or `params` are what makes them.
        """
        refuse_model_or_loss("params", params, made_by="loss.init(rng_key)")
        require_optimizer("outer_optimizer", outer_optimizer)
        params = _strongly_typed(params)
        return cls(params, _apart_from(params, _strongly_typed(outer_optimizer.init(params))))


def _strongly_typed(tree: PyTree) -> PyTree:
    """Arrays as a step returns them: the weak type of `jnp.array(-2.0)` would have it compiled twice."""

    def convert(leaf: Any) -> Any:
        is_weak = isinstance(leaf, Number) or getattr(leaf, "weak_type", False)
        return jnp.asarray(leaf, jnp.result_type(leaf)) if is_weak else leaf

    return jax.tree.map(convert, tree)


def _apart_from(params: PyTree, opt_state: optax.OptState) -> optax.OptState:
    """The state, with copies of parameters that it holds, as DoG's does: no array may be donated twice."""
    held = {id(leaf) for leaf in jax.tree.leaves(params)}
    return jax.tree.map(lambda leaf: jnp.copy(leaf) if id(leaf) in held else leaf, opt_state)


class BilevelMetrics(NamedTuple):
    """Scalars measured by one bilevel step."""

    inner_loss: jax.Array  # [] M_phi at theta_t on the inner batch; the mean of the K values in a K-step unroll
    outer_loss: jax.Array  # [] task loss at theta_{t+1}, outer batch; or (see the options) at theta_t, inner batch
    hypergradient_norm: jax.Array  # [] Euclidean norm of d outer_loss / d phi; 0 where a step leaves phi alone


class TaskMetrics(NamedTuple):
    """Scalars measured by one step on a fixed loss."""

    loss: jax.Array  # [] the loss at theta_t


class InitFn(Protocol):
    """Draws fresh parameters and model state of the base model."""

    def __call__(self, rng_key: jax.Array, /) -> tuple[PyTree, PyTree]: ...


class ApplyFn(Protocol):
    """The base model f_theta: inputs `[B, ...]` to outputs `[B, C]`, or pytrees of such, and the updated state."""

    def __call__(
        self, params: PyTree, model_state: PyTree, inputs: PyTree, /, *, train: bool, rng_key: jax.Array | None
    ) -> tuple[PyTree, PyTree]: ...


class LossFn(Protocol):
    """A fixed loss or a metric: a scalar from targets `[B]` or `[B, C]` and outputs `[B, C]`.

    One of your own may take pytrees, as the batch and the base model have them.
    """

    def __call__(self, targets: Any, outputs: Any, /) -> jax.Array: ...


class LearnedLossFn(Protocol):
    """M_phi: a scalar from phi, targets `[B]` or `[B, C]` and outputs `[B, C]`; or pytrees, for one of your own.

    A loss that reads theta itself, a learned regulariser say, declares a keyword argument `params` and receives
    the parameters of the base model there. The one-step estimators cannot differentiate it, all others can. A loss that
    reads how far training is declares `progress` in the same way and receives `batch.progress`.
    """

    def __call__(self, phi_params: PyTree, targets: Any, outputs: Any, /) -> jax.Array: ...


class LearnedLoss(Protocol):
    """A family of learned losses: `init` draws phi, `apply` is M_phi."""

    def init(self, rng_key: jax.Array) -> PyTree: ...

    def apply(self, phi_params: PyTree, targets: jax.Array, outputs: jax.Array) -> jax.Array: ...
