"""The learned loss that is added to the task loss."""

import jax
import jax.numpy as jnp
import numpy as np

from adalfl_jax.task_losses import softmax_cross_entropy
from experiments.study.residual import ResidualLoss

TARGETS, OUTPUTS = jnp.array([0, 2]), jnp.array([[1.0, 0.5, -1.0], [0.0, 2.0, 1.0]])


def test_it_begins_as_the_task_loss_and_learns():
    loss = ResidualLoss("softmax_cross_entropy", (4,), "sum")
    value, gradient = jax.value_and_grad(loss.apply)(loss.init(jax.random.key(0)), TARGETS, OUTPUTS)
    assert value == softmax_cross_entropy(TARGETS, OUTPUTS)
    assert np.abs(gradient["layer_1"]["kernel"]).max() > 0
