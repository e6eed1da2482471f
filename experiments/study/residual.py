"""A learned loss that begins as the task loss, exactly, and learns what to add to it."""

from __future__ import annotations

import dataclasses

import jax

from adalfl_jax import LossNetwork, register_learned_loss
from adalfl_jax.task_losses import find_task_loss
from adalfl_jax.types import PyTree


@register_learned_loss
@dataclasses.dataclass(frozen=True)
class ResidualLoss:
    """M_phi = L + a loss network whose last layer starts at zero."""

    task_loss: str
    hidden_sizes: tuple[int, ...]
    reduction: str

    def init(self, rng_key: jax.Array) -> PyTree:
        """A drawn network that adds nothing yet."""
        params = self._network.init(rng_key)
        last = f"layer_{len(self.hidden_sizes)}"
        return params | {last: {"kernel": 0 * params[last]["kernel"]}}

    def apply(self, phi_params: PyTree, targets: jax.Array, outputs: jax.Array) -> jax.Array:
        """The sum, a scalar."""
        task_loss = find_task_loss(self.task_loss)
        return task_loss(targets, outputs) + self._network.apply(phi_params, targets, outputs)

    @property
    def _network(self) -> LossNetwork:
        return LossNetwork(self.hidden_sizes, reduction=self.reduction)
