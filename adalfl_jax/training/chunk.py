"""What the numbers of one chunk say: their means, and whether theta and phi still move."""

from __future__ import annotations

import math

import numpy as np

from adalfl_jax.training.faults import SKIPPED

OF_UPDATES = ("outer_loss", "hypergradient_norm", "phi_update_ratio")  # measured where phi is updated

AT_REST = 1e-6  # times the gradient of the task loss
TOO_LONG = 1.0  # as a rate on the task loss; docs/noisy_labels.md has what begins with 0.3 to 0.4, and what with more


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
