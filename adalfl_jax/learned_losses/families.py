"""Families of learned losses by the name of their class: those of this package, and those that a user registers."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from adalfl_jax.arguments import why_not_called
from adalfl_jax.learned_losses.keywords import declares
from adalfl_jax.learned_losses.network import LossNetwork
from adalfl_jax.learned_losses.rescaled import RescaledLoss
from adalfl_jax.learned_losses.scaled import ScaledTaskLoss
from adalfl_jax.learned_losses.weighting import WeightNetwork
from adalfl_jax.registry import Registry

Family = TypeVar("Family", bound=type[Any])

CONFIG_NAMES: dict[str, type] = {
    "network": LossNetwork,
    "scaled_task_loss": ScaledTaskLoss,
    "weight_network": WeightNetwork,
}  # by which configurations know ours
FAMILIES: Registry[type] = Registry(
    "family of learned losses",
    {family.__name__: family for family in (LossNetwork, RescaledLoss, ScaledTaskLoss, WeightNetwork)},
    taken=CONFIG_NAMES,
)


def configurable_families() -> dict[str, type]:
    """The families a configuration may name, those that users registered among them."""
    return CONFIG_NAMES | FAMILIES.registered


def register_learned_loss(family: Family) -> Family:
    """Makes a family of learned losses known by its name to files and to configurations, as a decorator of its class.

    A file of configuration, or a module that it imports, is a good place for it. `config.learned_loss.family` names the
    class then. A field of the class that is called as a setting of `LossNetwork`, as `hidden_sizes` and `gamma` are,
    gets the value that the configuration has for it, and `task_loss` the name of the task loss; others are set there as
    `config.learned_loss.options.NAME`. `save_learned_loss` keeps the fields as JSON.

    Args:
      family: a frozen dataclass with `init(rng_key)`, which draws phi, a pytree of floats in nested dictionaries, and
        `apply(phi_params, targets, outputs)`, M_phi, which may have an argument `progress=None` but none that is
        called `params`. One of the same name that was registered before is replaced.

    Returns:
      The class as it is.

    Raises:
      ValueError: what is no such class, or has the name of a family of this package.

    Example:
      >>> import dataclasses, jax
      >>> @register_learned_loss
      ... @dataclasses.dataclass(frozen=True)
      ... class Temperature:
      ...     start: float = 1.0
      ...
      ...     def init(self, rng_key):
      ...         return {"temperature": jax.numpy.full((), self.start)}
      ...
      ...     def apply(self, phi_params, targets, outputs):
      ...         return -jax.nn.log_softmax(outputs / phi_params["temperature"])[..., 0].mean()
    """
    name = getattr(family, "__name__", repr(family))
    if not (isinstance(family, type) and dataclasses.is_dataclass(family) and _is_frozen(family)):
        raise ValueError(f"a family of learned losses must be a frozen dataclass, @dataclass(frozen=True); got {name}")
    FAMILIES.require_free(name)
    apply: Any = getattr(family, "apply", None)
    if declares(apply, "params"):
        raise ValueError(
            f"{name}.apply declares params, and programs measure a loss by the outputs alone; use it in a loop of your "
            "own, where `make_bilevel_step` takes it"
        )
    for method, arguments in (("init", ("rng_key",)), ("apply", ("phi_params", "targets", "outputs"))):
        function: Any = getattr(family, method, None)
        reason = why_not_called(function, ("self", *arguments)) if callable(function) else "it has none"
        if reason:
            raise ValueError(f"{name}.{method} is called as {method}({', '.join(arguments)}): {reason}")
    FAMILIES[name] = family
    return family


def _is_frozen(family: type) -> bool:
    return family.__dataclass_params__.frozen  # pyright: ignore[reportAttributeAccessIssue]
