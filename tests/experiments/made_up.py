"""Numbers of comparisons, for tests of what is shown of them."""

import numpy as np

from experiments.study.compare import paired_tests

SPREAD = np.linspace(0.99, 1.01, 4)  # of the seeds, around their mean


def numbers_of(comparison, means):
    """The numbers of a comparison whose arms have these mean errors."""
    arms = {
        arm.name: {"title": arm.title, "chosen": None, "tuning": []}
        | {"test": {"mean": mean, "std": None, "per_seed": (mean * SPREAD).tolist()}}
        | {"steps": [0, 250, 500], "curve": [[0.9, 2 * mean, mean]]}
        for arm, mean in zip(comparison.arms, means, strict=True)
    }
    numbers = {"title": comparison.title, "metric": "error_rate", "reference": "adalfl", "seeds": [*range(len(SPREAD))]}
    numbers |= {"tuning_seeds": [0], "target": None, "arms": arms}
    return numbers | paired_tests(arms, "adalfl", ())
