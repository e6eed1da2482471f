"""Meta-Weight-Net: cross-entropy in which a small network weights each example by its loss."""

from __future__ import annotations

import dataclasses
import itertools

import jax

from adalfl_jax.arguments import require_count
from adalfl_jax.learned_losses.params import require_params
from adalfl_jax.task_losses import example_cross_entropy
from adalfl_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class WeightNetwork:
    r"""M_phi, the cross-entropy of the examples weighted by a network w_phi of one input and one hidden layer.

    .. math:: M_\phi = \frac{1}{B} \sum_b w_\phi(\ell_b)\, \ell_b, \qquad
      \nabla_\theta M_\phi = \frac{1}{B} \sum_b w_\phi(\ell_b)\, \nabla_\theta \ell_b

    The input of w_phi is held constant: theta moves along weighted gradients and does not try to change the weights.
    The derivatives of this gradient, which meta-gradients through several steps need, do know that w_phi depends on
    theta. They are those of the potential whose slope in l is w_phi(l), so that Hessians are symmetric.

    Holds settings only; the parameters are a pytree from `init`, given to `apply`.

    Attributes:
      hidden_size: units of the hidden layer, which are ReLUs; the output is a sigmoid.

    Raises:
      ValueError: no positive number of units.

    Example:
      >>> import jax
      >>> loss = WeightNetwork(hidden_size=100)
      >>> phi_params = loss.init(jax.random.key(0))
      >>> loss.weights(phi_params, jax.numpy.array([0.1, 2.3])).shape
      (2,)

    References:
      Shu et al., "Meta-Weight-Net: Learning an Explicit Mapping For Sample Weighting", arXiv 1902.07379.
    """

    hidden_size: int = 100

    def __post_init__(self) -> None:
        require_count("hidden_size", self.hidden_size)

    def init(self, rng_key: jax.Array) -> PyTree:
        """Draws phi as PyTorch draws layers: kernels `[fan_in, fan_out]` and biases uniform in +-1/sqrt(fan_in).

        Biases at random spread the bends of the hidden units; the weights of small losses start near 1/2.
        """
        params: dict[str, dict[str, jax.Array]] = {}
        keys = jax.random.split(rng_key, 4)
        for layer, (fan_in, fan_out) in enumerate(itertools.pairwise((1, self.hidden_size, 1))):
            for name, shape, key in (("kernel", (fan_in, fan_out), 2 * layer), ("bias", (fan_out,), 2 * layer + 1)):
                bound = fan_in**-0.5
                values = jax.random.uniform(keys[key], shape, minval=-bound, maxval=bound)
                params.setdefault(f"layer_{layer}", {})[name] = values
        return params

    def weights(self, phi_params: PyTree, example_losses: jax.Array) -> jax.Array:
        """w_phi, in (0, 1), of the cross-entropies `[B]`; returns `[B]`."""
        require_params(self, WeightNetwork.init, phi_params)
        return _weights(phi_params, example_losses)

    def apply(self, phi_params: PyTree, targets: jax.Array, outputs: jax.Array) -> jax.Array:
        """M_phi, the mean over the batch.

        Args:
          phi_params: from `init`.
          targets: labels `[B]` or distributions `[B, C]`.
          outputs: logits of the base model, `[B, C]`.

        Returns:
          A scalar.

        Raises:
          ValueError: targets that do not fit the outputs, a single output, or phi of another network.
        """
        require_params(self, WeightNetwork.init, phi_params)
        return _weigh(phi_params, example_cross_entropy(targets, outputs)).mean()


def _weights(phi_params: PyTree, example_losses: jax.Array) -> jax.Array:
    hidden, output = phi_params["layer_0"], phi_params["layer_1"]
    values = jax.nn.relu(example_losses[:, None] @ hidden["kernel"] + hidden["bias"][None, :])
    return jax.nn.sigmoid(values @ output["kernel"] + output["bias"][None, :])[:, 0]


@jax.custom_jvp
def _weigh(phi_params: PyTree, example_losses: jax.Array) -> jax.Array:
    """w l of each example; w is held constant where l is differentiated, in the first derivative alone."""
    return _weights(phi_params, example_losses) * example_losses


@_weigh.defjvp
def _weigh_jvp(primals: tuple[PyTree, jax.Array], tangents: tuple[PyTree, jax.Array]) -> tuple[jax.Array, jax.Array]:
    # With stop_gradient inside M_phi every derivative would be cut, also that of w in the update's own derivative.
    (phi_params, example_losses), (phi_tangent, losses_tangent) = primals, tangents
    held = jax.lax.stop_gradient(example_losses)
    _, weights_tangent = jax.jvp(lambda phi_params: _weights(phi_params, held), (phi_params,), (phi_tangent,))
    along_losses = _weights(phi_params, example_losses) * losses_tangent
    return _weigh(phi_params, example_losses), along_losses + weights_tangent * example_losses
