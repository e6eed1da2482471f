"""What the numbers of one chunk say: their means, whether all are finite, whether theta and phi still move."""

from __future__ import annotations

import math

import jax
import numpy as np

from adalfl_jax.training.config import TrainConfig
from adalfl_jax.training.faults import SKIPPED, all_finite
from adalfl_jax.training.methods import OFFLINE, find_method
from adalfl_jax.training.results import DivergenceError
from adalfl_jax.training.sharding import to_host
from adalfl_jax.training.state import RunState, without_carry

OF_UPDATES = ("outer_loss", "hypergradient_norm", "phi_update_ratio")  # measured where phi is updated

AT_REST = 1e-6  # times the gradient of the task loss
TOO_LONG = 1.0  # as a rate on the task loss; docs/noisy_labels.md has what begins with 0.3 to 0.4, and what with more
NO_STEP = "theta, phi or a measure of them is not finite before the first step: look at the data and learned_loss.start"

_is_finite = jax.jit(jax.vmap(all_finite))  # of each seed, so that a state stays on its devices


def updates_of_phi(steps: range, every: int = 1, end: float = math.inf, first: int = 0) -> np.ndarray:
    """Whether phi is updated at each of some steps, `[num_steps]` bool: at every n-th from `first` on, before `end`."""
    numbers = np.array(steps)
    return (numbers % every == every - 1) & (numbers >= first) & (numbers < end)


def chunk_means(metrics: dict[str, np.ndarray], updates: np.ndarray) -> dict[str, np.ndarray]:
    """Means `[S]` over the steps of a chunk; what is measured where phi is updated, over those `updates`.

    Steps that were skipped are counted, and are in no mean; one of no steps is 0. Sums are in double precision, where
    finite numbers of a run about to diverge stay finite.
    """
    is_due = updates | (not updates.any())
    num_skipped = {SKIPPED: metrics[SKIPPED].sum(axis=1)} if SKIPPED in metrics else {}
    means = {}
    for name, values in metrics.items():
        steps = is_due if name in OF_UPDATES else np.ones_like(is_due)
        is_taken = metrics[SKIPPED] == 0 if num_skipped else np.ones_like(values, bool)
        num_taken = is_taken[:, steps].sum(axis=1)
        means[name] = values[:, steps].astype(np.float64).sum(axis=1) / np.maximum(num_taken, 1)
    return means | num_skipped


def seeds_without_gradient(metrics: dict[str, np.ndarray], updates: np.ndarray) -> list[int]:
    """The positions of seeds whose meta-gradient was exactly zero at every one of two or more updates of a chunk."""
    if "hypergradient_norm" not in metrics or updates.sum() < 2:
        return []
    is_zero = metrics["hypergradient_norm"][:, updates] == 0
    if SKIPPED in metrics:
        is_zero &= metrics[SKIPPED][:, updates] == 0
    return np.flatnonzero(is_zero.all(axis=1)).tolist()


def seeds_at_rest(measured: dict[str, np.ndarray]) -> list[int]:
    """The positions of seeds whose learned loss moves theta by less than a millionth of what the task loss would."""
    return np.flatnonzero(measured["gradient_scale"] < AT_REST).tolist() if "gradient_scale" in measured else []


def seeds_with_long_steps(measured: dict[str, np.ndarray], learning_rate: float) -> list[int]:
    """The positions of seeds that a step moves as far as one on the task loss would at too large a rate."""
    if "gradient_scale" not in measured:
        return []
    return np.flatnonzero(learning_rate * measured["gradient_scale"] > TOO_LONG).tolist()


def require_finite(
    metrics: dict[str, np.ndarray],  # [S, num_steps] each; empty before the first step
    measured: dict[str, np.ndarray],  # [S] each, after the last of these steps
    state: RunState,
    *,
    last_finite: RunState,
    first_step: int,
    method: str,
    config: TrainConfig,
) -> None:
    """Raises for the first number that is not finite in the metrics of a chunk, the state after it or its measures."""
    num_steps = next(iter(metrics.values())).shape[1] if metrics else 0
    found = [
        (int(step), name, int(index))
        for name, values in metrics.items()
        for index, step in np.argwhere(~np.isfinite(values))
    ]
    last = num_steps - 1
    for name, tree in without_carry(state)._asdict().items():
        broken = [] if tree is None else np.flatnonzero(~to_host(_is_finite(tree)))
        found += [(last, name, int(index)) for index in broken]
    for name, values in measured.items():
        found += [(last, name, int(index)) for index in np.flatnonzero(~np.isfinite(values))]
    if found:
        position, name, index = min(found, key=lambda item: item[0])
        step, state = first_step + position + 1, to_host(without_carry(last_finite))
        remedy = _remedy(config, method, name, first_step) if step else NO_STEP
        raise DivergenceError(method, name, step, config.seeds[index], state, first_step, remedy)


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
