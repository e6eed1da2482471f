"""A bound on how large the gradient of a learned loss is, so that phi learns a shape and another rule has the scale."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from adalfl_jax.arguments import require_number
from adalfl_jax.learned_losses.keywords import at_progress, declares, require_family, require_progress
from adalfl_jax.norms import unit_and_squares, widen
from adalfl_jax.task_losses import find_task_loss
from adalfl_jax.types import LearnedLoss, LossFn, PyTree


@dataclasses.dataclass(frozen=True)
class RescaledLoss:
    r"""A learned loss whose gradient is at least `floor` and at most `ceiling` times as long as the task loss's.

    .. math:: \tilde M_\phi(y, f) = c\, M_\phi(y, f), \qquad
      c = \operatorname{clip}\Big(1,\ a \frac{|\nabla_f L|}{|\nabla_f M_\phi|},\
        b \frac{|\nabla_f L|}{|\nabla_f M_\phi|}\Big)

    with a the floor, b the ceiling, and lengths over all outputs of the batch. With a = b = 1 the learning rate of
    theta means what it means for the task loss, and phi has no say in it.

    c is a number for the outputs and a function for phi. As a number it leaves the direction of the gradient,

    .. math:: \nabla_f \tilde M_\phi = c\, \nabla_f M_\phi ,

    where a function would add M_phi times the gradient of c, and with it the value of M_phi, which means nothing. As a
    function it takes from the meta-gradient what phi cannot do: where a bound holds, with u the direction of
    the gradient of M_phi,

    .. math:: \partial_\phi (c \nabla_f M_\phi) = c\, (I - u u^\top)\, \partial_\phi \nabla_f M_\phi .

    So a meta-gradient through one step of theta is exact. Through several, c of each step is held while theta moves.
    Where M_phi is flat there is no direction, and c is 1; where it nearly is, c is at most about 1e30 times the floor.

    Attributes:
      loss: M, any family that reads theta through the outputs alone.
      task_loss: L, a key of `TASK_LOSSES` or a function `(targets, outputs) -> scalar`, with which a loss cannot be
        saved; taken on the targets M gets. Name that of the task: the default is for classes.
      floor: a, 0 for none.
      ceiling: b, None for none.

    Raises:
      ValueError: bounds out of their range, no learned loss, or no task loss.

    Example:
      >>> import jax, adalfl_jax
      >>> loss = RescaledLoss(adalfl_jax.LossNetwork(), floor=2.0, ceiling=2.0)
      >>> phi_params = loss.init(jax.random.key(0))
      >>> targets, outputs = jax.numpy.array([0, 2]), jax.numpy.zeros((2, 3))
      >>> ours = jax.grad(lambda f: loss.apply(phi_params, targets, f))(outputs)
      >>> task = jax.grad(lambda f: adalfl_jax.task_losses.softmax_cross_entropy(targets, f))(outputs)
      >>> round(float(jax.numpy.linalg.norm(ours) / jax.numpy.linalg.norm(task)), 4)
      2.0
    """

    loss: LearnedLoss
    task_loss: str | LossFn = "softmax_cross_entropy"
    floor: float = 0.0
    ceiling: float | None = None

    def __post_init__(self) -> None:
        require_family(self.loss)
        if declares(self.loss.apply, "params"):
            raise ValueError(f"loss must not read theta (keyword argument `params`) to be rescaled; got {self.loss!r}")
        find_task_loss(self.task_loss)
        require_number("floor", self.floor, least=0)
        if self.ceiling is not None:
            require_number("ceiling", self.ceiling)
            if self.ceiling < self.floor:
                raise ValueError(f"ceiling must be no less than floor, {self.floor}; got {self.ceiling}")

    @property
    def is_bounded(self) -> bool:
        """Whether there is a bound at all; else this is M."""
        return self.floor > 0 or self.ceiling is not None

    def init(self, rng_key: jax.Array) -> PyTree:
        """phi of the loss that is rescaled."""
        return self.loss.init(rng_key)

    def apply(
        self,
        phi_params: PyTree,
        targets: jax.Array,
        outputs: jax.Array,
        *,
        progress: jax.Array | float | None = None,
    ) -> jax.Array:
        """c M_phi, a scalar, of targets `[B]` or `[B, C]`, outputs `[B, C]` and, where M reads it, progress `[]`.

        With a bound outputs of 16 bits are taken, and the loss is returned, in float32.
        """
        require_progress(self.loss.apply, progress)
        loss_fn = functools.partial(at_progress(self.loss.apply, progress), phi_params, targets)
        if not self.is_bounded:
            return loss_fn(outputs)
        outputs = widen(outputs)  # a gradient that is small in 16 bits has lost too much to be rescaled
        loss = loss_fn(outputs)
        return self._factor(loss_fn, targets, jax.lax.stop_gradient(outputs)).astype(loss.dtype) * loss

    def _factor(self, loss_fn: Callable[[jax.Array], jax.Array], targets: jax.Array, outputs: jax.Array) -> jax.Array:
        (unit, squares), (task_unit, task_squares) = (
            unit_and_squares(jax.grad(fn)(outputs))
            for fn in (loss_fn, lambda outputs: find_task_loss(self.task_loss)(targets, outputs))
        )
        has_direction = squares > 0
        longest = float(jnp.finfo(unit.dtype).max) ** 0.8  # or what follows overflows, and derivatives are none
        units = jnp.minimum(task_unit / unit, longest)
        ratio = units * jnp.sqrt(task_squares) / jnp.sqrt(jnp.where(has_direction, squares, 1))
        if self.floor == self.ceiling:  # the derivative of a clip would be halved where both bounds are met
            return jnp.where(has_direction, self.floor * ratio, 1)
        ceiling = None if self.ceiling is None else self.ceiling * ratio
        return jnp.where(has_direction, jnp.clip(jnp.ones_like(ratio), self.floor * ratio, ceiling), 1)
