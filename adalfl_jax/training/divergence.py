"""Numbers that are not finite: which came first, and which settings may help."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np

from adalfl_jax.training.config import TrainConfig
from adalfl_jax.training.faults import all_finite
from adalfl_jax.training.methods import OFFLINE, find_method, phase_of
from adalfl_jax.training.results import Scalars
from adalfl_jax.training.sharding import to_host
from adalfl_jax.training.state import RunState, without_carry

NO_STEP = "theta, phi or a measure of them is not finite before the first step: look at the data and learned_loss.start"

_is_finite = jax.jit(jax.vmap(all_finite))  # of each seed, so that a state stays on its devices


class DivergenceError(RuntimeError):
    """A number that is not finite ended a run.

    Attributes:
      method: which method, or "offline" for the offline phase.
      phase: "offline" or "training".
      metric: the first quantity that is not finite: a metric of the step, "theta" or "phi".
      step: the step, counted from 1, at which it was found.
      seed: of the model it happened to.
      state: the last finite state, of all seeds.
      state_step: the step that state was reached at.
      seconds: that the stage took till then, in all processes that worked on it.

    Its message has a remedy: the settings of the config that may help.
    """

    def __init__(
        self, method: str, metric: str, step: int, seed: int, state: RunState, state_step: int, remedy: str
    ) -> None:
        phase = phase_of(method)
        super().__init__(
            f"{method} diverged: {metric} is not finite at {phase} step {step} (seed {seed}); {remedy}"
            + (f". The last finite state is that of step {state_step}" if step else "")
        )
        self.method, self.phase, self.metric = method, phase, metric
        self.step, self.seed = step, seed
        self.state, self.state_step = state, state_step
        self.seconds = 0.0


def require_finite(
    metrics: dict[str, np.ndarray],  # [S, num_steps] each; empty before the first step
    measured: Scalars,  # [S] each, after the last of these steps
    state: RunState,
    *,
    last_finite: RunState,
    first_step: int,
    method: str,
    config: TrainConfig,
) -> None:
    """Raises DivergenceError for the first number that is not finite in a chunk, the state after it or its measures."""
    found = list(_find_nonfinite(metrics, measured, state))
    if found:
        position, name, index = min(found, key=lambda item: item[0])  # the first of those that came together
        step, kept = first_step + position + 1, to_host(without_carry(last_finite))
        remedy = _remedy(config, method, name, first_step) if step else NO_STEP
        raise DivergenceError(method, name, step, config.seeds[index], kept, first_step, remedy)


def _find_nonfinite(
    metrics: dict[str, np.ndarray], measured: Scalars, state: RunState
) -> Iterator[tuple[int, str, int]]:
    """The position in the chunk, -1 before it, the name and the index of the seed of each; metrics of steps first."""
    for name, values in metrics.items():
        yield from ((int(step), name, int(index)) for index, step in np.argwhere(~np.isfinite(values)))
    last = next(iter(metrics.values())).shape[1] - 1 if metrics else -1
    trees = {name: tree for name, tree in without_carry(state)._asdict().items() if tree is not None}
    are_finite = {name: to_host(_is_finite(tree)) for name, tree in trees.items()}
    are_finite |= {name: np.isfinite(values) for name, values in measured.items()}
    for name, is_finite in are_finite.items():
        yield from ((last, name, int(index)) for index in np.flatnonzero(~is_finite))


def _remedy(config: TrainConfig, method: str, metric: str, first_step: int) -> str:
    """Which settings may help: those of how far theta and phi move, first of the one that is more likely at fault.

    Both are named: whichever of the two goes too far takes the other with it.
    """
    inner, kind, is_offline = config.inner, find_method(method), method == OFFLINE
    of_theta = ["tuning.learning_rates" if kind.is_tuned else "inner.learning_rate"]
    if inner.first_step_rate and kind.has_learned_loss:
        of_theta = ["inner.first_step_rate"]  # whatever alpha is
    of_phi = ["offline.learning_rate"] if is_offline else []
    if kind.updates_phi and first_step < config.first_joint_step:
        of_phi = ["outer.learning_rate"]
    is_of_phi = metric in ("hypergradient_norm", "phi_update_ratio", "phi") or is_offline  # where every theta is fresh
    remedies = [f"a smaller {' or '.join(of_phi + of_theta if is_of_phi else of_theta + of_phi)}"]
    if inner.clip_norm:
        remedies.append("a smaller inner.clip_norm")
    elif not inner.first_step_rate:
        remedies.append("inner.clip_norm")
        if kind.has_learned_loss:
            remedies.append("inner.first_step_rate")
    if of_phi and config.on_nonfinite != "back_off":
        remedies.append('on_nonfinite="back_off"')
    return f"{', or '.join(remedies)} may help, in another workdir"
