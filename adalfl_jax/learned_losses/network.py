"""The paper's learned loss: a small feed-forward network applied to each output of the base model."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp

from adalfl_jax.arguments import is_count, is_number, require_flag, require_number
from adalfl_jax.learned_losses.activations import ACTIVATIONS, smooth_leaky_relu
from adalfl_jax.learned_losses.keywords import require_share
from adalfl_jax.learned_losses.params import require_params
from adalfl_jax.registry import require_known
from adalfl_jax.task_losses import to_dense, within
from adalfl_jax.types import PyTree

REDUCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "sum": lambda values: values.sum(axis=-1),
    "mean": lambda values: values.mean(axis=-1),
}

PREDICTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "probabilities": lambda outputs: jax.nn.sigmoid(outputs) if outputs.shape[-1] == 1 else jax.nn.softmax(outputs),
    "log_probabilities": lambda outputs: (
        jax.nn.log_sigmoid(outputs) if outputs.shape[-1] == 1 else jax.nn.log_softmax(outputs)
    ),
    "sigmoid": jax.nn.sigmoid,
    "raw": lambda outputs: outputs,
}


@dataclasses.dataclass(frozen=True)
class LossNetwork:
    r"""M_phi as a network l_phi on (target, prediction), one output at a time, so that it serves any C.

    .. math:: M_\phi(y, f) = \frac{1}{B} \sum_{b} \operatorname{reduce}_{c}\; l_\phi(y_{bc}, p_{bc}),
      \qquad p = \text{predictions of } f

    Holds settings only; the parameters are a pytree from `init`, given to `apply`.

    Attributes:
      hidden_sizes: units of each hidden layer.
      activation: of the hidden layers, a key of `ACTIVATIONS`.
      beta: sharpness of "smooth_leaky_relu"; other activations ignore it.
      gamma: least slope of "smooth_leaky_relu"; other activations ignore it.
      output_activation: of the last layer, a key of `ACTIVATIONS`. "softplus", as in ML3 and the authors' code, now and
        then becomes flat and stays so.
      use_bias: whether layers have biases; the authors' have none.
      reduction: over the C outputs of an example, "sum" (the authors' code) or "mean" (the paper's 1/C). They
        differ by the factor C in the learning rate of theta. In logistic regression on MNIST some draws of phi
        fail under the mean with the paper's outer rate.
      predictions: what the network sees of the outputs: "probabilities" (softmax, or the sigmoid of a single
        output) or "log_probabilities" of classes, "sigmoid" of each output where an example has several labels, or
        "raw": logits, or a regression's values, for which the others are no good.
      use_progress: whether l_phi has the share of training that is done as a third input. Its weights start at zero, so
        that a fresh loss does not depend on it.

    Raises:
      ValueError: a setting out of its range or an unknown name.

    Example:
      >>> import jax
      >>> loss = LossNetwork(hidden_sizes=(40, 40), beta=10.0, gamma=0.01)
      >>> phi_params = loss.init(jax.random.key(0))
      >>> jax.tree.map(jax.numpy.shape, phi_params)["layer_0"]
      {'kernel': (2, 40)}
      >>> loss.apply(phi_params, jax.numpy.array([0, 2]), jax.numpy.zeros((2, 3))).shape
      ()

    References:
      Section 3 of arXiv 2301.13247.
    """

    hidden_sizes: tuple[int, ...] = (40, 40)
    activation: str = "smooth_leaky_relu"
    beta: float = 10.0
    gamma: float = 0.01
    output_activation: str = "identity"
    use_bias: bool = False
    reduction: str = "sum"
    predictions: str = "probabilities"
    use_progress: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.hidden_sizes, Collection) and all(map(is_count, self.hidden_sizes))):
            raise ValueError(f"hidden_sizes must be whole numbers of at least 1; got {self.hidden_sizes!r}")
        object.__setattr__(self, "hidden_sizes", tuple(map(int, self.hidden_sizes)))
        require_number("beta", self.beta)
        if not (is_number(self.gamma) and 0 <= self.gamma < 1):
            raise ValueError(f"gamma must be a number in [0, 1); got {self.gamma!r}")
        require_flag("use_bias", self.use_bias)
        require_flag("use_progress", self.use_progress)
        require_known("activation", ACTIVATIONS, self.activation)
        require_known("output activation", ACTIVATIONS, self.output_activation)
        require_known("reduction", REDUCTIONS, self.reduction)
        require_known("kind of predictions", PREDICTIONS, self.predictions)

    def init(self, rng_key: jax.Array) -> PyTree:
        """Draws phi: Kaiming-normal kernels `[fan_in, fan_out]` and, where used, zero biases `[fan_out]`.

        The kernel of the first layer has the rows target, prediction and, where used, progress.
        """
        sizes = (2, *self.hidden_sizes, 1)
        kaiming_normal = jax.nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        params = {}
        for layer, (shape, key) in enumerate(
            zip(itertools.pairwise(sizes), jax.random.split(rng_key, len(sizes) - 1), strict=True)
        ):
            params[f"layer_{layer}"] = {"kernel": kaiming_normal(key, shape)}
            if self.use_bias:
                params[f"layer_{layer}"]["bias"] = jnp.zeros(shape[1])
        if self.use_progress:
            params["layer_0"]["kernel"] = jnp.pad(params["layer_0"]["kernel"], ((0, 1), (0, 0)))
        return params

    def apply(
        self,
        phi_params: PyTree,
        targets: jax.Array,
        outputs: jax.Array,
        *,
        progress: jax.Array | float | None = None,
    ) -> jax.Array:
        """M_phi, the mean over the batch.

        Args:
          phi_params: from `init`.
          targets: integer labels `[B]`, or `[B, C]`, in [0, 1] unless predictions are "raw". Others, as of a
            regression, are refused or, under `jax.jit` where they cannot be, make the loss nan.
          outputs: of the base model, `[B, C]`; logits of a classification.
          progress: share of training that is done, `[]` in [0, 1]; for `use_progress`.

        Returns:
          A scalar.

        Raises:
          ValueError: targets that do not fit the outputs or the predictions, phi of another network, no progress where
            it is used.
        """
        dense = to_dense(targets, outputs)
        if self.predictions != "raw" and targets.shape == outputs.shape:
            dense = within(dense, 1.0, '; of a regression a loss network takes predictions="raw"')
        values = self.elementwise(phi_params, dense, self.predictions_of(outputs), progress=progress)
        return REDUCTIONS[self.reduction](values).mean()

    def predictions_of(self, outputs: jax.Array) -> jax.Array:
        """What the network sees of the outputs `[B, C]` of the base model, `[B, C]`."""
        return PREDICTIONS[self.predictions](outputs)

    def elementwise(
        self,
        phi_params: PyTree,
        targets: jax.Array,
        predictions: jax.Array,
        *,
        progress: jax.Array | float | None = None,
    ) -> jax.Array:
        """l_phi of each pair of target and prediction, two arrays of one shape; returns that shape."""
        require_params(self, LossNetwork.init, phi_params)
        inputs = [targets, predictions]
        if self.use_progress:
            if progress is None:
                raise ValueError(
                    "use_progress needs the share of training that is done: give the loss `progress=`, or a bilevel "
                    "step BilevelBatch.progress, which a function around `apply` must declare and hand on "
                    "(functools.wraps); got None"
                )
            require_share(progress)
            inputs.append(jnp.full_like(predictions, progress))
        values = jnp.stack(inputs, axis=-1).reshape(-1, len(inputs))
        for layer, name in enumerate((*[self.activation] * len(self.hidden_sizes), self.output_activation)):
            values = values @ phi_params[f"layer_{layer}"]["kernel"]
            if self.use_bias:
                values = values + phi_params[f"layer_{layer}"]["bias"][None, :]
            values = self._activation(name)(values)
        # The rows are one axis, which CPUs are faster on; where devices share it by type, its parts have to be told.
        return jax.lax.reshape(values, predictions.shape, out_sharding=jax.typeof(predictions).sharding)

    def _activation(self, name: str) -> Callable[[jax.Array], jax.Array]:
        if name == "smooth_leaky_relu":
            return functools.partial(smooth_leaky_relu, beta=self.beta, gamma=self.gamma)
        return ACTIVATIONS[name]
