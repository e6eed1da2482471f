r"""Gradients of the outer task loss with respect to phi, through the inner update of theta.

One bilevel problem, with the task loss L, the learned loss M_phi and the inner optimiser's update u:

    theta'(phi) = theta + u(g(phi)),    g(phi) = d M_phi(y, f_theta(x)) / d theta,    find  d L(theta'(phi)) / d phi.

Every estimator has one signature (`Estimator`) and returns theta' with the gradient, so that a step pays for the inner
update once. `docs/meta_gradients.md` compares them: equation, cost, memory, bias and source of each.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from adalfl_jax.hypergradient.evolution import EvolutionStrategies as EvolutionStrategies
from adalfl_jax.hypergradient.evolution import PersistentEvolutionStrategies as PersistentEvolutionStrategies
from adalfl_jax.hypergradient.implicit import ConjugateGradient as ConjugateGradient
from adalfl_jax.hypergradient.implicit import Neumann as Neumann
from adalfl_jax.hypergradient.one_step import CentralDifference as CentralDifference
from adalfl_jax.hypergradient.one_step import FiniteDifference as FiniteDifference
from adalfl_jax.hypergradient.one_step import Forward as Forward
from adalfl_jax.hypergradient.one_step import OneStep as OneStep
from adalfl_jax.hypergradient.one_step import Recompute as Recompute
from adalfl_jax.hypergradient.pipelined import make_pipelined_step as make_pipelined_step
from adalfl_jax.hypergradient.problem import BilevelProblem as BilevelProblem
from adalfl_jax.hypergradient.problem import Estimator as Estimator
from adalfl_jax.hypergradient.problem import Hypergradient as Hypergradient
from adalfl_jax.hypergradient.problem import descend as descend
from adalfl_jax.hypergradient.problem import inner_and_outer_keys as inner_and_outer_keys
from adalfl_jax.hypergradient.problem import inner_step as inner_step
from adalfl_jax.hypergradient.problem import num_inner_steps as num_inner_steps
from adalfl_jax.hypergradient.problem import outer_objective as outer_objective
from adalfl_jax.hypergradient.truncated import Truncated as Truncated
from adalfl_jax.hypergradient.unrolled import Checkpointed as Checkpointed
from adalfl_jax.hypergradient.unrolled import MixedMode as MixedMode
from adalfl_jax.hypergradient.unrolled import Unrolled as Unrolled
from adalfl_jax.registry import lookup, require_known

ESTIMATORS: dict[str, Estimator] = {
    estimator.name: estimator
    for estimator in (
        Forward(),
        Recompute(),
        FiniteDifference(),
        CentralDifference(),
        Unrolled(),
        Checkpointed(),
        MixedMode(),
        Truncated(),
        Neumann(),
        ConjugateGradient(),
        EvolutionStrategies(),
        PersistentEvolutionStrategies(),
    )
}  # with their default settings


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
    return tuple(field.name for field in dataclasses.fields(ESTIMATORS[name]))  # pyright: ignore[reportArgumentType]


def estimator_name(estimator: Estimator) -> str:
    """What an estimator is called; one of a user's own may have a `name`."""
    return getattr(estimator, "name", repr(estimator))
