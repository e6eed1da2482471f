"""The learned learning rate: the task loss times one learned scalar."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from adalfl_jax.learned_losses.params import require_params
from adalfl_jax.task_losses import find_task_loss
from adalfl_jax.types import LossFn, PyTree


@dataclasses.dataclass(frozen=True)
class ScaledTaskLoss:
    r"""M_phi = exp(phi) L, which makes the inner learning rate exp(phi) times its setting.

    It answers whether a learned loss does more than tune the learning rate.

    Attributes:
      task_loss: L, a key of `TASK_LOSSES` or a function `(targets, outputs) -> scalar`, with which a loss cannot be
        saved.

    Raises:
      ValueError: an unknown task loss.

    References:
      Algorithms 3 and 4 of arXiv 2301.13247.
    """

    task_loss: str | LossFn = "softmax_cross_entropy"

    def __post_init__(self) -> None:
        find_task_loss(self.task_loss)

    def init(self, rng_key: jax.Array) -> PyTree:
        """phi = 0, a scale of 1, whatever the key."""
        del rng_key
        return {"log_scale": jnp.zeros(())}

    def apply(self, phi_params: PyTree, targets: jax.Array, outputs: jax.Array) -> jax.Array:
        """exp(phi) L, a scalar, of targets `[B]` or `[B, C]` and outputs `[B, C]`.

        Raises:
          ValueError: targets that do not fit the outputs, or phi of another loss.
        """
        require_params(self, ScaledTaskLoss.init, phi_params)
        task_loss = find_task_loss(self.task_loss)(targets, outputs)
        return jnp.exp(phi_params["log_scale"]).astype(task_loss.dtype) * task_loss
