r"""Gradients of the outer task loss with respect to phi, through the inner update of theta.

One bilevel problem, with the task loss L, the learned loss M_phi and the inner optimiser's update u:

    theta'(phi) = theta + u(g(phi)),    g(phi) = d M_phi(y, f_theta(x)) / d theta,    find  d L(theta'(phi)) / d phi.

Every estimator has one signature (`Estimator`) and returns theta' with the gradient, so that a step pays for the inner
update once. `docs/meta_gradients.md` compares them: equation, cost, memory, bias and source of each.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from adalfl_jax.hypergradient.evolution import EvolutionStrategies, PersistentEvolutionStrategies
from adalfl_jax.hypergradient.implicit import ConjugateGradient, Neumann
from adalfl_jax.hypergradient.one_step import (
    CentralDifference,
    FiniteDifference,
    Forward,
    OneStep,
    Recompute,
)
from adalfl_jax.hypergradient.pipelined import make_pipelined_step
from adalfl_jax.hypergradient.problem import (
    BilevelProblem,
    Estimator,
    Hypergradient,
    descend,
    num_inner_steps,
)
from adalfl_jax.hypergradient.truncated import Truncated
from adalfl_jax.hypergradient.unrolled import checkpointed, mixed_mode, unrolled
from adalfl_jax.hypergradient.update import differentiable_update
from adalfl_jax.registry import lookup, require_known

ESTIMATORS: dict[str, Estimator] = {
    "forward": Forward(),
    "recompute": Recompute(),
    "finite_difference": FiniteDifference(),
    "central_difference": CentralDifference(),
    "unrolled": unrolled,
    "checkpointed": checkpointed,
    "mixed_mode": mixed_mode,
    "truncated": Truncated(),
    "neumann": Neumann(),
    "conjugate_gradient": ConjugateGradient(),
    "evolution_strategies": EvolutionStrategies(),
    "persistent_evolution_strategies": PersistentEvolutionStrategies(),
}  # name -> the estimator with its default settings


def _with(attribute: str) -> tuple[str, ...]:
    return tuple(name for name, estimator in ESTIMATORS.items() if getattr(estimator, attribute, False))


ONE_STEP = tuple(name for name, estimator in ESTIMATORS.items() if isinstance(estimator, OneStep))
ONE_INNER_STEP = _with("is_of_one_inner_step")  # take no leading axis K
DIFFERENCES = _with("takes_differences")  # take no model that computes in 16 bits
REMEMBERING = _with("remembers")  # see every step of one theta


def make_estimator(name: str, **settings: Any) -> Estimator:
    """The named estimator with some of its settings changed.

    Args:
      name: a key of `ESTIMATORS`.
      **settings: fields of `Truncated`, `Neumann`, `ConjugateGradient`, `EvolutionStrategies` or
        `PersistentEvolutionStrategies`; the others have none.

    Raises:
      ValueError: an unknown name or setting, or a value out of its range.

    Example:
      >>> make_estimator("neumann", num_iterations=20).num_iterations
      20
    """
    estimator = lookup("hypergradient", ESTIMATORS, name)
    if settings and not estimator_settings(name):
        raise ValueError(f"hypergradient {name!r} has no settings; got {', '.join(settings)}")
    for setting in settings:
        require_known(f"setting of {name!r}", estimator_settings(name), setting)
    return dataclasses.replace(estimator, **settings) if settings else estimator  # pyright: ignore[reportArgumentType]


def estimator_settings(name: str) -> tuple[str, ...]:
    """The names of an estimator's settings."""
    estimator = ESTIMATORS[name]
    return tuple(field.name for field in dataclasses.fields(estimator)) if dataclasses.is_dataclass(estimator) else ()


def estimator_name(estimator: Estimator) -> str:
    """The key of `ESTIMATORS` an estimator goes by, or what it calls itself."""
    for name, known in ESTIMATORS.items():
        if known is estimator or (dataclasses.is_dataclass(known) and isinstance(estimator, type(known))):
            return name
    return getattr(estimator, "name", repr(estimator))


__all__ = [
    "DIFFERENCES",
    "ESTIMATORS",
    "ONE_INNER_STEP",
    "ONE_STEP",
    "REMEMBERING",
    "BilevelProblem",
    "CentralDifference",
    "ConjugateGradient",
    "Estimator",
    "EvolutionStrategies",
    "FiniteDifference",
    "Forward",
    "Hypergradient",
    "Neumann",
    "OneStep",
    "PersistentEvolutionStrategies",
    "Recompute",
    "Truncated",
    "descend",
    "differentiable_update",
    "estimator_name",
    "estimator_settings",
    "make_estimator",
    "make_pipelined_step",
    "num_inner_steps",
]
